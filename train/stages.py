"""A training run from a config: its stages, and what each writes into the run's directory."""

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from imae_jax.config import LlamaConfig
from imae_jax.convert import LanguageModel, load_model
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.convert.peft import is_adapter, write_adapter
from imae_jax.convert.references import check_same_vocabulary
from imae_jax.distributed import barrier, decide, gather_stacks, is_main, locked
from imae_jax.errors import Stopped, UserError
from imae_jax.files import read_json, write_text
from imae_jax.llama import Weights
from imae_jax.runtime import git_state, versions
from imae_jax.sharding import check_divisible, row_shards
from imae_jax.train import data, run_directory
from imae_jax.train.checkpoint import Checkpoints
from imae_jax.train.config import IcdConfig, TrainConfig, check_resumed
from imae_jax.train.measurement import Measurement
from imae_jax.train.objectives import Objective, UnitsObjective
from imae_jax.train.preemption import stop_signals
from imae_jax.train.run_directory import ADAPTER_DIR, ADAPTER_STAGES, CHECKPOINT_DIR, FILTER_DIR, IMAE_DIR
from imae_jax.train.run_log import RunLog
from imae_jax.train.setup import adapter_objective, run_mesh, units_objective
from imae_jax.train.step import make_schedule
from imae_jax.train.token_filter import (
    adapter_pair,
    filter_tokens,
    log_statistics,
    open_base_adapter,
    show_filtered,
)
from imae_jax.train.trainer import Hook, NotFinite, Step, Trainer

logger = logging.getLogger(__name__)

SAMPLED_STEPS = 16  # whose rows tell how to merge all


