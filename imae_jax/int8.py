"""Quantizing a loaded model: weights as 8-bit integers take less memory, at a cost in quality."""

from imae_jax.errors import UserError
from imae_jax.layers import Int8
from imae_jax.llama import Llama
from imae_jax.lora import projections

QUANTIZED = ("units", "base", "all")
UNIT_PROJECTIONS = ("w_gate", "w_up", "w_down")


def quantize(model: Llama, what: str) -> None:
    """Quantizes the projections of a `Llama` in place, one after another.

    Norms, biases, gates, embedding and vocabulary projection stay as they are. The model can no longer be
    trained or written.

    Args:
        model: of floats.
        what: `units`, `base` (the projections of its layers) or `all`.

    Raises:
        UserError: no such choice, or units of a model without.
    """
    if what not in QUANTIZED:
        raise UserError(f"int8={what!r}: use {', '.join(QUANTIZED)}")
    if what == "units" and model.anti_expert_config is None:
        raise UserError("int8=units: the model has no anti-expert units; int8=base quantizes its layers")
    parts = []
    if what in ("base", "all"):
        num_inputs = {name: inputs for name, (_, _, inputs) in projections(model.config).items()}
        parts.append((model.layers, num_inputs))
    if what in ("units", "all") and model.anti_expert_config is not None:
        parts.append((model.units, dict.fromkeys(UNIT_PROJECTIONS, 1)))
    for layers, num_inputs in parts:
        for layer in [layers] if model.stacked else layers:
            for name, inputs in num_inputs.items():
                weight = getattr(layer, name)
                weight.set_value(Int8.of(weight.get_value(), inputs, stacked=model.stacked))
