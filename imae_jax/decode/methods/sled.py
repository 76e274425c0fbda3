"""SLED: the last layer's logits move towards what the early layers' logits point at."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp

from imae_jax.config import LlamaConfig
from imae_jax.cpu import argmax
from imae_jax.decode.methods.exits import candidate_layers
from imae_jax.decode.methods.protocol import Method, Stream, StreamLogits
from imae_jax.errors import UserError

EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class SLED(Method):
    """Self logits evolution decoding (Zhang et al., arXiv 2411.02433).

    With `z_n` an early exit's logits, `z_N` the last ones, `q = softmax(z)`, `d_n = z_n − z_N` and I the `k`
    tokens with the largest `z_N`:

        c_{n,i} = cos(q_n − e_i, d_n) = (q_n·d_n − d_n[i]) / (‖d_n‖ √(‖q_n‖² − 2 q_n[i] + 1))
        m_{n,i} = max(c_{n,i}, 0)²
        P_latent[i] = Σ_n s_n m_{n,i} / Σ_i m_{n,i} = Σ_n m_{n,i} / Σ_{n,i} m_{n,i}
        z ← z − ρ (1 − j / steps) (softmax(z) − P_latent)   for j = 0 … steps − 1, from z_N

    The closed form of the cosine costs O(V + k) a layer, where the published script builds k × V. Scores are
    `log softmax(z)` with tokens outside of I at `lower_bound` before the softmax.

    Cost: one forward pass; the projections of all candidates in one matmul.

    Attributes:
        candidates: see `exits.candidate_layers`.
        rate: ρ. Published for TruthfulQA: 2.5 (7B), 2 (70B, 8B-Instruct).
        scale: k. Published for TruthfulQA: 75 (7B), 50 (13B chat, 70B, 8B-Instruct), 100 (13B, Llama-3-8B).
        steps: default: 10 in multiple choice, 1 when generating, as in the published code.
        lower_bound: logit of tokens outside of I; default: -100 in multiple choice, -1000 when generating.
        renormalize: off sums raw `z`, as the published script does on multiple choice, where its MC2 then
            overflows.
        early_exit_norm: apply the final norm before early exits; the published code does not.
    """

    candidates: str | tuple[int, ...] = "all"
    rate: float = 2.5
    scale: int = 75
    steps: int | None = None
    lower_bound: float | None = None
    renormalize: bool = True
    early_exit_norm: bool = False

    def __post_init__(self):
        if self.scale < 1:
            raise UserError(f"sled: scale={self.scale} must be at least 1")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"sled: steps={self.steps} must be at least 1")

    @property
    def name(self) -> str:
        return "sled"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(exits=self.candidates, exit_norm=self.early_exit_norm),)

    @property
    def normalized(self) -> bool:
        return self.renormalize

    def resolve(self, config: LlamaConfig, *, generating: bool) -> Self:
        if self.scale > config.vocab_size:
            raise UserError(f"sled: scale={self.scale} exceeds the vocabulary of {config.vocab_size} tokens")
        steps, lower_bound = self.steps, self.lower_bound
        if steps is None:
            steps = 1 if generating else 10
        if lower_bound is None:
            lower_bound = -1000.0 if generating else -100.0
        candidates = candidate_layers("sled", self.candidates, config)
        return dataclasses.replace(self, candidates=candidates, steps=steps, lower_bound=lower_bound)

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        z = self.unnormalized_scores(logits)
        return jax.nn.log_softmax(z) if self.renormalize else z

    def unnormalized_scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        last, early = logits[0].final, logits[0].exits
        _, chosen = jax.lax.top_k(last, self.scale)
        m = jnp.square(jnp.maximum(_cosines(jax.nn.softmax(early), early - last, chosen), 0.0))
        total = jnp.sum(m, axis=(0, -1))[..., None]
        latent = jnp.where(total > 0, jnp.sum(m, axis=0) / jnp.where(total > 0, total, 1.0), 0.0)

        z, steps = last, self.steps
        dense = jnp.put_along_axis(jnp.zeros_like(last), chosen, latent, axis=-1, inplace=False)
        for j in range(steps):
            z = z - self.rate * (1 - j / steps) * (jax.nn.softmax(z) - dense)
        kept = jnp.take_along_axis(z, chosen, axis=-1)
        return jnp.put_along_axis(jnp.full_like(last, self.lower_bound), chosen, kept, axis=-1, inplace=False)


def _cosines(q: jax.Array, d: jax.Array, chosen: jax.Array) -> jax.Array:
    """`cos(q − e_i, d)` for the chosen tokens i.

    Where q is almost e_i the closed form subtracts nearly equal numbers. That can be so for its largest entry
    alone, which is computed from sums over all others and from `q_i − 1` as float32 holds it: like the
    published script, which subtracts e_i from a float32 softmax, an exit that is surer than that does not
    point away from its own token.

    Args:
        q: float32 [n, ..., V], distributions of the early exits.
        d: float32 [n, ..., V], their logits less the last ones.
        chosen: int32 [..., k].

    Returns:
        float32 [n, ..., k]; 0 where an exit points nowhere.
    """
    peak = argmax(q)[..., None]
    others = jnp.where(jnp.arange(q.shape[-1]) == peak, 0.0, q)
    others_dot_d, others_squared, d_squared = (
        jnp.sum(x, axis=-1, keepdims=True) for x in (others * d, others * others, d * d)
    )
    q_peak, d_peak = (jnp.take_along_axis(x, peak, axis=-1) for x in (q, d))
    of_chosen = jnp.broadcast_to(chosen, (q.shape[0], *chosen.shape))
    q_i, d_i = (jnp.take_along_axis(x, of_chosen, axis=-1) for x in (q, d))

    is_peak = of_chosen == peak
    dot = jnp.where(is_peak, others_dot_d + d_i * (q_peak - 1), others_dot_d + q_peak * d_peak - d_i)
    squared = jnp.where(is_peak, others_squared + (q_peak - 1) ** 2, others_squared + q_peak**2 - 2 * q_i + 1)
    # As torch's cosine_similarity, of which the published script is made, keeps from dividing by 0.
    lengths = (jnp.maximum(jnp.sqrt(jnp.maximum(x, 0.0)), EPSILON) for x in (squared, d_squared))
    return dot / math.prod(lengths)
