"""Files of ITI's directions: safetensors with what was found for every attention head.

directions  float32 [L, N, H]  θ, unit vectors: mean of true minus mean of false answers' activations
sigma       float32 [L, N]     standard deviation of the activations along θ
rank        int32 [L, N]       0 for the head whose probe is most accurate on validation questions
accuracy    float32 [L, N]     of the probes
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from imae_jax.config import LlamaConfig
from imae_jax.errors import UserError, first_line
from imae_jax.llama import Llama


@dataclasses.dataclass(frozen=True)
class Directions:
    """The fields of a file of directions, as in this module's docstring."""

    directions: np.ndarray
    sigma: np.ndarray
    rank: np.ndarray
    accuracy: np.ndarray

    def shifts(self, heads: int) -> np.ndarray:
        """`σ θ` of the best heads, 0 elsewhere: float32 [L, N, H].

        Raises:
            UserError: there are fewer heads.
        """
        if heads > self.rank.size:
            raise UserError(f"iti: heads={heads} exceeds the model's {self.rank.size}")
        chosen = self.rank < heads
        return np.where(chosen[..., None], self.sigma[..., None] * self.directions, 0).astype(np.float32)


def bake_into(model: Llama, directions: Directions, alpha: float, heads: int) -> Llama:
    """A plain model whose `o_proj` biases are `W_o · (α σ θ)`, so that any Llama implementation runs it.

    A bias acts at every position, the prompt's too, where ITI shifts only what predicts an answer's tokens.
    The other projections of attention get biases of zero: transformers has all of them or none.
    """
    shifts = alpha * directions.shifts(heads)
    config = dataclasses.replace(model.config, qkv_bias=True, o_bias=True)
    dtype = model.weights().dtype
    biased = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), stacked=model.stacked, dtype=dtype))
    graphdef, state = nnx.split(biased)
    present = dict(nnx.to_flat_state(nnx.state(model)))
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        value = present[path].get_value() if path in present else jnp.zeros(variable.shape, dtype)
        if path[-1] == "bo":
            layer = next((part for part in path if isinstance(part, int)), None)
            wo = present[(*path[:-1], "wo")].get_value().astype(jnp.float32)
            shift = shifts if layer is None else shifts[layer]
            added = jnp.einsum("...NHD,...NH->...D", wo, shift, precision="highest")
            value = (value.astype(jnp.float32) + added).astype(dtype)
        leaves.append((path, variable.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def write_directions(path: Path, directions: Directions) -> None:
    tensors = {k: np.ascontiguousarray(v) for k, v in dataclasses.asdict(directions).items()}
    path.write_bytes(save(tensors))  # `save_file` makes files that only their owner can read.


def read_directions(path: Path, config: LlamaConfig) -> Directions:
    """Reads a file of directions for a model.

    Raises:
        UserError: no such file, or one of another model.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"directions {path} cannot be read: {first_line(error)}") from error
    heads = (config.num_layers, config.num_heads)
    shapes = {"directions": (*heads, config.head_dim), "sigma": heads, "rank": heads, "accuracy": heads}
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            actual = tensors[name].shape if name in tensors else "none"
            raise UserError(
                f"directions {path}: {name} of shape {shape} is needed for this model, found {actual}"
            )
    return Directions(**{name: tensors[name] for name in shapes})
