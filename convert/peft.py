"""LoRA adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from imae_jax import layer_stack
from imae_jax.config import LORA_TARGETS, LlamaConfig, LoraConfig
from imae_jax.convert import identity
from imae_jax.convert.hf import SafetensorsSource, check_shapes, fill, hf_tensors
from imae_jax.convert.table import base_rows, expand, lora_rows
from imae_jax.errors import UserError, first_line
from imae_jax.files import new_directory, read_json
from imae_jax.llama import Llama, Weights
from imae_jax.lora import LoraDeltas

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# What `write_adapter` says of its adapters.
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
HEEDED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Other settings of PEFT that may have any value: what is checked elsewhere, what matters to training alone,
# and what goes with an initialization. All others must be off.
KNOWN = {
    *HEEDED,
    *WHERE,
    *("base_model_name_or_path", "revision", "init_lora_weights"),
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
OFF = (None, False, [], {}, "")
# Initializations that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and perhaps what comes
# after them take a part out of its weights, which an adapter on the whole weights would count twice.
INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
MERGE = "merge it into its base with PEFT's merge_and_unload, and give the result"
# PEFT's for Llama, Mistral, Qwen and Gemma.
DEFAULT_TARGETS = ("q_proj", "v_proj")
PREFIX, LORA_A = "base_model.model.", ".lora_A."


def is_adapter(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter for a base after look-up: its files, opened but not read.

    Attributes:
        config: configuration of the base.
        lora: the largest of its ranks, the scale of its deltas, and which projections have any.
        source: tensors of the adapter.
        shapes: shapes of the tensors of `lora` in every layer.
        factors: factors of the tensors whose projections have a scale of their own, by name.
        settings: everything else that the deltas depend on.
    """

    config: LlamaConfig
    lora: LoraConfig
    source: SafetensorsSource
    shapes: dict[str, tuple[int, ...]]
    factors: dict[str, float]
    settings: dict[str, Any]

    def read(self, *, stacked: bool, mesh: jax.sharding.Mesh | None = None) -> Any:
        """The deltas as in `Weights.lora`, float32; zeros where there are none.

        Args:
            stacked: layout of the deltas; that of the base's layers.
            mesh: devices to shard over.
        """
        rows = lora_rows(self.config, self.lora)
        module = fill(
            nnx.eval_shape(lambda: _declare(self.config, self.lora, stacked)),
            {row.path.removeprefix("lora."): (row, self) for row in rows},
            mesh,
        )
        return layer_stack.arrays(module)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """A tensor, filled up with zeros to the rank of `lora`."""
        whole = np.zeros(self.shapes[name], np.float32)
        if name in self.source.shapes:
            part = self.source.read(name).astype(np.float32)
            whole[tuple(map(slice, part.shape))] = part * np.float32(self.factors.get(name, 1.0))
        yield whole

    def fingerprint(self, base: str) -> str:
        """Fingerprint of everything that the adapted model computes with.

        Args:
            base: the fingerprint of the adapter's base.
        """
        tensors = self.source.fingerprint(self.source.shapes)
        return identity.fingerprint([base, tensors, json.dumps(self.settings, sort_keys=True)])


def open_adapter(path: Path, config: LlamaConfig) -> Adapter:
    """Opens an adapter without reading its tensors.

    Args:
        path: a directory in PEFT's format.
        config: configuration of the base that it belongs to.

    Raises:
        UserError: an adapter other than LoRA on the layers' projections, or tensors that do not fit the base.
    """
    settings = _read_settings(path / CONFIG_FILE)
    rank, alpha, rslora = settings["r"], settings["lora_alpha"], settings.get("use_rslora")
    if not (path / WEIGHTS_FILE).is_file():
        raise _no_weights(path)
    source = SafetensorsSource(path, [WEIGHTS_FILE])
    rows = lora_rows(config, LoraConfig())
    known = re.compile("|".join(re.escape(row.hf).replace(r"\{layer\}", r"\d+") for row in rows))
    others = [name for name in source.shapes if not known.fullmatch(name)]
    if len(others) == len(source.shapes):
        raise UserError(f"{path} holds no deltas of this model's projections, but {others[0]}: {MERGE}")
    if others:
        raise UserError(
            f"{path} holds {others[0]} besides deltas of the layers' projections, which is not supported: "
            f"{MERGE}"
        )

    def rank_of(module):
        return _by_pattern(settings["rank_pattern"], module, rank)

    def scale_of(module):
        own_alpha, own_rank = _by_pattern(settings["alpha_pattern"], module, alpha), rank_of(module)
        return own_alpha / (math.sqrt(own_rank) if rslora else own_rank)

    # Projections of `DecoderLayers` by the modules that they are in the base.
    modules = {_module(row.hf_name(i)): row.path.split(".")[1] for row, i in expand(rows, config.num_layers)}
    others = {"model.embed_tokens", "lm_head"}
    try:
        acting = {module for module in others | modules.keys() if _acts_on(settings, module)}
    except re.error as error:
        raise UserError(
            f"{path / CONFIG_FILE}: a pattern in {', '.join(WHERE)} is none ({first_line(error)})"
        ) from error
    if acting & others:
        raise UserError(
            f"{path} acts on {min(acting & others)} besides the layers' projections, which is not supported: "
            f"{MERGE}"
        )
    if not acting:
        raise UserError(f"{path / CONFIG_FILE}: {', '.join(WHERE)} name none of this model's projections")
    targets = tuple(target for target in LORA_TARGETS if target in {modules[module] for module in acting})
    largest = max(map(rank_of, acting))
    lora = LoraConfig(largest, alpha * (math.sqrt(rank) if rslora else 1) * largest / rank, targets)
    shapes = {row.hf_name(i): row.hf_shape for row, i in expand(lora_rows(config, lora), config.num_layers)}
    expected = {
        name: (rank_of(module), shape[1]) if LORA_A in name else (shape[0], rank_of(module))
        for name, shape in shapes.items()
        if (module := _module(name)) in acting
    }
    try:
        check_shapes(expected, source, expected)
    except UserError as error:
        raise UserError(
            f"{path} is an adapter of another base, or acts elsewhere than {', '.join(WHERE)} of its "
            f"{CONFIG_FILE} say: give its own base, or restore its files ({error})"
        ) from error
    factors = {name: scale_of(_module(name)) / lora.scale for name in expected if LORA_A not in name}
    heeded = {name: settings.get(name) for name in HEEDED}
    return Adapter(config, lora, source, shapes, factors, heeded)


