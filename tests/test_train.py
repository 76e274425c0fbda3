"""Training: mesh and accumulation invariance, freezing, resume, data order, the command."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EVEN_SIZES, assert_bitwise, error_of, losses_of, user_error, write_rows
from helpers.training import PAIR, examples, pairs, random_deltas

from imae_jax.config import AntiExpertConfig, LoraConfig
from imae_jax.convert import load_model
from imae_jax.convert.__main__ import main as convert
from imae_jax.convert.peft import write_adapter
from imae_jax.convert.references import PUBLISHED_SIZES, model_config
from imae_jax.decode.methods.imae import Strength
from imae_jax.decode.scoring import Continuation, score
from imae_jax.lora import side_by_side
from imae_jax.sharding import check_divisible, make_mesh
from imae_jax.train import data
from imae_jax.train.__main__ import main
from imae_jax.train.config import OptimizerConfig, TrainConfig, load_config
from imae_jax.train.objectives import UNITS_OBJECTIVES, ImaeObjective
from imae_jax.train.run_directory import ADAPTER_STAGES
from imae_jax.train.setup import run_mesh, units_objective
from imae_jax.train.stages import train
from imae_jax.train.step import (
    init_state,
    make_optimizer,
    make_train_step,
    place_batch,
    state_shardings,
)
from imae_jax.train.token_filter import read_log_ratios

UNITS = AntiExpertConfig(24)


def run_steps(
    checkpoint, mesh_sizes, *, accumulation=1, steps=3, rows=8, dtype="float32", name="paper", tree_rows=0
):
    """Losses of a few steps of an objective, and the units after them."""
    mesh = make_mesh(*mesh_sizes)
    lm = checkpoint.load(stacked=True, mesh=mesh, dtype=dtype)
    config = TrainConfig(
        model="", out="", accumulation=accumulation, optimizer=OptimizerConfig(steps=10, warmup_steps=1)
    )
    optimizer = make_optimizer(config.optimizer)
    objective = UNITS_OBJECTIVES[name](UNITS, dataclasses.replace(config.loss, keep=float(name != "paper")))
    shardings = state_shardings(lm.config, objective, optimizer, mesh)
    state = init_state(lm.config, objective, optimizer, shardings, seed=0)
    step = make_train_step(lm.config, objective, optimizer, shardings, mesh)
    frozen = lm.model.weights()
    base, make_rows = frozen.base, examples if name == "paper" else pairs
    if name == "pairs":
        adapters = [(random_deltas(lm.config, lora, 0), lora.scale) for lora in PAIR]
        frozen = dataclasses.replace(frozen, lora=side_by_side(adapters))
    metrics = []
    for i in range(steps):
        merging = data.Merging(tree_rows, 512) if tree_rows else None
        batch = data.make_batch(make_rows(rows, seed=i), accumulation, merging=merging)
        batch = place_batch(batch, mesh)
        state, values = step(state, frozen, batch)
        metrics.append({name: float(value) for name, value in values.items()})
    return metrics, state, base


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=lambda s: "x".join(map(str, s)))
def test_every_mesh_gives_the_same_losses(checkpoint, sizes):
    expected, _, _ = run_steps(checkpoint, (8, 1, 1))
    actual, state, base = run_steps(checkpoint, sizes)
    for a, b in zip(actual, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    spread = {name: len(array.sharding.device_set) for name, array in state.trainable.items()}
    assert set(spread.values()) == {8}
    shard = base["layers"]["w_gate"].addressable_shards[0].data.shape
    L, D, F = base["layers"]["w_gate"].shape
    assert shard == (L, D // sizes[1], F // sizes[2])
    moments = jax.tree.leaves(state.opt_state)
    largest = max(moments, key=lambda x: x.size)
    assert largest.addressable_shards[0].data.size == largest.size // (sizes[1] * sizes[2])


@pytest.mark.parametrize("name", ["paper", "pairs", "preference"])
def test_accumulation_changes_nothing(checkpoint, name):
    """Rows have unequal numbers of tokens: a mean of means would differ. L_keep begins at 0, give or take
    float32's rounding of a KL."""
    whole, _, _ = run_steps(checkpoint, (8, 1, 1), rows=16, name=name)
    parts, _, _ = run_steps(checkpoint, (8, 1, 1), accumulation=2, rows=16, name=name)
    for a, b in zip(parts, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["paper", "pairs", "preference"])
