"""AdaCAD: context-aware decoding whose strength follows how far context and memory disagree."""

import dataclasses

import jax
import jax.numpy as jnp

from imae_jax.decode.methods.cad import ContextContrast
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
        alpha = jnp.maximum(_jensen_shannon(with_context, without), self.floor)
        return with_context + alpha[..., None] * difference


def _jensen_shannon(a: jax.Array, b: jax.Array) -> jax.Array:
    """Divergence [...] of the distributions with logits [..., V], in nats."""
    log_a, log_b = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    log_mean = jnp.logaddexp(log_a, log_b) - jnp.log(2.0)
    terms = jnp.exp(log_a) * (log_a - log_mean) + jnp.exp(log_b) * (log_b - log_mean)
    return 0.5 * jnp.sum(terms, axis=-1)
