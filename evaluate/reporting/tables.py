"""Tables for the terminal and Markdown, with the figures that stand in them."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

DASH = "–"
# What Markdown would take for the border of a cell, a tag or an entity.
SPECIAL = re.compile(r"\||<(?=[A-Za-z/!?])|&(?=#?\w+;)")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A cell such as `36.96 [33.66, 40.27]`.

    Attributes:
        value: mean or difference; None where there is none.
        interval: lower and upper bound.
        sign: whether positive numbers are shown with a sign.
    """

    value: float | None
    interval: Sequence[float] | None = None
    sign: bool = False

    def __str__(self) -> str:
        if self.value is None:
            return DASH
        form = "+z.2f" if self.sign else "z.2f"  # z: no -0.00
        if self.interval is None:
            return f"{self.value:{form}}"
        low, high = self.interval
        return f"{self.value:{form}} [{low:{form}}, {high:{form}}]"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells are shown by their `str`; the first column is left-aligned, the others right.

    Attributes:
        title: title, one line.
        columns: heads of the columns.
        rows: cells of every row; a single cell is the heading of the rows below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def rich(self) -> Any:
        """Without its title, which rich would break at the table's width."""
        from rich.table import Table as RichTable
        from rich.text import Text

        # Text, since a label may hold what rich would read as markup.
        table = RichTable()
        for number, column in enumerate(self.columns):
            table.add_column(Text(column), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        return table

    def markdown(self) -> str:
        lines = [" | ".join(self.columns), " | ".join(["---", *["---:"] * (len(self.columns) - 1)])]
        for row in self.rows:
            cells = [_escape(str(cell)) for cell in row]
            if len(cells) < len(self.columns):
                cells = [f"**{cells[0]}**", *[""] * (len(self.columns) - 1)]
            lines.append(" | ".join(cells))
        return f"**{_escape(self.title)}**\n\n" + "".join(f"| {line} |\n" for line in lines)


def _escape(text: str) -> str:
    return SPECIAL.sub(r"\\\g<0>", text)


def stack(title: str, tables: Mapping[str, Table]) -> Table:
    """Tables with the same columns as one, each below its label."""
    columns = next(iter(tables.values())).columns
    return Table(title, columns, tuple(row for label, t in tables.items() for row in ((label,), *t.rows)))


def show(tables: Sequence[Table]) -> None:
    """Prints tables; not cut to 80 columns where the output is no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for table in tables:
        console.print(Text(table.title, style="italic"), soft_wrap=True)
        console.print(table.rich())


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return DASH if value is None else f"{value:.{digits}f}"


def figure(value: float | str | None) -> str:
    """A figure of a `results.json`, where None is NaN and an infinity a text."""
    value = math.nan if value is None else float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    return number(value, 3) if value < 1e5 else f"{value:.1e}"


def p_value(p: float) -> str:
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"
