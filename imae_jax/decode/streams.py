"""Runs the streams of a method as rows of one batch, stream-major: row `s · B + b`."""

import jax
import jax.numpy as jnp

from imae_jax.cache import KVCache
from imae_jax.config import LlamaConfig
from imae_jax.decode.methods import Method
from imae_jax.errors import UserError
from imae_jax.llama import Weights, forward, project


def check(weights: Weights, method: Method) -> None:
    """Raises a `UserError` if the method needs units or deltas that the model lacks."""
    if weights.units is None and any(stream.strength for stream in method.streams):
        raise UserError(
            f"method {method.name} needs a model with anti-expert units: give an IMAE directory as --model"
        )
    if weights.lora is None and any(stream.adapter for stream in method.streams):
        raise UserError(f"method {method.name} needs low-rank deltas: give it an adapter")


def num_rows(method: Method, batch_size: int) -> int:
    return len(method.streams) * batch_size


def tile(method: Method, x: jax.Array) -> jax.Array:
    """[B, …] to the [S · B, …] rows of all streams."""
    copies = len(method.streams)
    return x if copies == 1 else jnp.concatenate([x] * copies)


def run(
    weights: Weights,
    config: LlamaConfig,
    method: Method,
    tokens: jax.Array,
    *,
    attention_mask: jax.Array,
    cache: KVCache,
    positions: jax.Array | None = None,
    attend: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """One forward pass of every stream over the same tokens.

    Args:
        tokens, attention_mask, positions, attend: as in `llama.forward`, for [B, …] rows.
        cache: with [S · B] rows.

    Returns:
        Hidden states [S, B, T, D] for `scores`, and the new cache.
    """
    batch_size = tokens.shape[0]
    strengths = [stream.strength for stream in method.streams]
    adapters = [stream.adapter for stream in method.streams]

    def per_row(values):
        return jnp.repeat(jnp.asarray(values), batch_size) if any(values) else None

    output = forward(
        weights,
        config,
        tile(method, tokens),
        attention_mask=tile(method, attention_mask),
        positions=None if positions is None else tile(method, positions),
        attend=None if attend is None else tile(method, attend),
        strength=per_row(strengths),
        adapter=per_row(adapters),
        cache=cache,
    )
    hidden = output.hidden_states
    return hidden.reshape(len(strengths), batch_size, *hidden.shape[1:]), output.cache


def next_scores(weights: Weights, method: Method, hidden_states: jax.Array) -> jax.Array:
    """Scores [..., V] for generation from every stream's hidden states [S, ..., D]."""
    return method.scores(tuple(project(weights, hidden_states)), generating=True)


def token_scores(weights: Weights, method: Method, hidden_states: jax.Array, tokens: jax.Array) -> jax.Array:
    """Scores [...] of given tokens from every stream's hidden states [S, ..., D]."""
    return method.token_scores(tuple(project(weights, hidden_states)), tokens)
