"""Plots of evaluation runs, as matplotlib figures."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Of 9 points, with room to spare.
CHARACTERS_PER_INCH = 13
# Nats a token. Above the first, KL is shown on a logarithmic scale, which is linear below the second.
WIDE_KL, SMALL_KL = 1.0, 0.01


def bars(title: str, methods: Mapping[str, Any], metrics: Mapping[str, str], unit: str) -> Any:
    """Every metric of every method as grouped bars with their intervals.

    Args:
        title: one line.
        methods: summaries by label, from `runs.summarize`.
        metrics: heads by name.
        unit: of the axis.
    """
    from matplotlib.figure import Figure

    width = 0.8 / len(methods)
    # A bar's number needs about 0.4 inches.
    size = max(5.0, 1.2 + 0.42 * len(metrics) * len(methods))
    figure = Figure(figsize=(min(size, 16.0), 3.8), layout="constrained")
    axes = figure.subplots()
    for number, (label, row) in enumerate(methods.items()):
        offset = (number - (len(methods) - 1) / 2) * width
        places = np.arange(len(metrics)) + offset
        values = [row[m] or 0.0 for m in metrics]
        axes.bar(places, values, width, label=label, color=f"C{number}", alpha=0.85)
        # At the foot, in front of a whisker that reaches it.
        patch = {"facecolor": f"C{number}", "edgecolor": "none", "pad": 0.6}
        for place, metric in zip(places, metrics, strict=True):
            shown = "–" if row[metric] is None else f"{row[metric]:.1f}"
            axes.annotate(
                shown,
                (place, 0),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color="white" if row[metric] else "k",
                bbox=patch if row[metric] else None,
                zorder=5,
            )
        _whiskers(axes, [row["intervals"][m] for m in metrics], values, places, "k", vertical=True)
    axes.set_xticks(range(len(metrics)), metrics.values())
    axes.set_ylabel(unit)
    _title(figure, title)
    _finish(figure, len(methods))
    return figure


def categories(title: str, methods: Mapping[str, Any], metrics: Mapping[str, str]) -> Any | None:
    """Every metric per category, a dot a method; None where there are no categories.

    Categories come in the order of the first method's first metric.
    """
    from matplotlib.figure import Figure

    first, metric = next(iter(methods.values())), next(iter(metrics))
    found = first.get("by_category")
    if not found:
        return None
    names = sorted(found, key=lambda name: found[name].get(metric, -1.0))
    size = (2.5 + 2.6 * len(metrics), 1.6 + 0.21 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, (name, head) in zip(panels, metrics.items(), strict=True):
        for number, (label, row) in enumerate(methods.items()):
            values = [row["by_category"].get(category, {}).get(name, np.nan) for category in names]
            # Side by side, since dots at 0 and 100 would hide each other.
            shift = 0.5 * (number - (len(methods) - 1) / 2) / len(methods)
            axes.plot(values, np.arange(len(names)) + shift, "o", ms=4, color=f"C{number}", label=label)
        axes.set_xlabel(f"{head} (× 100)")
        axes.set_xlim(-4, 104)
        axes.grid(axis="y", lw=0.4, alpha=0.5)
    panels[0].set_yticks(range(len(names)), [f"{name} ({found[name]['n']})" for name in names], fontsize=7)
    panels[0].set_ylim(-0.8, len(names) - 0.2)
    _title(figure, f"{title}; number of questions in brackets")
    _finish(figure, len(methods), of=panels[0])
    return figure


def differences(title: str, compared: Mapping[str, Any], metrics: Mapping[str, str]) -> Any | None:
    """Paired differences with their intervals, a panel a metric; None where nothing is compared.

    Args:
        title: one line.
        compared: from `stats.compare`, by the name to show.
        metrics: heads by name.
    """
    from matplotlib.figure import Figure

    if not compared:
        return None
    names = list(compared)
    longest = max(map(len, names))
    figure = Figure(
        figsize=(1.0 + 0.065 * longest + 2.6 * len(metrics), 1.3 + 0.35 * len(names)), layout="constrained"
    )
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, (metric, head) in zip(panels, metrics.items(), strict=True):
        axes.axvline(0, color="0.6", lw=0.8)
        for place, name in enumerate(names):
            row = compared[name][metric]
            if row["value"] is not None:
                axes.plot(row["value"], place, "o", ms=5, color="C0")
                _whiskers(axes, [row["interval"]], [row["value"]], [place], "C0", vertical=False)
        axes.set_xlabel(f"Δ {head} (points)")
        # Where all are 0, ticks of hundredths would say nothing.
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -1.0), max(high, 1.0))
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
    _title(figure, title)
    _finish(figure, 0)
    return figure


def harm(title: str, methods: Mapping[str, Any]) -> Any:
    """KL from base and agreement with its most likely token, a row a method, with their intervals.

    Args:
        title: one line.
        methods: summaries by label, from `harm.summarize`.
    """
    from matplotlib.figure import Figure

    names = list(methods)
    longest = max(map(len, names))
    figure = Figure(figsize=(6.5 + 0.065 * longest, 1.4 + 0.4 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    heads = {"kl": "KL(base ‖ method), nats a token", "top1_agreement": "same top 1 as base, %"}
    for axes, (name, head), scale in zip(panels, heads.items(), (1, 100), strict=True):
        finite = [scale * row[name] for row in methods.values() if math.isfinite(row[name])]
        for place, row in enumerate(methods.values()):
            value, interval = scale * row[name], row["intervals"][name]
            if math.isfinite(value):
                axes.plot(value, place, "o", ms=5, color="C0")
                bounds = interval and [scale * bound for bound in interval]
                _whiskers(axes, [bounds], [value], [place], "C0", vertical=False)
            # Beside the dot there may be a whisker.
            at, shown = (value, f"{value:.3g}") if math.isfinite(value) else (0, _not_finite(value))
            axes.annotate(shown, (at, place), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        axes.set_xlabel(head)
        axes.margins(x=0.12)
        if name == "kl" and max(finite, default=0.0) > WIDE_KL:
            axes.set_xscale("symlog", linthresh=SMALL_KL)
        axes.grid(axis="x", lw=0.4, alpha=0.5)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].set_ylim(len(names) - 0.4, -0.7)
    panels[1].set_xlim(-5, 105)
    _title(figure, f"{title}; 95 % interval")
    _finish(figure, 0)
    return figure


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinite"


def _whiskers(
    axes: Any,
    intervals: Sequence[Sequence[float] | None],
    values: Sequence[float],
    places: Sequence[float],
    color: str,
    *,
    vertical: bool,
) -> None:
    kept = [(v, p, i) for v, p, i in zip(values, places, intervals, strict=True) if i is not None]
    for value, place, (low, high) in kept:
        reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
        x, y = (place, value) if vertical else (value, place)
        key = "yerr" if vertical else "xerr"
        axes.errorbar(x, y, **{key: reach}, color=color, capsize=2, lw=1, fmt="none")


def _title(figure: Any, text: str) -> None:
    """As many lines as it needs: constrained layout makes room for them, but does not break them."""
    characters = int(CHARACTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle(textwrap.fill(text, characters, break_on_hyphens=False), fontsize=9)


def _finish(figure: Any, legend: int, of: Any = None) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    if legend:
        handles, labels = (of or figure.axes[0]).get_legend_handles_labels()
        # A label's line and margins are as wide as 8 characters.
        widest = max(map(len, labels)) + 8
        columns = max(1, min(legend, 4, int(CHARACTERS_PER_INCH * figure.get_figwidth() / widest)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def bar_panels(panels: Mapping[str, Mapping[str, Mapping[str, float]]], title: str) -> Any:
    """Horizontal bars: a panel for each quantity, a colour for each series, a row for each name.

    Args:
        panels: by label of the x axis, by series, by name.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    series = next(iter(panels.values()))
    names = list(next(iter(series.values())))
    height = 1.2 + 0.3 * len(names) * max(len(series), 1.3)
    figure = Figure(figsize=(1.5 + 4.5 * len(panels), height), layout="constrained")
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
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_yticks(range(len(names)), names)
    all_axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    if len(series) > 1:
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
