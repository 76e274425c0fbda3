"""Logits that float16 cannot hold end a computation, and the error says where."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import error_of, tiny_llama, user_error, write_questions
from safetensors.numpy import load_file, save_file

from imae_jax import decode
from imae_jax.activations import capture
from imae_jax.convert import load_model
from imae_jax.decode import Continuation, Sampler, streams
from imae_jax.decode.methods import Method, Stream
from imae_jax.decode.streams import Models
from imae_jax.evaluate.harm import main as harm
from imae_jax.evaluate.truthfulqa import main as truthfulqa
from imae_jax.generate import main as generate

PROMPT = [14, 15, 16]


def with_overflow(directory, out, token):
    """A copy in which the MLP of layer 2 overflows float16 at one token, and nowhere else.

    The first dimension of the residual stream is 0 but at that token, where the MLP's weights are large.
    """
    shutil.copytree(directory, out)
    weights = load_file(out / "model.safetensors")
    for name, x in weights.items():
        if "embed_tokens" in name:
            x[:, 0] = 0
            if token is not None:
                x[token, 0] = 6e4
        elif "o_proj" in name or "down_proj" in name:
            x[0] = 0
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.1.mlp.{name}.weight"][:, 0] = 100
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return str(out)


@pytest.fixture(scope="module")
def drawn(tiny, tmp_path_factory):
    """What the model without the overflow writes after `PROMPT`."""
    lm = load_model(
        with_overflow(tiny("gqa").directory, tmp_path_factory.mktemp("sound") / "model", None),
        dtype="float16",
    )
    (new,) = decode.generate(lm.model, lm.config, [PROMPT], max_new_tokens=12)
    assert new[2] not in (*PROMPT, 0, 2, *new[:2])
    return new


@pytest.fixture(scope="module")
def bad(drawn):
    """The token that overflows: the third that is drawn after `PROMPT`."""
    return drawn[2]


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory, bad):
    return with_overflow(tiny("gqa").directory, tmp_path_factory.mktemp("overflow") / "model", bad)


@pytest.fixture(scope="module")
def lm(directory):
    return load_model(directory, dtype="float16")


def words(*tokens):
    return " ".join(f"t{i}" for i in tokens)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0, top_k=5), Sampler(repetition_penalty=1.3)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_that_overflows_is_named(lm, bad, sampler, side):
    prompts, options = [PROMPT, [8, bad, 9]], {"sampler": sampler, "padding_side": side}
    with user_error("base, prompt 1, prefill", "float16", "from layer 2 on", "--dtype float32"):
        decode.generate(lm.model, lm.config, prompts, max_new_tokens=2, **options)


@pytest.mark.parametrize("chunk_size", [1, 2, 32])
def test_the_new_token_is_named(lm, bad, drawn, chunk_size):
    """Fed as the third one, it spoils the fourth; texts that end before are as they were."""
    with user_error("base, prompt 1, new token 3", "from layer 2 on"):
        decode.generate(lm.model, lm.config, [[11, 12], PROMPT], max_new_tokens=4, chunk_size=chunk_size)
    short = decode.generate(lm.model, lm.config, [PROMPT], max_new_tokens=3, chunk_size=chunk_size)
    options = {"max_new_tokens": 12, "chunk_size": chunk_size}
    ended = decode.generate(lm.model, lm.config, [PROMPT], eos_token_ids=[bad], **options)
    assert short == ended == [drawn[:3]]


@pytest.mark.parametrize("chunk_size", [1, 2, 32])
def test_a_stop_string_ends_a_text_before_it(lm, bad, drawn, chunk_size):
    """The other row goes on long after; what follows the stop string is nobody's."""
    options = {"format": "raw", "max_new_tokens": 12, "chunk_size": chunk_size}

    def text(prompts, **more):
        return ["".join(pieces) for pieces in zip(*lm.stream(prompts, **options, **more), strict=True)]

    stop = [words(drawn[1])]
    (alone,) = text([words(*PROMPT)], stop=stop)
    assert alone.split() == [words(drawn[0])]
    other = words(11, 12)
    assert text([words(*PROMPT), other], stop=stop) == [alone, *text([other], stop=stop)]
    with user_error("base, prompt 1, new token 3"):
        text([other, words(*PROMPT)], stop=["t9999"])


def test_float32_and_padding_do_not_overflow(tiny, directory, tmp_path):
    """Padding is token 0, whose infinities would pass through attention weights of 0."""
    lm = load_model(directory, dtype="float32")
    decode.generate(lm.model, lm.config, [PROMPT], max_new_tokens=12)
    lm = load_model(with_overflow(tiny("gqa").directory, tmp_path / "pad", 0), dtype="float16")
    alone = decode.generate(lm.model, lm.config, [PROMPT], max_new_tokens=6)
    for side in ("left", "right"):
        both = decode.generate(lm.model, lm.config, [PROMPT, [8] * 9], max_new_tokens=6, padding_side=side)
        assert both[0] == alone[0]
    assert np.isfinite(lm.score("t5 t6", [" t7", " t8 t9"], format="raw")).all()


