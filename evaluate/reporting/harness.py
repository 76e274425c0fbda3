"""Results of the LM Evaluation Harness: their rows, and their part of a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imae_jax.evaluate.reporting.document import FinishedRun, Section
from imae_jax.evaluate.reporting.tables import DASH, Table, stack
from imae_jax.evaluate.runner.directory import read_fields

HARNESS_FILE = "lm_eval.json"
HARNESS_COLUMNS = ("task", "filter", "metric", "value", "± standard error")


class Harness:
    """What `evaluate.lm_eval` writes, in a report."""

    title = "lm-eval"
    note = (
        "Tasks of the LM Evaluation Harness with its own metrics and standard errors. A log-likelihood is "
        "the sum of the method's scores: where these are no log-probabilities, a perplexity or MC2 of them "
        "is none."
    )

    def read(self, path: Path) -> dict[str, Any]:
        harness = read_fields(path / HARNESS_FILE)
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
