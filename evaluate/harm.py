"""`python -m imae_jax.evaluate.harm`: what a method does to a model on neutral text."""

import sys

from imae_jax.evaluate.__main__ import benchmark_command

main = benchmark_command("harm", "python -m imae_jax.evaluate.harm")

if __name__ == "__main__":
    sys.exit(main())