def train(
    config: TrainConfig,
    *,
    only_icd: bool = False,
    resume: bool = False,
    from_step: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    hooks: Sequence[Hook] = (),
) -> Path:
    """Trains anti-expert units and writes `OUT/imae`; before that, the adapters that its objective needs.

    Beside it: `config.yaml`, `environment.json` (versions, git state, devices), `metrics.jsonl` (one
    object every `log_every` steps), `evaluation.jsonl` (held-out rows), `training.png`, `tensorboard/`,
    `checkpoints/`, and `icd/` with the same and `adapter/` (of right answers: `icd_right/`).

    Args:
        config: settings of the run.
        only_icd: stop after the adapters.
        resume: resume from the newest checkpoint in `config.out`.
        from_step: resume from this checkpoint instead; later ones are removed.
        overwrite: start over in a directory that holds a run.
        quiet: no progress bars and no samples of T_fact.
        hooks: called after every step of every stage. What they add to `Step.metrics` is logged with it.

    Returns:
        The IMAE directory, or that of the adapter that was trained last.

    Raises:
        UserError: a setting, file or model that does not work, or a loss that is not finite.
        Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    out = Path(config.out)
    if overwrite and (resume or from_step is not None):
        raise UserError("--overwrite starts over: it goes neither with --resume nor with --from-step")
    resume = resume or from_step is not None
    with locked(out):
        if not resume:
            run_directory.check_new(out)
        if is_main() and not only_icd and (unused := config.unused()):
            names = ", ".join(unused)
            logger.warning("%s: set, but not used with objective=%s", names, config.objective)
        rows = data.load_rows(config.data)
        mesh = run_mesh(config, bool(config.adapters_to_train(only_icd=only_icd)))
        if resume:
            units_begun = any((out / CHECKPOINT_DIR).glob("[0-9]*"))
            check_resumed(config, run_directory.read_settings(out), out, units_begun=units_begun)
        elif not overwrite and run_directory.holds_run(out):
            raise UserError(
                f"{out} holds a training run: pass --resume to resume it, --overwrite to replace it, or "
                "another out"
            )
        model, tokenized = _load(config, rows, mesh)
        environment = {"devices": jax.device_count(), "processes": jax.process_count()}
        environment |= {"versions": versions(), "git": git_state()}
        run_id = run_directory.begin(out, config.to_dict(), environment, resume=resume)
        try:
            with stop_signals() as stop:
                quiet = quiet or not is_main()
                run = Run(config, out, run_id, mesh, model, tokenized, resume, from_step, quiet, stop, hooks)
                return _train_stages(run, only_icd)
        except UserError:
            if is_main() and not run_directory.holds_results(out):
                run_directory.remove(out)  # There is nothing to resume.
            raise


def _load(
    config: TrainConfig, rows: Sequence[data.Row], mesh: jax.sharding.Mesh
) -> tuple[LanguageModel, data.TokenizedData]:
    """The base and the rows in its tokens, when both have been checked."""
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
    check_divisible(model.config, units_objective(config, model.config).anti_expert, mesh.shape)
    tokenized = data.tokenize(rows, model.tokenizer, config.data)
    _check_context(tokenized, model.config)
    for reference in filter(None, (config.adapters.right, config.adapters.wrong)):
        open_base_adapter(reference, model)
    if is_main():
        data.log_statistics(tokenized.statistics)
    return model, tokenized


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        config: settings of the run.
        out: its output directory.
        id: a random string that names it.
        mesh: its devices.
        model: the base, stacked.
        data: tokenized, with every answer token in T_fact.
        resume: resume from checkpoints.
        from_step: resume from this checkpoint instead of the newest.
        quiet: no progress bars and no samples of T_fact.
        stop: the number of the signal that asks the run to stop, or 0: see `stop_signals`.
        hooks: the user's.
    """

    config: TrainConfig
    out: Path
    id: str
    mesh: jax.sharding.Mesh
    model: LanguageModel
    data: data.TokenizedData
    resume: bool
    from_step: int | None
    quiet: bool
    stop: Callable[[], int]
    hooks: Sequence[Hook] = ()

    def progress(self, items: list, label: str) -> Iterator:
        for item in tqdm(items, desc=label, unit="batch", disable=self.quiet):
            self.check_stop(f"stopped in the {label}")
            yield item

    def check_stop(self, message: str) -> None:
        """Raises `Stopped` if a signal asks for it. All processes must call it."""
        barrier(message)
        number = self.stop()
        if number:
            raise Stopped(f"{message}: resume with --resume", number)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is trained in one stage, and where its files go.

    Attributes:
        name: name of the stage, for messages and logs.
        out: its directory.
        objective: what to minimize.
        llama: config of the base.
        frozen: the base, stacked, and what the objective needs besides.
        data: rows to train on and to measure on.
        settings: batch size, accumulation and optimizer.
        identity: what its checkpoints belong to.
    """

    name: str
    out: Path
    objective: Objective
    llama: LlamaConfig
    frozen: Weights
    data: data.StageData
    settings: TrainConfig | IcdConfig
    identity: dict[str, str]


def _train_stages(run: Run, only_icd: bool) -> Path:
    """All stages: returns the directory of the last one's result."""
    config = run.config
    adapters: dict[str, str | None] = dataclasses.asdict(config.adapters)
    stages = config.adapters_to_train(only_icd=only_icd)
    for answers in stages:
        path, trained = _train_adapter(run, answers)
        adapters[answers] = str(path)
        if trained:
            run = dataclasses.replace(run, from_step=None)
    if only_icd:
        if run.from_step is not None:
            names = " and ".join(ADAPTER_STAGES[answers] for answers in stages)
            raise UserError(f"stage {names} in {run.out} is finished: --from-step goes with unfinished ones")
        return path
    if config.objective == "pairs":
        return _train_units(run, (adapters["right"], adapters["wrong"]))
    anti_expert_llm = config.filter.anti_expert_llm or adapters["wrong"]
    return _train_units(run, () if anti_expert_llm is None else (anti_expert_llm,))


