"""The pieces of a Markdown page, sections of tables, pictures and paragraphs, and the runs that they show."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imae_jax.evaluate.reporting.tables import Table

# Plots that come last, in this order.
LAST_PLOTS = ("differences", "categories")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file beside the page.

    Attributes:
        name: name of the file.
        caption: caption, one line.
        png: contents of the file.
    """

    name: str
    caption: str
    png: bytes

    def markdown(self) -> str:
        caption = html.escape(self.caption, quote=False).replace("]", "\\]")
        return f"![{caption}]({self.name})\n"


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it: tables, pictures, paragraphs of Markdown."""

    title: str
    blocks: Sequence[Table | Picture | str] = ()
    level: int = 2

    def markdown(self) -> str:
        blocks = (f"{block}\n" if isinstance(block, str) else block.markdown() for block in self.blocks)
        return "\n".join([f"{'#' * self.level} {html.escape(self.title, quote=False)}\n", *blocks])


def warning(text: str) -> str:
    """A paragraph on what takes something from the figures' worth."""
    return f"**Note:** {html.escape(text, quote=False)}"


def facts(title: str, values: Mapping[str, str]) -> str:
    """Names with their values, folded up."""
    lines = "".join(
        f"<dt>{html.escape(name, quote=False)}</dt><dd><code>{html.escape(value, quote=False)}</code></dd>\n"
        for name, value in values.items()
    )
    title = html.escape(title, quote=False)
    return f"<details><summary>{title}</summary>\n<dl>\n{lines}</dl>\n</details>"


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run in a report.

    Attributes:
        number: number among the runs of the report, from 1.
        path: directory of the run.
        kind: a `Benchmark`, or `Comparison`, `Harness`, `Cost` or `Training`.
        results: contents of `results.json`, or what `kind.read` made of the directory.
    """

    number: int
    path: Path
    kind: Any
    results: Mapping[str, Any]

    def label(self) -> str:
        """The heading of the run's rows in tables."""
        return f"{self.results['model']} ({self.results['dtype']}), run {self.number}"

    def pictures(self) -> list[Picture]:
        """The plots of the run."""

        def order(path: Path) -> tuple[int, Path]:
            return max((i + 1 for i, name in enumerate(LAST_PLOTS) if name in path.stem), default=0), path

        return [
            Picture(
                f"{self.number}-{path.name}",
                f"Run {self.number}, {self.results['model']}: {path.stem.replace('-', ' ')}",
                path.read_bytes(),
            )
            for path in sorted(self.path.glob("*.png"), key=order)
        ]
