"""A training run from a config: load, filter, step, log, checkpoint, write the IMAE directory."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from tqdm import tqdm

from imae_jax.config import AntiExpertConfig, LlamaConfig, LoraConfig
from imae_jax.convert import LanguageModel, load_model
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.convert.peft import is_adapter, write_adapter
from imae_jax.errors import UserError, first_line
from imae_jax.files import write_text
from imae_jax.llama import Weights
from imae_jax.runtime import versions
from imae_jax.sharding import check_divisible, make_mesh
from imae_jax.train import data
from imae_jax.train.checkpoint import Checkpoints
from imae_jax.train.config import IcdConfig, OptimizerConfig, TrainConfig, UnitConfig
from imae_jax.train.objectives import AnswerObjective, ImaeObjective, Objective
from imae_jax.train.step import (
    init_state,
    make_optimizer,
    make_train_step,
    place_batch,
    state_shardings,
)
from imae_jax.train.token_filter import check_same_vocabulary, filter_tokens, show_filtered

CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.jsonl"
CHECKPOINT_DIR, IMAE_DIR = "checkpoints", "imae"
ICD_DIR, ADAPTER_DIR, FILTER_DIR = "icd", "adapter", "token_filter"
RUN_FILES = (CONFIG_FILE, METRICS_FILE, CHECKPOINT_DIR, IMAE_DIR, ICD_DIR, FILTER_DIR)
# Settings that may change between a run and its continuation: they do not alter what a step computes.
FREE_ON_RESUME = {"out", "save_every", "keep", "log_every", "mesh"}


def train(
    config: TrainConfig,
    *,
    only_icd: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Trains anti-expert units and writes `OUT/imae`; with `icd.enabled` the anti-expert LLM before.

    Beside it: `config.yaml`, `metrics.jsonl` (one object a step), `checkpoints/`, and `icd/` with the
    same and `adapter/`.

    Args:
        config: of the run.
        only_icd: stop after the anti-expert LLM.
        resume: go on from the newest checkpoint in `config.out`.
        overwrite: begin anew in a directory that holds a run.
        quiet: no progress bar.

    Returns:
        The IMAE directory, or the adapter's.

    Raises:
        UserError: a setting, file or model that does not work, or a loss that is not finite.
    """
    out = Path(config.out)
    rows = data.load_rows(config.data)
    mesh = _make_mesh(config, only_icd or config.icd.enabled)
    _check_output(out, config, resume, overwrite)
    lora = LoraConfig(config.icd.lora.rank, config.icd.lora.alpha, tuple(config.icd.lora.targets))
    model = load_model(
        config.model,
        dtype=config.dtype,
        stacked=True,
        mesh=mesh,
        revision=config.revision,
        tokenizer=config.tokenizer,
    )
    if model.imae is not None or is_adapter(Path(config.model)):
        raise UserError(f"model {config.model} is no plain base model: train on its base instead")
    anti_expert = _unit_sizes(config.units, model.config)
    check_divisible(model.config, anti_expert, mesh.shape)
    examples, statistics = data.tokenize(rows, model.tokenizer, config.data)
    _check_context(examples, model.config)
    if not resume:
        _create_output(out)
    write_text(out / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))
    run = Run(config, out, mesh, model, examples, statistics, resume, quiet)
    try:
        anti_expert_llm = config.filter.anti_expert_llm
        if only_icd or config.icd.enabled:
            adapter = _train_icd(run, lora)
            anti_expert_llm = anti_expert_llm or str(adapter)
        return adapter if only_icd else _train_units(run, anti_expert, anti_expert_llm)
    except UserError:
        if not any(out.glob(f"**/{CHECKPOINT_DIR}/[0-9]*")):
            _remove_run(out)  # There is nothing to go on from.
        raise


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        config: of the run.
        out: its output directory.
        mesh: its devices.
        model: the base, stacked.
        examples: tokenized, with every answer token in T_fact.
        statistics: of the data.
        resume: go on from checkpoints.
        quiet: no progress bars.
    """

    config: TrainConfig
    out: Path
    mesh: jax.sharding.Mesh
    model: LanguageModel
    examples: list[data.Example]
    statistics: dict[str, Any]
    resume: bool
    quiet: bool

    def progress(self, items: Any, label: str) -> Any:
        return tqdm(items, desc=label, total=len(self.examples), unit="row", disable=self.quiet)


def _train_icd(run: Run, lora: LoraConfig) -> Path:
    """Stage 1, the anti-expert LLM: returns its adapter, which a finished stage has written already."""
    icd, out = run.config.icd, run.out / ICD_DIR
    path = out / ADAPTER_DIR
    if is_adapter(path):
        return path
    model = run.model
    if icd.model is not None:
        model = load_model(icd.model, dtype=run.config.dtype, stacked=True, mesh=run.mesh)
        check_same_vocabulary(run.model, model, icd.model, run.examples)
    optimizer = icd.optimizer
    if icd.epochs is not None:
        steps = max(1, round(icd.epochs * len(run.examples) / icd.batch_size))
        optimizer = dataclasses.replace(optimizer, steps=steps)
    deltas = run_stage(
        "icd",
        out,
        AnswerObjective(lora, run.config.remat),
        model,
        run.examples,
        Schedule.of(run.config, icd, optimizer),
        run.mesh,
        resume=run.resume,
        quiet=run.quiet,
    )
    reference, revision = model.base.reference, model.base.revision
    write_adapter(path, deltas, model.config, lora, base_reference=reference, revision=revision)
    return path


def _train_units(run: Run, anti_expert: AntiExpertConfig, anti_expert_llm: str | None) -> Path:
    """Stages 2 and 3, the token filter and the units: returns the IMAE directory."""
    config = run.config
    examples, kept = filter_tokens(
        run.examples,
        run.model,
        anti_expert_llm,
        config.filter.gamma,
        run.out / FILTER_DIR,
        run.progress,
    )
    if anti_expert_llm is not None and not run.quiet:
        show_filtered(examples, run.model.tokenizer, kept)
    units = run_stage(
        "train",
        run.out,
        ImaeObjective(anti_expert, config.loss, config.remat),
        run.model,
        examples,
        Schedule.of(config, config, config.optimizer),
        run.mesh,
        resume=run.resume,
        quiet=run.quiet,
    )
    statistics = run.statistics | kept | {"examples": len(examples)}
    path = run.out / IMAE_DIR
    write_imae_dir(
        path,
        Weights(run.model.model.weights().base, units),
        run.model.config,
        anti_expert,
        base=dataclasses.asdict(run.model.base),
        training={"config": config.to_dict(), "data": statistics, "versions": versions()},
        overwrite=True,
    )
    return path


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and in which portions a stage trains."""

    batch_size: int
    accumulation: int
    optimizer: OptimizerConfig
    seed: int
    save_every: int
    keep: int
    log_every: int

    @classmethod
    def of(
        cls, config: TrainConfig, stage: TrainConfig | IcdConfig, optimizer: OptimizerConfig
    ) -> "Schedule":
        return cls(
            stage.batch_size,
            stage.accumulation,
            optimizer,
            config.seed,
            config.save_every,
            config.keep,
            config.log_every,
        )