def _train_adapter(run: Run, answers: str) -> tuple[Path, bool]:
    """An adapter on `wrong` or `right` answers: its directory, and whether it was trained just now."""
    config, icd, name = run.config, run.config.icd, ADAPTER_STAGES[answers]
    path, finished = (run.out / name / file for file in (ADAPTER_DIR, run_directory.FINISHED_FILE))
    model = run.model
    if icd.model is not None:
        model = load_model(icd.model, dtype=config.dtype, stacked=True, mesh=run.mesh)
        check_same_vocabulary(run.model, model)
        _check_context(run.data, model.config)
    rows = run.data.stage([answers])
    identity = _identity(model, rows)
    if decide(is_adapter(path) and finished.is_file()):
        if read_json(finished) != identity:
            raise UserError(f"{path} belongs to another base or other data: restore them, or start over")
        return path, False
    optimizer = dataclasses.replace(icd.optimizer, steps=icd.steps(len(rows.train)))
    settings = dataclasses.replace(icd, optimizer=optimizer)
    objective, frozen = adapter_objective(config, answers), model.model.weights()
    stage = Stage(name, run.out / name, objective, model.config, frozen, rows, settings, identity)
    deltas = run_stage(run, stage)
    if is_main():
        origin = {"base_reference": model.base.reference, "revision": model.base.revision}
        write_adapter(path, deltas, model.config, icd.lora, **origin, overwrite=True)
        write_text(finished, json.dumps(identity, indent=2) + "\n")
    barrier("adapter written")
    return path, True


def _identity(model: LanguageModel, rows: data.StageData) -> dict[str, str]:
    """What a stage's results belong to."""
    return {"base": model.base.fingerprint, "base dtype": model.base.dtype, "data": rows.fingerprint}


def _train_units(run: Run, models: Sequence[str]) -> Path:
    """The token filter and the units: returns the IMAE directory.

    Args:
        run: to which these stages belong.
        models: models of the token filter, see `filter_tokens`; objective `pairs` contrasts the same two
            adapters, also where no token is filtered.
    """
    config, llama = run.config, run.model.config
    objective = units_objective(config, llama)
    rows, kept = _filtered(run, objective, models)
    frozen, identity = run.model.model.weights(), _identity(run.model, rows) | objective.identity
    if config.objective == "pairs":
        adapters = [open_base_adapter(model, run.model) for model in models]
        fingerprints = [adapter.fingerprint(run.model.base.fingerprint) for adapter in adapters]
        if len(set(fingerprints)) == 1:
            raise UserError(f"{models[0]} and {models[1]} are the same adapter: their contrast is 0")
        frozen = adapter_pair(frozen, adapters, run.mesh)
        identity["pair of adapters"] = " and ".join(fingerprints)
    units = run_stage(run, Stage("train", run.out, objective, llama, frozen, rows, config, identity))
    path = run.out / IMAE_DIR
    if is_main():
        write_imae_dir(
            path,
            Weights(frozen.base, units),
            llama,
            objective.anti_expert,
            base=dataclasses.asdict(run.model.base),
            training={
                "config": config.to_dict(),
                "data": run.data.statistics | kept,
                "versions": versions(),
                "git": git_state(),
            },
            overwrite=True,
        )
    barrier("units written")
    return path


def _filtered(
    run: Run, objective: UnitsObjective, models: Sequence[str]
) -> tuple[data.StageData, dict[str, Any]]:
    """The rows of the units' stage, with T_fact where they are used, and the filter's statistics."""
    config, stage = run.config, run.data.stage(objective.answers)
    if not models or config.filter_keeps_all:
        return stage, {"kept_share": 1.0}
    taken = data.taken(stage.lengths, config, config.batch_size, config.optimizer.steps)
    examples = data.flat([stage.train[i] for i in taken] + stage.held_out)
    filtered, kept = filter_tokens(
        examples, run.model, models, config, run.out / FILTER_DIR, mesh=run.mesh, progress=run.progress
    )
    if is_main():
        log_statistics(kept)
        if not run.quiet:
            show_filtered(filtered, run.model.tokenizer)
    rows = iter(filtered)
    train = list(stage.train)
    for i in taken:
        train[i] = tuple(next(rows) for _ in train[i])
    held_out = [tuple(next(rows) for _ in question) for question in stage.held_out]
    return dataclasses.replace(stage, train=train, held_out=held_out), kept


