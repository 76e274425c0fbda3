"""The pieces of a decoder layer as pure functions. Letters: see `imae_jax.llama`.

Casts follow transformers' Llama: norms and softmax in float32, everything else in the activations'
dtype, so that bfloat16 results agree with the reference as closely as float32 ones do.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from imae_jax.config import LlamaConfig, RopeConfig
from imae_jax.cpu import multiply_rows


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """In which sums over an axis are computed; float64 where a model is held against another."""
    return jnp.promote_types(dtype, jnp.float32)


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """How many bits a product of this dtype is multiplied in: all of float32's.

    By default GPUs and TPUs multiply float32 in fewer, and scores would depend on the device. Halves are
    multiplied exactly anyway.
    """
    halves = jnp.dtype(dtype).itemsize < 4
    return jax.lax.Precision.DEFAULT if halves else jax.lax.Precision.HIGHEST


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, plus_one: bool = False) -> jax.Array:
    """`scale · x / rms(x)` over the last axis; statistics in float32 or wider. x [..., D], scale [D].

    With `plus_one` it is `(1 + scale) · x / rms(x)`, rounded at the end only, as Gemma has it.
    """
    wide = x.astype(at_least_float32(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if plus_one:
        return ((1 + scale.astype(wide.dtype)) * normed).astype(x.dtype)
    return scale.astype(x.dtype) * normed.astype(x.dtype)


def rope_inverse_frequencies(config: LlamaConfig, rope: RopeConfig, positions: jax.Array) -> jax.Array:
    """Inverse frequencies, float32 [B, H/2], or [1, H/2] where they do not depend on the row.

    `dynamic` NTK scaling grows the base with the length of the row, counted from its largest
    position in this call; transformers takes the longest row of the batch instead, so that there a
    row's result depends on its neighbours.
    """
    dim = config.head_dim
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32)[None] / dim
    if rope.type == "dynamic":
        trained = config.max_position_embeddings
        length = jnp.maximum(positions.max(axis=-1, keepdims=True) + 1, trained)
        growth = rope.factor * length.astype(jnp.float32) / trained - (rope.factor - 1)
        return 1.0 / (rope.theta * growth ** (dim / (dim - 2))) ** exponents
    frequencies = 1.0 / rope.theta**exponents
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "frequency_factors":
        return frequencies / jnp.asarray(rope.frequency_factors, jnp.float32)
    if rope.type == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return keep * frequencies + (1 - keep) * frequencies / rope.factor
    return frequencies


def rope_tables(
    config: LlamaConfig, rope: RopeConfig, positions: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, H] for `apply_rope`; computed in float32. positions [B, T]."""
    frequencies = rope_inverse_frequencies(config, rope, positions)[:, None, :]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads in HuggingFace's half-split layout. x [B, T, N, H]."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def attention(q: jax.Array, k: jax.Array, v: jax.Array, attend: jax.Array) -> jax.Array:
    """Grouped-query attention.

    Batch and head dimensions lead in both matmuls, and the softmax's division comes after the second
    one: on CPU this takes less than half the time of the textbook einsums.

    Args:
        q: [B, T, N, H]
        k, v: [B, K, S, H], where K divides N
        attend: bool [B, T, S], True where a query may look. A query that may look nowhere (padding)
            gets the mean of all values, not NaN.

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    wide = at_least_float32(q.dtype)
    multiply = functools.partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=wide)
    scores = multiply("BKQH,BKSH->BKQS", q, k)
    scores = scores.reshape(B, K, G, T, S) * H**-0.5
    scores = jnp.where(attend[:, None, None], scores, jnp.finfo(wide).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.reshape(B, K, G * T, S).astype(v.dtype)
    out = multiply("BKQS,BKSH->BKQH", weights, v)
    out = (out.reshape(B, K, G, T, H) / total).astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def matmul(
    x: jax.Array,
    weight: jax.Array,
    *,
    num_inputs: int = 1,
    preferred_element_type: jnp.dtype | None = None,
) -> jax.Array:
    """A linear map: x [..., inputs…] and a weight [inputs…, outputs…] to [..., outputs…].

    Args:
        num_inputs: how many axes are inputs. They are flattened: XLA otherwise transposes a weight with
            several of them (`o_proj`) at every call.
        preferred_element_type: dtype of the result.
    """
    batch, outputs = x.shape[: x.ndim - num_inputs], weight.shape[num_inputs:]
    x = x.reshape(*batch, -1)
    weight = weight.reshape(x.shape[-1], -1)
    multiply = functools.partial(
        jnp.matmul, precision=precision(x.dtype), preferred_element_type=preferred_element_type
    )
    return multiply_rows(multiply, x, weight).reshape(*batch, *outputs)


KEPT = "kept"
"""What `remat=narrow` keeps for the backward pass."""


def kept(x: jax.Array) -> jax.Array:
    """The same, named `KEPT`."""
    return checkpoint_name(x, KEPT)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """The inner values of a gated MLP: SwiGLU's, or GeGLU's."""
    return ACTIVATIONS[activation](gate) * up
