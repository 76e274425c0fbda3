"""`python -m imae_jax.evaluate.cost`: memory and time of decoding with any methods, against base.

What Table 2 of Kadotani, Nishida, Nishida (Findings of IJCNLP-AACL 2025) counts: peak memory, and ms per
token while decoding, without the prompt and without compiling. Every method runs in a process of its own at
every batch size, since peaks are of a process. Prompts are random tokens and rows never end early: the cost
of a step does not depend on which tokens it sees.
"""

import ctypes
import dataclasses
import functools
import gc
import json
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, add_model_arguments, command, lock_outputs, model_arguments
from imae_jax.distributed import is_started_with_others
from imae_jax.errors import UserError
from imae_jax.evaluate.reporting.tables import Table, number, show
from imae_jax.evaluate.runner.arguments import parse_methods
from imae_jax.evaluate.runner.directory import MARKDOWN_FILE, RESULTS_FILE
from imae_jax.evaluate.runner.identity import called, environment
from imae_jax.files import jsonable, new_directory

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from imae_jax.decode import Method
    from imae_jax.language_model import LanguageModel, LoadedResource

PLOT_FILE = "cost.png"
MEMORY_PROFILE = "memory.prof"
BASE = "base"
# What `--random-weights` draws where a method names a trained adapter of the model.
RANDOM_ADAPTER = "adapter"
ON_DEVICE = "peak of the device's allocator; of several devices, of the first"
OF_PROCESS = "bytes of the weights, and what the process's resident memory grows by at most while it decodes"


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is decoded.

    Attributes:
        batch_size: rows.
        prompt_tokens: of every row.
        new_tokens: of every row; the first comes from the prefill.
        repeats: runs after the first one, which compiles.
    """

    batch_size: int = 1
    prompt_tokens: int = 32
    new_tokens: int = 64
    repeats: int = 5

    def __post_init__(self):
        least = {"batch_size": 1, "prompt_tokens": 1, "new_tokens": 2, "repeats": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise UserError(f"{name} {getattr(self, name)}: give at least {limit}")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        reference: as of `load_model`.
        options: keyword arguments of `load_model`.
        random_weights: draw weights of the model's sizes instead of loading them.
    """

    reference: str
    options: Mapping[str, Any]
    random_weights: bool = False

    def load(self, *, units: bool) -> "LanguageModel":
        """The model; `units=False` loads the base of an IMAE directory alone."""
        from imae_jax.convert import imae_dir, load_model
        from imae_jax.convert.references import local_path

        directory, options = local_path(self.reference), dict(self.options)
        loads_units = units or not (self.random_weights or imae_dir.is_imae_dir(directory))
        if self.random_weights:
            mesh = options.get("mesh")
            return random_model(self.reference, dtype=options["dtype"], units=units, mesh=mesh)
        if loads_units:
            return load_model(self.reference, **options)
        recorded, moved = imae_dir.read_config(directory)["base"], options.pop("base")
        options["dtype"] = options["dtype"] or recorded["dtype"]
        options["revision"] = options["revision"] or (None if moved else recorded["revision"])
        return load_model(moved or recorded["reference"], **options)


@dataclasses.dataclass(frozen=True)
class Timing:
    """One run, in seconds: the prefill with the first token, and `steps` decoding steps after it."""

    prefill: float
    decode: float
    steps: int

    @property
    def total(self) -> float:
        return self.prefill + self.decode


class MemoryMeter:
    """Peak memory while decoding: of the accelerator's allocator, or of this process.

    A process also holds libraries, compiled programs and what loading left behind, all of which depend on the
    file's format more than on the method. So it counts the weights by their bytes, and what resident memory
    grows by at most while it decodes: caches and temporaries.
    """

    def __init__(self):
        self._before: int | None = None

    def start(self) -> None:
        """To be called when all is loaded and compiled, and nothing is decoding."""
        # Garbage, and freed memory that the C library keeps, would be filled before the process grows.
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._before = _resident_bytes("VmRSS")

    def peak_bytes(self, weight_bytes: int, device: Any = None) -> int | None:
        """With the weights; None where the system does not tell.

        Args:
            weight_bytes: of all weights in memory.
            device: a JAX device, whose own statistics are taken where it has them.
        """
        statistics_of_device = device and device.memory_stats()
        if statistics_of_device:
            return statistics_of_device["peak_bytes_in_use"]
        peak = _resident_bytes("VmHWM")
        return None if self._before is None or peak is None else weight_bytes + max(0, peak - self._before)


