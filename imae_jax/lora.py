"""Low-rank deltas on the base's linear projections (LoRA: Hu et al., arXiv 2106.09685).

The deltas are a tree of their own beside the base's layers, applied at a scale per row: one batch holds
rows of the base and rows of the adapted model, and reads each base weight once.
"""

from collections.abc import Mapping

import jax
from flax import nnx

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
        scale: float32 [B]; alpha / rank for adapted rows, 0 for rows of the base.

    Returns:
        [B, T, outputs…] in the dtype of `x`; exactly 0 in rows with scale 0.
    """
    a, b = (pair[name].astype(x.dtype) for name in ("a", "b"))
    inner = matmul(x, a, num_inputs=a.ndim - 1) * scale[:, None, None].astype(x.dtype)
    return matmul(inner, b)
