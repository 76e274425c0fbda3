"""HuggingFace checkpoints: safetensors in and out, and the loader that every format goes through."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.convert.table import Row, base_rows, expand, unit_rows
from imae_jax.errors import UserError
from imae_jax.llama import Llama, Weights
from imae_jax.sharding import check_divisible, sharding

# Buffers that old checkpoints store and that are functions of the config.
IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$")
MAX_NAMES_IN_ERROR = 8
DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}


class TensorSource(Protocol):
    """Tensors under HuggingFace's names and in its layout, read one at a time."""

    location: str
    dtype: np.dtype
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


class SafetensorsSource:
    """The safetensors files of a directory, single or sharded, memory-mapped.

    Raises:
        UserError: names a shard that is missing or damaged, an index that leaves the directory, or a
            checkpoint that has pickles only.
    """

    def __init__(self, directory: Path, files: list[str] | None = None):
        self.location = str(directory)
        self._handles: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in files if files is not None else _weight_files(directory):
            path = directory / name
            try:
                handle = safe_open(path, framework="numpy")
                names = list(handle.keys())
                slices = {n: handle.get_slice(n) for n in names if not IGNORED_TENSORS.search(n)}
                shapes = {n: tuple(s.get_shape()) for n, s in slices.items()}
                dtypes = {n: s.get_dtype() for n, s in slices.items()}
            except FileNotFoundError:
                raise UserError(f"shard {path} is missing: download the checkpoint again") from None
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is damaged or not a safetensors file ({error}): download it again"
                ) from None
            for tensor, dtype in dtypes.items():
                if dtype not in DTYPES:
                    raise UserError(
                        f"{tensor} in {path} is stored as {dtype}: only {', '.join(DTYPES)} can be loaded"
                    )
            repeated = shapes.keys() & self.shapes.keys()
            if repeated:
                raise UserError(f"{path} repeats {sorted(repeated)[0]} of another shard")
            self._handles |= dict.fromkeys(names, handle)
            self.shapes |= shapes
        if not self.shapes:
            raise UserError(f"{directory} holds no tensors: check the checkpoint")
        # Norms may be kept in a wider type than the matrices.
        largest = max(self.shapes, key=lambda n: int(np.prod(self.shapes[n])))
        self.dtype = jnp.dtype(DTYPES[self._handles[largest].get_slice(largest).get_dtype()])

    def read(self, name: str) -> np.ndarray:
        return self._handles[name].get_tensor(name)


