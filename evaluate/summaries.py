"""What the lines of runs come to: means, comparisons, tables of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import stats
from .tables import Table, p_value, with_interval

HARNESS_COLUMNS = ("task", "filter", "metric", "value", "± standard error")


def values_of(lines: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray:
    """A metric of lines as float64; NaN where it is undefined."""
    return np.array([math.nan if line[metric] is None else float(line[metric]) for line in lines])


def sums_of(settings: Mapping[str, Any]) -> str:
    """What a method sums: `log p`, or differences that are `raw` or `renormalized`."""
    if "renormalize" not in settings:
        return "log p"
    return "renormalized" if settings["renormalize"] else "raw"


def precision_of(results: Mapping[str, Any]) -> str:
    """A run's dtype, and which weights were 8-bit integers."""
    return results["dtype"]


def baseline_of(methods: Mapping[str, Mapping[str, Any]], chosen: str | None) -> str:
    """The method that others are compared to: the one chosen, else base mode, else the first.

    Args:
        methods: settings by label.
        chosen: a label.
    """
    if chosen is not None:
        return chosen
    base = [k for k, s in methods.items() if (s["name"], s.get("strength")) == ("imae", 0.0)]
    return next(iter([*base, *methods]))


def summarize(
    lines: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str], *, baseline: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Means, intervals and comparisons of every method, times 100.

    Args:
        lines: of every method, item by item.
        metrics: names of fields of the lines.
        baseline: label of the method that the others are compared to.
        seed: of the bootstrap.
    """
    values = {label: {m: values_of(own, m) for m in metrics} for label, own in lines.items()}
    summaries: dict[str, dict[str, Any]] = {}
    for label, own in values.items():
        means = {m: stats.mean(own[m], seed=seed).scaled(100) for m in metrics}
        undefined = np.any([np.isnan(own[m]) for m in metrics], axis=0)
        summaries[label] = {
            **{m: means[m]["value"] for m in metrics},
            "intervals": {m: means[m]["interval"] for m in metrics},
            "n": int(np.sum(~undefined)),
            "n_undefined": int(np.sum(undefined)),
            "undefined": [line["index"] for line, bad in zip(lines[label], undefined, strict=True) if bad],
        }
        if label != baseline:
            compared = stats.compare(metrics, own, values[baseline], seed=seed)
            summaries[label]["against_baseline"] = compared
        categories = _by_category(lines[label], own)
        if categories:
            summaries[label]["by_category"] = categories
    return summaries


def _by_category(
    lines: Sequence[Mapping[str, Any]], values: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Means times 100 in every category of the lines that have one."""
    of_line = np.array([line.get("category", "") for line in lines])
    found = {}
    for category in sorted(set(of_line) - {""}):
        here = of_line == category
        found[str(category)] = {"n": int(here.sum())} | {
            metric: 100 * float(np.nanmean(own[here]))
            for metric, own in values.items()
            if not np.isnan(own[here]).all()
        }
    return found


def scores_table(title: str, methods: Mapping[str, Any], metrics: Mapping[str, str]) -> Table:
    """Every method's means with their intervals.

    Args:
        title: of the table.
        methods: summaries by label, with their `settings`.
        metrics: heads by name.
    """
    rows = [
        (
            label,
            sums_of(row["settings"]),
            str(row["n"]),
            *(with_interval(row[m], row["intervals"][m]) for m in metrics),
        )
        for label, row in methods.items()
    ]
    return Table(title, ("method", "sums", "N", *metrics.values()), tuple(rows))


def differences_table(title: str, compared: Mapping[str, Any], metrics: Mapping[str, str]) -> Table:
    """Paired differences, and McNemar's test of the first metric.

    Args:
        title: of the table.
        compared: from `stats.compare`, by the name to show.
        metrics: heads by name; the first is 0 or 1.
    """
    first = next(iter(metrics))
    rows = []
    for label, found in compared.items():
        test = found[first].get("mcnemar")
        cells = (test["gained"], test["lost"], p_value(test["p"])) if test else ("–",) * 3
        shown = (with_interval(found[m]["value"], found[m]["interval"], sign=True) for m in metrics)
        rows.append((label, str(found[first]["n"]), *shown, *map(str, cells)))
    heads = (*(f"Δ {head}" for head in metrics.values()), "gained", "lost", "McNemar p")
    return Table(title, ("method", "N", *heads), tuple(rows))


def harness_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Task, filter, metric, value and standard error of everything in a result of lm-eval, as cells."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            figures = value, values.get(f"{metric}_stderr,{name}")
            cells = (f"{x:.4f}" if isinstance(x, int | float) else "–" for x in figures)
            rows.append((task, name, metric, *cells))
    return rows


def against_baseline(methods: Mapping[str, Any]) -> dict[str, Any]:
    """The comparisons of `summarize`, of the methods that have one."""
    return {k: row["against_baseline"] for k, row in methods.items() if row.get("against_baseline")}


def note_undefined(methods: Mapping[str, Any]) -> list[str]:
    """A sentence for every method with scores that are not finite."""
    notes = []
    for label, row in methods.items():
        if row["n_undefined"]:
            rows = ", ".join([*map(str, row["undefined"][:8]), *["…"] * (row["n_undefined"] > 8)])
            notes.append(
                f"{label}: {row['n_undefined']} of {row['n'] + row['n_undefined']} have a score "
                f"that is not finite (rows {rows}); means leave them out"
            )
    return notes
