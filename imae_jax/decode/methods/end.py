"""END, cross-layer entropy enhanced decoding."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from imae_jax.config import LlamaConfig
from imae_jax.decode.methods.contrast import Constrained
from imae_jax.decode.methods.exits import candidate_layers
from imae_jax.decode.methods.protocol import Stream, StreamLogits


@dataclasses.dataclass(frozen=True, kw_only=True)
class END(Constrained):
    """`log p(v) − w H(v)` on plausible(p, α), where H(v) is the entropy, in nats, of the softmax *over
    layers* n of `z_n(v)`, the token's logits in early exits (Wu et al., "Improve Decoding Factuality by
    Token-wise Cross Layer Entropy of Large Language Models", arXiv 2502.03199; code:
    github.com/Arcade-Master/END at 9526d97).

    A token whose logit rises in few layers loses little. What is wrong in the code, and is not so here:

    - Multiple choice stops with a NameError. Without it, H of an answer's token i would be taken at position
      i of the *whole text*, in the primer; here it is of the position that predicts the token.
    - With a plausibility threshold multiple choice sums probabilities, not their logs.
    - In generation implausible tokens keep their logits and are spared w H. With large w (3 in its settings
      for questions of trivia) they can overtake all plausible ones. Here they are masked.

    Cost: one forward pass; the projections of all layers in one matmul.

    Attributes:
        weight: w, α in the paper; default: 0.25 in multiple choice and 1 when generating, as published for
            TruthfulQA.
        candidates: see `exits.candidate_layers`; published: `high`.
        with_last: whether the model's own logits count as those of one more layer; default: they do in
            multiple choice and not when generating, as in the published code.
        early_exit_norm: apply the final norm before early exits; the published code does not.
    """

    ALPHA_GENERATING: ClassVar[float] = 0.01

    weight: float | None = None
    candidates: str | tuple[int, ...] = "high"
    with_last: bool | None = None
    early_exit_norm: bool = False
    renormalize: bool = True

    @property
    def name(self) -> str:
        return "end"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(exits=self.candidates, exit_norm=self.early_exit_norm),)

    def resolve(self, config: LlamaConfig, *, generating: bool) -> Self:
        resolved = super().resolve(config, generating=generating)
        return dataclasses.replace(
            resolved,
            weight=(1.0 if generating else 0.25) if self.weight is None else self.weight,
            with_last=not generating if self.with_last is None else self.with_last,
            candidates=candidate_layers("end", self.candidates, config),
        )

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        last = logits[0].final
        return self.constrain(jax.nn.log_softmax(last) - self.weight * self._entropy(logits[0]), last)

    def unnormalized_scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        last = logits[0].final
        return self.mask(last - self.weight * self._entropy(logits[0]), last)

    def _entropy(self, logits: StreamLogits) -> jax.Array:
        """Entropy over layers of every token, float32 [..., V]."""
        layers = logits.exits
        if self.with_last:
            layers = jnp.concatenate([layers, logits.final[None]])
        below = layers - layers.max(axis=0)
        shares = jnp.exp(below)  # Not divided by their sum: that would cost a second exp.
        total = jnp.sum(shares, axis=0)
        return jnp.log(total) - jnp.sum(below * shares, axis=0) / total