def _resident_bytes(field: str) -> int | None:
    """`VmRSS` (now) or `VmHWM` (the peak), on Linux."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(re.search(rf"^{field}:\s*(\d+)", status, re.MULTILINE)[1])


def time_runs(run: Callable[[], Timing], repeats: int, memory: MemoryMeter) -> dict[str, Any]:
    """Figures of a run that is repeated; the first time, which compiles, counts apart.

    Returns:
        `ms_per_token`, a step's time, `prefill_ms`, medians; `first_token_s` and `compile_s` of the first
        run; `cores`, how many CPU cores were busy; `times_ms`, a step's in every run.
    """
    first = run()
    memory.start()
    cpu = time.process_time()
    timings = [run() for _ in range(repeats)]
    cpu = time.process_time() - cpu
    per_step = [1e3 * timing.decode / timing.steps for timing in timings]
    totals = [timing.total for timing in timings]
    return {
        "ms_per_token": statistics.median(per_step),
        "prefill_ms": 1e3 * statistics.median(timing.prefill for timing in timings),
        "first_token_s": first.prefill,
        "compile_s": max(0.0, first.total - statistics.median(totals)),
        "cores": cpu / sum(totals),
        "times_ms": per_step,
    }


def measure(
    source: Source, method: "Method", workload: Workload, profile: Path | None = None
) -> dict[str, Any]:
    """Decodes greedily with one method; to be called in a fresh process.

    Args:
        source: of the model.
        method: not resolved.
        workload: what to decode.
        profile: a directory for a trace of one run and the device's memory at its end.

    Returns:
        `time_runs`'s figures; `memory_bytes`, or None where it cannot be measured; `weight_bytes` of all
        weights that the method needs; `settings` of the method, resolved; `dtype` of the model; `memory`,
        what `memory_bytes` is; `environment`.
    """
    runtime.set_up()
    import jax
    import numpy as np

    # Imported before the meter is made: libraries do not count.
    from imae_jax.decode.loop import GenerationOptions, stream_tokens

    # Compiled anew, so that `compile_s` is what it says.
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices()[0]
    needs_units = any(stream.strength for stream in method.streams)
    lm = source.load(units=needs_units)
    models, method = lm.prepare(method, generating=True)
    if not needs_units:
        bare = (dataclasses.replace(weights, units=None) for weights in models.weights)
        models = dataclasses.replace(models, weights=tuple(bare))
    config, dtype = lm.config, lm.base.dtype
    del lm
    shape = (workload.batch_size, workload.prompt_tokens)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, shape).tolist()
    chunk_size = min(GenerationOptions.chunk_size, workload.new_tokens - 1)
    options = GenerationOptions(max_new_tokens=workload.new_tokens, chunk_size=chunk_size)
    num_chunks = -(-(workload.new_tokens - 1) // chunk_size)

    def run(at_end: Callable[[], None] = lambda: None) -> Timing:
        start = time.perf_counter()
        stream = stream_tokens(models, prompts, method, options, eos_token_ids=())
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
        tracing = jax.profiler.ProfileOptions()
        tracing.python_tracer_level = 0
        with jax.profiler.trace(profile, profiler_options=tracing):
            run(lambda: jax.profiler.save_device_memory_profile(profile / MEMORY_PROFILE))
    return figures


def random_model(
    reference: str,
    *,
    dtype: str | None,
    units: bool,
    mesh: "Mesh | str | None" = None,
) -> "LanguageModel":
    """A model with random weights of another's sizes, without a tokenizer.

    What methods name besides is drawn, too: any directions, `adapter` for a LoRA adapter of rank 16, and a
    model of any reference's sizes.

    Args:
        reference: as of `convert.references.model_config`; published sizes need no network.
        dtype: of the base; default: the checkpoint's own.
        units: with anti-expert units of the paper's ratio.
        mesh: as of `load_model`.
    """
    from flax import nnx

    from imae_jax.config import AntiExpertConfig
    from imae_jax.convert.references import DTYPES, model_config
    from imae_jax.language_model import BaseReference, LanguageModel
    from imae_jax.llama import Llama
    from imae_jax.sharding import check_divisible, model_mesh

    config, own_dtype = model_config(reference)
    dtype = dtype or own_dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} does not exist: use one of {', '.join(DTYPES)}")
    anti_expert = AntiExpertConfig.scaled_to(config) if units else None
    mesh = model_mesh(mesh, config, anti_expert)
    if mesh is not None:
        check_divisible(config, anti_expert, mesh.shape)
    model = _drawn(
        lambda: Llama(config, anti_expert, rngs=nnx.Rngs(0), stacked=False, dtype=DTYPES[dtype]), mesh
    )
    base = BaseReference(reference, None, "random weights", dtype)
    return LanguageModel(model, None, (), base, load_resource=_random_resource)


def _drawn(declare: Callable[[], Any], mesh: "Mesh | None") -> Any:
    """A module with random weights, each drawn straight into its shards."""
    import jax
    from flax import nnx

    from imae_jax.sharding import shardings_of

    if mesh is None:
        return declare()
    graphdef, abstract = nnx.split(nnx.eval_shape(declare))
    draw = jax.jit(lambda: nnx.split(declare())[1], out_shardings=shardings_of(abstract, mesh))
    return nnx.merge(graphdef, draw())


def _random_resource(lm: "LanguageModel", resource: Any) -> "LoadedResource":
    import jax
    from flax import nnx

    from imae_jax import layer_stack
    from imae_jax.config import LoraConfig
    from imae_jax.language_model import LoadedResource
    from imae_jax.lora import LoraDeltas

    config = lm.config
    if resource.kind == "directions":
        shape = (config.num_layers, config.num_heads, config.head_dim)
        shifts = tuple(jax.random.normal(jax.random.key(0), shape))
        return LoadedResource(weights=lambda method: {"shifts": shifts})
    if resource.kind == "anti_expert_llm" and resource.reference == RANDOM_ADAPTER:
        lora = LoraConfig()
        rngs = nnx.Rngs(0)
        declare = functools.partial(LoraDeltas, config, lora, rngs=rngs)
        module = _drawn(
            lambda: layer_stack.declare(lambda n: declare(stack=n), config.num_layers, stacked=False), lm.mesh
        )
        deltas = layer_stack.arrays(module)
        return LoadedResource(weights=lambda method: {"lora": deltas, "lora_scale": lora.scale})
    second = random_model(resource.reference, dtype=lm.base.dtype, units=False, mesh=lm.mesh)
    if second.config.vocab_size != config.vocab_size:
        raise UserError(f"it has another vocabulary than {lm.base.reference}, and both need the same")
    return LoadedResource(second=second)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process; its errors are raised here."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process ended without a result, for lack of memory perhaps: try a smaller model, dtype "
                "or batch"
            ) from error


def cost_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table a batch size of a `results.json`."""
    tables = []
    columns = ("method", "memory GB", "× base", "weights GB", "ms/token", "× base", "tokens/s", "prefill ms")
    columns += ("first token s", "compile s")
    for batch_size, figures in results["batch_sizes"].items():
        base, rows = figures[BASE], []
        for name, row in figures.items():
            memory, of_base = row["memory_bytes"], base["memory_bytes"]
            cells = (
                number(memory and memory / 1e9),
                number(memory and of_base and memory / of_base),
                number(row["weight_bytes"] / 1e9),
                number(row["ms_per_token"]),
                number(row["ms_per_token"] / base["ms_per_token"]),
                number(1e3 * int(batch_size) / row["ms_per_token"], 1),
                number(row["prefill_ms"], 1),
                number(row["first_token_s"]),
                number(row["compile_s"]),
            )
            rows.append((name, *cells))
        workload = results["workload"]
        title = (
            f"{results['model']}, {results['dtype']}, batch {batch_size}, {workload['prompt_tokens']} + "
            f"{workload['new_tokens']} tokens"
        )
        tables.append(Table(title, columns, tuple(rows)))
    return tables