def _read_settings(path: Path) -> dict[str, Any]:
    """`adapter_config.json`, refused where it asks for more than LoRA."""
    settings = {"rank_pattern": {}, "alpha_pattern": {}}
    settings |= {name: value for name, value in read_json(path).items() if value is not None}
    plain = {"peft_type": "LORA", "bias": "none"}
    for name, value in settings.items():
        off = value == plain[name] if name in plain else name in KNOWN or value in OFF
        if not off:
            raise UserError(f"{path}: {name}={value!r} is not supported, only plain LoRA is: {MERGE}")
    start = settings.get("init_lora_weights")
    if (start.lower() if isinstance(start, str) else start) not in INITIALIZATIONS:
        raise UserError(
            f"{path}: init_lora_weights={start!r} changes the base's weights, too, which is not supported: "
            f"{MERGE}"
        )
    if not (_is_positive(settings.get("r"), int) and _is_positive(settings.get("lora_alpha"), int | float)):
        raise UserError(f"{path} must have r and lora_alpha, numbers above 0")
    for name, kind in (("rank_pattern", int), ("alpha_pattern", int | float)):
        patterns = settings[name]
        try:
            valid = all(re.compile(key) and _is_positive(value, kind) for key, value in patterns.items())
        except (AttributeError, re.error) as error:
            raise UserError(f"{path}: {name} must map patterns to numbers ({first_line(error)})") from error
        if not valid:
            raise UserError(f"{path}: {name} must map patterns to numbers above 0")
    for name in WHERE:
        value, kind = settings.get(name, []), int if name == "layers_to_transform" else str
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, kind) and not isinstance(item, bool) for item in values):
            raise UserError(f"{path}: {name}={value!r} must be of type {kind.__name__} or a list of that")
    if isinstance(settings.get("target_modules"), str) and settings.get("layers_to_transform") is not None:
        raise UserError(f"{path}: layers_to_transform goes with a list of target_modules, not with a pattern")
    return settings


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf


def _acts_on(settings: dict[str, Any], module: str) -> bool:
    """Whether an adapter acts on a module of the base, such as `model.layers.0.mlp.up_proj`, as PEFT decides.

    See `check_target_module_exists` in peft/tuners/tuners_utils.py.
    """

    def chosen(names):
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in names)

    targets, layers = settings.get("target_modules", DEFAULT_TARGETS), settings.get("layers_to_transform", [])
    if chosen(settings.get("exclude_modules", [])):
        return False
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return module.endswith("_proj")
    if not chosen(targets):
        return False
    if layers == [] or module in targets:
        return True
    patterns = settings.get("layers_pattern") or r"[^.]*"
    matches = (
        re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", module)
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    )
    match = next(filter(None, matches), None)
    layers = layers if isinstance(layers, list) else [layers]
    return match is not None and match["layer"] is not None and int(match["layer"]) in layers


def _module(name: str) -> str:
    """The module of the base that a tensor belongs to."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is the end of a module's name, as PEFT matches them."""
    matches = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matches, default)


def _no_weights(path: Path) -> UserError:
    if (path / "adapter_model.bin").is_file():
        return UserError(
            f"{path} holds a pickled adapter (adapter_model.bin), which can run code when loaded: save it "
            "again with PEFT's save_pretrained, which writes safetensors"
        )
    if (path / "config.json").is_file():
        return UserError(
            f"{path} holds a whole checkpoint and {CONFIG_FILE}, but no {WEIGHTS_FILE}: if the adapter has "
            f"been merged into the checkpoint, remove {CONFIG_FILE}"
        )
    return UserError(f"{path} has no {WEIGHTS_FILE}: download the adapter again")


def _declare(config: LlamaConfig, lora: LoraConfig, stacked: bool) -> nnx.Module:
    return layer_stack.declare(
        lambda n: LoraDeltas(config, lora, rngs=nnx.Rngs(0), stack=n), config.num_layers, stacked=stacked
    )


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
    """Writes an adapter that PEFT and `open_adapter` load, whole or not at all."""
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
    """Adds deltas to the base weights of a model in place, computed in float32, stored in its dtype.

    Raises:
        UserError: that dtype does not hold a sum.
    """

    def add(layers: Any, deltas: Any, multiply: Callable) -> None:
        for name, pair in deltas.items():
            weight = getattr(layers, name)
            total = weight[...].astype(jnp.float32) + scale * multiply(pair["a"], pair["b"])
            merged = total.astype(weight.dtype)
            if jnp.any(jnp.isinf(merged) & jnp.isfinite(total)):
                raise UserError(
                    f"with the adapter, {name} is too large for {weight.dtype}: choose another --dtype"
                )
            weight.set_value(merged)

    def multiply(a, b):
        return jnp.tensordot(a, b, axes=1, precision="highest")

    if model.stacked:
        add(model.layers, deltas, jax.vmap(multiply))
    else:
        for layer, pairs in zip(model.layers, deltas, strict=True):
            add(layer, pairs, multiply)
