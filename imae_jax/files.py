"""Reading what users give, and writing results so that nothing half-written stays behind."""

import contextlib
import csv
import dataclasses
import fnmatch
import gzip
import io
import json
import logging
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from imae_jax.errors import UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike, *, marker: str, contents: Sequence[str] = ("*",), overwrite: bool = False
) -> Iterator[Path]:
    """Yields a temporary directory beside `path` that becomes `path` when the block succeeds.

    Of several processes the main one makes it; what the others write is thrown away.

    On an error, Ctrl-C or (in commands) SIGTERM nothing is left, and an existing `path` stays as it was.

    Args:
        path: the directory to make.
        marker: a file that the result will hold; `overwrite` replaces a directory only if it is empty or
            holds this file, and nothing besides `contents`.
        contents: patterns of the names that such a result can have; `*` where its marker is name enough.
        overwrite: replace an existing result.

    Raises:
        UserError: `path` exists and may not be replaced, or it cannot be written.
    """
    from imae_jax.distributed import is_main

    path = Path(path)
    check_new_directory(path, marker=marker, contents=contents, overwrite=overwrite)
    if not is_main():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        # mkdtemp makes private directories; results are as readable as the user's other files.
        temporary.chmod(0o777 & ~_umask())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        if path.exists():
            _replace(path, temporary)
        else:
            os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
        raise


