"""HaluEval QA preferences, and harm on neutral text."""

import json
import shutil

import numpy as np
import pytest
from conftest import TINY, error_of, hf_logits, log_softmax, user_error, write_rows

from imae_jax import stats
from imae_jax.decode import windows
from imae_jax.evaluate.benchmarks.halueval import length_statistics, preferences, trained_questions
from imae_jax.evaluate.benchmarks.harm import NEUTRAL_TEXT, STATISTICS
from imae_jax.evaluate.benchmarks.harm import summarize as summarize_harm
from imae_jax.evaluate.compare import main as compare
from imae_jax.evaluate.halueval import main as halueval
from imae_jax.evaluate.harm import main as harm
from imae_jax.evaluate.report import main as report
from imae_jax.evaluate.truthfulqa import main as truthfulqa
from imae_jax.train.config import DataConfig
from imae_jax.train.data import batch_rows, load_rows, tokenize

# HaluEval QA


def test_preferences():
    # -3 over 1 token against -4 over 4: the sum prefers the first, the mean the second.
    assert preferences(-3.0, -4.0, (1, 4)) == {"raw": 1.0, "per_token": 0.0}
    assert preferences(-4.0, -4.0, (2, 2)) == {"raw": 0.0, "per_token": 0.0}
    assert all(np.isnan(value) for value in preferences(np.nan, -1.0, (1, 1)).values())


def test_what_length_alone_tells():
    found = length_statistics([(1, 2), (3, 3), (4, 2)])
    assert (found["n"], found["shorter"], found["mean_tokens"]) == (3, 50.0, [8 / 3, 7 / 3])
    assert found["auc"] == pytest.approx(3.5 / 9)
    assert length_statistics([])["n"] == 0


@pytest.fixture(scope="module")
def compared(tiny_imae, tmp_path_factory):
    """A finished run of two methods: its directory, the pairs' file and the command, which lacks --out."""
    path = tmp_path_factory.mktemp("halueval")
    rows = write_rows(path / "rows.jsonl", 12)
    command = ["--model", tiny_imae.directory, "--methods", "base,in-model-contrast", "--data", rows]
    command = [*map(str, command), "--quiet", "--length-ratio", "1.4"]
    assert halueval([*command, "--out", str(path / "out")]) == 0
    return path / "out", rows, command


def results_of(run):
    return json.loads((run / "results.json").read_text())


def test_answers_are_compared_raw_per_token_and_matched(compared, tiny_imae):
    out, rows, _ = compared
    results = results_of(out)
    assert results["protocol"] == "halueval-qa-v1/plain"
    assert "AUC of length alone" in (out / "table.md").read_text()
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    lm = tiny_imae.load()
    for line, row in zip(lines[:12], load_rows(DataConfig(source=str(rows))), strict=True):
        sums = []
        for answer in (row.right_answer, row.hallucinated_answer):
            tokens = lm.tokenizer(f"Q: {row.question}\nA: {answer}")["input_ids"]
            log_probs = log_softmax(hf_logits(tiny_imae.hf, [tokens])[0])
            count = len(answer.split())
            places = range(len(tokens) - count, len(tokens))
            sums.append(sum(log_probs[i - 1, tokens[i]] for i in places))
        np.testing.assert_allclose([line["right"], line["hallucinated"]], sums, atol=1e-4)
        assert line["tokens"] == [len(row.right_answer.split()), len(row.hallucinated_answer.split())]
        expected = preferences(line["right"], line["hallucinated"], tuple(line["tokens"]))
        assert {key: line[key] for key in expected} == expected
    # Hallucinated answers have 3, 4, 5 or 6 tokens, right ones 3: 3 and 4 are within a factor of 1.4.
    assert results["length"]["matched"]["n"] == results["parts"]["matched"]["base"]["n"] == 6
    for part, chosen in (("all", range(12)), ("matched", [i for i in range(12) if i % 4 < 2])):
        for metric in ("raw", "per_token"):
            expected = 100 * np.mean([lines[i][metric] for i in chosen])
            assert results["parts"][part]["base"][metric] == pytest.approx(expected)
    assert results["length"]["all"]["shorter"] == pytest.approx(100 * (9 + 3 / 2) / 12)
    assert "matched-preferences.png" in {path.name for path in out.iterdir()}


