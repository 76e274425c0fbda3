"""Metric logging: JSONL, TensorBoard, Weights & Biases, a plot."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from imae_jax.errors import UserError, first_line
from imae_jax.files import Journal
from imae_jax.train.plots import training_plot
from imae_jax.train.run_directory import EVALUATION_FILE, METRICS_FILE, PLOT_FILE, TENSORBOARD_DIR


class RunLog:
    """Writes metrics of a stage into a directory. Used by the main process only.

    What is not finite, such as the mean over nothing, is null in the files and left out elsewhere.

    Args:
        out: the stage's directory.
        start: steps done before; what was logged of later ones is dropped.
        wandb: arguments of `wandb.init`, or None to leave it out.

    Raises:
        UserError: the package wandb is asked for and not installed.
    """

    def __init__(self, out: Path, start: int, wandb: dict[str, Any] | None = None):
        self._out = out
        self._journals = {name: _journal(out / name) for name in (METRICS_FILE, EVALUATION_FILE)}
        # Steps after `start` are done again, and a run that begins has none.
        self._lines = {
            name: journal.resume(lambda line: 0 <= line["step"] <= start > 0)
            for name, journal in self._journals.items()
        }
        with self._writing():
            (out / TENSORBOARD_DIR).mkdir(exist_ok=True)
            events = out / TENSORBOARD_DIR / f"events.out.tfevents.{time.time_ns()}"
            # Not its `EventFileWriter`: that writes in a thread, which prints its errors itself.
            self._events = RecordWriter(events.open("xb"))
            self._write_event(file_version="brain.Event:2")
            # TensorBoard then drops what earlier files hold of these steps.
            first = start + 1 if start else 0
            self._write_event(step=first, session_log=SessionLog(status=SessionLog.START))
        self._wandb = _init_wandb(wandb) if wandb else None

    def train(self, step: int, metrics: dict[str, Any]) -> None:
        self._write(METRICS_FILE, "train", step, metrics)

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        self._write(EVALUATION_FILE, "held_out", step, metrics)
        self.plot()

    def plot(self) -> None:
        """Draws `training.png` again."""
        if self._lines[METRICS_FILE]:
            temporary = self._out / f".{PLOT_FILE}"
            try:
                with self._writing():
                    training_plot(self._lines[METRICS_FILE], temporary, self._lines[EVALUATION_FILE])
                    temporary.replace(self._out / PLOT_FILE)
            finally:
                temporary.unlink(missing_ok=True)

    def close(self) -> None:
        # Every event has been flushed; an error that is on its way must not be replaced.
        with contextlib.suppress(OSError):
            self._events.close()
        if self._wandb is not None:
            with contextlib.suppress(Exception):
                self._wandb.finish()

    def _write(self, name: str, prefix: str, step: int, metrics: dict[str, Any]) -> None:
        metrics = {k: _finite(v) for k, v in metrics.items()}
        line = {"step": step, **metrics}
        self._lines[name].append(line)
        numbers = {k: v for k, v in metrics.items() if v is not None}
        scalars = {f"{prefix}/{k}": v for k, v in numbers.items() if not isinstance(v, list)}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._journals[name].append(line)
        with self._writing():
            self._write_event(step=step, summary=Summary(value=values))
        for key, values in numbers.items():
            if isinstance(values, list):
                by_layer = {f"{prefix}/{key}/{i:02d}": v for i, v in enumerate(values, 1)}
                scalars |= {k: v for k, v in by_layer.items() if v is not None}
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def _write_event(self, **fields: Any) -> None:
        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._events.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"logs cannot be written to {self._out}: {error.strerror or error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return value if math.isfinite(value) else None


def _journal(path: Path) -> Journal:
    return Journal(path, {"step": int}, "line {number} is damaged: remove it")


def _init_wandb(arguments: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "wandb is set but the package wandb is not installed: pip install 'imae-jax[wandb]', or leave "
            "the setting out"
        ) from error
    try:
        # A resumed run keeps its id.
        return wandb.init(**arguments, resume="allow")
    except wandb.Error as error:
        raise UserError(f"wandb={arguments['project']} does not work: {first_line(error)}") from error
