"""HuggingFace checkpoints: safetensors in and out, and the loader that every format goes through."""

import contextlib
import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from imae_jax import layer_stack
from imae_jax.anti_expert import declare_units
from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.convert.hf_tokenizer import write_tokenizer
from imae_jax.convert.identity import BLOCK_ROWS, TensorFiles
from imae_jax.convert.table import Row, base_rows, expand, unit_rows
from imae_jax.distributed import is_main, to_host
from imae_jax.errors import UserError, first_line
from imae_jax.files import read_json
from imae_jax.llama import Llama, Weights
from imae_jax.sharding import check_divisible, sharding
from imae_jax.tokenizer import Tokenizer

# Buffers that old checkpoints store and that are functions of the config, or that a GGUF file's config holds.
IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$|^rope_freqs\.weight$")
MAX_NAMES_IN_ERROR = 3
# By falling precedence in a file.
DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
MAX_SHARD_BYTES = 5_000_000_000
ALIGNMENT = 64  # bytes
# What the model types of exported IMAE models begin with.
IMAE_PREFIX = "imae_"


class TensorSource(Protocol):
    """Tensors under HuggingFace's names and in its layout, read one at a time.

    Attributes:
        location: place of the tensors, for errors.
        dtype: dtype of a model of these tensors.
        shapes, dtypes: shapes and dtypes of every tensor.
    """

    location: str
    dtype: np.dtype
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]

    def read(self, name: str) -> np.ndarray: ...


class Blocks(Protocol):
    """Tensors in HuggingFace's layout, read some rows at a time; see `TensorFiles.blocks`."""

    def blocks(self, name: str) -> Iterator[np.ndarray]: ...


class SafetensorsSource(TensorFiles):
    """The safetensors files of a directory, single or sharded, one of them memory-mapped at a time.

    Attributes:
        files: file of every tensor, by name.

    Raises:
        UserError: names a shard that is missing or damaged, an index that leaves the directory, or a
            checkpoint that has pickles only.
    """

    def __init__(self, directory: Path, files: list[str] | None = None):
        super().__init__()
        self.location = str(directory)
        self._directory = directory
        self.files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for file in files if files is not None else _weight_files(directory):
            self._open(file)
            for name in self._handle.keys():  # noqa: SIM118
                if IGNORED_TENSORS.search(name):
                    continue
                tensor = self._handle.get_slice(name)
                if tensor.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{name} in {directory / file} is stored as {tensor.get_dtype()}: only "
                        f"{', '.join(DTYPES)} can be loaded"
                    )
                if name in self.files:
                    raise UserError(f"{directory / file} repeats {name} of another shard")
                self.files[name] = file
                self.shapes[name] = tuple(tensor.get_shape())
                self.dtypes[name] = jnp.dtype(DTYPES[tensor.get_dtype()])
        if not self.shapes:
            raise UserError(f"{directory} holds no tensors: check the checkpoint")
        # Norms may be kept in a wider type than the matrices.
        self.dtype = self.dtypes[max(self.shapes, key=lambda name: math.prod(self.shapes[name]))]

    def split_off(self, chosen: Callable[[str], bool]) -> "SafetensorsSource":
        """Takes the chosen tensors out of this source, and returns a source of them."""
        other = copy.copy(self)
        for attribute in ("files", "shapes", "dtypes"):
            values = getattr(self, attribute)
            setattr(other, attribute, {name: value for name, value in values.items() if chosen(name)})
            setattr(self, attribute, {name: value for name, value in values.items() if not chosen(name)})
        return other

    def _blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self._opened != self.files[name]:
            self._open(self.files[name])
        shape = self.shapes[name]
        if len(shape) < 2:
            block = self._handle.get_tensor(name)
            yield block.reshape(-1).view(np.uint8), block
            return
        tensor = self._handle.get_slice(name)
        for start in range(0, shape[0], BLOCK_ROWS):
            block = tensor[start : min(start + BLOCK_ROWS, shape[0])]
            yield block.reshape(-1).view(np.uint8), block

    def _open(self, file: str) -> None:
        """Maps a file into memory, in the place of the one before; its header is checked."""
        path = self._directory / file
        self._handle, self._opened = None, file
        try:
            self._handle = safe_open(path, framework="numpy")
        except FileNotFoundError as error:
            raise UserError(f"shard {path} is missing: download the checkpoint again") from error
        except (SafetensorError, OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"{path} is damaged or not a safetensors file ({reason}): download it again"
            ) from error


