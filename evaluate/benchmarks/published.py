"""Benchmarks whose data are a published file that a protocol pins by its hash.

The data are not part of this package: `--data` names the file. Another file is refused, or with
`--any-data` used under a name that says so.
"""

import abc
import argparse
import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Task
from imae_jax.files import read_csv, read_rows

logger = logging.getLogger(__name__)

Rows = Sequence[tuple[str, Any]]
SURROGATE = re.compile("[\ud800-\udfff]")
KINDS = {str: "a text", list: "a list of texts", bool: "true or false", int: "a number"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A protocol: all that a score depends on besides model and method.

    Attributes:
        name: name with its version; any change of what follows gets a new one.
        sha256: hash of the data file; of several, hash of their bytes, one after the other by name.
        rows: number of rows of the data.
        source: place where the data are published.
        form: form of the benchmark, where it has several.
    """

    name: str
    sha256: str
    rows: int
    source: str
    form: str = ""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A protocol with its data, read before the model is loaded.

    Attributes:
        protocol: questions, and how they are asked.
        label: name of the protocol, marked where the data are not the ones that it pins.
        items: all items of the data.
        settings: identity of the data, for `run.json` and `results.json`.
        details: further fields of `results.json`.
    """

    protocol: Any
    label: str
    items: Sequence[Item]
    settings: Mapping[str, Any]
    details: Mapping[str, Any]


class PublishedBenchmark(Benchmark):
    """A benchmark on a published file.

    Attributes:
        protocols: protocols of the benchmark, the default first.
        columns: fields that must not be empty in any row, with their types.
        rules: how answers are scored, in words, for `results.json`.
    """

    protocols: ClassVar[tuple[Published, ...]]
    columns: ClassVar[Mapping[str, type]]
    rules: ClassVar[Mapping[str, str]] = {}

    def add_arguments(self, parser):
        names, sources = (
            dict.fromkeys(getattr(each, field) for each in self.protocols) for field in ("name", "source")
        )
        parser.add_argument("--data", required=True, type=Path, help=f"data file of {', '.join(sources)}")
        parser.add_argument(
            "--protocol", choices=tuple(names), default=next(iter(names)), help="(default: %(default)s)"
        )
        parser.add_argument("--any-data", action="store_true", help="accept data that are not the protocol's")

    def read(self, path: Path) -> tuple[Rows, bytes]:
        """The rows of the data with their places, and the bytes that are hashed."""
        rows = read_csv(path, "data file") if path.suffix == ".csv" else read_rows(path, "data file")
        return rows, path.read_bytes()

    @abc.abstractmethod
    def items(self, protocol: Any, rows: Rows, args: argparse.Namespace) -> list[Item]:
        """The items of the data, whose rows hold `columns`."""

    def fields(self, protocol: Any) -> Mapping[str, type]:
        """The fields that a protocol needs."""
        return self.columns

    def load(self, args, methods):
        protocol = next(each for each in self.protocols if each.name == args.protocol)
        rows, content = self.read(args.data)
        if not rows:
            raise UserError(f"{args.data} holds no rows: give the data file of {protocol.source}")
        sha256, label = hashlib.sha256(content).hexdigest(), protocol.name
        other = next((each.name for each in self.protocols if each.sha256 == sha256), None)
        if other is not None and sha256 != protocol.sha256:
            raise UserError(f"{args.data} is not the file of {label}: pass --protocol {other}, whose it is")
        for place, row in rows:
            check_row(place, row, self.fields(protocol), protocol.source)
        if sha256 != protocol.sha256:
            objection = self.objection(protocol, args.data, sha256, len(rows))
            if not args.any_data:
                raise UserError(f"{objection}: pass --any-data to use it, and the results say so")
            logger.warning("%s; the results say so", objection)
            label = f"{label}+data-{sha256[:8]}"
        items = self.items(protocol, rows, args)
        if not items:
            raise UserError(f"{args.data} holds nothing to ask by {label}: give a file with more rows")
        settings = {"data": {"path": str(args.data), "sha256": sha256, "rows": len(rows)}}
        details = {"protocol_details": {**dataclasses.asdict(protocol), **self.rules}}
        return Inputs(protocol, label, items, settings, details)

    def objection(self, protocol: Published, path: Path, sha256: str, rows: int) -> str:
        """How a file differs from the one that a protocol pins."""
        found = f"{path} has SHA-256 {sha256[:8]} and {rows} rows"
        pinned = f"{protocol.name} is of {protocol.sha256[:8]} with {protocol.rows}"
        return f"{found}, {pinned}"

    def task(self, args, inputs, lm):
        return Task(
            inputs.label,
            inputs.items,
            inputs.settings,
            self.metrics(inputs.protocol),
            details=inputs.details,
            options=self.options(inputs.protocol, args),
        )

    def metrics(self, protocol: Any) -> tuple[str, ...]:
        """Names of a protocol's metrics."""
        return tuple(self.heads)

    def options(self, protocol: Any, args: argparse.Namespace) -> dict[str, Any]:
        """See `Task.options`."""
        return {}


def check_row(place: str, row: Any, fields: Mapping[str, type], source: str) -> None:
    """Raises a `UserError` where a row lacks a field, or where it is of another type or empty."""
    for name, kind in fields.items():
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, kind):
            raise UserError(f"{place} has no {name!r} that is {KINDS[kind]}: give the data file of {source}")
        texts = value if kind is list else [value]
        if not texts or any(isinstance(text, str) and not text.strip() for text in texts):
            raise UserError(f"{place} has an empty {name!r}: fill it, or remove the row")
        if kind is list and not all(isinstance(text, str) for text in texts):
            raise UserError(f"{place} has in {name!r} what is no text: give the data file of {source}")
        if any(isinstance(text, str) and SURROGATE.search(text) for text in texts):
            raise UserError(f"{place} has half of a character (a lone surrogate) in {name!r}: fix the row")
