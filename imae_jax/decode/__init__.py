"""Decoding and scoring with any method, compiled."""

from imae_jax.decode.loop import generate
from imae_jax.decode.methods import Method, parse_method, split_methods
from imae_jax.decode.sampling import Sampler
from imae_jax.decode.scoring import Continuation, encode, score, score_greedy, windows

__all__ = [
    "Continuation",
    "Method",
    "Sampler",
    "encode",
    "generate",
    "parse_method",
    "score",
    "score_greedy",
    "split_methods",
    "windows",
]
