"""`python -m imae_jax.evaluate.cost`: memory and time of decoding with any methods, against base.

What Table 2 of Kadotani, Nishida, Nishida (Findings of IJCNLP-AACL 2025) counts: peak memory, and ms per
token while decoding, without the prompt and without compiling. Every method runs in a process of its own at
every batch size, since peaks are of a process. Prompts are random tokens and rows never end early: the cost
of a step does not depend on which tokens it sees.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from imae_jax import targets
from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    at_least,
    command,
    lock_outputs,
    model_arguments,
)
from imae_jax.distributed import is_started_with_others
from imae_jax.errors import UserError
from imae_jax.evaluate.reporting import paper, plots
from imae_jax.evaluate.reporting.document import FinishedRun, Section
from imae_jax.evaluate.reporting.tables import Table, number, show, stack
from imae_jax.evaluate.runner.arguments import parse_methods
from imae_jax.evaluate.runner.directory import MARKDOWN_FILE, RESULTS_FILE, read_fields
from imae_jax.evaluate.runner.identity import command_line
from imae_jax.evaluate.timing import Workload, in_own_process
from imae_jax.files import new_directory

if TYPE_CHECKING:
    from imae_jax.decode import Method
    from imae_jax.evaluate.measurement import Source

PLOT_FILE = "cost.png"
BASE = "base"


def cost_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table a batch size of a `results.json`."""
    tables = []
    columns = ("method", "memory GB", "× base", "weights GB", "ms/token", "× base", "tokens/s", "prefill ms")
    columns += ("first token s", "compile s")
    for batch_size, figures in results["batch_sizes"].items():
        base, rows = figures[BASE], []
        for name, row in figures.items():
            memory, base_memory = row["memory_bytes"], base["memory_bytes"]
            cells = (
                number(memory and memory / 1e9),
                number(memory and base_memory and memory / base_memory),
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


def cost_plot(results: Mapping[str, Any]) -> Any:
    """Memory and ms/token of every method as bars, one colour a batch size: a matplotlib figure."""
    panels = {"memory GB": ("memory_bytes", 1e-9), "ms/token": ("ms_per_token", 1.0)}
    series = {
        label: {
            f"batch {batch_size}": {name: (row[key] or 0) * scale for name, row in figures.items()}
            for batch_size, figures in results["batch_sizes"].items()
        }
        for label, (key, scale) in panels.items()
    }
    return plots.bar_panels(series, f"{results['model']}, {results['dtype']}")


class Cost:
    """What this command writes, in a report."""

    title = "cost"
    note = (
        "Memory: {}. ms/token is the time of a decoding step, without the prompt and without compiling; "
        "× base is against base in the same run and batch size."
    )

    def read(self, path: Path) -> dict[str, Any]:
        return read_fields(path / RESULTS_FILE)

    def report(self, runs: Sequence[FinishedRun], others: Sequence[FinishedRun]) -> list[Section]:
        """Memory and time of decoding beside the paper's."""
        memory = "; ".join(dict.fromkeys(run.results["memory"] for run in runs))
        tables = {}
        for run in runs:
            device = run.results["environment"]["versions"]["device"]
            drawn = ", random weights" if run.results["random_weights"] else ""
            for table in cost_tables(run.results):
                tables[f"{table.title}, {device}{drawn}, run {run.number}"] = table
        pictures = (picture for run in runs for picture in run.pictures())
        blocks = (self.note.format(memory), stack("Measured", tables), *pictures)
        return [Section("Cost of decoding", blocks), paper.cost_section()]


def with_base(methods: "Mapping[str, Method]") -> "dict[str, Method]":
    """Methods by label with `base` first, to which all others are compared."""
    from imae_jax.decode import parse_method

    base = parse_method(BASE)
    if methods.get(BASE, base) != base:
        raise UserError(f"the label {BASE!r} is that of the method {BASE}: choose another")
    return {BASE: base} | {label: method for label, method in methods.items() if label != BASE}


def measure_all(
    source: "Source",
    methods: "Mapping[str, Method]",
    workloads: Sequence[Workload],
    *,
    profile: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measures every method at every batch size, each in a process of its own.

    Args:
        source: source of the model.
        methods: methods by label; see `with_base`.
        workloads: workloads that differ in their batch size alone.
        profile: existing directory for traces, or None.
        quiet: no progress bar.

    Returns:
        What to write as `results.json`: `batch_sizes` has `measure`'s figures by batch size and label.
    """
    from imae_jax.evaluate.measurement import measure

    figures: dict[str, dict[str, Any]] = {str(workload.batch_size): {} for workload in workloads}
    jobs = [(workload, label) for workload in workloads for label in methods]
    for job, (workload, label) in enumerate(tqdm(jobs, unit="method", disable=quiet)):
        # Labels may hold what a file's name cannot.
        slug = f"{job:02d}-batch{workload.batch_size}-" + re.sub(r"[^\w.=-]+", "_", label)[:60]
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
    parser.add_argument("--batch-sizes", default=batch_sizes, help="comma-separated numbers of rows")
    parser.add_argument("--prompt-tokens", type=at_least(1), default=32, help="tokens of every prompt")
    parser.add_argument(
        "--new-tokens", type=at_least(2), default=64, help="tokens to generate for every prompt"
    )
    parser.add_argument("--repeats", type=at_least(1), default=5, help="runs; figures are their medians")


def workloads_of(args: argparse.Namespace) -> list[Workload]:
    """One a batch size, from the arguments of `add_cost_arguments`."""
    sizes = args.batch_sizes.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes) or len(set(map(int, sizes))) < len(sizes):
        raise UserError(f"--batch-sizes {args.batch_sizes}: give different numbers from 1 on, such as 1,8")
    return [Workload(int(size), args.prompt_tokens, args.new_tokens, args.repeats) for size in sizes]


def _print_bounds(args: argparse.Namespace, workloads: Sequence[Workload]) -> None:
    """What `--device` prints."""
    if args.out is not None or args.profile is not None:
        raise UserError("--device prints bounds and writes nothing: leave out --out and --profile")
    target = targets.find(args.device)
    if target.gpu is not None:
        targets.let_in()  # Before JAX is imported.
    from imae_jax.evaluate.bounds import bounds, bounds_table, set_up

    set_up()
    methods = with_base(parse_methods(args.methods))
    for workload in workloads:
        shape = (args.device, 1, args.model, args.dtype)
        rows = {label: bounds(*shape, method, workload) for label, method in methods.items()}
        title = f"{args.model}, batch {workload.batch_size}, one {args.device}: bounds of {target.compiler}"
        show([bounds_table(title, rows)])
    print("Compiled, not run: the time is that of the bytes read at the vendor's bandwidth.")


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
        "icd:anti_expert=adapter, iti:directions=random, steer:vectors=random, cd:amateur=MODEL",
    )
    parser.add_argument(
        "--methods", default=BASE, help="comma-separated methods, or a YAML file; base is always measured"
    )
    add_cost_arguments(parser, batch_sizes="1,8")
    parser.add_argument("--out", help="directory to write; needed without --device")
    parser.add_argument(
        "--device",
        help="run nothing: print what a step holds and reads, by the compiler for one device of a kind: "
        f"{', '.join(targets.TARGETS)}",
    )
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
    if args.device is not None:
        _print_bounds(args, workloads)
        return
    if args.out is None:
        raise UserError("--out is missing: give a directory to write, or --device NAME, which only prints")
    if args.profile is not None:
        # Each replaces what is in its place, and with it the other.
        one, other = Path(args.profile).resolve(), Path(args.out).resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise UserError(f"--profile {args.profile}: choose another directory than OUT, beside it")
    methods = with_base(parse_methods(args.methods))
    from imae_jax.evaluate.measurement import Source

    source = Source(args.model, model_arguments(args), args.random_weights)
    lock_outputs(args.out, args.profile)
    with ExitStack() as stack:
        out, profile = (
            path and stack.enter_context(new_directory(path, marker=RESULTS_FILE, overwrite=args.overwrite))
            for path in (args.out, args.profile)
        )
        figures = measure_all(source, methods, workloads, profile=profile, quiet=args.quiet)
        results = {"command": command_line(parser.prog, argv), **figures}
        tables = cost_tables(results)
        for directory in filter(None, (out, profile)):
            (directory / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")
        note = f"Memory: {results['memory']}.\n"
        (out / MARKDOWN_FILE).write_text("\n".join([*(t.markdown() for t in tables), note]), encoding="utf-8")
        cost_plot(results).savefig(out / PLOT_FILE, dpi=150)
    show(tables)
    print(f"Memory: {results['memory']}.")


if __name__ == "__main__":
    sys.exit(main())
