"""Checkpoints of a stage: the trainable state and the step, never the frozen base."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from imae_jax.convert.identity import note
from imae_jax.errors import UserError, first_line
from imae_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints in a directory, the newest `keep` of them, written in the background.

    Orbax writes each under a temporary name, from all processes, and renames it when it is whole. With
    each goes an identity (what it belongs to) and a checksum of every array, computed on the devices.

    Args:
        directory: of the checkpoints.
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
        try:
            self._checkpointer.save_async(steps_done, _as_dict(state), custom_metadata=metadata)
        except Exception as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Until what `save` began is on the disk."""
        try:
            self._checkpointer.wait()
        except Exception as error:  # Orbax' and TensorStore's errors share no base class.
            raise self._not_written(error) from error

    def load(self, steps_done: int, shape: TrainState, shardings: TrainState) -> TrainState:
        """Reads a checkpoint straight into its shards.

        Args:
            steps_done: which.
            shape: as from `jax.eval_shape`.
            shardings: where its arrays go.

        Raises:
            UserError: it is damaged, or belongs to another base, data set or configuration.
        """
        path = self._directory / str(steps_done)
        older = [step for step in self.steps if step < steps_done]
        way_out = f"--from-step {older[-1]} goes on from the one before" if older else "start anew"
        abstract = jax.tree.map(
            lambda x, placement: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
            shape,
            shardings,
        )
        try:
            metadata = self._checkpointer.metadata(steps_done).custom_metadata
            identity, checksums = metadata["identity"], metadata["checksums"]
        except Exception as error:
            raise UserError(f"checkpoint {path} is damaged ({first_line(error)}): {way_out}") from error
        for name, expected in self._identity.items():
            if identity.get(name) != expected:
                older = note(identity.get(name)) if name == "base" else ""
                raise UserError(
                    f"checkpoint {path} belongs to another {name} ({identity.get(name)}, now {expected})"
                    f"{older}: restore it, or start anew with another out"
                )
        try:
            state = TrainState(**self._checkpointer.load(steps_done, _as_dict(abstract)))
        except Exception as error:
            raise UserError(f"checkpoint {path} is damaged ({first_line(error)}): {way_out}") from error
        if _checksums(state) != checksums:
            raise UserError(f"checkpoint {path} is damaged (a checksum differs): {way_out}")
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

    def _not_written(self, error: Exception) -> UserError:
        kept = f"; step {self.steps[-1]} is kept: go on with --resume" if self.steps else ""
        return UserError(f"a checkpoint cannot be written to {self._directory}: {first_line(error)}{kept}")


def steps_in(directory: Path) -> list[int]:
    """Numbers of steps done at the whole checkpoints in a directory, ascending."""
    named = [path for path in directory.glob("[0-9]*") if path.name.isdigit()]
    return sorted(int(path.name) for path in named if ocp.is_orbax_checkpoint(path))


def read_trainable(path: Path) -> tuple[Any, dict[str, Any]]:
    """The trainable part of one checkpoint on the host, and its identity; nothing is written.

    Unlike `Checkpoints.load` it needs neither the devices that wrote it nor room for the optimizer's state.

    Args:
        path: of a checkpoint, as any number of processes wrote it.

    Returns:
        NumPy arrays, and the identity of `Checkpoints`.

    Raises:
        UserError: it is damaged.
    """
    path, context = path.resolve(), ocp.Context()  # Orbax takes absolute paths only.
    context.pytree.loading.partial_load = True
    try:
        metadata = ocp.metadata(path)
        identity, checksums = metadata.custom_metadata["identity"], metadata.custom_metadata["checksums"]
        shape = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), metadata.metadata["trainable"])
        with context:
            trainable = ocp.load(path, {"trainable": shape})["trainable"]
    except Exception as error:  # Orbax' and TensorStore's errors share no base class.
        raise UserError(f"checkpoint {path} is damaged ({first_line(error)}): give another step") from error
    found = [int(x) for x in jax.device_get(_checksum(trainable))]
    # Those of the optimizer's state follow.
    if found != checksums[: len(found)]:
        raise UserError(f"checkpoint {path} is damaged (a checksum differs): give another step")
    return trainable, identity


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"trainable": state.trainable, "opt_state": state.opt_state}


@jax.jit
def _checksum(tree: Any) -> list[jax.Array]:
    """A uint32 of every array: the sum of its words, each times an odd number made of its position.

    Integer sums do not depend on their order, so that every mesh computes the same ones.
    """

    def of_array(x):
        words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        position = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            position = position * jnp.uint32(size % 2**32)
            position = position + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = (position * jnp.uint32(2654435761)) ^ (position >> 15)
        return jnp.sum(words * (mixed | 1), dtype=jnp.uint32)

    return [of_array(x) for x in jax.tree.leaves(tree)]


def _checksums(state: TrainState) -> list[int]:
    return [int(x) for x in jax.device_get(_checksum(state))]
