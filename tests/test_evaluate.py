"""TruthfulQA: metrics, data, protocols, the command and its output contract."""

import csv
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMOLLM2, error_of, hf_logits, log_softmax, user_error

from imae_jax.decode import parse_method
from imae_jax.evaluate.benchmarks import protocols
from imae_jax.evaluate.benchmarks.questions import DEMO_DATA, Data, load_data, read_questions, select
from imae_jax.evaluate.benchmarks.truthfulqa import mc_metrics, metrics_of
from imae_jax.evaluate.runner.arguments import parse_methods
from imae_jax.evaluate.truthfulqa import main
from imae_jax.train.config import DataConfig
from imae_jax.train.data import load_rows

ROOT = Path(__file__).parents[1]


def test_metrics_of_a_worked_example():
    # Best answer second best of all; MC3: one of two true answers above every false one.
    metrics = mc_metrics(true=[math.log(0.3), math.log(0.1)], false=[math.log(0.2)], best=0)
    assert metrics == pytest.approx({"mc1": 1.0, "mc2": 0.4 / 0.6, "mc3": 0.5})
    metrics = mc_metrics(true=[math.log(0.3), math.log(0.1)], false=[math.log(0.2)], best=1)
    assert metrics["mc1"] == 0.0
    # A tie is not a win, but in lm-eval's argmax.
    assert mc_metrics([-1.0], [-1.0], 0) == {"mc1": 0.0, "mc2": 0.5, "mc3": 0.0}
    assert mc_metrics([-1.0], [-1.0], 0, ties_win=True)["mc1"] == 1.0


@pytest.mark.parametrize("offset", [-5000.0, 0.0, 5000.0])
def test_metrics_do_not_overflow(offset):
    plain = mc_metrics([-1.0, -3.0], [-2.0], 0)
    assert mc_metrics([-1.0 + offset, -3.0 + offset], [-2.0 + offset], 0) == pytest.approx(plain)


def test_a_nan_score_is_not_averaged_in():
    assert all(map(math.isnan, mc_metrics([math.nan, -1.0], [-2.0], 1).values()))


def test_the_benchmark_is_read_as_published(shared):
    questions = read_questions(shared / "data" / "TruthfulQA.csv")
    assert len(questions) == 817
    data = load_data(str(shared / "data" / "TruthfulQA.csv"))
    assert data.sha256 == protocols.CSV_SHA256
    assert len({question.category for question in questions}) == 38
    goldens = json.loads((shared / "goldens" / "peer_scores.json").read_text())
    for golden in goldens["questions"]:
        question = questions[golden["index"]]
        assert question.text == golden["question"]
        assert list(question.true) == golden["true"]
        assert list(question.false) == golden["false"]
        assert question.true[question.best] == golden["best"]


def test_demo_questions_are_valid_and_not_in_the_training_data(shared):
    questions = read_questions(DEMO_DATA)
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
    file = shared / "goldens" / "prompt_qa_primer.txt"
    assert primer.text == file.read_text(encoding="utf-8")
    pairs = protocols.load_primer(None, instruction=False)
    assert pairs.text == protocols.load_primer(str(file), instruction=False).text
    assert primer.text == f"{protocols.INSTRUCTION}\n\n{pairs.text}"
    assert pairs.sha256 == protocols.PAIRS_SHA256


def test_results_name_what_is_not_the_protocols_own(tmp_path):
    path = tmp_path / "primer.txt"
    path.write_text("Q: Why?\nA: Because.\n\n")
    custom = protocols.load_primer(str(path))
    protocol, data = protocols.get_protocol("tqa-v1/qa-primer"), load_data("demo")
    marks = f"custom-primer-{custom.sha256[:8]}+demo-data-{data.sha256[:8]}"
    assert protocols.label(protocol, custom, data) == f"tqa-v1/qa-primer+{marks}"
    demo = protocols.load_primer(None, demo=True)
    assert demo.name == "demo"
    assert demo.text.endswith("\n\n")


# Data


def targets(mc1, mc2):
    """A row in the hub's multiple_choice form."""
    choices = {"mc1_targets": mc1, "mc2_targets": mc2}
    return {
        "question": "Why?",
        **{name: {"choices": [*x], "labels": [*x.values()]} for name, x in choices.items()},
    }


MC1 = {"So": 1, "No": 0, "Never": 0}
MC2 = {"So": 1, "Thus.": 1, "Never": 0, "Not so": 0}


