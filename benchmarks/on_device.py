"""What this library does on the accelerator of this machine, beside what compilers and data sheets say of it.

    python benchmarks/on_device.py --out out/on_device
    python benchmarks/on_device.py --dry-run --out out/dry_run

One device, random weights, nothing is downloaded; minutes on one H200 or v5e. Parts run one after another,
each in a process of its own; where one fails, the others go on. OUT/on_device.json and OUT/table.md have

memory     the peak of the device's allocator over what the compiler says that the same program holds, of a
           chunk of decoding and of the train step: within 5 %
decoding   ms/token of every method, over the bytes that its compiled step reads at the bandwidth of the data
           sheet: not below this bound; and a trace of one chunk, for XProf or Perfetto, in OUT/trace
scoring    answers/s of trees of answers as TruthfulQA has them: seven to a question, behind a primer
training   the step of the units, by `benchmarks/train_step.py`: its model FLOPs utilization (MFU)
attention  flash attention against plain, forward and backward: ms, and the largest difference

A model that the device cannot hold is cut to half of its layers, and again, as its name then says
(`#layers=16`). The exit code is 1 where a part or a check fails. `--dry-run` runs all parts on tiny sizes, on
any device: a CPU has no allocator to ask and no data sheet, so that these checks are left out there.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import train_step
from tqdm import tqdm

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, command, lock_outputs
from imae_jax.compiled import held_bytes
from imae_jax.config import LlamaConfig
from imae_jax.convert.random_model import random_model
from imae_jax.convert.references import Reference, model_config
from imae_jax.decode import Continuation, score
from imae_jax.decode.loop import NEVER, PROMPT_BUCKET, DecodeState, GenerationOptions, compile_programs
from imae_jax.errors import first_line, is_out_of_memory
from imae_jax.evaluate.bounds import step_figures
from imae_jax.evaluate.reporting.tables import DASH, Table, number, show
from imae_jax.evaluate.runner.identity import command_line, environment
from imae_jax.evaluate.timing import MemoryMeter, Timing, in_own_process, time_runs
from imae_jax.files import dumps, new_directory
from imae_jax.flash_attention import flash_attention
from imae_jax.language_model import LanguageModel
from imae_jax.targets import of_kind

RESULTS_FILE, TABLE_FILE, TRACE = "on_device.json", "table.md", "trace"
GIB = 2**30
# Of memory, relative; of times below their bound, since instructions may find in caches what they read.
MEMORY_TOLERANCE, BOUND_TOLERANCE = 0.05, 0.1
# Of the largest difference to the largest value. bfloat16 has 8 bits, and both kernels round more than once.
ATTENTION_TOLERANCE = 0.02
DTYPE = "bfloat16"
PLAIN_METHODS = ("base", "icd:anti_expert=adapter", "dola", "sled:scale=10")
UNIT_METHODS = ("expert", "in-model-contrast")
SCORED_METHODS = ("base", "sled:scale=10")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        batch_sizes: rows that are decoded at once.
        new_tokens: of every row that is decoded, one more than chunks of 32.
        repeats: timed runs of everything.
        questions, primer_tokens: of scoring.
        rows, row_tokens: of a train step.
        attention: rows and tokens of attention alone.
    """

    batch_sizes: tuple[int, ...] = (1, 16)
    new_tokens: int = 97
    repeats: int = 3
    questions: int = 128
    primer_tokens: int = 256
    rows: int = 24
    row_tokens: int = 256
    attention: tuple[int, int] = (2, 2048)


DRY = Sizes((1, 2), 9, 1, 3, 8, 4, 16, (1, 128))
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4}
TINY |= {"num_kv_heads": 2, "head_dim": 16}


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        what: what is measured.
        measured: the figure; None where this device does not tell.
        unit: its unit.
        beside: what it is held against, in the same unit; None for nothing.
        source: where `beside` comes from.
        passed: whether a check passed; None where nothing is checked.
    """

    what: str
    measured: float | None
    unit: str
    beside: float | None = None
    source: str = ""
    passed: bool | None = None

    def cells(self) -> tuple[str, ...]:
        ratio = self.measured and self.beside and self.measured / self.beside
        verdict = {None: "", True: "ok", False: "FAILS"}[self.passed]
        numbers = (number(self.measured, 3), self.unit, number(self.beside, 3), self.source)
        return (self.what, *numbers, number(ratio, 3), verdict)


def memory_row(what: str, peak: int | None, held: int) -> Row:
    passed = None if peak is None else abs(peak / held - 1) <= MEMORY_TOLERANCE
    return Row(f"memory, {what}", peak and peak / GIB, "GiB", held / GIB, "compiler", passed)


def peak_bytes(device: Any) -> int | None:
    """The peak of the device's allocator in this process; None where it does not tell."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


