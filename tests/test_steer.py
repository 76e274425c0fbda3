"""Steering: vectors in the residual stream, their files, how they are fitted; inner values of a model."""

import dataclasses
import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    assert_bitwise,
    error_of,
    import_torch,
    jit_forward,
    random_tokens,
    stack,
    user_error,
    write_questions,
)
from helpers.models import random_vectors

from imae_jax import capture
from imae_jax.convert.control_vector import read_vectors, stack_vectors, write_vectors
from imae_jax.decode.methods import Stream
from imae_jax.decode.noise import with_noise
from imae_jax.evaluate import steer
from imae_jax.evaluate.benchmarks.questions import read_questions
from imae_jax.evaluate.harm import main as harm
from imae_jax.evaluate.truthfulqa import main as truthfulqa
from imae_jax.llama import Taps, steered


@pytest.fixture
def vectors(checkpoint):
    return with_vectors(checkpoint.load())


def with_vectors(lm):
    """Random vectors by layer, a model's weights with them, and the model."""
    found = random_vectors(lm.config)
    each = tuple(jnp.asarray(stack_vectors(found, "all", lm.config)))
    return found, dataclasses.replace(lm.model.weights(), vectors=each), lm


def with_stacks(weights):
    return dataclasses.replace(stack(weights), vectors=jnp.stack(weights.vectors))


# The residual stream


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", ["gqa", "gemma3"])
def test_rows_have_strengths_of_their_own(tiny, kind, stacked):
    """Against hooks on transformers' layers, with strengths that differ between rows and tokens."""
    torch = import_torch()
    checkpoint = tiny(kind)
    found, weights, lm = with_vectors(checkpoint.load())
    B, T = 3, 9
    tokens = random_tokens(B, T)
    factor = np.random.default_rng(0).normal(0, 2, (B, T)).astype(np.float32)
    factor[0] = 0
    factor[1, ::2] = 0
    keep_norm = np.array([True, True, False])
    expected: list = []

    def add(vector):
        def hook(module, inputs, output):
            old = output[0] if isinstance(output, tuple) else output
            new = old + torch.tensor(factor)[..., None] * torch.tensor(vector)
            kept = new * old.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True)
            new = torch.where(torch.tensor(keep_norm)[:, None, None], kept, new)
            expected.append(new)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    hooks = [checkpoint.hf.model.layers[n].register_forward_hook(add(found[n])) for n in found]
    try:
        with torch.no_grad():
            expected.append(checkpoint.hf.model(torch.tensor(tokens)).last_hidden_state)
    finally:
        for hook in hooks:
            hook.remove()
    taps = Taps(hidden_layers=tuple(range(1, lm.config.num_layers + 1)))
    weights = with_stacks(weights) if stacked else weights
    inputs = {"taps": taps, "steer": factor, "keep_norm": keep_norm}
    actual = jit_forward(weights, lm.config, jnp.asarray(tokens), **inputs)
    for ours, theirs in zip((*actual.hidden_layers, actual.hidden_states), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    base = jit_forward(weights, lm.config, jnp.asarray(tokens), taps=taps)
    # Another program, whose sums XLA fuses otherwise.
    np.testing.assert_allclose(actual.hidden_states[0], base.hidden_states[0], atol=1e-5)
    assert np.abs(actual.hidden_states[1:] - base.hidden_states[1:]).max() > 0.1


def test_a_stream_that_the_vector_cancels_stays_finite():
    x = jnp.asarray([[[1.0, 2.0], [0.0, 0.0]]])
    out = steered(x, jnp.asarray([-1.0, -2.0]), jnp.asarray([[1.0, 0.0]]), jnp.asarray([True]))
    np.testing.assert_array_equal(out, np.zeros((1, 2, 2)))


def test_half_precision_keeps_norms_that_it_cannot_square():
    """The square of a residual stream's norm overflows float16."""
    x = jnp.full((1, 1, 64), 60.0, jnp.float16)
    out = steered(x, jnp.full(64, 30.0), jnp.ones((1, 1)), jnp.asarray([True]))
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out, x, rtol=2**-10)


def test_noise_is_the_same_in_both_layouts_of_vectors(vectors):
    _, weights, _ = vectors
    layers, stacked = (with_noise(w, [Stream(steer=1.0)], 3).vectors for w in (weights, with_stacks(weights)))
    assert_bitwise(jnp.stack(layers), stacked)
    assert_bitwise(abs(stacked), abs(with_stacks(weights).vectors))


