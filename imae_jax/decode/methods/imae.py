"""IMAE's modes: one stream with the units at a given strength."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from imae_jax.anti_expert import MODES, parse_mode
from imae_jax.decode.methods.protocol import Method, Stream, StreamLogits
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Strength(Method):
    """Log-probabilities of the model with its units at strength `o` (IMAE, section 3.1).

    Score: `log p(v)`. Cost: one stream; with `o` = 0 the base model's own.

    Attributes:
        strength: -1 expert, 0 base, +1 anti-expert; any real number is a dial between and beyond.
        gate_threshold: gates below it count as closed, and at batch 1 their units' weights are not read. The
            paper's units have none: 0.
    """

    strength: float = MODES["expert"]
    gate_threshold: float = 0.0

    def __post_init__(self):
        parse_mode(self.strength)
        if not 0 <= self.gate_threshold <= 1:
            raise UserError(f"imae: gate_threshold={self.gate_threshold} must be between 0 and 1")

    @property
    def name(self) -> str:
        named = {value: name for name, value in MODES.items()}
        name = named.get(self.strength, f"{self.strength:g}")
        return f"{name}, gates above {self.gate_threshold:g}" if self.gate_threshold else name

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(strength=self.strength, gate_threshold=self.gate_threshold),)

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return jax.nn.log_softmax(logits[0].final)

    def unnormalized_scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return logits[0].final

    def token_scores(
        self, logits: Sequence[StreamLogits], positions: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        final = logits[0].final
        return final[positions, tokens] - jax.nn.logsumexp(final, axis=-1)[positions]

    def settings(self) -> dict[str, Any]:
        return {"name": "imae", **dataclasses.asdict(self)}