def check_new_directory(
    path: str | os.PathLike, *, marker: str, contents: Sequence[str] = ("*",), overwrite: bool = False
) -> None:
    """Refuses what `new_directory` would refuse, for commands that compute before they write."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another output, or pass --overwrite")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a directory: choose another output")
    if path.exists() and not (path / marker).exists() and any(path.iterdir()):
        raise UserError(
            f"{path} holds no {marker}, so it is not a result of this command: choose another output"
        )
    names = sorted(entry.name for entry in path.iterdir()) if path.exists() else ()
    foreign = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in contents)]
    if foreign:
        raise UserError(
            f"{path} holds {foreign[0]}, which this command does not write: choose another output, or move it"
        )
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path} cannot be written in {parent}: choose another output")


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes that lock the same output from writing to it.

    The lock is the operating system's and ends with its process, however that ends. Its file lies beside the
    output under a hidden name and is removed. Where a file system knows no locks, a warning says so.

    Raises:
        UserError: another process holds the lock, or there can be no output in its place.
    """
    path = Path(path).resolve()
    file = path.parent / f".{path.name}.lock"
    missing = [parent for parent in file.parents if not parent.exists()]
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Where nothing can be written, more is missing than locks. A mount point alone may be writable.
        inside = path.is_dir() and not os.access(file.parent, os.W_OK)
        with tempfile.TemporaryFile(dir=path if inside else file.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written in {file.parent}: choose another output") from error
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{path} is being written by another process: wait for its end, or choose another output"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        logger.warning("%s cannot be locked (%s): see that no other process writes to it", path, reason)
    try:
        yield
    finally:
        if lock.is_locked:
            # While the lock is held: then the file is not another's yet.
            with contextlib.suppress(OSError):
                file.unlink()
            lock.release()
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


def read_text(path: str | os.PathLike, name: str) -> str:
    """The contents of a UTF-8 text file, without a byte-order mark.

    Args:
        path: path of the file, compressed by gzip where it ends in `.gz`.
        name: what it is, for the error.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if Path(path).suffix == ".gz":
            return gzip.decompress(Path(path).read_bytes()).decode("utf-8-sig")
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{name} {path} cannot be read ({getattr(error, 'strerror', None) or error}): give a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} {path} cannot be read as UTF-8: give a text file in UTF-8") from error


def read_rows(path: str | os.PathLike, name: str) -> list[tuple[str, Any]]:
    """The values of a JSONL file, or of a JSON list, each with its place for errors.

    Args:
        path, name: as in `read_text`.

    Raises:
        UserError: it cannot be read, or names what is not JSON.
    """
    text = read_text(path, name)
    try:
        if text.lstrip().startswith("["):
            return [(f"{path} row {i}", value) for i, value in enumerate(json.loads(text))]
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        location = f"{path} line {number}"
        try:
            rows += [(location, json.loads(line))] if line.strip() else []
        except ValueError as error:
            raise UserError(f"{location} is not JSON: {error}") from error
    return rows


def read_csv(path: str | os.PathLike, name: str) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file with a header line, each with its place for errors; see `read_rows`.

    A line with another number of fields is refused: a comma that is not quoted moves the cells behind it.
    """
    reader, rows = csv.reader(io.StringIO(read_text(path, name), newline=""), strict=True), []
    try:
        header = next(reader, [])
        for cells in filter(None, reader):
            location = f"{path} line {reader.line_num}"
            if len(cells) != len(header):
                raise UserError(
                    f"{location} has {len(cells)} fields, the header {len(header)} ({', '.join(header)}): "
                    "quote what holds a comma, or fill the row"
                )
            rows.append((location, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not valid CSV: {error}") from error
    return rows


def _replace(path: Path, temporary: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.rename(path, old / "old")
        os.rename(temporary, path)
    except BaseException:
        if not path.exists():
            os.rename(old / "old", path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file under a temporary name, then renames it; of several processes the main one does."""
    from imae_jax.distributed import is_main

    if not is_main():
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """A JSON value of a kind (dict or list) from a file.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds another kind of value.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, kind):
        expected = {dict: "object", list: "list"}[kind]
        raise UserError(f"{path} must hold a JSON {expected}, not a {type(value).__name__}")
    return value


def jsonable(value: Any) -> Any:
    """Values that strict JSON can hold: NaN is None, an infinity the text "inf" or "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float | np.floating):
        value = float(value)
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def dumps(value: Any, **options: Any) -> str:
    """Strict JSON of any value that `jsonable` knows; options are those of `json.dumps`."""
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, **options)


@dataclasses.dataclass(frozen=True)
class Journal:
    """A JSONL file to which records are appended, so that a killed command can be resumed from it.

    Attributes:
        path: the file.
        fields: names and types that every record has; records begin with the first of them.
        damaged: end of the error about a line that is no such record; may name its `{number}`.
    """

    path: Path
    fields: Mapping[str, type]
    damaged: str

    def read(self) -> list[dict[str, Any]]:
        """All records, without a cut-off last line, which a kill leaves.

        Raises:
            UserError: the file cannot be read, or a line is no record.
        """
        return [self._record(line, number) for number, line in enumerate(self._lines(), 1)]

    def resume(self, keep: Callable[[dict[str, Any]], bool] = lambda record: True) -> list[dict[str, Any]]:
        """The records to keep; removes all else from the file, so that records can be appended."""
        kept = [
            (line, record) for line, record in zip(self._lines(), self.read(), strict=True) if keep(record)
        ]
        write_text(self.path, "".join(f"{line}\n" for line, _ in kept))
        return [record for _, record in kept]

    def _lines(self) -> list[str]:
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        # Not `splitlines`: a text may hold what else Unicode breaks lines at.
        *lines, last = data.split(b"\n")
        if last and not self._is_cut_off(last.decode(errors="replace")):
            lines.append(last)
        return [self._decoded(line, number) for number, line in enumerate(lines, 1)]

    def _decoded(self, line: bytes, number: int) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} {self.damaged.format(number=number)}") from error

    def append(self, *records: Mapping[str, Any]) -> None:
        """Writes records; of several processes the main one does."""
        from imae_jax.distributed import is_main

        if not is_main():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{dumps(record)}\n" for record in records)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def _is_cut_off(self, line: str) -> bool:
        start = f'{{"{next(iter(self.fields))}"'
        try:
            json.loads(line)
        except ValueError:
            return line.startswith(start) or start.startswith(line)
        return False

    def _record(self, line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if all(isinstance(record[name], kind) for name, kind in self.fields.items()):
                return record
            cause = None
        except (ValueError, KeyError, TypeError) as error:
            cause = error
        raise UserError(f"{self.path} {self.damaged.format(number=number)}") from cause
