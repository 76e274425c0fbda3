"""Generated answers: metrics held against lm-eval's, refusals, runs that go on after a kill, pages."""

import csv
import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, error_of, with_changes, word_tokenizer, write_questions

from imae_jax.convert.hf_tokenizer import write_tokenizer
from imae_jax.convert.iti import Directions, write_directions
from imae_jax.decode import Sampler
from imae_jax.evaluate.answers import main
from imae_jax.evaluate.benchmarks.answer_metrics import NO_COMMENT, is_refusal, likeness, repetition
from imae_jax.evaluate.benchmarks.answers import answers_page, metrics_of, trimmed
from imae_jax.evaluate.benchmarks.questions import DEMO_DATA, read_questions
from imae_jax.evaluate.compare import main as compare
from imae_jax.evaluate.report import main as report
from imae_jax.evaluate.runner.directory import read_records, read_run

PRIMER = "Q: t3 t4\nA: t5 .\n\n"
METHODS = "base,in-model-contrast"


@pytest.fixture(scope="module")
def lm_eval_task():
    """The module of lm-eval's task truthfulqa_gen, by its file: the package itself is slow to import."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        pytest.skip("the package lm-eval is not installed")
    path = Path(spec.origin).parent / "tasks" / "truthfulqa" / "utils.py"
    spec = importlib.util.spec_from_file_location("truthfulqa_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ANSWERS = (
    "",
    "I have no comment.",
    "Nothing happens if you do that.",
    "Yes. It is   dangerous , and “nobody” knows why . You should not -- ever -- do it .",
    "the the the the the the the the",
    "Über 9,000 Menschen (90 %) glauben\ndas nicht.",
    "It is a long story that has nothing to do with the question at all, and so it goes on and on.",
)


def test_likeness_is_that_of_lm_eval(lm_eval_task):
    with DEMO_DATA.open(encoding="utf-8-sig", newline="") as file:
        row = list(csv.DictReader(file))[3]
    question = read_questions(DEMO_DATA)[3]
    doc = lm_eval_task.preprocess_function(
        {
            "question": row["Question"],
            "correct_answers": row["Correct Answers"].split(";"),
            "incorrect_answers": row["Incorrect Answers"].split(";"),
        }
    )
    true = (*question.true, NO_COMMENT)
    assert [*true] == doc["correct_answers"]
    assert [*question.false] == doc["incorrect_answers"]
    outcomes = set()
    for answer in (*ANSWERS, question.true[0], question.false[0], question.false[-1][:-4] + " ."):
        expected = lm_eval_task.process_results_gen(doc, [answer])
        found = likeness(answer, true, question.false)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            scale = 1 if name.endswith("_acc") else 100
            # Both are the same float64 operations, up to the factor.
            assert scale * value == pytest.approx(float(expected[name]), abs=1e-9), (answer, name)
        outcomes.add(found["rouge1_acc"])
    assert outcomes == {0.0, 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "I have no comment.",
        "“I have no comment”",
        "No comment",
        "You have no comment.",
        "I don't know.",
        "I DON’T KNOW the answer",
        "I do not know, sorry",
        "I cannot answer that.",
        "I can't say",
        "As an AI language model, I have no opinions.",
        "Sorry, but I am unable to say.",
    ],
)
def test_refusals_are_found(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text", ["", "No, comments are free.", "Nobody has no comment.", "As an aid, it helps.", "I canter."]
)
def test_answers_are_no_refusals(text):
    assert not is_refusal(text)


def test_repetition_is_the_share_of_repeated_4_grams():
    assert repetition("a b c d e f g") == 0
    assert repetition("a b c") == repetition("") == 0
    # 5 4-grams, of which 1 differs from the others.
    assert repetition("a a a a a a a a") == pytest.approx(4 / 5)
    # 6 4-grams; those at 3 and 4 are those at 0 and 1.
    assert repetition("a b c a b c a b c") == pytest.approx(3 / 6)


def test_a_refusal_is_like_a_true_answer_but_answers_nothing():
    references = (("It passes through you.",), ("It grows in your stomach.",))
    found = metrics_of("I have no comment.", *references, finished=True)
    assert (found["bleu_acc"], found["refused"], found["answered_acc"]) == (1, 1, 0)
    found = metrics_of("It passes through you, slowly.", *references, finished=False)
    assert (found["bleu_acc"], found["refused"], found["answered_acc"], found["cut_off"]) == (1, 0, 1, 1)
    found = metrics_of("", *references, finished=True)
    assert (found["bleu_acc"], found["refused"], found["empty"], found["rouge1_diff"]) == (0, 0, 1, 0)


def test_what_frames_an_answer_is_trimmed():
    assert trimmed(" A: Yes. \n") == "Yes."
    assert trimmed(" Yes, A: is first.") == "Yes, A: is first."


def test_completions_say_what_ended_them(tiny_imae):
    lm, prompts = tiny_imae.load(), ["t5 t6 t7", "t9 t10"]
    options = {"max_new_tokens": 6, "sampler": Sampler(1.0), "seed": 1}
    plain = lm.complete(prompts, "base", **options)
    assert [c.text for c in plain] == lm.generate(prompts, "base", **options)
    assert not any(c.finished for c in plain)
    first, second = (c.text.split() for c in plain)
    assert first[3] not in (*first[:3], *second)
    assert second[2] not in (*second[:2], *first)
    # With a space, since t4 is part of t42.
    stopped = lm.complete(prompts, "base", stop=[f"{first[3]} "], **options)
    assert [c.finished for c in stopped] == [True, False]
    assert [c.text.split() for c in stopped] == [first[:3], second]
    ending = dataclasses.replace(lm, eos_token_ids=(lm.tokenizer.convert_tokens_to_ids(first[3]),))
    for stop, expected in (((), second), ([f"{second[2]} "], second[:2])):
        found = ending.complete(prompts, "base", stop=stop, **options)
        assert [c.finished for c in found] == [True, bool(stop)]
        assert found[0].text.split() == first[:4]
        assert found[1].text.split() == expected


# Runs


def run(*arguments) -> int:
    return main([*map(str, arguments), "--quiet"])


def with_out(command, out, **changes):
    return with_changes(command, out=out, **changes)


@pytest.fixture(scope="module")
def answered(tiny_imae, tmp_path_factory):
    """A finished run, sampled, of two batches: its arguments and its directory, not to be changed."""
    directory = tmp_path_factory.mktemp("answered")
    (directory / "primer.txt").write_text(PRIMER)
    out = directory / "out"
    command = ["--model", tiny_imae.directory, "--methods", METHODS, "--out", out, "--any-data"]
    command += ["--data", write_questions(directory / "questions.csv"), "--primer", directory / "primer.txt"]
    command += ["--batch-size", 3, "--max-new-tokens", 6, "--temperature", 0.8, "--show", 2]
    assert run(*command) == 0
    return command, out


def test_a_run_holds_texts_and_what_they_come_to(answered, tiny_imae):
    command, out = answered
    results, lines = read_run(out, "truthfulqa-answers"), read_records(out)
    assert [(line["method"], line["index"]) for line in lines] == [
        (name, i) for name in METHODS.split(",") for i in range(6)
    ]
    lm = tiny_imae.load()
    questions = read_questions(command[command.index("--data") + 1])
    prompts = [f"{PRIMER}Q: {question.text}\nA:" for question in questions]
    for label in METHODS.split(","):
        expected = []
        for number, batch in enumerate((prompts[:3], prompts[3:])):
            expected += lm.generate(batch, label, sampler=Sampler(0.8), max_new_tokens=6, seed=number)
        own = [line for line in lines if line["method"] == label]
        assert [line["answer"] for line in own] == [text.strip() for text in expected]
        row = results["methods"][label]
        for name in ("bleu_acc", "rouge1_diff", "answered_acc", "refused", "cut_off", "repetition"):
            assert row[name] == pytest.approx(100 * np.mean([line[name] for line in own])), name
        assert row["tokens"]["value"] == pytest.approx(np.mean([line["tokens"] for line in own]))
        for line, question in zip(own, questions, strict=True):
            found = likeness(line["answer"], (*question.true, NO_COMMENT), question.false)
            assert {name: line[name] for name in found} == found
            assert line["best"] == question.true[question.best]
            assert line["tokens"] == len(line["answer"].split())
    assert results["baseline"] == "base"
    assert "against_baseline" in results["methods"]["in-model-contrast"]
    assert results["methods"]["in-model-contrast"]["settings"]["alpha"] > 0, "the settings of generation"
    assert results["generation"]["stop"] == ["\n", "Q:"]
    for name in ("table.md", "run.json"):
        assert (out / name).stat().st_size
    for name in ("scores", "texts", "categories", "differences"):
        assert (out / f"{name}.png").exists()
        assert (out / f"{name}.svg").exists()
    table = (out / "table.md").read_text()
    assert "temperature 0.8, seed 0, at most 6 tokens" in table
    assert "| method | N | BLEU acc | ROUGE-1 acc |" in table


def test_texts_are_readable_beside_the_best_answer(answered):
    out = answered[1]
    page, lines = (out / "answers.md").read_text(), read_records(out)
    assert page.count("\n## ") == 2, "--show"
    for line in lines:
        if line["index"] < 2:
            assert f"| {line['method']} | {line['answer']} | ROUGE-1 " in page
    assert f"| *best answer* | {lines[0]['best']} |  |" in page
    odd = {**lines[0], "answer": "a | <b>\nc", "empty": 1.0}
    page = answers_page("Answers", [odd], 1)
    assert "| a \\| &lt;b&gt;<br>c | ROUGE-1" in page
    assert ", empty" in page


def test_a_killed_run_goes_on_with_the_same_draws(answered, tmp_path):
    command, finished = answered
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "results.json").unlink()
    lines = (finished / "scores.jsonl").read_text().splitlines()
    marked = {**json.loads(lines[0]), "answer": "kept"}
    # In the middle of base's second batch, and in the middle of a line.
    (out / "scores.jsonl").write_text("\n".join([json.dumps(marked), *lines[1:4], lines[4][:40]]))
    assert run(*with_out(command, out), "--resume") == 0
    assert read_run(out)["resumed_lines"] == 4
    after = read_records(out)
    assert after[0]["answer"] == "kept", "a written answer is not written again"
    assert after[1:] == read_records(finished)[1:]


def test_a_run_goes_on_with_the_same_settings_alone(answered, tmp_path, capfd):
    command, finished = answered
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert "pass --overwrite" in error_of(capfd, main, *with_out(command, out))
    (out / "results.json").unlink()
    assert "unfinished run: pass --resume" in error_of(capfd, main, *with_out(command, out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for part, arguments in {
        "another generation.sampler.temperature (0.8, now 0.0)": with_out(command, out, temperature=0),
        "another generation.max_new_tokens (6, now 5)": with_out(command, out, max_new_tokens=5),
        "another generation.batch_size (3, now 2)": with_out(command, out, batch_size=2),
        "another generation.seed (0, now 7)": [*with_out(command, out), "--sampling-seed", 7],
        "another methods.base": with_out(command, out, methods="expert"),
    }.items():
        assert part in error_of(capfd, main, *arguments, "--resume"), part
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_cannot_be_answered_is_refused(answered, tmp_path, capfd, monkeypatch):
    command = with_out(answered[0], tmp_path / "new")
    long = tmp_path / "long.txt"
    long.write_text("Q: t3\nA: " + "t5 " * 500)
    for part, arguments in {
        "protocol tqa-v1/lm-eval is multiple choice alone": [*command, "--protocol", "tqa-v1/lm-eval"],
        "protocol 'mc9' does not exist": [*command, "--protocol", "mc9"],
        "the tokenizer has no chat template": [*command, "--protocol", "tqa-v1/chat"],
        "--max-new-tokens: give at least 1, not 0": with_out(command, tmp_path / "new", max_new_tokens=0),
        "--sampling-seed -1": [*command, "--sampling-seed", -1],
        "temperature -1.0": with_out(command, tmp_path / "new", temperature=-1),
        "over the model's context of 512: lower --max-new-tokens": with_out(
            command, tmp_path / "new", primer=long
        ),
        "--baseline dola is not among --methods": [*command, "--baseline", "dola"],
    }.items():
        assert part in error_of(capfd, main, *arguments), part
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert "rouge-score is not installed: pip install 'imae_jax[answers]'" in error_of(capfd, main, *command)
    assert not (tmp_path / "new").exists()


def test_chat_form_ends_with_the_turn(answered, tmp_path):
    template = (
        "{% for m in messages %}t3 {{ m.content }} t4 {% endfor %}{% if add_generation_prompt %}t8{% endif %}"
    )
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(word_tokenizer(TINY.vocab_size, template), tmp_path / "tokenizer")
    out = tmp_path / "out"
    command = with_out(answered[0], out, methods="base", temperature=0)
    arguments = ("--protocol", "tqa-v1/chat", "--tokenizer", tmp_path / "tokenizer", "--limit", 3)
    assert run(*command, *arguments) == 0
    results = read_run(out)
    assert results["protocol"].startswith("tqa-v1/chat+custom-primer-")
    assert results["generation"]["stop"] == []
    assert results["generation"]["format"] == "chat"
    assert results["n_questions"] == 3


def test_no_question_is_answered_with_directions_that_saw_it(answered, tiny_imae, tmp_path):
    lm, random, folds = tiny_imae.load(), np.random.default_rng(0), tmp_path / "folds"
    config, command = lm.config, answered[0]
    folds.mkdir()
    for fold in (0, 1):
        theta = random.normal(size=(config.num_layers, config.num_heads, config.head_dim))
        theta /= np.linalg.norm(theta, axis=-1, keepdims=True)
        ones = np.ones(theta.shape[:2], np.float32)
        rank = np.arange(ones.size, dtype=np.int32).reshape(ones.shape)
        found = Directions(theta.astype(np.float32), ones, rank, ones)
        write_directions(folds / f"fold{fold}.safetensors", found)
    questions = read_questions(command[command.index("--data") + 1])
    assigned = {question.text: question.index % 2 for question in questions}
    (folds / "folds.json").write_text(json.dumps({"questions": assigned}))
    method, out = "iti:directions={},alpha=20,heads=12", tmp_path / "out"
    assert run(*with_out(command, out, methods=method.format(folds), temperature=0)) == 0
    (settings,) = (row["settings"] for row in read_run(out)["methods"].values())
    assert settings["folds"] == 2
    lines = read_records(out)
    assert [line["index"] for line in lines] == list(range(6))
    for fold in (0, 1):
        prompts = [f"{PRIMER}Q: {question.text}\nA:" for question in questions[fold::2]]
        with_file = method.format(folds / f"fold{fold}.safetensors")
        texts = [text.strip() for text in lm.generate(prompts, with_file, max_new_tokens=6)]
        assert [line["answer"] for line in lines[fold::2]] == texts
        other = method.format(folds / f"fold{1 - fold}.safetensors")
        assert [text.strip() for text in lm.generate(prompts, other, max_new_tokens=6)] != texts


def test_reports_and_comparisons_take_answers(answered, tmp_path, capfd):
    out = answered[1]
    assert report([str(out), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "## Answers to TruthfulQA's questions" in page
    line = read_records(out)[0]
    assert f"<dt>1. base</dt><dd><code>{line['answer']}</code></dd>" in page
    assert "1-differences.png" in page
    pair = ["--pair", "base", "in-model-contrast", "--out", str(tmp_path / "comparison")]
    assert compare([str(out), str(out), *pair]) == 0
    written = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert "refused" in written["metrics"]
    results = read_run(out)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    kept = {key: value for key, value in results.items() if key != "generation"}
    (damaged / "results.json").write_text(json.dumps(kept))
    (damaged / "scores.jsonl").write_text((out / "scores.jsonl").read_text())
    assert report([str(damaged), "--out", str(tmp_path / "other")]) == 2
    assert "is of another form than expected (it has no generation)" in capfd.readouterr().err
