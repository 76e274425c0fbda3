"""`python -m imae_jax.evaluate.compare RUN_A RUN_B`: two runs on the items that both have."""

import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imae_jax import stats
from imae_jax.cli import ArgumentParser, at_least, command, lock_outputs
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks import benchmark_named
from imae_jax.evaluate.reporting import plots
from imae_jax.evaluate.reporting.aggregate import comparison_table, sums_of, values_of
from imae_jax.evaluate.reporting.document import FinishedRun, Section
from imae_jax.evaluate.reporting.tables import Table, show
from imae_jax.evaluate.runner.directory import (
    MARKDOWN_FILE,
    markdown,
    read_fields,
    read_records,
    read_run,
    write_plots,
)
from imae_jax.evaluate.runner.identity import command_line, differences, environment
from imae_jax.files import dumps, new_directory

logger = logging.getLogger(__name__)

COMPARISON_FILE = "comparison.json"
# What must be equal for items to mean the same.
MUST_AGREE = ("protocol", "data.sha256", "length.ratio", "generation.max_new_tokens")


def compare_runs(
    path_a: Path,
    path_b: Path,
    pairs: Sequence[Sequence[str]] | None = None,
    *,
    anyway: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Differences B − A of pairs of methods, item by item, on every subset of the benchmark's items.

    An item is in a subset if it is so in both runs, whose tokenizers may differ.

    Args:
        path_a, path_b: directories of finished runs.
        pairs: methods of A and of B; default: all that both have.
        anyway: compare runs of different protocols or data, on the questions that both have.
        seed: seed of the bootstrap.

    Raises:
        UserError: the runs do not go together, or have no item in common.
    """
    a, b = read_run(path_a), read_run(path_b)
    benchmark = benchmark_named(a["benchmark"])
    if a["benchmark"] != b["benchmark"] or benchmark is None or not benchmark.heads:
        raise UserError(f"{path_a} is of {a['benchmark']}, {path_b} of {b['benchmark']}: nothing to compare")
    differing = [d for d in differences(a, b) if d[0] in MUST_AGREE]
    for name, value_a, value_b in [] if anyway else differing:
        raise UserError(
            f"{path_a} and {path_b} differ in {name} ({value_a}, {value_b}): pass --anyway to compare "
            "them all the same"
        )
    metrics = [metric for metric in a["metrics"] if metric in b["metrics"]]
    if not metrics:
        raise UserError(f"{path_a} and {path_b} have no metric in common")
    if pairs is None:
        pairs = [(label, label) for label in a["methods"] if label in b["methods"]]
    if not pairs:
        raise UserError(f"no method is in both {path_a} and {path_b}: give --pair METHOD_OF_A METHOD_OF_B")
    records_a, records_b = read_records(path_a), read_records(path_b)
    parts: dict[str, dict[str, Any]] = {}
    settings = {}
    for label_a, label_b in pairs:
        for path, results, label in ((path_a, a, label_a), (path_b, b, label_b)):
            if label not in _settings(results):
                raise UserError(f"{path} has no method {label!r}: it has {', '.join(_settings(results))}")
        rows_a, rows_b = _by_question(records_a, label_a), _by_question(records_b, label_b)
        both = [(row, rows_b[question]) for question, row in rows_a.items() if question in rows_b]
        if not both:
            raise UserError(f"{path_a} and {path_b} have no question in common")
        name = label_a if label_a == label_b else f"{label_a} → {label_b}"
        settings[name] = [_settings(a)[label_a], _settings(b)[label_b]]
        for subset in benchmark.subsets:
            rows = [
                (x, y)
                for x, y in both
                if benchmark.in_subset(subset, x, a) and benchmark.in_subset(subset, y, b)
            ]
            if rows:
                values = ({m: values_of(column, m) for m in metrics} for column in zip(*rows, strict=True))
                values_a, values_b = values
                compared = stats.compare(metrics, values_b, values_a, seed=seed)
                parts.setdefault(subset, {})[name] = compared
    return {
        "runs": [str(path_a), str(path_b)],
        "benchmark": a["benchmark"],
        "protocols": [a["protocol"], b["protocol"]],
        "models": [a["model"], b["model"]],
        "metrics": metrics,
        "differing": {name: [value_a, value_b] for name, value_a, value_b in differing},
        "statistics": stats.describe(seed),
        "settings": settings,
        "parts": parts,
    }


def _settings(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Those of every method of a run, its controls included, by label."""
    controls = (each["runs"] for each in results.get("controls", {}).values())
    return {label: run["settings"] for runs in (results["methods"], *controls) for label, run in runs.items()}


def _by_question(
    records: Sequence[Mapping[str, Any]], method: str
) -> dict[tuple[str, int], Mapping[str, Any]]:
    """A method's records by question, since a row's number depends on the data; equal ones are counted."""
    seen: Counter[str] = Counter()
    questions = {}
    for record in records:
        if record["method"] == method:
            questions[record["question"], seen[record["question"]]] = record
            seen[record["question"]] += 1
    return questions


def comparison_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """The tables of a `comparison.json`: differences, the second run less the first."""
    tables, settings = [], comparison["settings"]
    for subset, compared in comparison["parts"].items():
        table = comparison_table(_title(comparison, subset), compared, _heads(comparison))
        kinds = ([sums_of({"settings": each}) for each in settings[row[0]]] for row in table.rows)
        sums = (" → ".join(dict.fromkeys(kind)) for kind in kinds)
        rows = tuple((row[0], own, *row[1:]) for row, own in zip(table.rows, sums, strict=True))
        tables.append(Table(table.title, ("method", "sums", *table.columns[1:]), rows))
    return tables


def comparison_plots(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The plots of a `comparison.json`, by name."""
    heads, parts = _heads(comparison), comparison["parts"]
    return {
        f"{subset}-differences" if len(parts) > 1 else "differences": plots.differences(
            _title(comparison, subset), compared, heads
        )
        for subset, compared in parts.items()
    }


def missing_subsets(comparison: Mapping[str, Any]) -> list[str]:
    """Titles of the subsets that no item of both runs is in."""
    subsets = benchmark_named(comparison["benchmark"]).subsets
    return [title for name, title in subsets.items() if name not in comparison["parts"]]


def write_comparison(comparison: Mapping[str, Any], out: Path, *, overwrite: bool) -> None:
    """Writes `comparison.json`, tables and plots into a new directory."""
    contents = (COMPARISON_FILE, "*.md", "*.png", "*.svg")
    with new_directory(out, marker=COMPARISON_FILE, contents=contents, overwrite=overwrite) as new:
        (new / MARKDOWN_FILE).write_text(markdown(comparison_tables(comparison)), encoding="utf-8")
        write_plots(new, comparison_plots(comparison))
        (new / COMPARISON_FILE).write_text(dumps(comparison, indent=2) + "\n", encoding="utf-8")


def _heads(comparison: Mapping[str, Any]) -> dict[str, str]:
    heads = benchmark_named(comparison["benchmark"]).heads
    return {metric: heads[metric] for metric in comparison["metrics"]}


def _title(comparison: Mapping[str, Any], subset: str) -> str:
    first, second = comparison["runs"]
    subsets = benchmark_named(comparison["benchmark"]).subsets
    items = subsets[subset] if len(comparison["parts"]) > 1 else "questions"
    title = f"{second} less {first}, on {items} that both have; {comparison['protocols'][0]}"
    if comparison["differing"]:
        title += f"; the runs differ in {', '.join(comparison['differing'])}"
    return title


class Comparison:
    """What this command writes, in a report."""

    title = "comparison"
    note = (
        "Two runs of evaluations, item by item: the second less the first, with 95 % percentile bootstrap "
        "intervals of the differences and McNemar's exact test of the first metric."
    )

    def read(self, path: Path) -> dict[str, Any]:
        comparison = read_fields(path / COMPARISON_FILE)
        return comparison | {"model": " → ".join(dict.fromkeys(comparison["models"]))}

    def report(self, runs: Sequence[FinishedRun], others: Sequence[FinishedRun]) -> list[Section]:
        sections = [Section("Comparisons of two runs", (self.note,))]
        for run in runs:
            blocks = (*comparison_tables(run.results), *run.pictures())
            sections.append(Section(f"{run.path}, run {run.number}", blocks, level=3))
        return sections


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.compare",
        description="Paired differences of two evaluation runs, question by question.",
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", type=Path, help="output directory of a run")
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar=("METHOD_OF_A", "METHOD_OF_B"),
        help="methods to compare, or controls (expert/flip); may be repeated (default: all that both have)",
    )
    parser.add_argument("--anyway", action="store_true", help="also runs of different protocols or data")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the bootstrap")
    parser.add_argument("--out", type=Path, help="directory to write, too")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    lock_outputs(args.out)
    comparison = compare_runs(*args.runs, args.pair, anyway=args.anyway, seed=args.seed)
    for subset in missing_subsets(comparison):
        logger.warning("no item of both runs is among %s", subset)
    comparison |= {"command": command_line(parser.prog, argv), **environment()}
    if args.out is not None:
        write_comparison(comparison, args.out, overwrite=args.overwrite)
    show(comparison_tables(comparison))


if __name__ == "__main__":
    sys.exit(main())