def test_two_runs_are_compared_on_the_same_parts(compared, tmp_path, capfd):
    out, _, _ = compared
    results, comparison = results_of(out), tmp_path / "comparison"
    pair = [str(out), str(out), "--pair", "base", "in-model-contrast"]
    assert compare([*pair, "--out", str(comparison)]) == 0
    assert "on pairs of matched length that both have" in capfd.readouterr().out
    found = json.loads((comparison / "comparison.json").read_text())["parts"]
    for part in ("all", "matched"):
        own, base = (results["parts"][part][label] for label in ("in-model-contrast", "base"))
        for metric, row in found[part]["base → in-model-contrast"].items():
            assert row["value"] == pytest.approx(own[metric] - base[metric])
            assert row["interval"] == own["against_baseline"][metric]["interval"]
    assert {"all-differences.png", "matched-differences.svg"} <= {p.name for p in comparison.iterdir()}
    stricter = tmp_path / "stricter"
    shutil.copytree(out, stricter)
    changed = results | {"length": results["length"] | {"ratio": 1.0}}
    (stricter / "results.json").write_text(json.dumps(changed))
    assert compare([str(out), str(stricter)]) == 2
    assert "differ in length.ratio (1.4, 1.0)" in capfd.readouterr().err
    assert compare([str(out), str(stricter), "--anyway", "--out", str(comparison), "--overwrite"]) == 0
    found = json.loads((comparison / "comparison.json").read_text())["parts"]["matched"]
    assert found["base"]["raw"]["n"] == 3, "matched in both runs"


def test_a_killed_run_is_resumed(compared, tmp_path):
    finished, _, command = compared
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    kept = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    (out / "scores.jsonl").write_text("".join(kept[:20]))
    (out / "results.json").unlink()
    assert halueval([*command, "--out", str(out), "--resume"]) == 0
    resumed = results_of(out)
    assert resumed["resumed_lines"] == 20
    assert resumed["parts"] == results_of(finished)["parts"]


def test_questions_of_the_training_run_are_left_out(tiny_imae, tmp_path, capfd):
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    # The same question in another row must go as well.
    lines = rows.read_text().splitlines()
    run = tmp_path / "run"
    run.mkdir()
    config = f"model: m\nout: o\ndata: {{source: {rows}, held_out: 4, limit: 8, format: plain}}\n"
    (run / "config.yaml").write_text(config)
    lm = tiny_imae.load()
    data_config = DataConfig(source=str(rows), held_out=4, limit=8, format="plain")
    everything = load_rows(data_config)
    trained = tokenize(everything, lm.tokenizer, data_config).train
    questions = {everything[example.row].question for example in trained}
    assert len(questions) == 4
    assert trained_questions(run, lm.tokenizer) == questions

    # A run of less than an epoch: three steps of one row in one stage, two in the other.
    stages = "batch_size: 1\noptimizer: {steps: 2}\n"
    icd = "icd: {enabled: true, batch_size: 1, epochs: null, optimizer: {steps: 3}}\n"
    (run / "config.yaml").write_text(config + stages + icd)
    both = trained_questions(run, lm.tokenizer)
    (run / "config.yaml").write_text(config + stages)
    of_units = trained_questions(run, lm.tokenizer)
    order = [row for step in range(3) for row in batch_rows([1] * 4, 1, 0, step)]
    taken = [everything[trained[i].row].question for i in order]
    assert (of_units, both) == (set(taken[:2]), set(taken))
    (run / "config.yaml").write_text(config)

    again = json.loads(lines[trained[0].row]) | {"right_answer": "t5"}
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join([*lines, json.dumps(again)]) + "\n")
    out = tmp_path / "out"
    command = ["--model", tiny_imae.directory, "--data", more, "--train-run", run]
    assert halueval([*map(str, command), "--out", str(out), "--quiet"]) == 0
    results = results_of(out)
    assert (results["n_questions"], results["n_excluded"]) == (8, 5)
    seen = {json.loads(line)["question"] for line in (out / "scores.jsonl").read_text().splitlines()}
    assert not seen & questions

    # Whatever is left out, dev and test are those of all questions.
    splits = {}
    for split in ("dev", "test"):
        arguments = [*map(str, command), "--split", split, "--dev-share", "0.5"]
        for exclusion in (arguments, [x for x in arguments if x not in ("--train-run", str(run))]):
            assert halueval([*exclusion, "--out", str(out), "--overwrite", "--quiet"]) == 0
            found = [json.loads(line)["question"] for line in (out / "scores.jsonl").read_text().splitlines()]
            splits.setdefault(split, []).append(set(found))
    for apart, together in splits.values():
        assert apart == together - questions
    assert not set.union(*splits["dev"]) & set.union(*splits["test"])

    (run / "imae").mkdir()
    record = {"training": {"data": {"rows": 99, "held_out_rows": []}}}
    (run / "imae" / "imae_config.json").write_text(json.dumps(record))
    with user_error("other rows now"):
        trained_questions(run, lm.tokenizer)
    capfd.readouterr()
    assert halueval([*map(str, command[:-1]), str(tmp_path), "--out", str(tmp_path / "x"), "--quiet"]) == 2
    assert "holds no config.yaml" in capfd.readouterr().err
    assert not (tmp_path / "x").exists()


