"""Evaluation runs: going on after a kill, what is refused, shared passes, statistics, comparisons, tables."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, error_of, user_error, with_changes, word_tokenizer, write_questions
from safetensors.numpy import load_file, save_file

from imae_jax import stats
from imae_jax.convert import load_model
from imae_jax.convert.hf_tokenizer import write_tokenizer
from imae_jax.decode import encode, parse_method, score
from imae_jax.decode.joint import Joint, share_streams
from imae_jax.evaluate.compare import compare_runs
from imae_jax.evaluate.compare import main as compare
from imae_jax.evaluate.reporting.aggregate import values_of
from imae_jax.evaluate.reporting.tables import Estimate, Table
from imae_jax.evaluate.runner.directory import read_run
from imae_jax.evaluate.runner.identity import same_model
from imae_jax.evaluate.truthfulqa import main
from imae_jax.files import dumps


def run(*arguments) -> int:
    return main([*map(str, arguments), "--quiet"])


def with_out(command, out, **changes):
    return with_changes(command, out=out, **changes)


@pytest.fixture
def killed(scored, tmp_path):
    """The run as a kill leaves it in the middle of a line, with one sum that no model gives."""
    command, finished = scored
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "results.json").unlink()
    lines = (out / "scores.jsonl").read_text().splitlines()
    marked = json.loads(lines[0])
    marked["true"][0] = 12.5
    (out / "scores.jsonl").write_text("\n".join([json.dumps(marked), *lines[1:8], lines[8][:40]]))
    return with_out(command, out), out


def test_a_killed_run_goes_on(scored, killed):
    command, out = killed
    assert run(*command, "--resume") == 0
    before, after = ((path / "scores.jsonl").read_text().splitlines() for path in (scored[1], out))
    assert json.loads(after[0])["true"][0] == 12.5, "a finished question is not scored again"
    assert after[1:8] == before[1:8]
    results = read_run(out)
    assert results["resumed_lines"] == 8
    for old, new in zip(map(json.loads, before[1:]), map(json.loads, after[1:]), strict=True):
        assert (old["method"], old["index"]) == (new["method"], new["index"])
        np.testing.assert_allclose(new["true"] + new["false"], old["true"] + old["false"], atol=1e-4)
    for name, row in read_run(scored[1])["methods"].items():
        for key in ("mc1", "mc2", "mc3", "n", "settings"):
            assert results["methods"][name][key] == pytest.approx(row[key], abs=1e-3)


def test_a_run_goes_on_with_the_same_settings_alone(scored, killed, tmp_path, capfd):
    command, out = killed
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    write_tokenizer(word_tokenizer(TINY.vocab_size, "another template"), tokenizer)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "unfinished run: pass --resume" in error_of(capfd, main, *command)
    assert "exclude each other" in error_of(capfd, main, *command, "--resume", "--overwrite")
    changed = {
        "another methods.base": with_out(command, out, methods="expert"),
        "another split.name": [*command, "--split", "dev"],
        "another limit (None, now 3)": [*command, "--limit", "3"],
        "another tokenizer.sha256 (": [*command, "--tokenizer", tokenizer],
        "another base_model.dtype (float32, now bfloat16)": [*command, "--dtype", "bfloat16"],
        "csv-data-": with_out(command, out, data=write_questions(tmp_path / "q.csv", seed=1)),
        "another methods.in-model-contrast.beta (1.0, now 2.0)": None,
    }
    methods = tmp_path / "methods.yaml"
    methods.write_text(
        "[{name: base}, {name: expert}, {name: anti-expert}, {name: in-model-contrast, renormalize: true, "
        "label: 'in-model-contrast:renormalize=true'}, {name: in-model-contrast, beta: 2}]"
    )
    changed["another methods.in-model-contrast.beta (1.0, now 2.0)"] = with_out(command, out, methods=methods)
    for part, arguments in changed.items():
        assert part in error_of(capfd, main, *arguments, "--resume"), part
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "scores.jsonl").write_text("nonsense\n")
    assert "scores.jsonl line 1 is damaged" in error_of(capfd, main, *command, "--resume")
    (out / "scores.jsonl").write_text('{"method": [], "index": 0}\n')
    assert "scores.jsonl line 1 is damaged" in error_of(capfd, main, *command, "--resume")
    with user_error("unfinished", "--resume"):
        read_run(out)


def test_a_run_goes_on_wherever_its_files_are_now(scored, killed, tmp_path):
    """Model, base, tokenizer, data and primer are the same ones in other places, of which results tell."""
    command, out = killed
    places = {name: command[command.index(f"--{name}") + 1] for name in ("model", "data", "primer")}
    base = json.loads((out / "run.json").read_text())["base_model"]["reference"]
    moved = {name: tmp_path / "moved" / Path(path).name for name, path in (places | {"base": base}).items()}
    (tmp_path / "moved").mkdir()
    for name, path in (places | {"base": base}).items():
        (shutil.copytree if Path(path).is_dir() else shutil.copy)(path, moved[name])
    command = with_out(command, out, **{name: moved[name] for name in places})
    command += ["--base", moved["base"], "--tokenizer", moved["base"]]
    assert run(*command, "--resume") == 0
    results, before = read_run(out), read_run(scored[1])
    assert results["resumed_lines"] == 8
    assert results["model"] == str(moved["model"])
    assert same_model(results, before)
    weights = load_file(moved["base"] / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, moved["base"] / "model.safetensors", {"format": "pt"})
    changed = before | {"base_model": dataclasses.asdict(load_model(str(moved["base"])).base)}
    assert not same_model(results, changed)


def test_a_question_may_hold_any_break_of_lines(scored, tmp_path):
    data = tmp_path / "questions.csv"
    published = Path(scored[0][scored[0].index("--data") + 1]).read_text()
    rows = list(csv.reader(published.splitlines()))
    rows[1][1] = rows[1][1].replace(" ", "\u2028", 1).replace(" ", "\x85", 1)
    with data.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    command = with_out(scored[0], tmp_path / "out", methods="base", data=data)
    assert run(*command) == 0
    assert run(*command, "--resume") == 0
    assert read_run(tmp_path / "out")["resumed_lines"] == 6


def test_only_runs_are_replaced(scored, killed, tmp_path, capfd):
    command, out = killed
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    assert "is not a result of this command" in error_of(capfd, main, *with_out(command, mine), "--overwrite")
    for path in (mine, tmp_path / "new"):
        error = error_of(capfd, main, *with_out(command, path), "--resume")
        assert f"{path} holds no run to resume: leave --resume out" in error
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    assert run(*with_out(command, out, methods="base"), "--overwrite") == 0
    assert read_run(out)["methods"]["base"]["mc2"] == pytest.approx(
        read_run(scored[1])["methods"]["base"]["mc2"], abs=1e-3
    )
    assert list(read_run(out)["methods"]) == ["base"]


def test_a_run_that_cannot_be_scored_leaves_nothing(scored, killed, tmp_path, capfd):
    command, out = killed
    long = tmp_path / "long.txt"
    long.write_text("Q: t3\nA: " + "t5 " * 600)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "over the model's context of 512" in error_of(
        capfd, main, *with_out(command, out, primer=long), "--overwrite"
    )
    too_high = with_out(command, out, methods="dola-static:layer=9")
    assert "layer 9 is no early one" in error_of(capfd, main, *too_high, "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    error_of(capfd, main, *with_out(command, tmp_path / "new", primer=long))
    assert not (tmp_path / "new").exists()


def test_a_development_split_is_scored_alone(scored, tmp_path):
    command = with_out(scored[0], tmp_path / "out", methods="base")
    assert run(*command, "--split", "dev", "--dev-share", "0.5", "--seed", "3") == 0
    results = read_run(tmp_path / "out")
    assert results["n_questions"] == 3
    assert results["split"] == {"name": "dev", "seed": 0, "dev_share": 0.5}
    assert results["statistics"]["seed"] == 3


# Shared passes

METHODS = (
    "base",
    "expert",
    "in-model-contrast:alpha=0.1",
    "anti-expert",
    "dola:candidates=0+1",
    "dola-static:layer=1,early_exit_norm=true",
    "sled:scale=5",
    "cd:amateur={path}#layers=2",
    "prunecd:skip=2",
    "activation-decoding:layer=2",
    "activation-decoding:layer=1,early_exit_norm=true",
)


def test_methods_that_share_streams_get_the_scores_that_they_get_alone(tiny_imae, tiny):
    lm, base = tiny_imae.load(), tiny("gqa", initializer_range=0.2, max_position_embeddings=512)
    methods = [parse_method(text.format(path=base.directory)) for text in METHODS]
    prepared = [lm.prepare(method, generating=False) for method in methods]
    passes = share_streams(prepared)
    # The expert's stream is nobody else's; early exits with and without the final norm are two streams.
    assert sorted(sorted(places) for _, _, places in passes) == [[0, *range(2, 11)], [1]]
    joint = next(joint for _, joint, places in passes if len(places) > 1)
    assert len(joint.streams) == 5
    assert {len(stream.exits) for stream in joint.streams if stream.exits} == {1, 3}
    answers = [" t9 t10", " t9 t11 t12", " t13"]
    groups = [encode(lm.tokenizer, [f"Q: {question}\nA:"] * 3, answers) for question in ("t5", "t6 t7")]
    for models, joint, places in passes:
        together = dict(score(models, lm.config, groups, joint, row_length=32))
        for column, place in enumerate(places):
            alone = dict(score(*prepared[place][:1], lm.config, groups, prepared[place][1], row_length=32))
            for i in alone:
                for one, all_of_them in zip(alone[i].scores, together[i].scores, strict=True):
                    np.testing.assert_allclose(all_of_them[:, column], one, rtol=1e-4, atol=1e-3)


def test_methods_with_different_arrays_stay_apart(tiny_imae, tiny):
    lm = tiny_imae.load()
    models = [tiny("gqa", initializer_range=0.2, max_position_embeddings=512, seed=i) for i in (0, 1)]
    amateurs = [f"cd:amateur={model.directory}#layers=2" for model in models]
    prepared = [lm.prepare(parse_method(text), generating=False) for text in ("base", *amateurs)]
    # Both could share base's stream, but a pass has one second model.
    assert [places for _, _, places in share_streams(prepared)] == [[0, 1], [2]]
    assert Joint((prepared[0][1],)).streams == prepared[0][1].streams


# Statistics


def test_intervals_are_those_of_the_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = stats.mean([*values, np.nan])
    assert (found.value, found.count) == (pytest.approx(values.mean()), 400)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(found.interval, (values.mean() - half, values.mean() + half), atol=0.03)
    assert stats.mean(values, seed=1) == stats.mean(values, seed=1) != stats.mean(values, seed=2)
    assert stats.mean([1.0, 1.0, 1.0]) == stats.Mean(1.0, (1.0, 1.0), 3)
    assert stats.mean([2.0]) == stats.Mean(2.0, None, 1)
    assert stats.mean([np.nan]) == stats.Mean(None, None, 0)


def test_intervals_of_a_text_allow_for_tokens_that_are_alike():
    """Of x_t = ρ x_{t−1} + noise the mean over blocks of b has a known variance."""
    n, rho, b = 20_000, 0.7, stats.BLOCK_LENGTH
    noise, values = np.random.default_rng(0).normal(size=n), np.empty(n)
    values[0] = noise[0]
    for i in range(1, n):
        values[i] = rho * values[i - 1] + noise[i]
    lags = np.arange(1, b)
    variance = (1 + 2 * np.sum((1 - lags / b) * rho**lags)) / (1 - rho**2) / n
    low, high = stats.mean_of_text(values).interval
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.1)
    narrow = stats.mean(values).interval
    assert high - low > 2 * (narrow[1] - narrow[0])


def test_means_of_texts_of_any_length():
    values = np.arange(2.0 * stats.BLOCK_LENGTH + 5)
    found = stats.mean_of_text(values)
    assert (found.value, found.count) == (values.mean(), len(values))
    # The last block's 5 tokens weigh as 5 tokens.
    assert found.interval[0] == pytest.approx(values[: stats.BLOCK_LENGTH].mean())
    assert found.interval[1] == pytest.approx(values[-5:].mean())
    assert stats.mean_of_text(values[: stats.BLOCK_LENGTH]).interval is None
    assert stats.mean_of_text([1.0, np.inf] * 40) == stats.Mean(np.inf, None, 80)
    assert np.isnan(stats.mean_of_text([1.0, np.nan] * 40).value)


def test_differences_are_paired():
    random = np.random.default_rng(0)
    base = random.normal(0.0, 5.0, 200)
    better = base + 0.5 + random.normal(0.0, 0.1, 200)
    better[0] = np.nan
    low, high = stats.difference(better, base).interval
    assert 0.45 < low < high < 0.55
    assert stats.difference(better, base).count == 199


def test_mcnemar_is_exact():
    base = [0, 0, 0, 0, 0, 1, 1, 0, np.nan]
    method = [1, 1, 1, 1, 1, 0, 1, 0, 1]
    # Of 6 that differ 5 are gained: 2 · (C(6,0) + C(6,1)) / 2⁶.
    assert stats.mcnemar(method, base) == {"gained": 5, "lost": 1, "p": pytest.approx(14 / 64)}
    assert stats.mcnemar(base[:8], base[:8])["p"] == 1.0
    assert stats.mcnemar([0.5], [1.0]) is None


def test_length_auc_is_the_chance_that_one_is_longer():
    random = np.random.default_rng(0)
    a, b = random.integers(1, 8, 30), random.integers(3, 9, 40)
    pairs = [(y > x) + 0.5 * (y == x) for x in a for y in b]
    assert stats.length_auc(a, b) == pytest.approx(np.mean(pairs))


def test_json_is_strict():
    assert dumps({"a": [np.float32("nan"), -np.inf, np.int64(3)]}) == '{"a": [null, "-inf", 3]}'
    np.testing.assert_equal(values_of([{"x": None}, {"x": "-inf"}, {"x": 1}], "x"), [np.nan, -np.inf, 1.0])


# Comparisons


@pytest.fixture
def other(scored, tmp_path):
    """A run of other methods on the first questions."""
    command = with_out(scored[0], tmp_path / "other", methods="expert,-0.5")
    assert run(*command, "--limit", "4") == 0
    return tmp_path / "other"


def test_runs_are_compared_question_by_question(scored, other, tmp_path, capfd):
    # Lines in any order give the same.
    lines = (other / "scores.jsonl").read_text().splitlines()
    (other / "scores.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    found = compare_runs(scored[1], other)
    assert list(found["parts"]["all"]) == ["expert"]
    row = found["parts"]["all"]["expert"]
    assert (row["mc1"]["value"], row["mc1"]["n"]) == (0.0, 4)
    assert abs(row["mc2"]["value"]) < 1e-2
    out = tmp_path / "comparison"
    pair = ["--pair", "in-model-contrast", "-0.5"]
    assert compare([str(scored[1]), str(other), *pair, "--out", str(out)]) == 0
    assert "raw → log p" in capfd.readouterr().out
    written = json.loads((out / "comparison.json").read_text())
    own, others = (
        {x["index"]: x["mc2"] for x in map(json.loads, path.read_text().splitlines()) if x["method"] == name}
        for path, name in (
            (scored[1] / "scores.jsonl", "in-model-contrast"),
            (other / "scores.jsonl", "-0.5"),
        )
    )
    expected = 100 * np.mean([others[i] - own[i] for i in range(4)])
    found = written["parts"]["all"]["in-model-contrast → -0.5"]["mc2"]["value"]
    assert found == pytest.approx(expected)


def test_runs_that_do_not_go_together_are_refused(scored, other, capfd):
    results = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps(results | {"protocol": "tqa-v1/chat"}))
    with user_error("differ in protocol", "--anyway"):
        compare_runs(scored[1], other)
    assert compare_runs(scored[1], other, anyway=True)["differing"].keys() == {"protocol"}
    assert compare([str(scored[1]), str(other), "--anyway", "--seed", "-1"]) == 2
    assert "--seed: give at least 0, not -1" in capfd.readouterr().err
    with user_error("no method 'dola'"):
        compare_runs(scored[1], scored[1], [("base", "dola")])
    (other / "results.json").write_text(json.dumps(results | {"benchmark": "halueval"}))
    assert compare([str(scored[1]), str(other)]) == 2
    assert "nothing to compare" in capfd.readouterr().err
    (other / "results.json").write_text("{}")
    with user_error("lacks benchmark, protocol"):
        compare_runs(scored[1], other)


def test_tables_are_escaped():
    row = ("in|model", Estimate(1, (0.5, 2)), Estimate(None), "<0.0001", "<b> &lt;", "A & B")
    table = Table("<i>", ("method", "Δ <p>", *"abcd"), (("group",), row))
    lines = table.markdown().splitlines()
    assert lines[0] == r"**\<i>**"
    assert lines[4] == "| **group** |  |  |  |  |  |"
    assert lines[5] == r"| in\|model | 1.00 [0.50, 2.00] | – | <0.0001 | \<b> \&lt; | A & B |"
