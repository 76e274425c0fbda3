"""What a run leaves behind, and what it does when something goes wrong while it trains."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import (
    EVEN_SIZES,
    assert_bitwise,
    error_of,
    hf_logits,
    log_softmax,
    losses_of,
    user_error,
    write_rows,
)
from helpers.training import HELD_OUT, evaluations
from orbax.checkpoint import v1 as ocp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from imae_jax.convert import load_model
from imae_jax.errors import UserError
from imae_jax.tokenizer import Tokenizer
from imae_jax.train import data, run_directory, stages, token_filter
from imae_jax.train.__main__ import main
from imae_jax.train.checkpoint import Checkpoints, _reading, read_trainable
from imae_jax.train.config import load_config
from imae_jax.train.step import TrainState

ICD = [
    *("icd.enabled=true", "icd.lora.rank=4", "icd.batch_size=8", "icd.epochs=null", "icd.optimizer.steps=4"),
    *("icd.optimizer.learning_rate=2e-2", "filter.gamma=0.1"),
]


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """All TensorBoard scalars, read by TensorBoard itself."""
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_a_run_leaves_behind(settings, tmp_path, capfd):
    assert main([*settings, *HELD_OUT]) == 0
    out = tmp_path / "run"
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["loss"]["beta"] == 2.0, "defaults are written out, too"
    (entry,) = json.loads((out / "environment.json").read_text())
    assert entry["versions"].keys() >= {"jax", "flax", "optax", "imae_jax"}
    assert len(entry["git"]["commit"]) == 40
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")

    logged = scalars(out)
    lines = losses_of(out)
    for name in ("loss", "anti", "expert", "gate", "learning_rate"):
        assert logged[f"train/{name}"] == [(line["step"], pytest.approx(line[name])) for line in lines]
    held_out = [(e["step"], pytest.approx(e["right_expert"])) for e in evaluations(out)]
    assert logged["held_out/right_expert"] == held_out
    assert "data: 8 rows, 4 held out" in capfd.readouterr().err


def test_a_hook_logs_a_metric_of_its_own(settings, tmp_path):
    """In every stage, without a change of the loop; what it raises ends the run."""

    def largest_weight(step):
        step.metrics["largest"] = max(float(abs(x).max()) for x in jax.tree.leaves(step.state.trainable))

    config, out = load_config(None, [*settings, *ICD]), tmp_path / "run"
    units = load_model(str(stages.train(config, quiet=True, hooks=[largest_weight]))).model.weights().units
    assert all(line["largest"] > 0 for line in losses_of(out / "icd") + losses_of(out))
    largest = max(float(abs(x).max()) for x in jax.tree.leaves(units))
    assert losses_of(out)[-1]["largest"] == pytest.approx(largest)
    assert scalars(out)["train/largest"][-1] == (8, pytest.approx(largest))


def test_settings_that_an_objective_does_not_use_are_named(settings, tmp_path, capfd):
    unused = ["icd.enabled=true", "icd.lora.rank=4", "filter.gamma=2", "loss.alpha=3", "loss.beta=2"]
    assert main([*settings, *unused, "objective=preference", "optimizer.steps=1", "--quiet"]) == 0
    line = "icd.enabled, icd.lora.rank, filter.gamma, loss.alpha: set, but not used with objective=preference"
    assert f"warning: {line}\n" in capfd.readouterr().err
    assert load_config(None, [*settings, "loss.beta=3", "icd.lora.rank=4"]).unused() == []
    assert load_config(None, [*settings, "loss.beta=3", "objective=pairs"]).unused() == ["loss.beta"]


def test_a_run_is_resumed_with_the_settings_in_its_directory(settings, tmp_path, capfd):
    out = tmp_path / "run"
    assert main([*settings, "seed=3", "icd.lora.targets=[wq]", "--quiet"]) == 0
    expected = losses_of(out)
    shutil.rmtree(out / "checkpoints" / "8")
    assert main(["--resume", f"out={out}", "log_every=2", "--quiet"]) == 0
    assert losses_of(out) == [line for line in expected if line["step"] <= 6 or line["step"] == 8]
    assert "optimizer differ(s)" in error_of(capfd, main, "--resume", f"out={out}", "optimizer.steps=9")
    assert "pass out=DIR" in error_of(capfd, main, "--resume")


@pytest.mark.parametrize("command", ["icd", "plan"])
def test_options_before_the_command(command, capfd):
    error = error_of(capfd, main, "--config", "demo", command, "--device", "h200")
    assert f"the command comes first: python -m imae_jax.train {command}" in error


def test_held_out_rows_need_not_be_measured(settings, tmp_path):
    assert main([*settings, *HELD_OUT, "eval_every=null", "--quiet"]) == 0
    out = tmp_path / "run"
    assert evaluations(out) == [] and len(losses_of(out)) == 8


def test_tensorboard_shows_a_step_once_after_a_resume(settings, tmp_path):
    assert main([*settings, "--quiet"]) == 0
    assert main([*settings, "--from-step", "6", "--quiet"]) == 0
    assert [step for step, _ in scalars(tmp_path / "run")["train/loss"]] == list(range(1, 9))


def test_held_out_rows_are_measured_and_never_trained_on(settings, checkpoint, tmp_path):
    """Against log-probabilities of transformers."""
    assert main([*settings, *HELD_OUT, "--quiet"]) == 0
    out = tmp_path / "run"
    assert [e["step"] for e in evaluations(out)] == [0, 4, 8]
    first, last = evaluations(out)[0], evaluations(out)[-1]

    config = load_config(None, [*settings, *HELD_OUT])
    rows = data.load_rows(config.data)
    tokenized = data.tokenize(rows, checkpoint.load().tokenizer, config.data)
    assert len(tokenized.held_out) == len(tokenized.right) == 4
    assert {e.row for e in tokenized.train} | {e.row for e in tokenized.held_out} == set(range(12))
    assert load_model(str(out / "imae")).imae["training"]["data"]["held_out_rows"] == [
        e.row for e in tokenized.held_out
    ]

    def log_probs_of(examples):
        """Of every answer token of every example."""
        values = []
        for example in examples:
            log_probs = log_softmax(hf_logits(checkpoint.hf, np.array([example.tokens])))[0]
            answer = range(example.start, len(example.tokens))
            values.append([log_probs[i - 1, example.tokens[i]] for i in answer])
        return values

    def mean_log_prob(examples):
        return np.mean(np.concatenate(log_probs_of(examples)))

    right, wrong = (np.array(list(map(sum, log_probs_of(e)))) for e in (tokenized.right, tokenized.held_out))
    for mode in ("base", "expert", "anti_expert"):
        assert first[f"wrong_{mode}"] == pytest.approx(mean_log_prob(tokenized.held_out), abs=1e-5)
        assert first[f"margin_{mode}"] == pytest.approx(np.mean(right - wrong), abs=1e-4)
        assert first[f"wins_{mode}"] == np.mean(right > wrong)
    assert last["margin_expert"] != last["margin_base"] == first["margin_base"]
    expected = mean_log_prob(tokenized.right)
    assert first["right_base"] == pytest.approx(expected, abs=1e-5)
    assert last["right_base"] == first["right_base"]
    # Units begin at zero: the three modes are one, and L_anti is the base's own cross-entropy.
    assert first["right_expert"] == first["right_anti_expert"] == pytest.approx(expected, abs=1e-5)
    assert first["anti"] == pytest.approx(-mean_log_prob(tokenized.held_out), abs=1e-5)
    assert last["right_expert"] != last["right_base"]
    assert len(last["gate_on_fact_by_layer"]) == 3
    assert np.mean(last["gate_on_fact_by_layer"]) == pytest.approx(last["gate_on_fact"])
    # Without a token filter there is nothing off T_fact, and no mean.
    assert last["gate_off_fact_by_layer"] == [None] * 3 and last["gate_off_fact"] is None


def test_all_rows_of_a_question_are_held_out_together(checkpoint, tmp_path):
    rows = [data.Row(f"t{3 + i // 3}", "t5", "t6 t7") for i in range(12)]
    config = data.DataConfig(format="plain", held_out=2)
    tokenized = data.tokenize(rows, checkpoint.load().tokenizer, config)
    assert len(tokenized.held_out) == 3
    assert len({rows[e.row].question for e in tokenized.held_out}) == 1
    other = data.tokenize(
        rows, checkpoint.load().tokenizer, data.DataConfig("plain", split_seed=3, held_out=2)
    )
    assert [e.row for e in other.held_out] != [e.row for e in tokenized.held_out]


def test_rows_without_tokens_are_skipped_and_counted(smollm2, caplog):
    """A tokenizer whose normalizer drops some characters, as SentencePiece's do."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(smollm2.tokenizer.backend_tokenizer.to_str())
    backend.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    tokenizer = Tokenizer(backend, {"eos_token": "<|im_end|>"})
    rows = [
        data.Row("Why?", "Because.", "\u200b\u200b"),
        data.Row("\u200b", "Because.", "No."),
        data.Row("Why?", "Because.", "No."),
    ]
    tokenized = data.tokenize(rows, tokenizer, data.DataConfig(format="plain"))
    assert [example.row for example in tokenized.train] == [2]
    assert tokenized.statistics["skipped"]["a text without tokens"] == 2
    with caplog.at_level("INFO"):
        data.log_statistics(tokenized.statistics)
    assert "2 skipped (a text without tokens)" in caplog.text
    with user_error("all 2 rows have a text without tokens"):
        data.tokenize(rows[:2], tokenizer, data.DataConfig(format="plain"))


