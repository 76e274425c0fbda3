"""The directory of a run:

run.json        what the scores depend on; a resumed run must have the same
scores.jsonl    a record for every item and method, written as soon as it is known
results.json    means, intervals and comparisons; written last
table.md        and plots
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imae_jax.convert.identity import note, without_places
from imae_jax.distributed import barrier, is_main
from imae_jax.errors import UserError
from imae_jax.evaluate.reporting.tables import Table
from imae_jax.evaluate.runner.identity import differences
from imae_jax.files import Journal, dumps, jsonable, new_directory, read_json, write_text

RUN_FILE, SCORES_FILE, RESULTS_FILE, MARKDOWN_FILE = "run.json", "scores.jsonl", "results.json", "table.md"
# Names of all files that runs have.
CONTENTS = (RUN_FILE, SCORES_FILE, RESULTS_FILE, "*.md", "*.png", "*.svg", "*.jsonl", "*.csv")
REQUIRED = ("benchmark", "protocol", "model", "dtype", "versions", "methods")


def marker(out: Path) -> str:
    """The file by which a run is recognized, finished or not."""
    return RESULTS_FILE if (out / RESULTS_FILE).exists() else RUN_FILE


class Run:
    """The directory of a run, new or resumed.

    Attributes:
        records: records of `scores.jsonl` by (method, index).
        resumed: number of records that were there before.

    Args:
        out: directory of the run.
        settings: everything that the scores depend on.
        resume: whether to resume the run in the directory.
        overwrite: whether to replace a run in the directory.

    Raises:
        UserError: OUT may not be replaced, belongs to other settings, or holds a damaged record.
    """

    def __init__(self, out: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool):
        self.out, self.records = out, {}
        self._journal = journal(out)
        settings = jsonable(settings)
        barrier("arguments checked")  # What one process makes, no other may take for an older run.
        if resume:
            self._check(settings)
            for record in self._journal.resume():
                self.records.setdefault((record["method"], record["index"]), record)
        elif is_main():
            self._check_replaced(settings["benchmark"])
            options = {"marker": marker(out), "contents": CONTENTS}
            with new_directory(out, **options, overwrite=overwrite) as new:
                (new / RUN_FILE).write_text(dumps(settings, indent=2) + "\n", encoding="utf-8")
                (new / SCORES_FILE).touch()
        barrier("run begins")
        self.resumed = len(self.records)

    def _check_replaced(self, benchmark: str) -> None:
        """Refuses to replace a run of another benchmark."""
        path = self.out / RUN_FILE
        before = read_json(path).get("benchmark", benchmark) if path.is_file() else benchmark
        if before != benchmark:
            raise UserError(f"{self.out} is a run of {before}, not of {benchmark}: choose another output")

    def _check(self, settings: dict[str, Any]) -> None:
        before = without_places(read_json(self.out / RUN_FILE))
        for name, old, new in differences(before, without_places(settings)):
            older = note(old) if name.endswith("fingerprint") else ""
            raise UserError(
                f"{self.out} was scored with another {name} ({old}, now {new}){older}: restore it, or choose "
                "another output"
            )

    def add(self, label: str, index: int, fields: Mapping[str, Any]) -> None:
        """Writes the record of a method and an item, which a kill cannot lose."""
        record = jsonable({"index": index, "method": label, **fields})
        self._journal.append(record)
        self.records[label, index] = record

    def of_method(self, label: str, index: Sequence[int]) -> list[dict[str, Any]]:
        """A method's records, in the order of the items."""
        return [self.records[label, i] for i in index]

    def finish(self, results: dict[str, Any], texts: Mapping[str, str], plots: Mapping[str, Any]) -> None:
        """Writes everything that a finished run has, `results.json` last.

        Args:
            results: contents of `results.json`.
            texts: contents of text files, by name.
            plots: matplotlib figures, by name of the file without its ending.
        """
        if is_main():
            for name, text in texts.items():
                write_text(self.out / name, text)
            write_plots(self.out, plots)
            write_text(self.out / RESULTS_FILE, dumps(results, indent=2) + "\n")


def journal(out: Path) -> Journal:
    """The records of a run."""
    fields = {"index": int, "method": str}
    return Journal(
        out / SCORES_FILE, fields, "line {number} is damaged: remove it, and it is scored again by --resume"
    )


def markdown(tables: Sequence[Table]) -> str:
    """Tables as the contents of `table.md`."""
    return "\n".join(table.markdown() for table in tables)


def write_plots(out: Path, plots: Mapping[str, Any]) -> None:
    """Writes figures by name as PNG and SVG."""
    for name, figure in plots.items():
        for suffix in ("png", "svg"):
            try:
                figure.savefig(out / f"{name}.{suffix}", dpi=150)
            except OSError as error:
                raise UserError(f"{out / name}.{suffix} cannot be written: {error.strerror}") from error


class Fields(dict):
    """A JSON object that names its file when it lacks a key."""

    def __init__(self, file: Path, name: str, values: Mapping[str, Any]):
        super().__init__(values)
        self._file, self._name = file, name

    def __or__(self, other: Mapping[str, Any]) -> "Fields":
        return Fields(self._file, self._name, {**self, **other})

    def __missing__(self, key: str) -> Any:
        raise UserError(
            f"{self._file} is of another form than expected ({self._name} has no {key}): make the run again"
        )


def with_file(value: Any, file: Path, name: str = "it") -> Any:
    """A JSON value whose objects are `Fields`."""
    if isinstance(value, dict):
        return Fields(file, name, {key: with_file(item, file, key) for key, item in value.items()})
    return [with_file(item, file, name) for item in value] if isinstance(value, list) else value


def read_fields(file: Path) -> Fields:
    """The object of a JSON file."""
    return with_file(read_json(file), file)


def read_run(path: Path, benchmark: str | None = None) -> dict[str, Any]:
    """A finished run's `results.json`.

    Raises:
        UserError: there is none, it is damaged, or its benchmark is another.
    """
    file = path / RESULTS_FILE
    if not file.is_file():
        unfinished = (path / RUN_FILE).is_file()
        state = "its run is unfinished: resume it with --resume" if unfinished else "give a finished run"
        raise UserError(f"{path} holds no {RESULTS_FILE}: {state}")
    results = read_fields(file)
    missing = [key for key in REQUIRED if key not in results]
    if missing or not results["methods"]:
        raise UserError(f"{file} lacks {', '.join(missing) or 'methods'}: evaluate again")
    if benchmark not in (None, results["benchmark"]):
        raise UserError(f"{path} is a run of {results['benchmark']}, not of {benchmark}: give another")
    return results


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a finished run's `scores.jsonl`."""
    file = path / SCORES_FILE
    if not file.is_file():
        raise UserError(f"{path} holds no {SCORES_FILE}: restore it, or evaluate again")
    return with_file(journal(path).read(), file, "a record")
