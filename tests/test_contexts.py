"""Prompts with and without their context: through `LanguageModel`, the commands and a benchmark."""

import gzip
import json

import numpy as np
import pytest
from conftest import error_of, output_of, user_error

from imae_jax.decode import Continuation, encode, score
from imae_jax.evaluate.__main__ import main as evaluate
from imae_jax.evaluate.harm import main as harm
from imae_jax.evaluate.runner.directory import read_records
from imae_jax.generate import main as generate

PROMPTS, WITHOUT = ["t9 t8 t7 t5 t6", "t9 t4"], ["t5 t6", "t4"]


@pytest.fixture
def lm(checkpoint):
    return checkpoint.load()


@pytest.mark.parametrize("method", ["cad", "adacad:floor=0.2"])
def test_a_context_that_is_none_changes_nothing(lm, method):
    """Both rows are the same then, and their difference is 0."""
    options = {"max_new_tokens": 8}
    assert lm.generate(PROMPTS, method, without_context=PROMPTS, **options) == lm.generate(PROMPTS, **options)
    actual = lm.score("t3 t5", ["t6", "t7 t8"], method, without_context="t3 t5")
    np.testing.assert_allclose(actual, lm.score("t3 t5", ["t6", "t7 t8"]), rtol=1e-5)


def test_texts_and_sums_are_those_of_token_ids(lm):
    options = {"max_new_tokens": 6, "format": "plain"}
    both = lm.generate(PROMPTS, "cad", without_context=WITHOUT, **options)
    assert both != lm.generate(PROMPTS, **options)
    for prompt, without, text in zip(PROMPTS, WITHOUT, both, strict=True):
        assert lm.generate([prompt], "cad", without_context=[without], **options) == [text]
        assert "".join(x for (x,) in lm.stream([prompt], "cad", without_context=[without], **options)) == text

    sums = lm.score(PROMPTS[0], ["t7", "t8 t9"], "cad", without_context=WITHOUT[0])
    models, method = lm.prepare("cad", generating=False)
    group = encode(
        lm.tokenizer,
        [f"Q: {PROMPTS[0]}\nA:"] * 2,
        [" t7", " t8 t9"],
        without_context=[f"Q: {WITHOUT[0]}\nA:"] * 2,
    )
    ((_, scored),) = score(models, lm.config, [group], method)
    np.testing.assert_allclose(sums, [x.sum() for x in scored.scores], rtol=1e-6)
    assert not np.allclose(sums, lm.score(PROMPTS[0], ["t7", "t8 t9"]))


def test_two_prompts_are_asked_for_by_name(lm):
    message = ("method coiecd", "without its context", "without_context")
    for call in (
        lambda: lm.generate(PROMPTS, "coiecd"),
        lambda: lm.score("t5", ["t6"], "coiecd"),
        lambda: lm.perplexity(["t5 t6 t7"], "coiecd"),
    ):
        with user_error(*message):
            call()
    with user_error("without_context", "1 texts for 2 prompts"):
        lm.generate(PROMPTS, "cad", without_context=WITHOUT[:1])
    with user_error("without_context is one text"):
        lm.generate(PROMPTS, "cad", without_context="t4")
    with user_error("prompt 1 without its context is empty"):
        lm.generate(PROMPTS, "cad", without_context=["t4", ""], max_new_tokens=2)
    with user_error("prompt 0 without its context has 200 tokens", "context of"):
        lm.generate(["t4"], "cad", without_context=[" ".join(["t4"] * 200)], max_new_tokens=2)
    with user_error("alpha=nan must be finite"):
        lm.generate(PROMPTS, "cad:alpha=nan", without_context=WITHOUT)


def test_an_answer_has_the_same_tokens_behind_both_prompts(smollm2):
    """Two line breaks are one token: the first of an answer is part of a prompt that ends in one."""
    tokenizer = smollm2.tokenizer
    (item,) = encode(tokenizer, ["In Rome.\nA:"], [" Rome"], without_context=["A:"])
    assert item.behind(1).tokens == tuple(tokenizer("A: Rome")["input_ids"])
    assert item.behind(1) == Continuation(item.behind(1).tokens, 2)
    with user_error(r"'\n Rome' has other tokens"):
        encode(tokenizer, ["In Rome.\nA:"], ["\n Rome"], without_context=["A:\n"])


def test_the_command_takes_both(checkpoint, lm, tmp_path, capfd):
    command = ["--model", checkpoint.directory, "--max-new-tokens", 4, "--quiet"]
    both = [x for p, w in zip(PROMPTS, WITHOUT, strict=True) for x in ("--prompt", p, "--without-context", w)]
    printed = output_of(capfd, generate, *command, *both, "--mode", "cad:alpha=2")
    texts = lm.generate(PROMPTS, "cad:alpha=2", without_context=WITHOUT, max_new_tokens=4)
    assert printed == "".join(p + text + "\n" for p, text in zip(PROMPTS, texts, strict=True))
    assert "one for each --prompt" in error_of(capfd, generate, *command, *both[:-2], "--mode", "cad")
    assert "without its context" in error_of(capfd, generate, *command, "--prompt", "t4", "--mode", "cad")

    file, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": p, "without_context": w} for p, w in zip(PROMPTS, WITHOUT, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "t4"}]))
    command += ["--prompts", file, "--out", results, "--mode", "cad:alpha=2"]
    assert 'line 3: no JSON object with "without_context"' in error_of(capfd, generate, *command)
    assert [json.loads(line)["text"] for line in results.read_text().splitlines()] == texts
    rows[1]["without_context"] = "t5"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "another prompt at line 2" in error_of(capfd, generate, *command)


