"""Decoding and scoring with any method, compiled."""

from imae_jax.continuation import Continuation, encode, windows
from imae_jax.decode.loop import GenerationOptions, generate
from imae_jax.decode.methods import Method, parse_method, split_methods
from imae_jax.decode.sampling import Sampler
from imae_jax.decode.scoring import Scored, score

__all__ = [
    "Continuation",
    "GenerationOptions",
    "Method",
    "Sampler",
    "Scored",
    "encode",
    "generate",
    "parse_method",
    "score",
    "split_methods",
    "windows",
]
