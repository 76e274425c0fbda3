"""`evaluate all`: several benchmarks as one command that can be resumed, with one report and a model card."""

import json
import shutil

import pytest
import yaml
from conftest import error_of, write_questions

from imae_jax.evaluate.all import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data files and a suite of three runs on them."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "primer.txt").write_text("Q: t3 t4\nA: t5 .\n\n")
    for name, seed in (("first", 0), ("second", 1)):
        write_questions(directory / f"{name}.csv", seed=seed)
    questions = {"benchmark": "truthfulqa", "any_data": True, "primer": str(directory / "primer.txt")}
    suite = {name: {**questions, "data": f"{name}.csv"} for name in ("first", "second")}
    suite["second"] |= {"limit": 3, "seed": 5}
    (directory / "suite.yaml").write_text(yaml.safe_dump({**suite, "harm": {"benchmark": "harm"}}))
    return directory


def arguments(model, data, out, *others):
    command = ["--model", model, "--suite", data / "suite.yaml", "--data", data, "--out", out, "--quiet"]
    return [*map(str, [*command, "--methods", "base,expert", "--limit", 4, *others])]


@pytest.fixture(scope="module")
def finished(tiny_imae, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("suite") / "out"
    assert main(arguments(tiny_imae.directory, data, out)) == 0
    return out


def results(out, name):
    return json.loads((out / name / "results.json").read_text())


def test_a_suite_is_its_benchmarks_runs_and_what_they_come_to(finished):
    assert {path.name for path in finished.iterdir() if path.is_dir()} == {
        "first",
        "second",
        "harm",
        "report",
    }
    assert results(finished, "first")["n_questions"] == 4
    assert results(finished, "second")["n_questions"] == 3, "the suite's file decides"
    assert results(finished, "second")["statistics"]["seed"] == 5
    table = (finished / "table.md").read_text()
    for name in ("first", "second"):
        assert f"{results(finished, name)['methods']['expert']['mc2']:.2f}" in table
    assert "KL(base ‖ method)" in table
    report = (finished / "report" / "report.md").read_text()
    assert "Harm on neutral text" in report and "TruthfulQA" in report
    _, front, body = (finished / "model_card.md").read_text().split("---\n", 2)
    (index,) = yaml.safe_load(front)["model-index"]
    scores = {
        metric["name"]: metric["value"] for metric in index["results"][1]["metrics"]
    }  # the second metric of the first run
    assert scores["MC2, expert"] == pytest.approx(
        results(finished, "first")["methods"]["expert"]["mc2"], abs=0.01
    )
    assert "| first | MC2 |" in body


def test_a_killed_suite_goes_on(finished, tiny_imae, data, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for path in ("report", "harm"):
        shutil.rmtree(out / path)
    for path in ("table.md", "model_card.md", "second/results.json"):
        (out / path).unlink()
    scores = out / "second" / "scores.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:3]))
    before = (out / "first" / "results.json").stat().st_mtime_ns
    command = arguments(tiny_imae.directory, data, out)
    assert "pass --resume" in error_of(capfd, main, *command)
    other = [*command, "--resume"]
    other[other.index("--limit") + 1] = "3"
    assert "another limit (4, now 3)" in error_of(capfd, main, *other)
    assert main([*command, "--resume"]) == 0
    assert (out / "first" / "results.json").stat().st_mtime_ns == before, "what is finished stays"
    assert results(out, "second")["resumed_lines"] == 3
    for name in ("second", "harm"):
        methods = results(out, name)["methods"]["expert"]["intervals"]
        assert methods == results(finished, name)["methods"]["expert"]["intervals"]
    assert (out / "table.md").read_text() == (finished / "table.md").read_text()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["must hold"]),
        ("a: [", ["not valid YAML"]),
        ("a: {benchmark: nothing}", ["a needs benchmark", "truthfulqa"]),
        ("a: {benchmark: truthfulqa, colour: red}", ["a: ", "--colour"]),
        ("a: {benchmark: truthfulqa, data: nowhere.csv}", ["nowhere.csv"]),
        ("report: {benchmark: harm}", ["'report'"]),
        ("../a: {benchmark: harm}", ["'../a'"]),
        ("a: {benchmark: [harm]}", ["a needs benchmark"]),
        ("a: {benchmark: harm, out: elsewhere}", ["a sets out", "leave it out"]),
    ],
)
def test_suites_that_cannot_be_run_are_refused(tiny_imae, data, tmp_path, capfd, text, parts):
    suite, out = tmp_path / "suite.yaml", tmp_path / "out"
    suite.write_text(text)
    command = arguments(tiny_imae.directory, data, out)
    command[command.index("--suite") + 1] = str(suite)
    error = error_of(capfd, main, *command)
    assert all(part in error for part in parts), error
    assert not out.exists(), "nothing half-made stays"


def test_a_suite_that_does_not_exist(tiny_imae, data, tmp_path, capfd):
    command = arguments(tiny_imae.directory, data, tmp_path / "out")
    command[command.index("--suite") + 1] = "nothing"
    assert "give factuality" in error_of(capfd, main, *command)
