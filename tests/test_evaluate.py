"""TruthfulQA: metrics, data, protocols, the command and its output contract, the report."""

import csv
import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMOLLM2, hf_logits, log_softmax, user_error, with_random_units

from imae_jax.config import AntiExpertConfig
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.decode import parse_method
from imae_jax.evaluate import protocols, report, truthfulqa
from imae_jax.evaluate.truthfulqa import main, mc_metrics, parse_methods, read_questions
from imae_jax.llama import Weights
from imae_jax.train.config import DataConfig
from imae_jax.train.data import load_rows

ROOT = Path(__file__).parents[1]


def test_metrics_of_a_worked_example():
    # Best answer second best of all; MC3: one of two true answers above every false one.
    metrics = mc_metrics(true=[math.log(0.3), math.log(0.1)], false=[math.log(0.2)], best=0)
    assert metrics == pytest.approx({"mc1": 1.0, "mc2": 0.4 / 0.6, "mc3": 0.5})
    metrics = mc_metrics(true=[math.log(0.3), math.log(0.1)], false=[math.log(0.2)], best=1)
    assert metrics["mc1"] == 0.0
    # A tie is not a win.
    assert mc_metrics([-1.0], [-1.0], 0) == {"mc1": 0.0, "mc2": 0.5, "mc3": 0.0}


@pytest.mark.parametrize("offset", [-5000.0, 0.0, 5000.0])
def test_metrics_do_not_overflow(offset):
    plain = mc_metrics([-1.0, -3.0], [-2.0], 0)
    assert mc_metrics([-1.0 + offset, -3.0 + offset], [-2.0 + offset], 0) == pytest.approx(plain)


def test_a_nan_score_is_not_averaged_in():
    assert all(map(math.isnan, mc_metrics([math.nan, -1.0], [-2.0], 1).values()))


def test_the_benchmark_is_read_as_published(shared):
    questions = read_questions(shared / "data" / "TruthfulQA.csv")
    assert len(questions) == 817
    goldens = json.loads((shared / "goldens" / "peer_scores.json").read_text())
    for golden in goldens["questions"]:
        question = questions[golden["index"]]
        assert question.text == golden["question"]
        assert list(question.true) == golden["true"]
        assert list(question.false) == golden["false"]
        assert question.true[question.best] == golden["best"]


def test_demo_questions_are_valid_and_not_in_the_training_data(shared):
    questions = read_questions(truthfulqa.DEMO_DATA)
    texts = {q.text for q in questions}
    assert len(questions) >= 60
    assert len(texts) == len(questions)
    assert not texts & {row.question for row in load_rows(DataConfig())}
    assert not texts & {q.text for q in read_questions(shared / "data" / "TruthfulQA.csv")}


def test_primer_of_lm_eval_is_the_pinned_one(shared):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("the package lm-eval is not installed")
    primer = protocols.load_primer(None)
    assert primer.name == "standard"
    assert primer.text == (shared / "goldens" / "prompt_qa_primer.txt").read_text(encoding="utf-8")


def test_primers_are_told_apart(tmp_path):
    path = tmp_path / "primer.txt"
    path.write_text("Q: Why?\nA: Because.\n\n")
    custom = protocols.load_primer(str(path))
    protocol = protocols.get_protocol("tqa-v1/qa-primer")
    assert (
        truthfulqa.protocol_label(protocol, custom) == f"tqa-v1/qa-primer+custom-primer-{custom.sha256[:8]}"
    )
    demo = protocols.load_primer(None, demo=True)
    assert demo.name == "demo"
    assert demo.text.endswith("\n\n")


