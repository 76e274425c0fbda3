"""Checkpoints of a stage: the trainable state and the step, never the frozen base."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from imae_jax.convert.identity import note
from imae_jax.errors import UserError, chain, first_line, is_out_of_memory
from imae_jax.train.step import TrainState

# How TensorStore's messages about data that are missing or wrong begin, and those about the way to the data.
# Its exceptions are plain ValueErrors, which Orbax wraps in others.
DAMAGED = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND")
OUT_OF_REACH = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")


class Checkpoints:
    """The checkpoints in a directory, the newest `keep` of them, written in the background.

    Orbax writes each under a temporary name, from all processes, and renames it when it is whole. With
    each goes an identity (what it belongs to) and a checksum of every array, computed on the devices.

    Args:
        directory: where the checkpoints are.
        keep: how many to keep.
        identity: strings by name, such as the base's fingerprint; a checkpoint of another identity is
            not loaded.
    """

    def __init__(self, directory: Path, keep: int, identity: dict[str, str]):
        self._directory = directory
        self._identity = identity
        self._checkpointer = ocp.training.Checkpointer(
            directory.resolve(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Numbers of steps done at the checkpoints, ascending."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, steps_done: int, state: TrainState) -> None:
        """Begins to write a checkpoint; the state may be donated as soon as this returns.

        Raises:
            UserError: this checkpoint, or the one before, cannot be written; older ones stay.
        """
        # Orbax skips a save without a word while another is under way.
        self.wait()
        if steps_done in self.steps:
            return
        metadata = {"identity": self._identity, "checksums": _checksums(state)}
        with self._writing():
            self._checkpointer.save_async(steps_done, vars(state), custom_metadata=metadata)

    def wait(self) -> None:
        """Until what `save` began is on the disk."""
        with self._writing():
            self._checkpointer.wait()

    def load(self, steps_done: int, shape: TrainState, shardings: TrainState) -> TrainState:
        """Reads a checkpoint straight into its shards.

        Args:
            steps_done: which.
            shape: as from `jax.eval_shape`.
            shardings: where its arrays go.

        Raises:
            UserError: it is damaged or out of reach, or belongs to another base, data set or configuration.
        """
        path = self._directory / str(steps_done)
        older = [step for step in self.steps if step < steps_done]
        way_out = f"--from-step {older[-1]} resumes from the one before" if older else "start over"
        abstract = jax.tree.map(
            lambda x, placement: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
            shape,
            shardings,
        )
        with _reading(path, way_out):
            metadata = self._checkpointer.metadata(steps_done).custom_metadata
        identity, checksums = _recorded(metadata, path, way_out)
        for name, expected in self._identity.items():
            if identity.get(name) != expected:
                earlier = note(identity.get(name)) if name == "base" else ""
                raise UserError(
                    f"checkpoint {path} belongs to another {name} ({identity.get(name)}, now {expected})"
                    f"{earlier}: restore it, or start over with another out"
                )
        with _reading(path, way_out):
            state = TrainState(**self._checkpointer.load(steps_done, vars(abstract)))
        _check(state, checksums, path, way_out)
        return state

    def delete_after(self, steps_done: int) -> None:
        """Removes checkpoints of later steps."""
        for step in self.steps:
            if step > steps_done:
                self._checkpointer.delete(step)

    def close(self) -> None:
        """Lets go of the directory; `wait` before, to know that all is written."""
        # What went wrong has been raised already, or an error is on its way that must not be replaced.
        with contextlib.suppress(Exception):
            self._checkpointer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what the file system objects to into a `UserError`."""
        try:
            yield
        except Exception as error:
            _, cause = _about_files(error)
            if cause is None:
                raise
            kept = f"; step {self.steps[-1]} is kept: resume with --resume" if self.steps else ""
            raise UserError(
                f"a checkpoint cannot be written to {self._directory}: {_message(cause)}{kept}"
            ) from error


def steps_in(directory: Path) -> list[int]:
    """Numbers of steps done at the whole checkpoints in a directory, ascending."""
    named = [path for path in directory.glob("[0-9]*") if path.name.isdigit()]
    return sorted(int(path.name) for path in named if ocp.is_orbax_checkpoint(path))