Result = tuple[list[Row], dict[str, Any]]
"""What a part gives: its rows, and further figures for the JSON file."""


class Decoder:
    """Greedy decoding with a method, for a number of rows; their prompts are one bucket of random tokens."""

    def __init__(self, lm: LanguageModel, name: str, batch_size: int, new_tokens: int):
        self.label = f"{name}, batch {batch_size}"
        self.models, self.method = lm.prepare(name, generating=True)
        shape = (batch_size, PROMPT_BUCKET)
        tokens = np.random.default_rng(0).integers(0, lm.config.vocab_size, shape)
        self.eos = np.full(1, -1, np.int32)
        tokens, mask = tokens[None].astype(np.int32), np.ones((1, *shape), bool)
        self.inputs = (tokens, mask, self.eos, np.int32(0))
        self.new_tokens = new_tokens
        self.num_chunks = -(-(new_tokens - 1) // GenerationOptions.chunk_size)

    def compile(self) -> None:
        shape = self.inputs[0].shape[1:]
        self.programs = compile_programs(self.models, self.method, *shape, self.new_tokens)

    def prefill(self) -> DecodeState:
        return jax.block_until_ready(self.programs.prefill(self.models, *self.inputs))

    def chunk(self, state: DecodeState) -> DecodeState:
        return jax.block_until_ready(self.programs.chunk(self.models, state, self.eos))[0]

    def run(self) -> Timing:
        """Decodes all tokens; what is computed must be finite."""
        start = time.perf_counter()
        state = self.prefill()
        prefilled = time.perf_counter()
        for _ in range(self.num_chunks):
            state = self.chunk(state)
        decoded = time.perf_counter()
        if (np.asarray(state.not_finite) != NEVER).any():
            raise FloatingPointError(f"{self.label}: logits or scores are not finite")
        return Timing(prefilled - start, decoded - prefilled, self.new_tokens - 1)


def decode(model: str, sizes: Sizes, methods: Sequence[str], units: bool, trace: Path | None) -> Result:
    """Times methods at all batch sizes.

    Args:
        model: reference of the sizes.
        methods: of the first one memory is checked, where there are no units, whose originals take more.
        units: whether the model has units.
        trace: directory for a trace of the last chunk; None for none.
    """
    device, lm = jax.devices()[0], random_model(model, dtype=DTYPE, units=units)
    target, rows, figures = of_kind(device.device_kind), [], {}

    def measure(decoder: Decoder) -> None:
        timed = time_runs(decoder.run, sizes.repeats, MemoryMeter())
        step = step_figures(decoder.programs.chunk, target)
        ms, bound = timed["ms_per_token"], step["bound_ms"]
        passed = None if bound is None else ms >= (1 - BOUND_TOLERANCE) * bound
        rows.append(Row(decoder.label, ms, "ms/token", bound, "bytes read / bandwidth", passed))
        figures[decoder.label] = timed | step

    # The first has the allocator's peak for itself: nothing else is drawn or compiled yet.
    cases = [(name, size) for size in sorted(sizes.batch_sizes, reverse=True) for name in methods]
    first = Decoder(lm, *cases[0], sizes.new_tokens)
    first.compile()
    measure(first)
    if not units:
        held = max(held_bytes(first.programs.prefill), held_bytes(first.programs.chunk))
        rows.append(memory_row(f"prefill and chunk of {first.label}", peak_bytes(device), held))
    others = [Decoder(lm, *case, sizes.new_tokens) for case in cases[1:]]
    with ThreadPoolExecutor() as pool:
        list(pool.map(Decoder.compile, others))
    for decoder in others:
        measure(decoder)
    if trace is not None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        state = first.prefill()
        with jax.profiler.trace(trace, profiler_options=options):
            first.chunk(state)
        files = len(list(trace.rglob("*.xplane.pb")))
        rows.append(Row(f"trace of a chunk of {first.label}", files, "files", passed=files > 0))
    return rows, figures


def score_answers(model: str, sizes: Sizes) -> Result:
    """Times the scorer on seven answers a question, of which some begin alike."""
    lm, random = random_model(model, dtype=DTYPE, units=False), np.random.default_rng(0)

    def words(number: int) -> tuple[int, ...]:
        return tuple(random.integers(0, lm.config.vocab_size, number).tolist())

    primer, groups = words(sizes.primer_tokens), []
    for _ in range(sizes.questions):
        prompt, beginning = primer + words(20), words(2)
        answers = [(beginning if i % 2 else ()) + words(int(random.integers(4, 16))) for i in range(7)]
        groups.append([Continuation(prompt + answer, len(prompt)) for answer in answers])
    rows, figures = [], {}
    for name in SCORED_METHODS:
        models, method = lm.prepare(name, generating=False)

        def run(models: Any = models, method: Any = method) -> None:
            list(score(models, lm.config, groups, method))

        run()  # compiles
        figures[name] = train_step.timed(run, sizes.repeats)
        answers_per_s = 1e3 * sum(map(len, groups)) / figures[name]["ms_per_step"]
        rows.append(Row(f"{name}, {sizes.questions} questions", answers_per_s, "answers/s"))
    return rows, figures


def train(model: str, sizes: Sizes) -> Result:
    """Times the step of objective `paper` and checks its memory; see `benchmarks/train_step.py`."""
    settings = {"shapes": model, "objective": "paper", "dtype": DTYPE, "unit_size": None, "no_peer": True}
    settings |= {"batch_size": sizes.rows, "length": sizes.row_tokens, "facts": sizes.row_tokens // 4}
    settings |= {"remat": "dots", "attention": "plain", "accumulation": 1, "repeats": sizes.repeats}
    with tempfile.TemporaryDirectory() as directory:
        args = argparse.Namespace(**settings, peak_tflops=None, exchange=Path(directory))
        described = train_step.prepare_model(args)
        (args.exchange / "model.json").write_text(json.dumps(described))
        figures = described | train_step.measure_jax(args)
    ms, peak = figures["ms_per_step"], figures["peak_tflops"]
    mfu = peak and 100 * described["flops"] / (ms / 1e3) / (peak * 1e12)
    label = f"step of {sizes.rows} × {sizes.row_tokens} tokens"
    rows = [
        Row(label, ms, "ms"),
        Row("MFU", mfu, "%", 100, figures["peak_source"], mfu and mfu <= 100),
        Row("loss", figures["loss"], "", passed=math.isfinite(figures["loss"])),
        memory_row(label, figures["device_peak_bytes"], figures["held_bytes"]),
    ]
    return rows, figures


def attend(model: str, sizes: Sizes) -> Result:
    """Times flash and plain attention, forward and backward, and compares what they give."""
    (B, T), config = sizes.attention, model_config(model)[0]
    queries = (B, T, config.num_heads, config.head_dim)
    keys = (B, config.num_kv_heads, T, config.head_dim)
    shapes = (queries, keys, keys, queries)  # q, k, v and the gradient of the result
    drawn = [jax.random.normal(jax.random.key(i), shape, DTYPE) for i, shape in enumerate(shapes)]
    # A CPU has no kernel of its own: the TPU's, interpreted.
    interpreted = {"platform": "tpu", "interpret": True} if jax.default_backend() == "cpu" else {}

    def both_ways(**options: Any) -> Callable[[], Any]:
        def run(q, k, v, gradient):
            out, backward = jax.vjp(functools.partial(flash_attention, **options), q, k, v)
            return out, *backward(gradient)

        compiled = jax.jit(run)
        return lambda: jax.block_until_ready(compiled(*drawn))

    flash, plain = both_ways(**interpreted), both_ways(platform="cpu")
    results = [[np.asarray(x.astype(jnp.float32)) for x in run()] for run in (flash, plain)]
    differences = {
        name: float(np.abs(one - other).max() / np.abs(other).max())
        for name, one, other in zip(("out", "dq", "dk", "dv"), *results, strict=True)
    }
    runs = {"flash": flash, "plain": plain}
    times = {name: train_step.timed(run, 3 * sizes.repeats) for name, run in runs.items()}
    ms, plain_ms = (figures["ms_per_step"] for figures in times.values())
    worst = max(differences.values())
    passed = worst <= ATTENTION_TOLERANCE
    rows = [
        Row(f"flash, {B} × {T} tokens, both ways", ms, "ms", plain_ms, "plain attention"),
        Row("largest difference / value", worst, "", ATTENTION_TOLERANCE, "at most", passed),
    ]
    return rows, times | {"differences": differences}


def in_child(part: Callable[..., Result], *arguments: Any) -> dict[str, Any]:
    """What a part gives, with the environment that only a process with the device can tell."""
    runtime.set_up()
    # A program from the cache does not know its memory.
    jax.config.update("jax_enable_compilation_cache", False)
    rows, figures = part(*arguments)
    return {"rows": rows, "figures": figures, "environment": environment()}


def run_part(part: Callable[..., Result], model: str, *arguments: Any) -> dict[str, Any]:
    """Runs a part in a process of its own, with half of the layers until the device can hold it.

    An error is a row that fails.
    """
    began, reference = time.perf_counter(), Reference.parse(model).name
    layers = model_config(model)[0].num_layers
    while True:
        try:
            result = in_own_process(in_child, part, model, *arguments)
        except Exception as error:  # Whatever it is, the other parts go on.
            if is_out_of_memory(error) and layers > 1:
                layers //= 2
                model = f"{reference}#layers={layers}"
                continue
            told = "".join(traceback.format_exception(error))
            result = {"rows": [Row(f"error: {first_line(error)}", None, "", passed=False)], "error": told}
        return {"model": model, "seconds": time.perf_counter() - began} | result


def table_of(parts: dict[str, dict[str, Any]], title: str) -> Table:
    columns = ("", "measured", "unit", "beside", "source", "ratio", "check")
    rows: list[tuple[str, ...]] = []
    for name, part in parts.items():
        rows.append((f"{name}: {part['model']}, {part['seconds']:.0f} s",))
        rows += (row.cells() for row in part["rows"])
    return Table(title, columns, tuple(rows))


def write(out: Path, command: str, sizes: Sizes, parts: dict[str, dict[str, Any]]) -> bool:
    """Writes and shows the results.

    Returns:
        Whether everything ran and all checks passed.
    """
    found = [part.pop("environment") for part in parts.values() if "environment" in part]
    versions = found[0]["versions"] if found else {"device": "no device", "jax": DASH}
    table = table_of(parts, f"{versions['device']}, {DTYPE}, random weights, jax {versions['jax']}")
    passed = all(row.passed is not False for part in parts.values() for row in part["rows"])
    written = {name: part | {"rows": [vars(row) for row in part["rows"]]} for name, part in parts.items()}
    results = {"command": command, "passed": passed, "sizes": vars(sizes)}
    results |= {"environment": found[0] if found else None, "parts": written}
    (out / RESULTS_FILE).write_text(dumps(results, indent=2) + "\n", encoding="utf-8")
    (out / TABLE_FILE).write_text(table.markdown(), encoding="utf-8")
    show([table])
    return passed


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python benchmarks/on_device.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="meta-llama/Llama-2-7b-chat-hf", help="whose sizes the random weights have"
    )
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on any device, in a minute")
    args = parser.parse_args(argv)
    lock_outputs(args.out)
    # Each part has the device to itself; JAX would leave a quarter of a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    with (
        tempfile.TemporaryDirectory() as tiny,
        new_directory(args.out, marker=RESULTS_FILE, overwrite=args.overwrite) as out,
    ):
        model, sizes = args.model, Sizes()
        if args.dry_run:
            (Path(tiny) / "config.json").write_text(json.dumps(LlamaConfig(**TINY).to_hf()))
            model, sizes = tiny, DRY
        model_config(model)  # An unknown one is the user's mistake.
        jobs = {
            "decoding": (decode, model, sizes, PLAIN_METHODS, False, out / TRACE),
            "decoding with units": (decode, model, sizes, UNIT_METHODS, True, None),
            "scoring": (score_answers, model, sizes),
            "training": (train, model, sizes),
            "attention": (attend, model, sizes),
        }
        progress = tqdm(jobs.items(), unit="part", disable=args.quiet)
        parts = {name: run_part(*job) for name, job in progress}
        passed = write(out, command_line(parser.prog, argv), sizes, parts)
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
