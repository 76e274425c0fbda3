"""Training runs in a report: losses, gates, held-out rows and curves of every stage."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imae_jax.errors import UserError
from imae_jax.evaluate.reporting.document import FinishedRun, Picture, Section, warning
from imae_jax.evaluate.reporting.tables import Table, number
from imae_jax.evaluate.runner.directory import read_fields, with_file
from imae_jax.files import Journal, read_json
from imae_jax.train.run_directory import (
    ADAPTER_STAGES,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FILE,
    IMAE_DIR,
    METRICS_FILE,
    settings_in,
)

UNITS = "anti-expert units"
# Directories of a training run's stages.
STAGES = {ADAPTER_STAGES["wrong"]: "anti-expert LLM", ADAPTER_STAGES["right"]: "right-answer LLM", ".": UNITS}


class Training:
    """What `imae_jax.train` writes, finished or not, in a report.

    Its results have `stages` (records of metrics and of held-out rows, by the stage's name), `config`,
    `environment` (of every start) and `data` (statistics of the rows; empty where the run is unfinished).
    """

    title = "training"

    def read(self, path: Path) -> dict[str, Any]:
        stages, data = read_stages(path), {}
        environment_file, units_file = path / ENVIRONMENT_FILE, path / IMAE_DIR / "imae_config.json"
        environment = read_json(environment_file, list) if environment_file.is_file() else []
        if units_file.is_file():
            data = read_fields(units_file)["training"].get("data", {})
        return {
            "stages": stages,
            "config": read_config(path / CONFIG_FILE),
            "environment": with_file(environment, environment_file, "a start"),
            "data": data,
        }

    def report(self, runs: Sequence[FinishedRun], others: Sequence[FinishedRun]) -> list[Section]:
        sections = [Section("Training")]
        for run in runs:
            stages = run.results["stages"]
            blocks = [block for name in stages for block in _stage_blocks(run, name, *stages[name])]
            if run.results["config"] and UNITS not in stages:
                blocks.append(warning("The units have not been trained."))
            sections.append(Section(f"{run.path}, run {run.number}", blocks, level=3))
        return sections


def read_config(file: Path) -> dict[str, Any]:
    """A run's settings; empty where there are none."""
    return with_file(settings_in(file, "restore it"), file) if file.is_file() else {}


def read_stages(path: Path) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Records of the metrics and of the held-out rows of every stage, by its name.

    Args:
        path: a training run, or one of its stages.

    Raises:
        UserError: it has not trained yet, or a file is damaged.
    """
    stages = {}
    for directory, name in STAGES.items():
        records, held_out = (_records(path / directory / file) for file in (METRICS_FILE, EVALUATION_FILE))
        if records:
            if "accuracy" in records[0] and name == UNITS:  # `path` is a stage of a run.
                name = STAGES.get(path.resolve().name, STAGES[ADAPTER_STAGES["wrong"]])
            stages[name] = (records, held_out)
    if not stages:
        raise UserError(f"{path} holds no steps: the run has not trained yet")
    return stages


def _records(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    fields = {"step": int, "loss": float | int | None}
    return with_file(Journal(file, fields, "line {number} is damaged: restore it").read(), file, "a line")


def _stage_blocks(
    run: FinishedRun, name: str, records: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]
) -> list[Any]:
    from imae_jax.train.plots import GATES, LOSSES, MEASURES, training_plot

    config, data, is_units = run.results["config"], run.results["data"], name == UNITS
    settings = config if is_units else config.get("icd", {})
    steps = settings.get("optimizer", {}).get("steps") if settings.get("epochs") is None else None
    first, last = records[0], records[-1]
    done = last["step"]
    about = [f"{name[:1].upper()}{name[1:]}: {done} steps"]
    if settings:
        about.append(f"batches of {settings['batch_size']} rows")
        about.append(f"peak learning rate {settings['optimizer']['learning_rate']:g}")
    if data and is_units:
        about.append(f"{data['rows']} training rows")
        about.append(f"{100 * data['kept_share']:.1f} % of answer tokens in T_fact")
    about.append(f"{last['tokens_per_second']:.0f} tokens/s at the end")
    blocks: list[Any] = [f"{', '.join(about)}."]
    if steps is not None and done < steps:
        blocks.append(warning(f"Unfinished: {done} of {steps} steps are done."))
    quantities = LOSSES | GATES if is_units else {"loss": "loss", "accuracy": "accuracy"}
    columns: dict[str, Mapping[str, Any]] = {f"step {first['step']}": first, f"step {done}": last}
    columns |= {f"held out, step {row['step']}": row for row in [*held_out[:1], *held_out[-1:]]}
    rows = tuple(
        (label, *(number(row.get(key), 3) for row in columns.values()))
        for key, label in (quantities | MEASURES).items()
        if any(key in row for row in columns.values())
    )
    blocks.append(Table(f"Means over tokens, {name}; losses in nats", ("quantity", *columns), rows))
    file = f"{run.number}-{'training' if is_units else name.replace(' ', '-')}.png"
    curves = io.BytesIO()
    training_plot(records, curves, held_out)
    blocks.append(Picture(file, f"Training curves, {name}", curves.getvalue()))
    return blocks
