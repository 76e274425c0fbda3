"""In-model contrast: base mode against anti-expert mode of one IMAE model."""

import dataclasses
from collections.abc import Sequence

import jax

from imae_jax.decode.methods.contrast import Contrast
from imae_jax.decode.methods.protocol import Stream, StreamLogits, WithUnits


@dataclasses.dataclass(frozen=True)
class InModelContrast(Contrast, WithUnits):
    """`β · log p_base(v) − log p_anti(v)` on plausible(p_base, α): the contrast that IMAE's expert mode is
    trained to imitate (IMAE, section 3.2, equation of p_target), formed explicitly.

    Cost: both modes run as two rows of one batch over the same weights.

    Attributes:
        beta: weight of the base term.
        anti_strength: strength of the anti-expert stream.
    """

    beta: float = 1.0
    anti_strength: float = 1.0

    @property
    def name(self) -> str:
        return "in-model-contrast"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return Stream(), Stream(strength=self.anti_strength)

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        base, anti = (jax.nn.log_softmax(x.final) for x in logits)
        return self.combine(base - anti, logits[0].final, (self.beta - 1) * base)