def start(settings: list[str], *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "imae_jax.train", *settings, *arguments, "--quiet"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process: subprocess.Popen, out: Path, count: int) -> None:
    deadline = time.monotonic() + 180
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_stops(settings, tmp_path, number):
    long = [s.replace("save_every=3", "save_every=1000").replace("steps=8", "steps=500") for s in settings]
    process = start(long)
    wait_for_steps(process, tmp_path / "run", 2)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    (saved,) = (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    assert f"stopped after step {saved.name} of stage train, saved" in error
    assert int(saved.name) == losses_of(tmp_path / "run")[-1]["step"] >= 2
    # It resumes from there.
    process = start(long, "--resume")
    wait_for_steps(process, tmp_path / "run", int(saved.name) + 1)
    process.kill()
    process.communicate()
    assert [line["step"] for line in losses_of(tmp_path / "run")][: int(saved.name) + 1] == list(
        range(1, int(saved.name) + 2)
    )


def test_a_signal_between_stages_is_not_lost(settings, tmp_path, monkeypatch, capfd):
    """It comes while the adapter is written: the units are not begun."""
    write = stages.write_adapter

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*args, **kwargs)

    monkeypatch.setattr(stages, "write_adapter", interrupted)
    assert main([*settings, *ICD, "--quiet"]) == 128 + signal.SIGTERM
    assert "resume with --resume" in capfd.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.undo()
    assert main([*settings, *ICD, "--resume", "--quiet"]) == 0
    assert len(losses_of(tmp_path / "run" / "icd")) == 4


