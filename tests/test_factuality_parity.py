"""Benchmarks on published data, held against the harness's own code and the published scripts' scores."""

import ast
import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers.documents import ROOT, blocks

from imae_jax.evaluate.__main__ import main as evaluate
from imae_jax.evaluate.benchmarks import gsm8k, short_answers
from imae_jax.evaluate.benchmarks.factor import BENCHMARK as FACTOR
from imae_jax.evaluate.benchmarks.factor import COMPLETIONS
from imae_jax.evaluate.runner.directory import read_records, read_run
from imae_jax.files import read_csv, read_rows

lm_eval = pytest.importorskip("lm_eval")

LIMIT = 50
SMALL = "smollm2-135m"
TASKS = Path(lm_eval.__file__).parent / "tasks"


def run(name, data, out, *more):
    command = [name, "--model", f"{SMALL}-instruct", "--data", data, "--out", out, "--quiet", *more]
    assert evaluate([*map(str, command)]) == 0
    return read_run(out), read_records(out)


def harness(lm, name, include, documents, directory, **more):
    """The samples and results of a task of the harness on local documents, with this library's model."""
    from lm_eval.tasks import TaskManager

    from imae_jax.evaluate.lm_eval import IMAEJaxLM

    files = {}
    for split, rows in documents.items():
        files[split] = str(directory / f"{name}-{split}.json")
        Path(files[split]).write_text(json.dumps(rows))
    source = {
        "include": str(TASKS / include),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(directory / "cache")},
        **more,
    }
    (directory / f"{name}.yaml").write_text(json.dumps(source, indent=1))
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=IMAEJaxLM(lm, quiet=True),
        tasks=[name],
        task_manager=manager,
        bootstrap_iters=0,
        torch_random_seed=None,
    )
    return results["results"][name], results["samples"][name]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mean", "sum"])
@pytest.mark.parametrize("file", ["news", "expert"])
def test_factor_scores_what_the_published_scripts_do(file, form, smollm2, shared, tmp_path):
    goldens = json.loads((shared / "goldens" / "factor_scores.json").read_text())["rows"]
    goldens = {row["row"]: row for row in goldens if row["file"] == file}
    rows = [row for _, row in read_csv(shared / "data" / "factor" / f"{file}.csv", "data file")]
    columns = ("full_prefix", "turncated_prefixes", *COMPLETIONS)
    with (tmp_path / "rows.csv").open("w", newline="") as cut:
        writer = csv.DictWriter(cut, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[number] for number in goldens)
    protocol = f"factor-v1/{file}-{form}"
    _, records = run("factor", tmp_path / "rows.csv", tmp_path / "out", "--any-data", "--protocol", protocol)
    for record, golden in zip(records, goldens.values(), strict=True):
        if form == "sum":
            assert record["scores"] == pytest.approx(golden["sum_logprob"], abs=1e-3)
            assert record["sum"] == (max(golden["sum_logprob"]) == golden["sum_logprob"][0])
        else:
            means = -np.divide(record["scores"], record["tokens"])
            assert means == pytest.approx(golden["mean_nll"], abs=1e-3)
            assert record["mean"] == (min(golden["mean_nll"]) == golden["mean_nll"][0])


def test_the_published_files_are_the_pinned_ones(shared):
    from argparse import Namespace

    for protocol in FACTOR.protocols:
        file = "news" if "news" in protocol.name else "expert"
        data = shared / "data" / "factor" / f"{file}.csv"
        inputs = FACTOR.load(Namespace(data=data, protocol=protocol.name, any_data=False), {})
        assert inputs.label == protocol.name and len(inputs.items) == protocol.rows


@pytest.mark.slow
def test_memotrap_scores_as_the_harness(smollm2, shared, tmp_path):
    data = shared / "data" / "memotrap" / "1-proverb-ending.csv"
    results, records = run("memotrap", data, tmp_path / "out", "--any-data", "--limit", str(LIMIT))
    documents = [
        {**row, "classes": ast.literal_eval(row["classes"]), "answer_index": int(row["answer_index"])}
        for _, row in read_csv(data, "data file")[:LIMIT]
    ]
    include = "inverse_scaling/_inverse_scaling_mc_yaml"
    theirs, samples = harness(smollm2, "memo", include, {"train": documents}, tmp_path)
    assert results["methods"]["base"]["sum"] == pytest.approx(100 * theirs["acc,none"])
    assert results["methods"]["base"]["per_character"] == pytest.approx(100 * theirs["acc_norm,none"])
    for record, sample in zip(records, samples, strict=True):
        assert record["scores"] == pytest.approx([float(x[0][0]) for x in sample["resps"]], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 5])
