"""The key/value cache of the decoder."""

import dataclasses

import jax
import jax.numpy as jnp

from imae_jax.config import LlamaConfig
from imae_jax.cpu import with_rows, without_single_row
from imae_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far; all rows share one write position.

    Layers that slide keep all tokens, too, and mask those outside of their window.

    Padding occupies slots as real tokens do and is masked by `real`, so that prompts may be padded on
    either side.

    Attributes:
        keys, values: one [B, K, S, H] array a layer, [K, S, H] for one row (see `imae_jax.cpu`). An array of
            its own for every layer lets XLA update it in place; one stacked array would be copied at every
            step.
        real: bool [B, S], True where a slot holds a token that is not padding.
        length: int32 [], slots in use; the next token goes to slot `length`.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    real: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: LlamaConfig, batch_size: int, capacity: int, dtype: jnp.dtype) -> "KVCache":
        shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
        shape, axes = without_single_row(shape, ("batch", "act_heads", "length", None))

        def zeros():
            return constrain(jnp.zeros(shape, dtype), *axes)

        return cls(
            keys=tuple(zeros() for _ in range(config.num_layers)),
            values=tuple(zeros() for _ in range(config.num_layers)),
            real=jnp.zeros((batch_size, capacity), bool),
            length=jnp.zeros((), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        return self.real.shape[1]

    def with_capacity(self, capacity: int) -> "KVCache":
        """The same contents with room for `capacity` slots."""
        extra = capacity - self.capacity

        def extend(x):
            return jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, extra), (0, 0)])

        return dataclasses.replace(
            self,
            keys=tuple(map(extend, self.keys)),
            values=tuple(map(extend, self.values)),
            real=jnp.pad(self.real, [(0, 0), (0, extra)]),
        )

    def repeat_rows(self, repeats: int) -> "KVCache":
        """Every row `repeats` times in a row: B rows become B · repeats."""
        if repeats == 1:
            return self

        def repeat(x):
            x = jnp.repeat(with_rows(x), repeats, axis=0)
            return constrain(x, "batch", "act_heads", "length", None)

        return dataclasses.replace(
            self,
            keys=tuple(map(repeat, self.keys)),
            values=tuple(map(repeat, self.values)),
            real=jnp.repeat(self.real, repeats, axis=0),
        )


def append(slots: jax.Array, new: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Writes one layer's new keys or values into the cache.

    Args:
        slots: [B, K, S, H], or [K, S, H] for one row.
        new: [B, K, T, H].
        start: int32 [], the slot of the first new token.

    Returns:
        The slots, and the same as [B, K, S, H].
    """
    new = new if slots.ndim == 4 else new[0]
    slots = jax.lax.dynamic_update_slice(slots, new, (*[0] * (slots.ndim - 2), start, 0))
    return slots, with_rows(slots)
