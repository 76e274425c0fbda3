"""A training run from a config: load, filter, step, measure, log, checkpoint, write the IMAE directory."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from omegaconf import OmegaConf
from tqdm import tqdm

from imae_jax.config import AntiExpertConfig, LlamaConfig, LoraConfig
from imae_jax.convert import LanguageModel, load_model
from imae_jax.convert.hf import read_json
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.convert.peft import is_adapter, write_adapter
from imae_jax.distributed import agree, barrier, decide, gather_stacks, is_main, locked
from imae_jax.errors import Stopped, UserError
from imae_jax.files import write_text
from imae_jax.llama import Weights
from imae_jax.runtime import git_state, versions
from imae_jax.sharding import check_divisible, make_mesh, row_shards
from imae_jax.train import data, run_directory
from imae_jax.train.checkpoint import Checkpoints
from imae_jax.train.config import IcdConfig, OptimizerConfig, TrainConfig
from imae_jax.train.objectives import UNITS_OBJECTIVES, AnswerObjective, Objective, UnitsObjective
from imae_jax.train.run_directory import (
    ADAPTER_DIR,
    ADAPTER_STAGES,
    CHECKPOINT_DIR,
    FILTER_DIR,
    FINISHED_FILE,
    IMAE_DIR,
)
from imae_jax.train.run_log import RunLog
from imae_jax.train.step import (
    init_state,
    make_evaluation,
    make_optimizer,
    make_schedule,
    make_train_step,
    place_batch,
    state_shardings,
)
from imae_jax.train.token_filter import (
    adapter_pair,
    check_same_vocabulary,
    filter_tokens,
    log_statistics,
    own_adapter,
    show_filtered,
)

logger = logging.getLogger(__name__)

SAMPLED_STEPS = 16  # whose rows tell how to merge all
# Settings that may change between a run and its continuation: they do not alter what a step computes, but
# for the order in which devices and kernels add up.
FREE_ON_RESUME = {"out", "mesh", "save_every", "keep", "log_every", "eval_every", "eval_rows", "wandb"}
FREE_ON_RESUME |= {"attention"}


def train(
    config: TrainConfig,
    *,
    only_icd: bool = False,
    resume: bool = False,
    from_step: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Trains anti-expert units and writes `OUT/imae`; before that, the adapters that its objective needs.

    Beside it: `config.yaml`, `environment.json` (versions, git state, devices), `metrics.jsonl` (one
    object every `log_every` steps), `evaluation.jsonl` (held-out rows), `training.png`, `tensorboard/`,
    `checkpoints/`, and `icd/` with the same and `adapter/` (of right answers: `icd_right/`).

    Args:
        config: of the run.
        only_icd: stop after the adapters.
        resume: go on from the newest checkpoint in `config.out`.
        from_step: go on from this checkpoint instead; later ones are removed.
        overwrite: begin anew in a directory that holds a run.
        quiet: no progress bars and no samples of T_fact.

    Returns:
        The IMAE directory, or that of the adapter that was trained last.

    Raises:
        UserError: a setting, file or model that does not work, or a loss that is not finite.
        Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    out = Path(config.out)
    if overwrite and (resume or from_step is not None):
        raise UserError("--overwrite begins anew: it goes neither with --resume nor with --from-step")
    resume = resume or from_step is not None
    with locked(out):
        return _train(config, out, only_icd, resume, from_step, overwrite, quiet or not is_main())


def _train(
    config: TrainConfig,
    out: Path,
    only_icd: bool,
    resume: bool,
    from_step: int | None,
    overwrite: bool,
    quiet: bool,
) -> Path:
    rows = data.load_rows(config.data)
    to_train = config.adapters_to_train(only_icd=only_icd)
    mesh = run_mesh(config, bool(to_train))
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
    objective = units_objective(config, model.config)
    check_divisible(model.config, objective.anti_expert, mesh.shape)
    tokenized = data.tokenize(rows, model.tokenizer, config.data)
    _check_context(tokenized, model.config)
    adapters: dict[str, str | None] = dataclasses.asdict(config.adapters)
    for reference in filter(None, adapters.values()):
        own_adapter(reference, model)
    if is_main():
        data.log_statistics(tokenized.statistics)
    environment = {
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": versions(),
        "git": git_state(),
    }
    run_id = run_directory.begin(out, config.to_dict(), environment, resume=resume)
    try:
        with _stop_signals() as stop:
            run = Run(config, out, run_id, mesh, model, tokenized, resume, from_step, quiet, stop)
            for answers in to_train:
                adapter, trained = _train_icd(run, lora, answers)
                adapters[answers] = str(adapter)
                if trained:
                    run = dataclasses.replace(run, from_step=None)
            if only_icd and run.from_step is not None:
                stages = " and ".join(ADAPTER_STAGES[answers] for answers in to_train)
                raise UserError(f"stage {stages} in {out} is finished: --from-step goes with unfinished ones")
            if only_icd:
                return adapter
            if config.objective == "pairs":
                return _train_units(run, objective, (adapters["right"], adapters["wrong"]))
            anti_expert_llm = config.filter.anti_expert_llm or adapters["wrong"]
            return _train_units(run, objective, () if anti_expert_llm is None else (anti_expert_llm,))
    except UserError:
        if is_main() and not run_directory.holds_results(out):
            run_directory.remove(out)  # There is nothing to resume.
        raise


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        config: of the run.
        out: its output directory.
        id: a random string that names it.
        mesh: its devices.
        model: the base, stacked.
        data: tokenized, with every answer token in T_fact.
        resume: go on from checkpoints.
        from_step: go on from this checkpoint instead of the newest.
        quiet: no progress bars and no samples of T_fact.
        stop: the number of the signal that asks the run to stop, or 0. All processes must call it.
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

    def progress(self, items: list, label: str) -> Iterator:
        for item in tqdm(items, desc=label, unit="batch", disable=self.quiet):
            self.check_stop(f"stopped in the {label}")
            yield item

    def check_stop(self, message: str) -> None:
        """Raises `Stopped` if a signal asks for it. All processes must call it."""
        number = self.stop()
        if number:
            raise Stopped(f"{message}: go on with --resume", number)


def _train_icd(run: Run, lora: LoraConfig, answers: str) -> tuple[Path, bool]:
    """Stage 1, an adapter on `wrong` or `right` answers: returns it, and whether it was trained just now."""
    icd, name = run.config.icd, ADAPTER_STAGES[answers]
    out = run.out / name
    path, finished = out / ADAPTER_DIR, out / FINISHED_FILE
    model = run.model
    if icd.model is not None:
        model = load_model(icd.model, dtype=run.config.dtype, stacked=True, mesh=run.mesh)
        check_same_vocabulary(run.model, model, icd.model, run.data.train)
        _check_context(run.data, model.config)
    stage = run.data.stage([answers])
    identity = _identity(model, stage)
    if decide(is_adapter(path) and finished.is_file()):
        if read_json(finished) != identity:
            raise UserError(f"{path} belongs to another base or other data: restore them, or start anew")
        return path, False
    optimizer = dataclasses.replace(icd.optimizer, steps=icd.steps(len(stage.train)))
    mode = {"wrong": "anti_expert_llm", "right": "right_llm"}[answers]
    deltas = run_stage(
        run,
        name,
        out,
        AnswerObjective(lora, mode, run.config.remat, run.config.attention),
        model.config,
        model.model.weights(),
        stage,
        _Schedule.of(icd, optimizer),
        identity,
    )
    if is_main():
        reference, revision = model.base.reference, model.base.revision
        write_adapter(
            path, deltas, model.config, lora, base_reference=reference, revision=revision, overwrite=True
        )
        write_text(finished, json.dumps(identity, indent=2) + "\n")
    barrier("adapter written")
    return path, True


def _identity(model: LanguageModel, stage: data.StageData) -> dict[str, str]:
    """What a stage's results belong to."""
    return {"base": model.base.fingerprint, "base dtype": model.base.dtype, "data": stage.fingerprint}


