"""IMAE directories: the trained units and the reference to the base that they belong to.

anti_expert.safetensors   the units' tensors, named as `table.unit_rows` says
imae_config.json          format version, base reference, sizes of the units, training settings
"""

import json
from pathlib import Path
from typing import Any

from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.convert.hf import TensorSource, WeightsSource, write_safetensors
from imae_jax.convert.table import unit_rows
from imae_jax.errors import UserError
from imae_jax.files import new_directory, read_json
from imae_jax.llama import Weights

WEIGHTS_FILE = "anti_expert.safetensors"
CONFIG_FILE = "imae_config.json"
FORMAT_VERSION = 1
# In the name of every tensor of a unit.
UNIT_INFIX = ".mlp.anti_expert."


def is_imae_dir(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


def read_config(path: Path) -> dict[str, Any]:
    """`imae_config.json`, checked for the fields that loading needs."""
    return check_config(read_json(path / CONFIG_FILE), str(path / CONFIG_FILE))


def check_config(imae: Any, location: str) -> dict[str, Any]:
    """The contents of `imae_config.json`, wherever they stand, or a `UserError` that names the place."""
    version = imae.get("format_version") if isinstance(imae, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{location} has format_version {version!r}: this version of imae_jax reads {FORMAT_VERSION}: "
            "take the version that wrote it"
        )
    fields = {
        "base": {"reference": str, "revision": str | None, "fingerprint": str, "dtype": str},
        "anti_expert": {"intermediate_size": int},
    }
    for section, types in fields.items():
        values = imae.get(section)
        wrong = not isinstance(values, dict) or values.keys() != types.keys()
        if wrong or not all(isinstance(values[name], kind) for name, kind in types.items()):
            raise UserError(f"{location}: {section} must have {', '.join(types)}")
    return imae


def write_imae_dir(
    path: Path,
    weights: Weights | TensorSource,
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
        weights: weights with units, or tensors of the units.
        config: configuration of the base.
        anti_expert: configuration of the units.
        base: the fields of `references.BaseReference`.
        training: settings to remember; any JSON.
        overwrite: replace an existing directory.
    """
    units = weights
    if isinstance(weights, Weights):
        units = WeightsSource(weights, config, unit_rows(config, anti_expert))
    imae = {
        "format_version": FORMAT_VERSION,
        "base": base,
        "anti_expert": {"intermediate_size": anti_expert.intermediate_size},
        "training": training,
    }
    with new_directory(path, marker=CONFIG_FILE, overwrite=overwrite) as temporary:
        write_safetensors(temporary / WEIGHTS_FILE, units, units.shapes)
        (temporary / CONFIG_FILE).write_text(json.dumps(imae, indent=2) + "\n")
