"""Contrasts of two distributions: in-model contrast, ICD, CD and DoLa differ in what they contrast."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from imae_jax.config import LlamaConfig
from imae_jax.decode.methods.protocol import IMPLAUSIBLE_SCORE, Method, control
from imae_jax.errors import UserError
from imae_jax.plausibility import FORMS, plausible

ALPHA_GENERATING = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast(Method):
    """The settings that contrasts share.

    Attributes:
        alpha: plausibility threshold on the stronger side; 0 turns it off. Default: 0 in multiple choice, as
            in the published TruthfulQA settings, and 0.1 when generating.
        plausibility: form of the constraint, `probability` or `logit`; see `imae_jax.plausibility`.
        renormalize: log-softmax of the difference over the whole vocabulary, before implausible tokens
            are masked, as the published scripts do it. Off, multiple choice sums a likelihood ratio, which
            no single distribution over tokens can express: results must say which was used.
        implausible: score of implausible tokens; default: -1000 in multiple choice, so that sums stay
            finite, and -inf when generating.
        flip: reverses the sign of the contrast, as a control.
    """

    alpha: float | None = None
    plausibility: str = "probability"
    renormalize: bool = False
    implausible: float | None = dataclasses.field(default=None, metadata={"may_be_infinite": True})
    flip: bool = control(False)

    def __post_init__(self):
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"{self.name}: alpha={self.alpha} must be between 0 and 1")
        if self.plausibility not in FORMS:
            raise UserError(f"{self.name}: plausibility={self.plausibility!r}: use {' or '.join(FORMS)}")
        if self.implausible is not None and not self.implausible < 0:
            raise UserError(f"{self.name}: implausible={self.implausible} must be below 0")

    @property
    def normalized(self) -> bool:
        return self.renormalize

    @property
    def rules_out(self) -> bool:
        return self.implausible == float("-inf")

    def resolve(self, config: LlamaConfig, *, generating: bool) -> Self:
        alpha, implausible = self.alpha, self.implausible
        if alpha is None:
            alpha = ALPHA_GENERATING if generating else 0.0
        if implausible is None:
            implausible = float("-inf") if generating else IMPLAUSIBLE_SCORE
        return dataclasses.replace(self, alpha=alpha, implausible=implausible)

    def flipped(self) -> Self:
        return dataclasses.replace(self, flip=not self.flip)

    @property
    def centred(self) -> bool:
        """At β = 2 scores are log p of the stronger side and the contrast; else that has another factor."""
        return getattr(self, "beta", 1.0) == 2

    def combine(
        self, strong: jax.Array, weak: jax.Array, strong_logits: jax.Array, beta: float = 1.0
    ) -> jax.Array:
        """Scores, float32 [..., V], from log-probabilities of both sides and the stronger side's logits.

        They are `β · strong − weak`, that is `(β − 1) · strong` and the contrast `strong − weak`.
        """
        difference = beta * strong - weak
        if self.flip:
            difference = (beta - 1) * strong + (weak - strong)
        if self.renormalize:
            difference = jax.nn.log_softmax(difference)
        if self.alpha == 0:
            return difference
        kept = plausible(strong_logits, self.alpha, self.plausibility)
        return jnp.where(kept, difference, self.implausible)
