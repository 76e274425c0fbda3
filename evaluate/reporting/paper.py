"""The paper's published results, beside which a report shows runs."""

from collections.abc import Mapping
from typing import Any

from imae_jax.evaluate.benchmarks.questions import DATA_DIRECTORY
from imae_jax.evaluate.reporting.document import Section, warning
from imae_jax.evaluate.reporting.tables import DASH, Table, number, stack
from imae_jax.files import read_json

PAPER_FILE = DATA_DIRECTORY / "paper_results.json"
NOTE = (
    "Published figures, on other models and hardware and with other training than the runs of this "
    "report: not to be compared with them as equals. What can be held against each other is how far a method "
    "moves its own base. Source: {}."
)


def results() -> dict[str, Any]:
    return read_json(PAPER_FILE)


def note() -> str:
    return warning(NOTE.format(results()["source"]))


def truthfulqa_section(heads: Mapping[str, str]) -> Section:
    """The paper's TruthfulQA scores; `heads` are the names of the metrics."""
    published, models = results()["truthfulqa"], {}
    columns = [heads[metric] for metric in published["metrics"]]
    columns = ("method", *columns, *(f"Δ {head}" for head in columns))
    for model, methods in published["models"].items():
        rows = [
            (
                name,
                *map(number, values),
                *(
                    DASH if name == "base" else f"{value - base:+.2f}"
                    for value, base in zip(values, methods["base"], strict=True)
                ),
            )
            for name, values in methods.items()
        ]
        models[model] = Table("", columns, tuple(rows))
    table = stack("As published; Δ is the difference to base of these figures", models)
    return Section("The paper's results on TruthfulQA, on other models", (note(), table), level=3)


def cost_section() -> Section:
    """The paper's memory and time of decoding."""
    cost = results()["cost"]
    rows = tuple((name, *cells) for name, cells in cost["methods"].items())
    table = Table("As published", ("method", *cost["columns"]), rows)
    return Section("The paper's cost", (note(), cost["note"], table), level=3)