@pytest.mark.parametrize("method", ["base", "dola:candidates=low", "sled:scale=5,renormalize=false"])
def test_the_answer_is_named(lm, bad, method):
    answers = [words(8, 9), words(8, 10), f"{words(9, bad)} t10", words(11)]
    with user_error("answer 2", "float16", "from layer 2 on"):
        lm.score("t5 t6", [" " + answer for answer in answers], method, format="raw")
    # The last token of an answer predicts nothing.
    assert np.isfinite(lm.score("t5 t6", [" " + words(9, bad)], method, format="raw")).all()


def test_groups_texts_and_the_prefix_that_all_share_are_named(lm, bad):
    groups = [[Continuation((5, 6, 7, 8), 2)], [Continuation((5, 6, 9), 2), Continuation((5, 6, bad, 3), 2)]]
    with user_error("group 1, continuation 1"):
        list(
            decode.score(lm.model, lm.config, groups, decode.parse_method("base"), greedy=True, row_length=16)
        )
    groups = [[Continuation((bad, 6, 7, 8, 9), 3), Continuation((bad, 6, 7, 8, 3), 3)]]
    with user_error("group 0, continuation 0", "from layer 2 on"):
        list(decode.score(lm.model, lm.config, groups, decode.parse_method("base"), row_length=16))
    with user_error("text 1", "float16"):
        lm.perplexity([words(5, 6, 7), words(5, bad, 7)])
    with user_error("heads", "float16"):
        capture(lm, [words(5, 6), words(5, bad)], heads=True)


def test_scores_that_are_no_numbers_are_refused():
    """Also where all logits are finite; -inf is what a method rules out."""

    @dataclasses.dataclass(frozen=True)
    class Ruling(Method):
        value: float
        rules_out: bool = False
        name: str = "ruling"
        streams: tuple = (Stream(),)

        def scores(self, logits):
            return jnp.where(jnp.arange(logits[0].final.shape[-1]) > 50, self.value, logits[0].final)

    model = tiny_llama()
    with user_error("ruling, prompt 0, prefill: logits or scores are not finite in float32;", "method"):
        decode.generate(model, model.config, [PROMPT], method=Ruling(np.nan), max_new_tokens=2)
    decode.generate(model, model.config, [PROMPT], method=Ruling(-np.inf), max_new_tokens=2)
    groups = [[Continuation((5, 6, 7, 60), 2)]]
    for method in (Ruling(np.nan, True), Ruling(np.inf, True), Ruling(-np.inf)):
        with user_error("group 0, continuation 0"):
            list(decode.score(model, model.config, groups, method, row_length=16))
    ((_, scored),) = decode.score(model, model.config, groups, Ruling(-np.inf, True), row_length=16)
    (scores,) = scored.scores
    assert np.isfinite(scores[0])
    assert scores[1] == -np.inf


def test_the_second_model_of_a_method_is_looked_at(lm):
    weights = jax.tree.map(lambda x: x * jnp.inf, tiny_llama().weights())
    models = Models((tiny_llama().weights(), weights), (lm.config, lm.config))
    method = decode.parse_method("cd:amateur=x").resolve(lm.config, generating=True)
    assert streams.first_layer_not_finite(models, method, [PROMPT]) == 0
    with user_error("cd, prompt 0, prefill", "from the embeddings on"):
        decode.generate(models, lm.config, [PROMPT], method=method, max_new_tokens=2)


def test_commands_end_with_one_line(directory, bad, capfd, tmp_path):
    model = ["--model", directory, "--dtype", "float16"]
    error = error_of(capfd, generate, *model, "--prompt", words(5, bad), "--max-new-tokens", 4)
    assert "prompt 0, prefill" in error
    assert generate([*model, "--prompt", words(5, 6), "--max-new-tokens", "1"]) == 0
    (tmp_path / "text.txt").write_text(words(5, 6, bad, 8))
    arguments = ("--text", tmp_path / "text.txt", "--out", tmp_path / "harm", "--quiet")
    error = error_of(capfd, harm, *model, *arguments)
    assert "window 0 of the text" in error
    assert not (tmp_path / "harm" / "results.json").exists()

    questions = write_questions(tmp_path / "questions.csv").read_text()
    questions = re.sub(rf"\bt{bad}\b", "t3", questions).splitlines()
    # The fourth question, number 3.
    questions[4] = questions[4].replace(" ", f" t{bad} ", 1)
    (tmp_path / "questions.csv").write_text("\n".join(questions) + "\n")
    (tmp_path / "primer.txt").write_text("Q: t3 t4\nA: t5 .\n\n")
    command = [*model, "--methods", "base", "--out", str(tmp_path / "tqa"), "--any-data", "--quiet"]
    command += ["--data", str(tmp_path / "questions.csv"), "--primer", str(tmp_path / "primer.txt")]
    assert "question 3, answer" in error_of(capfd, truthfulqa, *command)