def test_a_strength_of_zero_is_base_mode_and_a_gain_has_a_sign(checkpoint, vectors, tmp_path):
    found, _, lm = vectors
    path = tmp_path / "vectors.gguf"
    write_vectors(path, found, lm.config)
    arguments = "t3 t4", [" t5 t6", " t7"]

    def score(method):
        return lm.score(*arguments, method, format="raw")

    np.testing.assert_allclose(score(f"steer:vectors={path},strength=0"), score("base"), rtol=1e-6)
    up, down = (score(f"steer:vectors={path},strength={m}") for m in (1, -1))
    assert up != down
    reversed_file = tmp_path / "reversed.gguf"
    write_vectors(reversed_file, {n: -v for n, v in found.items()}, lm.config)
    np.testing.assert_allclose(score(f"steer:vectors={reversed_file}"), down, rtol=1e-5)
    one = tmp_path / "one.gguf"
    write_vectors(one, {1: found[1]}, lm.config)
    np.testing.assert_allclose(score(f"steer:vectors={path},layers=1"), score(f"steer:vectors={one}"))
    # The first scored token follows the prompt's last position, the second a position behind the prompt.
    base, prompt = score("base"), score(f"steer:vectors={path},scope=prompt")
    everywhere = score(f"steer:vectors={path},scope=all")
    assert len({up[1], prompt[1], everywhere[1], base[1]}) == 4


# Files


def test_files_are_those_of_the_gguf_package(checkpoint, vectors, tmp_path):
    """Out: read by the reader that repeng and llama.cpp's scripts use. In: float32, bit for bit."""
    found, _, lm = vectors
    path = tmp_path / "vectors.gguf"
    write_vectors(path, {1: found[1]}, lm.config)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == checkpoint.hf.config.model_type
    assert reader.get_field("controlvector.layer_count").contents() == 1
    ((name, data),) = [(tensor.name, tensor.data) for tensor in reader.tensors]
    assert name == "direction.1"
    np.testing.assert_array_equal(data, found[1])
    ((layer, direction),) = read_vectors(path, lm.config).items()
    assert layer == 1
    np.testing.assert_array_equal(direction, found[1])
    stacked = stack_vectors({1: direction}, "all", lm.config)
    np.testing.assert_array_equal(stacked[1], found[1])
    assert not np.delete(stacked, 1, axis=0).any()


