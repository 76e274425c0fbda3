"""Benchmarks on published data, with tiny models: what is asked, measured, resumed and refused."""

import csv
import gzip
import json
import math
import shutil
import sys

import numpy as np
import pytest
from conftest import TINY, error_of, output_of, user_error, word_tokenizer

from imae_jax.convert.hf_tokenizer import write_tokenizer
from imae_jax.errors import UserError
from imae_jax.evaluate.__main__ import main as evaluate
from imae_jax.evaluate.benchmarks import benchmarks, gsm8k, ifeval, nq_context, short_answers, strategyqa
from imae_jax.evaluate.benchmarks.multiple_choice import choose
from imae_jax.evaluate.compare import main as compare
from imae_jax.evaluate.report import main as report
from imae_jax.evaluate.runner.directory import read_records, read_run


def words(*numbers):
    return " ".join(f"t{number}" for number in numbers)


def factor_row(i, prefix="t3 t4 "):
    completions = [words(5 + i, 6), words(7 + i, 8, 9), words(10 + i), words(11 + i, 12)]
    names = ("completion", "contradiction_0", "contradiction_1", "contradiction_2")
    prefixes = {"full_prefix": f"t20 {prefix}", "turncated_prefixes": prefix}
    return prefixes | dict(zip(names, completions, strict=True))


def passage(text, key="text"):
    return [{key: text}]


# Of every benchmark: name of its file, rows, and a field that they need.
ROWS = {
    "factor": ("news.csv", [factor_row(i) for i in range(4)], "contradiction_1"),
    "memotrap": (
        "proverbs.csv",
        [
            {"prompt": f"t3 t{4 + i}", "classes": f"[' t5', ' t6 t{7 + i}']", "answer_index": i % 2}
            for i in range(4)
        ],
        "prompt",
    ),
    "choice": (
        "triviaqa.csv",
        [{"question": words(3, i), "answer": f"t{4 + i}; t9", "false_answer": "t8 t7"} for i in range(3, 6)],
        "false_answer",
    ),
    "nq_open": (
        "nq.jsonl",
        [{"question": words(3, 10 + i), "answer": ["t5", "t6"]} for i in range(8)],
        "question",
    ),
    "nq_context": (
        "oracle.jsonl.gz",
        [{"question": words(3, i), "answers": ["t5"], "ctxs": passage("t4 t5 t6")} for i in range(4, 8)],
        "question",
    ),
    "strategyqa": (
        "strategyqa.json",
        [{"question": words(3, 10 + i), "answer": i % 2 == 0, "facts": ["t5."]} for i in range(9)],
        "question",
    ),
    "gsm8k": (
        "gsm8k.jsonl",
        [{"question": words(3, 10 + i), "answer": f"t4 #### {i},000"} for i in range(8)],
        "answer",
    ),
}
WRITTEN = ("nq_open", "nq_context", "strategyqa", "gsm8k")
CHANCE = {"factor": {"mean": 25.0}, "memotrap": {"sum": 50.0, "per_character": 50.0}}
CHANCE |= {"choice": {"sum": 50.0, "mean": 50.0}, "strategyqa": {"right": 50.0}}


def write(path, rows):
    """Rows in the form that a file's name says."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def asked(tiny_imae, tmp_path):
    """The arguments of a benchmark's command on its rows, or on those that are given."""

    def arguments(name, *more, rows=None, any_data=True):
        file, default, _ = ROWS[name]
        data = write(tmp_path / file, default if rows is None else rows)
        command = [name, "--model", tiny_imae.directory, "--data", data, "--out", tmp_path / "out", "--quiet"]
        command += ["--any-data"] if any_data else []
        command += ["--max-new-tokens", "4"] if name in WRITTEN else []
        return [*map(str, command), *more]

    return arguments


