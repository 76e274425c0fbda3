"""ITI: probes, directions, two folds, and the model with its biases."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import hf_logits, logits, random_tokens, user_error, write_questions

from imae_jax.activations import capture
from imae_jax.convert import load_model
from imae_jax.convert.__main__ import main as convert
from imae_jax.convert.iti import Directions, read_directions, write_directions
from imae_jax.evaluate import iti, probes
from imae_jax.evaluate.benchmarks.questions import read_questions
from imae_jax.evaluate.probes import find_directions, fit_probes
from imae_jax.evaluate.truthfulqa import main as truthfulqa
from imae_jax.llama import Interventions, forward, project

ALPHA, HEADS = 3.0, 5


@pytest.fixture
def directions(checkpoint, tmp_path):
    """Random ones for the tiny model, and their file."""
    config = checkpoint.load().config
    random = np.random.default_rng(0)
    shape = (config.num_layers, config.num_heads)
    theta = random.normal(size=(*shape, config.head_dim)).astype(np.float32)
    found = Directions(
        theta / np.linalg.norm(theta, axis=-1, keepdims=True),
        random.uniform(0.5, 2, shape).astype(np.float32),
        random.permutation(shape[0] * shape[1]).reshape(shape).astype(np.int32),
        random.uniform(0.5, 1, shape).astype(np.float32),
    )
    path = tmp_path / "directions.safetensors"
    write_directions(path, found)
    return found, path


def test_probes_are_at_their_optimum():
    """The gradient of the regression's objective vanishes, and nearby points are worse."""
    random = np.random.default_rng(0)
    x = random.normal(size=(4, 60, 7)).astype(np.float32)
    y = random.random(60) < 0.4
    y |= x[0, :, 0] > 1
    w, b = (np.asarray(part, np.float64) for part in fit_probes(jnp.asarray(x), jnp.asarray(y)))

    def objective(p, w, b):
        margin = np.where(y, 1, -1) * (x[p] @ w + b)
        return 0.5 * w @ w + np.logaddexp(0, -margin).sum()

    # The line search sees no change of an objective of 40 below its rounding, 2e-6: with a curvature of 15
    # that is a gradient of sqrt(2 · 15 · 2e-6).
    for p in range(4):
        error = 1 / (1 + np.exp(-(x[p] @ w[p] + b[p]))) - y
        np.testing.assert_allclose(x[p].T @ error + w[p], 0, atol=8e-3)
        assert error.sum() == pytest.approx(0, abs=8e-3)
        for _ in range(5):
            step = random.normal(0, 0.05, 8)
            assert objective(p, w[p] + step[:7], b[p] + step[7]) > objective(p, w[p], b[p])


def test_heads_are_those_before_o_proj(checkpoint):
    """Against a hook of transformers' model, with rows of several lengths in a batch."""
    torch = pytest.importorskip("torch")
    lm = checkpoint.load()
    texts = [" ".join(f"t{5 + i + j}" for j in range(3 + i)) for i in range(5)]
    found = capture(lm, texts, heads=True).heads
    for row, text in zip(found, texts, strict=True):
        inputs: list = []

        def keep(module, x, inputs=inputs):
            inputs.append(x[0][0, -1])

        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in checkpoint.hf.model.layers
        ]
        with torch.no_grad():
            checkpoint.hf(torch.tensor([lm.tokenizer(text)["input_ids"]]))
        for hook in hooks:
            hook.remove()
        expected = torch.stack(inputs).numpy().reshape(row.shape)
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_directions_find_the_head_that_knows():
    """One head's activations are shifted by the truth; the others are noise."""
    random = np.random.default_rng(1)
    labels, question_of = random.random(200) < 0.5, np.arange(200) // 4
    heads = random.normal(size=(200, 2, 3, 6)).astype(np.float32)
    theta = np.eye(6, dtype=np.float32)[2]
    heads[labels, 1, 0] += 4 * theta
    found = find_directions(heads, labels, question_of)
    assert found.rank[1, 0] == 0
    assert sorted(found.rank.flat) == list(range(6))
    assert found.accuracy[1, 0] > 0.95
    assert found.directions[1, 0] @ theta > 0.98
    np.testing.assert_allclose(np.linalg.norm(found.directions, axis=-1), 1, rtol=1e-5)
    # Half of the rows 4 apart: a standard deviation of 2 on top of the noise's 1.
    assert found.sigma[1, 0] == pytest.approx(5**0.5, rel=0.1)
    shifts = found.shifts(1)
    np.testing.assert_allclose(shifts[1, 0], found.sigma[1, 0] * found.directions[1, 0])
    assert np.count_nonzero(shifts.any(axis=-1)) == 1


