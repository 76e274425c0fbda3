"""Weights in and out: HuggingFace and GGUF checkpoints, IMAE directories, model references."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imae_jax.convert.references import LanguageModel, load_model

__all__ = ["LanguageModel", "load_model"]


def __getattr__(name: str) -> Any:
    """Imported on first use, so that `imae convert --help` does not wait for JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from imae_jax.convert import references

    return getattr(references, name)
