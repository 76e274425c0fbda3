"""Weights in and out: HuggingFace and GGUF checkpoints, IMAE directories, model references."""

from imae_jax.convert.references import LanguageModel, load_model

__all__ = ["LanguageModel", "load_model"]
