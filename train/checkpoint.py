"""Checkpoints of a training run: the trainable state and the step, never the frozen base."""

from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from imae_jax.errors import UserError
from imae_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints in a directory, the newest `keep` of them.

    Orbax writes each under a temporary name and renames it when it is whole.
    """

    def __init__(self, directory: Path, keep: int):
        self._directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory.resolve(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Number of steps done at the newest checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, steps_done: int, state: TrainState) -> None:
        self._checkpointer.save(steps_done, _as_dict(state))

    def load(self, steps_done: int, shape: TrainState, shardings: TrainState) -> TrainState:
        """Reads a checkpoint straight into its shards; `shape` as from `jax.eval_shape`."""
        abstract = jax.tree.map(
            lambda x, placement: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
            shape,
            shardings,
        )
        try:
            loaded = self._checkpointer.load(steps_done, _as_dict(abstract))
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"checkpoint {self._directory / str(steps_done)} cannot be loaded into this "
                f"configuration: {reason}"
            ) from None
        return TrainState(**loaded)

    def close(self) -> None:
        self._checkpointer.close()


def _as_dict(state: TrainState) -> dict:
    return {"trainable": state.trainable, "opt_state": state.opt_state}