def run_stage(
    name: str,
    out: Path,
    objective: Objective,
    model: LanguageModel,
    examples: list[data.Example],
    schedule: Schedule,
    mesh: jax.sharding.Mesh,
    *,
    resume: bool,
    quiet: bool,
) -> Any:
    """Trains one objective; writes `metrics.jsonl` and `checkpoints/` into `out`.

    Returns:
        The trained part.
    """
    optimizer = make_optimizer(schedule.optimizer)
    shardings = state_shardings(model.config, objective, optimizer, mesh)
    train_step = make_train_step(model.config, objective, optimizer, shardings, mesh)
    base = model.model.weights().base
    state = init_state(model.config, objective, optimizer, shardings, schedule.seed)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(out / CHECKPOINT_DIR, schedule.keep)
    start = checkpoints.latest or 0 if resume else 0
    if start:
        state = checkpoints.load(start, jax.eval_shape(lambda: state), shardings)
    _cut_metrics(out / METRICS_FILE, start)

    steps = schedule.optimizer.steps
    bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=quiet)
    with bar, (out / METRICS_FILE).open("a", encoding="utf-8") as log:
        clock, tokens = time.perf_counter(), 0
        for step in range(start, steps):
            chosen = data.batch_rows(len(examples), schedule.batch_size, schedule.seed, step)
            batch = data.make_batch([examples[i] for i in chosen], schedule.accumulation)
            tokens += int(batch.attention_mask.sum())
            state, metrics = train_step(state, base, place_batch(batch, mesh))
            done = step + 1
            log_now = done % schedule.log_every == 0 or done == steps
            save_now = done % schedule.save_every == 0 or done == steps
            if log_now or save_now:
                metrics = {key: float(value) for key, value in metrics.items()}
                _check_finite(metrics, done, [examples[i].row for i in chosen], out)
            if log_now:
                now = time.perf_counter()
                rate, clock, tokens = tokens / (now - clock), now, 0
                line = {"step": done, **metrics, "tokens_per_second": rate}
                log.write(json.dumps(line) + "\n")
                log.flush()
                shown = {k: f"{metrics[k]:.3f}" for k in objective.shown}
                bar.set_postfix(shown | {"tok/s": f"{rate:.0f}"})
            bar.update()
            if save_now:
                checkpoints.save(done, state)
    checkpoints.close()
    return state.trainable


