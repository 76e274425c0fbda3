"""Training of the anti-expert units: configs, data, the compiled step and the loop around it."""
