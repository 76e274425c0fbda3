"""Runs besides benchmarks that a report shows: comparisons, lm-eval's results, costs of decoding."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imae_jax.evaluate.cost import cost_tables
from imae_jax.evaluate.reporting import paper
from imae_jax.evaluate.reporting.compare import COMPARISON_FILE, comparison_tables
from imae_jax.evaluate.reporting.document import Picture, Section
from imae_jax.evaluate.reporting.tables import DASH, Table, stack
from imae_jax.evaluate.runner.directory import RESULTS_FILE, with_file
from imae_jax.files import read_json

HARNESS_FILE = "lm_eval.json"
HARNESS_COLUMNS = ("task", "filter", "metric", "value", "± standard error")
# Plots that come last, in this order.
LAST_PLOTS = ("differences", "categories")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run in a report.

    Attributes:
        number: its number among the report's runs, from 1.
        path: its directory.
        kind: what it is a run of: a `Benchmark`, or a class of this file or of `training`.
        results: what it holds.
    """

    number: int
    path: Path
    kind: Any
    results: Mapping[str, Any]

    def label(self) -> str:
        """The heading of its rows."""
        return f"{self.results['model']} ({self.results['dtype']}), run {self.number}"

    def pictures(self) -> list[Picture]:
        """Its plots."""

        def order(path: Path) -> tuple[int, Path]:
            return max((i + 1 for i, name in enumerate(LAST_PLOTS) if name in path.stem), default=0), path

        return [
            Picture(
                f"{self.number}-{path.name}",
                f"Run {self.number}, {self.results['model']}: {path.stem.replace('-', ' ')}",
                path.read_bytes(),
            )
            for path in sorted(self.path.glob("*.png"), key=order)
        ]


class Comparison:
    """What `evaluate.compare --out` writes."""

    title = "comparison"
    note = (
        "Two runs of evaluations, item by item: the second less the first, with 95 % percentile bootstrap "
        "intervals of the differences and McNemar's exact test of the first metric."
    )

    def read(self, path: Path) -> dict[str, Any]:
        comparison = with_file(read_json(path / COMPARISON_FILE), path / COMPARISON_FILE)
        return comparison | {"model": " → ".join(dict.fromkeys(comparison["models"]))}

    def report(self, runs: Sequence[FinishedRun], others: Sequence[FinishedRun]) -> list[Section]:
        sections = [Section("Comparisons of two runs", (self.note,))]
        for run in runs:
            blocks = (*comparison_tables(run.results), *run.pictures())
            sections.append(Section(f"{run.path}, run {run.number}", blocks, level=3))
        return sections


class Harness:
    """What `evaluate.lm_eval` writes."""

    title = "lm-eval"
    note = (
        "Tasks of the LM Evaluation Harness with its own metrics and standard errors. A log-likelihood is "
        "the sum of the method's scores: where these are no log-probabilities, a perplexity or MC2 of them "
        "is none."
    )

    def read(self, path: Path) -> dict[str, Any]:
        harness = with_file(read_json(path / HARNESS_FILE), path / HARNESS_FILE)
        ours, kept = harness["config"]["imae_jax"], ("n-samples", "n-shot", "date", "lm_eval_version")
        arguments = ours["arguments"]
        return {
            "model": arguments["model"],
            "dtype": ours["base_model"]["dtype"],
            "rows": harness_rows(harness),
            "methods": {arguments["method"]: {"settings": ours["method"]["scoring"]}},
            "limit": arguments["limit"],
            "config": ours,
            "task_versions": harness["versions"],
            **{name: harness[name] for name in kept if name in harness},
            "versions": ours["versions"],
            "git": ours.get("git"),
        }

    def report(self, runs: Sequence[FinishedRun], others: Sequence[FinishedRun]) -> list[Section]:
        tables = {}
        for run in runs:
            (method,), limit = run.results["methods"], run.results["limit"]
            cut = "" if limit is None else f", {limit:g} documents a task"
            label = f"{run.results['model']} ({run.results['dtype']}), {method}{cut}, run {run.number}"
            tables[label] = Table("", HARNESS_COLUMNS, tuple(run.results["rows"]))
        blocks = (self.note, stack("Results [± standard error]", tables))
        return [Section("LM Evaluation Harness", blocks)]


def harness_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Task, filter, metric, value and standard error of everything in a result of lm-eval, as cells."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            figures = value, values.get(f"{metric}_stderr,{name}")
            cells = (f"{x:.4f}" if isinstance(x, int | float) else DASH for x in figures)
            rows.append((task, name, metric, *cells))
    return rows


class Cost:
    """What `evaluate.cost` writes."""

    title = "cost"
    note = (
        "Memory: {}. ms/token is the time of a decoding step, without the prompt and without compiling; "
        "× base is against base in the same run and batch size."
    )

    def read(self, path: Path) -> dict[str, Any]:
        return with_file(read_json(path / RESULTS_FILE), path / RESULTS_FILE)

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
