"""`python -m imae_jax.evaluate.answers`: what methods write in answer to TruthfulQA's questions."""

import sys

from imae_jax.evaluate.__main__ import benchmark_command

main = benchmark_command("answers", "python -m imae_jax.evaluate.answers")

if __name__ == "__main__":
    sys.exit(main())
