"""Anti-expert units: a gate and a parallel MLP beside the MLP of every decoder layer.

Source: Kadotani, Nishida, Nishida, "Learning from Hallucinations: Mitigating Hallucinations in LLMs
via Internal Representation Intervention", Findings of IJCNLP-AACL 2025, section 3.1.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imae_jax import layer_stack
from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.errors import UserError
from imae_jax.layers import gated, kept, matmul
from imae_jax.params import AntiExpertParam, normal, weight, zeros
from imae_jax.sharding import apart, constrain

MODES = {"expert": -1.0, "base": 0.0, "anti-expert": 1.0}


def parse_mode(mode: str | float) -> float:
    """The strength `o` of a mode's name, or of any finite number (also as text)."""
    if mode in MODES:
        return MODES[mode]
    try:
        strength = float(mode)
    except (TypeError, ValueError):
        strength = float("nan")
    if not np.isfinite(strength):
        raise UserError(f"mode {mode!r} does not exist: use {', '.join(MODES)} or a number (the strength)")
    return strength


class AntiExpertUnits(nnx.Module):
    """The units of all layers, stacked along a leading `layers` axis, or of one (`stack=None`).

    `down_proj` starts at zero, so that untrained units change nothing in any mode.
    """

    def __init__(
        self,
        config: LlamaConfig,
        anti_expert: AntiExpertConfig,
        *,
        rngs: nnx.Rngs,
        stack: int | None,
        dtype: jnp.dtype = jnp.float32,
    ):
        D, A = config.hidden_size, anti_expert.intermediate_size
        init = normal(config.initializer_range)
        kwargs = {"stack": stack, "kind": AntiExpertParam, "dtype": dtype}
        self.gate = weight(rngs, (D, 2), ("embed", "gate"), init, **kwargs)
        self.gate_bias = weight(rngs, (2,), ("gate",), zeros, **kwargs)
        self.w_gate = weight(rngs, (D, A), ("embed", "anti_mlp"), init, **kwargs)
        self.w_up = weight(rngs, (D, A), ("embed", "anti_mlp"), init, **kwargs)
        self.w_down = weight(rngs, (A, D), ("anti_mlp", "embed"), zeros, **kwargs)


def declare_units(
    config: LlamaConfig, anti_expert: AntiExpertConfig, *, rngs: nnx.Rngs, stacked: bool
) -> nnx.Module | nnx.List:
    """The units of all layers, in either layout of `layer_stack`."""

    def layers(stack: int | None) -> AntiExpertUnits:
        return AntiExpertUnits(config, anti_expert, rngs=rngs, stack=stack)

    return layer_stack.declare(layers, config.num_layers, stacked=stacked)


def unit_forward(
    unit: Mapping[str, jax.Array],
    h: jax.Array,
    strength: jax.Array,
    activation: str = "silu",
) -> tuple[jax.Array, jax.Array]:
    """One unit's contribution to its layer's MLP output, `o · MLP_anti(a · h)`.

    Args:
        unit: the weights of one layer's unit; cast to the dtype of `h`.
        h: [B, T, D], what enters the layer's MLP.
        strength: float32 [B], `o`. Rows at exactly 0 get exactly 0, whatever the unit computes.
        activation: activation of its MLP, which has the form of the base's.

    Returns:
        The contribution [B, T, D] in the dtype of `h`, and the gate `a`, float32 [B, T].
    """
    unit = {name: array.astype(h.dtype) for name, array in unit.items()}
    gate_logits = matmul(h, unit["gate"], preferred_element_type=jnp.float32)
    a = jax.nn.softmax(gate_logits + unit["gate_bias"].astype(jnp.float32), axis=-1)[..., 0]
    o = strength[:, None, None]
    x = a[..., None].astype(h.dtype) * h
    inner = gated(kept(matmul(x, unit["w_gate"])), kept(matmul(apart(x), unit["w_up"])), activation)
    y = matmul(constrain(inner, "batch", "length", "act_mlp"), unit["w_down"])
    return jnp.where(o == 0, 0, o.astype(h.dtype) * y), a
