"""The plausibility constraint as methods share it, and contrasts of two distributions."""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from imae_jax.config import LlamaConfig
from imae_jax.decode.methods.protocol import IMPLAUSIBLE_SCORE, Method, control
from imae_jax.errors import UserError
from imae_jax.plausibility import FORMS, plausible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constrained(Method):
    """The settings of methods whose scores are kept to plausible tokens.

    Attributes:
        alpha: plausibility threshold; 0 turns it off. Default: 0 in multiple choice, as in the published
            TruthfulQA settings, and `ALPHA_GENERATING` when generating.
        plausibility: form of the constraint, `probability` or `logit`; see `imae_jax.plausibility`.
        renormalize: log-softmax of the scores over the whole vocabulary, before implausible tokens are
            masked, as the published scripts do it. Off, multiple choice sums what no single distribution
            over tokens can express, such as a likelihood ratio: results must say which was used.
        implausible: score of implausible tokens; default: -1000 in multiple choice, so that sums stay
            finite, and -inf when generating.
    """

    ALPHA_GENERATING: ClassVar[float] = 0.1

    alpha: float | None = None
    plausibility: str = "probability"
    renormalize: bool = False
    implausible: float | None = dataclasses.field(default=None, metadata={"may_be_infinite": True})

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
            alpha = self.ALPHA_GENERATING if generating else 0.0
        if implausible is None:
            implausible = float("-inf") if generating else IMPLAUSIBLE_SCORE
        return dataclasses.replace(self, alpha=alpha, implausible=implausible)

    def mask(self, scores: jax.Array, logits: jax.Array) -> jax.Array:
        """Scores, float32 [..., V], with `implausible` for tokens that are so under `logits`."""
        if self.alpha == 0:
            return scores
        return jnp.where(plausible(logits, self.alpha, self.plausibility), scores, self.implausible)

    def constrain(self, scores: jax.Array, logits: jax.Array) -> jax.Array:
        """The same, normalized first where the settings say so."""
        return self.mask(jax.nn.log_softmax(scores) if self.renormalize else scores, logits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast(Constrained):
    """A method that scores tokens by the difference of two distributions.

    Attributes:
        flip: reverses the sign of the difference, as a control.
    """

    flip: bool = control(False)

    def flipped(self) -> Self:
        return dataclasses.replace(self, flip=not self.flip)

    @property
    def centred(self) -> bool:
        """At β = 2 scores are log p of the stronger side and the contrast; else that has another factor."""
        return getattr(self, "beta", 1.0) == 2

    def combine(self, difference: jax.Array, logits: jax.Array, anchor: jax.Array | float = 0.0) -> jax.Array:
        """Scores, float32 [..., V]: `anchor + difference`, or `anchor − difference` if flipped.

        Args:
            difference: of log-probabilities, the weaker side's subtracted from the stronger one's.
            logits: of which plausible tokens are taken.
            anchor: what flipping leaves alone.
        """
        return self.constrain(anchor - difference if self.flip else anchor + difference, logits)


def jensen_shannon(a: jax.Array, b: jax.Array) -> jax.Array:
    """`½ [KL(p ‖ m) + KL(q ‖ m)]`, m their mean, in nats: [...] from log-probabilities [..., V]."""
    p, q = jnp.exp(a), jnp.exp(b)
    log_m = log_of((p + q) / 2)
    return jnp.sum(p * (a - log_m) + q * (b - log_m), axis=-1) / 2


def log_of(m: jax.Array) -> jax.Array:
    """The logarithm of probabilities that a factor of 0 follows where they underflow: cheaper than one of
    log-probabilities."""
    return jnp.log(jnp.maximum(m, jnp.finfo(m.dtype).tiny))
