"""`python -m imae_jax.evaluate.halueval`: preferences for right or hallucinated answers."""

import sys

from imae_jax.evaluate.__main__ import benchmark_command

main = benchmark_command("halueval", "python -m imae_jax.evaluate.halueval")

if __name__ == "__main__":
    sys.exit(main())
