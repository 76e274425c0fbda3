"""In-model contrast: base mode against anti-expert mode of one IMAE model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from imae_jax.decode.methods.protocol import IMPLAUSIBLE_SCORE, Method, Stream, plausible
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class InModelContrast(Method):
    """`β · log p_base(v) − log p_anti(v)` on the plausible tokens: the contrast that IMAE's expert mode is
    trained to imitate (IMAE, section 3.2, equation of p_target), formed explicitly.

    Both modes run as two rows of one batch over the same weights.

    Attributes:
        beta: weight of the base term.
        alpha: plausibility threshold on p_base; 0 turns it off (as in the published TruthfulQA
            settings of ICD).
        renormalize: log-softmax of the contrast over the whole vocabulary, before implausible tokens are
            masked, as the published scripts of contrastive methods do. Off, multiple choice sums a
            likelihood ratio, which no single distribution over tokens can express: results must say which
            was used.
        anti_strength: strength of the anti-expert stream.
    """

    beta: float = 1.0
    alpha: float = 0.0
    renormalize: bool = False
    anti_strength: float = 1.0

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise UserError(f"in-model-contrast: alpha={self.alpha} must be between 0 and 1")

    @property
    def name(self) -> str:
        return "in-model-contrast"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return Stream(), Stream(strength=self.anti_strength)

    def scores(self, logits: Sequence[jax.Array], *, generating: bool) -> jax.Array:
        base, anti = (jax.nn.log_softmax(x) for x in logits)
        scores = self.beta * base - anti
        if self.renormalize:
            scores = jax.nn.log_softmax(scores)
        if self.alpha > 0:
            floor = -jnp.inf if generating else IMPLAUSIBLE_SCORE
            scores = jnp.where(plausible(base, self.alpha), scores, floor)
        return scores

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}
