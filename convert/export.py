"""Exports: a model's files as a HuggingFace directory, with one tensor in memory at a time.

An IMAE model's directory holds what transformers needs to run it: the base's tensors and the units' in
safetensors files, `config.json` with an `auto_map` to the modules of `torch_side/`, which lie beside it, the
tokenizer, and a model card. `references.load_model` reads it back.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from safetensors.numpy import save

from imae_jax import __version__
from imae_jax.anti_expert import parse_mode
from imae_jax.convert import imae_dir, peft
from imae_jax.convert.hf import (
    IMAE_PREFIX,
    MAX_SHARD_BYTES,
    SafetensorsSource,
    SelectedSource,
    check_tensors,
    save_hf,
    shards_of_size,
    write_config,
    write_weights,
)
from imae_jax.convert.references import HUB_ID, OpenedModel, open_model, parse_dtype
from imae_jax.convert.table import base_rows, unit_rows
from imae_jax.errors import UserError
from imae_jax.files import new_directory, read_json
from imae_jax.language_model import LanguageModel

TORCH_SIDE = Path(__file__).parent / "torch_side"
SHIPPED = {
    "configuration_imae.py": "configuration_imae.py",
    "modeling_imae.py": "modeling_imae.py",
    "generate.py": "custom_generate/generate.py",
}
FAMILIES = {
    "llama": "ImaeLlama",
    "mistral": "ImaeMistral",
    "qwen2": "ImaeQwen2",
    "qwen3": "ImaeQwen3",
    "gemma3_text": "ImaeGemma3",
}
CARD_FILE, CARD_TEMPLATE = "README.md", Path(__file__).parent / "model_card.md.jinja"
DATASETS = {"halueval": "pminervini/HaluEval"}
BASE_DIR, IMAE_DIR = "base", "imae"


def export_plain(
    opened: OpenedModel,
    directory: Path,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes the base of a model as a HuggingFace directory.

    Args:
        opened: the model; its units, if any, are left out.
        directory: an existing, empty directory.
        dtype: dtype of the weights; default: every tensor's own, bit for bit.
        tokenizer: directory or hub id of another tokenizer than the model's own.
        max_shard_bytes: size at which a new file is begun; default: the files of the source, where those are
            safetensors, else 5 GB.

    Raises:
        UserError: tensors that do not fit the config, or a model that transformers has no config for.
    """
    hf, tensors = opened.config.to_hf(), _base_tensors(opened, dtype)
    source = opened.source
    if max_shard_bytes is None and opened.unit_source is None and isinstance(source, SafetensorsSource):
        shards: dict[str, list[str]] = {file: [] for file in sorted(set(source.files.values()))}
        for name in tensors.shapes:
            shards[source.files[name]].append(name)
        _write(opened, directory, hf, tensors, [names for names in shards.values() if names], tokenizer)
    else:
        shards = shards_of_size(tensors, max_shard_bytes or MAX_SHARD_BYTES)
        _write(opened, directory, hf, tensors, shards, tokenizer)


def export_merged(lm: LanguageModel, directory: Path, *, max_shard_bytes: int | None = None) -> None:
    """Writes a plain model that is in memory, such as a base with an adapter or ITI's biases merged in.

    Args:
        lm: the model; units are left out.
        directory: an existing, empty directory.
        max_shard_bytes: size at which a new file is begun; default: 5 GB.
    """
    size = max_shard_bytes or MAX_SHARD_BYTES
    save_hf(lm.model, lm.tokenizer, directory, eos_token_ids=lm.eos_token_ids, max_shard_bytes=size)


def export_imae(
    opened: OpenedModel,
    directory: Path,
    *,
    name: str,
    mode: str | float = "expert",
    base_model: str | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    max_shard_bytes: int | None = None,
) -> str | None:
    """Writes an IMAE model as a directory that transformers runs, with its model card.

    Args:
        opened: a model with units.
        directory, tokenizer: as for `export_plain`.
        name: name of the model on its card.
        mode: mode in which transformers runs it by default.
        base_model: hub id of the base; default: the base's reference, where that is one.
        dtype: dtype of the base; default: every tensor's own, bit for bit. Units stay float32.
        max_shard_bytes: size at which a new file is begun; default: 5 GB.

    Returns:
        The hub id of the base, if it is known.

    Raises:
        UserError: as `export_plain`, or units of another base.
    """
    hf = _imae_config(opened.config.to_hf(), opened, mode)
    tensors = _base_tensors(opened, dtype, _unit_tensors(opened))
    for source, target in SHIPPED.items():
        (directory / target).parent.mkdir(exist_ok=True)
        shutil.copyfile(TORCH_SIDE / source, directory / target)
    shards = shards_of_size(tensors, max_shard_bytes or MAX_SHARD_BYTES)
    _write(opened, directory, hf, tensors, shards, tokenizer)
    return _write_card(opened, directory, name, base_model)


