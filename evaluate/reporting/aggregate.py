"""Aggregates records of items: means with intervals, paired comparisons, tables of both."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imae_jax import stats
from imae_jax.evaluate.reporting.tables import DASH, Estimate, Table, p_value

CHANCE = "chance"  # the row of tables


def values_of(records: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray:
    """A metric of records as float64; NaN where it is undefined."""
    values = (record[metric] for record in records)
    return np.array([math.nan if value is None else float(value) for value in values])


def sums_of(summary: Mapping[str, Any]) -> str:
    """What a method sums: `log p`, or differences that are `raw` or `renormalized`.

    Args:
        summary: the method's `settings`, and whether its scores are log-probabilities, `normalized`.
    """
    settings = summary["settings"]
    if "renormalize" in settings:
        return "renormalized" if settings["renormalize"] else "raw"
    return "log p" if summary.get("normalized", True) else "raw"


def choose_baseline(methods: Mapping[str, Mapping[str, Any]], chosen: str | None) -> str:
    """The method that others are compared to: the one chosen, else base mode, else the first one."""
    if chosen is not None:
        return chosen
    base = [k for k, s in methods.items() if (s["name"], s.get("strength")) == ("imae", 0.0)]
    return next(iter([*base, *methods]))


def summarize(
    records: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str], *, baseline: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Means, intervals and comparisons of every method, times 100.

    Args:
        records: every method's records, item by item.
        metrics: names of fields of the records.
        baseline: label of the method that the others are compared to.
        seed: seed of the bootstrap.
    """
    values = {label: {m: values_of(rows, m) for m in metrics} for label, rows in records.items()}
    summaries: dict[str, dict[str, Any]] = {}
    for label, by_metric in values.items():
        means = {m: stats.mean(by_metric[m], seed=seed).scaled(100) for m in metrics}
        undefined = np.any([np.isnan(by_metric[m]) for m in metrics], axis=0)
        summaries[label] = {
            **{m: means[m]["value"] for m in metrics},
            "intervals": {m: means[m]["interval"] for m in metrics},
            "n": int(np.sum(~undefined)),
            "n_undefined": int(np.sum(undefined)),
            "undefined": [row["index"] for row, bad in zip(records[label], undefined, strict=True) if bad],
        }
        if label != baseline:
            compared = stats.compare(metrics, by_metric, values[baseline], seed=seed)
            summaries[label]["against_baseline"] = compared
        categories = _by_category(records[label], by_metric)
        if categories:
            summaries[label]["by_category"] = categories
    return summaries


def _by_category(
    records: Sequence[Mapping[str, Any]], values: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Means times 100 in every category of the records that have one."""
    categories = np.array([record.get("category", "") for record in records])
    means = {}
    for category in sorted(set(categories) - {""}):
        members = categories == category
        means[str(category)] = {"n": int(members.sum())} | {
            metric: 100 * float(np.nanmean(by_item[members]))
            for metric, by_item in values.items()
            if not np.isnan(by_item[members]).all()
        }
    return means


def mean_chance(metrics: Sequence[str], levels: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean chance level of every metric that has one, times 100.

    Args:
        metrics: names of metrics.
        levels: of every item, see `Benchmark.chance`.
    """
    known = [metric for metric in metrics if metric in levels[0]]
    return {metric: 100 * sum(level[metric] for level in levels) / len(levels) for metric in known}


def scores_table(
    title: str,
    methods: Mapping[str, Any],
    heads: Mapping[str, str],
    chance: Mapping[str, float] | None = None,
) -> Table:
    """Means with their intervals, from the summaries of methods, with `settings`, by label.

    Args:
        title: title of the table.
        methods: summaries of methods.
        heads: names of the metrics.
        chance: chance levels, in a last row, of the metrics that have one.
    """
    rows = [
        (
            label,
            sums_of(row),
            row["n"],
            *(Estimate(row[m], row["intervals"][m]) for m in heads),
        )
        for label, row in methods.items()
    ]
    if chance:
        rows.append((CHANCE, DASH, DASH, *(Estimate(chance.get(metric)) for metric in heads)))
    return Table(title, ("method", "sums", "N", *heads.values()), tuple(rows))


def comparison_table(title: str, compared: Mapping[str, Any], heads: Mapping[str, str]) -> Table:
    """Paired differences, and McNemar's test of the first metric, from comparisons of `stats.compare`."""
    first, rows = next(iter(heads)), []
    for label, row in compared.items():
        test = row[first].get("mcnemar")
        cells = (test["gained"], test["lost"], p_value(test["p"])) if test else (DASH,) * 3
        differences = (Estimate(row[m]["value"], row[m]["interval"], sign=True) for m in heads)
        rows.append((label, row[first]["n"], *differences, *cells))
    columns = (*(f"Δ {head}" for head in heads.values()), "gained", "lost", "McNemar p")
    return Table(title, ("method", "N", *columns), tuple(rows))


def differences_tables(title: str, methods: Mapping[str, Any], heads: Mapping[str, str]) -> list[Table]:
    """The comparisons of `summarize` as one table; none where there is nothing to compare."""
    compared = against_baseline(methods)
    return [comparison_table(title, compared, heads)] if compared else []


def against_baseline(methods: Mapping[str, Any]) -> dict[str, Any]:
    """The comparisons of `summarize`, for the methods that have one."""
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