def _weight_files(directory: Path) -> list[str]:
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map: download it again")
        files = sorted({str(file) for file in weight_map.values()})
        for file in files:
            if Path(file).name != file:
                raise UserError(f"{index} points outside of its directory: {file!r}")
        return files
    if list(directory.glob("*.bin")) or list(directory.glob("*.pt*")):
        raise UserError(
            f"{directory} holds pickled weights (.bin), which can run code when loaded: convert them "
            "with transformers' save_pretrained(safe_serialization=True) first"
        )
    raise UserError(
        f"{directory} has no model.safetensors and no model.safetensors.index.json: only safetensors are "
        "loaded, not pickles (.bin)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `UserError` that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def with_biases_of(config: LlamaConfig, names: Mapping[str, Any]) -> LlamaConfig:
    """`config` with the biases that a checkpoint has.

    The file decides, not the config's `attention_bias`: a Llama with ITI baked in has a bias on
    `o_proj` alone.
    """

    def present(suffix):
        return any(name.endswith(suffix) for name in names)

    return dataclasses.replace(
        config,
        qkv_bias=present("self_attn.q_proj.bias"),
        o_bias=present("self_attn.o_proj.bias"),
        mlp_bias=present("mlp.gate_proj.bias"),
    )


def load_llama(
    config: LlamaConfig,
    source: TensorSource,
    *,
    anti_expert: AntiExpertConfig | None = None,
    unit_source: TensorSource | None = None,
    stacked: bool = False,
    dtype: jnp.dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
    num_source_layers: int | None = None,
) -> Llama:
    """Builds the model from a source's tensors, each read straight into its place on the devices.

    Beyond the arrays themselves, host memory holds one parameter at a time.

    Args:
        config: of the base.
        source: the base's tensors.
        anti_expert, unit_source: sizes and tensors of the units, both or neither.
        stacked: see `Llama`.
        dtype: of the base; default: the checkpoint's own.
        mesh: device mesh to shard over; default: the default device.
        num_source_layers: how many layers the source has, where `config` takes the lowest ones only.

    Raises:
        UserError: lists every missing, unexpected and wrongly shaped tensor.
    """
    if mesh is not None:
        check_divisible(config, anti_expert, mesh.shape)
    rows = base_rows(config)
    check_tensors(rows, config, source, num_source_layers)
    dtype = jnp.dtype(dtype or source.dtype)
    sources = {"": source}
    if anti_expert is not None:
        units = unit_rows(config, anti_expert)
        check_tensors(units, config, unit_source, None)
        rows, sources = rows + units, {"": source, "units": unit_source}

    abstract = nnx.eval_shape(
        lambda: Llama(config, anti_expert, rngs=nnx.Rngs(0), stacked=stacked, dtype=dtype)
    )
    by_path = {row.path: (row, sources.get(row.path.partition(".")[0], source)) for row in rows}
    return fill(abstract, by_path, mesh)


def fill(
    abstract: nnx.Module, rows: Mapping[str, tuple[Row, TensorSource]], mesh: jax.sharding.Mesh | None
) -> Any:
    """The module with every parameter read from its source, straight onto its devices.

    Args:
        abstract: from `nnx.eval_shape`.
        rows: row and source of every parameter, by its path without layer numbers.
        mesh: to shard over.
    """
    graphdef, state = nnx.split(abstract)
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        layer = next((part for part in path if isinstance(part, int)), None)
        row, source = rows[".".join(part for part in path if isinstance(part, str))]
        leaves.append((path, variable.replace(_place(row, layer, variable, source, mesh))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _place(row: Row, layer: int | None, variable: Any, source: TensorSource, mesh) -> jax.Array:
    """Reads one parameter (one layer's, or the stack of all layers') onto its devices."""
    shape, dtype = variable.shape, variable.dtype
    stack = row.per_layer and layer is None

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stack:
            array = row.from_hf(source.read(row.hf_name(layer)))[index]
            return np.ascontiguousarray(array, dtype=dtype)
        layers = range(*index[0].indices(shape[0]))
        parts = None
        for slot, i in enumerate(layers):
            part = row.from_hf(source.read(row.hf_name(i)))[index[1:]]
            if parts is None:
                parts = np.empty((len(layers), *part.shape), dtype)
            parts[slot] = part
        return parts

    if mesh is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    placement = sharding(mesh, *variable.get_metadata("axes"))
    cache: dict[Any, np.ndarray] = {}

    def read_once(index):
        key = tuple((s.start, s.stop) for s in index)
        if key not in cache:
            cache[key] = read(index)
        return cache[key]

    return jax.make_array_from_callback(shape, placement, read_once)


def check_tensors(rows: list[Row], config, source: TensorSource, num_source_layers: int | None) -> None:
    expected = {row.hf_name(i): row.hf_shape for row, i in expand(rows, config.num_layers)}
    allowed = set(expected)
    if num_source_layers is not None:
        allowed |= {row.hf_name(i) for row, i in expand(rows, num_source_layers)}
    if config.tie_word_embeddings:
        # Some files repeat the embedding under this name.
        allowed.add("lm_head.weight")
    found = source.shapes
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [n for n in found if n not in allowed and not IGNORED_TENSORS.search(n)],
        "of a wrong shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != shape
        ],
    }
    if any(problems.values()):
        parts = []
        for kind, names in problems.items():
            if names:
                more = len(names) - MAX_NAMES_IN_ERROR
                shown = ", ".join(names[:MAX_NAMES_IN_ERROR])
                parts.append(f"{len(names)} {kind}: {shown}{f', and {more} more' if more > 0 else ''}")
        raise UserError(f"the tensors in {source.location} do not fit its config: {'; '.join(parts)}")


def hf_tensors(weights: Weights, config: LlamaConfig, rows: list[Row]) -> dict[str, Callable[[], np.ndarray]]:
    """A reader for every HuggingFace tensor of these rows, so that a writer can go one by one."""

    def reader(row: Row, layer: int | None):
        def read() -> np.ndarray:
            root, _, path = row.path.partition(".")
            node = {"units": weights.units, "lora": weights.lora}.get(root, weights.base)
            for part in (row.path if node is weights.base else path).split("."):
                if isinstance(node, tuple):
                    node = node[layer]
                node = node[part]
            stacked = row.per_layer and node.ndim > len(row.shape)
            # safetensors writes wrong data for arrays that are not contiguous.
            return np.ascontiguousarray(row.to_hf(np.asarray(node[layer] if stacked else node)))

        return read

    return {row.hf_name(i): reader(row, i) for row, i in expand(rows, config.num_layers)}


def save_hf(
    model: Llama,
    tokenizer: Any,
    directory: Path,
    *,
    eos_token_ids: Sequence[int] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a plain Llama as a HuggingFace directory; one shard at a time is held in memory.

    Args:
        model: only its base is written.
        tokenizer: a transformers tokenizer.
        directory: an existing, empty directory.
        eos_token_ids: tokens that end a text; default: the tokenizer's.
        max_shard_bytes: size at which a new file is begun.
    """
    weights, config = model.weights(), model.config
    readers = hf_tensors(weights, config, base_rows(config))
    shards: list[dict[str, Callable]] = [{}]
    size = total = 0
    itemsize = jnp.dtype(weights.dtype).itemsize
    shapes = {row.hf_name(i): row.hf_shape for row, i in expand(base_rows(config), config.num_layers)}
    for name, read in readers.items():
        num_bytes = int(np.prod(shapes[name])) * itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = read
        size, total = size + num_bytes, total + num_bytes

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: read() for n, read in shard.items()}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    with _quiet_tokenizers():
        tokenizer.save_pretrained(directory)
    eos = list(eos_token_ids)
    eos = tokenizer.eos_token_id if not eos else eos[0] if len(eos) == 1 else eos
    hf = config.to_hf() | {
        "dtype": str(weights.dtype),
        "torch_dtype": str(weights.dtype),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos,
    }
    (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


@contextlib.contextmanager
def _quiet_tokenizers():
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
