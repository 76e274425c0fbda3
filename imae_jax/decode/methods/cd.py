"""CD, contrastive decoding: an expert against an amateur."""

import dataclasses
from collections.abc import Sequence

import jax

from imae_jax.decode.methods.contrast import Contrast
from imae_jax.decode.methods.protocol import Resource, Stream, StreamLogits
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AmateurContrast(Contrast):
    """`log p_exp(v) − log p_ama(v)` on plausible(p_exp, α) (Li et al., arXiv 2210.15097, equations 2 and 3).

    With β, `(1 + β) log p_exp(v) − β log p_ama(v)`: the form of O'Brien and Lewis (arXiv 2309.09117, section
    3), who write it with logits, which differ from this by a number that all tokens share. They take β = 0.5.

    Attributes:
        beta: β of the second form; None for the first.
    """

    beta: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.beta is not None and not self.beta > 0:
            raise UserError(
                f"{self.name}: beta={self.beta} must be above 0: leave it out for log p_exp - log p_ama"
            )

    @property
    def centred(self) -> bool:
        return self.beta is not None

    def against(self, expert: jax.Array, amateur: jax.Array) -> jax.Array:
        """Scores, float32 [..., V], from the logits of both."""
        log_p, log_q = jax.nn.log_softmax(expert), jax.nn.log_softmax(amateur)
        if self.beta is None:
            return self.combine(log_p - log_q, expert)
        return self.combine(self.beta * (log_p - log_q), expert, log_p)


@dataclasses.dataclass(frozen=True)
class CD(AmateurContrast):
    """The contrast with another model.

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
        return self.against(logits[0].final, logits[1].final / self.temperature)
