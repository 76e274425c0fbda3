"""The generator, the sampler and the decoding methods."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, TINY, TINY_GEMMA, log_softmax, logits, random_tokens, tiny_llama, user_error

from imae_jax.config import RopeConfig
from imae_jax.cpu import argmax
from imae_jax.decode import Sampler, generate, parse_method, split_methods, streams
from imae_jax.decode.loop import GenerationOptions, stream_tokens
from imae_jax.decode.methods import StreamLogits
from imae_jax.decode.methods.imae import Strength
from imae_jax.decode.methods.in_model_contrast import InModelContrast
from imae_jax.decode.streams import Models

QUESTIONS = [
    "Q: What is the capital of France?\nA:",
    "Q: Why is the sky blue?\nA:",
    "The three primary colors are",
    "Once upon a time, in a village by the sea, there lived",
    "Q: How many legs does a spider have, and how many does an ant have?\nA:",
]
CHAT = "Name two planets that are larger than the Earth."


@pytest.fixture(scope="module")
def prompts(smollm2):
    chat = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": CHAT}], add_generation_prompt=True
    )
    return [*smollm2.tokenizer(QUESTIONS)["input_ids"], chat["input_ids"]]


@pytest.fixture(scope="module")
def greedy(smollm2, prompts):
    return generate(
        smollm2.model,
        smollm2.config,
        prompts,
        max_new_tokens=64,
        eos_token_ids=smollm2.eos_token_ids,
    )


@pytest.fixture(scope="module")
def tiny_units():
    return tiny_llama(units=True).weights()


def tiny_prompts(*lengths):
    return [random_tokens(n, seed=n).tolist() for n in lengths]


# Greedy decoding


def hf_generate(hf, prompts, max_new_tokens, eos):
    import torch

    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    result = hf.generate(
        tokens,
        attention_mask=torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return [cut(row[longest:], (eos,)) for row in result.tolist()]


def cut(row, eos):
    ends = [i for i, token in enumerate(row) if token in eos]
    return row[: ends[0] + 1] if ends else row


def test_greedy_decoding_equals_transformers(smollm2, hf_smollm2, prompts, greedy):
    (eos,) = smollm2.eos_token_ids
    expected = hf_generate(hf_smollm2, prompts, 64, eos)
    assert greedy == expected
    assert max(map(len, greedy)) == 64


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "rope_dynamic", *FAMILIES])
def test_greedy_decoding_of_tiny_models_equals_transformers(tiny, kind):
    # `dynamic` RoPE changes with every token beyond the context, here from the seventh on.
    checkpoint = tiny(kind, max_position_embeddings=16) if kind == "rope_dynamic" else tiny(kind)
    loaded, prompts = checkpoint.load(), tiny_prompts(10)
    actual = generate(loaded.model, loaded.config, prompts, max_new_tokens=20, eos_token_ids=(2,))
    assert actual == hf_generate(checkpoint.hf, prompts, 20, 2)


def test_a_row_does_not_depend_on_the_batch(smollm2, prompts, greedy):
    # All but the chat prompt, which is longer than one bucket.
    for prompt, expected in zip(prompts[:5], greedy[:5], strict=True):
        (alone,) = generate(
            smollm2.model,
            smollm2.config,
            [prompt],
            max_new_tokens=17,
            chunk_size=16,
            eos_token_ids=smollm2.eos_token_ids,
        )
        assert alone == expected[:17]


def test_padding_on_either_side_gives_the_same_tokens(smollm2, prompts, greedy):
    right = generate(
        smollm2.model,
        smollm2.config,
        prompts,
        max_new_tokens=64,
        eos_token_ids=smollm2.eos_token_ids,
        padding_side="right",
    )
    assert right == greedy


@pytest.mark.parametrize("config", [TINY, TINY_GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_do_not_depend_on_padding(config, side):
    """Prefill of a padded batch and one step of decoding against whole texts without cache."""
    tiny_units = tiny_llama(config, units=True).weights()
    prompts = tiny_prompts(3, 17, 9, 24, 1, 12)
    tokens, mask = np.zeros((6, 32), int), np.zeros((6, 32), bool)
    for i, prompt in enumerate(prompts):
        place = slice(32 - len(prompt), None) if side == "left" else slice(len(prompt))
        tokens[i, place], mask[i, place] = prompt, True

    @jax.jit
    def next_scores(models, tokens, mask, caches):
        tokens, mask = tokens[None], mask[None]
        hidden, caches = streams.run(models, method, tokens, attention_mask=mask, answer=mask, caches=caches)
        return method.scores(streams.logits_of(models, method, hidden)), caches

    method, models = Strength(-1.0), streams.Models.of(tiny_units, config)
    scores, caches = next_scores(models, tokens, mask, streams.empty_caches(models, method, 6, 40))
    step_scores, _ = next_scores(models, np.full((6, 1), 7), np.ones((6, 1), bool), caches)
    for i, prompt in enumerate(prompts):
        padded = np.asarray([prompt + [7] + [0] * (25 - len(prompt))])
        real = np.arange(26)[None] <= len(prompt)
        whole = logits(tiny_units, config, padded, attention_mask=real, strength=-1.0)
        expected = log_softmax(whole[0])
        last = np.flatnonzero(mask[i])[-1]
        np.testing.assert_allclose(scores[i, last], expected[len(prompt) - 1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(step_scores[i, 0], expected[len(prompt)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk_size", "max_new_tokens"), [(1, 13), (4, 11), (4, 1)])
def test_chunks_do_not_show(tiny_units, chunk_size, max_new_tokens):
    def run(**kwargs):
        return generate(tiny_units, TINY, tiny_prompts(4, 20), **kwargs)

    expected = run(max_new_tokens=13, chunk_size=6)
    assert [len(row) for row in expected] == [13, 13]
    actual = run(max_new_tokens=max_new_tokens, chunk_size=chunk_size)
    assert actual == [row[:max_new_tokens] for row in expected]


# End of text


def test_end_of_text_stops_its_row_alone(tiny_units):
    def run(eos):
        return generate(tiny_units, TINY, prompts, max_new_tokens=25, eos_token_ids=eos, chunk_size=8)

    prompts = tiny_prompts(5, 8, 13, 21)
    free = run(())
    assert [len(row) for row in free] == [25] * 4
    # The second call must not run with the first call's ids.
    for i, j in ((0, 4), (2, 9)):
        eos = (free[i][j],)
        stopped = [eos[0] in row for row in free]
        assert any(stopped)
        assert not all(stopped)
        assert run(eos) == [cut(row, eos) for row in free]
    both = (free[0][4], free[2][9])
    assert run(both) == [cut(row, both) for row in free]


def test_generation_ends_when_all_rows_have(tiny_units):
    def chunks(eos):
        return list(
            stream_tokens(
                Models.of(tiny_units, TINY),
                tiny_prompts(5, 8, 5, 8),
                Strength(0.0),
                GenerationOptions(max_new_tokens=25, chunk_size=8),
                eos_token_ids=eos,
            )
        )

    free = chunks(())
    assert [[len(row) for row in new] for new in free] == [[1] * 4] + [[8] * 4] * 3
    eos = (free[1][0][2], free[1][1][5])
    early = chunks(eos)
    assert len(early) == 2
    assert early[1] == [cut(row, eos) for row in free[1]]


# Sampling


SCORES = np.random.default_rng(3).normal(0, 2, 40).astype(np.float32)


def draws(sampler, n, scores=SCORES, seed=0):
    scores = jnp.broadcast_to(jnp.asarray(scores), (n, len(scores)))
    return np.asarray(jax.jit(sampler.sample)(scores, jax.random.key(seed)))


def kept(scores, temperature, top_k, top_p):
    """The distribution that is sampled: top_k first, then top_p of what it leaves."""
    order = np.argsort(-scores)
    if top_k:
        order = order[:top_k]
    probs = np.exp(log_softmax(scores[order] / temperature))
    number = np.searchsorted(np.cumsum(probs), top_p) + 1 if top_p < 1 else len(order)
    result = np.zeros(len(scores))
    result[order[:number]] = probs[:number] / probs[:number].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 5, 1.0),
        (1.0, 0, 0.6),
        (1.7, 12, 0.9),
    ],
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    n = 20_000
    expected = n * kept(SCORES, temperature, top_k, top_p)
    counts = np.bincount(draws(Sampler(temperature, top_k, top_p), n), minlength=len(SCORES))
    assert np.all(counts[expected == 0] == 0)
    frequent = expected >= 5
    assert np.all(counts[expected >= 50] > 0)
    chi_square = np.sum((counts - expected)[frequent] ** 2 / expected[frequent])
    freedom = max(frequent.sum() - 1, 0)
    # Mean and variance of a chi-square variable are its degrees of freedom, once and twice.
    assert chi_square <= freedom + 5 * np.sqrt(2 * freedom) + 1e-6


def test_equal_scores_at_the_edge_of_top_k_are_all_kept():
    scores = np.asarray([0.0, 3.0, 3.0, 1.0, 3.0], np.float32)
    assert set(draws(Sampler(1.0, top_k=2), 2000, scores)) == {1, 2, 4}


def test_draws_depend_on_seed_and_row_alone():
    sampler = Sampler(3.0)
    many = draws(sampler, 64)
    np.testing.assert_array_equal(draws(sampler, 64), many)
    np.testing.assert_array_equal(draws(sampler, 1), many[:1])
    np.testing.assert_array_equal(draws(sampler, 7), many[:7])
    assert len(set(many)) > 10
    # Two independent draws agree with the probability sum p² = 0.06.
    assert np.mean(draws(sampler, 64, seed=1) == many) < 0.3


def test_the_best_token_alone_is_greedy_decoding():
    scores = np.random.default_rng(0).normal(size=(300, 40)).astype(np.float32)
    for sampler in (Sampler(), Sampler(5.0, top_k=1), Sampler(1.0, top_p=1e-6)):
        drawn = sampler.sample(jnp.asarray(scores), jax.random.key(0))
        assert drawn.dtype == jnp.int32
        np.testing.assert_array_equal(drawn, scores.argmax(-1))


def test_forbidden_tokens_are_never_drawn():
    scores = np.where(np.arange(40) % 2, SCORES, -np.inf)
    for sampler in (Sampler(), Sampler(5.0, top_k=30, top_p=0.99)):
        assert np.all(draws(sampler, 500, scores) % 2 == 1)


def test_generation_with_a_sampler(tiny_units):
    def run(prompts, seed=0, chunk_size=15):
        return generate(
            tiny_units,
            TINY,
            prompts,
            sampler=Sampler(1.0),
            seed=seed,
            max_new_tokens=16,
            chunk_size=chunk_size,
        )

    prompts = tiny_prompts(6, 3, 11, 6)
    sampled = run(prompts)
    assert run(prompts) == sampled
    assert run(prompts[:1]) == sampled[:1]
    assert run(prompts, chunk_size=5) == sampled
    assert all(a != b for a, b in zip(run(prompts, seed=1), sampled, strict=True))
    # The first and the last row have the same prompt.
    assert sampled[0] != sampled[3]


def test_rows_with_seeds_of_their_own_are_drawn_as_if_alone(tiny_units):
    def run(prompts, seed):
        return generate(tiny_units, TINY, prompts, sampler=Sampler(1.0), seed=seed, max_new_tokens=16)

    prompts, seeds = tiny_prompts(6, 3, 11, 6), (7, 0, 7, 2**31 - 1)
    rows = run(prompts, seeds)
    assert rows == [run([prompt], seed)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert run(prompts[::-1], seeds[::-1]) == rows[::-1]
    with user_error("3 seeds for 4 prompts"):
        run(prompts, seeds[:3])


def test_every_step_draws_anew(tiny_units):
    """From a model that finds all tokens equally likely."""
    flat = tiny_units.base | {"unembed": jnp.zeros_like(tiny_units.base["unembed"])}
    flat = dataclasses.replace(tiny_units, base=flat)
    (row,) = generate(flat, TINY, [[5, 6]], sampler=Sampler(1.0), max_new_tokens=16, chunk_size=15)
    # 16 draws out of 97 tokens repeat one or two; less than 9 different ones are all but impossible.
    assert len(set(row)) >= 9


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": 1e-45}, "temperature 1e-45"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
    ],
)
def test_wrong_samplers_are_refused(fields, part):
    with user_error(part):
        Sampler(**fields)


# Methods


def contrast(rows, beta=1.0, alpha=0.0, renormalize=False):
    base, anti = map(log_softmax, rows)
    scores = beta * base - anti
    if renormalize:
        scores = log_softmax(scores)
    if alpha:
        scores[np.exp(base) < alpha * np.exp(base).max()] = -np.inf
    return scores


METHODS = {
    "expert": (Strength(-1.0), [-1.0, 0.0], lambda rows: rows[0]),
    "0.4": (Strength(0.4), [0.4, 0.0], lambda rows: rows[0]),
    "contrast": (InModelContrast(alpha=0.0), [0.0, 1.0], contrast),
    "strong": (
        InModelContrast(beta=2.0, alpha=0.1, renormalize=True, anti_strength=1.5),
        [0.0, 1.5],
        lambda rows: contrast(rows, beta=2.0, alpha=0.1, renormalize=True),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_equal_recomputation_without_cache(tiny_units, name):
    method, strengths, score = METHODS[name]
    prompts, length = tiny_prompts(4, 9), 24
    expected = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(10):
            tokens = np.asarray([row + [0] * (length - len(row))] * 2)
            real = np.broadcast_to(np.arange(length) < len(row), tokens.shape)
            strength = np.asarray(strengths, np.float32)
            rows = logits(tiny_units, TINY, tokens, attention_mask=real, strength=strength)
            row.append(int(np.argmax(score(rows[:, len(row) - 1]))))
        expected.append(row[len(prompt) :])
    assert generate(tiny_units, TINY, prompts, method=method, max_new_tokens=10) == expected


def test_methods_decode_differently(tiny_units):
    results = {
        name: generate(tiny_units, TINY, tiny_prompts(4, 9), method=method, max_new_tokens=10)
        for name, (method, *_) in METHODS.items()
    }
    assert len({str(result) for result in results.values()}) == len(METHODS)


@pytest.mark.parametrize("generating", [True, False])
def test_contrast_scores(generating):
    random = np.random.default_rng(0)
    rows = random.normal(0, 3, (2, 5, 40)).astype(np.float32)
    for fields in (
        {"alpha": 0.0},
        {"alpha": 0.0, "beta": 2.0},
        {"alpha": 0.1},
        {"beta": 0.5, "alpha": 0.3, "renormalize": True},
    ):
        expected = np.stack([contrast(rows[:, i], **fields) for i in range(5)])
        masked = np.isneginf(expected)
        assert masked.any() == (fields["alpha"] > 0)
        if not generating:
            expected[masked] = -1000
        method = InModelContrast(**fields).resolve(TINY, generating=generating)
        logits = tuple(StreamLogits(jnp.asarray(row)) for row in rows)
        actual = method.scores(logits)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
        if not generating:
            tokens = random.integers(0, 40, 5)
            chosen = method.token_scores(logits, jnp.arange(5), jnp.asarray(tokens))
            np.testing.assert_allclose(chosen, expected[np.arange(5), tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("base", Strength(0.0)),
        ("expert", Strength(-1.0)),
        ("anti-expert", Strength(1.0)),
        ("-0.5", Strength(-0.5)),
        ("imae:strength=2", Strength(2.0)),
        ("in-model-contrast", InModelContrast()),
        ("in-model-contrast:beta=2, renormalize=true", InModelContrast(2.0, renormalize=True)),
    ],
)
def test_methods_are_read_from_text_and_settings(text, method):
    assert parse_method(text) == method
    assert parse_method(method.settings()) == method
    assert parse_method(method) is method


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("contrast", ["'contrast'", "in-model-contrast"]),
        ("expert:beta=1", ["'expert'"]),
        ("in-model-contrast:gamma=1", ["gamma", "beta"]),
        ("in-model-contrast:beta", ["'beta'", "key=value"]),
        ("in-model-contrast:beta=two", ["beta", "'two'"]),
        ("in-model-contrast:renormalize=2", ["renormalize", "'2'"]),
        ("in-model-contrast:alpha=1.5", ["alpha=1.5"]),
        ("nan", ["nan"]),
        ("", ["''"]),
    ],
)
def test_wrong_methods_are_refused(text, parts):
    with user_error(*parts):
        parse_method(text)


def test_lists_of_methods_are_cut_between_methods():
    text = "base, in-model-contrast:beta=2,alpha=0.1,-0.5,imae:strength=1"
    assert split_methods(text) == [
        "base",
        "in-model-contrast:beta=2,alpha=0.1",
        "-0.5",
        "imae:strength=1",
    ]
    with user_error("no method"):
        split_methods(" , ")


def test_braces_in_lists_of_methods_stand_for_several_values():
    assert split_methods("base,iti:directions=d,alpha={5, 15},heads={1,2},expert,dola:candidates={low}") == [
        "base",
        *(f"iti:directions=d,alpha={alpha},heads={heads}" for alpha in (5, 15) for heads in (1, 2)),
        "expert",
        "dola:candidates=low",
    ]
    for text in ("iti:alpha={5,15", "iti:alpha=5}", "iti:alpha={{5}}"):
        with user_error("braces"):
            split_methods(text)


# Compilation


@dataclasses.dataclass(frozen=True)
class Counted(Strength):
    """The base method, counting how often it is traced."""

    traces: ClassVar[list] = []

    def scores(self, logits):
        self.traces.append(logits[0].final.shape)
        return super().scores(logits)


def test_one_program_a_shape(tiny_units):
    def run(*lengths, **kwargs):
        Counted.traces.clear()
        kwargs = {"max_new_tokens": 9, "eos_token_ids": (3,), "chunk_size": 8} | kwargs
        generate(tiny_units, TINY, tiny_prompts(*lengths), method=Counted(0.0), **kwargs)
        return len(Counted.traces)

    assert run(3, 10) == 2  # one for the prefill, one for all chunks
    assert run(31, 1) == 0
    assert run(5, 6, seed=3, eos_token_ids=(9,), max_new_tokens=7) == 0
    assert run(5, 6, padding_side="right") == 0
    assert run(33, 6) == 2


# What is refused


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"prompts": [[5, 6], []]}, ["prompt 1", "empty"]),
        ({"prompts": [[5], [96, 97]]}, ["97", "vocabulary"]),
        ({"prompts": [[-1]]}, ["-1", "vocabulary"]),
        ({"prompts": [[5]], "max_new_tokens": 64}, ["prompt 0", "64"]),
        ({"prompts": [[5], [5] * 60]}, ["prompt 1", "60", "64"]),
        ({"max_new_tokens": 0}, ["max_new_tokens 0"]),
        ({"padding_side": "middle"}, ["'middle'", "left", "right"]),
        ({"method": Strength(-1.0)}, ["expert", "units"]),
        ({"method": InModelContrast()}, ["in-model-contrast", "units"]),
    ],
)
def test_wrong_requests_are_refused(kwargs, parts):
    kwargs = {"prompts": [[5, 6]], "max_new_tokens": 8} | kwargs
    with user_error(*parts):
        generate(tiny_llama(), TINY, **kwargs)


def test_contexts_are_used_to_the_end():
    config = dataclasses.replace(TINY, max_position_embeddings=40)
    (row,) = generate(tiny_llama(config), config, [[5] * 30], max_new_tokens=10)
    assert len(row) == 10
    with user_error("40"):
        generate(tiny_llama(config), config, [[5] * 30], max_new_tokens=11)
    stretched = dataclasses.replace(config, rope=RopeConfig("dynamic", factor=2.0))
    (row,) = generate(tiny_llama(stretched), stretched, [[5] * 30], max_new_tokens=50)
    assert len(row) == 50
    with user_error("80"):
        generate(tiny_llama(stretched), stretched, [[5] * 30], max_new_tokens=51)


def test_no_prompts_no_rows():
    assert generate(tiny_llama(), TINY, []) == []


def test_argmax_is_the_first_place_of_the_maximum():
    x = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    x[0, 0, [7, 9]] = x.max() + 1
    x[0, 1] = -np.inf
    x[0, 2, :-1] = -np.inf
    x[1, 0] = 2.0
    np.testing.assert_array_equal(jax.jit(argmax)(x), np.argmax(x, axis=-1))
    assert argmax(jnp.asarray(x)).dtype == jnp.int32