def test_a_damaged_checkpoint_of_the_first_stage(settings, tmp_path, capfd):
    run = [*settings, *ICD, "--quiet"]
    assert main(["icd", *run]) == 0
    icd = tmp_path / "run" / "icd"
    expected = losses_of(icd)
    for path in ("adapter", "finished.json"):
        shutil.rmtree(icd / path) if (icd / path).is_dir() else (icd / path).unlink()
    damage(icd / "checkpoints" / "4", "truncated")
    assert main([*run, "--resume"]) == 2
    assert "--from-step 3 resumes" in capfd.readouterr().err
    assert main([*run, "--from-step", "3"]) == 0
    assert losses_of(icd) == expected
    assert len(losses_of(tmp_path / "run")) == 8
    assert main(["icd", *run, "--from-step", "3"]) == 2
    assert "stage icd in" in capfd.readouterr().err
    assert main([*run, "--resume", "--overwrite"]) == 2


def test_an_adapter_of_other_data_is_not_used(settings, tmp_path, capfd):
    rows = Path(settings[2].partition("=")[2])
    assert main(["icd", *settings, *ICD, "--quiet"]) == 0
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    assert main([*settings, *ICD, "--resume", "--quiet"]) == 2
    assert "belongs to another base or other data" in capfd.readouterr().err


