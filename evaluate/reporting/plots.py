"""Plots of evaluation runs, as matplotlib figures."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from imae_jax.evaluate.reporting.aggregate import against_baseline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHARACTERS_PER_INCH = 13  # of 9 points, with room to spare
# Nats a token. Above the first, KL is shown on a logarithmic scale, which is linear below the second.
WIDE_KL, SMALL_KL = 1.0, 0.01


def of_methods(
    title: str, methods: Mapping[str, Any], heads: Mapping[str, str], baseline: str
) -> dict[str, "Figure"]:
    """The plots of a run by name: scores, categories and differences, where there are any.

    Args:
        title: title of all plots, one line.
        methods: summaries of `aggregate.summarize`, by label of the method.
        heads: names of the metrics to show, by metric.
        baseline: label of the method that others are compared to.
    """
    compared = against_baseline(methods)
    figures = {"scores": bars(title, methods, heads, "score × 100, 95 % interval")}
    if next(iter(methods.values())).get("by_category"):
        figures["categories"] = categories(title, methods, heads)
    if compared:
        against = f"{title}: difference to {baseline}, 95 % interval"
        figures["differences"] = differences(against, compared, heads)
    return figures


def bars(title: str, methods: Mapping[str, Any], heads: Mapping[str, str], unit: str) -> "Figure":
    """Every metric of every method as grouped bars with their intervals; `unit` is the axis' label."""
    width = 0.8 / len(methods)
    # A bar's number needs about 0.4 inches.
    size = max(5.0, 1.2 + 0.42 * len(heads) * len(methods))
    figure = _figure(min(size, 16.0), 3.8)
    axes = figure.subplots()
    for number, (label, row) in enumerate(methods.items()):
        positions = np.arange(len(heads)) + (number - (len(methods) - 1) / 2) * width
        values = [row[m] or 0.0 for m in heads]
        axes.bar(positions, values, width, label=label, color=f"C{number}", alpha=0.85)
        for x, metric in zip(positions, heads, strict=True):
            # At the foot, in front of an error bar that reaches it.
            axes.annotate(
                "–" if row[metric] is None else f"{row[metric]:.1f}",
                (x, 0),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color="white" if row[metric] else "k",
                bbox={"fc": f"C{number}", "ec": "none", "pad": 0.6} if row[metric] else None,
                zorder=5,
            )
            _error_bar(axes, x, row[metric], row["intervals"][metric], "k", vertical=True)
    axes.set_xticks(range(len(heads)), heads.values())
    axes.set_ylabel(unit)
    return _finish(figure, title, len(methods))


def categories(title: str, methods: Mapping[str, Any], heads: Mapping[str, str]) -> "Figure":
    """Every metric per category, a dot a method, in the order of the first method's first metric."""
    counts, metric = next(iter(methods.values()))["by_category"], next(iter(heads))
    names = sorted(counts, key=lambda name: counts[name].get(metric, -1.0))
    figure = _figure(2.5 + 2.6 * len(heads), 1.6 + 0.21 * len(names))
    panels = figure.subplots(1, len(heads), sharey=True, squeeze=False)[0]
    for axes, (name, head) in zip(panels, heads.items(), strict=True):
        for number, (label, row) in enumerate(methods.items()):
            values = [row["by_category"].get(category, {}).get(name, np.nan) for category in names]
            # Side by side, since dots at 0 and 100 would hide each other.
            shift = 0.5 * (number - (len(methods) - 1) / 2) / len(methods)
            axes.plot(values, np.arange(len(names)) + shift, "o", ms=4, color=f"C{number}", label=label)
        axes.set(xlabel=f"{head} (× 100)", xlim=(-4, 104), ylim=(-0.8, len(names) - 0.2))
        axes.grid(axis="y", lw=0.4, alpha=0.5)
    panels[0].set_yticks(range(len(names)), [f"{name} ({counts[name]['n']})" for name in names], fontsize=7)
    return _finish(figure, f"{title}; number of questions in brackets", len(methods))


def differences(title: str, compared: Mapping[str, Any], heads: Mapping[str, str]) -> "Figure":
    """Paired differences with their intervals, a panel a metric; `compared` is as in `comparison_table`."""
    longest = max(map(len, compared))
    figure = _figure(1.0 + 0.065 * longest + 2.6 * len(heads), 1.3 + 0.35 * len(compared))
    panels = figure.subplots(1, len(heads), sharey=True, squeeze=False)[0]
    for axes, (metric, head) in zip(panels, heads.items(), strict=True):
        axes.axvline(0, color="0.6", lw=0.8)
        for y, row in enumerate(compared.values()):
            _dot(axes, y, row[metric]["value"], row[metric]["interval"])
        # Where all are 0, ticks of hundredths would say nothing.
        low, high = axes.get_xlim()
        axes.set(xlabel=f"Δ {head} (points)", xlim=(min(low, -1.0), max(high, 1.0)))
        axes.set_yticks(range(len(compared)), compared, fontsize=8)
        axes.set_ylim(len(compared) - 0.5, -0.5)
    return _finish(figure, title)


