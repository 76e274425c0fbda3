"""A checkpoint as what its run writes at the end: an IMAE directory, or an adapter in PEFT's format."""

import dataclasses
from pathlib import Path
from typing import Any

from imae_jax.config import LlamaConfig
from imae_jax.convert import imae_dir, peft
from imae_jax.convert.identity import note
from imae_jax.convert.references import open_model
from imae_jax.errors import UserError
from imae_jax.files import check_new_directory
from imae_jax.language_model import BaseReference
from imae_jax.llama import Weights
from imae_jax.train.checkpoint import read_trainable, steps_in
from imae_jax.train.config import TrainConfig, load_config
from imae_jax.train.run_directory import ADAPTER_STAGES, CHECKPOINT_DIR, CONFIG_FILE
from imae_jax.train.setup import units_objective


def write_result(
    run: Path, step: int | None, out: Path, *, base: str | None = None, overwrite: bool = False
) -> int:
    """Writes a checkpoint's units as an IMAE directory or, of stage 1 (`icd/`, `icd_right/`), its deltas as
    an adapter.

    The checkpoint may be of any mesh and number of processes; the base is read to compare its weights. The
    run may be under way: nothing in its directory changes.

    Args:
        run: the `out` of a training run, its `icd/` or `icd_right/`, or the `checkpoints/` in either.
        step: steps done at the checkpoint; default: the newest.
        out: the new directory.
        base: where the base is now, if it has moved.
        overwrite: replace an existing result.

    Returns:
        The step.

    Raises:
        UserError: no such run or checkpoint, a damaged one, another base, or `out` may not be replaced.
    """
    stage = run.parent if run.resolve().name == CHECKPOINT_DIR else run
    is_icd = stage.resolve().name in ADAPTER_STAGES.values() and not (stage / CONFIG_FILE).is_file()
    settings = (stage.parent if is_icd else stage) / CONFIG_FILE
    if not settings.is_file():
        raise UserError(f"{run} is no training run: {settings} does not exist")
    config, steps = load_config(str(settings)), steps_in(stage / CHECKPOINT_DIR)
    step = max(steps, default=None) if step is None else step
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        wanted = "" if step is None else f" of step {step}"
        raise UserError(f"{stage / CHECKPOINT_DIR} has no checkpoint{wanted}; there: {there}")
    marker = peft.CONFIG_FILE if is_icd else imae_dir.CONFIG_FILE
    check_new_directory(out, marker=marker, overwrite=overwrite)  # To read a base takes long.
    trainable, identity = read_trainable(stage / CHECKPOINT_DIR / str(step))
    reference, llama = _base(config, is_icd, base, identity)
    if is_icd:
        origin = {"base_reference": reference.reference, "revision": reference.revision}
        peft.write_adapter(out, trainable, llama, config.icd.lora, **origin, overwrite=overwrite)
    else:
        imae_dir.write_imae_dir(
            out,
            Weights({}, trainable),
            llama,
            units_objective(config, llama).anti_expert,
            base=dataclasses.asdict(reference),
            training={"config": config.to_dict(), "checkpoint": step},
            overwrite=overwrite,
        )
    return step


def _base(
    config: TrainConfig, is_icd: bool, moved: str | None, identity: dict[str, Any]
) -> tuple[BaseReference, LlamaConfig]:
    other = config.icd.model if is_icd else None
    name = moved or other or config.model
    try:
        opened = open_model(name, revision=None if moved or other else config.revision)
    except UserError as error:
        raise UserError(f"the run's base is not found ({error}); pass --base if it has moved") from error
    now, recorded = opened.identified(), identity.get("base")
    if now.fingerprint != recorded:
        raise UserError(
            f"the run's base has other weights than {name}{note(recorded)}: restore it, or pass --base"
        )
    return dataclasses.replace(now, dtype=str(identity["base dtype"])), opened.config