def export_mode(opened: OpenedModel, directory: Path, mode: str | float) -> None:
    """Writes a LoRA adapter with which an export runs in another mode than its config's.

    A unit is linear in `down_proj` [D, A]. Where the config's strength is o, `m / o - 1` times that matrix,
    as the product with an identity [A, A], makes it m.

    Args:
        opened: an export; the adapter fits it alone, in the mode of its config.
        directory: an existing, empty directory.
        mode: the adapter's mode.

    Raises:
        UserError: no export, or one whose config says base mode, where no unit runs.
    """
    location = opened.base.reference
    if not opened.is_export:
        raise UserError(f"a mode's adapter is made for an export: `convert export` writes one of {location}")
    own = parse_mode(read_json(opened.directory / "config.json")["mode"])
    if own == 0:
        raise UserError(f"{location} runs no units, so no adapter acts: export it with --mode expert")
    units, rank = _unit_tensors(opened), opened.anti_expert.intermediate_size
    factor = np.float32(parse_mode(mode) / own - 1)
    tensors = {}
    for layer in range(opened.config.num_layers):
        module = f"model.layers.{layer}.mlp.anti_expert.down_proj"
        tensors[f"{peft.PREFIX}{module}.lora_A.weight"] = np.eye(rank, dtype=np.float32)
        tensors[f"{peft.PREFIX}{module}.lora_B.weight"] = factor * units.read(f"{module}.weight")
    settings = peft.PLAIN | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": location,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": r".*\.anti_expert\.down_proj",
        "inference_mode": True,
    }
    (directory / peft.WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
    (directory / peft.CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def _base_tensors(
    opened: OpenedModel, dtype: str | None, units: SelectedSource | None = None
) -> SelectedSource:
    """The base's tensors, and the units' beside them; none is read yet."""
    rows = base_rows(opened.config)
    check_tensors(rows, opened.config, opened.source, opened.num_source_layers)
    if dtype is None and opened.base.dtype != str(opened.source.dtype):
        dtype = opened.base.dtype  # That of the base which the units were trained on.
    dtype = None if dtype is None else parse_dtype(dtype)
    return SelectedSource(opened.source, rows, opened.config.num_layers, dtype=dtype, more=units)


def _write(
    opened: OpenedModel,
    directory: Path,
    hf: dict[str, Any],
    tensors: SelectedSource,
    shards: list[list[str]],
    tokenizer: str | None,
) -> None:
    loaded_tokenizer = opened.tokenizer(tokenizer)
    write_weights(directory, tensors, shards)
    opened.identified()  # Refuses units of another base, whose tensors have been read only now.
    eos_token_ids = opened.eos_token_ids(loaded_tokenizer)
    write_config(directory, hf, tensors.dtype, loaded_tokenizer, eos_token_ids, opened.generation_config())


def _unit_tensors(opened: OpenedModel) -> SelectedSource:
    rows = unit_rows(opened.config, opened.anti_expert)
    check_tensors(rows, opened.config, opened.unit_source, opened.num_source_layers)
    return SelectedSource(opened.unit_source, rows, opened.config.num_layers)


def _imae_config(hf: dict[str, Any], opened: OpenedModel, mode: str | float) -> dict[str, Any]:
    family = FAMILIES[hf["model_type"]]
    size = {"intermediate_size": opened.anti_expert.intermediate_size}
    recorded = opened.imae["base"]
    return hf | {
        "model_type": IMAE_PREFIX + hf["model_type"],
        "architectures": [f"{family}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_imae.{family}Config",
            "AutoModel": f"modeling_imae.{family}Model",
            "AutoModelForCausalLM": f"modeling_imae.{family}ForCausalLM",
        },
        "anti_expert_intermediate_size": opened.anti_expert.intermediate_size,
        "mode": mode,
        "imae": {
            "format_version": imae_dir.FORMAT_VERSION,
            "base": recorded | {"reference": _public_name(recorded["reference"])},
            "anti_expert": size,
        },
    }


def _public_name(reference: str) -> str:
    """A reference without the folders of the machine that it was used on."""
    return Path(reference).name if Path(reference).is_absolute() else reference


def _write_card(opened: OpenedModel, directory: Path, name: str, base_model: str | None) -> str | None:
    """Writes the model card and returns the base's hub id, if it is known."""
    training = opened.imae.get("training")
    config = training.get("config") if isinstance(training, dict) else None
    data = config.get("data") if isinstance(config, dict) else None
    source = data.get("source") if isinstance(data, dict) else None
    source = _public_name(source) if isinstance(source, str) else None
    reference = _public_name(opened.imae["base"]["reference"])
    if base_model is None and HUB_ID.fullmatch(reference.partition("#")[0]):
        base_model = reference.partition("#")[0]
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base_model is not None:
        header |= {"base_model": base_model, "base_model_relation": "adapter"}
    if source in DATASETS:
        header["datasets"] = [DATASETS[source]]
    header["tags"] = ["imae", "factuality", "custom_generate"]
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = environment.from_string(CARD_TEMPLATE.read_text(encoding="utf-8")).render(
        header="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()),
        name=name,
        base=reference,
        base_model=base_model,
        llama=opened.config,
        size=opened.anti_expert.intermediate_size,
        data_source=source,
        version=__version__,
    )
    (directory / CARD_FILE).write_text(text, encoding="utf-8")
    return base_model


def import_model(
    opened: OpenedModel, out: str, *, tokenizer: str | None = None, overwrite: bool = False
) -> None:
    """Writes an exported IMAE model as `OUT/imae`, an IMAE directory, and `OUT/base`, the base it points to.

    Raises:
        UserError: the model has no units, or those of another base.
    """
    if opened.unit_source is None:
        raise UserError(
            f"{opened.base.reference} has no anti-expert units: a plain model needs no import, every "
            "--model takes it as it is"
        )
    with new_directory(out, marker=f"{IMAE_DIR}/{imae_dir.CONFIG_FILE}", overwrite=overwrite) as temporary:
        (temporary / BASE_DIR).mkdir()
        export_plain(opened, temporary / BASE_DIR, tokenizer=tokenizer)
        base = {
            "reference": str((Path(out) / BASE_DIR).resolve()),
            "revision": None,
            "fingerprint": open_model(str(temporary / BASE_DIR)).identified().fingerprint,
            "dtype": opened.base.dtype,
        }
        imae_dir.write_imae_dir(
            temporary / IMAE_DIR,
            _unit_tensors(opened),
            opened.config,
            opened.anti_expert,
            base=base,
            training={"imported": opened.imae},
        )
