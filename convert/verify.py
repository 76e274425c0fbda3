"""Compares an exported IMAE model in transformers with the model of this library that it was made of."""

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from imae_jax.anti_expert import MODES
from imae_jax.convert import identity
from imae_jax.convert.references import OpenedModel
from imae_jax.errors import UserError
from imae_jax.files import read_json
from imae_jax.llama import Interventions, forward, project

# Of two logits, in float64. Rounding stays far below: 2.5e-6 on SmolLM2's 30 layers, since RoPE's tables are
# float32. In float32, XLA's sums alone would be 2.4e-4 away from float64 there, and torch's 1.4e-4.
MAX_DIFFERENCE = 2e-4
# Half precisions round every activation on both sides, each in its own order: mean KL divergence between the
# two distributions over tokens, in nats.
MAX_KL = 0.015
ROWS, TOKENS, PADDING = 2, 48, 5
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "anti_expert_intermediate_size")


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was measured.

    Attributes:
        dtype: dtype of the exported base.
        difference: largest difference of two logits, computed in float64, by mode.
        kl: mean KL divergence in nats, computed in `dtype`, by mode; None for float32.
        num_layers: number of lowest layers that were compared.
        versions: versions of torch and transformers.
    """

    dtype: str
    difference: dict[str, float]
    kl: dict[str, float] | None
    num_layers: int
    versions: dict[str, str]

    def summary(self) -> str:
        """One line for people."""
        kl = ""
        if self.kl is not None:
            kl = f", in {self.dtype} the mean KL divergence is at most {max(self.kl.values()):.1e} nats"
        return (
            f"verified in transformers {self.versions['transformers']}, {self.num_layers} layers: in float64 "
            f"logits differ by at most {max(self.difference.values()):.1e}{kl}"
        )


def check_installed() -> None:
    """Raises a `UserError` where a package that `verify` needs is missing."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"verification needs {name}, which is not installed: pip install {name}")


def verify(opened: OpenedModel, directory: Path, num_layers: int | None = None) -> Verification:
    """Runs random tokens, with padding, through both models in all modes.

    Both compute in float64 with the values that were exported; those of a half precision run in that one,
    too. One model at a time is in memory.

    Args:
        opened: model that was exported.
        directory: the export.
        num_layers: compare the lowest ones alone; default: all.

    Raises:
        UserError: the two differ, the export is of another model, or torch or transformers is not installed.
    """
    check_installed()
    if opened.imae is None:
        raise UserError(f"{opened.base.reference} has no anti-expert units: only IMAE models are verified")
    hf = read_json(directory / "config.json")
    if "anti_expert_intermediate_size" not in hf:
        raise UserError(f"{directory} is no export of an IMAE model: give what convert export wrote")
    _check_source(opened, directory, hf)
    dtype, config = hf["dtype"], opened.config
    if num_layers is None:
        num_layers = config.num_layers
    if not 1 <= num_layers <= config.num_layers:
        raise UserError(f"{num_layers} layers to compare: give 1 to {config.num_layers}")
    cut = dataclasses.replace(opened, config=config.lowest_layers(num_layers))
    length = min(TOKENS, config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, length))
    mask = np.ones(tokens.shape, bool)
    mask[1, :PADDING] = False
    # Here, since without torch it cannot be imported.
    logits_of = importlib.import_module("imae_jax.convert.torch_side.logits").logits_of

    def both(compute_dtype):
        expected = _logits_here(cut, dtype, compute_dtype, tokens, mask)
        actual, versions = logits_of(directory, num_layers, tokens, mask, modes=MODES, dtype=compute_dtype)
        return {mode: (expected[mode][mask], actual[mode][mask]) for mode in MODES}, versions

    pairs, versions = both("float64")
    difference = {mode: float(np.abs(e - a).max()) for mode, (e, a) in pairs.items()}
    _check(difference, MAX_DIFFERENCE, "logits differ by")
    kl = None
    if dtype != "float32":
        pairs, _ = both(dtype)
        kl = {mode: _kl_divergence(e, a) for mode, (e, a) in pairs.items()}
        _check(kl, MAX_KL, f"mean KL divergence in {dtype} is")
    return Verification(dtype, difference, kl, num_layers, versions)


def _check_source(opened: OpenedModel, directory: Path, hf: dict[str, Any]) -> None:
    """Raises a `UserError` if the export, with this config.json, was made of another model."""
    config = opened.config
    sizes = (config.vocab_size, config.hidden_size, config.num_layers, opened.anti_expert.intermediate_size)
    pairs = {name: (hf.get(name), size) for name, size in zip(SIZES, sizes, strict=True)}
    fingerprints = [imae.get("base", {}).get("fingerprint") for imae in (hf.get("imae", {}), opened.imae)]
    if all(map(identity.is_comparable, fingerprints)):
        pairs["base"] = tuple(fingerprints)
    for name, (exported, own) in pairs.items():
        if exported != own:
            raise UserError(
                f"{directory} was exported from another model than {opened.unit_source.location}: its {name} "
                f"is {exported}, not {own}"
            )


def _check(figures: dict[str, float], limit: float, what: str) -> None:
    for mode, figure in figures.items():
        if not figure <= limit:
            raise UserError(
                f"the export does not compute what the model does: in {mode} mode the {what} {figure:.3g}, "
                f"above {limit:.3g}; please report this with the model's name"
            )


def _kl_divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean over positions, in nats, of logits [positions, V]."""
    e, a = (log_softmax(x.astype(np.float64), axis=-1) for x in (expected, actual))
    return float((np.exp(e) * (e - a)).sum(-1).mean())


def _logits_here(
    opened: OpenedModel, dtype: str, compute_dtype: str, tokens: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    @jax.jit
    def run(weights, strength):
        interventions = Interventions(strength=strength)
        output = forward(weights, opened.config, tokens, attention_mask=mask, interventions=interventions)
        return project(weights, output.hidden_states)

    # On the host, whose memory torch uses as well: and only a CPU has float64 in any case.
    with jax.default_device(_host_device()), jax.enable_x64(compute_dtype == "float64"):
        weights = opened.load(dtype=dtype, stacked=True).weights()
        if compute_dtype == "float64":
            weights = jax.tree.map(lambda array: array.astype(jnp.float64), weights)
        return {mode: np.asarray(run(weights, strength or None)) for mode, strength in MODES.items()}


def _host_device() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS may leave it out.
        return None
