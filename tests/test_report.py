"""Reports: every figure on the page, what stands together, what runs recorded, bad input."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import error_of, write_rows

from imae_jax.errors import UserError
from imae_jax.evaluate.compare import main as compare
from imae_jax.evaluate.halueval import main as halueval
from imae_jax.evaluate.harm import main as harm
from imae_jax.evaluate.report import main, read_runs, report_sections
from imae_jax.train.run_log import RunLog

UNITS = {"anti": 3.0, "expert": 0.5, "gate": 0.5, "gate_on_fact": 0.6, "gate_off_fact": 0.4}
GATES = {"gate_on_fact_by_layer": [0.6, 0.7], "gate_off_fact_by_layer": [0.4, 0.3]}
RIGHT = {"right_base": -2.0, "right_expert": -5.25, "right_anti_expert": -1.5}


class Page:
    """What a page of Markdown shows: its tables as cells, their titles, its headings."""

    def __init__(self, text: str):
        self.text = text
        tables = re.findall(r"^\*\*(.*)\*\*\n\n((?:^\|.*\n)+)", text, re.MULTILINE)
        self.captions = [caption for caption, _ in tables]
        self.tables = [[cells(line) for line in table.splitlines()] for _, table in tables]
        for table in self.tables:
            table.pop(1)  # ---
        self.headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)

    def table(self, caption: str) -> list[list[str]]:
        return next(t for t, c in zip(self.tables, self.captions, strict=True) if caption in c)


def cells(line: str) -> list[str]:
    """A row's cells; of a row that heads a group, one."""
    found = [re.sub(r"\\(.)", r"\1", cell.strip(" *")) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    return found[:1] if not any(found[1:]) else found


def write_training(path: Path, steps: int = 4, done: int = 4) -> Path:
    """What `imae_jax.train` leaves behind, written by its own log."""
    for directory, metrics, more in (
        (path / "icd", {"loss": 2.5, "accuracy": 0.25}, {"right_base": -2.0, "right_anti_expert_llm": -1.0}),
        (path, {"loss": 4.0, **UNITS}, {**GATES, **RIGHT}),
    ):
        directory.mkdir(parents=True, exist_ok=True)
        log = RunLog(directory, 0)
        log.evaluation(0, metrics | more)
        for step in range(1, done + 1):
            log.train(step, {**metrics, "tokens_per_second": 10.0})
        log.evaluation(done, metrics | more)
        log.close()
    stage = f"{{steps: {steps}, learning_rate: 0.001}}"
    (path / "config.yaml").write_text(
        f"model: base\nseed: 7\nbatch_size: 8\noptimizer: {stage}\n"
        f"icd:\n  batch_size: 8\n  epochs: null\n  optimizer: {stage}\n"
    )
    start = {"started": "2026-01-01", "command": ["train", "a b"], "versions": {"jax": "0.0"}, "git": None}
    (path / "environment.json").write_text(json.dumps([start]))
    return path


@pytest.fixture(scope="module")
def runs(scored, tiny_imae, tmp_path_factory) -> dict[str, Path]:
    """A run of every kind but cost and lm-eval, of one tiny model."""
    path = tmp_path_factory.mktemp("runs")
    (path / "text.txt").write_text(" ".join(f"t{i}" for i in range(3, 60)))
    model = ["--model", str(tiny_imae.directory)]
    command = [*model, "--methods", "base,expert", "--text", str(path / "text.txt")]
    assert harm([*command, "--out", str(path / "harm")]) == 0
    command = [*model, "--methods", "base,expert", "--data", str(write_rows(path / "rows.jsonl"))]
    assert halueval([*command, "--format", "plain", "--quiet", "--out", str(path / "halueval")]) == 0
    pair = [str(path / "halueval")] * 2 + ["--pair", "base", "expert"]
    assert compare([*pair, "--out", str(path / "comparison")]) == 0
    return {
        "training": write_training(path / "training"),
        "truthfulqa": scored[1],
        **{name: path / name for name in ("harm", "halueval", "comparison")},
    }


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def changed(run: Path, path: Path, **change) -> Path:
    """A copy of a run with other results."""
    shutil.copytree(run, path)
    (path / "results.json").write_text(json.dumps(results_of(run) | change))
    return path


def report(out: Path, *paths: Path) -> tuple[str, Page]:
    assert main([*map(str, paths), "--out", str(out)]) == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def full(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    return out, *report(out, *runs.values())


def test_scores_stand_with_intervals_sums_tests_and_harm(full, runs):
    _, text, page = full
    results, of_harm = results_of(runs["truthfulqa"]), results_of(runs["harm"])["methods"]
    rows = {row[0]: row for row in page.table("Scores")}
    for label, row in results["methods"].items():
        row_cells = rows[label]
        sums = {True: "renormalized", False: "raw", None: "log p"}
        assert row_cells[1:3] == [sums[row["settings"].get("renormalize")], "6"]
        for cell, metric in zip(row_cells[3:6], ("mc1", "mc2", "mc3"), strict=True):
            low, high = row["intervals"][metric]
            assert cell == f"{row[metric]:.2f} [{low:.2f}, {high:.2f}]"
        # In-model contrast was not measured: its settings are in no run of harm.
        measured = of_harm.get(label)
        assert row_cells[6] == (f"{measured['kl']:.3f}" if measured else "–")
    differences = {row[0]: row for row in page.table("Differences")}
    test = results["methods"]["expert"]["against_baseline"]["mc1"]["mcnemar"]
    assert differences["expert"][-3:] == [str(test["gained"]), str(test["lost"]), f"{test['p']:.4f}"]
    assert "run 3" in text.split("### The paper's")[0]


def test_harm_of_another_model_is_not_shown(runs, tmp_path):
    other = changed(runs["harm"], tmp_path / "harm", units="0" * 64)
    _, page = report(tmp_path / "out", runs["truthfulqa"], other)
    assert page.table("Scores")[0][-1] == "MC3"


def test_other_protocols_data_and_limits_have_tables_of_their_own(runs, tmp_path):
    run = runs["truthfulqa"]
    data = results_of(run)["data"] | {"sha256": "f" * 64}
    others = [
        changed(run, tmp_path / "same", model="another model"),
        changed(run, tmp_path / "protocol", protocol="tqa-v1/chat"),
        changed(run, tmp_path / "data", data=data),
        changed(run, tmp_path / "limit", limit=6),
    ]
    _, page = report(tmp_path / "out", run, *others)
    headings = [h for h in page.headings if "6 questions" in h]
    assert len(set(headings)) == len(headings) == 4
    assert [h for h in headings if "chat" in h] == [headings[1]]
    assert "ffffffff" in headings[2]
    assert "the first 6 alone" in headings[3]
    scores = [t for t, c in zip(page.tables, page.captions, strict=True) if c.startswith("Scores")]
    groups = [[row[0] for row in table if len(row) == 1] for table in scores]
    assert [len(group) for group in groups] == [2, 1, 1, 1]
    assert "another model" in groups[0][1]


def test_the_papers_numbers_are_said_to_be_of_other_models(full, runs, tmp_path):
    _, text, _ = full
    paper = text.split("### The paper's results on TruthfulQA, on other models")[1]
    assert "not to be compared" in paper
    assert "Kadotani" in paper
    assert "| **Llama-2-7B-Chat** |" in paper
    assert "| IMAE | 40.02 | 57.12 | 28.96 | +3.06 | +2.50 | +1.01 |" in paper
    assert "| ICD | 44.80 | 79.03 | 50.99 | +3.92 | +19.13 | +19.64 |" in paper
    text, _ = report(tmp_path / "out", runs["training"])
    assert "paper" not in text


def test_the_page_shows_the_pictures_beside_it(full):
    out, text, _ = full
    names = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    shown = {"1-training.png", "2-scores.png", "2-differences.png", "3-harm.png", "5-all-differences.png"}
    assert shown <= set(names)
    assert len(names) == len(set(names))
    assert {path.name for path in out.iterdir()} == {"report.md", *names}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_what_runs_recorded_is_shown(full, runs):
    _, text, page = full
    results = results_of(runs["truthfulqa"])
    assert "train 'a b'" in text
    assert results["command"] in text
    assert results["data"]["sha256"] in text
    assert results["units"] in text
    assert results["base_model"]["fingerprint"] in text
    assert results["statistics"]["interval"] in text
    assert results["command"].startswith("python -m imae_jax.evaluate.truthfulqa --model ")
    settings = results["methods"]["in-model-contrast:renormalize=true"]["settings"]
    assert json.dumps(settings) in text
    overview = page.table("Runs")
    kinds = ["training", "TruthfulQA", "Harm on neutral text", "HaluEval QA", "comparison"]
    assert [row[1] for row in overview[1:]] == kinds
    assert overview[1][-1] == "7"


def test_harm_and_comparisons_stand_with_their_intervals(full, runs):
    _, _, page = full
    harm_row = results_of(runs["harm"])["methods"]["expert"]
    table = page.table("Neutral text")
    low, high = harm_row["intervals"]["kl"]
    assert f"{harm_row['kl']:.3f} [{low:.3f}, {high:.3f}]" in table[2]
    found = json.loads((runs["comparison"] / "comparison.json").read_text())["parts"]
    tables = [t for t, c in zip(page.tables, page.captions, strict=True) if "halueval less" in c]
    assert len(tables) == 2
    for table, compared in zip(tables, found.values(), strict=True):
        label, sums, n, *_ = table[1]
        (row,) = compared.values()
        assert (label, sums, n) == ("base → expert", "log p", str(row["raw"]["n"]))


def test_labels_are_text_not_markup(runs, tmp_path):
    label = '<img src=x onerror="alert(1)">&"|'
    results = results_of(runs["truthfulqa"])
    methods = {label if name == "expert" else name: row for name, row in results["methods"].items()}
    run = changed(runs["truthfulqa"], tmp_path / "run", methods=methods, model="<script>")
    text, page = report(tmp_path / "out", run)
    assert label in [row[0] for row in page.table("Scores")]
    assert not re.search(r"(?<!\\)<(script|img)", text)


def test_scores_that_are_not_finite_are_named(runs, tmp_path):
    results = results_of(runs["truthfulqa"])
    results["methods"]["expert"] |= {"mc1": None, "n": 5, "n_undefined": 1, "undefined": [3]}
    run = changed(runs["truthfulqa"], tmp_path / "run", methods=results["methods"])
    text, page = report(tmp_path / "out", run)
    assert next(row for row in page.table("Scores") if row[0] == "expert")[3] == "–"
    assert "expert: 1 of 6 have a score that is not finite" in text


def test_training_runs_show_both_stages(full):
    _, text, _ = full
    part = text.split("## Training")[1]
    assert "Anti-expert LLM: 4 steps" in part
    assert "Anti-expert units: 4 steps, batches of 8 rows, peak learning rate 0.001" in part
    assert "| L_anti | 3.000 | 3.000 | 3.000 | 3.000 |" in part
    assert "| log p of right answers' tokens, expert | – | – | -5.250 | -5.250 |" in part
    assert "Unfinished" not in part


def test_unfinished_training_says_so(tmp_path):
    run = write_training(tmp_path / "run", steps=9)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a kill leaves it
    text, _ = report(tmp_path / "out", run)
    assert text.count("Unfinished: 4 of 9 steps are done.") == 2
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        (run / name).unlink()
    text, _ = report(tmp_path / "icd", run)
    assert "The units have not been trained." in text


def test_bad_input_ends_in_one_line(runs, tmp_path, capfd):
    run, bad, out = runs["truthfulqa"], tmp_path / "bad", tmp_path / "out"
    bad.mkdir()
    assert "holds none of results.json, comparison.json, lm_eval.json" in error_of(
        capfd, main, bad, "--out", out
    )
    assert "does not exist" in error_of(capfd, main, tmp_path / "nowhere", "--out", out)
    (bad / "run.json").write_text("{}")
    assert "unfinished: resume it with --resume" in error_of(capfd, main, run, bad, "--out", out)
    for content, part in {
        "{": "not readable JSON",
        "[]": "must hold a JSON object",
        '{"benchmark": "truthfulqa"}': "lacks protocol",
        json.dumps(
            results_of(run) | {"methods": {"base": {}}}
        ): "of another form than expected (base has no settings)",
        json.dumps(results_of(run) | {"benchmark": "chess"}): "a run of chess",
        '{"batch_sizes": {"1": {}}}': "of another form",
    }.items():
        (bad / "results.json").write_text(content)
        error = error_of(capfd, main, run, bad, "--out", out)
        assert part in error
        assert str(bad) in error
    (bad / "results.json").unlink()
    (bad / "run.json").unlink()
    for name in ("comparison.json", "lm_eval.json"):
        (bad / name).write_text("{}")
        assert "of another form" in error_of(capfd, main, run, bad, "--out", out)
        (bad / name).unlink()
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for again in (run, copy):
        assert f"is the same run as {run}" in error_of(capfd, main, run, again, "--out", out)
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "copy"}, "nothing may be left behind"

    training = write_training(tmp_path / "training")
    file = training / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 2', '"step"'))
    assert "metrics.jsonl line 2 is damaged" in error_of(capfd, main, training, "--out", out)
    (training / "environment.json").write_text("{}")
    file.write_text("")
    assert "environment.json must hold a JSON list" in error_of(capfd, main, training, "--out", out)
    (training / "environment.json").write_text("{")
    assert "environment.json is not readable" in error_of(capfd, main, training, "--out", out)
    shutil.rmtree(training / "icd")
    assert "has not trained yet" in error_of(capfd, main, training, "--out", out)


def places_in(value, above=()):
    """Every key of nested values, with those above it."""
    for key in value if isinstance(value, dict) else ():
        yield (*above, key)
        yield from places_in(value[key], (*above, key))


@pytest.mark.parametrize("kind", ["truthfulqa", "halueval", "harm", "comparison"])
def test_what_a_file_lacks_is_no_fault_of_ours(runs, tmp_path, kind):
    """Whatever single field is taken out of it: the report does without, or names the file."""
    run = tmp_path / "run"
    shutil.copytree(runs[kind], run, ignore=shutil.ignore_patterns("*.png", "*.svg"))
    file = run / ("comparison.json" if kind == "comparison" else "results.json")
    text, refused = file.read_text(encoding="utf-8"), []
    for *above, key in places_in(json.loads(text)):
        changed = inner = json.loads(text)
        for name in above:
            inner = inner[name]
        del inner[key]
        file.write_text(json.dumps(changed), encoding="utf-8")
        try:
            report_sections(read_runs([run]))
        except UserError as error:
            assert str(run) in str(error)
            refused.append(key)
    assert refused


def test_an_infinite_length_ratio(runs, tmp_path):
    """All pairs are matched: a legal setting, which JSON holds as a text."""
    length = results_of(runs["halueval"])["length"] | {"ratio": "inf"}
    text, _ = report(tmp_path / "out", changed(runs["halueval"], tmp_path / "run", length=length))
    assert "lengths within × inf" in text


def test_our_own_faults_are_not_called_the_users(runs, tmp_path, capfd, monkeypatch):
    """Whatever a computation raises, the run is not to be made again for it."""
    monkeypatch.setattr("imae_jax.evaluate.reporting.aggregate.scores_table", lambda *_: {}["fault"])
    assert main([str(runs["truthfulqa"]), "--out", str(tmp_path / "out")]) == 1
    error = capfd.readouterr().err
    assert "KeyError: 'fault'" in error and "fault of imae_jax" in error
    assert not any(tmp_path.iterdir())


def test_only_reports_are_overwritten(runs, tmp_path, capfd):
    out = tmp_path / "out"
    report(out, runs["harm"])
    assert "exists already" in error_of(capfd, main, runs["truthfulqa"], "--out", out)
    assert main([str(runs["truthfulqa"]), "--out", str(out), "--overwrite"]) == 0
    assert "TruthfulQA" in (out / "report.md").read_text()
    before = sorted(path.name for path in runs["harm"].iterdir())
    error = error_of(capfd, main, runs["truthfulqa"], "--out", runs["harm"], "--overwrite")
    assert "holds no report.md" in error
    assert sorted(path.name for path in runs["harm"].iterdir()) == before
