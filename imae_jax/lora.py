"""Low-rank deltas on the base's linear projections (LoRA: Hu et al., arXiv 2106.09685).

The deltas are a tree of their own beside the base's layers, applied at a scale per row: one batch holds
rows of the base and rows of the adapted model, and reads each base weight once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from imae_jax import layer_stack
from imae_jax.config import LlamaConfig, LoraConfig
from imae_jax.layers import matmul
from imae_jax.params import LoraParam, uniform_fan_in, weight, zeros


def projections(config: LlamaConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...], int]]:
    """Shape, axes and number of input axes of every projection, by its name in a layer's weights."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_heads, config.num_kv_heads
    return {
        "wq": ((D, N, H), ("embed", "heads", "head_dim"), 1),
        "wk": ((D, K, H), ("embed", "kv_heads", "head_dim"), 1),
        "wv": ((D, K, H), ("embed", "kv_heads", "head_dim"), 1),
        "wo": ((N, H, D), ("heads", "head_dim", "embed"), 2),
        "w_gate": ((D, F), ("embed", "mlp"), 1),
        "w_up": ((D, F), ("embed", "mlp"), 1),
        "w_down": ((F, D), ("mlp", "embed"), 1),
    }


class LoraPair(nnx.Module):
    """`a` [inputs…, rank] and `b` [rank, outputs…] of one projection; `b` starts at zero."""

    def __init__(self, shape, axes, num_inputs, rank, *, rngs: nnx.Rngs, stack: int | None):
        kwargs = {"stack": stack, "kind": LoraParam}
        inputs, outputs = shape[:num_inputs], shape[num_inputs:]
        self.a = weight(
            rngs, (*inputs, rank), (*axes[:num_inputs], "rank"), uniform_fan_in(num_inputs), **kwargs
        )
        self.b = weight(rngs, (rank, *outputs), ("rank", *axes[num_inputs:]), zeros, **kwargs)


class LoraDeltas(nnx.Module):
    """The pairs of all layers, stacked along a leading `layers` axis, or of one (`stack=None`)."""

    def __init__(self, config: LlamaConfig, lora: LoraConfig, *, rngs: nnx.Rngs, stack: int | None):
        for name, (shape, axes, num_inputs) in projections(config).items():
            if name in lora.targets:
                setattr(self, name, LoraPair(shape, axes, num_inputs, lora.rank, rngs=rngs, stack=stack))


def delta(pair: Mapping[str, jax.Array], x: jax.Array, scale: jax.Array) -> jax.Array:
    """`scale · x A B`: what one projection's pair adds to its output.

    Args:
        pair: `a` and `b`; cast to the dtype of `x`.
        x: [B, T, inputs…].
        scale: float32 [B, 1] or [B, rank]; alpha / rank for adapted rows, 0 for rows of the base.

    Returns:
        [B, T, outputs…] in the dtype of `x`; exactly 0 in rows with scale 0.
    """
    # XLA's GPU compiler merges products of one operand: it would copy the base's weight beside `a` each time.
    x = jax.lax.optimization_barrier(x)
    a, b = (pair[name].astype(x.dtype) for name in ("a", "b"))
    inner = matmul(x, a, num_inputs=a.ndim - 1) * scale[:, None].astype(x.dtype)
    return matmul(inner, b)


def side_by_side(adapters: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, Any]:
    """Several adapters of one base as one, whose ranks are theirs one after another.

    With factors that are 0 at the ranks of the others (`adapter_factors`), rows of one batch are each adapted
    by an adapter of their own, in one product of matrices for all.

    Args:
        adapters: stacked deltas and their scale, alpha / rank. Ranks are padded to the largest, projections
            that an adapter leaves alone with zeros.

    Returns:
        Stacked deltas at scale 1.
    """
    rank = max(pair["a"].shape[-1] for deltas, _ in adapters for pair in deltas.values())

    def ranks_of(deltas, scale, name, like):
        a, b = (deltas.get(name, jax.tree.map(jnp.zeros_like, like))[part] for part in ("a", "b"))
        missing = rank - a.shape[-1]
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
        return a, jnp.pad(scale * b, [(0, 0), (0, missing)] + [(0, 0)] * (b.ndim - 2))

    combined = {}
    for name, like in {k: v for deltas, _ in adapters for k, v in deltas.items()}.items():
        a, b = zip(*(ranks_of(*adapter, name, like) for adapter in adapters), strict=True)
        combined[name] = {"a": jnp.concatenate(a, axis=-1), "b": jnp.concatenate(b, axis=1)}
    return combined


def rank_of(deltas: Any) -> int:
    """The rank of deltas in either of the layouts of `imae_jax.layer_stack`."""
    layer = deltas if layer_stack.is_stacked(deltas) else deltas[0]
    return next(iter(layer.values()))["a"].shape[-1]


def adapter_factors(deltas: Mapping[str, Any], count: int, numbers: Sequence[int | None]) -> jax.Array:
    """Which of the adapters `side_by_side` rows get.

    Args:
        deltas: from `side_by_side`.
        count: how many adapters they hold.
        numbers: numbers of the adapter (from 0) of every row; None for the base.

    Returns:
        Float32 [rows, rank]: `Interventions.adapter` of `llama`.
    """
    rank = rank_of(deltas) // count
    one_hot = jnp.asarray([[number == i for i in range(count)] for number in numbers], jnp.float32)
    return jnp.repeat(one_hot, rank, axis=1)
