"""Holds an exported IMAE model in transformers against the model of this library that it was made of."""

import dataclasses
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
from imae_jax.llama import Interventions, forward, project

# Of two logits, in float64. Rounding stays far below: 2.5e-6 on SmolLM2's 30 layers, since RoPE's tables are
# float32. In float32, XLA's sums alone would be 2.4e-4 away from float64 there, and torch's 1.4e-4.
MAX_DIFFERENCE = 2e-4
# Half precisions round every activation on both sides, each in its own order: mean KL divergence between the
# two distributions over tokens, in nats.
MAX_KL = 0.015
ROWS, TOKENS, PADDING = 2, 48, 5
# One side at a time is in memory, in float64 and in the type that it is read in.
BYTES, MEMORY_FACTOR = 8, 2


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was measured.

    Attributes:
        dtype: of the exported base.
        difference: by mode, the largest difference of two logits, computed in float64.
        kl: by mode, the mean KL divergence in nats, computed in `dtype`; None for float32.
        num_layers: the lowest ones, that ran on both sides.
        versions: of torch and transformers.
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


def verify(opened: OpenedModel, directory: Path, dtype: str | None = None) -> Verification | str:
    """Runs random tokens, with padding, through both models in all modes.

    Both compute in float64 with the values that were exported; those of a half precision run in that one,
    too. Where memory does not suffice, the lowest layers that fit are compared.

    Args:
        opened: what was exported.
        directory: the export.
        dtype: that the base was exported in; default: its own.

    Returns:
        The figures, or why there are none.

    Raises:
        UserError: the two differ.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    dtype = dtype or opened.base.dtype
    num_layers = _layers_that_fit(opened, directory, dtype)
    if num_layers < 1:
        return "the memory does not suffice for a layer of both models"
    config = opened.config.lowest_layers(num_layers)
    tokens = np.random.default_rng(0).integers(
        0, config.vocab_size, (ROWS, min(TOKENS, config.max_position_embeddings))
    )
    mask = np.ones(tokens.shape, bool)
    mask[1, :PADDING] = False
    cut = dataclasses.replace(opened, config=config)
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


def _check(figures: dict[str, float], limit: float, what: str) -> None:
    for mode, figure in figures.items():
        if not figure <= limit:
            raise UserError(
                f"the export does not compute what the model does: in {mode} mode the {what} {figure:.3g}, "
                f"above {limit:.3g}; please report this with the model's name (--no-verify: unchecked)"
            )


def _kl_divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean over positions, in nats, of logits [positions, V]."""
    e, a = _log_softmax(expected), _log_softmax(actual)
    return float((np.exp(e) * (e - a)).sum(-1).mean())


def _layers_that_fit(opened: OpenedModel, directory: Path, dtype: str) -> int:
    # The units' float32 counts as if it were the base's dtype, which errs on the safe side.
    widening = BYTES / jnp.dtype(dtype).itemsize
    total = widening * sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    config = opened.config
    outside = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) * BYTES
    of_layer = max(1, (total - outside) / config.num_layers)
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
    opened: OpenedModel, dtype: str, compute_dtype: str, tokens: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    @jax.jit
    def run(weights, strength):
        interventions = Interventions(strength=strength)
        output = forward(weights, opened.config, tokens, attention_mask=mask, interventions=interventions)
        return project(weights, output.hidden_states)

    # The host's memory is what was found to suffice, and only a CPU has float64 in any case.
    with (
        jax.default_device(_host_device()),
        jax.enable_x64(compute_dtype == "float64"),
    ):
        weights = opened.load(dtype=dtype, stacked=True).weights()
        if compute_dtype == "float64":
            weights = jax.tree.map(lambda array: array.astype(jnp.float64), weights)
        return {mode: np.asarray(run(weights, strength or None)) for mode, strength in MODES.items()}


def _host_device() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS may leave it out.
        return None


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
