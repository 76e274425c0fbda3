"""CD, contrastive decoding: an expert against an amateur."""

import dataclasses
from collections.abc import Sequence

import jax

from imae_jax.decode.methods.contrast import Contrast
from imae_jax.decode.methods.protocol import Resource, Stream, StreamLogits
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CD(Contrast):
    """`log p_exp(v) − log p_ama(v)` on plausible(p_exp, α) (Li et al., arXiv 2210.15097).

    Cost: two models with two caches.

    Attributes:
        amateur: reference of the amateur, such as `MODEL#layers=24`.
        temperature: of the amateur; the paper takes 0.5 for GPT-2, the published TruthfulQA scripts 1.
    """

    amateur: str = ""
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.amateur:
            raise UserError("cd needs amateur=MODEL: a weaker model with the same vocabulary")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"cd: temperature={self.temperature} must be above 0")

    @property
    def name(self) -> str:
        return "cd"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return Stream(), Stream(model=1)

    @property
    def resource(self) -> Resource:
        return Resource("model", self.amateur, "amateur")

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        expert = jax.nn.log_softmax(logits[0].final)
        amateur = jax.nn.log_softmax(logits[1].final / self.temperature)
        return self.combine(expert, amateur, logits[0].final)
