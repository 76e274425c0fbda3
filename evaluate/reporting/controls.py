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
PARTS = {"gain": "gain over base", "odd": "the direction's", "even": "any change's", "flip": "sign reversed"}
OTHERS = {
    "noise": "random directions of its size gain",
    "twins": "with other training seeds",
    "placebo": "the placebo gains",
}
NOTE = (
    "*the direction's*: ½ (s(o) − s(−o)), *any change's*: ½ (s(o) + s(−o)) − s(0), of scores × 100 at "
    "strength o, with 95 % percentile bootstrap intervals over the same questions; of contrasts only at "
    "β = 2, where base mode lies between both signs. *sign reversed*, *random directions*, *twins* (other "
    "training seeds) and *placebo*: their own gains over base; of several the smallest and the largest, and "
    "how many are less than the method's. *KL*: KL(base ‖ stream) on neutral text, nats a token, of the "
    "forward pass that the direction acts in: of the method / with its sign reversed / of random directions, "
    "which are scaled to have the first."
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
    by_item = {"gain": plus - zero, "flip": minus - zero}
    if runs.centred:
        defined = np.where(np.isnan(zero + plus + minus), np.nan, 1.0)
        by_item["gain"] = by_item["gain"] * defined
        by_item |= {"odd": (plus - minus) / 2 * defined, "even": ((plus + minus) / 2 - zero) * defined}
    if runs.placebo:
        by_item["placebo"] = values[runs.placebo] - zero
    parts = {name: stats.mean(each, seed=seed).scaled(100) for name, each in by_item.items()}
    for name in ("noise", "twins"):
        gains = [values[run] - zero for run in getattr(runs, name)]
        parts[name] = [100 * float(np.nanmean(gain)) for gain in gains if not np.isnan(gain).all()]
    return parts


def table(results: Mapping[str, Any], heads: Mapping[str, str]) -> Table:
    """Gains, their parts and those of other controls.

    Args:
        results: a `results.json` with `controls`.
        heads: names of the metrics.
    """
    optional = {"noise": "random directions", "twins": "twins", "placebo": "placebo"}
    every = [parts for each in results["controls"].values() for parts in each["metrics"].values()]
    optional = {name: head for name, head in optional.items() if any(parts.get(name) for parts in every)}
    rows = []
    for label, each in results["controls"].items():
        kl = each["kl"]
        sizes = [figure(kl[name]) if name in kl else DASH for name in (label, each["flip"])]
        sizes.append(_range([kl[name] for name in each["noise"] if name in kl], figure))
        for metric, head in heads.items():
            parts = each["metrics"][metric]
            cells = [_estimate(parts[name]) if name in parts else DASH for name in PARTS]
            cells += [_other(parts, name) for name in optional]
            rows.append((label, head, *cells, " / ".join(sizes)))
    columns = ("method", "metric", *PARTS.values(), *optional.values(), "KL: method / reversed / random")
    return Table(f"{TITLE}: points over base [95 % interval]", columns, tuple(rows))


def sentences(results: Mapping[str, Any], heads: Mapping[str, str]) -> list[str]:
    """What each method's direction brings, in words."""
    lines = []
    for label, each in results["controls"].items():
        for metric, head in heads.items():
            parts = each["metrics"][metric]
            if parts["gain"]["value"] is None:
                continue
            if "odd" in parts:
                gain, odd = parts["gain"]["value"], _estimate(parts["odd"])
                line = f"{label}, {head}: of {gain:+z.2f} points, {odd} are the direction's"
            else:
                gain, flip = (_estimate(parts[name]) for name in ("gain", "flip"))
                line = f"{label}, {head}: {gain} points over base, {flip} with its sign reversed"
            for name, words in OTHERS.items():
                if parts.get(name):
                    line += f"; {words} {_other(parts, name)}"
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


def _other(parts: Mapping[str, Any], name: str) -> Estimate | str:
    """The placebo's gain; of several runs `+0.1 … +1.9, 5 of 5 less`: how many the method exceeds."""
    if not parts.get(name):
        return DASH
    if name == "placebo":
        return _estimate(parts[name])
    below = sum(gain < parts["gain"]["value"] for gain in parts[name])
    return f"{_range(parts[name], '{:+z.2f}'.format)}, {below} of {len(parts[name])} less"


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
    return f"{form(min(values))} … {form(max(values))}" if values else DASH
