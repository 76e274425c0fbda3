"""How a parameter is declared: the one place that gives it shape, axes, initializer and kind."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class AntiExpertParam(nnx.Variable):
    """A trainable parameter of an anti-expert unit.

    Not a subclass of `nnx.Param`: a filter for the frozen base must not catch it.
    """


Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]

zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


def normal(stddev: float) -> Initializer:
    return jax.nn.initializers.normal(stddev)


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
        kind: `nnx.Param` for the base, `AntiExpertParam` for the units.
        dtype: of the stored parameter.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{len(shape)} dimensions but {len(axes)} axis names: {shape}, {axes}")
    if stack is not None:
        shape, axes = (stack, *shape), ("layers", *axes)
    return kind(init(rngs.params(), tuple(shape), dtype), axes=tuple(axes))
