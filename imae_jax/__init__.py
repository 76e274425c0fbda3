"""In-model anti-expert (IMAE) and factuality decoding of Llama-family LLMs in JAX."""

from pathlib import Path

# The rooms `convert`, `train` and `evaluate` are installed inside this package; in a checkout that
# is not installed they lie beside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "convert").is_dir():
    __path__.append(str(_checkout))

__version__ = "0.1.0"