def write_file(path, tensors, architecture="controlvector", hint="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_hints_of_one_kind_are_taken(tiny, tmp_path):
    """llama.cpp calls Mistral llama, and Gemma by another name than transformers; files may have no hint."""
    D = tiny("gqa").load().config.hidden_size
    for kind, hints in {"gqa": ("mistral", None), "gemma3": ("gemma3", "gemma3_text")}.items():
        config = tiny(kind).load().config
        for hint in hints:
            write_file(tmp_path / "file.gguf", {"direction.0": np.ones(D, np.float32)}, hint=hint)
            assert list(read_vectors(tmp_path / "file.gguf", config)) == [0]


def test_files_of_other_models_are_refused(tiny, tmp_path):
    config = tiny("gqa").load().config
    D, L = config.hidden_size, config.num_layers
    one = np.ones(D, np.float32)
    for number, (tensors, options, parts) in enumerate(
        [
            ({"direction.1": one}, {"hint": "qwen2"}, ("'qwen2'", "'llama'")),
            ({"direction.1": one}, {"architecture": "llama"}, ("no control vector", "'llama'")),
            ({"direction.1": one[1:]}, {}, ("direction.1", f"F32 of shape [{D - 1}]", f"[{D}]")),
            ({"direction.1": one.astype(np.float16)}, {}, ("direction.1", "F16", "F32")),
            ({"direction.1": one[None]}, {}, ("direction.1", f"shape [1, {D}]")),
            ({"direction.1": one * np.inf}, {}, ("direction.1", "not finite")),
            ({f"direction.{L}": one}, {}, (f"direction.{L}", f"direction.{L - 1}")),
            ({"direction.last": one}, {}, ("direction.last", "direction.0")),
            ({"steer.1": one}, {}, ("steer.1", "direction.0")),
            ({}, {}, ("holds no direction",)),
        ]
    ):
        path = tmp_path / f"{number}.gguf"
        write_file(path, tensors, **options)
        with user_error(str(path), *parts):
            read_vectors(path, config)


# Fitting


def test_inner_values_are_those_of_transformers(checkpoint):
    """At the last token and at all, with rows of several lengths in a batch."""
    torch = import_torch()
    lm = checkpoint.load()
    L = lm.config.num_layers
    texts = [" ".join(f"t{5 + i + j}" for j in range(3 + i)) for i in range(5)]
    last, every = (
        capture(lm, texts, layers=(0, 1, L - 1), heads=True, tokens=tokens) for tokens in ("last", "all")
    )
    for i, text in enumerate(texts):
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = checkpoint.hf(ids, output_hidden_states=True).hidden_states
        expected = np.stack([hidden[n][0].numpy() for n in (0, 1, L - 1)], axis=1)
        np.testing.assert_allclose(every.layers[i], expected, atol=1e-5)
        np.testing.assert_allclose(last.layers[i], expected[-1], atol=1e-5)
        assert every.heads[i].shape == (len(expected), *last.heads[i].shape)
        np.testing.assert_allclose(every.heads[i][-1], last.heads[i], atol=1e-5)
    assert capture(lm, texts).heads is None
    assert capture(lm, texts).layers.shape == (5, 0, lm.config.hidden_size)
    assert capture(lm, [], layers=(1,)).layers.shape == (0, 1, lm.config.hidden_size)
    with user_error("layer", L + 1, f"to {L}"):
        capture(lm, texts, layers=(L + 1,))
    with user_error("tokens 'first'", "last or all"):
        capture(lm, texts, tokens="first")
    with user_error("texts is one text"):
        capture(lm, "t5")


def test_vectors_point_from_false_answers_to_true_ones():
    """Every question counts once; the principal component is that of the differences, not of their spread."""
    random = np.random.default_rng(0)
    Q, K, D = 40, 2, 16
    question_of = np.repeat(np.arange(Q), 5)
    labels = np.tile([True, False, False, True, False], Q)
    truth, topic = np.eye(D, dtype=np.float32)[:2]
    hidden = random.normal(0, 0.1, (len(labels), K, D)).astype(np.float32)
    hidden += 5 * random.normal(size=(Q, K, 1))[question_of] * topic
    hidden[labels] += 2 * truth
    mean, pca = (steer.fit_vectors(hidden, labels, question_of, method) for method in ("mean", "pca"))
    for found in (mean, pca):
        # Noise of 0.1, averaged over 40 questions of 2 and 3 answers, is 0.015.
        np.testing.assert_allclose(found, np.tile(2 * truth, (K, 1)), atol=0.06)
    answers = hidden.reshape(Q, 5, K, D)
    differences = answers[:, [0, 3]].mean(axis=1) - answers[:, [1, 2, 4]].mean(axis=1)
    np.testing.assert_allclose(mean, differences.mean(axis=0), atol=1e-6)
    values, axes = np.linalg.eigh(differences[:, 1].T @ differences[:, 1])
    axis = axes[:, np.argmax(values)]
    np.testing.assert_allclose(pca[1], axis * (axis @ mean[1]), atol=1e-4)


@pytest.mark.parametrize("method", steer.METHODS)
def test_no_question_is_scored_with_a_vector_that_saw_it(tiny_imae, tmp_path, capfd, method):
    """A fold's file does not change with the answers to its own questions, and does with those of others."""
    model = ["--model", str(tiny_imae.directory), "--quiet", "--method", method]
    path = write_questions(tmp_path / "questions.csv", 8)
    assert steer.main([*model, "--data", str(path), "--out", str(tmp_path / "out")]) == 0
    config = tiny_imae.load().config
    assert f"vectors of layers {', '.join(map(str, range(1, config.num_layers)))}" in capfd.readouterr().out
    record = json.loads((tmp_path / "out" / "folds.json").read_text())
    assert record["method"] == method
    assert sorted(record["questions"].values()) == [0] * 4 + [1] * 4
    changed = next(question for question in read_questions(path) if record["questions"][question.text] == 0)
    text = path.read_text()
    assert text.count(changed.false[0].removesuffix(".")) >= 1
    lines = [
        line.replace(changed.false[0].removesuffix("."), "t9 t8 t7") if changed.text in line else line
        for line in text.splitlines(keepends=True)
    ]
    other = tmp_path / "other.csv"
    other.write_text("".join(lines))
    assert other.read_text() != text
    assert steer.main([*model, "--data", str(other), "--out", str(tmp_path / "again")]) == 0

    def same(name):
        before, after = (read_vectors(tmp_path / d / name, config) for d in ("out", "again"))
        assert list(before) == list(range(1, config.num_layers))
        return all(np.array_equal(before[n], after[n]) for n in before)

    assert same("fold0.gguf")
    assert not same("fold1.gguf")
    assert not same("all.gguf")


def test_a_directory_of_folds_scores_every_question(tiny_imae, tmp_path, capfd):
    path, out = write_questions(tmp_path / "questions.csv", 8), tmp_path / "steer"
    model = ["--model", str(tiny_imae.directory), "--quiet"]
    assert steer.main([*model, "--data", str(path), "--layers", "0+1", "--out", str(out)]) == 0
    (tmp_path / "primer.txt").write_text("Q: t3 t4\nA: t5 .\n\n")
    files = [out, out / "fold0.gguf", out / "fold1.gguf"]
    methods = [f"steer:vectors={file},strength=3" for file in files]
    command = [*model, "--data", path, "--methods", ",".join(methods), "--any-data"]
    command += ["--primer", tmp_path / "primer.txt", "--out", tmp_path / "results"]
    assert truthfulqa([*map(str, command)]) == 0
    settings = json.loads((tmp_path / "results" / "results.json").read_text())["methods"][methods[0]][
        "settings"
    ]
    assert (settings["vectors"], settings["folds"]) == (str(out), 2)
    lines = [json.loads(x) for x in (tmp_path / "results" / "scores.jsonl").read_text().splitlines()]
    by_method = {m: {x["index"]: x["true"] for x in lines if x["method"] == m} for m in methods}
    folds = json.loads((out / "folds.json").read_text())["questions"]
    for question in read_questions(path):
        own = by_method[methods[1 + folds[question.text]]][question.index]
        other = by_method[methods[2 - folds[question.text]]][question.index]
        np.testing.assert_allclose(by_method[methods[0]][question.index], own, rtol=1e-4)
        assert not np.allclose(own, other, rtol=1e-4)
    stranger = write_questions(tmp_path / "more.csv", 9)
    command[command.index(path)], command[-1] = stranger, tmp_path / "refused"
    error = error_of(capfd, truthfulqa, *command)
    assert "belongs to no fold, others do: fit vectors on it" in error

    # For another text it is the file of all folds.
    (tmp_path / "text.txt").write_text(" ".join(f"t{i % 9 + 3}" for i in range(40)))
    whole = f"steer:vectors={out / 'all.gguf'},strength=3"
    command = [*model, "--methods", f"{methods[0]},{whole}", "--text", tmp_path / "text.txt"]
    assert harm([*map(str, command), "--window", "16", "--out", str(tmp_path / "harm")]) == 0
    measured = json.loads((tmp_path / "harm" / "results.json").read_text())["methods"]
    assert measured[methods[0]]["kl"] == measured[whole]["kl"] > 0
    command += ["--methods", f"{whole},scope=prompt", "--out", tmp_path / "prompt"]
    assert "needs prompts" in error_of(capfd, harm, *command)


def test_pairs_and_wrong_arguments(tiny_imae, tmp_path, capfd):
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"question": f"t3 t{n}", "right_answer": f"t{n + 4}", "hallucinated_answer": f"t{n + 9}"}
        for n in range(6)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ["--model", tiny_imae.directory, "--quiet", "--data", pairs]
    out = tmp_path / "out"
    assert steer.main([*map(str, model), "--out", str(out), "--layers", "1"]) == 0
    config = tiny_imae.load().config
    assert list(read_vectors(out / "all.gguf", config)) == [1]
    folds = json.loads((out / "folds.json").read_text())["questions"]
    assert sorted(folds) == sorted(row["question"] for row in rows)
    for arguments, part in (
        (["--layers", "1..99"], f"--layers 1..99: the model has layers 0 to {config.num_layers - 1}"),
        (["--layers", "one"], "--layers='one'"),
        (["--folds", "4"], "--folds 4 of 6 questions"),
        (["--method", "median"], "median"),
    ):
        assert part in error_of(capfd, steer.main, *model, *arguments, "--out", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