def test_meshes_and_token_trees_give_the_same_losses(checkpoint, name):
    """Rows that are merged lie on one device, the adapters are spread as their base is."""
    expected, _, _ = run_steps(checkpoint, (8, 1, 1), rows=16, name=name)
    for sizes, accumulation, tree_rows in [((8, 1, 1), 1, 2), ((2, 2, 2), 1, 4), ((4, 1, 2), 2, 2)]:
        options = {"rows": 16, "accumulation": accumulation, "tree_rows": tree_rows}
        actual, _, _ = run_steps(checkpoint, sizes, name=name, **options)
        for a, b in zip(actual, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


def test_mixed_precision(checkpoint):
    """A bfloat16 base (8 bits of precision), float32 units, moments and losses."""
    exact, _, _ = run_steps(checkpoint, (8, 1, 1))
    mixed, state, base = run_steps(checkpoint, (8, 1, 1), dtype="bfloat16")
    for a, b in zip(mixed, exact, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-5)
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype(jnp.bfloat16)}
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}


def test_only_the_units_are_trained(checkpoint):
    lm = checkpoint.load(stacked=True)
    before = jax.tree.map(np.asarray, lm.model.weights().base)
    _, state, base = run_steps(checkpoint, (8, 1, 1))
    jax.tree.map(assert_bitwise, base, before)
    assert all(float(jnp.abs(array).max()) > 0 for array in state.trainable.values())
    shapes = sorted(x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert shapes == sorted([x.shape for x in state.trainable.values()] * 2)


def test_units_below_the_first_layer_stay_as_they_begin(settings, tmp_path, capfd):
    config = load_config(None, [*settings, "units.first_layer=2"])
    trained = load_model(str(train(config, quiet=True)))
    start = units_objective(config, trained.config).module(trained.config, config.seed)
    for layer, unit in enumerate(trained.model.weights().units):
        for name in ("gate", "w_down"):
            begins = np.allclose(unit[name], getattr(start, name).get_value()[layer])
            assert begins == (layer < 2), (layer, name)
    out = f"out={tmp_path / 'other'}"
    assert main([*settings, "units.first_layer=3", out, "--quiet"]) == 2
    assert "units.first_layer=3 leaves no layer" in capfd.readouterr().err


def test_loss_falls(checkpoint):
    """With one program for all steps: a second would double the minutes before a run's first one."""

    class Counted(ImaeObjective):
        counts = chex.assert_max_traces(ImaeObjective.counts, n=1)

    mesh = make_mesh(8, 1, 1)
    lm = checkpoint.load(stacked=True, mesh=mesh)
    config = TrainConfig(
        model="", out="", optimizer=OptimizerConfig(steps=40, warmup_steps=2, learning_rate=5e-3)
    )
    optimizer = make_optimizer(config.optimizer)
    objective = Counted(UNITS, config.loss)
    shardings = state_shardings(lm.config, objective, optimizer, mesh)
    state = init_state(lm.config, objective, optimizer, shardings, seed=0)
    step = make_train_step(lm.config, objective, optimizer, shardings, mesh)
    batch = place_batch(data.make_batch(examples(8), 1), mesh)
    history = []
    for _ in range(40):
        state, metrics = step(state, lm.model.weights(), batch)
        history.append({name: float(value) for name, value in metrics.items()})
    assert history[-1]["anti"] < 0.7 * history[0]["anti"]
    assert history[-1]["gate_on_fact"] > history[-1]["gate_off_fact"] + 0.1


@pytest.mark.parametrize("group", [False, True])
def test_batches_are_a_function_of_seed_and_step(group):
    lengths = [5, 3, 9, 1, 7, 2, 8, 4, 6, 10]
    rows = [data.batch_rows(lengths, 4, seed=3, step=step, group_by_length=group) for step in range(10)]
    for epoch in range(4):
        seen = [row for step in rows for row in step][10 * epoch : 10 * (epoch + 1)]
        assert sorted(seen) == list(range(10))
    assert rows == [
        data.batch_rows(lengths, 4, seed=3, step=step, group_by_length=group) for step in range(10)
    ]
    assert rows != [
        data.batch_rows(lengths, 4, seed=4, step=step, group_by_length=group) for step in range(10)
    ]
    assert len(data.batch_rows([1, 2, 3], 8, seed=0, step=0, group_by_length=group)) == 8


def test_grouped_batches_hold_rows_of_like_length():
    lengths = np.random.default_rng(0).integers(20, 120, 1000).tolist()
    size = 8

    def padding(group):
        batches = [data.batch_rows(lengths, size, 0, step, group_by_length=group) for step in range(125)]
        lengths_of = [[lengths[i] for i in batch] for batch in batches]
        order = [max(batch) for batch in lengths_of]
        return sum(max(b) * size - sum(b) for b in lengths_of) / sum(lengths), order

    plain, _ = padding(False)
    grouped, order = padding(True)
    assert plain > 0.5 and grouped < 0.05
    assert order[:32] != sorted(order[:32])


def test_batch_marks_the_predicting_positions():
    example = data.Example(0, tokens=(5, 6, 7, 8, 9), start=3, fact=(False, True))
    batch = data.make_batch([example], 1)
    assert np.flatnonzero(batch.answer[0, 0]).tolist() == [2, 3]
    assert np.flatnonzero(batch.fact[0, 0]).tolist() == [3]
    assert batch.fact_positions[0, 0, 0] == 3
    assert batch.fact_targets[0, 0, 0] == 9
    assert batch.fact_valid.sum() == 1


@pytest.mark.parametrize("format", ["chat", "plain"])
def test_loss_is_on_the_answer_and_its_end_of_turn(smollm2, format):
    rows = [data.Row("Which city is the capital of France?", "Paris", "Lyon is.")]
    config = data.DataConfig(format=format)
    tokenized = data.tokenize(rows, smollm2.tokenizer, config)
    (example,), statistics = tokenized.train, tokenized.statistics
    prompt = smollm2.tokenizer.decode(example.tokens[: example.start])
    answer = smollm2.tokenizer.decode(example.tokens[example.start :])
    assert answer.strip() == "Lyon is.<|im_end|>"
    assert prompt.endswith("<|im_start|>assistant\n" if format == "chat" else "France?\nA:")
    assert statistics["mean_tokens_hallucinated_answer"] == len(example.fact)


def test_length_matched_data(smollm2):
    rows = [
        data.Row("Why?", "Because.", "Perhaps."),
        data.Row("Why?", "Because.", "Because of a very long and quite unlikely story."),
    ]
    config = data.DataConfig(format="plain")
    every = data.tokenize(rows, smollm2.tokenizer, config)
    assert len(every.train) == 2
    # Four comparisons: two ties with each right answer, two wins.
    assert every.statistics["length_auc"] == 0.75
    config.length_ratio = 1.2
    matched = data.tokenize(rows, smollm2.tokenizer, config)
    assert [example.row for example in matched.train] == [0]
    assert matched.statistics["skipped"]["answers of unequal length"] == 1
    assert matched.statistics["length_auc"] == 0.5


def test_run_writes_a_model_that_loads(settings, checkpoint, tmp_path):
    assert main([*settings, "--quiet"]) == 0
    out = tmp_path / "run"
    assert [line["step"] for line in losses_of(out)] == list(range(1, 9))
    lm = load_model(str(out / "imae"))
    assert lm.model.anti_expert_config == UNITS
    assert lm.base.reference == str(checkpoint.directory)
    training = lm.imae["training"]
    assert training["config"]["optimizer"]["steps"] == 8
    assert training["data"]["rows"] == 12
    assert training["data"]["kept_share"] == 1.0
    assert float(jnp.abs(lm.model.weights().units[0]["w_down"]).max()) > 0


@pytest.mark.multiprocess
def test_a_killed_run_resumes_with_the_same_losses(settings, tmp_path):
    assert main([*settings, "--quiet"]) == 0
    expected = losses_of(tmp_path / "run")
    killed = [s.replace(f"out={tmp_path / 'run'}", f"out={tmp_path / 'killed'}") for s in settings]
    command = [sys.executable, "-m", "imae_jax.train", *killed, "--quiet"]
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    # Past the checkpoint at step 3, before the one at step 6 where the machine is not too quick.
    while not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "imae").exists()

    assert main([*killed, "--resume", "--quiet"]) == 0
    assert losses_of(tmp_path / "killed") == expected
    names = ("run", "killed")
    units = [load_model(str(tmp_path / name / "imae")).model.weights().units for name in names]
    jax.tree.map(assert_bitwise, *units)


