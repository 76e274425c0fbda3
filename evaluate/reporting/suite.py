"""Several benchmarks in one table: a row for every metric, a column for every method."""

from collections.abc import Mapping
from typing import Any

from imae_jax.evaluate.benchmarks.benchmark import Benchmark
from imae_jax.evaluate.reporting.tables import DASH, Estimate, Table, figure, number

Results = Mapping[str, tuple[Benchmark, Mapping[str, Any]]]


def scores(results: Results) -> list[tuple[str, str, str, float | None, dict[str, Any]]]:
    """Run, metric, its head, its chance level, and every method's `(value, interval)`, of all benchmarks.

    Args:
        results: benchmark and `results.json` of every run by name.
    """
    rows = []
    for name, (benchmark, run) in results.items():
        if not benchmark.questions:
            continue
        for metric, head in benchmark.shown_heads(run).items():
            by_method = {k: (row[metric], row["intervals"][metric]) for k, row in run["methods"].items()}
            rows.append((name, metric, head, (run.get("chance") or {}).get(metric), by_method))
    return rows


def summary_table(results: Results) -> Table:
    """Every score, and the divergence from base on neutral text where that was measured."""
    asked = [run for benchmark, run in results.values() if benchmark.questions] or [
        run for _, run in results.values()
    ]
    methods = list(dict.fromkeys(label for run in asked for label in run["methods"]))
    rows = []
    for name, _, head, chance, by_method in scores(results):
        cells = (Estimate(*by_method.get(label, (None, None))) for label in methods)
        rows.append((name, head, number(chance), *cells))
    for name, (benchmark, run) in results.items():
        if benchmark.name == "harm":
            kl = (figure(run["methods"][k]["kl"]) if k in run["methods"] else DASH for k in methods)
            rows.append((name, "KL(base ‖ method), nats", DASH, *kl))
    return Table("Scores × 100 [95 % interval]", ("benchmark", "metric", "chance", *methods), tuple(rows))