def _train_units(run: Run, objective: UnitsObjective, models: Sequence[str]) -> Path:
    """Stages 2 and 3, the token filter and the units: returns the IMAE directory.

    Args:
        run: of which these are stages.
        objective: of the units.
        models: of the token filter, see `filter_tokens`; objective `pairs` contrasts the same two adapters,
            also where no token is filtered.
    """
    config = run.config
    stage = run.data.stage(objective.answers)
    filter_models = [] if config.filter_keeps_all else models
    taken = data.taken(stage.lengths, config, config.batch_size, config.optimizer.steps)
    filtered, kept = filter_tokens(
        data.flat([stage.train[i] for i in taken] + stage.held_out),
        run.model,
        filter_models,
        config.filter.gamma,
        run.out / FILTER_DIR,
        mesh=run.mesh,
        batch_size=config.batch_size // config.accumulation,
        max_length=config.data.max_length,
        reuse=None if config.filter.reuse is None else Path(config.filter.reuse),
        progress=run.progress,
    )
    if filter_models and is_main():
        log_statistics(kept)
        if not run.quiet:
            show_filtered(filtered, run.model.tokenizer)
    rows = iter(filtered)
    train = list(stage.train)
    for i in taken:
        train[i] = tuple(next(rows) for _ in train[i])
    held_out = [tuple(next(rows) for _ in question) for question in stage.held_out]
    stage = dataclasses.replace(stage, train=train, held_out=held_out)
    frozen, identity = run.model.model.weights(), _identity(run.model, stage) | objective.identity
    if config.objective == "pairs":
        adapters = [own_adapter(model, run.model) for model in models]
        fingerprints = [adapter.fingerprint(run.model.base.fingerprint) for adapter in adapters]
        if len(set(fingerprints)) == 1:
            raise UserError(f"{models[0]} and {models[1]} are the same adapter: their contrast is 0")
        frozen = adapter_pair(frozen, adapters, run.mesh)
        identity["pair of adapters"] = " and ".join(fingerprints)
    units = run_stage(
        run,
        "train",
        run.out,
        objective,
        run.model.config,
        frozen,
        stage,
        _Schedule.of(config, config.optimizer),
        identity,
    )
    path = run.out / IMAE_DIR
    if is_main():
        write_imae_dir(
            path,
            Weights(frozen.base, units),
            run.model.config,
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


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """How long and in which portions a stage trains."""

    batch_size: int
    accumulation: int
    optimizer: OptimizerConfig

    @classmethod
    def of(cls, stage: TrainConfig | IcdConfig, optimizer: OptimizerConfig) -> "_Schedule":
        return cls(stage.batch_size, stage.accumulation, optimizer)


def run_stage(
    run: Run,
    name: str,
    out: Path,
    objective: Objective,
    llama: LlamaConfig,
    frozen: Weights,
    stage: data.StageData,
    schedule: _Schedule,
    identity: dict[str, str],
) -> Any:
    """Trains one objective; writes logs and checkpoints into `out`.

    Args:
        run: what it is a stage of.
        name: of the stage.
        out: its directory.
        objective: what to minimize.
        llama: config of the base.
        frozen: the base, stacked, and what the objective needs besides.
        stage: rows to train on and to measure on.
        schedule: of the stage.
        identity: what its checkpoints belong to.

    Returns:
        The trained part, on the host.
    """
    config, mesh = run.config, run.mesh
    optimizer, learning_rate = make_optimizer(schedule.optimizer), make_schedule(schedule.optimizer)
    shardings = state_shardings(llama, objective, optimizer, mesh)
    train_step = make_train_step(llama, objective, optimizer, shardings, mesh)
    micro_batch_size = schedule.batch_size // schedule.accumulation

    def merging_of(batches: Sequence[Sequence[data.Example]]) -> data.Merging | None:
        if objective.attention != "plain":
            return None  # The kernels of the others take no mask.
        return data.choose_merging(batches, llama, row_shards(mesh), config.data.max_length)

    measure = _Measurement(llama, objective, mesh, stage, micro_batch_size, merging_of)
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
    barrier(f"{name} begins")
    checkpoints = Checkpoints(out / CHECKPOINT_DIR, config.keep, identity)
    start = _start_of(checkpoints, run, out)

    begin = functools.partial(init_state, llama, objective, optimizer, shardings, config.seed)
    # Never both at once: optimizer states are large.
    state = checkpoints.load(start, jax.eval_shape(begin), shardings) if start else begin()
    checkpoints.delete_after(start)

    steps = schedule.optimizer.steps
    log = None
    if is_main():
        wandb = {"project": config.wandb, "id": f"{run.id}-{name}", "name": f"{run.out.name} {name}"}
        wandb |= {"dir": str(run.out), "config": config.to_dict()}
        log = RunLog(out, start, wandb if config.wandb is not None else None)
    lengths = stage.lengths
    bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=run.quiet)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        if log is not None:
            stack.callback(log.close)
        stack.enter_context(bar)

        eval_every = config.eval_every if stage.held_out else None

        def evaluate(trainable: Any, done: int, limit: int | None) -> None:
            metrics = measure(trainable, frozen, limit)
            if log is not None:
                log.evaluation(done, metrics)

        def rows_of(step: int) -> tuple[list[int], list[data.Example]]:
            chosen = data.batch_rows(
                lengths, schedule.batch_size, config.seed, step, config.data.group_by_length
            )
            return chosen, data.flat(stage.train[i] for i in chosen)

        sample = (rows_of(step)[1] for step in range(min(steps, SAMPLED_STEPS)))
        size = micro_batch_size * len(objective.answers)
        merging = merging_of([rows[i : i + size] for rows in sample for i in range(0, len(rows), size)])

        def batch_of(step: int):
            chosen, rows = rows_of(step)
            batch = data.make_batch(rows, schedule.accumulation, merging=merging)
            return batch, chosen, place_batch(batch, mesh)

        run.check_stop(f"stopped before stage {name}")
        if start == 0 and eval_every is not None:
            evaluate(state.trainable, 0, config.eval_rows)
        clock, tokens = time.perf_counter(), 0
        following = batch_of(start) if start < steps else None
        for done in range(start + 1, steps + 1):
            batch, chosen, placed = following
            state, metrics = train_step(state, frozen, placed)
            tokens += int(batch.attention_mask.sum())
            # The next batch is laid out while the devices compute; then the loss is waited for, so that
            # no step is taken after one that failed.
            following = batch_of(done) if done < steps else None
            metrics = {key: float(value) for key, value in jax.device_get(metrics).items()}
            bad = [key for key in ("loss", "grad_norm") if not np.isfinite(metrics[key])]
            if bad:
                checkpoints.save(done - 1, state)
                checkpoints.wait()
                rows = [stage.train[i][0].row for i in chosen]
                raise UserError(
                    f"{', '.join(bad)} not finite at step {done} of stage {name} (rows {rows}): the state "
                    f"before it is saved in {out / CHECKPOINT_DIR / str(done - 1)}; lower its learning_rate"
                )
            if done % config.log_every == 0 or done == steps:
                now = time.perf_counter()
                rate, clock, tokens = tokens / (now - clock), now, 0
                if log is not None:
                    extra = {"learning_rate": float(learning_rate(done - 1)), "tokens_per_second": rate}
                    log.train(done, metrics | extra)
                shown = {k: f"{metrics[k]:.3f}" for k in objective.shown if not math.isnan(metrics[k])}
                bar.set_postfix(shown | {"tok/s": f"{rate:.0f}"})
            bar.update()
            if eval_every is not None and (done % eval_every == 0 or done == steps):
                began = time.perf_counter()
                evaluate(state.trainable, done, None if done == steps else config.eval_rows)
                clock += time.perf_counter() - began
            stop = run.stop()
            if done % config.save_every == 0 or done == steps or stop:
                checkpoints.save(done, state)
            if stop:
                checkpoints.wait()
                message = f"stopped after step {done} of stage {name}, saved in {out}: go on with --resume"
                raise Stopped(message, stop)
        checkpoints.wait()
        if log is not None:
            log.plot()
    run.check_stop(f"stopped after stage {name}, saved in {out}")
    trainable = state.trainable
    del state  # Adam's moments make room.
    return gather_stacks(trainable)