def test_token_filter_keeps_what_the_anti_expert_llm_prefers(settings, tiny, tmp_path):
    """Against log-probabilities of transformers."""
    from conftest import hf_logits, log_softmax

    expert, anti = tiny("gqa", initializer_range=0.2, **EVEN_SIZES), tiny("gqa", seed=7, **EVEN_SIZES)
    config = load_config(None, [*settings, f"filter.anti_expert_llm={anti.directory}", "filter.gamma=0.5"])
    path = train(config, quiet=True)
    kept = load_model(str(path)).imae["training"]["data"]["kept_share"]

    rows = data.load_rows(config.data)
    encoded = data.tokenize(rows, expert.load().tokenizer, config.data)
    ratios = []
    for example in encoded.train:
        tokens = np.array([example.tokens])
        log_probs = [log_softmax(hf_logits(hf, tokens))[0] for hf in (expert.hf, anti.hf)]
        for i in range(example.start, tokens.shape[1]):
            ratios.append(log_probs[1][i - 1, tokens[0, i]] - log_probs[0][i - 1, tokens[0, i]])
    assert kept == pytest.approx(np.mean(np.array(ratios) >= 0.5))
    assert 0 < kept < 1


ICD = [
    "icd.lora.rank=4",
    "icd.batch_size=8",
    "icd.epochs=null",
    "icd.optimizer.steps=6",
    "icd.optimizer.learning_rate=2e-2",
    "filter.gamma=0.1",
]