def test_the_hubs_choices_are_taken_as_they_are(monkeypatch):
    """As lm-eval takes them; mc1 and mc2 have choices of their own."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [targets(MC1, MC2)])
    (question,) = load_data("hub", "targets").questions
    assert question.true == ("So", "Thus.")
    assert question.false == ("Never", "Not so", "No")
    assert (question.mc1_false, question.mc2_true, question.mc2_false) == ((2, 0), 2, 2)

    sums = dict(zip(question.answers, (-2.0, -3.0, -4.0, -1.0, -2.0), strict=True))
    protocol = protocols.PROTOCOLS["tqa-v1/lm-eval"]
    metrics = metrics_of(protocol, question, list(sums.values()))
    # What the harness computes: argmax takes the first of equals, mc2 the share of exp.
    assert metrics["mc1"] == float(np.argmax([sums[c] for c in MC1]) == 0) == 1.0
    p = np.exp([sums[c] for c in MC2])
    assert metrics["mc2"] == pytest.approx(p[:2].sum() / p.sum())

    # The harness's mc2 would have a value where only mc1's choice "No" has none: here neither has.
    assert all(map(math.isnan, metrics_of(protocol, question, [-2, -3, -4, -1, -math.inf]).values()))

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [targets({"No": 0, "So": 1}, MC2)])
    with user_error("row 0", "the first choice of mc1_targets"):
        load_data("hub", "targets")


def test_the_hub_cannot_be_reached_offline():
    for form in ("answers", "targets"):
        with user_error("hub", "--data FILE"):
            load_data("hub", form)


def test_the_binary_protocol_needs_the_newer_csv(tmp_path):
    with user_error("'Best Incorrect Answer'", "https://github.com/sylinrl/TruthfulQA"):
        load_data("demo", "binary")
    path = tmp_path / "new.csv"
    path.write_text("Question,Best Answer,Best Incorrect Answer\nWhy?,So,Never\n")
    (question,) = load_data(str(path), "binary").questions
    assert question.answers == ("So.", "Never.")
    protocol = protocols.PROTOCOLS["tqa-v2025/binary"]
    assert metrics_of(protocol, question, [-1.0, -2.0]) == {"binary": 1.0}
    assert metrics_of(protocol, question, [-2.0, -2.0]) == {"binary": 0.0}


def test_other_data_are_objected_to(shared):
    published = load_data(str(shared / "data" / "TruthfulQA.csv"))
    protocol = protocols.PROTOCOLS["tqa-v1/qa-primer"]
    assert protocol.objection(published) is None
    fewer = Data(published.questions[1:], "x.csv", "csv")
    assert "816 questions, tqa-v1/qa-primer is of 817" in protocol.objection(fewer)
    other = Data((fewer.questions[0], *fewer.questions), "x.csv", "csv")
    assert f"is of {protocols.CSV_SHA256[:8]}" in protocol.objection(other)
    binary = protocols.PROTOCOLS["tqa-v2025/binary"]
    assert "790" in binary.objection(published)
    newer = load_data(str(shared / "data" / "TruthfulQA_2025.csv"), "binary")
    assert binary.objection(newer) is None
    changed = (newer.questions[1], *newer.questions[1:])
    assert f"is of {newer.sha256[:8]}" in binary.objection(Data(changed, "x.csv", "csv"))


def test_splits_share_no_question_and_do_not_depend_on_order():
    texts = [f"question {i}" for i in range(50)] + ["question 3"]
    dev, test = (set(select(texts, split, seed=1, dev_share=0.2)) for split in ("dev", "test"))
    assert dev | test == set(range(51)) == set(select(texts, "all"))
    assert not {texts[i] for i in dev} & {texts[i] for i in test}
    assert len({texts[i] for i in dev}) == 10
    backwards = texts[::-1]
    assert {backwards[i] for i in select(backwards, "dev", seed=1)} == {texts[i] for i in dev}
    assert {texts[i] for i in select(texts, "dev", seed=2)} != {texts[i] for i in dev}


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
    for nothing in ("", "[]", "base", "[base]"):
        path.write_text(nothing)
        with user_error("methods.yaml must hold a list"):
            parse_methods(str(path))


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


def run(*arguments) -> int:
    return main([*map(str, arguments), "--quiet"])


def test_output_contract(scored, tiny_imae, capfd):
    command, out = scored
    results = json.loads((out / "results.json").read_text())
    assert {"model", "versions", "git", "protocol_details", "statistics", "split"} <= results.keys()
    assert results["protocol"].startswith("tqa-v1/qa-primer+custom-primer-")
    assert (results["n_questions"], results["n_answers"]) == (6, 24)
    methods = ["base", "expert", "anti-expert", "in-model-contrast:renormalize=true", "in-model-contrast"]
    assert list(results["methods"]) == methods
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [(line["method"], line["index"]) for line in lines] == [(m, i) for m in methods for i in range(6)]
    lm = tiny_imae.load()
    questions = read_questions(command[command.index("--data") + 1])
    primer = Path(command[command.index("--primer") + 1]).read_text()
    prompts = {q.index: f"{primer}Q: {q.text}\nA:" for q in questions}
    for line in lines[:6]:  # base, one sequence at a time
        expected = []
        for answer in questions[line["index"]].answers:
            prompt = prompts[line["index"]]
            tokens = lm.tokenizer(f"{prompt} {answer}")["input_ids"]
            start = len(lm.tokenizer(prompt)["input_ids"])
            log_probs = log_softmax(hf_logits(tiny_imae.hf, [tokens])[0])
            expected.append(sum(log_probs[i - 1, tokens[i]] for i in range(start, len(tokens))))
        np.testing.assert_allclose(line["true"] + line["false"], expected, atol=1e-4)
    line, answers = lines[-1], [f" {answer}" for answer in questions[5].answers]
    alone = lm.score(prompts[5], answers, "in-model-contrast", format="raw")
    np.testing.assert_allclose(line["true"] + line["false"], alone, atol=1e-4)
    for name, row in results["methods"].items():
        of_method = [line for line in lines if line["method"] == name]
        for metric in ("mc1", "mc2", "mc3"):
            values = [100 * line[metric] for line in of_method]
            assert row[metric] == pytest.approx(np.mean(values))
            low, high = row["intervals"][metric]
            assert min(values) <= low <= row[metric] <= high <= max(values)
        assert row["n"] == 6
        assert set(row["by_category"]) == {"one", "two"}
        assert ("against_baseline" in row) == (name != "base")
    table = (out / "table.md").read_text()
    assert "| in-model-contrast | raw | 6 |" in table
    assert "| in-model-contrast:renormalize=true | renormalized | 6 |" in table
    for plot in ("scores", "categories", "differences"):
        assert (out / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{plot}.svg").read_text()

    before = (out / "results.json").read_bytes()
    assert run(*command) == 2
    assert "exists already" in capfd.readouterr().err
    assert (out / "results.json").read_bytes() == before


def test_masked_scores_are_named_and_not_averaged_in(scored, tmp_path, capfd):
    command, label = [*scored[0]], "in-model-contrast:alpha=0.9,implausible=-inf"
    command[command.index("--out") + 1] = tmp_path / "out"
    command[command.index("--methods") + 1] = f"base,{label}"
    assert run(*command) == 0
    assert "of 6 have a score that is not finite (rows " in capfd.readouterr().err
    text = (tmp_path / "out" / "results.json").read_text()
    row = json.loads(text)["methods"][label]
    assert row["undefined"]
    assert row["n"] == 6 - len(row["undefined"])
    assert "NaN" not in text
    assert "Infinity" not in (tmp_path / "out" / "scores.jsonl").read_text()


def test_sums_equal_lm_eval(tiny, tmp_path):
    """The harness's own tokenization and scoring of its own prompts, on SmolLM2-like text."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    checkpoint = tiny("gqa", max_position_embeddings=512)
    template = (
        Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks/truthfulqa/truthfulqa_mc1.yaml"
    )
    import yaml
    from jinja2 import Template

    task = yaml.load(template.read_text(), yaml.BaseLoader)
    answers = ["t5 t6.", "t9.", "t7.", "t10 t11."]
    context = Template(task["doc_to_text"]).render(question="Why?")
    path, out = tmp_path / "rows.csv", tmp_path / "out"
    path.write_text(
        "Question,Best Answer,Correct Answers,Incorrect Answers\nWhy?,t5 t6,t5 t6; t9,t7; t10 t11\n"
    )
    command = ["--model", checkpoint.directory, "--data", path, "--protocol", "tqa-v1/lm-eval"]
    assert run(*command, "--out", out, "--any-data") == 0
    line = json.loads((out / "scores.jsonl").read_text())

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
    model = huggingface.HFLM(pretrained=checkpoint.hf, tokenizer=tokenizer, batch_size=1)
    requests = [(("", ""), *model._encode_pair(context, f" {answer}")) for answer in answers]
    expected = [x for x, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)]
    np.testing.assert_allclose(line["true"] + line["false"], expected, atol=1e-4)
    assert line["mc1"] == float(np.argmax([expected[0], *expected[2:]]) == 0)
    p = np.exp(expected)
    assert line["mc2"] == pytest.approx(p[:2].sum() / p.sum(), abs=1e-4)