class WeightsSource:
    """The weights of a model in memory as a `TensorSource`; where they lie on the devices of several
    processes, all of those must read the same tensors.

    Args:
        weights, config: weights and configuration of the model.
        rows: weights to read.
    """

    location = "the model"

    def __init__(self, weights: Weights, config: LlamaConfig, rows: list[Row]):
        self._readers = hf_tensors(weights, config, rows)
        dtypes = {"units": jnp.dtype(jnp.float32), "lora": jnp.dtype(jnp.float32)}
        self.dtype = jnp.dtype(weights.dtype) if weights.base else dtypes["lora"]
        self.shapes, self.dtypes = {}, {}
        for row, layer in expand(rows, config.num_layers):
            name = row.hf_name(layer)
            self.shapes[name] = row.hf_shape
            self.dtypes[name] = dtypes.get(row.path.partition(".")[0], self.dtype)

    def read(self, name: str) -> np.ndarray:
        return self._readers[name]()


class SelectedSource:
    """Tensors of one or two sources as one `TensorSource`.

    Args:
        source: source of the tensors in `rows`.
        rows: weights to read.
        num_layers: number of lowest layers.
        dtype: dtype of the arrays; default: that of the tensors.
        more: another selection, whose tensors are taken as they are.
    """

    def __init__(
        self,
        source: TensorSource,
        rows: list[Row],
        num_layers: int,
        *,
        dtype: jnp.dtype | None = None,
        more: "SelectedSource | None" = None,
    ):
        self.location, self.dtype = source.location, jnp.dtype(dtype or source.dtype)
        self._sources = {row.hf_name(layer): source for row, layer in expand(rows, num_layers)}
        self.dtypes = {name: jnp.dtype(dtype or source.dtypes[name]) for name in self._sources}
        if more is not None:
            self._sources |= dict.fromkeys(more.shapes, more)
            self.dtypes |= more.dtypes
        self.shapes = {name: source.shapes[name] for name, source in self._sources.items()}

    def read(self, name: str) -> np.ndarray:
        return _converted(self._sources[name].read(name), self.dtypes[name], name)


def _weight_files(directory: Path) -> list[str]:
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = directory / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map: download it again")
        files = sorted({str(file) for file in weight_map.values()})
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(f"{index} points to no safetensors file in its directory: {file!r}")
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

    Beyond the arrays themselves, host memory holds some rows of a tensor; with a mesh or an accelerator, one
    parameter at a time.

    Args:
        config: configuration of the base.
        source: the base's tensors.
        anti_expert, unit_source: sizes and tensors of the units, both or neither.
        stacked: see `Llama`.
        dtype: dtype of the base; default: the checkpoint's own.
        mesh: device mesh to shard over; default: the default device.
        num_source_layers: number of layers of the source, where `config` takes the lowest ones only.

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
        check_tensors(units, config, unit_source, num_source_layers)
        rows, sources = rows + units, {"": source, "units": unit_source}

    abstract = nnx.eval_shape(
        lambda: Llama(config, anti_expert, rngs=nnx.Rngs(0), stacked=stacked, dtype=dtype)
    )
    by_path = {row.path: (row, sources.get(row.path.partition(".")[0], source)) for row in rows}
    return fill(abstract, by_path, mesh)