@pytest.mark.parametrize("name", ROWS)
def test_benchmarks_run_resume_compare_and_report(name, asked, tmp_path, capfd):
    out, methods = tmp_path / "out", ["--methods", "base,expert"]
    shown = output_of(capfd, evaluate, *asked(name, *methods))
    results, records = read_run(out, benchmarks()[name].name), read_records(out)
    assert f"+data-{results['data']['sha256'][:8]}" in results["protocol"] and results["protocol"] in shown
    assert results["chance"] == CHANCE.get(name, {})
    assert ("│ chance" in shown) == (name in CHANCE)
    for metric in results["metrics"]:
        values = [record[metric] for record in records if record["method"] == "expert"]
        assert results["methods"]["expert"][metric] == pytest.approx(100 * np.mean(values))

    lines = (out / "scores.jsonl").read_text().splitlines()
    whole = shutil.copytree(out, tmp_path / "whole")
    (out / "scores.jsonl").write_text("\n".join([*lines[:3], lines[3][:20]]))
    (out / "results.json").unlink()
    assert evaluate(asked(name, *methods, "--resume")) == 0
    assert read_run(out)["resumed_lines"] == 3
    if name not in WRITTEN:
        before = {(record["method"], record["index"]): record["scores"] for record in records}
        for record in read_records(out):
            assert record["scores"] == pytest.approx(before[record["method"], record["index"]], abs=1e-4)
    else:
        assert [record["answer"] for record in read_records(out)] == [r["answer"] for r in records]
    assert compare([str(whole), str(out), "--out", str(tmp_path / "comparison")]) == 0
    assert report([str(whole), str(tmp_path / "comparison"), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.md").read_text()
    assert f"## {benchmarks()[name].title}" in page and ("| chance |" in page) == (name in CHANCE)


@pytest.mark.parametrize("name", ROWS)
def test_other_data_are_refused_by_hash_and_rows(name, asked, capfd):
    error = error_of(capfd, evaluate, *asked(name, any_data=False))
    protocol = benchmarks()[name].protocols[0]
    assert f"and {len(ROWS[name][1])} rows, {protocol.name} is of {protocol.sha256[:8]} with" in error
    assert "has SHA-256 " in error and "--any-data" in error


@pytest.mark.parametrize("name", ROWS)
def test_rows_lack_no_field(name, asked, tmp_path, capfd):
    _, [*rows, last], field = ROWS[name]
    rows += [last | {field: " "}]
    assert f"has an empty '{field}'" in error_of(capfd, evaluate, *asked(name, rows=rows))
    without = [{key: value for key, value in row.items() if key != field} for row in ROWS[name][1]]
    error = error_of(capfd, evaluate, *asked(name, rows=without))
    assert f"has no '{field}' that is a text" in error and "give the data file of https://" in error
    assert not (tmp_path / "out").exists()


def test_lists_hold_texts_and_texts_whole_characters(asked, capfd):
    for answer, part in (([3], "what is no text"), ([""], "an empty"), (["\ud800"], "half of a character")):
        rows = [ROWS["nq_open"][1][0] | {"answer": answer}]
        error = error_of(capfd, evaluate, *asked("nq_open", rows=rows))
        assert f"nq.jsonl line 1 has {part}" in error.replace(" in 'answer'", "")


def test_the_protocol_of_a_file_is_named(shared, tmp_path, capfd):
    data = shared / "data" / "factor" / "expert.csv"
    command = ["factor", "--model", "none", "--data", data, "--out", tmp_path / "out"]
    error = error_of(capfd, evaluate, *command)
    assert f"{data} is not the file of factor-v1/news-mean: pass --protocol factor-v1/expert-mean" in error


# Choices


def test_factor_scores_both_published_forms(asked, tiny_imae, tmp_path):
    lm, rows = tiny_imae.load(), [factor_row(0), factor_row(1, "t3 t4\n")]
    names = ("completion", "contradiction_0", "contradiction_1", "contradiction_2")
    for form, prefix in (("sum", "full_prefix"), ("mean", "turncated_prefixes")):
        out = tmp_path / form
        command = asked("factor", "--protocol", f"factor-v1/news-{form}", "--overwrite", rows=rows)
        command[command.index("--out") + 1] = str(out)
        assert evaluate(command) == 0
        for row, record in zip(rows, read_records(out), strict=True):
            answers = [" " * (form == "sum" or row[prefix].endswith(" ")) + row[name] for name in names]
            stripped = row[prefix] if form == "sum" else row[prefix].removesuffix(" ")
            scores = lm.score(stripped, answers, format="raw")
            assert record["scores"] == pytest.approx(scores, abs=1e-4)
            assert record["tokens"] == [len(answer.split()) for answer in answers]
            per_token = np.divide(scores, record["tokens"])
            assert record["mean"] == float(np.argmax(per_token) == 0)


def test_of_equal_scores_the_first_counts():
    assert choose([-2.0, -2.0], [1, 2], [4, 2], 0) == {"sum": 1.0, "mean": 0.0, "per_character": 1.0}
    assert choose([-2.0, -2.0], [1, 2], [4, 2], 1) == {"sum": 0.0, "mean": 1.0, "per_character": 0.0}
    assert all(map(math.isnan, choose([-2.0, -math.inf], [1, 1], [1, 1], 0).values()))


def test_false_answers_that_are_accepted_are_left_out(asked, tmp_path, capfd):
    rows = [*ROWS["choice"][1], {"question": "t9", "answer": "t4; The T5.; ", "false_answer": "t5"}]
    assert evaluate(asked("choice", rows=rows)) == 0
    assert [record["question"] for record in read_records(tmp_path / "out")] == [
        row["question"] for row in ROWS["choice"][1]
    ]
    error = error_of(capfd, evaluate, *asked("choice", "--overwrite", rows=[rows[-1] | {"answer": ";"}]))
    assert "line 2 has an empty 'answer'" in error
    published = asked("choice", "--protocol", "choice-v1/triviaqa-published", "--overwrite", rows=rows)
    assert evaluate(published) == 0
    assert read_run(tmp_path / "out")["n_questions"] == 4


def test_memotrap_takes_a_folder_and_tells_tasks_apart(asked, tmp_path, capfd):
    command = asked("memotrap")
    folder = tmp_path / "memotrap"
    folder.mkdir()
    for name in ("b", "a"):
        write(folder / f"{name}.csv", ROWS["memotrap"][1])
    command[command.index("--data") + 1] = str(folder)
    assert "By task" in output_of(capfd, evaluate, *command, "--limit", "4")
    assert [(record["index"], record["category"]) for record in read_records(tmp_path / "out")] == [
        (0, "a"),
        (4, "b"),
        (1, "a"),
        (5, "b"),
    ]
    assert read_run(tmp_path / "out")["methods"]["base"]["by_category"].keys() == {"a", "b"}
    for change in (
        {"classes": "t3"},
        {"classes": "[' ']"},
        {"classes": "[' t3']"},
        {"answer_index": 2},
        {"answer_index": "x"},
    ):
        rows = [ROWS["memotrap"][1][0] | change]
        assert "line 2" in error_of(capfd, evaluate, *asked("memotrap", "--overwrite", rows=rows))


def test_a_text_over_the_context_is_named_before_anything_runs(asked, tmp_path, capfd):
    rows = [*ROWS["factor"][1], factor_row(0, words(*[3] * 520) + " ")]
    assert "question 4 has a sequence of 523 tokens" in error_of(capfd, evaluate, *asked("factor", rows=rows))
    long = [{"question": words(*[3] * 520), "answer": ["t4"]}, *ROWS["nq_open"][1]]
    error = error_of(capfd, evaluate, *asked("nq_open", rows=long))
    assert "the longest prompt (question 0) has 5" in error and "over the model's context of 512" in error
    assert not (tmp_path / "out").exists()


def test_chance_of_truthfulqa_is_of_its_metrics(scored):
    chance = read_run(scored[1])["chance"]  # of two true and two false answers
    assert chance == pytest.approx({"mc1": 100 / 3, "mc2": 50.0, "mc3": 100 / 3})


# Written answers


def test_prompts_have_the_last_rows_as_demonstrations(asked, tiny_imae, tmp_path):
    lm, rows = tiny_imae.load(), ROWS["nq_open"][1]
    assert evaluate(asked("nq_open")) == 0
    shots = "".join(f"Q: {row['question']}?\nA: t5\n" for row in rows[3:])
    prompts = [f"Answer these questions:\n\n{shots}Q: {row['question']}?\nA:" for row in rows[:3]]
    texts = lm.generate(prompts, max_new_tokens=4, stop=["\n", ".", ","])
    records = read_records(tmp_path / "out")
    assert [record["answer"] for record in records] == texts
    for record, text in zip(records, texts, strict=True):
        found = [text.split().count(word) for word in ("t5", "t6")]
        assert record["f1"] == pytest.approx(2 * any(found) / (1 + len(text.split())))


def test_what_is_no_longer_asked_is_too_few(asked, capfd):
    rows = ROWS["nq_open"][1][:5]
    error = error_of(capfd, evaluate, *asked("nq_open", rows=rows))
    assert "takes 5 of 5 rows as demonstrations" in error
    assert evaluate(asked("nq_open", "--protocol", "nq-open-v1/zero-shot", rows=rows)) == 0


def test_short_answers():
    assert short_answers.exact_match("The Beatles!", ["beatles"]) == 1
    assert short_answers.exact_match("Beatles, the", ["beatles"]) == 0
    assert short_answers.f1("a red, red car", ["The red car.", "blue"]) == pytest.approx(0.8)
    assert short_answers.f1("", ["the"]) == short_answers.f1("x", ["y"]) == 0
    assert short_answers.contains("It was John  Smith.", ["the john smith"])
    assert not short_answers.contains("Johnson", ["John"]) and not short_answers.contains("x", ["the"])


def test_a_source_is_what_an_answer_is_more_like():
    assert nq_context.source_of("In 1998, I think", ["1998"], ["August 8, 2014"]) == "context"
    assert nq_context.source_of("8 August 2014", ["1998"], ["August 8, 2014"]) == "memory"
    assert nq_context.source_of("1998 or 2014", ["1998"], ["2014"]) == "neither"
    assert nq_context.source_of("I do not know", ["1998"], ["2014"]) == "neither"


def test_answers_are_swapped_for_others_of_their_type():
    def row(answers, text):
        return "place", {"answers": answers, "passage": text}

    rows = [
        row(["Ann Lee", "Lee"], "A song by Ann Lee; Lee sang it in 1990."),
        row(["Bob Ray"], "Bob Ray wrote it."),
        row(["1990"], "It was in 1990, and in 1991."),
        row(["May 2001"], "It was in May 2001."),
        row(["very often"], "They say so very often."),
        row(["Cy Ode"], "Written by C. Ode."),
    ]
    found = nq_context.swapped(rows, seed=0)
    assert found == nq_context.swapped(rows, seed=0)
    assert found.keys() == {0, 1, 2, 3}  # no type; not in the passage
    assert found[2] == ("It was in May 2001, and in 1991.", "May 2001")
    text, other = found[0]
    assert other in ("Bob Ray", "Cy Ode") and text == f"A song by {other}; {other} sang it in 1990."
    draws = {nq_context.swapped(rows, seed=seed)[0][1] for seed in range(8)}
    assert draws == {"Bob Ray", "Cy Ode"}


def test_another_seed_of_swaps_is_another_protocol(asked, tmp_path):
    rows = [{"question": f"t3 t{i}", "answers": [f"{i}"], "ctxs": passage(f"t4 {i} t6")} for i in range(4, 8)]
    command = asked("nq_context", "--protocol", "nq-context-v1/swap", "--swap-seed", "3", rows=rows)
    assert evaluate(command) == 0
    assert read_run(tmp_path / "out")["protocol"].endswith("+swap-seed-3")
    for record, row in zip(read_records(tmp_path / "out"), rows, strict=True):
        assert record["expected"] in "4567" and record["expected"] not in row["answers"]


def test_conflicts_are_asked_with_their_passage(asked, tiny_imae, tmp_path, capfd):
    rows = [
        {
            "question": "t3",
            "real_short_answer": "t4",
            "fake_short_answer": "t5",
            "fake_passages": passage("t6 t5", "passage"),
        }
    ]
    command = asked("nq_context", "--protocol", "nq-context-v1/conflict", rows=rows)
    assert evaluate(command) == 0
    instruction = "Using only the references listed above, answer the following question: "
    prompt = f"t6 t5\n{instruction}\nQuestion: t3\nAnswer:"
    (record,) = read_records(tmp_path / "out")
    assert record["answer"] == tiny_imae.load().generate([prompt], max_new_tokens=4)[0]
    assert record["context"] + record["memory"] + record["neither"] == 1
    rows[0]["fake_passages"] = []
    command = asked("nq_context", "--protocol", "nq-context-v1/conflict", "--overwrite", rows=rows)
    assert "has no 'passage' that is a text" in error_of(capfd, evaluate, *command)


def test_chains_of_thought_are_read():
    assert gsm8k.extract("so $1,234.50.\n#### 1,234\nand 7") == {"strict": "1234", "flexible": "7"}
    assert gsm8k.extract("It costs $12.") == {"strict": "", "flexible": "12"}
    assert gsm8k.extract("nothing") == {"strict": "", "flexible": ""}
    assert strategyqa.extract("The answer is not easy. So the answer is **No**.") is False
    assert strategyqa.extract("so the answer is yes. The answer is no.") is True
    assert strategyqa.extract("It is yes, nobody knows.") is None


def test_chat_protocols_need_a_template_and_gsm8k_its_numbers(asked, capfd):
    error = error_of(capfd, evaluate, *asked("gsm8k", "--protocol", "gsm8k-v1/chat"))
    assert "no chat template" in error and "another --protocol" in error
    rows = [{"question": "t3", "answer": "t4"}]
    error = error_of(capfd, evaluate, *asked("gsm8k", rows=rows))
    assert "line 1: the answer has no number behind ####" in error


# IFEval


def test_ifeval_names_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval", None)
    with user_error("IFEval's checker", "pip install 'imae_jax[ifeval]'"):
        ifeval.load_checker()


@pytest.fixture
def checker():
    """Skips where the harness's checker, which needs packages and data of its own, cannot be loaded."""
    try:
        return ifeval.load_checker()
    except UserError as error:
        pytest.skip(str(error))


def test_ifeval_checks_instructions_and_names_bad_rows(checker, tmp_path, capfd, checkpoint):
    model = shutil.copytree(checkpoint.directory, tmp_path / "model")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    write_tokenizer(word_tokenizer(TINY.vocab_size, template), model)
    row = {"key": 1, "prompt": "t3", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    words = {"relation": "at least", "num_words": 500}
    both = {"instruction_id_list": [*row["instruction_id_list"], "length_constraints:number_words"]}
    out, data = tmp_path / "out", tmp_path / "ifeval.jsonl"
    command = ["ifeval", "--model", model, "--data", data, "--out", out, "--any-data"]
    command += ["--max-new-tokens", "4", "--quiet"]
    for change in ({"kwargs": []}, {"kwargs": ["x"]}, {"instruction_id_list": ["no:such"]}):
        write(data, [row, row | change])
        assert "line 2" in error_of(capfd, evaluate, *command)
    write(data, [row, row | both | {"kwargs": [{}, words]}])
    output_of(capfd, evaluate, *command)
    base = read_run(out)["methods"]["base"]
    assert (base["prompt_strict"], base["prompt_loose"]) == (50.0, 50.0)
    assert base["instructions"]["strict"]["value"] == pytest.approx(200 / 3)
    assert [record["strict"] for record in read_records(out)] == [[True], [True, False]]


def test_shares_of_instructions_weigh_each_the_same():
    rows = [{"strict": [True, True, False]}, {"strict": [True]}, {"strict": [False, False]}]
    share = ifeval.share_of_instructions(rows, "strict", seed=0)
    assert share["value"] == pytest.approx(50.0) and share["interval"][0] < 50 < share["interval"][1]
