"""Splits a gain over base into what a method's direction brings, and what any change along its axis brings.

With s(o) the score at strength o: the odd part ½ (s(o) − s(−o)) is the direction's; the even part
½ (s(o) + s(−o)) − s(0) is there for both signs. They add up to the gain s(o) − s(0). A random direction of
the same size has an even part, too, and an odd one of either sign: how far gains of several spread says what
a direction may bring by chance.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from imae_jax import stats
from imae_jax.evaluate.reporting import plots
from imae_jax.evaluate.reporting.aggregate import values_of
from imae_jax.evaluate.reporting.tables import DASH, Estimate, Table, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from imae_jax.evaluate.runner.controls import Controls

TITLE = "What the direction brings"
PARTS = {"gain": "gain over base", "odd": "the direction's", "even": "any change's"}
NOTE = (
    "*the direction's*: ½ (s(o) − s(−o)), *any change's*: ½ (s(o) + s(−o)) − s(0), of scores × 100 at "
    "strength o, with 95 % percentile bootstrap intervals over the same questions. *random directions*: the "
    "smallest and the largest gain, and how many of them gain less than the method. *KL(base ‖ stream)*: of "
    "the forward pass that the direction acts in, on neutral text, nats a token; random directions are "
    "scaled to have it, too."
)


def decompose(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Sequence[str],
    controls: Mapping[str, "Controls"],
    *,
    base: str,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Every controlled method's gains and their parts, times 100, by metric.

    Args:
        records: every method's records, item by item, controls included.
        metrics: names of fields of the records.
        controls: the methods' control runs.
        base: label of base mode.
        seed: seed of the bootstrap.
    """
    return {
        label: {
            metric: _parts(
                {name: values_of(records[name], metric) for name in (base, label, *runs.labels())},
                label,
                runs,
                base,
                seed,
            )
            for metric in metrics
        }
        for label, runs in controls.items()
    }


def _parts(
    values: Mapping[str, np.ndarray], label: str, runs: "Controls", base: str, seed: int
) -> dict[str, Any]:
    zero, plus, minus = values[base], values[label], values[runs.flip]
    by_item = {"gain": plus - zero, "odd": (plus - minus) / 2, "even": (plus + minus) / 2 - zero}
    parts = {name: stats.mean(each, seed=seed).scaled(100) for name, each in by_item.items()}
    parts["noise"] = [stats.mean(values[name] - zero, seed=seed).scaled(100)["value"] for name in runs.noise]
    if runs.placebo:
        parts["placebo"] = stats.mean(values[runs.placebo] - zero, seed=seed).scaled(100)
    return parts


def table(results: Mapping[str, Any], heads: Mapping[str, str]) -> Table:
    """Gains, their parts and those of random directions.

    Args:
        results: a `results.json` with `controls`.
        heads: names of the metrics.
    """
    controls = results["controls"]
    has_placebo = any("placebo" in parts for each in controls.values() for parts in each["metrics"].values())
    rows = []
    for label, each in controls.items():
        kl = DASH if label not in each["kl"] else figure(each["kl"][label])
        random_kl = [each["kl"][name] for name in each["noise"] if name in each["kl"]]
        for metric, head in heads.items():
            parts = each["metrics"][metric]
            placebo = _estimate(parts["placebo"]) if "placebo" in parts else DASH
            cells = [_estimate(parts[name]) for name in PARTS]
            cells += [_spread(parts), *([placebo] if has_placebo else []), kl, _range(random_kl, figure)]
            rows.append((label, head, *cells))
    columns = [
        "method",
        "metric",
        *PARTS.values(),
        "random directions",
        *(["placebo"] if has_placebo else []),
    ]
    columns += ["KL(base ‖ stream)", "of random ones"]
    return Table(f"{TITLE}: points over base [95 % interval]", tuple(columns), tuple(rows))


def sentences(results: Mapping[str, Any], heads: Mapping[str, str]) -> list[str]:
    """What each method's direction brings, in words."""
    lines = []
    for label, each in results["controls"].items():
        for metric, head in heads.items():
            parts = each["metrics"][metric]
            if parts["gain"]["value"] is None:
                continue
            gain, odd = parts["gain"]["value"], _estimate(parts["odd"])
            line = f"{label}, {head}: of {gain:+.2f} points, {odd} are the direction's"
            if parts["noise"]:
                line += f"; random directions of its size gain {_spread(parts)}"
            if "placebo" in parts:
                line += f"; the placebo gains {_estimate(parts['placebo'])}"
            lines.append(f"{line}.")
    return lines


def dial(results: Mapping[str, Any], heads: Mapping[str, str], title: str) -> dict[str, "Figure"]:
    """Scores over the units' strength, with the band of random directions; nothing for other methods.

    Args:
        results: a `results.json` with `controls`.
        heads: names of the metrics.
        title: one line.
    """
    learned: dict[float, Any] = {}
    noise: dict[float, list[Any]] = {}
    runs = [run for each in results["controls"].values() for run in each["runs"].values()]
    for run in [*results["methods"].values(), *runs]:
        settings = run["settings"]
        if settings["name"] != "imae" or "units_from" in settings:
            continue
        strength = settings["strength"]
        if "noise" in settings:
            noise.setdefault(strength, []).append(run)
        else:
            learned.setdefault(strength, run)
    if len(learned) < 3:
        return {}
    return {"strengths": plots.strengths(title, learned, noise, heads)}


def _estimate(mean: Mapping[str, Any]) -> Estimate:
    return Estimate(mean["value"], mean["interval"], sign=True)


def _spread(parts: Mapping[str, Any]) -> str:
    """`+0.1 … +1.9, 5 of 5 below`: gains of random directions, and how many the method exceeds."""
    gains = [gain for gain in parts["noise"] if gain is not None]
    if not gains:
        return DASH
    below = sum(gain < parts["gain"]["value"] for gain in gains)
    return f"{_range(gains, '{:+.2f}'.format)}, {below} of {len(gains)} less"


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
    return f"{form(min(values))} … {form(max(values))}" if values else DASH
