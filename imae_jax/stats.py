"""Intervals and tests of per-item scores: how sure a mean is, and whether two methods differ.

Intervals are percentile bootstraps over items: also defined where all values are equal, which BCa's
correction is not. A text's tokens depend on each other: there blocks of consecutive ones are drawn. Two
methods are compared on the items that both have a value for: the bootstrap is of the per-item differences,
and where values are 0 or 1 McNemar's test is exact. P-values are of single comparisons, not corrected for
their number.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES, CONFIDENCE = 10_000, 0.95
# Tokens, one or two sentences: what they share ends there, and short texts still have many blocks.
BLOCK_LENGTH = 32
# Numbers that a bootstrap draws at a time: 16 MB of float64.
DRAWN_AT_ONCE = 2_000_000


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean with its interval; None where no item has a value, an interval only from two items on.

    Attributes:
        value: the mean.
        interval: lower and upper bound.
        count: items with a value.
    """

    value: float | None
    interval: tuple[float, float] | None
    count: int

    def scaled(self, factor: float) -> dict[str, Any]:
        """As JSON, times a factor."""
        interval = self.interval and [factor * bound for bound in self.interval]
        value = None if self.value is None else factor * self.value
        return {"value": value, "interval": interval, "n": self.count}


def mean(values: Sequence[float], *, seed: int = 0) -> Mean:
    """The mean of all values that are not NaN, with a bootstrap interval over items."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return Mean(None, None, 0)
    return Mean(float(values.mean()), _interval((values,), np.mean, seed), len(values))


def mean_of_text(values: Sequence[float], *, seed: int = 0) -> Mean:
    """The mean of a text's tokens, with a bootstrap interval over blocks of `BLOCK_LENGTH` tokens.

    Neighbouring tokens are alike (a hard passage is hard for many of them), so that an interval over single
    tokens would be too narrow. Source: Carlstein, Annals of Statistics 14 (1986), on blocks that do not
    overlap.

    If a value is NaN or infinite, so is the mean, and there is no interval.
    """
    values = np.asarray(values, np.float64)
    value = float(values.mean())
    starts = np.arange(0, len(values), BLOCK_LENGTH)
    if not np.isfinite(value):
        return Mean(value, None, len(values))
    # The last block may be shorter.
    blocks = ratio(np.add.reduceat(values, starts), np.diff([*starts, len(values)]), seed=seed)
    return Mean(value, blocks.interval, len(values))


def ratio(sums: Sequence[float], counts: Sequence[float], *, seed: int = 0) -> Mean:
    """The sum of `sums` over that of `counts`, with a bootstrap interval over items, which have both."""

    def ratio_of(sums, counts, axis):
        return sums.sum(axis) / counts.sum(axis)

    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    return Mean(float(sums.sum() / counts.sum()), _interval((sums, counts), ratio_of, seed), len(sums))


def _interval(data: tuple[np.ndarray, ...], statistic: Any, seed: int) -> tuple[float, float] | None:
    """The interval of a statistic of arrays whose items go together; None where there is one item alone."""
    if len(data[0]) == 1:
        return None
    from scipy.stats import bootstrap

    result = bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN_AT_ONCE // len(data[0])),
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return float(low), float(high)


def difference(values: Sequence[float], others: Sequence[float], *, seed: int = 0) -> Mean:
    """Mean of `values − others`, item by item, with a paired bootstrap interval; NaN in either leaves out."""
    return mean(np.asarray(values, np.float64) - np.asarray(others, np.float64), seed=seed)


def mcnemar(values: Sequence[float], others: Sequence[float]) -> dict[str, Any] | None:
    """McNemar's exact test of values that are 0 or 1; None for others.

    Returns:
        `gained`, items that are 1 in `values` alone, `lost`, those in `others` alone, and the two-sided p
        of the binomial test that both are equally likely.
    """
    values, others = np.asarray(values, np.float64), np.asarray(others, np.float64)
    both = ~np.isnan(values) & ~np.isnan(others)
    values, others = values[both], others[both]
    if not np.isin([*values, *others], (0.0, 1.0)).all():
        return None
    from scipy.stats import binomtest

    gained, lost = int(np.sum(values > others)), int(np.sum(values < others))
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "p": p}


def roc_area(right: Sequence[float], wrong: Sequence[float]) -> Mean:
    """Chance that a draw of `right` exceeds one of `wrong`, ties half, with DeLong's interval.

    None where either is empty; without an interval where either has one value alone.
    """
    right, wrong = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    count = len(right) + len(wrong)
    if not len(right) or not len(wrong):
        return Mean(None, None, count)
    wins = (right[:, None] > wrong) + 0.5 * (right[:, None] == wrong)
    value = float(wins.mean())
    if min(len(right), len(wrong)) == 1:
        return Mean(value, None, count)
    from scipy.stats import norm

    variance = sum(wins.mean(axis).var(ddof=1) / wins.shape[1 - axis] for axis in (0, 1))
    reach = float(norm.ppf(0.5 + CONFIDENCE / 2) * np.sqrt(variance))
    return Mean(value, (max(0.0, value - reach), min(1.0, value + reach)), count)


def length_auc(shorter: Sequence[int], longer: Sequence[int]) -> float:
    """Chance that a draw of `longer` exceeds one of `shorter`, ties half: 0.5 if lengths tell nothing."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(longer, shorter).statistic / (len(longer) * len(shorter)))


def describe_interval(units: str, seed: int) -> dict[str, Any]:
    """How intervals were made, to be written into results; `units` is what was drawn."""
    interval = f"percentile bootstrap over {units}, {RESAMPLES} resamples"
    return {"interval": interval, "confidence": CONFIDENCE, "seed": seed}


def describe(seed: int) -> dict[str, Any]:
    """How intervals and tests of items were made, to be written into results."""
    return describe_interval("items", seed) | {
        "difference": "paired bootstrap of per-item differences",
        "test": "McNemar's, exact binomial, two-sided, not corrected for several methods",
    }


def compare(
    metrics: Sequence[str],
    values: dict[str, Sequence[float]],
    others: dict[str, Sequence[float]],
    *,
    seed: int,
) -> dict[str, Any]:
    """`values − others` of every metric, times 100, and McNemar's test of those that are 0 or 1."""
    compared = {}
    for metric in metrics:
        compared[metric] = difference(values[metric], others[metric], seed=seed).scaled(100)
        test = mcnemar(values[metric], others[metric])
        if test is not None:
            compared[metric]["mcnemar"] = test
    return compared
