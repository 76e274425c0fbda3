"""Random parts that methods read beside the model."""

import jax.numpy as jnp
import numpy as np

from imae_jax.config import LoraConfig
from imae_jax.convert.iti import Directions
from imae_jax.convert.peft import write_adapter
from imae_jax.lora import projections


def random_adapter(path, config, base_reference, rank=3, seed=2):
    random = np.random.default_rng(seed)
    lora = LoraConfig(rank, 4.0)
    deltas = {}
    for name, (shape, _, inputs) in projections(config).items():
        shapes = {"a": (*shape[:inputs], rank), "b": (rank, *shape[inputs:])}
        deltas[name] = {
            part: jnp.asarray(random.normal(0, 0.1, (config.num_layers, *s)), jnp.float32)
            for part, s in shapes.items()
        }
    write_adapter(path, deltas, config, lora, base_reference=base_reference)
    return path


def random_vectors(config):
    """Of every layer, about as long as half of a tiny model's residual stream."""
    random = np.random.default_rng(4)
    vectors = random.normal(size=(config.num_layers, config.hidden_size)) / 2
    return dict(enumerate(vectors.astype(np.float32)))


def random_directions(config):
    random = np.random.default_rng(3)
    heads = (config.num_layers, config.num_heads)
    theta = random.normal(size=(*heads, config.head_dim))
    return Directions(
        (theta / np.linalg.norm(theta, axis=-1, keepdims=True)).astype(np.float32),
        random.uniform(0.5, 1.5, heads).astype(np.float32),
        random.permutation(heads[0] * heads[1]).reshape(heads).astype(np.int32),
        random.uniform(0.5, 1, heads).astype(np.float32),
    )
