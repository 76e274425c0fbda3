"""Exports: a model's files as a HuggingFace directory, with one tensor in memory at a time.

An IMAE model's directory holds what transformers needs to run it: the base's tensors and the units' in
safetensors files, `config.json` with an `auto_map` to the modules of `torch_side/`, which lie beside it, the
tokenizer, and a model card. `references.load_model` reads it back.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from imae_jax import __version__
from imae_jax.convert import imae_dir
from imae_jax.convert.hf import (
    IMAE_PREFIX,
    MAX_SHARD_BYTES,
    SafetensorsSource,
    SelectedSource,
    check_tensors,
    shards_of_size,
    write_config,
    write_weights,
)
from imae_jax.convert.references import HUB_ID, OpenedModel, open_model, parse_dtype
from imae_jax.convert.table import base_rows, unit_rows
from imae_jax.convert.verify import Verification
from imae_jax.errors import UserError, first_line
from imae_jax.files import new_directory, read_json

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
METRICS = ("mc1", "mc2", "mc3")
BASE_DIR, IMAE_DIR = "base", "imae"


def write_model(
    opened: OpenedModel,
    directory: Path,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    max_shard_bytes: int | None = None,
    mode: str | float = "expert",
) -> None:
    """Writes a plain or an IMAE model as a HuggingFace directory, without its model card.

    Args:
        opened: the model.
        directory: an existing, empty directory.
        dtype: of the base; default: every tensor's own, bit for bit. Units stay float32.
        tokenizer: directory or hub id of another tokenizer than the model's own.
        max_shard_bytes: size at which a new file is begun; default: the files of the source, where the model
            is a plain one from safetensors files, else 5 GB.
        mode: in which transformers runs an IMAE model by default.

    Raises:
        UserError: tensors that do not fit the config, units of another base, or a model that transformers has
            no config for.
    """
    config, units = opened.config, _unit_tensors(opened)
    rows = base_rows(config)
    check_tensors(rows, config, opened.source, opened.num_source_layers)
    hf = config.to_hf()
    if units is not None:
        hf = _imae_config(hf, opened, mode)
        for source, target in SHIPPED.items():
            (directory / target).parent.mkdir(exist_ok=True)
            shutil.copyfile(TORCH_SIDE / source, directory / target)
    loaded_tokenizer = opened.tokenizer(tokenizer)
    if dtype is None and opened.base.dtype != str(opened.source.dtype):
        dtype = opened.base.dtype  # That of the base which the units were trained on.
    tensors = SelectedSource(
        opened.source,
        rows,
        config.num_layers,
        dtype=None if dtype is None else parse_dtype(dtype),
        more=units,
    )
    if max_shard_bytes is None and units is None and isinstance(opened.source, SafetensorsSource):
        shards = _shards_of_source(opened.source, tensors)
    else:
        shards = shards_of_size(tensors, max_shard_bytes or MAX_SHARD_BYTES)
    write_weights(directory, tensors, shards)
    opened.identified()  # Refuses units of another base, whose tensors have been read only now.
    eos_token_ids = opened.eos_token_ids(loaded_tokenizer)
    write_config(directory, hf, tensors.dtype, loaded_tokenizer, eos_token_ids, opened.generation_config())


def _unit_tensors(opened: OpenedModel) -> SelectedSource | None:
    if opened.unit_source is None:
        return None
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


def _shards_of_source(source: SafetensorsSource, tensors: SelectedSource) -> list[list[str]]:
    shards: dict[str, list[str]] = {file: [] for file in sorted(set(source.files.values()))}
    for name in tensors.shapes:
        shards[source.files[name]].append(name)
    return [names for names in shards.values() if names]


def write_card(
    directory: Path,
    opened: OpenedModel,
    *,
    name: str,
    verification: Verification | None = None,
    results: Mapping[str, Any] | None = None,
    base_model: str | None = None,
) -> str | None:
    """Writes an IMAE model's card.

    Args:
        directory: of the export.
        opened: the model.
        name: of the export.
        verification: what was measured of the written files.
        results: from `read_results`.
        base_model: hub id of the base; default: the base's reference, where that is one.

    Returns:
        The hub id of the base, if it is known.
    """
    training = opened.imae.get("training")
    config = training.get("config") if isinstance(training, dict) else None
    config = config if isinstance(config, dict) else {}
    data = config.get("data")
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
        verification=verification,
        results=results,
        version=__version__,
    )
    (directory / CARD_FILE).write_text(text, encoding="utf-8")
    return base_model


def read_results(path: str) -> dict[str, Any]:
    """What a model card shows of an evaluation: `protocol`, `n_questions` and the metrics of all `methods`.

    Args:
        path: a directory with `results.json`, or the file.

    Raises:
        UserError: it is no evaluation of multiple choice.
    """
    file = Path(path)
    file = file / "results.json" if file.is_dir() else file
    results = read_json(file)
    methods = results.get("methods")
    methods = {
        name: {metric: float(values[metric]) for metric in METRICS}
        for name, values in (methods.items() if isinstance(methods, dict) else ())
        if isinstance(values, dict) and all(_is_number(values.get(metric)) for metric in METRICS)
    }
    if not methods:
        raise UserError(f"{file} has no methods with {', '.join(METRICS)}: give the output of an evaluation")
    shown = {name: results[name] for name in ("protocol", "n_questions") if name in results}
    return shown | {"methods": methods}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
        plain = dataclasses.replace(opened, anti_expert=None, unit_source=None, imae=None)
        write_model(plain, temporary / BASE_DIR, tokenizer=tokenizer)
        opened.identified()
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


def check_repository(name: str) -> None:
    if not HUB_ID.fullmatch(name):
        raise UserError(f"--push {name}: a repository of the hub is named org/name")


def push(directory: Path, repository: str, *, dry_run: bool = False) -> list[str]:
    """Uploads an export to the HuggingFace hub, with the token that `hf auth login` or `HF_TOKEN` provide.

    Args:
        directory: of the export.
        repository: `org/name`; created where it does not exist.
        dry_run: upload nothing.

    Returns:
        The files, with their sizes.

    Raises:
        UserError: the hub refuses.
    """
    check_repository(repository)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if not dry_run:
        import huggingface_hub

        try:
            hub = huggingface_hub.HfApi(library_name="imae_jax", library_version=__version__)
            hub.create_repo(repository, exist_ok=True)
            hub.upload_folder(
                folder_path=directory, repo_id=repository, commit_message=f"Export by imae_jax {__version__}"
            )
        except Exception as error:  # The hub client's errors share no base class across versions.
            raise UserError(
                f"{repository} cannot be pushed ({first_line(error)}); {directory} is kept"
            ) from error
    return [f"{path.relative_to(directory)} ({path.stat().st_size} bytes)" for path in files]