def run_stage(run: Run, stage: Stage) -> Any:
    """Trains a stage's objective; writes logs and checkpoints into its directory.

    Returns:
        The trained part, on the host.
    """
    config, name = run.config, stage.name
    trainer = Trainer(stage.llama, stage.objective, stage.settings.optimizer, run.mesh, config.seed)
    if is_main():
        stage.out.mkdir(parents=True, exist_ok=True)
    barrier(f"{name} begins")
    checkpoints = Checkpoints(stage.out / CHECKPOINT_DIR, config.keep, stage.identity)
    start = _first_step(checkpoints, run, stage.out)
    # Never both at once: optimizer states are large.
    state = (
        checkpoints.load(start, trainer.state_shape(), trainer.shardings) if start else trainer.init_state()
    )
    checkpoints.delete_after(start)
    batches = _Batches(run, stage)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        log = _Log(run, stage, start)
        stack.callback(log.close)
        measured = _HeldOut(run, stage, batches, log) if stage.data.held_out and config.eval_every else None
        hooks = [*run.hooks, log, *([measured] if measured else []), _Saving(run, stage, checkpoints)]
        run.check_stop(f"stopped before stage {name}")
        if measured and start == 0:
            measured.measure(0, state.trainable, config.eval_rows)
        try:
            state = trainer.run(state, stage.frozen, batches, start=start, hooks=hooks)
        except NotFinite as error:
            checkpoints.save(error.number - 1, error.state)
            checkpoints.wait()
            rows = [question[0].row for question in batches.questions(error.number - 1)]
            raise UserError(
                f"{', '.join(error.names)} not finite at step {error.number} of stage {name} (rows {rows}): "
                f"the state before it is saved in {stage.out / CHECKPOINT_DIR / str(error.number - 1)}; "
                "lower its learning_rate"
            ) from error
        checkpoints.wait()
        log.plot()
    run.check_stop(f"stopped after stage {name}, saved in {stage.out}")
    trainable = state.trainable
    del state  # Adam's moments make room.
    return gather_stacks(trainable)


class _Batches:
    """The batch of each step of a stage, by its number from 0."""

    def __init__(self, run: Run, stage: Stage):
        self._stage, self._config, self._shards = stage, run.config, row_shards(run.mesh)
        self._lengths = stage.data.lengths
        self.micro_batch_size = stage.settings.batch_size // stage.settings.accumulation
        size = self.micro_batch_size * len(stage.objective.answers)
        steps = range(min(stage.settings.optimizer.steps, SAMPLED_STEPS))
        sample = (data.flat(self.questions(step)) for step in steps)
        self._merging = self.choose_merging(
            [rows[i : i + size] for rows in sample for i in range(0, len(rows), size)]
        )

    def choose_merging(self, batches: Sequence[Sequence[data.Example]]) -> data.Merging | None:
        if self._stage.objective.attention != "plain":
            return None  # The kernels of the others take no mask.
        return data.choose_merging(batches, self._stage.llama, self._shards, self._config.data.max_length)

    def questions(self, step: int) -> list[data.Question]:
        config, size = self._config, self._stage.settings.batch_size
        chosen = data.batch_rows(self._lengths, size, config.seed, step, config.data.group_by_length)
        return [self._stage.data.train[i] for i in chosen]

    def __call__(self, step: int) -> data.Batch:
        rows = data.flat(self.questions(step))
        return data.make_batch(rows, self._stage.settings.accumulation, merging=self._merging)


