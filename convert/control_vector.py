"""Control vectors in GGUF, in and out: what steering adds to the residual stream.

general.architecture       `controlvector`
controlvector.model_hint   the model's type, such as `llama`
controlvector.layer_count  uint32, how many directions there are
direction.N                float32 [D], added to the output of layer N

llama.cpp and repeng both count layers from 0: `direction.N` is added to the output of `model.layers[N]`, the
residual stream after N + 1 layers. llama.cpp adds none to layer 0, and refuses a file with `direction.0`.
Its tool cvector-generator measures the output of layer N, but calls it `direction.(N + 1)`: such a file acts
one layer after the one that it was measured at, here as there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from imae_jax.config import LlamaConfig
from imae_jax.convert.gguf_file import read_gguf
from imae_jax.decode.methods.exits import layer_numbers
from imae_jax.errors import UserError

ARCHITECTURE = "controlvector"
PREFIX = "direction."
# Names that transformers (repeng) and llama.cpp (cvector-generator) have for models of one kind.
KINDS = ({"llama", "mistral"}, {"qwen2"}, {"qwen3"}, {"gemma3", "gemma3_text"})


def write_vectors(path: str | Path, directions: Mapping[int, np.ndarray], config: LlamaConfig) -> None:
    """Writes a control vector.

    Args:
        path: path of the file.
        directions: [D] for the output of layer N, by N from 0; llama.cpp takes none of layer 0.
        config: configuration of the model.
    """
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", config.to_hf()["model_type"])
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
    for layer, direction in sorted(directions.items()):
        writer.add_tensor(f"{PREFIX}{layer}", np.ascontiguousarray(direction, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_vectors(path: str | Path, config: LlamaConfig) -> dict[int, np.ndarray]:
    """Reads a control vector for a model: float32 [D] for the output of layer N, by N from 0.

    Raises:
        UserError: no such file, none of a control vector, or one of another model.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory: give one GGUF file")
    metadata, tensors = read_gguf(path)
    architecture, hint = (metadata.get(k) for k in ("general.architecture", f"{ARCHITECTURE}.model_hint"))
    if architecture != ARCHITECTURE:
        raise UserError(f"{path} is no control vector: its general.architecture is {architecture!r}")
    kind = config.to_hf()["model_type"]
    if hint is not None and not any({hint, kind} <= names for names in KINDS):
        raise UserError(f"{path} is of a model of type {hint!r}, and this one is of type {kind!r}")
    directions, D, L = {}, config.hidden_size, config.num_layers
    for name, tensor in tensors.items():
        number = name.removeprefix(PREFIX)
        if not (name.startswith(PREFIX) and number.isdecimal() and int(number) < L):
            raise UserError(f"{path} holds {name}: this model takes {PREFIX}0 to {PREFIX}{L - 1}")
        if tensor.shape != (D,) or tensor.type != gguf.GGMLQuantizationType.F32:
            shape, dtype = list(reversed(tensor.shape)), tensor.type.name
            raise UserError(
                f"{path}: {name} is {dtype} of shape {shape}: this model takes F32 of shape [{D}]"
            )
        directions[int(number)] = tensor.read()
        if not np.isfinite(directions[int(number)]).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite: fit it again")
    if not directions:
        raise UserError(f"{path} holds no direction: give a control vector with {PREFIX}1 or another")
    return directions


def stack_vectors(
    directions: Mapping[int, np.ndarray], layers: str | Sequence[int], config: LlamaConfig
) -> np.ndarray:
    """The directions of some layers, 0 elsewhere: float32 [L, D].

    Args:
        directions: from `read_vectors`.
        layers: see `Steer.layers`.
        config: configuration of the model.

    Raises:
        UserError: a layer that has no direction.
    """
    chosen = directions if layers == "all" else layer_numbers("steer", "layers", layers, ("all",))
    if not chosen:
        raise UserError(f"steer: layers={layers} names no layer: use all, a..b, or numbers such as 8+9")
    stack = np.zeros((config.num_layers, config.hidden_size), np.float32)
    for layer in chosen:
        if layer not in directions:
            known = ", ".join(map(str, sorted(directions)))
            raise UserError(f"steer: layers={layers}: the file has no {PREFIX}{layer}; it has {known}")
        stack[layer] = directions[layer]
    return stack