@pytest.mark.parametrize("stacked", [False, True])
def test_export_as_biases_equals_the_intervened_model(checkpoint, directions, tmp_path, stacked):
    """In transformers, at every position."""
    found, path = directions
    exported = tmp_path / "exported"
    command = ["export", "--model", str(checkpoint.directory), "--out", str(exported), "--iti", str(path)]
    assert convert([*command, "--iti-alpha", str(ALPHA), "--iti-heads", str(HEADS)]) == 0
    from transformers import AutoModelForCausalLM

    biased = AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager").eval()
    lm = checkpoint.load(stacked=stacked)
    tokens = random_tokens(2, 9)
    stack = jnp.asarray(ALPHA * found.shifts(HEADS))
    weights = dataclasses.replace(lm.model.weights(), shifts=stack if stacked else tuple(stack))
    hidden = forward(
        weights, lm.config, jnp.asarray(tokens), interventions=Interventions(shift=jnp.ones(tokens.shape))
    ).hidden_states
    actual = project(weights, hidden)
    np.testing.assert_allclose(actual, hf_logits(biased, tokens), atol=2e-4)
    assert np.abs(actual - logits(lm.model.weights(), lm.config, tokens)).max() > 0.1
    np.testing.assert_allclose(load_model(str(exported)).model(jnp.asarray(tokens)), actual, atol=2e-4)


def test_no_question_sees_its_own_direction(tiny_imae, tmp_path, monkeypatch, capfd):
    """Two folds through both commands."""
    fitted = []
    find = probes.find_directions

    def recorded(heads, labels, question_of, **kwargs):
        fitted.append(set(question_of.tolist()))
        return find(heads, labels, question_of, **kwargs)

    monkeypatch.setattr(probes, "find_directions", recorded)
    questions = write_questions(tmp_path / "questions.csv", 8)
    out = tmp_path / "iti"
    model = ["--model", str(tiny_imae.directory)]
    assert iti.main([*model, "--data", str(questions), "--out", str(out), "--quiet"]) == 0
    folds = list(json.loads((out / "folds.json").read_text())["questions"].values())
    for fold in (0, 1):
        assert fitted[fold] == {i for i in range(8) if folds_of(questions, out)[i] != fold}
    assert sorted(folds) == [0] * 4 + [1] * 4

    results = tmp_path / "results"
    method = f"iti:directions={out},alpha=5,heads=12"
    command = [*model, "--methods", f"base,{method}", "--limit", "8", "--out", str(results), "--quiet"]
    primer = tmp_path / "primer.txt"
    primer.write_text("Q: t3 t4\nA: t5 .\n\n")
    command += ["--data", str(questions), "--primer", str(primer), "--any-data"]
    assert truthfulqa(command) == 0
    settings = json.loads((results / "results.json").read_text())["methods"][method]["settings"]
    assert settings["folds"] == 2
    assert settings["directions"] == str(out)
    lines = [json.loads(line) for line in (results / "scores.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines if line["method"] == method] == list(range(8))
    assert lines[0]["true"] != lines[8]["true"]

    # Killed before the last of a fold: that question alone is scored again.
    kept = lines[:-1]
    (results / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    before = json.loads((results / "results.json").read_text())
    (results / "results.json").unlink()
    assert truthfulqa([*command, "--resume"]) == 0
    after = json.loads((results / "results.json").read_text())
    assert after["resumed_lines"] == 15
    for name, row in before["methods"].items():
        assert after["methods"][name]["mc2"] == pytest.approx(row["mc2"], abs=1e-3)

    # The same files of directions, each for other questions.
    record = json.loads((out / "folds.json").read_text())
    record["questions"] = {question: 1 - fold for question, fold in record["questions"].items()}
    (out / "folds.json").write_text(json.dumps(record))
    capfd.readouterr()
    assert truthfulqa([*command, "--resume"]) == 2
    assert f"was scored with another methods.{method}." in capfd.readouterr().err


def folds_of(questions, out):
    by_text = json.loads((out / "folds.json").read_text())["questions"]
    return [by_text[question.text] for question in read_questions(questions)]


def test_files_of_other_models_are_refused(directions, tiny, tmp_path):
    _, path = directions
    other = tiny("llama2").load().config
    with user_error("directions", "shape"):
        read_directions(path, other)
    with user_error("cannot be read"):
        read_directions(tmp_path / "nowhere", other)
    path.write_bytes(b"no safetensors")
    with user_error("cannot be read"):
        read_directions(path, other)
