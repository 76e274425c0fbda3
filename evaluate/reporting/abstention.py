"""Whether a method knows when it is wrong: its confidence in right answers against that in wrong ones.

A user who abstains below a threshold of confidence keeps right answers and drops wrong ones as well as the
area under the ROC curve says: 1 is perfect, 0.5 is chance. Intervals are DeLong's (DeLong et al., Biometrics
44, 1988), which take items as drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imae_jax import stats
from imae_jax.continuation import CONFIDENCE
from imae_jax.evaluate.reporting.aggregate import values_of
from imae_jax.evaluate.reporting.tables import Estimate, Table

TITLE = "Confidence in right against wrong answers: AUC × 100 [95 % interval]"
HEADS = {
    "max_probability": "largest probability",
    "margin": "margin",
    "entropy": "entropy, reversed",
}
NOTE = (
    "Area under the ROC curve × 100 of a method's confidence, its right answers against its wrong ones [95 % "
    "interval]; 50 is chance. Confidence is a mean over a written answer's tokens, or that of a choice among "
    "answers: the largest probability, its margin over the second, and the entropy."
)


def summarize(records: Sequence[Mapping[str, Any]], correct: str) -> dict[str, Any]:
    """The area under the ROC curve of every measure of confidence, times 100.

    Args:
        records: of one method, with the fields of `CONFIDENCE`, undefined where there is no answer.
        correct: field that is 1 for right answers and 0 for wrong ones.
    """
    right = values_of(records, correct)
    confidence = {name: values_of(records, name) * (-1 if name == "entropy" else 1) for name in CONFIDENCE}
    defined = ~np.isnan([right, *confidence.values()]).any(axis=0)
    is_right, is_wrong = defined & (right == 1), defined & (right == 0)
    areas = {name: stats.roc_area(each[is_right], each[is_wrong]) for name, each in confidence.items()}
    return {
        "right": int(is_right.sum()),
        "wrong": int(is_wrong.sum()),
        **{name: area.scaled(100) for name, area in areas.items()},
    }


def table(methods: Mapping[str, Any]) -> Table:
    """How well every method's confidence tells right from wrong.

    Args:
        methods: summaries by label, with `abstention` from `summarize`.
    """
    rows = []
    for label, row in methods.items():
        areas = row["abstention"]
        cells = (Estimate(areas[name]["value"], areas[name]["interval"]) for name in HEADS)
        rows.append((label, areas["right"], areas["wrong"], *cells))
    columns = ("method", "right", "wrong", *HEADS.values())
    return Table(TITLE, columns, tuple(rows))
