"""How the next token is drawn from a method's scores."""

import dataclasses

import jax
import jax.numpy as jnp

from imae_jax.cpu import argmax
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Greedy decoding, or sampling from `softmax(scores / temperature)`.

    Attributes:
        temperature: 0 takes the arg-max.
        top_k: keep the k best tokens; 0 keeps all.
        top_p: keep the smallest set of best tokens whose probability reaches p; 1 keeps all.
        repetition_penalty: divides positive and multiplies negative scores of tokens that the prompt or the
            new text holds already (CTRL, Keskar et al., arXiv 1909.05858); 1 is off. It comes first and acts
            on `Method.unnormalized_scores`: the model's logits for its modes and ITI, as in transformers,
            the evolved logits for SLED, the difference of log-probabilities for contrasts.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        # Scores divided by less than this can overflow float32.
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be 0 (greedy) or at least 1e-6")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1 (off)")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty {self.repetition_penalty} must be above 0; 1 is off")

    @property
    def needs_seen(self) -> bool:
        return self.repetition_penalty != 1

    def sample(self, scores: jax.Array, key: jax.Array, seen: jax.Array | None = None) -> jax.Array:
        """Draws one token a row.

        Args:
            scores: float32 [B, V].
            key: one key for the step: row i's draw depends on the key, i and its own scores alone, not
                on how many rows there are. Or a key for every row, [B], which draws as if it were alone.
            seen: bool [B, V], tokens that the text holds; where `needs_seen`.

        Returns:
            int32 [B].
        """
        scores = self.processed(scores, seen)
        if self.temperature == 0:
            return argmax(scores)
        B = scores.shape[0]
        rows = jnp.arange(B) if key.ndim == 0 else jnp.zeros(B, jnp.int32)
        keys = jax.vmap(jax.random.fold_in)(jnp.broadcast_to(key, B), rows)
        return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)

    def processed(self, scores: jax.Array, seen: jax.Array | None = None) -> jax.Array:
        """The scores [B, V] that `sample` draws from, -inf at tokens that are cut; in transformers' order."""
        if self.needs_seen:
            penalty = self.repetition_penalty
            scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
        if self.temperature == 0:
            return scores
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            kth = jax.lax.top_k(scores, self.top_k)[0][:, -1:]
            scores = jnp.where(scores < kth, -jnp.inf, scores)
        if self.top_p < 1:
            ordered = jnp.sort(scores, axis=-1, descending=True)
            probs = jax.nn.softmax(ordered)
            before = jnp.cumsum(probs, axis=-1) - probs
            last = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
            scores = jnp.where(scores < last, -jnp.inf, scores)
        return scores
