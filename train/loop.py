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
from imae_jax.errors import UserError
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
    mesh = _make_mesh(config)
    _check_output(out, config, resume, overwrite)
    with_icd = only_icd or config.icd.enabled
    lora = LoraConfig(config.icd.lora.rank, config.icd.lora.alpha, tuple(config.icd.lora.targets))

    model = load_model(config.model, dtype=config.dtype, stacked=True, mesh=mesh)
    if model.imae is not None or is_adapter(Path(config.model)):
        raise UserError(f"model {config.model} is no plain base model: train on its base instead")
    anti_expert = _unit_sizes(config.units, model.config)
    check_divisible(model.config, anti_expert, mesh.shape)
    examples, statistics = data.tokenize(rows, model.tokenizer, config.data)
    _check_context(examples, model.config)
    if not resume:
        _create_output(out)
    write_text(out / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))

    anti_expert_llm = config.filter.anti_expert_llm
    if with_icd:
        adapter = out / ICD_DIR / ADAPTER_DIR
        if not is_adapter(adapter):
            _train_icd(config, model, lora, examples, mesh, out / ICD_DIR, resume=resume, quiet=quiet)
        anti_expert_llm = anti_expert_llm or str(adapter)
        if only_icd:
            return adapter

    examples, kept = filter_tokens(
        examples,
        model,
        anti_expert_llm,
        config.filter.gamma,
        out / FILTER_DIR,
        lambda items, label: _progress(items, label, quiet),
    )
    statistics |= kept | {"examples": len(examples)}
    if anti_expert_llm is not None and not quiet:
        show_filtered(examples, model.tokenizer, kept)
    objective = ImaeObjective(anti_expert, config.loss, config.remat)
    schedule = Schedule.of(config, config, config.optimizer)
    units = run_stage("train", out, objective, model, examples, schedule, mesh, resume=resume, quiet=quiet)
    return _write_result(out, config, model, anti_expert, units, statistics)


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


def _train_icd(config, model, lora, examples, mesh, out, *, resume, quiet) -> None:
    """Stage 1: writes `out/adapter`."""
    icd = config.icd
    if icd.model is not None:
        start = load_model(icd.model, dtype=config.dtype, stacked=True, mesh=mesh)
        check_same_vocabulary(model, start, icd.model, examples)
        model = start
    optimizer = icd.optimizer
    if icd.epochs is not None:
        steps = max(1, round(icd.epochs * len(examples) / icd.batch_size))
        optimizer = dataclasses.replace(optimizer, steps=steps)
    deltas = run_stage(
        "icd",
        out,
        AnswerObjective(lora, config.remat),
        model,
        examples,
        Schedule.of(config, icd, optimizer),
        mesh,
        resume=resume,
        quiet=quiet,
    )
    write_adapter(
        out / ADAPTER_DIR,
        deltas,
        model.config,
        lora,
        base_reference=model.base.reference,
        revision=model.base.revision,
        overwrite=True,
    )


def _write_result(out, config, model: LanguageModel, anti_expert, units, statistics) -> Path:
    training = {"config": config.to_dict(), "data": statistics, "versions": versions()}
    path = out / IMAE_DIR
    write_imae_dir(
        path,
        Weights(model.model.weights().base, units),
        model.config,
        anti_expert,
        base=dataclasses.asdict(model.base),
        training=training,
        overwrite=True,
    )
    return path


def _make_mesh(config: TrainConfig) -> jax.sharding.Mesh:
    sizes = config.mesh
    data_size = sizes.data
    if data_size == -1:
        data_size = max(1, jax.device_count() // max(1, sizes.fsdp * sizes.tensor))
    mesh = make_mesh(data_size, sizes.fsdp, sizes.tensor)
    shards = data_size * sizes.fsdp
    stages = [("", config)] + ([("icd.", config.icd)] if config.icd.enabled else [])
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
    if not units.ratio > 0:
        raise UserError(f"units.ratio={units.ratio} must be above 0")
    return AntiExpertConfig.scaled_to(llama, units.ratio)


def _check_output(out: Path, config: TrainConfig, resume: bool, overwrite: bool) -> None:
    """Refuses an output directory that holds another run."""
    saved = out / CONFIG_FILE
    if resume:
        if not saved.is_file():
            raise UserError(f"{out} holds no training run to resume")
        before = yaml.safe_load(saved.read_text(encoding="utf-8"))
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


def _create_output(out: Path) -> None:
    """Makes the output directory, without the traces of an earlier run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            path = out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}") from None


def _check_context(examples, llama: LlamaConfig) -> None:
    longest = max(len(example.tokens) for example in examples)
    if longest > llama.context_length:
        raise UserError(
            f"a row has {longest} tokens, over the model's context of {llama.context_length}: lower "
            "data.max_length"
        )


def _check_finite(metrics: dict[str, float], step: int, rows: list[int], out: Path) -> None:
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    if bad:
        raise UserError(
            f"{', '.join(bad)} not finite at step {step} (rows {rows}): stopped without saving; lower "
            f"optimizer.learning_rate, or resume from the last checkpoint in {out}"
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


def _progress(items: Any, label: str, quiet: bool) -> Any:
    return tqdm(items, desc=label, unit="row", disable=quiet)