def read_trainable(path: Path) -> tuple[Any, dict[str, Any]]:
    """The trainable part of one checkpoint on the host, and its identity; nothing is written.

    Unlike `Checkpoints.load` it needs neither the devices that wrote it nor room for the optimizer's state.

    Args:
        path: a checkpoint, as any number of processes wrote it.

    Returns:
        NumPy arrays, and the identity of `Checkpoints`.

    Raises:
        UserError: it is damaged or out of reach.
    """
    path, context = path.resolve(), ocp.Context()  # Orbax takes absolute paths only.
    context.pytree.loading.partial_load = True
    way_out = "give another step"
    with _reading(path, way_out):
        metadata = ocp.metadata(path)
    identity, checksums = _recorded(metadata.custom_metadata, path, way_out)
    shape = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), metadata.metadata["trainable"])
    with _reading(path, way_out), context:
        trainable = ocp.load(path, {"trainable": shape})["trainable"]
    # Checksums of the optimizer's state follow.
    _check(trainable, checksums[: len(jax.tree.leaves(trainable))], path, way_out)
    return trainable, identity


@contextlib.contextmanager
def _reading(path: Path, way_out: str) -> Iterator[None]:
    """Turns what Orbax and TensorStore say of a checkpoint's files into a `UserError`.

    What they do not say of the files, such as too little memory or another shape, passes.
    """
    try:
        yield
    except Exception as error:
        damaged, cause = _about_files(error)
        if cause is None:
            error.add_note(f"while the checkpoint {path} was read")
            raise
        if damaged:
            raise UserError(f"checkpoint {path} is damaged ({_message(cause)}): {way_out}") from error
        raise UserError(
            f"checkpoint {path} cannot be read now ({_message(cause)}), which does not mean that it is "
            "damaged: try again"
        ) from error


def _about_files(error: Exception) -> tuple[bool, BaseException | None]:
    """The exception in the chain that is about files, and whether it says that data are missing or wrong."""
    wrong = (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, ocp.errors.InvalidLayoutError)
    if is_out_of_memory(error):
        return False, None
    for cause in chain(error):
        # TensorStore names no status where it cannot decompress.
        says_so = str(cause).startswith(DAMAGED) or "Error decoding" in str(cause)
        if isinstance(cause, wrong) or (type(cause) is ValueError and says_so):
            return True, cause
    for cause in chain(error):
        if isinstance(cause, OSError) or (type(cause) is ValueError and str(cause).startswith(OUT_OF_REACH)):
            return False, cause
    return False, None


def _message(error: BaseException) -> str:
    """The first line, without the description of the data that TensorStore appends."""
    return first_line(error).partition(" [tensorstore_spec")[0]


def _recorded(metadata: Any, path: Path, way_out: str) -> tuple[dict[str, str], list[int]]:
    """Identity and checksums that were saved with a checkpoint."""
    names = ("identity", "checksums")
    if not isinstance(metadata, Mapping) or not all(name in metadata for name in names):
        raise UserError(f"checkpoint {path} is damaged (it holds no {' or no '.join(names)}): {way_out}")
    return metadata["identity"], metadata["checksums"]


def _check(tree: Any, checksums: list[int], path: Path, way_out: str) -> None:
    if _checksums(tree) != checksums:
        raise UserError(f"checkpoint {path} is damaged (a checksum differs): {way_out}")


def _checksums(tree: Any) -> list[int]:
    return [int(x) for x in jax.device_get(_checksum(tree))]


@jax.jit
def _checksum(tree: Any) -> list[jax.Array]:
    """A uint32 of every array: the sum of its words, each times an odd number made of its position.

    Integer sums do not depend on their order, so that every mesh computes the same ones.
    """

    def checksum(x):
        words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        position = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            position = position * jnp.uint32(size % 2**32)
            position = position + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = (position * jnp.uint32(2654435761)) ^ (position >> 15)
        return jnp.sum(words * (mixed | 1), dtype=jnp.uint32)

    return [checksum(x) for x in jax.tree.leaves(tree)]
