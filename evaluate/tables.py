"""Tables for the terminal, Markdown and LaTeX."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

# Also what a LaTeX without Unicode fonts lacks.
IN_LATEX = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": "$<$", ">": "$>$", "|": r"$\vert$", "–": "--", "−": "$-$"}
    | {"Δ": r"$\Delta$", "‖": r"$\Vert$", "×": r"$\times$", "→": r"$\to$"}
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of text; the first column is left-aligned, the others right.

    Attributes:
        title: one line.
        columns: heads.
        rows: of as many cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Any:
        """Without its title, which rich would break at the table's width."""
        from rich.table import Table as RichTable
        from rich.text import Text

        # Text, since a label may hold what rich would read as markup.
        table = RichTable()
        for number, column in enumerate(self.columns):
            table.add_column(Text(column), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
        return f"**{self.title}**\n\n" + "".join(f"| {line} |\n" for line in cells)

    def latex(self) -> str:
        """A `table` environment; needs booktabs."""
        head, *rows = (" & ".join(map(_escape, line)) + " \\\\" for line in (self.columns, *self.rows))
        alignment = "l" + "r" * (len(self.columns) - 1)
        return "\n".join(
            [
                "\\begin{table}",
                f"\\caption{{{_escape(self.title)}}}",
                f"\\begin{{tabular}}{{{alignment}}}",
                "\\toprule",
                head,
                "\\midrule",
                *rows,
                "\\bottomrule",
                "\\end{tabular}",
                "\\end{table}",
                "",
            ]
        )


def _escape(text: str) -> str:
    return text.translate(IN_LATEX)


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
    return "–" if value is None else f"{value:.{digits}f}"


def figure(value: float | str | None) -> str:
    """A figure of a `results.json`, where None is NaN and an infinity a text."""
    value = math.nan if value is None else float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    return number(value, 3) if value < 1e5 else f"{value:.1e}"


def with_interval(value: float | None, interval: Sequence[float] | None, *, sign: bool = False) -> str:
    """`36.96 [33.66, 40.27]`."""
    if value is None:
        return "–"
    form = "+.2f" if sign else ".2f"
    shown = f"{value:{form}}"
    return shown if interval is None else f"{shown} [{interval[0]:{form}}, {interval[1]:{form}}]"


def p_value(p: float) -> str:
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"
