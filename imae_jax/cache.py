"""The key/value cache of the decoder."""

import dataclasses

import jax
import jax.numpy as jnp

from imae_jax.config import LlamaConfig
from imae_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far; all rows share one write position.

    Padding occupies slots as real tokens do and is masked by `real`, so that prompts may be padded on
    either side.

    Attributes:
        keys, values: one [B, K, S, H] array a layer. An array of its own for every layer lets XLA
            update it in place; one stacked array would be copied at every step.
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

        def zeros():
            array = jnp.zeros(shape, dtype)
            return constrain(array, "batch", "act_heads", "length", None)

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
        slots = [(0, 0), (0, 0), (0, extra), (0, 0)]
        return dataclasses.replace(
            self,
            keys=tuple(jnp.pad(x, slots) for x in self.keys),
            values=tuple(jnp.pad(x, slots) for x in self.values),
            real=jnp.pad(self.real, [(0, 0), (0, extra)]),
        )

    def repeat_rows(self, repeats: int) -> "KVCache":
        """Every row `repeats` times in a row: [B, …] becomes [B · repeats, …]."""
        return jax.tree.map(
            lambda x: jnp.repeat(x, repeats, axis=0) if x.ndim > 1 and repeats > 1 else x, self
        )