def test_a_benchmark_with_passages(checkpoint, lm, tmp_path, capfd):
    rows = [{"question": f"t3 t{i}", "answers": ["t5"], "ctxs": [{"text": "t4 t5 t6"}]} for i in range(4, 8)]
    data = tmp_path / "oracle.jsonl.gz"
    data.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))
    command = [
        "--model",
        checkpoint.directory,
        "--data",
        data,
        "--any-data",
        "--max-new-tokens",
        4,
        "--quiet",
    ]
    command += ["--methods", "base,cad,adacad", "--controls", "1", "--out", tmp_path / "out"]
    output_of(capfd, evaluate, "nq_context", *command)
    records = [record for record in read_records(tmp_path / "out") if record["method"] == "cad"]
    assert {record["method"] for record in read_records(tmp_path / "out")} >= {
        "base",
        "cad/flip",
        "adacad/flip",
    }
    assert len(records) == 4
    for record, row in zip(records, rows, strict=True):
        question = f"Question: {row['question']}\nAnswer:"
        references = "t4 t5 t6\nUsing only the references listed above, answer the following question: \n"
        (text,) = lm.generate(
            [references + question],
            "cad",
            without_context=[f"Answer the following question: \n{question}"],
            max_new_tokens=4,
        )
        assert record["answer"] == text
        assert record["entropy"] > 0


def test_benchmarks_without_contexts_refuse(checkpoint, tmp_path, capfd):
    command = ["--model", checkpoint.directory, "--methods", "base,cad", "--out", tmp_path / "out", "--quiet"]
    assert "without its context" in error_of(capfd, harm, *command)
    assert not (tmp_path / "out").exists()


# The published arithmetic, in torch

QUESTIONS = [
    ("The bridge was built in 1871 by Ann Lee.", "Who built the bridge?", " Ann Lee"),
    ("In this story the capital of France is Lyon.", "What is the capital of France?", " Lyon"),
    ("Ice cream was first sold in Naples.", "Where was ice cream first sold?", " In Paris, I think."),
    ("The film has four actors: Bo, Cy, Di and Ed.", "Who is in the film?", " Bo, Cy, Di and Ed"),
    ("A spider here has six legs.", "How many legs does a spider have?", " eight"),
]


def published_cad(with_context, without, alpha):
    return ((1 + alpha) * with_context - alpha * without).log_softmax(-1)


def published_adacad(with_context, without):
    from torch.nn.functional import kl_div

    p, q = with_context.softmax(-1), without.softmax(-1)
    mean = ((p + q) / 2).log()
    alpha = (kl_div(mean, p, reduction="batchmean") + kl_div(mean, q, reduction="batchmean")) / 2
    return published_cad(with_context, without, alpha)


def published_coiecd(with_context, without):
    import torch

    with_context, without = with_context.log_softmax(-1), without.log_softmax(-1)
    entropy = -(without * without.exp()).sum(-1, keepdim=True)
    information = (-with_context - entropy).log_softmax(-1)
    low = information.min() + np.log(4)
    by_memory = information >= low
    if (information < low).sum() == 1:
        by_memory = torch.ones_like(by_memory)
    by_context = ~by_memory | (information > information.max() - np.log(4))
    merged = torch.where(by_context, with_context, without) + (with_context - without)
    return merged.log_softmax(-1)


def test_sums_equal_the_published_arithmetic(smollm2, hf_smollm2):
    """One row and token at a time, as the published codes are right; sums near 0 are of logits of size 20."""
    import torch

    def logits(text, answer):
        ids = torch.tensor([[*smollm2.tokenizer(text)["input_ids"], *answer]])
        with torch.no_grad():
            return hf_smollm2(ids).logits[0, -len(answer) - 1 : -1]

    formulas = {
        "cad": lambda a, b: published_cad(a, b, 1.0),
        "cad:alpha=0.5": lambda a, b: published_cad(a, b, 0.5),
        "adacad": published_adacad,
        "coiecd": published_coiecd,
    }
    for passage, question, answer in QUESTIONS:
        asked = f"Question: {question}\nAnswer:"
        tokens = smollm2.tokenizer(answer)["input_ids"]
        both = logits(f"{passage}\n{asked}", tokens), logits(asked, tokens)
        for method, formula in formulas.items():
            (actual,) = smollm2.score(
                f"{passage}\n{asked}", [answer], method, format="raw", without_context=asked
            )
            scores = [
                formula(a[None], b[None])[0, token].item() for a, b, token in zip(*both, tokens, strict=True)
            ]
            np.testing.assert_allclose(actual, sum(scores), rtol=1e-4, atol=5e-5)
