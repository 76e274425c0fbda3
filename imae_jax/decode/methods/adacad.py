"""AdaCAD: context-aware decoding whose strength follows how far context and memory disagree."""

import dataclasses

import jax
import jax.numpy as jnp

from imae_jax.decode.methods.cad import ContextContrast
from imae_jax.decode.methods.contrast import jensen_shannon
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class AdaCAD(ContextContrast):
    """`log softmax(z_ctx + α_t (z_ctx − z_no))` with `α_t = max(JSD(p_ctx ‖ p_no), floor)` at every token,
    the Jensen-Shannon divergence in nats, at most ln 2 (Wang et al., "AdaCAD", arXiv 2409.07394, equations
    2 and 3; code: github.com/HanNight/AdaCAD).

    The code takes one α_t for all rows of a batch; here every row has its own. It adds an offset to α_t
    where the paper has a floor.

    Attributes:
        floor: published: 0 for questions, 0.3 for long texts.
    """

    floor: float = 0.0

    def __post_init__(self):
        if not self.floor >= 0:
            raise UserError(f"adacad: floor={self.floor} must be at least 0")

    @property
    def name(self) -> str:
        return "adacad"

    def combine(self, with_context, without, difference):
        divergence = jensen_shannon(jax.nn.log_softmax(with_context), jax.nn.log_softmax(without))
        alpha = jnp.maximum(divergence, self.floor)
        return with_context + alpha[..., None] * difference