class _Log:
    """Hook: the run's log, which the main process writes, and the progress bar."""

    def __init__(self, run: Run, stage: Stage, start: int):
        config, optimizer = run.config, stage.settings.optimizer
        self._every, self._learning_rate = config.log_every, make_schedule(optimizer)
        self._names, self._tokens, self._seconds = stage.objective.shown, 0, 0.0
        wandb = {"project": config.wandb, "id": f"{run.id}-{stage.name}"}
        wandb |= {"name": f"{run.out.name} {stage.name}", "dir": str(run.out), "config": config.to_dict()}
        self._log = (
            RunLog(stage.out, start, wandb if config.wandb is not None else None) if is_main() else None
        )
        steps = {"total": optimizer.steps, "initial": start}
        self._bar = tqdm(**steps, desc=stage.name, unit="step", disable=run.quiet)

    def __call__(self, step: Step) -> None:
        self._tokens, self._seconds = self._tokens + step.tokens, self._seconds + step.seconds
        if step.number % self._every == 0 or step.is_last:
            rate, self._tokens, self._seconds = self._tokens / self._seconds, 0, 0.0
            extra = {"learning_rate": float(self._learning_rate(step.number - 1)), "tokens_per_second": rate}
            if self._log is not None:
                self._log.train(step.number, step.metrics | extra)
            shown = {k: f"{step.metrics[k]:.3f}" for k in self._names if not math.isnan(step.metrics[k])}
            self._bar.set_postfix(shown | {"tok/s": f"{rate:.0f}"})
        self._bar.update()

    def evaluation(self, number: int, metrics: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.evaluation(number, metrics)

    def plot(self) -> None:
        if self._log is not None:
            self._log.plot()

    def close(self) -> None:
        self._bar.close()
        if self._log is not None:
            self._log.close()


class _HeldOut:
    """Hook: measures held-out rows."""

    def __init__(self, run: Run, stage: Stage, batches: _Batches, log: _Log):
        size = batches.micro_batch_size
        self._measure = Measurement(
            stage.llama, stage.objective, run.mesh, stage.data, size, batches.choose_merging
        )
        self._config, self._frozen, self._log = run.config, stage.frozen, log

    def __call__(self, step: Step) -> None:
        if step.number % self._config.eval_every == 0 or step.is_last:
            limit = None if step.is_last else self._config.eval_rows
            self.measure(step.number, step.state.trainable, limit)

    def measure(self, number: int, trainable: Any, limit: int | None) -> None:
        self._log.evaluation(number, self._measure(trainable, self._frozen, limit))


class _Saving:
    """Hook: saves checkpoints, and stops the run where a signal asks for it."""

    def __init__(self, run: Run, stage: Stage, checkpoints: Checkpoints):
        self._run, self._stage, self._checkpoints = run, stage, checkpoints

    def __call__(self, step: Step) -> None:
        stop = self._run.stop()
        if step.number % self._run.config.save_every == 0 or step.is_last or stop:
            self._checkpoints.save(step.number, step.state)
        if stop:
            self._checkpoints.wait()
            stage = self._stage
            message = f"stopped after step {step.number} of stage {stage.name}, saved in {stage.out}"
            raise Stopped(f"{message}: resume with --resume", stop)


def _first_step(checkpoints: Checkpoints, run: Run, out: Path) -> int:
    """Steps done at the checkpoint to resume from; 0 to begin."""
    if run.from_step is None:
        return max(checkpoints.steps, default=0) if run.resume else 0
    if run.from_step not in checkpoints.steps:
        steps = ", ".join(map(str, checkpoints.steps)) or "none"
        raise UserError(f"--from-step {run.from_step}: {out / CHECKPOINT_DIR} has {steps}")
    return run.from_step


def _check_context(tokenized: data.TokenizedData, llama: LlamaConfig) -> None:
    examples = tokenized.train + tokenized.train_right + tokenized.held_out + tokenized.right
    longest = max(len(example.tokens) for example in examples)
    for example in examples:
        llama.check_token_ids(example.tokens)
    if longest > llama.context_length:
        raise UserError(
            f"a row has {longest} tokens, over the model's context of {llama.context_length}: lower "
            "data.max_length"
        )