class _Measurement:
    """What held-out rows give: mean losses, the gate of every layer, how right and wrong answers fare."""

    def __init__(
        self,
        llama: LlamaConfig,
        objective: Objective,
        mesh: jax.sharding.Mesh,
        stage: data.StageData,
        batch_size: int,
        merging_of: Callable[[Sequence[Sequence[data.Example]]], data.Merging | None],
    ):
        self._mesh, self._batch_size, self._stage = mesh, batch_size, stage
        self._objective = objective
        self._losses, self._answers = make_evaluation(llama, objective, mesh)
        self._merging = {
            len(questions[0]): merging_of(self._batches(sorted(questions, key=data.longest)))
            for questions in (stage.held_out, stage.answers)
            if questions
        }

    def __call__(self, trainable: Any, frozen: Weights, limit: int | None) -> dict[str, Any]:
        """Of the first `limit` questions.

        Of every mode: the mean log-probability of the tokens of `right_` and of `wrong_` answers; `margin_`,
        by how much a right answer's summed log-probability exceeds the wrong one's, the mean over pairs;
        `wins_`, the share of pairs where it does, ties counted half.
        """
        questions = sorted(self._stage.held_out[:limit], key=data.longest)
        parts = self._run(self._losses, questions, trainable, frozen)
        totals = jax.tree.map(lambda *x: sum(x), *parts)
        sums, counts = totals["sums"], totals["counts"]
        metrics = {k: float(v) for k, v in self._objective.metrics(sums, counts).items()}

        pairs = sorted(self._stage.answers[:limit], key=data.longest)
        parts = self._run(self._answers, pairs, trainable, frozen)
        tokens = np.array([[len(example.fact) for example in pair] for pair in pairs]).sum(axis=0)
        for mode in parts[0]:
            log_probs = np.concatenate([part[mode] for part in parts])[: 2 * len(pairs)].reshape(-1, 2)
            margins = log_probs[:, 1] - log_probs[:, 0]
            wrong, right = log_probs.sum(axis=0, dtype=np.float64) / tokens
            wins = np.mean((np.sign(margins) + 1) / 2)
            metrics |= {f"right_{mode}": float(right), f"wrong_{mode}": float(wrong)}
            metrics |= {f"margin_{mode}": float(margins.mean()), f"wins_{mode}": float(wins)}
        bad = [k for k, v in metrics.items() if not math.isfinite(v) and counts.get(k, 1) > 0]
        if bad:
            logger.warning("held-out rows: %s not finite, which is recorded as null", ", ".join(bad))
        per_layer = self._objective.per_layer(sums, counts)
        return metrics | {f"{k}_by_layer": np.asarray(v).tolist() for k, v in per_layer.items()}

    def _run(
        self, function: Any, questions: Sequence[data.Question], trainable: Any, frozen: Weights
    ) -> list[Any]:
        """What `function` gives for every batch."""
        merging = self._merging[len(questions[0])]
        batches = (data.make_batch(rows, 1, merging=merging) for rows in self._batches(questions))
        return [
            jax.device_get(function(trainable, frozen, place_batch(batch, self._mesh))) for batch in batches
        ]

    def _batches(self, questions: Sequence[data.Question]) -> list[list[data.Example]]:
        return data.in_batches(data.flat(questions), len(questions[0]) * self._batch_size)


