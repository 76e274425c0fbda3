"""One program on several processes: how they find each other, agree, and end together.

Every process runs the same code on the same inputs. Files are written by the main process alone, into
a directory that all of them see.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from imae_jax import files
from imae_jax.cli import report
from imae_jax.errors import Stopped, UserError, first_line

if TYPE_CHECKING:
    import jax

INITIALIZATION_TIMEOUT = 300  # seconds


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
    heartbeat_timeout: int = 60,
) -> None:
    """Joins this process with the others of its run; must come before anything else touches a device.

    Args:
        coordinator: `HOST:PORT` of process 0, with `num_processes` and `process_id`.
        num_processes: of the run.
        process_id: this one's number, from 0.
        detect: ask JAX to find the others (TPU pods, Slurm, Open MPI). Inside an `srun` step of several
            tasks, or with `JAX_COORDINATOR_ADDRESS` set, this is done without being asked.
        heartbeat_timeout: seconds after which a process that does not answer counts as dead, and the
            others end.

    Raises:
        UserError: the others cannot be found or reached.
    """
    explicit = (coordinator, num_processes, process_id)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise UserError("--coordinator, --num-processes and --process-id go together")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process-id {process_id} must be from 0 to {num_processes - 1}")
    elif not (detect or is_started_with_others()):
        return
    import jax

    # Its listener would take SIGTERM away from Python, and knows no other signal: see `train.preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *explicit,
            initialization_timeout=INITIALIZATION_TIMEOUT,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run cannot join: {first_line(error)}") from error


def is_started_with_others() -> bool:
    """Whether the environment says that this process is one of several, joined or not."""
    # SLURM_NTASKS is set in an sbatch script, too, which is one process that would wait for others.
    return os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" or "JAX_COORDINATOR_ADDRESS" in os.environ


def is_one_of_several() -> bool:
    """Whether this process has joined others."""
    jax = sys.modules.get("jax")  # What has not imported it has joined no others.
    # In this order: the count alone would start the devices.
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    if not is_one_of_several():
        return True
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if is_one_of_several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(number: int) -> int:
    """The largest of the numbers that the processes bring, on all of them. All must call it."""
    if not is_one_of_several():
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def decide(value: bool) -> bool:
    """The main process's value on all processes, whose views of a file system may differ for a while."""
    return bool(agree(int(value and is_main())))


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """As `files.locked`; of several processes the main one holds the lock for all. All must call it."""
    with contextlib.ExitStack() as stack:
        refusal = None
        if is_main():
            try:
                stack.enter_context(files.locked(path))
            except UserError as error:
                refusal = error
        if decide(refusal is not None):
            raise refusal or UserError(f"{path} is being written by another run")
        yield


def to_host(x: "jax.Array") -> np.ndarray:
    """The whole array on every process's host, wherever its shards lie. All processes must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def gather_stacks(tree: Any) -> Any:
    """A tree of stacked [L, …] arrays on the main process's host; None leaves elsewhere.

    Devices hold one layer of one array more while it runs. All processes must call it.
    """
    import jax

    def gather(x):
        if x.is_fully_addressable:
            return np.asarray(x)
        layers = (to_host(x[i]) for i in range(x.shape[0]))
        if is_main():
            return np.stack(list(layers))
        for _ in layers:
            pass
        return None

    return jax.tree.map(gather, tree)


def place(array: np.ndarray, placement: "jax.sharding.Sharding") -> "jax.Array":
    """Puts an array that every process has onto the devices; each process copies its own slices only."""
    import jax

    return jax.make_array_from_callback(array.shape, placement, lambda index: array[index])


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Ends this process at once where the block fails: an orderly exit would wait for the others, and
    they would wait in their next collective for this one.

    With one process, errors pass.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not is_one_of_several() or isinstance(error, Stopped):
            raise
        import jax

        code = 1
        try:
            code = report(error, f"process {jax.process_index()} of {jax.process_count()}: ")
            sys.stdout.flush()
        finally:
            os._exit(code)