def cost_plot(results: Mapping[str, Any], path: Path) -> None:
    """Memory and ms/token of every method as bars, one colour a batch size."""
    panels = {"memory GB": ("memory_bytes", 1e-9), "ms/token": ("ms_per_token", 1.0)}
    series = {
        label: {
            f"batch {batch_size}": {name: (row[key] or 0) * scale for name, row in figures.items()}
            for batch_size, figures in results["batch_sizes"].items()
        }
        for label, (key, scale) in panels.items()
    }
    bar_plot(series, f"{results['model']}, {results['dtype']}", path)


def bar_plot(panels: Mapping[str, Mapping[str, Mapping[str, float]]], title: str, path: Path) -> None:
    """Horizontal bars: a panel for each quantity, a colour for each series, a row for each name.

    Args:
        panels: by label of the x axis, by series, by name.
        title: of the figure.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    series = next(iter(panels.values()))
    names = list(next(iter(series.values())))
    height = 1.2 + 0.3 * len(names) * max(len(series), 1.3)
    figure = Figure(figsize=(1.5 + 4.5 * len(panels), height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    width = 0.8 / len(series)
    for axes, (label, of_panel) in zip(all_axes, panels.items(), strict=True):
        for place, (of_series, values) in enumerate(of_panel.items()):
            offset = (place - (len(series) - 1) / 2) * width
            bars = axes.barh(
                [row + offset for row in range(len(names))],
                [values[name] for name in names],
                width,
                label=of_series,
            )
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_yticks(range(len(names)), names)
    all_axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    if len(series) > 1:
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def parse_batch_sizes(text: str) -> list[int]:
    """`1,8` as numbers."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"batch sizes {text!r}: give numbers like 1,8") from error
    if len(set(sizes)) < len(sizes):
        raise UserError(f"batch sizes {text!r}: each counts once")
    return sizes


