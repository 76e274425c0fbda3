"""The fingerprint of weights: a digest over every tensor that is read, made while it is read.

It covers names, types as stored, shapes and contents, so that it is the same however tensors are spread over
files, and whatever lies beside them; for a base its config as well, since the same tensors compute something
else with another RoPE. The GGUF and the HuggingFace form of one model differ.
"""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

# Begins every digest: another way to make them gets another name.
FORM = "weights-v2:"
# Fields of configs that no computation with the weights depends on.
UNUSED_FIELDS = ("initializer_range",)
# Of a block, small enough for the processor's cache. They become columns in memory: whole cache lines.
BLOCK_ROWS = 64
# Settings that say where something lies, if a digest beside them says what it is.
PLACES = ("model", "reference", "revision", "path", "source")
PLACES += ("expert", "anti_expert", "amateur", "directions", "vectors", "units_from")  # those of methods
DIGESTS = ("fingerprint", "sha256", "base_model")


class TensorFiles(abc.ABC):
    """What all sources in files are: tensors come in blocks of rows, and are hashed on the way.

    XXH3 reads memory as fast as it can be read. It is no protection against somebody who wants two models to
    look the same.

    Attributes:
        location, dtype, shapes, dtypes: as in `hf.TensorSource`.
    """

    location: str
    dtype: np.dtype
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]

    def __init__(self):
        self._digests: dict[str, str] = {}

    @abc.abstractmethod
    def _blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """About `BLOCK_ROWS` rows at a time: their bytes as stored, uint8, and their values."""

    def _stored_dtype(self, name: str) -> str:
        return str(self.dtypes[name])

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The rows of a tensor in order, some at a time; a vector's values all at once."""
        digest = None if name in self._digests else xxhash.xxh3_128()
        for stored, block in self._blocks(name):
            if digest is not None:
                digest.update(stored)
            yield block
        if digest is not None:
            self._digests[name] = digest.hexdigest()

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        if not self.shapes[name]:
            return next(iter(self.blocks(name)))
        array, start = np.empty(self.shapes[name], self.dtypes[name]), 0
        for block in self.blocks(name):
            array[start : start + len(block)] = block
            start += len(block)
        return array

    def digest(self, name: str) -> str:
        """Type, shape and hash of a tensor, which is read unless it has been."""
        if name not in self._digests:
            for _ in self.blocks(name):
                pass
        return f"{self._stored_dtype(name)} {list(self.shapes[name])} {self._digests[name]}"

    def fingerprint(self, names: Iterable[str]) -> str:
        """The digest of these tensors; those that have not been read are read for it."""
        return fingerprint(f"{name} {self.digest(name)}" for name in names)


def fingerprint(lines: Iterable[str]) -> str:
    """The digest of lines in any order."""
    return FORM + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def config_line(config: Any) -> str:
    """A config as one line of those fields that are not at their defaults: new fields change no digest."""
    return json.dumps(_changed_fields(config), sort_keys=True)


def _changed_fields(config: Any) -> dict[str, Any]:
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in UNUSED_FIELDS and getattr(config, field.name) != field.default
    }
    return {
        name: _changed_fields(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
    }


def is_comparable(recorded: Any) -> bool:
    """Whether a recorded digest is of the form of this version's."""
    return isinstance(recorded, str) and recorded.startswith(FORM)


def note(recorded: Any) -> str:
    """What an error about another fingerprint adds where the recorded one is not comparable."""
    if is_comparable(recorded):
        return ""
    return " (recorded by an older version in a form that cannot be compared: go on with that version)"


def without_places(settings: Any) -> Any:
    """Recorded settings as they are compared: what they name is the same wherever it lies."""
    if not isinstance(settings, Mapping):
        return settings
    identified = any(settings.get(name) for name in DIGESTS)
    return {
        name: without_places(value)
        for name, value in settings.items()
        if not (identified and name in PLACES and isinstance(value, str | None))
    }