def test_gamma_may_be_changed_until_units_are_trained(settings, tmp_path, monkeypatch):
    """And the log-ratios, whose computation is the long part, are those from before."""
    nothing = [*settings, *ICD, "--quiet", "filter.gamma=99"]
    assert main(nothing) == 2
    (stored,) = (tmp_path / "run" / "token_filter").iterdir()
    monkeypatch.setattr(token_filter, "_log_ratios", None)
    assert main([*nothing, "filter.gamma=0.1", "--resume"]) == 0
    assert list((tmp_path / "run" / "token_filter").iterdir()) == [stored]
    assert main([*nothing, "--resume"]) == 2


def test_only_rows_that_are_taken_are_filtered_and_another_run_reuses_that(
    settings, tmp_path, monkeypatch, capfd
):
    write_rows(tmp_path / "rows.jsonl", count=24)
    short = [*settings, *HELD_OUT, "optimizer.steps=1", "data.group_by_length=true", "--quiet"]
    assert main([*short, *ICD]) == 0
    stored = tmp_path / "run" / "token_filter"
    rows = token_filter.stored_examples(stored, gamma=0.1)
    assert len(rows) == 8 + 4, "one batch and the held-out rows, of 24"

    monkeypatch.setattr(token_filter, "_log_ratios", None)
    adapter = f"filter.anti_expert_llm={tmp_path / 'run' / 'icd' / 'adapter'}"
    again = [*short, adapter, "filter.gamma=0.1", f"filter.reuse={stored}", f"out={tmp_path / 'again'}"]
    assert main(again) == 0
    assert losses_of(tmp_path / "again") == losses_of(tmp_path / "run")
    assert token_filter.stored_examples(tmp_path / "again" / "token_filter", 0.1) == rows
    assert main([*again, "seed=1", f"out={tmp_path / 'other'}"]) == 2
    assert "holds no log-ratios of these rows" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()
    (file,) = stored.glob("*/*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    error = error_of(capfd, main, *again, "--overwrite")
    assert f"{file} cannot be read" in error and "remove filter.reuse to compute" in error
    file.write_bytes(whole)
    arrays = dict(np.load(file))
    for damaged, reason in (
        (arrays | {"right": arrays["right"][1:]}, "cannot be read"),
        (arrays | {"log_ratio": arrays["log_ratio"][1:]}, "do not belong together"),
        (arrays | {"tokens": arrays["tokens"] + 1}, "holds other rows"),
    ):
        np.savez(file, **damaged)
        assert reason in error_of(capfd, main, *again, "--overwrite")
    file.rename(file.with_name("state.json"))  # as an earlier version left it
    assert f"{stored} holds log-ratios of an earlier version" in error_of(capfd, main, *again, "--overwrite")
    with user_error(f"{stored} holds log-ratios of an earlier version"):
        token_filter.stored_examples(stored, gamma=0.1)


def test_a_run_that_begins_again_logs_step_0_once(settings, tmp_path):
    late = [s.replace("save_every=3", "save_every=100") for s in [*settings, *HELD_OUT]]
    assert main([*late, "--quiet"]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main([*late, "--resume", "--quiet"]) == 0
    assert [e["step"] for e in evaluations(tmp_path / "run")] == [0, 4, 8]
    assert [step for step, _ in scalars(tmp_path / "run")["held_out/loss"]] == [0, 4, 8]


def test_overwriting_spares_what_no_run_wrote(settings, tmp_path, capfd):
    precious = tmp_path / "run" / "checkpoints" / "precious"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    (tmp_path / "run" / "config.yaml").write_text("hello")
    assert main([*settings, "--overwrite", "--quiet"]) == 2
    assert "choose another out" in capfd.readouterr().err
    assert precious.read_text() == "mine"


def test_a_run_has_a_directory_of_its_own(settings, tmp_path, capfd):
    out = tmp_path / "run"
    out.write_text("mine")
    for more in ([], ["--overwrite"]):
        assert "is a file, not a directory: choose another out" in error_of(capfd, main, *settings, *more)
    assert out.read_text() == "mine"
    out.unlink()
    out.mkdir()
    (out / ".config.yaml.123").touch()  # as a kill leaves it
    run_directory.check_new(out)
    (out / "precious").write_text("mine")
    for more in ([], ["--overwrite"]):
        assert f"out={out} holds other files: choose another out" in error_of(capfd, main, *settings, *more)


def damage(checkpoint: Path, how: str) -> None:
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    data_files = sorted((p for p in files if p.parent.name == "d"), key=lambda p: p.stat().st_size)
    if how == "truncated":
        data_files[-1].write_bytes(data_files[-1].read_bytes()[:100])
    elif how == "missing file":
        data_files[-1].unlink()
    elif how == "metadata":
        (checkpoint / "_CHECKPOINT_METADATA").write_text("{")
    else:
        content = bytearray(data_files[-1].read_bytes())
        content[len(content) // 2] ^= 0x10
        data_files[-1].write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "missing file", "metadata", "one bit"])
def test_damaged_checkpoints_are_found_and_an_older_one_offered(settings, tmp_path, capfd, how):
    assert main([*settings, "--quiet"]) == 0
    out = tmp_path / "run"
    expected = losses_of(out)
    shutil.rmtree(out / "imae")
    damage(out / "checkpoints" / "8", how)
    error = error_of(capfd, main, *settings, "--resume", "--quiet")
    assert f"checkpoint {out / 'checkpoints' / '8'} is damaged" in error
    assert "--from-step 6 resumes from the one before" in error
    assert main([*settings, "--from-step", "6", "--quiet"]) == 0
    assert losses_of(out) == expected
    assert load_model(str(out / "imae")).imae["training"]["data"]["rows"] == 12


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of random bits, which nothing compresses: its directory, the bits, what reads it."""
    bits = np.random.default_rng(0).integers(0, 2**32, (64, 64), np.uint32)
    state = TrainState({"a": jnp.asarray(bits)}, {"b": jnp.zeros(4)})
    placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: placement, state)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, {})
    checkpoints.save(1, state)
    checkpoints.wait()

    def load(shape=None):
        return checkpoints.load(1, jax.eval_shape(lambda: state) if shape is None else shape, shardings)

    yield tmp_path / "checkpoints" / "1", bits, load
    checkpoints.close()


def test_a_checksum_finds_what_orbax_does_not(saved):
    """A bit of an array's data: Orbax and TensorStore load it as if nothing were wrong."""
    path, bits, load = saved
    assert_bitwise(load().trainable["a"], bits)
    data_file = max((p for p in path.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data_file.read_bytes())
    content[len(content) // 2] ^= 1
    data_file.write_bytes(content)
    assert np.count_nonzero(ocp.load(path)["trainable"]["a"] != bits) == 1
    with user_error(f"checkpoint {path} is damaged (a checksum differs): start over"):
        load()
    with user_error(f"checkpoint {path} is damaged (a checksum differs): give another step"):
        read_trainable(path)


def test_only_damage_is_called_damage(saved):
    path, bits, load = saved
    with no_more_files(), user_error(f"checkpoint {path} cannot be read now", "try again"):
        load()
    # No file is to blame for another shape.
    wider = TrainState(
        {"a": jax.ShapeDtypeStruct((64, 65), jnp.uint32)}, {"b": jax.ShapeDtypeStruct((4,), "f4")}
    )
    with pytest.raises(Exception, match=r"") as caught:
        load(wider)
    assert not isinstance(caught.value, UserError)
    assert str(path) in caught.value.__notes__[0]
    assert_bitwise(load().trainable["a"], bits)


def test_too_little_memory_is_not_damage(tmp_path):
    with pytest.raises(MemoryError), _reading(tmp_path, "start anew"):
        try:
            (tmp_path / "optional").read_text()
        except FileNotFoundError:
            np.zeros(2**60, np.uint8)
    with pytest.raises(ocp.errors.InvalidLayoutError), _reading(tmp_path, "start anew"):
        try:
            np.zeros(2**60, np.uint8)
        except MemoryError as error:
            raise ocp.errors.InvalidLayoutError("no checkpoint") from error


@contextlib.contextmanager
def no_more_files():
    """No file can be opened."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_checkpoint_that_is_not_there(settings, capfd):
    assert main([*settings, "--quiet"]) == 0
    assert main([*settings, "--from-step", "5", "--quiet"]) == 2
    assert "--from-step 5" in (error := capfd.readouterr().err)
    assert "has 6, 8" in error


def test_checkpoints_of_another_base_or_other_data_are_refused(settings, tiny, tmp_path, capfd):
    """Both under the same name as before."""
    rows = Path(settings[2].partition("=")[2])
    base = tmp_path / "base"
    shutil.copytree(settings[0].partition("=")[2], base)
    settings[0] = f"model={base}"
    assert main([*settings, "--quiet"]) == 0
    other = tiny("gqa", initializer_range=0.2, seed=5, **EVEN_SIZES).directory
    original = (base / "model.safetensors").read_bytes()
    shutil.copy(other / "model.safetensors", base)
    assert main([*settings, "--resume", "--quiet"]) == 2
    assert "belongs to another base" in capfd.readouterr().err
    (base / "model.safetensors").write_bytes(original)
    text = rows.read_text()
    rows.write_text("".join(text.splitlines(keepends=True)[1:]))
    assert main([*settings, "--resume", "--quiet"]) == 2
    assert "belongs to another data" in capfd.readouterr().err
    rows.write_text(text)
    assert main([*settings, "--resume", "--quiet"]) == 0


def can_mount() -> bool:
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not (shutil.which("unshare") and can_mount()), reason="no private mounts on this machine")
def test_a_full_disk_costs_the_new_checkpoint_only(settings, tmp_path):
    """On a file system that has room for one checkpoint and a half."""
    small = tmp_path / "small"
    small.mkdir()
    settings = [s.replace(f"out={tmp_path}", f"out={small}") for s in settings]
    settings += ["units.intermediate_size=2000", "keep=4", "optimizer.steps=6"]
    arguments = " ".join(["-m", "imae_jax.train", *settings, "--quiet"])
    # Units of 3 layers × 3 · 32 · 2000 numbers and two moments: 7 MB.
    script = (
        f"mount -t tmpfs -o size=12m none {small} && {sys.executable} {arguments}; code=$?; "
        f"ls {small}/run/checkpoints; "
        f"mount -o remount,size=64m {small} && {sys.executable} {arguments} --resume && "
        f"ls {small}/run/checkpoints {small}/run/imae; exit $code"
    )
    run = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert "a checkpoint cannot be written to" in run.stderr
    assert "step 3 is kept" in run.stderr
    assert run.stderr.count("error: ") == 1
    lines = run.stdout.split()
    assert lines[0] == "3", "the half-written one is gone"
    assert "imae_config.json" in lines


@pytest.mark.skipif(not (shutil.which("unshare") and can_mount()), reason="no private mounts on this machine")
def test_a_full_disk_while_logging_is_one_line(settings, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    settings = [s.replace(f"out={tmp_path}", f"out={small}") for s in settings]
    arguments = " ".join(["-m", "imae_jax.train", *settings, "optimizer.steps=2000", "save_every=9999"])
    script = (
        f"mount -t tmpfs -o size=200k none {small} && {sys.executable} {arguments} --quiet; ls -a {small}"
    )
    run = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    *warnings, error = run.stderr.splitlines()
    assert re.match(rf"error: .*{small}/run.* cannot be written|error: logs .* {small}/run", error), error
    assert all(line.startswith("warning: ") for line in warnings)
    assert run.stdout.split() == [".", ".."], "nothing to go on from stays behind"


def test_icd_may_start_from_another_base(settings, tiny, tmp_path, capfd):
    icd = ["icd.lora.rank=4", "icd.batch_size=8", "icd.epochs=null", "icd.optimizer.steps=2"]
    other = tiny("gqa", initializer_range=0.2, seed=5, **EVEN_SIZES).directory
    assert main([*settings, *icd, "icd.enabled=true", f"icd.model={other}", "--quiet"]) == 0
    adapter = json.loads((tmp_path / "run" / "icd" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(other)
    small = tiny("gqa", vocab_size=96).directory
    assert main([*settings, *icd, "icd.enabled=true", f"icd.model={small}", "--overwrite", "--quiet"]) == 2
    assert "another vocabulary than" in capfd.readouterr().err


def test_wandb_is_an_extra(settings, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*settings, "wandb=project", "--quiet"]) == 2
    assert "pip install 'imae-jax[wandb]'" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_wandb_offline(settings, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main([*settings, "wandb=project", *HELD_OUT, "--quiet"]) == 0
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
