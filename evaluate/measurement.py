"""Measures decoding with one method, in a process of its own."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imae_jax import runtime
from imae_jax.convert import imae_dir, load_model
from imae_jax.convert.random_model import random_model
from imae_jax.convert.references import Reference
from imae_jax.decode import Method
from imae_jax.decode.loop import GenerationOptions, stream_tokens
from imae_jax.decode.streams import num_prompts
from imae_jax.evaluate.runner.identity import environment
from imae_jax.evaluate.timing import MemoryMeter, Timing, Workload, time_runs
from imae_jax.files import jsonable
from imae_jax.language_model import LanguageModel

MEMORY_PROFILE = "memory.prof"
ON_DEVICE = "peak of the device's allocator; of several devices, of the first"
OF_PROCESS = "bytes of the weights, and what the process's resident memory grows by at most while it decodes"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        reference: reference of the model, as for `load_model`.
        options: keyword arguments of `load_model`.
        random_weights: whether to draw weights of the model's sizes instead of loading them.
    """

    reference: str
    options: Mapping[str, Any]
    random_weights: bool = False


def load_with_units(source: Source) -> LanguageModel:
    """The model; with random weights, one with units."""
    if source.random_weights:
        return _random(source, units=True)
    return load_model(source.reference, **source.options)


def load_base(source: Source) -> LanguageModel:
    """The model without its units, where they are in files of their own: the base of an IMAE directory."""
    parsed = Reference.parse(source.reference)
    if source.random_weights:
        return _random(source, units=False)
    if not parsed.is_imae_dir:
        return load_model(source.reference, **source.options)
    recorded, moved = imae_dir.read_config(parsed.path)["base"], source.options.get("base")
    options = dict(source.options) | {"base": None}
    options["dtype"] = options.get("dtype") or recorded["dtype"]
    options["revision"] = options.get("revision") or (None if moved else recorded["revision"])
    return load_model(moved or recorded["reference"], **options)


def _random(source: Source, *, units: bool) -> LanguageModel:
    dtype, mesh = source.options.get("dtype"), source.options.get("mesh")
    return random_model(source.reference, dtype=dtype, units=units, mesh=mesh)


def measure(
    source: Source, method: Method, workload: Workload, profile: Path | None = None
) -> dict[str, Any]:
    """Decodes greedily with one method; to be called in a fresh process.

    Args:
        source: source of the model.
        method: method, not resolved.
        workload: numbers of rows and tokens to decode.
        profile: directory for a trace of one run and the device's memory at its end.

    Returns:
        `time_runs`'s figures; `memory_bytes`, or None where it cannot be measured; `weight_bytes` of all
        weights that the method needs; `settings` of the method, resolved; `dtype` of the model; `memory`,
        what `memory_bytes` is; `environment`.
    """
    runtime.set_up()
    # Compiled anew, so that `compile_s` is what it says.
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices()[0]
    needs_units = any(stream.strength for stream in method.streams)
    lm = load_with_units(source) if needs_units else load_base(source)
    models, method = lm.prepare(method, generating=True)
    if not needs_units:
        bare = (dataclasses.replace(weights, units=None) for weights in models.weights)
        models = dataclasses.replace(models, weights=tuple(bare))
    config, dtype = lm.config, lm.base.dtype
    del lm
    shape = (workload.batch_size, workload.prompt_tokens)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, shape).tolist()
    other_prompts = [prompts] * (num_prompts(method) - 1)
    chunk_size = min(GenerationOptions.chunk_size, workload.new_tokens - 1)
    options = GenerationOptions(max_new_tokens=workload.new_tokens, chunk_size=chunk_size)
    num_chunks = -(-(workload.new_tokens - 1) // chunk_size)

    def run(at_end: Callable[[], None] = lambda: None) -> Timing:
        start = time.perf_counter()
        stream = stream_tokens(
            models, prompts, method, options, eos_token_ids=(), other_prompts=other_prompts
        )
        with jax.profiler.StepTraceAnnotation("prefill", step_num=0):
            next(stream)
        prefilled = time.perf_counter()
        for chunk in range(1, 1 + num_chunks):
            with jax.profiler.StepTraceAnnotation("decode", step_num=chunk):
                next(stream)
        end = time.perf_counter()
        at_end()
        return Timing(prefilled - start, end - prefilled, num_chunks * chunk_size)

    memory = MemoryMeter()
    figures = time_runs(run, workload.repeats, memory)
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(models.weights))
    figures |= {
        "memory_bytes": memory.peak_bytes(weight_bytes, device),
        "weight_bytes": weight_bytes,
        "settings": jsonable(method.settings()),
        "dtype": dtype,
        "memory": ON_DEVICE if device.memory_stats() else OF_PROCESS,
        "environment": environment(models.mesh),
    }
    if profile is not None:
        profile.mkdir(parents=True)
        profiling = jax.profiler.ProfileOptions()
        profiling.python_tracer_level = 0
        with jax.profiler.trace(profile, profiler_options=profiling):
            run(lambda: jax.profiler.save_device_memory_profile(profile / MEMORY_PROFILE))
    return figures
