"""`python -m imae_jax.evaluate.truthfulqa`: multiple choice (MC1, MC2, MC3) with any methods."""

import sys

from imae_jax.evaluate.__main__ import benchmark_command

main = benchmark_command("truthfulqa", "python -m imae_jax.evaluate.truthfulqa")

if __name__ == "__main__":
    sys.exit(main())
