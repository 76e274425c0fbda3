"""ICD: the base against an LLM that was tuned to hallucinate."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from imae_jax.decode.methods.protocol import Method, Stream


@dataclasses.dataclass(frozen=True)
class LogRatio(Method):
    """`log p_base(v) − log p_anti(v)` of a base and its adapted self: what the token filter thresholds.

    Both streams run as two rows of one batch; the low-rank deltas act on the second.
    """

    @property
    def name(self) -> str:
        return "log-ratio"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return Stream(), Stream(adapter=1.0)

    def scores(self, logits: Sequence[jax.Array], *, generating: bool) -> jax.Array:
        base, anti = (jax.nn.log_softmax(x) for x in logits)
        return base - anti

    def token_scores(self, logits: Sequence[jax.Array], tokens: jax.Array) -> jax.Array:
        def log_prob(x):
            chosen = jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]
            return chosen - jax.nn.logsumexp(x, axis=-1)

        base, anti = map(log_prob, logits)
        return base - anti

    def settings(self) -> dict[str, Any]:
        return {"name": self.name}