def test_nq_open_asks_and_measures_as_the_harness(shots, smollm2, shared, tmp_path):
    data = shared / "data" / "nq" / "NQ-open.dev.jsonl"
    protocol = f"nq-open-v1/{'five' if shots else 'zero'}-shot"
    results, records = run("nq_open", data, tmp_path / "out", "--limit", "8", "--protocol", protocol)
    documents = [row for _, row in read_rows(data, "data file")]
    splits = {"validation": documents[:8], "train": documents[-5:]}
    options = {"num_fewshot": shots, "fewshot_config": {"sampler": "first_n", "split": "train"}}
    theirs, samples = harness(smollm2, "nq", "nq_open/nq_open.yaml", splits, tmp_path, **options)
    for record, sample in zip(records, samples, strict=True):
        assert record["answer"] == sample["resps"][0][0]
        assert record["exact_match"] == sample["exact_match"]
    matched = theirs["exact_match,remove_whitespace"]
    assert results["methods"]["base"]["exact_match"] == pytest.approx(100 * matched)


ANSWERS = (
    "The Beatles",
    " an apple a day.",
    "A.B.",
    "the",
    "",
    "Über, the—end",
    "theatre",
    "An An other",
    "a the x",
)


def test_exact_match_is_that_of_the_harness(shared):
    from lm_eval.api.metrics import exact_match_fn

    settings = {"ignore_case": True, "ignore_punctuation": True}
    settings["regexes_to_ignore"] = ["\\b(?:The |the |An |A |The |a |an )"]
    rows = read_rows(shared / "data" / "nq" / "NQ-open.dev.jsonl", "data file")[:LIMIT]
    accepted = [*ANSWERS, *(answer for _, row in rows for answer in row["answer"])]
    for answer in (*ANSWERS, "beatles", "apple a day", "ab", "14 december 1972 utc"):
        scores = [exact_match_fn(predictions=[answer], references=[each], **settings) for each in accepted]
        assert [short_answers.exact_match(answer, [each]) for each in accepted] == [
            score["exact_match"] for score in scores
        ]


TEXTS = (
    "2 + 2 = <<2+2=4>>4\n#### 4",
    "#### 1,000.\n#### 2",
    "####5",
    "#### -3.50 dollars",
    "It is $1,234.50, not 5",
    "no number",
    "",
    "3",
    "about 12.,",
    "-7 or - 8",
    "$, and ..",
    "#### ,",
)


def test_gsm8k_reads_numbers_as_the_harness(shared):
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.filters.extraction import RegexFilter

    filters = {
        "strict": RegexFilter("#### (\\-?[0-9\\.\\,]+)"),
        "flexible": RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    }
    settings = {"ignore_case": True, "ignore_punctuation": False}
    settings["regexes_to_ignore"] = [",", "\\$", "(?s).*#### ", "\\.$"]
    answers = [row["answer"] for _, row in read_rows(shared / "data" / "gsm8k_test.jsonl", "data file")]
    for text in (*TEXTS, *answers[:LIMIT]):
        for name, each in filters.items():
            (found,) = each.apply([[text]], [{}])
            for answer in answers[:LIMIT]:
                score = exact_match_fn(predictions=found, references=[answer], **settings)["exact_match"]
                expected = gsm8k.extract(answer)["strict"]
                assert float(gsm8k.extract(text)[name] == expected) == score, (text, answer)


@pytest.mark.docs
def test_commands_of_the_documentation_read_the_published_files(smollm2, shared, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = text.partition("## Benchmarks on published data")[2].partition("\n## ")[0]
    files = {file.name: str(file) for file in (shared / "data").rglob("*.*")}
    monkeypatch.chdir(tmp_path)
    lines = "".join(blocks(section, "sh")).replace("\\\n", " ").splitlines()
    for line in lines:
        line = line.replace("out/imae/imae", f"imae-{SMALL}")
        words = [files.get(word, word) for word in shlex.split(line)]
        assert words[:3] == ["python", "-m", "imae_jax.evaluate"]
        assert evaluate([*words[3:], "--limit", "1", "--quiet"]) == 0
    assert len(lines) == 3
