"""The directory of a training run: the names of its files; how one is read, begun and replaced."""

import json
import shutil
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from imae_jax.distributed import barrier, is_main
from imae_jax.errors import UserError, first_line
from imae_jax.files import read_text, write_text

CONFIG_FILE, ENVIRONMENT_FILE = "config.yaml", "environment.json"
IMAE_DIR, FILTER_DIR = "imae", "token_filter"
# Files of a stage: in the run's directory for the units, in one of `ADAPTER_STAGES` for an adapter.
METRICS_FILE, EVALUATION_FILE, PLOT_FILE = "metrics.jsonl", "evaluation.jsonl", "training.png"
TENSORBOARD_DIR, WANDB_DIR, CHECKPOINT_DIR = "tensorboard", "wandb", "checkpoints"
ADAPTER_DIR, FINISHED_FILE = "adapter", "finished.json"
ADAPTER_STAGES = {"wrong": "icd", "right": "icd_right"}
"""Directories of the stages that train an adapter, by the answers that it is trained on."""
FILES = (
    *(CONFIG_FILE, ENVIRONMENT_FILE, CHECKPOINT_DIR, IMAE_DIR, FILTER_DIR, *ADAPTER_STAGES.values()),
    *(METRICS_FILE, EVALUATION_FILE, TENSORBOARD_DIR, PLOT_FILE, WANDB_DIR),
)
"""All that a run writes into its directory."""


def config_file(run: Path) -> Path:
    """The settings of a run, for `train.config.load_config`.

    Raises:
        UserError: the directory is no training run.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} holds no {CONFIG_FILE}: give the output directory of a training run")
    return run / CONFIG_FILE


def read_settings(run: Path) -> dict[str, Any]:
    """The settings of a run that is to be resumed, as they were saved.

    Raises:
        UserError: the directory is no training run, or the file is damaged.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run} holds no training run to resume")
    return settings_in(path, "start over with --overwrite")


def settings_in(path: Path, advice: str) -> dict[str, Any]:
    """The settings in a run's `config.yaml`, as they were saved.

    Raises:
        UserError: the file is damaged; ends with the advice.
    """
    try:
        settings = yaml.safe_load(read_text(path, "the run's"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): {advice}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged (it holds no settings): {advice}")
    return settings


def read_starts(run: Path) -> list[dict[str, Any]]:
    """What each start of a run recorded of its environment: the first has the run's id, resumes follow."""
    path = run / ENVIRONMENT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def begin(out: Path, settings: dict[str, Any], environment: dict[str, Any], *, resume: bool) -> str:
    """Makes the directory, or resumes in it, and records settings and environment; all processes call it.

    Args:
        out: the directory. What an earlier run left there is removed unless `resume`.
        settings: those of the run.
        environment: what to record of this start, such as versions.
        resume: the directory holds the run to resume.

    Returns:
        The run's id, a random string.

    Raises:
        UserError: the directory cannot be written, or holds files of a run's names that no run wrote.
    """
    barrier("output checked")
    if is_main():
        if not resume:
            try:
                out.mkdir(parents=True, exist_ok=True)
                remove(out)
                out.mkdir(exist_ok=True)
            except OSError as error:
                raise UserError(f"out={out} cannot be written: {error.strerror}") from error
        write_text(out / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False))
        starts = read_starts(out)
        run_id = starts[0]["run_id"] if starts else uuid.uuid4().hex[:12]
        started = datetime.now(UTC).isoformat(timespec="seconds")
        start = {"run_id": run_id, "started": started, "command": sys.argv, **environment}
        write_text(out / ENVIRONMENT_FILE, json.dumps([*starts, start], indent=2) + "\n")
    barrier("output created")
    return read_starts(out)[0]["run_id"]


def check_new(out: Path) -> None:
    """Raises a `UserError` where `out` is a file, or a directory with files and no run among them."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file, not a directory: choose another out")
    if out.exists() and not holds_run(out):
        half_written = tuple(f".{name}" for name in FILES)  # What a kill leaves.
        if not all(path.name.startswith(half_written) for path in out.iterdir()):
            raise UserError(f"out={out} holds other files: choose another out")


def holds_run(out: Path) -> bool:
    return any((out / name).exists() for name in FILES)


def holds_results(out: Path) -> bool:
    """Whether there is anything that a resumed run would not compute again."""
    patterns = (f"**/{CHECKPOINT_DIR}/[0-9]*", f"{FILTER_DIR}/*", f"*/{ADAPTER_DIR}")
    return any(any(out.glob(pattern)) for pattern in patterns)


def remove(out: Path) -> None:
    """Removes what a run has written, and nothing else.

    Raises:
        UserError: the directory holds files of these names that no run wrote.
    """
    present = [name for name in FILES if (out / name).exists()]
    if present and not _is_config_of_a_run(out / CONFIG_FILE):
        raise UserError(
            f"{out} holds {', '.join(present)}, but no {CONFIG_FILE} of a run: choose another out"
        )
    for path in (out / name for name in present):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not any(out.iterdir()):
        out.rmdir()


def _is_config_of_a_run(path: Path) -> bool:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and {"model", "units", "optimizer"} <= config.keys()
