"""Sums on the real model that the README claims: of the published scripts, and of their arithmetic.

The numbers are in `goldens/`, without texts. TruthfulQA's questions are looked up in a copy, by hash; the
shipped questions are at hand in every clone.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from imae_jax.decode import encode, score
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.protocols import load_primer
from imae_jax.evaluate.benchmarks.questions import load_data

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parent / "goldens"
TRUTHFULQA, DEMO = (
    json.loads((GOLDENS / name).read_text(encoding="utf-8"))
    for name in ("truthfulqa_sums.json", "demo_sums.json")
)
METHODS = TRUTHFULQA["methods"]
ARITHMETIC = DEMO["methods"]


@pytest.fixture(scope="module")
def truthfulqa():
    """The benchmark from $TRUTHFULQA_CSV, ../shared beside the checkout, or the hub's cache."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "TruthfulQA.csv"
    for source in (os.environ.get("TRUTHFULQA_CSV"), beside if beside.is_file() else None, "hub"):
        try:
            if source is not None:
                return load_data(str(source)).questions
        except UserError:
            if source != "hub":
                raise
    pytest.skip("no copy of TruthfulQA is at hand: set TRUTHFULQA_CSV")


def assert_sums_are_equal(lm, content, questions, primer, name):
    """Base to 2e-5 relative, all others to 1e-4; of SLED, with its 31 projections a token, four answers."""
    chosen = content["questions"][:1] if name.startswith("sled") else content["questions"]
    answers = slice(4 if name.startswith("sled") else None)
    groups = []
    for golden in chosen:
        question = questions[golden["index"]]
        texts = [*question.true, *question.false]
        digest = hashlib.sha256("\n".join([question.text, *texts]).encode()).hexdigest()
        assert digest == golden["sha256"], "another version of the questions"
        prompt = f"{primer.text}Q: {question.text}\nA:"
        groups.append(encode(lm.tokenizer, [prompt] * len(texts), [f" {text}" for text in texts])[answers])
    models, method = lm.prepare(ARITHMETIC[name], generating=False)
    # Rows of 64 waste less on padding than the default's for so few answers.
    results = dict(score(models, lm.config, groups, method, row_length=64))
    for place, golden in enumerate(chosen):
        sums = [np.sum(scores, dtype=np.float64) for scores in results[place].scores]
        expected = golden["sums"][name][answers]
        np.testing.assert_allclose(sums, expected, rtol=2e-5 if name == "baseline" else 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_sums_equal_the_published_scripts(smollm2, truthfulqa, name):
    """The primer is in the package lm-eval, and pinned by its hash."""
    pytest.importorskip("lm_eval")
    assert_sums_are_equal(smollm2, TRUTHFULQA, truthfulqa, load_primer(None), name)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_sums_of_shipped_questions_equal_the_published_arithmetic(smollm2, name):
    primer = load_primer(None, demo=True)
    assert_sums_are_equal(smollm2, DEMO, load_data("demo").questions, primer, name)
