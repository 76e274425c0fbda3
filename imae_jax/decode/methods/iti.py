"""ITI, inference-time intervention: some heads' outputs shifted along a direction of truth."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax

from imae_jax.decode.methods.protocol import Resource, Stream, StreamLogits, WithNoise
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ITI(WithNoise):
    """`log p(v)` of the model with `α σ θ` added to the outputs of K heads, before `o_proj`, at every
    position that predicts a token of the answer (Li et al., arXiv 2306.03341).

    The published script edits the last position of a batch's first row only, which leaves multiple choice
    as it was.

    Cost: one forward pass.

    Attributes:
        directions: file written by `python -m imae_jax.evaluate.iti`: θ, σ and rank of every head.
        alpha: α; the paper takes 15 on Llama-7B.
        heads: K, how many heads of the highest rank; the paper takes 48 of Llama-7B's 1024.
    """

    directions: str = ""
    alpha: float = 15.0
    heads: int = 48

    def __post_init__(self):
        if not self.directions:
            raise UserError("iti needs directions=FILE: make one with python -m imae_jax.evaluate.iti")
        if self.heads < 1:
            raise UserError(f"iti: heads={self.heads} must be at least 1")

    @property
    def name(self) -> str:
        return "iti"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(shift=self.alpha),)

    @property
    def resource(self) -> Resource:
        return Resource("directions", self.directions, "directions")

    @property
    def normalized(self) -> bool:
        return True

    def flipped(self) -> Self:
        return dataclasses.replace(self, alpha=-self.alpha)

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return jax.nn.log_softmax(logits[0].final)

    def unnormalized_scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return logits[0].final