# Harm


def text(tmp_path, count=90):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"t{i}" for i in np.random.default_rng(0).integers(3, TINY.vocab_size, count)))
    return path


def test_harm_is_that_of_whole_distributions(tiny_imae, tmp_path, capfd):
    """Against transformers, window by window, and NumPy."""
    out, path = tmp_path / "out", text(tmp_path)
    methods = "base,expert,in-model-contrast:alpha=0.1,dola-static:layer=1"
    command = ["--model", tiny_imae.directory, "--methods", methods, "--text", path, "--window", "40"]
    command = [*map(str, command), "--out", str(out)]
    assert harm(command) == 0
    assert "ruled out" in capfd.readouterr().out
    results = results_of(out)
    found = results["methods"]
    assert results["n_tokens"] == found["base"]["n"] == 89
    assert found["base"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert (found["base"]["top1_agreement"], found["base"]["ruled_out"]) == (1.0, 0.0)
    assert found["expert"]["kl"] > 1e-4

    lm = tiny_imae.load()
    tokens = lm.tokenizer(path.read_text())["input_ids"]
    strong, early, targets = [], [], []
    for part in windows(tokens, 40):
        places = np.arange(part.start - 1, len(part.tokens) - 1)
        strong.append(log_softmax(hf_logits(tiny_imae.hf, [part.tokens])[0])[places])
        targets += part.tokens[part.start :]
        early.append(log_softmax(exit_logits(tiny_imae.hf, part.tokens, 1))[places])
    strong, early = np.concatenate(strong), np.concatenate(early)
    rows = np.arange(len(targets))
    assert found["base"]["cross_entropy"] == pytest.approx(-strong[rows, targets].mean(), abs=1e-4)
    assert found["base"]["perplexity"] == pytest.approx(np.exp(-strong[rows, targets].mean()), rel=1e-3)
    q = log_softmax(strong - early)
    kl = (np.exp(strong) * (strong - q)).sum(axis=-1)
    static = found["dola-static:layer=1"]
    assert static["kl"] == pytest.approx(kl.mean(), rel=1e-3)
    assert static["cross_entropy"] == pytest.approx(-q[rows, targets].mean(), rel=1e-3)
    agreement = (q.argmax(-1) == strong.argmax(-1)).mean()
    assert static["top1_agreement"] == pytest.approx(agreement, abs=0.03)  # a tie of rounding or two
    for name, values in (("kl", kl), ("cross_entropy", -q[rows, targets])):
        interval = stats.mean_of_text(values).interval
        assert interval[0] < static[name] < interval[1]
        assert static["intervals"][name] == pytest.approx(interval, rel=1e-3)
    assert static["intervals"]["perplexity"] == pytest.approx(np.exp(static["intervals"]["cross_entropy"]))
    assert found["base"]["intervals"]["top1_agreement"] == [1.0, 1.0]
    for name in ("harm.png", "harm.svg"):
        assert (out / name).stat().st_size > 0
    # A mask of -1000 leaves the KL finite, and rules out what is not plausible.
    masked = found["in-model-contrast:alpha=0.1"]
    plausible = strong >= strong.max(-1, keepdims=True) + np.log(0.1)
    assert masked["ruled_out"] == pytest.approx(1 - plausible[rows, targets].mean(), abs=0.03)
    assert 50 < masked["kl"] < 1000

    assert harm([*command, "--settings", "generating", "--overwrite"]) == 0
    assert "infinite" in capfd.readouterr().out
    masked = json.loads((out / "results.json").read_text())["methods"]["in-model-contrast:alpha=0.1"]
    assert (masked["kl"], masked["infinite_kl"]) == ("inf", 1.0)
    assert masked["intervals"]["kl"] is None


def exit_logits(hf, tokens, layer):
    import torch

    with torch.no_grad():
        hidden = hf(torch.tensor([tokens]), output_hidden_states=True).hidden_states[layer]
        return hf.lm_head(hidden)[0].float().numpy()


def test_means_that_are_infinite_stay_so():
    values = np.ones((len(STATISTICS), 4))
    values[1, 0] = np.inf
    values[0] = 1e4
    found = summarize_harm(values)
    assert (found["kl"], found["infinite_kl"], found["perplexity"]) == (np.inf, 0.25, np.inf)
    assert set(found["intervals"].values()) == {None}, "one block of tokens tells nothing of others"


def test_scores_that_are_not_finite_are_refused_or_shown(scored, tiny_imae, tmp_path, capfd):
    """An overflow is no score. A mask of -inf is one, with which no metric is a number."""
    command, out = [*map(str, scored[0]), "--quiet"], tmp_path / "out"
    command[command.index("--out") + 1] = str(out)
    place = command.index("--methods") + 1
    command[place] = method = "in-model-contrast:beta=3e38"
    model = ["--model", str(tiny_imae.directory), "--text", str(text(tmp_path, 30)), "--methods", method]
    assert "window 0 of the text" in error_of(capfd, harm, *model, "--quiet", "--out", tmp_path / "harm")
    assert "question 0, answer 0" in error_of(capfd, truthfulqa, *command)
    command[place] = "base,in-model-contrast:alpha=0.9,implausible=-inf"
    assert truthfulqa([*command, "--overwrite"]) == 0
    assert "| – | " in (out / "table.md").read_text()
    assert report([str(out), "--out", str(tmp_path / "report")]) == 0
    assert "| – | " in (tmp_path / "report" / "report.md").read_text()


def test_a_killed_run_of_harm_goes_on(tiny_imae, tmp_path):
    out = tmp_path / "out"
    command = ["--model", tiny_imae.directory, "--methods", "base,expert", "--text", text(tmp_path)]
    command = [*map(str, command), "--window", "40", "--quiet", "--out", str(out)]
    assert harm(command) == 0
    finished = json.loads((out / "results.json").read_text())
    lines = (out / "scores.jsonl").read_text().splitlines()
    (out / "results.json").unlink()
    (out / "scores.jsonl").write_text("\n".join([*lines[:3], lines[3][:60]]))
    assert harm([*command, "--resume"]) == 0
    resumed = json.loads((out / "results.json").read_text())
    assert resumed["resumed_lines"] == 3
    for label, row in finished["methods"].items():
        for name in (*STATISTICS, "n", "perplexity"):
            assert resumed["methods"][label][name] == pytest.approx(row[name], rel=1e-4), (label, name)


def test_bad_input_ends_in_one_line(tiny, tiny_imae, tmp_path, capfd):
    model = ["--model", str(tiny_imae.directory), "--out", str(tmp_path / "out")]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "wide.txt").write_text("t5 t110 t6")
    (tmp_path / "folds").mkdir()
    bad = {
        "fewer than 2 tokens": ["--text", str(tmp_path / "empty.txt")],
        "token id 110 is outside": [
            *("--tokenizer", str(tiny("gqa", vocab_size=120).directory)),
            *("--text", str(tmp_path / "wide.txt")),
        ],
        "nowhere.txt cannot be read": ["--text", "nowhere.txt"],
        "--window: give at least 2, not 1": ["--window", "1"],
        "--seed: give at least 0, not -1": ["--seed", "-1"],
        "activation-decoding needs prompts": ["--methods", "base,activation-decoding"],
        "holds no readable folds.json": ["--methods", f"iti:directions={tmp_path / 'folds'}"],
    }
    for part, arguments in bad.items():
        assert part in error_of(capfd, harm, *model, *arguments)
    assert not (tmp_path / "out").exists()


def test_the_neutral_text_is_as_long_as_the_docs_say():
    assert 400 <= len(NEUTRAL_TEXT.read_text(encoding="utf-8").split()) <= 520
