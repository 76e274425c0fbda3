"""Benchmarks that ask which of an item's answers a method scores highest."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from imae_jax.continuation import CONFIDENCE
from imae_jax.evaluate.benchmarks.published import PublishedBenchmark

HEADS = {"sum": "accuracy", "mean": "accuracy, per token", "per_character": "accuracy, per character"}


def choose(
    sums: Sequence[float], tokens: Sequence[int], characters: Sequence[int], right: int
) -> dict[str, float]:
    """Whether the right answer has the highest score, 0 or 1; NaN where a score is NaN or infinite.

    Of equal scores the first counts, as where published code takes an arg-max.

    Args:
        sums: summed scores of the answers.
        tokens, characters: numbers of tokens and characters of the answers.
        right: index of the right answer.
    """
    if not all(map(math.isfinite, sums)):
        return dict.fromkeys(HEADS, math.nan)
    scores = np.array(sums)
    each = {"sum": scores, "mean": scores / np.array(tokens), "per_character": scores / np.array(characters)}
    return {name: float(np.argmax(values) == right) for name, values in each.items()}


def confidence(scores: Sequence[float]) -> tuple[float, float, float]:
    """How sure the choice is, in the order of `CONFIDENCE`, from the distribution over the answers that
    scores make; NaN where a score is NaN or infinite."""
    if not all(map(math.isfinite, scores)):
        return (math.nan,) * len(CONFIDENCE)
    p = np.exp(np.array(scores) - max(scores))
    p /= p.sum()
    first, second, *_ = sorted(p.tolist(), reverse=True)
    return float(-np.sum(p * np.log(np.maximum(p, np.finfo(p.dtype).tiny)))), first, first - second


class ChoiceBenchmark(PublishedBenchmark):
    """Items have the index of their right answer and a category, or "", as `data`; and `mean` where the
    choice is by means over tokens alone."""

    correct = ("sum", "mean")
    heads: ClassVar = HEADS

    def chance(self, item):
        return dict.fromkeys(HEADS, 1 / len(item.answers))

    def record(self, item, output, tokenizer):
        right, category, *form = item.data
        sums = [float(np.sum(scores, dtype=np.float64)) for scores in output]
        tokens = [len(scores) for scores in output]
        chosen = choose(sums, tokens, [*map(len, item.answers)], right)
        scores = np.array(sums) / np.array(tokens) if form == ["mean"] else np.array(sums)
        return {
            "category": category,
            "scores": sums,
            "tokens": tokens,
            "right": right,
            **chosen,
            **dict(zip(CONFIDENCE, confidence(scores), strict=True)),
        }
