"""Confidence in what methods write and choose, and how well it tells right from wrong."""

import math

import numpy as np
import pytest
from conftest import log_softmax, logits
from scipy.stats import mannwhitneyu

from imae_jax import stats
from imae_jax.continuation import CONFIDENCE
from imae_jax.decode.methods import StreamLogits, parse_method
from imae_jax.evaluate.benchmarks.benchmark import Item, Task
from imae_jax.evaluate.benchmarks.multiple_choice import confidence
from imae_jax.evaluate.reporting import abstention
from imae_jax.evaluate.runner.passes import Texts, prepare

PROMPTS = ["t5 t6 t7", "t8", "t9 t10 t11 t12"]


def test_the_area_under_the_roc_curve():
    rng = np.random.default_rng(0)
    right, wrong = np.round(rng.normal(0.7, 1, 23), 1), np.round(rng.normal(0, 1, 31), 1)
    area = stats.roc_area(right, wrong)
    assert area.value == pytest.approx(mannwhitneyu(right, wrong).statistic / (23 * 31))
    # DeLong's variance, literally: of how often each right answer wins, and each wrong one loses.
    wins = [[(r > w) + 0.5 * (r == w) for w in wrong] for r in right]
    of_right = [sum(row) / 31 for row in wins]
    of_wrong = [sum(column) / 23 for column in zip(*wins, strict=True)]
    error = math.sqrt(np.var(of_right, ddof=1) / 23 + np.var(of_wrong, ddof=1) / 31)
    assert area.interval == pytest.approx((area.value - 1.959964 * error, area.value + 1.959964 * error))
    assert stats.roc_area([2, 3], [0, 1]).value == 1
    assert stats.roc_area([], [0, 1]).value is None
    assert stats.roc_area([1], [0, 2]).interval is None


def test_right_and_wrong_answers_are_told_apart_by_each_measure():
    sure = {"entropy": 0.1, "max_probability": 0.9, "margin": 0.8}
    unsure = {"entropy": 2.0, "max_probability": 0.4, "margin": 0.1}
    undefined = {"right": 0.0} | dict.fromkeys(CONFIDENCE)
    records = [{"right": 1.0, **sure}] * 3 + [{"right": 0.0, **unsure}] * 2 + [undefined]
    areas = abstention.summarize(records, "right")
    assert (areas["right"], areas["wrong"]) == (3, 2), "of those that have a confidence"
    assert [areas[name]["value"] for name in CONFIDENCE] == [100, 100, 100]


def test_how_sure_a_choice_is():
    entropy, largest, margin = confidence([-1.0, -1.0 - math.log(3)])
    assert (largest, margin) == pytest.approx((0.75, 0.5))
    assert entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert confidence([-2000.0, 0.0]) == pytest.approx((0, 1, 1), abs=1e-12)
    assert np.isnan(confidence([math.nan, 0.0])).all()


@pytest.mark.parametrize("method", ["expert", "in-model-contrast:alpha=0.2"])
def test_how_sure_a_written_answer_is(tiny_imae, method):
    lm = tiny_imae.load()
    items = [Item(i, prompt, prompt) for i, prompt in enumerate(PROMPTS)]
    options = {"max_new_tokens": 6, "confidence": "text", "stop": (" t20",)}
    texts = Texts(lm, Task("p", items, {}, (), options=options))
    _, (each,) = prepare(lm, {"m": parse_method(method)}, items, generating=True)
    outputs = dict(texts.run(each, range(len(items))))
    models, resolved = lm.prepare(method, generating=True)
    options = {name: value for name, value in options.items() if name != "confidence"}
    for i, completion in enumerate(lm.complete(PROMPTS, method, **options)):
        (output,) = outputs[i]
        assert (output.text, output.finished) == (completion.text, completion.finished)
        prompt = lm.encode_prompts([PROMPTS[i]], "raw")[0]
        tokens = np.asarray([*prompt, *completion.tokens])
        streams = [
            StreamLogits(logits(models.weights[0], lm.config, tokens[None], strength=stream.strength)[0])
            for stream in resolved.streams
        ]
        p = np.exp(log_softmax(np.asarray(resolved.scores(streams))))[len(prompt) - 1 : -1]
        best = -np.sort(-p, axis=-1)
        expected = {
            "entropy": np.mean(-np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), axis=-1)),
            "max_probability": best[:, 0].mean(),
            "margin": (best[:, 0] - best[:, 1]).mean(),
        }
        assert output.confidence == pytest.approx(expected, abs=2e-5)


def test_the_tokens_of_a_completion_are_those_of_its_text(tiny_imae):
    lm = tiny_imae.load()
    (whole,) = lm.complete(["t5 t6 t7"], "base", max_new_tokens=8)
    assert len(whole.tokens) == 8 or whole.finished
    stop = " " + lm.tokenizer.decode(whole.tokens[3:4])
    (cut,) = lm.complete(["t5 t6 t7"], "base", max_new_tokens=8, stop=(stop,))
    assert cut.finished
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert len(cut.tokens) < len(whole.tokens)
    assert lm.tokenizer.continuation(lm.encode_prompts(["t5 t6 t7"], "raw")[0], cut.tokens) == cut.text
