"""DExperts: the model, towards one adapter of it and away from another."""

import dataclasses
from collections.abc import Sequence

import jax

from imae_jax.decode.methods.contrast import Contrast
from imae_jax.decode.methods.protocol import Resource, Stream, StreamLogits, WithNoise
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DExperts(Contrast, WithNoise):
    """`log p_base(v) + w (log p_expert(v) − log p_anti(v))` on plausible(p_base, α) (Liu et al., "DExperts",
    arXiv 2105.03023, equation 2; code: github.com/alisawuffles/DExperts at 30e2af5).

    The paper writes it with logits, which differ from this by a number that all tokens share. What both
    adapters learned, such as the style of their data, cancels.

    Differences to the code: its experts are models of their own, and all three run over the whole text again
    for every token; and it keeps the base's top-p 0.9, where here those tokens stay that are plausible.

    Cost: three rows of one batch over the same weights, plus the adapters'.

    Attributes:
        expert, anti_expert: references of LoRA adapters of the model, such as those that objective `pairs`
            trains on right and on wrong answers.
        weight: w, α in the paper; it takes 2 against toxicity and 3.2 for sentiment.
    """

    expert: str = ""
    anti_expert: str = ""
    weight: float = 2.0
    renormalize: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        for setting in ("expert", "anti_expert"):
            if not getattr(self, setting):
                raise UserError(f"dexperts needs {setting}=ADAPTER: a LoRA adapter of the model")

    @property
    def name(self) -> str:
        return "dexperts"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return Stream(), Stream(adapter=(1.0, 0.0)), Stream(adapter=(0.0, 1.0))

    @property
    def resource(self) -> Resource:
        return Resource("adapters", (self.expert, self.anti_expert), "expert, anti_expert")

    @property
    def centred(self) -> bool:
        return True

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        base, expert, anti = (jax.nn.log_softmax(x.final) for x in logits)
        return self.combine(self.weight * (expert - anti), logits[0].final, base)
