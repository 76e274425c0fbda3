"""Random training rows, units and adapters of the tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY, UNIT_SIZE
from flax import nnx

from imae_jax.config import AntiExpertConfig, LoraConfig
from imae_jax.lora import LoraDeltas
from imae_jax.train.data import Example

UNITS = AntiExpertConfig(UNIT_SIZE)


def examples(count: int, seed: int = 0) -> list[Example]:
    """Rows of unequal length, each with some of its answer tokens in T_fact."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length, start = int(random.integers(9, 20)), int(random.integers(2, 6))
        tokens = tuple(map(int, random.integers(3, TINY.vocab_size, length)))
        fact = random.random(length - start) < 0.5
        fact[int(random.integers(len(fact)))] = True
        rows.append(Example(i, tokens, start, tuple(fact.tolist())))
    return rows


def pairs(count: int, seed: int = 0) -> list[Example]:
    """Both answers of each question as neighbours, the wrong one first."""
    random = np.random.default_rng(seed)
    rows = []
    for i, wrong in enumerate(examples(count, seed)):
        length = int(random.integers(3, 8))
        answer = tuple(map(int, random.integers(3, TINY.vocab_size, length)))
        fact = (True, *(random.random(length - 1) < 0.5).tolist())
        rows += [wrong, Example(i, wrong.tokens[: wrong.start] + answer, wrong.start, fact, right=True)]
    return rows


def random_deltas(config, lora: LoraConfig, seed: int):
    """Stacked deltas, none of them zero."""
    shapes = nnx.eval_shape(lambda: LoraDeltas(config, lora, rngs=nnx.Rngs(0), stack=config.num_layers))
    random = np.random.default_rng(seed)
    tree = nnx.to_pure_dict(nnx.state(shapes))
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.2, x.shape), jnp.float32), tree)


# Two adapters of different ranks, scales and projections.
PAIR = (LoraConfig(rank=4, alpha=6), LoraConfig(rank=3, alpha=6, targets=("wv", "w_down")))
