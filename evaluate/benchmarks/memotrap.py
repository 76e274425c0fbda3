"""MemoTrap: does a model follow an instruction where a well-known text ends otherwise?

Source: Liu and Liu, "The MemoTrap Dataset", 2023, https://github.com/liujch1998/memo-trap, a task of the
Inverse Scaling Prize. Scored as the task `inverse_scaling_memo_trap` of lm-evaluation-harness 0.4 scores
its rows: `sum` is its acc, `per_character` its acc_norm.
"""

import ast
from collections import Counter
from typing import ClassVar

from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.benchmark import Item
from imae_jax.evaluate.benchmarks.multiple_choice import ChoiceBenchmark
from imae_jax.evaluate.benchmarks.published import Published, check_row
from imae_jax.evaluate.reporting.tables import Table, number
from imae_jax.files import read_csv


class MemoTrap(ChoiceBenchmark):
    name = "memotrap"
    title = "MemoTrap"
    description = "MemoTrap: whether an instruction is followed where a known text ends otherwise"
    note = "Share of prompts whose required ending scores above the memorized one."
    protocols = (
        Published(
            name="memotrap-v1",
            sha256="e85787c2b45d7c7d9807cd1df65ca000406d4dd0b20a014e90ba2a39fdbee690",
            rows=2539,
            source="https://github.com/liujch1998/memo-trap (the folder with its CSV files)",
        ),
    )
    columns: ClassVar = {"prompt": str, "classes": str, "answer_index": str}
    rules: ClassVar = {"chosen": "the class with the highest score, put behind the prompt as it is"}

    def read(self, path):
        """The rows of all CSV files of a folder, or of one file, each with its task."""
        files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
        rows = [
            (place, row | {"task": file.stem}) for file in files for place, row in read_csv(file, "data file")
        ]
        return rows, b"".join(file.read_bytes() for file in files)

    def items(self, protocol, rows, args):
        """The first rows of every task come first, so that --limit takes as many of each."""
        items, seen = {}, Counter()
        for i, (place, row) in enumerate(rows):
            try:
                classes, right = ast.literal_eval(row["classes"]), int(row["answer_index"])
            except (SyntaxError, ValueError) as error:
                raise UserError(f"{place}: give a list as classes, and a number as answer_index") from error
            check_row(place, {"classes": classes}, {"classes": list}, protocol.source)
            if len(classes) < 2:
                raise UserError(f"{place} has only one class, nothing to choose from: remove the row")
            if not 0 <= right < len(classes):
                raise UserError(f"{place}: answer_index {right} is not one of {len(classes)} classes: fix it")
            item = Item(i, row["prompt"], row["prompt"], tuple(classes), data=(right, row["task"]))
            items[seen[row["task"]], i] = item
            seen[row["task"]] += 1
        return [items[order] for order in sorted(items)]

    def metrics(self, protocol):
        return "sum", "per_character"

    def tables(self, results):
        """Also the accuracy of every task."""
        heads, methods = self.shown_heads(results), results["methods"]
        rows = [
            (label, task, each["n"], *(number(each.get(metric)) for metric in heads))
            for label, row in methods.items()
            for task, each in row["by_category"].items()
        ]
        table = Table("By task", ("method", "task", "N", *heads.values()), tuple(rows))
        first, *others = super().tables(results)
        return [first, table, *others]


BENCHMARK = MemoTrap()