def strengths(
    title: str,
    learned: Mapping[float, Mapping[str, Any]],
    noise: Mapping[float, Sequence[Mapping[str, Any]]],
    heads: Mapping[str, str],
) -> "Figure":
    """Every metric over the units' strength, and the range of random directions of the same size.

    Args:
        title: one line.
        learned: summaries by strength, of at least two.
        noise: summaries of random directions by strength.
        heads: names of the metrics.
    """
    figure = _figure(1.0 + 2.9 * len(heads), 3.4)
    panels = figure.subplots(1, len(heads), squeeze=False)[0]
    for axes, (metric, head) in zip(panels, heads.items(), strict=True):
        banded = {x: [run[metric] for run in noise[x] if run[metric] is not None] for x in noise}
        if 0.0 in learned:
            banded[0.0] = [learned[0.0][metric]]  # No direction has a size there.
        banded = {x: values for x, values in sorted(banded.items()) if values}
        low, high = ([bound(values) for values in banded.values()] for bound in (min, max))
        axes.fill_between(list(banded), low, high, color="0.8", label="random directions")
        xs = sorted(x for x in learned if learned[x][metric] is not None)
        axes.plot(xs, [learned[x][metric] for x in xs], "o-", ms=4, color="C0", label="learned direction")
        for x in xs:
            interval = learned[x]["intervals"][metric]
            _error_bar(axes, x, learned[x][metric], interval, "C0", vertical=True)
        axes.set(xlabel="strength (−1 expert, +1 anti-expert)", ylabel=f"{head} (× 100)")
    return _finish(figure, f"{title}; 95 % interval", 2)


def harm(title: str, methods: Mapping[str, Any]) -> "Figure":
    """KL from base and agreement with its most likely token, a row a method, with their intervals."""
    figure = _figure(6.5 + 0.065 * max(map(len, methods)), 1.4 + 0.4 * len(methods))
    panels = figure.subplots(1, 2, sharey=True)
    heads = {"kl": "KL(base ‖ method), nats a token", "top1_agreement": "same top 1 as base, %"}
    for axes, (name, head), scale in zip(panels, heads.items(), (1, 100), strict=True):
        for y, row in enumerate(methods.values()):
            value, interval = scale * row[name], row["intervals"][name]
            x, text = value, f"{value:.3g}"
            if math.isfinite(value):
                _dot(axes, y, value, interval and [scale * bound for bound in interval])
            else:
                x, text = 0, "NaN" if math.isnan(value) else "infinite"
            # Label above the dot: an error bar may be beside it.
            axes.annotate(text, (x, y), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        axes.set_xlabel(head)
        axes.margins(x=0.12)
        if name == "kl" and any(WIDE_KL < row[name] < math.inf for row in methods.values()):
            axes.set_xscale("symlog", linthresh=SMALL_KL)
        axes.grid(axis="x", lw=0.4, alpha=0.5)
    panels[0].set_yticks(range(len(methods)), methods, fontsize=8)
    panels[0].set_ylim(len(methods) - 0.4, -0.7)
    panels[1].set_xlim(-5, 105)
    return _finish(figure, f"{title}; 95 % interval")


def bar_panels(panels: Mapping[str, Mapping[str, Mapping[str, float]]], title: str) -> "Figure":
    """Horizontal bars: a panel for each quantity, a colour for each series, a row for each name.

    Args:
        panels: values by label of the x axis, by series, by name.
        title: title of the figure.
    """
    series = next(iter(panels.values()))
    names = list(next(iter(series.values())))
    height = 1.2 + 0.3 * len(names) * max(len(series), 1.3)
    figure = _figure(1.5 + 4.5 * len(panels), height)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    width = 0.8 / len(series)
    for axes, (label, by_series) in zip(all_axes, panels.items(), strict=True):
        for number, (name_of_series, values) in enumerate(by_series.items()):
            offset = (number - (len(series) - 1) / 2) * width
            bars = axes.barh(
                [row + offset for row in range(len(names))],
                [values[name] for name in names],
                width,
                label=name_of_series,
            )
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    all_axes[0].set_yticks(range(len(names)), names)
    all_axes[0].invert_yaxis()
    return _finish(figure, title, len(series) if len(series) > 1 else 0)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # `--help` does not wait for it.

    return Figure(figsize=(width, height), layout="constrained")


def _dot(axes: Any, y: float, value: float | None, interval: Sequence[float] | None) -> None:
    if value is not None:
        axes.plot(value, y, "o", ms=5, color="C0")
        _error_bar(axes, y, value, interval, "C0", vertical=False)


def _error_bar(
    axes: Any, position: float, value: float, interval: Sequence[float] | None, color: str, *, vertical: bool
) -> None:
    if interval is not None:
        reach = [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
        x, y, key = (position, value, "yerr") if vertical else (value, position, "xerr")
        axes.errorbar(x, y, **{key: reach}, color=color, capsize=2, lw=1, fmt="none")


def _finish(figure: "Figure", title: str, legend: int = 0) -> "Figure":
    """Adds a title, of as many lines as it needs, and a legend of so many methods."""
    # Constrained layout makes room for a title, but does not break it.
    characters = int(CHARACTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle(textwrap.fill(title, characters, break_on_hyphens=False), fontsize=9)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    if legend:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        # A label's line and margins are as wide as 8 characters.
        columns = max(1, min(legend, 4, characters // (max(map(len, labels)) + 8)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure
