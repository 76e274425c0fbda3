"""Steering: vectors added to the residual stream."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax

from imae_jax.decode.methods.protocol import Resource, Stream, StreamLogits, WithNoise
from imae_jax.errors import UserError

SCOPES = ("answer", "prompt", "all")


@dataclasses.dataclass(frozen=True)
class Steer(WithNoise):
    """`log p(v)` of the model with `h ← h + m v_l` after layers l, at the positions of a scope (Turner et
    al., "Activation Addition", arXiv 2308.10248; Panickssery et al., CAA, arXiv 2312.06681; Zou et al.,
    "Representation Engineering", arXiv 2310.01405).

    The position that predicts the answer's first token is steered. Earlier versions of CAA's published code,
    which other projects copied, begin one token late, *behind* the end of the instruction. Later ones begin
    at it, but steer the whole prompt where they do not find the end of the instruction. repeng steers every
    position.

    Cost: one forward pass, and an addition in every layer.

    Attributes:
        vectors: GGUF control vector, as `python -m imae_jax.evaluate.steer`, repeng and llama.cpp write it.
        strength: m. CAA takes -2 to 2 of its mean differences.
        layers: `all` of the file; `a..b`, both included; or numbers with `+` between them. They count as the
            file's names do: N is the layer whose output `direction.N` is added to, the first one is 0.
        scope: `answer`, positions that predict an answer's token, the first one included; `prompt`, all
            others; or `all`.
        keep_norm: rescale the residual stream to the norm that it had before, as repeng's `normalize` does.
    """

    vectors: str = ""
    strength: float = 1.0
    layers: str | tuple[int, ...] = "all"
    scope: str = "answer"
    keep_norm: bool = False

    def __post_init__(self):
        if not self.vectors:
            raise UserError("steer needs vectors=FILE: make one with python -m imae_jax.evaluate.steer")
        if self.scope not in SCOPES:
            raise UserError(f"steer: scope={self.scope!r}: use {', '.join(SCOPES)}")

    @property
    def name(self) -> str:
        return "steer"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(steer=self.strength, steer_scope=self.scope, keep_norm=self.keep_norm),)

    @property
    def resource(self) -> Resource:
        return Resource("vectors", self.vectors, "vectors")

    @property
    def normalized(self) -> bool:
        return True

    def flipped(self) -> Self | None:
        return dataclasses.replace(self, strength=-self.strength) if self.strength else None

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return jax.nn.log_softmax(logits[0].final)

    def unnormalized_scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return logits[0].final