def _make_mesh(config: TrainConfig, with_icd: bool) -> jax.sharding.Mesh:
    sizes = config.mesh
    data_size = sizes.data
    if data_size == -1:
        data_size = max(1, jax.device_count() // max(1, sizes.fsdp * sizes.tensor))
    mesh = make_mesh(data_size, sizes.fsdp, sizes.tensor)
    shards = data_size * sizes.fsdp
    stages = [("", config)] + ([("icd.", config.icd)] if with_icd else [])
    for prefix, stage in stages:
        micro = stage.batch_size // stage.accumulation
        if micro % shards:
            raise UserError(
                f"{prefix}batch_size / {prefix}accumulation = {micro} rows cannot be spread over "
                f"data · fsdp = {shards} devices: choose a multiple of {shards}"
            )
    return mesh


def _unit_sizes(units: UnitConfig, llama: LlamaConfig) -> AntiExpertConfig:
    if units.intermediate_size is not None:
        return AntiExpertConfig(units.intermediate_size)
    return AntiExpertConfig.scaled_to(llama, units.ratio)


def _check_output(out: Path, config: TrainConfig, resume: bool, overwrite: bool) -> None:
    """Refuses an output directory that holds another run."""
    saved = out / CONFIG_FILE
    if resume:
        if not saved.is_file():
            raise UserError(f"{out} holds no training run to resume")
        try:
            before = dict(yaml.safe_load(saved.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise UserError(
                f"{saved} is damaged ({first_line(error)}): start anew with --overwrite"
            ) from None
        now = config.to_dict()
        changed = [key for key in now if key not in FREE_ON_RESUME and now[key] != before.get(key)]
        if changed:
            raise UserError(
                f"{', '.join(changed)} differ(s) from the run in {out}: resume with its settings, or "
                "start anew with another out"
            )
    elif not overwrite and any((out / name).exists() for name in RUN_FILES):
        raise UserError(
            f"{out} holds a training run: pass --resume to go on, --overwrite to replace it, or another out"
        )


def _remove_run(out: Path) -> None:
    """Removes what a run has written, and nothing else."""
    for name in RUN_FILES:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()


def _create_output(out: Path) -> None:
    """Makes the output directory, without the traces of an earlier run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        _remove_run(out)
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}") from None


def _check_context(examples, llama: LlamaConfig) -> None:
    longest = max(len(example.tokens) for example in examples)
    for example in examples:
        llama.check_token_ids(example.tokens)
    if longest > llama.context_length:
        raise UserError(
            f"a row has {longest} tokens, over the model's context of {llama.context_length}: lower "
            "data.max_length"
        )


def _check_finite(metrics: dict[str, float], step: int, rows: list[int], out: Path) -> None:
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    if bad:
        raise UserError(
            f"{', '.join(bad)} not finite at step {step} in {out} (rows {rows}): stopped without saving; "
            "lower optimizer.learning_rate"
        )


def _cut_metrics(path: Path, steps_done: int) -> None:
    """Drops the lines of steps that are done again after a resume."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= steps_done:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break  # A line that a killed process left unfinished.
    write_text(path, "".join(kept))
