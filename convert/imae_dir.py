"""IMAE directories: the trained units and the reference to the base that they belong to.

anti_expert.safetensors   the units' tensors, named as `table.unit_rows` says
imae_config.json          format version, base reference, sizes of the units, training settings
"""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.convert.hf import hf_tensors, read_json
from imae_jax.convert.table import unit_rows
from imae_jax.errors import UserError
from imae_jax.files import new_directory
from imae_jax.llama import Weights

WEIGHTS_FILE = "anti_expert.safetensors"
CONFIG_FILE = "imae_config.json"
FORMAT_VERSION = 1


def is_imae_dir(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """`imae_config.json`, checked for the fields that loading needs."""
    imae = read_json(path / CONFIG_FILE)
    if imae.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path / CONFIG_FILE} has format_version {imae.get('format_version')!r}: this version of "
            f"imae_jax reads {FORMAT_VERSION}"
        )
    fields = {
        "base": {"reference": str, "revision": str | None, "fingerprint": str, "dtype": str},
        "anti_expert": {"intermediate_size": int},
    }
    for section, types in fields.items():
        values = imae.get(section)
        wrong = not isinstance(values, dict) or values.keys() != types.keys()
        if wrong or not all(isinstance(values[name], kind) for name, kind in types.items()):
            raise UserError(f"{path / CONFIG_FILE}: {section} must have {', '.join(types)}")
    return imae


def write_imae_dir(
    path: Path,
    weights: Weights,
    config: LlamaConfig,
    anti_expert: AntiExpertConfig,
    *,
    base: dict[str, Any],
    training: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes an IMAE directory, whole or not at all.

    Args:
        path: the new directory.
        weights: with units.
        config: of the base.
        anti_expert: of the units.
        base: the fields of `references.BaseReference`.
        training: settings to remember; any JSON.
        overwrite: replace an existing directory.
    """
    readers = hf_tensors(weights, config, unit_rows(config, anti_expert))
    imae = {
        "format_version": FORMAT_VERSION,
        "base": base,
        "anti_expert": {"intermediate_size": anti_expert.intermediate_size},
        "training": training,
    }
    with new_directory(path, marker=CONFIG_FILE, overwrite=overwrite) as temporary:
        tensors = {name: read() for name, read in readers.items()}
        save_file(tensors, temporary / WEIGHTS_FILE, {"format": "pt"})
        (temporary / CONFIG_FILE).write_text(json.dumps(imae, indent=2) + "\n")