def test_chat_protocol_scores_the_answer_after_the_template(smollm2, hf_smollm2, tmp_path):
    """One question against transformers, without any sharing."""
    out = tmp_path / "out"
    assert (
        main(["--model", SMOLLM2, "--protocol", "tqa-v1/chat", "--limit", "1", "--out", str(out), "--quiet"])
        == 0
    )
    line = json.loads((out / "scores.jsonl").read_text())
    question = read_questions(DEMO_DATA)[0]
    primer = protocols.load_primer(None, demo=True)
    message = [{"role": "user", "content": f"{primer.text}Q: {question.text}\nA:"}]
    prompt = smollm2.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    start = len(smollm2.tokenizer(prompt)["input_ids"])
    for answer, got in zip(question.true, line["true"], strict=True):
        tokens = smollm2.tokenizer(prompt + answer)["input_ids"]
        log_probs = log_softmax(hf_logits(hf_smollm2, [tokens])[0])
        expected = sum(log_probs[i - 1, tokens[i]] for i in range(start, len(tokens)))
        assert got == pytest.approx(expected, rel=1e-4)


def test_bad_input_ends_in_one_line(tmp_path, capfd):
    out = tmp_path / "out"
    rows = tmp_path / "rows.csv"

    def write(**change):
        row = {"Question": "Why?", "Best Answer": "So", "Correct Answers": "So", "Incorrect Answers": "No"}
        with rows.open("w", newline="") as file:
            writer = csv.DictWriter(file, [k for k in row if change.get(k, "") is not None])
            writer.writeheader()
            writer.writerow({k: v for k, v in (row | change).items() if v is not None})

    base = ["--model", SMOLLM2, "--out", out, "--any-data"]
    demo_primer = ["--primer", protocols.DATA_DIRECTORY / "demo_primer.txt"]
    write(**{"Incorrect Answers": None})
    assert "no column Incorrect Answers" in error_of(capfd, main, *base, "--data", rows, *demo_primer)
    write(**{"Incorrect Answers": " ; "})
    assert "line 2 lacks" in error_of(capfd, main, *base, "--data", rows, *demo_primer)
    write(Question="")
    assert "line 2 lacks" in error_of(capfd, main, *base, "--data", rows, *demo_primer)
    assert "nowhere.csv" in error_of(capfd, main, *base, "--data", "nowhere.csv", *demo_primer)
    assert "nowhere.txt" in error_of(capfd, main, *base, "--primer", "nowhere.txt")
    assert "protocol 'tqa-v9'" in error_of(capfd, main, *base, "--protocol", "tqa-v9")
    assert "--limit: give at least 1, not 0" in error_of(capfd, main, *base, "--limit", "0")
    assert "--dev-share 1.0" in error_of(capfd, main, *base, "--dev-share", "1")
    assert "--baseline icd" in error_of(capfd, main, *base, "--baseline", "icd")
    write()
    error = error_of(capfd, main, *base[:-1], "--data", rows, *demo_primer)
    assert "tqa-v1/qa-primer is of 817" in error
    assert "--any-data" in error
    assert "needs a model with anti-expert units" in error_of(capfd, main, *base, "--methods", "expert")
    assert "'nowhere' does not exist" in error_of(capfd, main, "--model", "nowhere", "--out", out)
    assert list(tmp_path.iterdir()) == [rows], "nothing may be left behind"


def test_command_runs_from_the_checkout():
    """`python -m evaluate.truthfulqa` beside `python -m imae_jax.evaluate.truthfulqa`."""
    for module in ("evaluate.truthfulqa", "imae_jax.evaluate.truthfulqa"):
        run = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert "--methods" in run.stdout