def load_units(
    config: LlamaConfig,
    anti_expert: AntiExpertConfig,
    source: TensorSource,
    *,
    stacked: bool,
    mesh: jax.sharding.Mesh | None,
) -> Any:
    """Anti-expert units without a base, as in `Weights.units`; see `load_llama`."""
    if mesh is not None:
        check_divisible(config, anti_expert, mesh.shape)
    rows = unit_rows(config, anti_expert)
    check_tensors(rows, config, source, config.num_layers)
    abstract = nnx.eval_shape(lambda: declare_units(config, anti_expert, rngs=nnx.Rngs(0), stacked=stacked))
    by_path = {row.path.removeprefix("units."): (row, source) for row in rows}
    return layer_stack.arrays(fill(abstract, by_path, mesh))


def fill(abstract: nnx.Module, rows: Mapping[str, tuple[Row, Blocks]], mesh: jax.sharding.Mesh | None) -> Any:
    """The module with every parameter read from its source, straight onto its devices.

    Every tensor is read once.

    Args:
        abstract: model of `nnx.eval_shape`.
        rows: row and source of every parameter, by its path without layer numbers.
        mesh: devices to shard over.
    """
    graphdef, state = nnx.split(abstract)
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        layer = next((part for part in path if isinstance(part, int)), None)
        row, source = rows[".".join(part for part in path if isinstance(part, str))]
        leaves.append((path, variable.replace(_place(row, layer, variable, source, mesh))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _place(row: Row, layer: int | None, variable: Any, source: Blocks, mesh) -> jax.Array:
    """Reads one parameter (one layer's, or the stack of all layers') onto its devices."""
    shape, dtype = variable.shape, variable.dtype
    stack = row.per_layer and layer is None
    layers = range(shape[0]) if stack else (layer,)
    if mesh is None:
        array = _empty(shape, dtype)
        for slot, i in enumerate(layers):
            _read_into(array[slot] if stack else array, row, row.hf_name(i), source)
        return jax.device_put(array)

    placement = sharding(mesh, *variable.get_metadata("axes"))
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    for index in placement.addressable_devices_indices_map(shape).values():
        bounds = _bounds(index, shape)
        if bounds not in shards:
            shards[bounds] = _empty([stop - start for start, stop in bounds], dtype)
    whole = np.empty(row.shape, dtype)
    for slot, i in enumerate(layers):
        _read_into(whole, row, row.hf_name(i), source)
        for bounds, shard in shards.items():
            index = tuple(slice(*pair) for pair in bounds)
            if not stack:
                shard[...] = whole[index]
            elif index[0].start <= slot < index[0].stop:
                shard[slot - index[0].start] = whole[index[1:]]
    return jax.make_array_from_callback(shape, placement, lambda index: shards[_bounds(index, shape)])


def _bounds(index: tuple[slice, ...], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _read_into(target: np.ndarray, row: Row, name: str, source: Blocks) -> None:
    """Fills `target`, contiguous and in this library's layout, with a tensor."""
    target, start = row.to_hf(target), 0  # A view.
    for block in source.blocks(name):
        # Converted first: an assignment that transposes as well takes three times as long.
        target[start : start + len(block)] = _converted(block, target.dtype, name)
        start += len(block)


def _converted(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """A tensor, or some rows, in another type, which must hold its values."""
    if dtype != np.float16 or array.dtype == dtype:
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if (np.isinf(converted) & ~np.isinf(array)).any():
        raise UserError(
            f"{name} holds {np.abs(array.astype(np.float32)).max():g}, which is too large for float16: give "
            "--dtype bfloat16 or float32"
        )
    return converted


def _empty(shape: Sequence[int], dtype: jnp.dtype) -> np.ndarray:
    """A new array that JAX, on CPU, takes as it is: others would be there twice while they are copied."""
    num_bytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    buffer = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def check_tensors(rows: list[Row], config, source: TensorSource, num_source_layers: int | None) -> None:
    """Raises a `UserError` that lists what is missing, unexpected and of a wrong shape in a source."""
    if config.num_layers > len(source.shapes):
        raise UserError(
            f"the config has {config.num_layers} layers, but {source.location} holds only "
            f"{len(source.shapes)} tensors"
        )
    expected = {row.hf_name(i): row.hf_shape for row, i in expand(rows, config.num_layers)}
    allowed = set(expected)
    if num_source_layers is not None:
        allowed |= {row.hf_name(i) for row, i in expand(rows, num_source_layers)}
    if config.tie_word_embeddings:
        # Some files repeat the embedding under this name.
        allowed.add("lm_head.weight")
    check_shapes(expected, source, allowed)


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], source: TensorSource, allowed: Collection[str]
) -> None:
    """Raises a `UserError` that lists what is missing, not allowed and of a wrong shape in a source."""
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
            array = node[layer] if stacked else node
            array = to_host(array) if isinstance(array, jax.Array) else array
            # safetensors' own writer gives wrong data for arrays that are not contiguous.
            return np.ascontiguousarray(row.to_hf(array))

        return read

    return {row.hf_name(i): reader(row, i) for row, i in expand(rows, config.num_layers)}


def save_hf(
    model: Llama,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    eos_token_ids: Sequence[int] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a plain Llama as a HuggingFace directory; one tensor at a time is on the host.

    Where the model lies on the devices of several processes, all of them must call this, and the main one
    writes.

    Args:
        model: only its base is written.
        tokenizer: tokenizer of the model.
        directory: an existing, empty directory.
        eos_token_ids: tokens that end a text; default: the tokenizer's.
        max_shard_bytes: size at which a new file is begun.
    """
    source = WeightsSource(model.weights(), model.config, base_rows(model.config))
    hf = model.config.to_hf()
    write_weights(directory, source, shards_of_size(source, max_shard_bytes))
    if is_main():
        write_config(directory, hf, source.dtype, tokenizer, eos_token_ids)


def write_config(
    directory: Path,
    hf: dict[str, Any],
    dtype: np.dtype,
    tokenizer: Tokenizer,
    eos_token_ids: Sequence[int],
    generation_config: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes all of a HuggingFace directory but the weights.

    Args:
        directory: directory to write into.
        hf: the model's part of `config.json`.
        dtype: dtype of the weights.
        tokenizer: tokenizer of the model.
        eos_token_ids: tokens that end a text; default: the tokenizer's.
        generation_config: further fields of `generation_config.json`, by which transformers samples.
    """
    write_tokenizer(tokenizer, directory)
    eos = list(eos_token_ids)
    eos = tokenizer.eos_token_id if not eos else eos[0] if len(eos) == 1 else eos
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    hf = hf | {"dtype": str(dtype), "torch_dtype": str(dtype)} | ends
    # The base's may name a token for empty prompts where the tokenizer has none.
    known = {name: value for name, value in ends.items() if value is not None}
    for name, values in (("config.json", hf), (GENERATION_FILE, ends | dict(generation_config) | known)):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def shards_of_size(source: TensorSource, max_bytes: int) -> list[list[str]]:
    """The names of all tensors, cut where a file would exceed `max_bytes`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.shapes:
        num_bytes = _num_bytes(source, name)
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def write_weights(directory: Path, source: TensorSource, shards: Sequence[Sequence[str]]) -> None:
    """Writes safetensors files, with an index where there are several."""
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, source, names)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1 and is_main():
        total = sum(_num_bytes(source, name) for name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_safetensors(path: Path, source: TensorSource, names: Iterable[str]) -> None:
    """Writes one file, byte for byte as the safetensors library does, which needs all tensors in memory
    at once: here one at a time is. With several processes all read, and the main one writes.
    """
    kinds = {jnp.dtype(dtype): kind for kind, dtype in DTYPES.items()}
    precedence = list(kinds)
    names = sorted(names, key=lambda name: (precedence.index(source.dtypes[name]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + _num_bytes(source, name)
        header[name] = {
            "dtype": kinds[source.dtypes[name]],
            "shape": list(source.shapes[name]),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") if is_main() else contextlib.nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = source.read(name)
            assert array.shape == source.shapes[name] and array.dtype == source.dtypes[name], name
            if file is not None:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _num_bytes(source: TensorSource, name: str) -> int:
    return math.prod(source.shapes[name]) * source.dtypes[name].itemsize
