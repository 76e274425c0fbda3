"""Random directions of the size of a learned one: controls for what any change of a model brings.

What units, an adapter, shifts of heads or vectors add to the model gets a random sign in every output
dimension of every layer: each dimension keeps its size at every token, and the direction is lost. Gates, and
where a method acts at all, stay as they were learned.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imae_jax import layer_stack
from imae_jax.decode.methods.protocol import Stream
from imae_jax.errors import UserError
from imae_jax.llama import Weights


def with_noise(weights: Weights, streams: Sequence[Stream], seed: int, scale: float = 1.0) -> Weights:
    """The weights with random signs at the outputs of all that the streams add to the model.

    Equal seeds give equal signs, in both layouts of the layers.

    Args:
        weights: with what the streams need.
        streams: those that run on `weights`.
        seed: at least 0.
        scale: factor of all that gets random signs.

    Raises:
        UserError: nothing acts on this model that could be random.
    """
    if seed < 0:
        raise UserError(f"noise={seed}: give a seed from 0 on")
    if not any(stream.acts for stream in streams):
        raise UserError(
            f"noise={seed} changes units, adapters, shifts of heads and vectors of the model itself, and "
            "none of them acts here: leave it out"
        )
    changes = {}
    if any(stream.strength for stream in streams):
        changes["units"] = _with_signs(weights.units, "w_down", seed, scale)
    if any(stream.adapter for stream in streams):
        changes["lora"] = _with_signs(weights.lora, "b", seed, scale)
    if any(stream.shift for stream in streams):
        changes["shifts"] = _with_signs(weights.shifts, None, seed, scale)
    if any(stream.steer for stream in streams):
        changes["vectors"] = _with_signs(weights.vectors, None, seed, scale)
    return dataclasses.replace(weights, **changes)


def _with_signs(layers: Any, output: str | None, seed: int, scale: float) -> Any:
    """Layers with a random sign for every output dimension.

    Args:
        layers: in one of the layouts of `layer_stack`.
        output: name of the matrices [inputs, outputs…] to change; None for layers of outputs alone.
        seed, scale: of the signs.
    """
    stacked, inputs = layer_stack.is_stacked(layers), output is not None

    def change(path: Sequence[Any], array: jax.Array) -> jax.Array:
        if (inputs and path[-1].key != output) or isinstance(array, jax.ShapeDtypeStruct):
            return array
        array = jnp.asarray(array)  # Shifts and vectors come from the host.
        name = jax.tree_util.keystr(path if stacked else path[1:])
        numbers = range(len(array)) if stacked else [path[0].idx]
        outputs = array.shape[stacked + inputs :]
        signs = np.stack([_signs(outputs, seed, name, number) for number in numbers])
        signs = scale * signs.reshape(*array.shape[:stacked], *(1,) * inputs, *outputs)
        return jax.jit(jnp.multiply, out_shardings=array.sharding)(array, signs.astype(array.dtype))

    return jax.tree_util.tree_map_with_path(change, layers)


def _signs(shape: tuple[int, ...], seed: int, name: str, layer: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), layer])
    return rng.choice((-1, 1), shape)