def with_base(methods: "Mapping[str, Method]") -> "dict[str, Method]":
    """Methods by label with `base` first, to which all others are compared."""
    from imae_jax.decode import parse_method

    base = parse_method(BASE)
    if methods.get(BASE, base) != base:
        raise UserError(f"the label {BASE!r} is that of the method {BASE}: choose another")
    return {BASE: base} | {label: method for label, method in methods.items() if label != BASE}


def measure_all(
    source: Source,
    methods: "Mapping[str, Method]",
    workloads: Sequence[Workload],
    *,
    profile: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measures every method at every batch size, each in a process of its own.

    Args:
        source: of the model.
        methods: by label; see `with_base`.
        workloads: which differ in their batch size alone.
        profile: an existing directory for traces, or None.
        quiet: no progress bar.

    Returns:
        What to write as `results.json`: `batch_sizes` has `measure`'s figures by batch size and label.
    """
    from tqdm import tqdm

    figures: dict[str, dict[str, Any]] = {str(workload.batch_size): {} for workload in workloads}
    jobs = [(workload, label) for workload in workloads for label in methods]
    for place, (workload, label) in enumerate(tqdm(jobs, unit="method", disable=quiet)):
        # Labels may hold what a file's name cannot.
        slug = f"{place:02d}-batch{workload.batch_size}-" + re.sub(r"[^\w.=-]+", "_", label)[:60]
        traces = None if profile is None else profile / slug
        row = in_own_process(measure, source, methods[label], workload, traces)
        row |= {} if profile is None else {"profile": slug}
        common = {key: row.pop(key) for key in ("dtype", "memory", "environment")}
        figures[str(workload.batch_size)][label] = row
    settings = dataclasses.asdict(workloads[0])
    del settings["batch_size"]
    return {
        "model": source.reference,
        "random_weights": source.random_weights,
        "workload": settings,
        **common,
        "batch_sizes": figures,
    }


def add_cost_arguments(parser: ArgumentParser, *, batch_sizes: str) -> None:
    """What measurements of decoding share."""
    parser.add_argument("--batch-sizes", default=batch_sizes, help="with commas between them")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of every row")
    parser.add_argument("--new-tokens", type=int, default=64, help="of every row")
    parser.add_argument("--repeats", type=int, default=5, help="runs; figures are medians")


def workloads_of(args: Any) -> list[Workload]:
    """One a batch size, from the arguments of `add_cost_arguments`."""
    sizes = parse_batch_sizes(args.batch_sizes)
    return [Workload(size, args.prompt_tokens, args.new_tokens, args.repeats) for size in sizes]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.cost",
        description="Memory and time of decoding, absolute and against base: writes OUT/results.json, "
        "OUT/table.md and OUT/cost.png.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="draw weights of the model's sizes instead of loading them, and what methods name besides: "
        f"icd:anti_expert={RANDOM_ADAPTER}, iti:directions=random, cd:amateur=MODEL",
    )
    parser.add_argument(
        "--methods", default=BASE, help="comma-separated methods, or a YAML file; base is always measured"
    )
    add_cost_arguments(parser, batch_sizes="1,8")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument(
        "--profile", metavar="DIR", help="also trace a run of each method, for XProf or Perfetto"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT and DIR")
    args = parser.parse_args(argv)
    if is_started_with_others():
        raise UserError(
            "evaluate.cost measures in processes of its own, on the devices of one machine: start it once, "
            "outside of a step of several tasks and without JAX_COORDINATOR_ADDRESS"
        )

    workloads = workloads_of(args)
    if args.profile is not None:
        # Each replaces what is in its place, and with it the other.
        one, other = Path(args.profile).resolve(), Path(args.out).resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise UserError(f"--profile {args.profile}: choose another directory than OUT, beside it")
    methods = with_base(parse_methods(args.methods))
    source = Source(args.model, model_arguments(args), args.random_weights)
    lock_outputs(args.out, args.profile)
    with ExitStack() as stack:
        out, profile = (
            path and stack.enter_context(new_directory(path, marker=RESULTS_FILE, overwrite=args.overwrite))
            for path in (args.out, args.profile)
        )
        figures = measure_all(source, methods, workloads, profile=profile, quiet=args.quiet)
        results = {"command": called(parser.prog, argv), **figures}
        tables = cost_tables(results)
        for directory in filter(None, (out, profile)):
            (directory / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")
        note = f"Memory: {results['memory']}.\n"
        (out / MARKDOWN_FILE).write_text("\n".join([*(t.markdown() for t in tables), note]), encoding="utf-8")
        cost_plot(results, out / PLOT_FILE)
    show(tables)
    print(f"Memory: {results['memory']}.")


if __name__ == "__main__":
    sys.exit(main())
