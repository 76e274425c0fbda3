"""The two layouts of what every layer has: one tree of [L, …] stacks, or a tuple with one tree a layer.

Stacks run under `lax.scan`: training, where compile time and memory matter. A tree a layer runs as a loop:
decoding, where slicing a stack would copy every weight at every token.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def declare(
    layers: Callable[[int | None], nnx.Module], num_layers: int, *, stacked: bool
) -> nnx.Module | nnx.List:
    """Modules of all layers.

    Args:
        layers: declares the stack of L layers, or with None one layer.
    """
    return layers(num_layers) if stacked else nnx.List([layers(None) for _ in range(num_layers)])


def arrays(module: nnx.Module | nnx.List) -> Any:
    """The arrays of what `declare` gave (not copied), in the same layout."""
    return from_state(nnx.to_pure_dict(nnx.state(module)))


def from_state(state: dict[Any, Any]) -> Any:
    """The same from a pure dict of the module's state: that of an `nnx.List` is numbered."""
    return tuple(state[i] for i in range(len(state))) if 0 in state else state


def is_stacked(layers: Any) -> bool:
    return not isinstance(layers, tuple)


def layer(layers: Any, i: int) -> Any:
    """The tree of layer i; None of None."""
    return jax.tree.map(lambda array: array[i], layers) if is_stacked(layers) else layers[i]
