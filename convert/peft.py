"""LoRA adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors.numpy import save

from imae_jax.config import LORA_TARGETS, LlamaConfig, LoraConfig
from imae_jax.convert.hf import SafetensorsSource, check_tensors, fill, hf_tensors, read_json
from imae_jax.convert.table import base_rows, lora_rows
from imae_jax.errors import UserError
from imae_jax.files import new_directory
from imae_jax.llama import Llama, Weights
from imae_jax.lora import LoraDeltas

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# Settings of PEFT that change what an adapter computes, with the values under which it is plain LoRA.
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
}


def is_adapter(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


def adapter_of(reference: str, base_reference: str) -> Path | None:
    """The directory, if `reference` is an adapter of exactly this base; else None."""
    path = Path(reference)
    if is_adapter(path) and read_json(path / CONFIG_FILE).get("base_model_name_or_path") == base_reference:
        return path
    return None


def read_adapter(
    path: Path, config: LlamaConfig, *, stacked: bool, mesh: jax.sharding.Mesh | None = None
) -> tuple[Any, LoraConfig]:
    """Reads an adapter for a base.

    Args:
        path: a directory in PEFT's format.
        config: of the base that it belongs to.
        stacked: layout of the deltas; that of the base's layers.
        mesh: to shard over.

    Returns:
        The deltas as in `Weights.lora`, float32, and their config.

    Raises:
        UserError: a kind of adapter other than plain LoRA, or tensors that do not fit the base.
    """
    settings = read_json(path / CONFIG_FILE)
    for name, plain in PLAIN.items():
        if settings.get(name, plain) not in (plain, None):
            raise UserError(
                f"{path / CONFIG_FILE}: {name}={settings[name]!r} is not supported, only plain LoRA is"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path / CONFIG_FILE} must have r and lora_alpha")
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)
    source = SafetensorsSource(path, [WEIGHTS_FILE])
    every = lora_rows(config, LoraConfig(rank, alpha))
    targets = {row.path.split(".")[1] for row in every if row.hf_name(0) in source.shapes}
    if not targets:
        raise UserError(f"{path / WEIGHTS_FILE} holds no deltas of this model's projections")
    lora = LoraConfig(rank, float(alpha), tuple(name for name in LORA_TARGETS if name in targets))
    rows = lora_rows(config, lora)
    try:
        check_tensors(rows, config, source, None)
    except UserError as error:
        raise UserError(f"{path} is an adapter of another base, give its own: {error}") from error
    module = fill(
        nnx.eval_shape(lambda: _declare(config, lora, stacked)),
        {row.path.removeprefix("lora."): (row, source) for row in rows},
        mesh,
    )
    return as_tree(module, config.num_layers), lora


def as_tree(module: LoraDeltas | nnx.List, num_layers: int) -> Any:
    """The arrays of a module of deltas as in `Weights.lora`."""
    tree = nnx.to_pure_dict(nnx.state(module))
    return tuple(tree[i] for i in range(num_layers)) if isinstance(module, nnx.List) else tree


def _declare(config: LlamaConfig, lora: LoraConfig, stacked: bool) -> LoraDeltas | nnx.List:
    if stacked:
        return LoraDeltas(config, lora, rngs=nnx.Rngs(0), stack=config.num_layers)
    layers = range(config.num_layers)
    return nnx.List([LoraDeltas(config, lora, rngs=nnx.Rngs(0), stack=None) for _ in layers])


def write_adapter(
    path: Path,
    deltas: Any,
    config: LlamaConfig,
    lora: LoraConfig,
    *,
    base_reference: str,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter that PEFT and `read_adapter` load, whole or not at all."""
    rows = lora_rows(config, lora)
    names = {row.path.removeprefix("layers."): row.hf for row in base_rows(config)}
    settings = {
        **PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_reference,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [names[target].split(".")[-2] for target in lora.targets],
        "inference_mode": True,
    }
    readers = hf_tensors(Weights({}, lora=deltas), config, rows)
    with new_directory(path, marker=CONFIG_FILE, overwrite=overwrite) as temporary:
        tensors = {name: read() for name, read in readers.items()}
        # `save_file` makes files that only their owner can read.
        (temporary / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
        (temporary / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def merge_into(model: Llama, deltas: Any, scale: float) -> None:
    """Adds deltas to the base weights of a model in place, computed in float32, stored in its dtype."""

    def add(layers: Any, deltas: Any, multiply: Callable) -> None:
        for name, pair in deltas.items():
            weight = getattr(layers, name)
            total = weight[...].astype(jnp.float32) + scale * multiply(pair["a"], pair["b"])
            weight.set_value(total.astype(weight.dtype))

    def multiply(a, b):
        return jnp.tensordot(a, b, axes=1, precision="highest")

    if model.stacked:
        add(model.layers, deltas, jax.vmap(multiply))
    else:
        for layer, pairs in zip(model.layers, deltas, strict=True):
            add(layer, pairs, multiply)
