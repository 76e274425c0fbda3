"""COIECD: decoding by context where a token's information says that the two prompts conflict."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from imae_jax.decode.methods.cad import ContextContrast
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class COIECD(ContextContrast):
    """Contextual information-entropy constrained decoding (Yuan et al., "Discerning and Resolving Knowledge
    Conflicts through Adaptive Decoding with Contextual Information-Entropy Constraint", Findings of ACL 2024;
    code: github.com/Stacy027/COIECD at 3e6aaf7). With `l = log softmax(z)`:

        log softmax( l_ctx(v) + α (l_ctx(v) − l_no(v)) )   where p_ctx(v) > max p_ctx / ratio, unless only one
                                                           token is, or p_ctx(v) < ratio · min p_ctx
        log softmax( l_no(v) + α (l_ctx(v) − l_no(v)) )    elsewhere

    The paper bounds `−log p_ctx(v)` less the entropy of `p_no`. The code takes its softmax over tokens before
    it compares, in which an entropy that all tokens share cancels: what is left are the bounds above. The
    code counts the tokens of a whole batch, here every row counts its own, and it stops after as many tokens
    as the true answer has.

    Attributes:
        alpha: α; published: 1.
        ratio: of probabilities, at which the code's bounds lie: 4.
    """

    alpha: float = 1.0
    ratio: float = 4.0

    def __post_init__(self):
        if not self.ratio > 1:
            raise UserError(f"coiecd: ratio={self.ratio} must be above 1")

    @property
    def name(self) -> str:
        return "coiecd"

    def combine(self, with_context, without, difference):
        with_context, without = jax.nn.log_softmax(with_context), jax.nn.log_softmax(without)
        margin = math.log(self.ratio)
        likely = with_context > with_context.max(axis=-1, keepdims=True) - margin
        likely &= likely.sum(axis=-1, keepdims=True) > 1
        unlikely = with_context < with_context.min(axis=-1, keepdims=True) + margin
        return jnp.where(likely | unlikely, with_context, without) + self.alpha * difference