def test_prompts(smollm2):
    plain, chat = (protocols.PROTOCOLS[f"tqa-v1/{name}"] for name in ("qa-primer", "chat"))
    text = plain.prompt(smollm2.tokenizer, "PRIMER\n\n", "Why?")
    assert text == "PRIMER\n\nQ: Why?\nA:"
    assert plain.continuation(smollm2.tokenizer, "So.") == " So."
    wrapped = chat.prompt(smollm2.tokenizer, "PRIMER\n\n", "Why?")
    assert wrapped.endswith(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
    assert chat.continuation(smollm2.tokenizer, "So.") == "So."


def test_methods_from_text_and_yaml(tmp_path):
    methods = parse_methods("base,expert,-0.5,in-model-contrast:beta=2,alpha=0.1")
    assert list(methods) == ["base", "expert", "-0.5", "in-model-contrast:beta=2,alpha=0.1"]
    assert [m.streams[0].strength for m in methods.values()] == [0.0, -1.0, -0.5, 0.0]
    assert methods["in-model-contrast:beta=2,alpha=0.1"].alpha == 0.1
    path = tmp_path / "methods.yaml"
    path.write_text(
        "- {name: base}\n"
        "- {name: in-model-contrast, renormalize: true}\n"
        "- {name: in-model-contrast, beta: 2, label: strong}\n"
    )
    methods = parse_methods(str(path))
    assert list(methods) == ["base", "in-model-contrast", "strong"]
    assert methods["in-model-contrast"].renormalize


def test_settings_build_the_method_again():
    for method in parse_methods("expert,0.25,in-model-contrast:beta=2,alpha=0.1").values():
        assert parse_method(method.settings()) == method


BAD_METHODS = {
    "nonsense": "'nonsense' does not exist",
    "": "no method",
    "expert:beta=1": "takes no settings",
    "in-model-contrast:gamma=1": "no setting 'gamma'",
    "in-model-contrast:beta=x": "beta='x'",
    "in-model-contrast:renormalize=maybe": "renormalize='maybe'",
    "in-model-contrast:alpha=2": "alpha=2",
    "nan": "'nan' does not exist",
    "base,base": "listed twice",
    "missing.yaml": "missing.yaml",
}


@pytest.mark.parametrize("text", BAD_METHODS)
def test_bad_methods(text):
    with user_error(BAD_METHODS[text]):
        parse_methods(text)


@pytest.fixture(scope="module")
def imae_dir(smollm2, tmp_path_factory):
    """SmolLM2 with small random units."""
    path = tmp_path_factory.mktemp("imae") / "imae"
    weights = with_random_units(smollm2.model.weights(), smollm2.config, 64)
    units = tuple({k: 0.3 * v for k, v in unit.items()} for unit in weights.units)
    base = dataclasses.asdict(smollm2.base)
    write_imae_dir(
        path, Weights(weights.base, units), smollm2.config, AntiExpertConfig(64), base=base, training={}
    )
    return path


def test_output_contract(imae_dir, tmp_path, capfd):
    out = tmp_path / "out"
    command = ["--model", imae_dir, "--methods", "base,expert,anti-expert", "--limit", "3", "--out", out]
    assert main([*map(str, command), "--quiet"]) == 0
    assert "MC1" in capfd.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert {"protocol", "model", "n_questions", "versions", "methods"} <= results.keys()
    assert results["protocol"].startswith("tqa-v1/qa-primer+demo-primer-")
    assert results["n_questions"] == 3
    assert list(results["methods"]) == ["base", "expert", "anti-expert"]
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    questions = read_questions(truthfulqa.DEMO_DATA)
    for line in lines:
        assert set(line) == {"index", "question", "method", "true", "false", "best", "mc1", "mc2", "mc3"}
        question = questions[line["index"]]
        assert (len(line["true"]), len(line["false"])) == (len(question.true), len(question.false))
    for name, row in results["methods"].items():
        assert {"mc1", "mc2", "mc3", "seconds", "settings"} <= row.keys()
        of_method = [line for line in lines if line["method"] == name]
        for metric in truthfulqa.METRICS:
            assert row[metric] == pytest.approx(100 * np.mean([line[metric] for line in of_method]))
    sums = {line["method"]: line["true"][0] for line in lines if line["index"] == 0}
    assert len(set(sums.values())) == 3, "the modes of random units must differ"

    before = (out / "results.json").read_bytes()
    assert main([*map(str, command), "--quiet"]) == 2
    assert "exists already" in capfd.readouterr().err
    assert (out / "results.json").read_bytes() == before


def test_chat_protocol_scores_the_answer_after_the_template(smollm2, hf_smollm2, tmp_path):
    """One question against transformers, without any sharing."""
    out = tmp_path / "out"
    assert (
        main(["--model", SMOLLM2, "--protocol", "tqa-v1/chat", "--limit", "1", "--out", str(out), "--quiet"])
        == 0
    )
    line = json.loads((out / "scores.jsonl").read_text())
    question = read_questions(truthfulqa.DEMO_DATA)[0]
    primer = protocols.load_primer(None, demo=True)
    message = [{"role": "user", "content": f"{primer.text}Q: {question.text}\nA:"}]
    prompt = smollm2.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    start = len(smollm2.tokenizer(prompt)["input_ids"])
    for answer, got in zip(question.true, line["true"], strict=True):
        tokens = smollm2.tokenizer(prompt + answer)["input_ids"]
        log_probs = log_softmax(hf_logits(hf_smollm2, [tokens])[0])
        expected = sum(log_probs[i - 1, tokens[i]] for i in range(start, len(tokens)))
        assert got == pytest.approx(expected, rel=1e-4)


def run_main(capfd, *arguments) -> str:
    assert main([*map(str, arguments), "--quiet"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_bad_input_ends_in_one_line(tmp_path, capfd):
    out = tmp_path / "out"
    rows = tmp_path / "rows.csv"

    def write(**change):
        row = {"Question": "Why?", "Best Answer": "So", "Correct Answers": "So", "Incorrect Answers": "No"}
        with rows.open("w", newline="") as file:
            writer = csv.DictWriter(file, [k for k in row if change.get(k, "") is not None])
            writer.writeheader()
            writer.writerow({k: v for k, v in (row | change).items() if v is not None})

    base = ["--model", SMOLLM2, "--out", out]
    demo_primer = ["--primer", protocols.DATA_DIRECTORY / "demo_primer.txt"]
    write(**{"Incorrect Answers": None})
    assert "no column Incorrect Answers" in run_main(capfd, *base, "--data", rows, *demo_primer)
    write(**{"Incorrect Answers": " ; "})
    assert "row 0 lacks" in run_main(capfd, *base, "--data", rows, *demo_primer)
    write(Question="")
    assert "row 0 lacks" in run_main(capfd, *base, "--data", rows, *demo_primer)
    assert "nowhere.csv" in run_main(capfd, *base, "--data", "nowhere.csv", *demo_primer)
    assert "nowhere.txt" in run_main(capfd, *base, "--primer", "nowhere.txt")
    assert "protocol 'tqa-v9'" in run_main(capfd, *base, "--protocol", "tqa-v9")
    assert "--limit 0" in run_main(capfd, *base, "--limit", "0")
    assert "needs a model with anti-expert units" in run_main(capfd, *base, "--methods", "expert")
    assert "'nowhere' does not exist" in run_main(capfd, "--model", "nowhere", "--out", out)
    assert list(tmp_path.iterdir()) == [rows], "nothing may be left behind"


def test_report_of_runs(tmp_path, capfd):
    training, evaluation = tmp_path / "training", tmp_path / "evaluation"
    for directory in (training, evaluation):
        directory.mkdir()
    line = {"anti": 3.0, "expert": 0.5, "gate": 0.5, "gate_on_fact": 0.6, "gate_off_fact": 0.4}
    steps = [json.dumps({"step": i, "loss": 4.0, "tokens_per_second": 10.0, **line}) for i in (1, 2)]
    (training / "metrics.jsonl").write_text("\n".join(steps))
    row = {"mc1": 25.0, "mc2": None, "mc3": 20.0, "seconds": 1.0, "settings": {}}
    results = {
        "protocol": "tqa-v1/chat",
        "model": "m",
        "n_questions": 2,
        "n_answers": 9,
        "dtype": "float32",
        "versions": {"jax": "1"},
        "methods": {"base": row, "expert": row},
    }
    (evaluation / "results.json").write_text(json.dumps(results))
    out = tmp_path / "report"
    assert report.main([str(training), str(evaluation), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "| expert | 25.00 | – | 20.00 | 1.0 |" in text
    for plot in ("1-training.png", "2-truthfulqa.png"):
        assert f"({plot})" in text
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "other")]) == 2
    assert "holds neither" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()


def test_command_runs_from_the_checkout():
    """`python -m evaluate.truthfulqa` beside `python -m imae_jax.evaluate.truthfulqa`."""
    for module in ("evaluate.truthfulqa", "imae_jax.evaluate.truthfulqa"):
        run = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert "--methods" in run.stdout
