"""How a parameter is declared: the one place that gives it shape, axes, initializer and kind."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class AntiExpertParam(nnx.Variable):
    """A trainable parameter of an anti-expert unit.

    Not a subclass of `nnx.Param`: a filter for the frozen base must not catch it.
    """


class LoraParam(nnx.Variable):
    """A trainable parameter of a low-rank delta; no subclass of `nnx.Param` for the same reason."""


Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]

zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


def normal(stddev: float) -> Initializer:
    return jax.nn.initializers.normal(stddev)


def uniform_fan_in(num_inputs: int) -> Initializer:
    """Uniform in ±1/sqrt(fan-in), as PEFT initializes LoRA's A (Kaiming with a = sqrt 5).

    Args:
        num_inputs: how many axes, counted from before the last one, are inputs.
    """

    def init(key, shape, dtype):
        bound = math.prod(shape[-1 - num_inputs : -1]) ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def weight(
    rngs: nnx.Rngs,
    shape: Sequence[int],
    axes: Sequence[str],
    init: Initializer,
    *,
    stack: int | None = None,
    kind: type[nnx.Variable] = nnx.Param,
    dtype: jnp.dtype = jnp.float32,
) -> nnx.Variable:
    """Declares one parameter.

    Args:
        rngs: source of the initializer's key (`params` stream).
        shape: shape of one layer's weight.
        axes: logical name of every dimension, see `sharding.RULES`.
        init: initializer, called with (key, shape, dtype).
        stack: number of layers to stack along a leading `layers` axis; None for no such axis.
        kind: `nnx.Param` for the base, `AntiExpertParam` for the units, `LoraParam` for deltas.
        dtype: dtype of the stored parameter.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{len(shape)} dimensions but {len(axes)} axis names: {shape}, {axes}")
    if stack is not None:
        shape, axes = (stack, *shape), ("layers", *axes)
    return kind(init(rngs.params(), tuple(shape), dtype), axes=tuple(axes))
