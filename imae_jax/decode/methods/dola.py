"""DoLa: the last layer against an earlier one, chosen per token or fixed."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp

from imae_jax.config import LlamaConfig
from imae_jax.decode.methods.contrast import Contrast, jensen_shannon, log_of
from imae_jax.decode.methods.exits import candidate_layers
from imae_jax.decode.methods.protocol import Stream, StreamLogits
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DoLa(Contrast):
    """`log q_N(v) − log q_M(v)` on plausible(q_N, α), where q_n is the softmax of layer n's early exit and M
    the candidate with the largest divergence from the last layer (Chuang et al., arXiv 2309.03883).

    The divergence is `½ [KL(m ‖ q_N) + KL(m ‖ q_n)]` with `m = ½ (q_N + q_n)`, as the published code
    computes it; the paper writes the Jensen-Shannon divergence, whose KLs go the other way. M is chosen for
    every row and position: never averaged over a batch.

    Cost: one forward pass; the projections of all candidates in one matmul.

    Attributes:
        candidates: see `exits.candidate_layers`; the paper takes `high` for TruthfulQA on Llama-2-7B.
        divergence: `published` or `jensen-shannon`.
        early_exit_norm: apply the final norm before early exits; the published code does not.
    """

    candidates: str | tuple[int, ...] = "high"
    divergence: str = "published"
    early_exit_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.divergence not in ("published", "jensen-shannon"):
            raise UserError(f"dola: divergence={self.divergence!r}: use published or jensen-shannon")

    @property
    def name(self) -> str:
        return "dola"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(exits=self.candidates, exit_norm=self.early_exit_norm),)

    def resolve(self, config: LlamaConfig, *, generating: bool) -> Self:
        resolved = super().resolve(config, generating=generating)
        return dataclasses.replace(resolved, candidates=candidate_layers("dola", self.candidates, config))

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        last, early = (jax.nn.log_softmax(x) for x in (logits[0].final, logits[0].exits))
        divergence = _mixture_divergence if self.divergence == "published" else jensen_shannon
        chosen = jnp.argmax(divergence(last[None], early), axis=0)
        premature = jnp.take_along_axis(early, chosen[None, ..., None], axis=0)[0]
        return self.combine(last - premature, logits[0].final)


@dataclasses.dataclass(frozen=True)
class StaticDoLa(Contrast):
    """`log q_N(v) − log q_M(v)` on plausible(q_N, α) with one layer M for all tokens.

    Attributes:
        layer: M; 0 is the embedding's output.
        early_exit_norm: as of `DoLa`.
    """

    layer: int = 0
    early_exit_norm: bool = False

    @property
    def name(self) -> str:
        return "dola-static"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(exits=(self.layer,), exit_norm=self.early_exit_norm),)

    def resolve(self, config: LlamaConfig, *, generating: bool) -> Self:
        candidate_layers("dola-static", [self.layer], config)
        return super().resolve(config, generating=generating)

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        last, early = (jax.nn.log_softmax(x) for x in (logits[0].final, logits[0].exits[0]))
        return self.combine(last - early, logits[0].final)


def _mixture_divergence(last: jax.Array, early: jax.Array) -> jax.Array:
    """`½ [KL(m ‖ q_N) + KL(m ‖ q_n)]` over the last axis, from log-probabilities."""
    m = (jnp.exp(last) + jnp.exp(early)) / 2
    return jnp.sum(m * (log_of(m) - (last + early) / 2), axis=-1)
