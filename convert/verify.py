"""Holds an exported IMAE model in transformers against the model of this library that it was made of."""

import dataclasses
import functools
import importlib
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from imae_jax.anti_expert import MODES
from imae_jax.convert.references import OpenedModel
from imae_jax.errors import UserError
from imae_jax.llama import forward, project

# float32: largest difference of two logits. Half precisions round every activation on both sides, each
# in its own order: mean KL divergence between the two distributions over tokens, in nats.
MAX_DIFFERENCE, MAX_KL = 2e-4, 0.015
# Large models amplify rounding beyond that. Above it, a figure may be this many times the one between two of
# transformers' own attention kernels. On SmolLM2 it is 3, since XLA's matmuls on CPU round 1.6 times as much
# as torch's; a wrong tensor or constant gives hundreds.
ROUNDING_FACTOR = 10
ROWS, TOKENS, PADDING = 2, 48, 5
# Weights are there twice, and as much again passes through while they are read and laid out.
MEMORY_FACTOR = 3


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was measured.

    Attributes:
        dtype: of the exported base.
        difference: by mode, the largest difference of two logits.
        kl: by mode, the mean KL divergence in nats.
        num_layers: the lowest ones, that ran on both sides.
        versions: of torch and transformers.
        rounding: where a limit was exceeded: the largest such figure, over the modes, between two attention
            kernels of transformers.
    """

    dtype: str
    difference: dict[str, float]
    kl: dict[str, float]
    num_layers: int
    versions: dict[str, str]
    rounding: float | None = None

    def summary(self) -> str:
        """One line for people."""
        rounding = "" if self.rounding is None else f"; rounding alone, in transformers: {self.rounding:.1e}"
        return (
            f"verified in transformers {self.versions['transformers']}, {self.dtype}, {self.num_layers} "
            f"layers: logits differ by at most {max(self.difference.values()):.1e}, mean KL divergence at "
            f"most {max(self.kl.values()):.1e} nats{rounding}"
        )


def verify(opened: OpenedModel, directory: Path, dtype: str | None = None) -> Verification | str:
    """Runs random tokens, with padding, through both models in all modes.

    Where memory does not suffice for both, the lowest layers that fit are compared.

    Args:
        opened: what was exported.
        directory: the export.
        dtype: that the base was exported in; default: its own.

    Returns:
        The figures, or why there are none.

    Raises:
        UserError: the two differ.
    """
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    dtype = dtype or opened.base.dtype
    num_layers = _layers_that_fit(opened, directory, dtype)
    if num_layers < 1:
        return "the memory does not suffice for a layer of both models"
    config = dataclasses.replace(opened.config, num_layers=num_layers)
    tokens = np.random.default_rng(0).integers(
        0, config.vocab_size, (ROWS, min(TOKENS, config.max_position_embeddings))
    )
    mask = np.ones(tokens.shape, bool)
    mask[1, :PADDING] = False
    # Here, since without torch it cannot be imported.
    in_transformers = functools.partial(
        importlib.import_module("imae_jax.convert.torch_side.logits").logits_of,
        directory,
        num_layers,
        tokens,
        mask,
        modes=MODES,
    )
    expected = _logits_here(dataclasses.replace(opened, config=config), dtype, tokens, mask)
    actual, versions = in_transformers(attention="sdpa")
    difference, kl = _compare(expected, actual, mask)
    figures, limit = (difference, MAX_DIFFERENCE) if dtype == "float32" else (kl, MAX_KL)
    rounding = None
    if not max(figures.values()) <= limit:
        other, _ = in_transformers(attention="eager")
        rounding = max(_compare(actual, other, mask)[0 if dtype == "float32" else 1].values())
        limit = max(limit, ROUNDING_FACTOR * rounding)
    for mode, figure in figures.items():
        if not figure <= limit:
            kind = "logits differ by" if dtype == "float32" else "KL divergence is"
            raise UserError(
                f"the export does not compute what the model does: in {mode} mode the {kind} {figure:.3g}, "
                f"above {limit:.3g}; please report this with both models' names"
            )
    return Verification(dtype, difference, kl, num_layers, versions, rounding)


def _compare(
    expected: dict[str, np.ndarray], actual: dict[str, np.ndarray], mask: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """By mode, the largest difference of two logits and the mean KL divergence, at real tokens."""
    difference, kl = {}, {}
    for mode in MODES:
        e, a = expected[mode][mask], actual[mode][mask]
        difference[mode] = float(np.abs(e - a).max())
        e, a = _log_softmax(e), _log_softmax(a)
        kl[mode] = float((np.exp(e) * (e - a)).sum(-1).mean())
    return difference, kl


def _layers_that_fit(opened: OpenedModel, directory: Path, dtype: str) -> int:
    sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
    config = opened.config
    outside = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    outside *= jnp.dtype(dtype).itemsize
    of_layer = max(1, (sum(sizes) - outside) // config.num_layers)
    free = available_memory() / MEMORY_FACTOR - outside
    return max(0, min(config.num_layers, int(free // of_layer)))


def available_memory() -> int:
    """Bytes of host memory that this process may still take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            free = min(free, max(0, limit - used))
    except (ImportError, OSError):
        pass
    return free


def _logits_here(
    opened: OpenedModel, dtype: str, tokens: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    def run(weights, strength):
        strength = None if strength == 0 else strength
        output = forward(weights, opened.config, tokens, attention_mask=mask, strength=strength)
        return np.asarray(project(weights, output.hidden_states), np.float32)

    # The host's memory is what was found to suffice, and float32 is a CPU's in full.
    with jax.default_device(_host_device()), jax.default_matmul_precision("highest"):
        weights = opened.load(dtype=dtype).weights()
        return {mode: run(weights, strength) for mode, strength in MODES.items()}


def _host_device() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS may leave it out.
        return None


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
