"""In-model anti-expert (IMAE) and factuality decoding of Llama-family LLMs in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from imae_jax import targets

if TYPE_CHECKING:
    from imae_jax.activations import capture
    from imae_jax.convert import load_model
    from imae_jax.decode import Method, Sampler, parse_method
    from imae_jax.errors import UserError
    from imae_jax.language_model import LanguageModel

__version__ = "0.1.0"

__all__ = [
    "LanguageModel",
    "Method",
    "Sampler",
    "UserError",
    "__version__",
    "capture",
    "load_model",
    "parse_method",
]

targets.leave_out()

# Imported on first use: JAX's settings can still be made after `import imae_jax`.
_SOURCES = {
    "LanguageModel": "imae_jax.language_model",
    "Method": "imae_jax.decode",
    "Sampler": "imae_jax.decode",
    "UserError": "imae_jax.errors",
    "capture": "imae_jax.activations",
    "load_model": "imae_jax.convert",
    "parse_method": "imae_jax.decode",
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_SOURCES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
