"""ICD, induce-then-contrast decoding: the model against an LLM trained on hallucinations."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax

from imae_jax.decode.methods.contrast import Contrast
from imae_jax.decode.methods.protocol import Resource, Stream, StreamLogits, WithNoise
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ICD(Contrast, WithNoise):
    """`β · log p_base(v) − log p_antiLLM(v)` on plausible(p_base, α) (Zhang et al., arXiv 2312.15710).

    Cost: with a LoRA adapter of the same base, two rows of one batch over the same weights; with any other
    anti-expert LLM, a second model.

    Attributes:
        anti_expert: reference of the anti-expert LLM.
        beta: weight of the base term; the published scripts use 1.
        shared: whether the anti-expert LLM is an adapter of the model itself; known once it is loaded.
    """

    anti_expert: str = ""
    beta: float = 1.0
    shared: bool = dataclasses.field(default=False, metadata={"setting": False})

    def __post_init__(self):
        super().__post_init__()
        if not self.anti_expert:
            raise UserError("icd needs anti_expert=MODEL: an adapter or a model trained on hallucinations")

    @property
    def name(self) -> str:
        return "icd"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return Stream(), Stream(adapter=1.0) if self.shared else Stream(model=1)

    @property
    def resource(self) -> Resource:
        return Resource("anti_expert_llm", self.anti_expert, "anti_expert")

    def with_resource(self, *, shared: bool) -> Self:
        return dataclasses.replace(self, shared=shared)

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        base, anti = (jax.nn.log_softmax(x.final) for x in logits)
        return self.combine(base - anti, logits[0].final, (self.beta - 1) * base)