def _start_of(checkpoints: Checkpoints, run: Run, out: Path) -> int:
    """Steps done at the checkpoint to go on from; 0 to begin."""
    if run.from_step is None:
        return max(checkpoints.steps, default=0) if run.resume else 0
    if run.from_step not in checkpoints.steps:
        there = ", ".join(map(str, checkpoints.steps)) or "none"
        raise UserError(f"--from-step {run.from_step}: {out / CHECKPOINT_DIR} has {there}")
    return run.from_step


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that tells which signal asks the run to save and stop, or 0.

    All processes call it at the same places and get the same answer, whichever of them was signalled. A
    second Ctrl-C interrupts at once.
    """
    received = []

    def remember(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {}
    # Only the main thread may listen.
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: agree(received[0] if received else 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_mesh(config: TrainConfig, with_icd: bool) -> jax.sharding.Mesh:
    """The mesh that a config asks for, over all devices; it divides the rows of every micro-batch."""
    sizes = config.mesh
    data_size = sizes.data
    if data_size == -1:
        data_size = max(1, jax.device_count() // max(1, sizes.fsdp * sizes.tensor))
    mesh = make_mesh(data_size, sizes.fsdp, sizes.tensor)
    shards = row_shards(mesh)
    stages = [("", config)] + ([("icd.", config.icd)] if with_icd else [])
    for prefix, stage in stages:
        micro = stage.batch_size // stage.accumulation
        if micro % shards:
            raise UserError(
                f"{prefix}batch_size / {prefix}accumulation = {micro} rows cannot be spread over "
                f"data · fsdp = {shards} devices: choose a multiple of {shards}"
            )
    return mesh


def units_objective(config: TrainConfig, llama: LlamaConfig) -> UnitsObjective:
    """What the units of a base are trained for, with their sizes.

    Raises:
        UserError: `units.first_layer` names no layer of the base.
    """
    units = config.units
    if not units.first_layer < llama.num_layers:
        raise UserError(
            f"units.first_layer={units.first_layer} leaves no layer to train: the model has "
            f"{llama.num_layers}, counted from 0"
        )
    sizes = AntiExpertConfig.scaled_to(llama, units.ratio)
    if units.intermediate_size is not None:
        sizes = AntiExpertConfig(units.intermediate_size)
    keep = config.loss.keep
    if keep is None:
        keep = 0.0 if config.objective == "paper" else 1.0
    return UNITS_OBJECTIVES[config.objective](
        sizes, dataclasses.replace(config.loss, keep=keep), config.remat, config.attention, units.first_layer
    )


def _check_output(out: Path, config: TrainConfig, resume: bool, overwrite: bool) -> None:
    """Refuses an output directory that holds another run."""
    if resume:
        before = run_directory.read_settings(out)
        now = config.to_dict()
        # A setting that a later version added was at its default.
        before = OmegaConf.to_container(OmegaConf.merge(TrainConfig("", "").to_dict(), before))
        # γ only thresholds: until a step of the units is saved, another may be tried.
        if not any((out / CHECKPOINT_DIR).glob("[0-9]*")) and isinstance(before.get("filter"), dict):
            before["filter"] = before["filter"] | {"gamma": now["filter"]["gamma"]}
        changed = [key for key in now if key not in FREE_ON_RESUME and now[key] != before.get(key)]
        if changed:
            raise UserError(
                f"{', '.join(changed)} differ(s) from the run in {out}: resume with its settings, or "
                "start anew with another out"
            )
    elif not overwrite and run_directory.holds_run(out):
        raise UserError(
            f"{out} holds a training run: pass --resume to go on, --overwrite to replace it, or another out"
        )


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
