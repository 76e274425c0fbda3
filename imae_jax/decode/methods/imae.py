"""IMAE's modes: one stream with the units at a given strength."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax

from imae_jax.anti_expert import MODES, parse_mode
from imae_jax.decode.methods.protocol import Stream, StreamLogits, WithUnits


@dataclasses.dataclass(frozen=True)
class Strength(WithUnits):
    """Log-probabilities of the model with its units at strength `o` (IMAE, section 3.1).

    Score: `log p(v)`. Cost: one stream; with `o` = 0 the base model's own.

    Attributes:
        strength: -1 expert, 0 base, +1 anti-expert; any real number is a dial between and beyond.
    """

    strength: float = MODES["expert"]

    def __post_init__(self):
        parse_mode(self.strength)

    @property
    def name(self) -> str:
        named = {value: name for name, value in MODES.items()}
        return named.get(self.strength, f"{self.strength:g}")

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(strength=self.strength),)

    @property
    def normalized(self) -> bool:
        return True

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return jax.nn.log_softmax(logits[0].final)

    def unnormalized_scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return logits[0].final

    def token_scores(
        self, logits: Sequence[StreamLogits], positions: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        final = logits[0].final
        return final[positions, tokens] - jax.nn.logsumexp(final, axis=-1)[positions]

    def flipped(self) -> Self | None:
        return dataclasses.replace(self, strength=-self.strength) if self.strength else None

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"name": "imae"}
