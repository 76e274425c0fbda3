"""What a decoding method is."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

IMPLAUSIBLE_SCORE = -1000.0
"""Score of implausible tokens in multiple choice, so that a sum stays finite; -inf when generating."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """One forward pass. The streams of a method run as rows of one batch, so that weights that they
    share are read once.

    Attributes:
        strength: the anti-expert units' `o`; 0 leaves them out.
        adapter: factor of the low-rank deltas; 0 leaves them out.
    """

    strength: float = 0.0
    adapter: float = 0.0


class Method(abc.ABC):
    """A decoding method.

    Implementations are frozen dataclasses: hashable, since compiled functions take them as static
    arguments.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name in results and tables."""

    @property
    @abc.abstractmethod
    def streams(self) -> tuple[Stream, ...]:
        """The forward passes that `scores` needs, in its order."""

    @abc.abstractmethod
    def scores(self, logits: Sequence[jax.Array], *, generating: bool) -> jax.Array:
        """Next-token scores, float32 [..., V].

        Args:
            logits: one float32 [..., V] a stream.
            generating: False when scoring given answers: implausible tokens then get a finite score.
        """

    def token_scores(self, logits: Sequence[jax.Array], tokens: jax.Array) -> jax.Array:
        """`scores` of given tokens alone: int32 [...] to float32 [...].

        To be overridden where that is cheaper than building [..., V].
        """
        scores = self.scores(logits, generating=False)
        return jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What to write into results: enough to build the method again."""


def plausible(log_probs: jax.Array, alpha: float) -> jax.Array:
    """The adaptive plausibility constraint: `{v : p(v) ≥ α · max_w p(w)}` as bool [..., V].

    Args:
        log_probs: [..., V]; logits do as well, since the maximum is subtracted.
        alpha: 0 < α ≤ 1. For α = 0 the constraint is off: callers skip it.
    """
    top = jnp.max(log_probs, axis=-1, keepdims=True)
    return log_probs >= top + jnp.log(alpha)