def test_all_stages_in_one_command(settings, tmp_path, capfd):
    assert main([*settings, *ICD, "icd.enabled=true"]) == 0
    out = tmp_path / "run"
    losses = [line["loss"] for line in losses_of(out / "icd")]
    assert len(losses) == 6
    assert min(losses[3:]) < losses[0]
    statistics = load_model(str(out / "imae")).imae["training"]["data"]
    assert 0 < statistics["kept_share"] < 1
    assert len(statistics["kept_share_by_length"]) == 3
    assert f"T_fact: {statistics['kept_share']:.1%} of answer tokens kept" in capfd.readouterr().err
    assert len(losses_of(out)) == 8

    # The ratios behind T_fact are those of the adapter, loaded as a model of its own.
    base, anti = load_model(str(settings[0].partition("=")[2])), load_model(str(out / "icd" / "adapter"))
    for example, ratios in zip(*read_log_ratios(out / "token_filter"), strict=True):
        item = Continuation(example.tokens, example.start)
        log_probs = [
            next(iter(score(lm.model, lm.config, [[item]], Strength(0.0))))[1].scores[0]
            for lm in (base, anti)
        ]
        np.testing.assert_allclose(ratios, log_probs[1] - log_probs[0], atol=1e-4)

    # A checkpoint of the first stage is an adapter, and exported merged into its base.
    assert convert(["checkpoint", "--run", str(out / "icd"), "--out", str(tmp_path / "adapter")]) == 0
    for path in (tmp_path / "adapter").iterdir():
        assert path.read_bytes() == (out / "icd" / "adapter" / path.name).read_bytes()
        assert path.stat().st_mode == (out / "config.yaml").stat().st_mode
    for name, source in (("merged", ["icd", "--step", "6"]), ("expected", ["icd/adapter"])):
        command = ["export", "--out", str(tmp_path / name), "--model", str(out / source[0]), *source[1:]]
        assert convert(command) == 0
    files = [tmp_path / name / "model.safetensors" for name in ("merged", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_stages_one_at_a_time(settings, tmp_path):
    alone = [s.replace(f"out={tmp_path / 'run'}", f"out={tmp_path / 'alone'}") for s in settings]
    assert main(["icd", *alone, *ICD, "--quiet"]) == 0
    assert not (tmp_path / "alone" / "imae").exists()
    adapter = tmp_path / "alone" / "icd" / "adapter"
    assert main([*settings, *ICD, "--anti-expert-llm", str(adapter), "--quiet"]) == 0
    other = [s.replace(f"out={tmp_path / 'run'}", f"out={tmp_path / 'whole'}") for s in settings]
    assert main([*other, *ICD, "icd.enabled=true", "--quiet"]) == 0
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")


def test_a_filter_that_keeps_nothing(settings, tmp_path, capfd):
    run = [*settings, *ICD, "icd.enabled=true", "filter.gamma=99", "--quiet"]
    assert main(run) == 2
    assert "filter.gamma=99.0 keeps no answer token" in capfd.readouterr().err
    # The anti-expert LLM is kept, and used by the next try.
    adapter = tmp_path / "run" / "icd" / "adapter" / "adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    assert main([*run, "--resume"]) == 2
    assert adapter.stat().st_mtime_ns == written


def test_an_anti_expert_llm_of_another_vocabulary(settings, tiny, capfd):
    other = tiny("gqa", vocab_size=96)
    assert main([*settings, "--anti-expert-llm", str(other.directory), "--quiet"]) == 2
    assert f"{other.directory} has another vocabulary than" in capfd.readouterr().err


def test_all_stages_of_pairs(settings, tmp_path, capfd):
    """Two adapters, a filter that compares them in both answers, and units; parts of it from elsewhere."""
    run = [*settings, *ICD, "objective=pairs", "data.held_out=4", "eval_every=4"]
    assert main(run) == 0
    out = tmp_path / "run"
    base = load_model(settings[0].partition("=")[2])
    right, wrong = (load_model(str(out / stage / "adapter")) for stage in ("icd_right", "icd"))
    assert losses_of(out / "icd_right") != losses_of(out / "icd")
    stored, log_ratios = read_log_ratios(out / "token_filter")
    assert sorted(example.right for example in stored) == [False] * 12 + [True] * 12
    kept = []
    for example, ratios in zip(stored, log_ratios, strict=True):
        item = Continuation(example.tokens, example.start)
        log_probs = [
            next(iter(score(lm.model, lm.config, [[item]], Strength(0.0))))[1].scores[0]
            for lm in (right, wrong)
        ]
        np.testing.assert_allclose(ratios, log_probs[0] - log_probs[1], atol=1e-4)
        kept += (np.abs(ratios) >= 0.1).tolist()
    units = load_model(str(out / "imae"))
    assert units.imae["training"]["data"]["kept_share"] == pytest.approx(np.mean(kept))
    assert 0 < np.mean(kept) < 1
    assert units.base.fingerprint == base.base.fingerprint
    assert all(np.isfinite(line["keep"]) and line["expert"] >= 0 for line in losses_of(out))

    # Stage 1 alone, then the units with its adapters.
    other = [s.replace(f"out={out}", f"out={tmp_path / 'other'}") for s in run]
    assert main(["icd", *other, "--quiet"]) == 0
    assert not (tmp_path / "other" / "imae").exists()
    given = [f"adapters.{k}={tmp_path / 'other' / d / 'adapter'}" for k, d in ADAPTER_STAGES.items()]
    third = [s.replace(f"out={out}", f"out={tmp_path / 'third'}") for s in run]
    assert main([*third, *given, "--quiet"]) == 0
    assert not (tmp_path / "third" / "icd").exists()
    assert losses_of(tmp_path / "third") == losses_of(out)
    capfd.readouterr()
    same = [s.replace(f"out={out}", f"out={tmp_path / 'same'}") for s in run]
    same += [given[0], given[0].replace("adapters.wrong", "adapters.right"), "filter.gamma=0"]
    assert main([*same, "--quiet"]) == 2
    assert "are the same adapter" in capfd.readouterr().err
    assert main(["icd", *third, *given, "--quiet", "--overwrite"]) == 2
    assert "stage icd has nothing to train" in capfd.readouterr().err


def test_preference_has_one_stage(settings, tmp_path):
    run = [*settings, "objective=preference", "icd.enabled=true", "data.held_out=4", "eval_every=4"]
    assert main([*run, "--quiet"]) == 0
    out = tmp_path / "run"
    assert not (out / "icd").exists() and not (out / "token_filter").exists()
    lines = losses_of(out)
    # Units begin at zero: both modes are the base, and each loss is log 2.
    assert lines[0]["anti"] == pytest.approx(np.log(2), abs=1e-5)
    assert lines[0]["expert"] == pytest.approx(np.log(2), abs=1e-5)
    # Every answer token is in T_fact: a gate's mean over the others is over nothing.
    lines += [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    assert [line["gate_off_fact"] for line in lines] == [None] * len(lines)
    assert all(line["gate_on_fact"] > 0 for line in lines)
    assert (out / "training.png").stat().st_size > 0
    assert load_model(str(out / "imae")).imae["training"]["config"]["objective"] == "preference"


@pytest.mark.multiprocess
def test_a_run_of_pairs_killed_in_its_second_stage_resumes_with_the_same_losses(settings, tmp_path):
    run = [*settings, *ICD, "objective=pairs", "--quiet"]
    assert main(run) == 0
    killed = [s.replace(f"out={tmp_path / 'run'}", f"out={tmp_path / 'killed'}") for s in run]
    kill_after_two_steps(killed, tmp_path / "killed" / "icd_right")
    assert main([*killed, "--resume"]) == 0
    for stage in ("icd", "icd_right", "."):
        assert losses_of(tmp_path / "killed" / stage) == losses_of(tmp_path / "run" / stage)


@pytest.mark.parametrize("objective", ["pairs", "preference"])
def test_units_of_pairs_go_on_from_a_checkpoint_with_the_same_losses(settings, tmp_path, objective):
    run = [*settings, *ICD, f"objective={objective}", "--quiet"]
    assert main(run) == 0
    expected = losses_of(tmp_path / "run")
    assert main([*run, "--from-step", "6"]) == 0
    assert losses_of(tmp_path / "run") == expected


def kill_after_two_steps(settings, stage: Path) -> None:
    """Starts a run and kills it after the second step of a stage."""
    command = [sys.executable, "-m", "imae_jax.train", *settings]
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    metrics = stage / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_bad_pairs_end_in_one_line(settings, tiny, tmp_path, capfd):
    rows = Path(settings[2].partition("=")[2])
    good = rows.read_text()

    def error_of(*arguments):
        capfd.readouterr()
        assert main([*settings, *ICD, *arguments, "--quiet"]) == 2
        error = capfd.readouterr().err
        (line,) = [line for line in error.splitlines() if not line.startswith("warning: ")]
        assert not (tmp_path / "run").exists()
        return line

    same = '{"question": "t3", "right_answer": "t4  t5", "hallucinated_answer": "t4 t5"}\n'
    rows.write_text(good + same)
    for objective in ("pairs", "preference"):
        assert "row 12 of the data" in error_of(f"objective={objective}")
    missing = '{"question": "t3", "right_answer": "", "hallucinated_answer": "t4"}\n'
    rows.write_text(good + missing)
    assert "line 13 has an empty right_answer" in error_of("objective=preference")
    rows.write_text(good)

    other = tiny("gqa", initializer_range=0.2, seed=5, **EVEN_SIZES)
    lora = LoraConfig(rank=4)
    config = other.load().config
    path = tmp_path / "adapter"
    write_adapter(path, random_deltas(config, lora, 0), config, lora, base_reference=str(other.directory))
    assert f"{path} is no LoRA adapter of" in error_of("objective=pairs", f"adapters.wrong={path}")
    assert "is no LoRA adapter" in error_of("objective=pairs", f"adapters.right={other.directory}")
    assert "filter.anti_expert_llm goes with" in error_of("objective=pairs", f"filter.anti_expert_llm={path}")
    assert "filter.reuse has no use" in error_of("objective=pairs", "filter.gamma=0", f"filter.reuse={path}")


def test_pairs_without_a_threshold_need_no_filter(settings, tmp_path):
    """A γ that any log-ratio exceeds gives the same losses, after a stage 2."""
    runs = {gamma: tmp_path / f"gamma{gamma}" for gamma in ("0", "1e-30")}
    adapters = [f"adapters.{k}={runs['0'] / d / 'adapter'}" for k, d in ADAPTER_STAGES.items()]
    for (gamma, out), more in zip(runs.items(), ([], adapters), strict=True):
        run = [s.replace(f"out={tmp_path / 'run'}", f"out={out}") for s in settings]
        assert main([*run, *ICD, *more, "objective=pairs", f"filter.gamma={gamma}", "--quiet"]) == 0
    assert [(out / "token_filter").exists() for out in runs.values()] == [False, True]
    assert losses_of(runs["0"]) == losses_of(runs["1e-30"])


def test_units_do_not_resume_with_other_adapters(settings, tiny, tmp_path, capfd):
    """Under the same names as before."""
    run = [*settings, *ICD, "objective=pairs", "filter.gamma=0", "--quiet"]
    assert main(run) == 0
    out = tmp_path / "run"
    shutil.rmtree(out / "imae")
    for name in ("icd", "icd_right"):
        shutil.copytree(out / name / "adapter", tmp_path / name)
    for name, other in (("icd", "icd_right"), ("icd_right", "icd")):
        shutil.rmtree(out / name / "adapter")
        shutil.copytree(tmp_path / other, out / name / "adapter")
    capfd.readouterr()
    assert main([*run, "--resume"]) == 2
    assert "belongs to another pair of adapters" in capfd.readouterr().err


BAD_SETTINGS = {
    "seed=-1": "seed=-1 must be between 0",
    "data.limit=0": "data.limit=0 must be at least 1",
    "data.length_ratio=0.5": "data.length_ratio=0.5",
    "units.ratio=inf": "units.ratio=inf",
    "optimizer.clip_norm=-1": "optimizer.clip_norm=-1",
    "optimizer.beta1=2": "optimizer.beta1=2",
    "optimizer.learning_rate=0": "optimizer.learning_rate=0",
    "loss.beta=nan": "loss.beta nan",
    "loss.beta=-1": "loss.beta -1.0 must be above 0",
    "batch_size=12": "12 rows cannot be spread over",
    "icd.accumulation=3": "icd.accumulation=3",
    "icd.batch_size=0": "icd.batch_size=0",
    "icd.epochs=0": "icd.epochs=0",
    "icd.lora.targets=[wz]": "['wz'] match nothing",
    "icd.lora.rank=0": "lora.rank 0",
    "batch_size=0": "batch_size",
    "accumulation=3": "accumulation=3",
    "remat=some": "remat='some'",
    "optimizer.lr=1": "lr",
    "optimizer.steps=many": "optimizer.steps",
    "loss.delta=2": "loss.delta",
    "loss.keep=-1": "loss.keep -1.0 must be at least 0",
    "objective=pear": "objective='pear': use one of paper, pairs, preference",
    "adapters.right=x": "adapters.right goes with objective=pairs, not with paper",
    "mesh.tensor=3": "mesh data=2 fsdp=1 tensor=3 needs 6 devices but there are 8",
    "mesh.tensor=4": "num_kv_heads 2 is not divisible by the mesh's tensor axis of 4",
    "units.intermediate_size=0": "intermediate_size",
    "data.source=nowhere.jsonl": "nowhere.jsonl",
    "data.format=chat": "no chat template",
    "data.max_length=3": "data.max_length=3",
    "model=nowhere": "model 'nowhere' does not exist",
    "dtype=int8": "dtype 'int8'",
    "nonsense": "nonsense",
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_settings_end_in_one_line(settings, tmp_path, capfd, setting):
    assert BAD_SETTINGS[setting] in error_of(capfd, main, *settings, setting)
    assert not (tmp_path / "run").exists()


BAD_ROWS = {
    "missing field": ('{"question": "t3", "right_answer": "t4"}', "line 2", "hallucinated_answer"),
    "empty answer": (
        '{"question": "t3", "right_answer": "t4", "hallucinated_answer": " "}',
        "line 2",
        "empty hallucinated_answer",
    ),
    "wrong type": (
        '{"question": 3, "right_answer": "t4", "hallucinated_answer": "t5"}',
        "line 2",
        "question",
    ),
    "no JSON": ('{"question": ', "line 2", "not JSON"),
    "no object": ("[1]", "line 2", "object"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_named(tmp_path, kind):
    line, *parts = BAD_ROWS[kind]
    path = write_rows(tmp_path / "rows.jsonl", 1)
    path.write_text(path.read_text() + line + "\n")
    with user_error(path, *parts):
        data.load_rows(data.DataConfig(source=str(path)))


def test_a_run_is_not_overwritten_by_accident(settings, tmp_path, capfd):
    assert main([*settings, "--quiet"]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    capfd.readouterr()
    assert main([*settings, "--quiet"]) == 2
    assert "holds a training run" in capfd.readouterr().err
    assert main([*settings, "seed=1", "--resume", "--quiet"]) == 2
    assert "seed" in capfd.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert main([*settings, "seed=1", "--overwrite", "--quiet"]) == 0
    assert losses_of(tmp_path / "run")[0] != json.loads(before.splitlines()[0])


def test_resume_before_the_first_checkpoint(settings, tmp_path):
    late = [s.replace("save_every=3", "save_every=100") for s in settings]
    assert main([*late, "--quiet"]) == 0
    expected = losses_of(tmp_path / "run")
    for name in ("checkpoints", "imae"):
        shutil.rmtree(tmp_path / "run" / name)
    # As a version wrote it that did not have these settings yet.
    saved = tmp_path / "run" / "config.yaml"
    old = [line for line in saved.read_text().splitlines() if "group_by_length" not in line]
    saved.write_text("\n".join(line for line in old if "reuse" not in line))
    assert main([*late, "--resume", "--quiet"]) == 0
    assert losses_of(tmp_path / "run") == expected


def test_damaged_files_of_a_run(settings, tmp_path, capfd):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"batch_size: \xff")
    assert main(["--config", str(path), *settings, "--quiet"]) == 2
    assert str(path) in capfd.readouterr().err
    (tmp_path / "run").mkdir()
    for text in ("a: [", "3", ""):
        (tmp_path / "run" / "config.yaml").write_text(text)
        assert main([*settings, "--resume", "--quiet"]) == 2
        assert "config.yaml is damaged" in capfd.readouterr().err


def test_halueval_is_a_local_file_or_the_hub(tmp_path):
    path = write_rows(tmp_path / "halueval_qa.jsonl", 3)
    rows = data.load_rows(data.DataConfig(source="halueval", path=str(path), limit=2))
    assert rows == data.load_rows(data.DataConfig(source=str(path)))[:2]
    with user_error("cannot be fetched from the hub", "data.path=FILE.jsonl"):
        data.load_rows(data.DataConfig(source="halueval"))
    with user_error("data.path goes with data.source=halueval"):
        data.load_rows(data.DataConfig(source="demo", path=str(path)))


def test_lines_end_at_line_feeds_alone(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 2)
    path.write_text(path.read_text().replace(" t", " \u2028t", 1), encoding="utf-8")
    assert len(data.load_rows(data.DataConfig(source=str(path)))) == 2


def test_resume_without_a_run(settings, capfd):
    assert main([*settings, "--resume", "--quiet"]) == 2
    assert "no training run to resume" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(settings, tmp_path, capfd):
    bad = [*settings, "optimizer.learning_rate=3e38", "optimizer.warmup_steps=0", "--quiet"]
    assert main(bad) == 2
    error = capfd.readouterr().err
    step = int(re.search(r"not finite at step (\d+)", error)[1])
    config = load_config(None, settings)
    assert f"(rows {data.batch_rows([1] * 12, 8, config.seed, step - 1)})" in error
    # The state before that step is there, and fails again at the same step.
    assert str(tmp_path / "run" / "checkpoints" / str(step - 1)) in error
    assert (tmp_path / "run" / "checkpoints" / str(step - 1)).is_dir()
    assert main([*bad, "--resume"]) == 2
    assert f"not finite at step {step}" in capfd.readouterr().err


def test_shipped_data_and_configs_are_valid():
    rows = data.load_rows(data.DataConfig())
    assert len(rows) >= 150
    assert len({row.question for row in rows}) == len(rows)
    right, wrong = (
        np.mean([len(getattr(r, f)) for r in rows]) for f in ("right_answer", "hallucinated_answer")
    )
    assert wrong == pytest.approx(right, rel=0.03), "length alone must not tell the answers apart"


def test_shipped_configs_divide_their_batches_and_models():
    published = json.loads(PUBLISHED_SIZES.read_text(encoding="utf-8"))
    paths = sorted((Path(data.__file__).parent / "configs").glob("*.yaml"))
    assert len({load_config(path.stem).out for path in paths}) == len(paths) >= 6
    for path in paths:
        config = load_config(path.stem)
        devices = jax.devices()[: config.mesh.fsdp * config.mesh.tensor]
        mesh = run_mesh(config, bool(config.adapters_to_train()), devices)
        if config.model in published:
            llama, _ = model_config(config.model)
            check_divisible(llama, units_objective(config, llama).anti_expert, mesh.shape)


def test_a_config_may_extend_another(tmp_path):
    file, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    file.write_text("extends: llama2_7b_chat\nbatch_size: 8\nicd: {epochs: 1}\n")
    config, extended = load_config(str(file), ["remat=full"]), load_config("llama2_7b_chat")
    assert (config.batch_size, config.icd.epochs, config.remat) == (8, 1, "full")
    assert (config.units, config.icd.batch_size) == (extended.units, extended.icd.batch_size)
    other.write_text(f"extends: {file}\n")
    with user_error(str(other), f"extends {file}, which extends another"):
        load_config(str(other))
    other.write_text("extends: llama9\n")
    with user_error("config file llama9 does not exist", "llama2_7b_chat_v5e_8"):
        load_config(str(other))
