"""Scores of given continuations: packed token trees against one sequence at a time."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    TINY,
    TINY_GEMMA,
    hf_logits,
    import_torch,
    log_softmax,
    logits,
    random_tokens,
    tiny_llama,
    user_error,
)

from imae_jax.config import RopeConfig
from imae_jax.decode import Continuation, encode, score, windows
from imae_jax.decode.methods import Method, Stream, StreamLogits
from imae_jax.decode.methods.imae import Strength
from imae_jax.decode.methods.in_model_contrast import InModelContrast
from imae_jax.decode.scoring import GROUPS_PER_WINDOW, _answer_trees, _projection_chunks, _row_length
from imae_jax.token_tree import token_tree
from imae_jax.tokenizer import Tokenizer

LENGTH = 48


@pytest.fixture(scope="module")
def weights():
    return tiny_llama(units=True).weights()


# Packing


def reference(weights, method, item, config=TINY):
    """The sequence alone, padded to one length, without cache: log p of every scored token."""
    tokens = np.zeros((2, LENGTH), int)
    tokens[:, : len(item.tokens)] = item.tokens
    real = np.broadcast_to(np.arange(LENGTH) < len(item.tokens), tokens.shape)
    contrast = isinstance(method, InModelContrast)
    strength = [0.0, method.anti_strength] if contrast else [method.strength] * 2
    strength = None if weights.units is None else np.asarray(strength, np.float32)
    rows = logits(weights, config, tokens, attention_mask=real, strength=strength)
    first, second = (log_softmax(row) for row in rows)
    scores = method.beta * first - second if contrast else first
    places = np.arange(item.start, len(item.tokens))
    return scores[places - 1, np.asarray(item.tokens)[places]]


def assert_scores_equal_reference(weights, groups, method=Strength(0.0), atol=1e-5, config=TINY, **kwargs):
    results = dict(score(weights, config, groups, method, **kwargs))
    assert results.keys() == set(range(len(groups)))
    for i, group in enumerate(groups):
        for actual, item in zip(results[i].scores, group, strict=True):
            assert actual.dtype == np.float32
            expected = reference(weights, method, item, config)
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


def continuations(prompt, *answers):
    return [Continuation((*prompt, *answer), len(prompt)) for answer in answers]


def numbers(n, seed):
    return tuple(random_tokens(n, seed=seed).tolist())


def questions(primer, n=5, answers=4):
    """`n` groups of answers, some of which begin alike, after a primer and a question each."""
    groups = []
    for i in range(n):
        prompt = primer + numbers(2 + i % 3, seed=10 + i)
        texts = [numbers(1 + (i + j) % 5, seed=100 * i + j) for j in range(answers)]
        texts[1] = texts[0] + texts[1]
        groups.append(continuations(prompt, *texts))
    return groups


PRIMER = numbers(20, seed=1)
TREES = {
    "a benchmark": questions(PRIMER),
    "one group": questions(PRIMER, n=1),
    "more groups than a window": questions(PRIMER, n=2 * GROUPS_PER_WINDOW + 3, answers=2),
    "no common prefix": questions(numbers(6, 2), n=2) + questions(numbers(6, 3), n=2),
    "a prompt of one token": [continuations((7,), numbers(3, 1), numbers(2, 2))],
    "a group longer than a row": [
        continuations(PRIMER, *(numbers(7, seed) for seed in range(12))),
        *questions(PRIMER, n=2),
    ],
    "a sequence longer than a row": [
        continuations(PRIMER, numbers(25, 1), numbers(3, 2)),
        continuations(numbers(3, 4), numbers(40, 5), numbers(2, 6)),
    ],
    "identical sequences": [
        continuations(PRIMER, *[numbers(4, 1)] * 3),
        continuations(PRIMER, numbers(4, 1)),
    ],
    "one the beginning of another": [
        continuations(PRIMER, numbers(6, 1), numbers(6, 1)[:3], numbers(6, 1)[:1]),
    ],
    "alike up to the last token": [
        continuations(PRIMER, (5, 6, 7), (5, 6, 8), (5, 9, 7)),
    ],
    "several starts in one group": [
        [Continuation(PRIMER, 1), Continuation(PRIMER, 12), Continuation(PRIMER, 19)],
    ],
    "a prompt that goes on where another ends": [
        continuations(PRIMER, (5, 6)),
        continuations((*PRIMER, 5, 6), (7, 8), (9,)),
    ],
}


@pytest.mark.parametrize("case", TREES)
def test_packed_trees_equal_single_sequences(weights, case):
    assert_scores_equal_reference(weights, TREES[case], row_length=24, rows_per_batch=1)


@pytest.mark.parametrize("case", TREES)
def test_windows_count_the_tokens_of_a_sequence(case):
    """Not the slots of a row, in which other answers lie between a token and its ancestors."""
    config = dataclasses.replace(TINY_GEMMA, vocab_size=TINY.vocab_size)
    weights = tiny_llama(config).weights()
    assert_scores_equal_reference(
        weights, TREES[case], Strength(0.0), config=config, row_length=24, rows_per_batch=1
    )


@pytest.mark.parametrize("rows_per_batch", [1, 3])
@pytest.mark.parametrize("row_length", [15, 160])
def test_row_sizes_do_not_show(weights, row_length, rows_per_batch):
    # 3 rows of 160 are projected in chunks of less than the whole, 15 is no power of two.
    groups = TREES["a benchmark"] + TREES["a group longer than a row"]
    assert_scores_equal_reference(weights, groups, row_length=row_length, rows_per_batch=rows_per_batch)


def test_rows_are_long_enough_for_the_groups():
    """A prompt is computed once, not once an answer."""
    short = [Continuation((1, 2, 3), 2)] * 2
    long = [Continuation((*range(300), *answer), 300) for answer in ((1,) * 50, (2,) * 50)]
    text = [Continuation((1,) * 500, start) for start in range(1, 500)]
    for groups, expected in (([short] * 9 + [long], 256), ([short] + [long] * 9, 512), ([text], 1024)):
        assert _row_length(groups, [0]) == expected
    (tree,) = _answer_trees(0, long, [0], 512)
    assert len(tree.tree) == 400


@pytest.mark.parametrize(
    "method",
    [Strength(-0.5), InModelContrast(beta=2.0, anti_strength=0.7)],
    ids=lambda method: method.name,
)
def test_methods_with_units(weights, method):
    # Differences of log-probabilities hold the errors of two.
    groups = TREES["a benchmark"]
    assert_scores_equal_reference(weights, groups, method, row_length=24, rows_per_batch=3, atol=3e-5)


@pytest.mark.parametrize("method", [Strength(-1.0), InModelContrast(alpha=0.3)])
def test_confidence_is_that_of_the_distribution_a_token_is_drawn_from(weights, method):
    groups = TREES["a benchmark"][:2]
    method = method.resolve(TINY, generating=True)
    for i, scored in score(weights, TINY, groups, method, greedy=True, confidence=True, row_length=64):
        for item, greedy, actual in zip(groups[i], scored.is_greedy, scored.confidence, strict=True):
            tokens = np.asarray(item.tokens)
            streams = [
                StreamLogits(jnp.asarray(logits(weights, TINY, tokens[None], strength=stream.strength)[0]))
                for stream in method.streams
            ]
            p = np.exp(log_softmax(np.asarray(method.scores(streams))))[item.start - 1 : -1]
            best = -np.sort(-p, axis=-1)[:, :2]
            entropy = -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0.0), axis=-1)
            expected = np.stack([entropy, best[:, 0], best[:, 0] - best[:, 1]], axis=-1)
            np.testing.assert_allclose(actual, expected, atol=2e-5)
            np.testing.assert_array_equal(greedy, p.argmax(-1) == tokens[item.start :])


def test_bfloat16_models_are_scored_in_float32(weights):
    """Scores are taken from float32 logits: sums over the vocabulary stay one."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    every_token = [continuations(PRIMER, *((v,) for v in range(TINY.vocab_size)))]
    ((_, scored),) = score(rounded, TINY, every_token, Strength(-1.0), row_length=128)
    scores = np.concatenate(scored.scores)
    assert scores.dtype == np.float32
    # All come from one hidden state, so that only float32 rounding is left.
    np.testing.assert_allclose(np.exp(scores.astype(np.float64)).sum(), 1, rtol=1e-5)
    # bfloat16 keeps 8 bits: logits of about 5 are off by up to a few hundredths.
    exact = [reference(weights, Strength(-1.0), item) for item in every_token[0]]
    assert np.abs(scores - np.concatenate(exact)).mean() < 0.1


def test_one_shape_for_a_benchmark(weights):
    @dataclasses.dataclass(frozen=True)
    class Counted(Strength):
        token_scores = chex.assert_max_traces(Strength.token_scores, n=1)

    list(score(weights, TINY, questions(PRIMER, n=70, answers=5), Counted(0.0), row_length=24))
    with pytest.raises(AssertionError, match="traced > 1 times"):
        list(score(weights, TINY, questions(PRIMER, n=2), Counted(0.0), row_length=32))


@pytest.mark.parametrize("limit", [1, 2, 5, 128])
def test_chunks_hold_every_scored_node_once_with_its_parent(limit, monkeypatch):
    """Trees where one node has many more children than a chunk has nodes, or all nodes have one."""
    monkeypatch.setattr("imae_jax.decode.scoring.POSITIONS_PER_PROJECTION", limit)
    random = np.random.default_rng(0)
    nodes = np.arange(24)
    layouts = {
        "a star": np.where(nodes > 0, 0, -1),
        "a chain": nodes - 1,
        "random": np.where(nodes > 3, random.integers(0, np.maximum(nodes, 1)), -1),
        "nothing": np.full(24, -1),
    }
    batch = np.stack([*layouts.values()]).astype(np.int32)
    for parents in (batch, *batch[:, None]):
        num_chunks, positions, places, parent_places = _projection_chunks(parents, projections=1)
        found = {}
        for chunk in range(num_chunks):
            used = places[chunk] < parents.size
            assert used.any()
            for node, place in zip(places[chunk][used], parent_places[chunk][used], strict=True):
                assert found.setdefault(node, chunk) == chunk
                row, column = divmod(node, 24)
                assert positions[chunk, place] == 24 * row + parents[row, column]
        assert sorted(found) == np.flatnonzero(parents >= 0).tolist()
        assert (places[num_chunks:] == parents.size).all()


def test_large_groups_are_cut_in_time_that_grows_with_their_size(monkeypatch):
    """A text's windows are one group: no tree of all that is left may be built for each of them."""
    built = []

    def counted(sequences):
        built.append(sum(map(len, sequences)))
        return token_tree(sequences)

    monkeypatch.setattr("imae_jax.decode.scoring.token_tree", counted)
    random = np.random.default_rng(0)
    group = [Continuation(tuple(row), 1) for row in random.integers(5, 90, (200, 24)).tolist()]
    trees = list(_answer_trees(0, group, [0], 64))
    assert [index for tree in trees for index in range(tree.first, tree.first + len(tree.tree.paths))] == [
        *range(200)
    ]
    assert all(len(tree.tree) <= 64 for tree in trees)
    assert sum(built) < 10 * 200 * 24


# Tokenizing


def test_prompts_and_continuations_are_tokenized_together(smollm2):
    prompt = "Q: What is the capital of France?\nA:"
    (item,) = encode(smollm2.tokenizer, [prompt], [" Paris, of course."])
    assert not item.boundary_merged
    assert smollm2.tokenizer.decode(item.tokens[: item.start]) == prompt
    assert smollm2.tokenizer.decode(item.tokens[item.start :]) == " Paris, of course."


@pytest.mark.parametrize(
    ("prompt", "continuation", "merged"),
    [
        ("A:", " Paris is large.", False),
        ("A: ", "Paris is large.", True),
        ("A:\n\n", "Paris is large.", True),
        ("A:\n", "Paris is large.", False),
        ("The cap", "ital is Paris.", True),
    ],
)
def test_merged_boundaries_are_reported(smollm2, prompt, continuation, merged):
    prompts, texts = [prompt, "A:"], [continuation, " Rome."]
    first, second = encode(smollm2.tokenizer, prompts, texts)
    assert first.boundary_merged == merged
    assert not second.boundary_merged
    assert list(first.tokens) == smollm2.tokenizer(prompt + continuation)["input_ids"]
    alone = smollm2.tokenizer(prompt)["input_ids"]
    assert first.start == len(alone)
    assert (list(first.tokens[: first.start]) != alone) == merged


def test_special_tokens_are_added_once(smollm2):
    """With a tokenizer that adds BOS, a prompt's tokens include it; chat templates bring their own."""
    from tokenizers import processors

    backend = type(smollm2.tokenizer.backend_tokenizer).from_str(smollm2.tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer = Tokenizer(backend)
    (plain,) = encode(smollm2.tokenizer, ["A:"], [" Rome."])
    (with_bos,) = encode(tokenizer, ["A:"], [" Rome."])
    assert with_bos == Continuation((1, *plain.tokens), plain.start + 1)
    assert encode(tokenizer, ["A:"], [" Rome."], add_special_tokens=False) == [plain]
    (unconditional,) = encode(tokenizer, [""], ["Rome."])
    assert unconditional.start == 1


# What is refused


@pytest.mark.parametrize(
    ("prompt", "continuation", "part"),
    [("A:", "", "''"), ("", " Rome.", "prompt"), ("A: ", "Paris", "'Paris'")],
)
def test_pairs_that_cannot_be_scored_are_refused(smollm2, prompt, continuation, part):
    with user_error(part):
        encode(smollm2.tokenizer, [prompt], [continuation])


@pytest.mark.parametrize("start", [-1, 0, 4])
def test_a_continuation_starts_inside_its_tokens(start):
    with user_error(f"start {start}"):
        Continuation((5, 6, 7), start)


@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig("dynamic", factor=2.0)])
def test_sequences_over_the_context_are_refused(weights, rope):
    """`dynamic` RoPE generates beyond, but with other frequencies for every length."""
    config = dataclasses.replace(TINY, rope=rope)
    shorter, fits = (continuations(PRIMER, numbers(45, 1)[:n]) for n in (44, 45))
    (fewer,), (scores,) = (
        next(score(weights, config, [group], Strength(0.0), row_length=24))[1].scores
        for group in (shorter, fits)
    )
    assert len(scores) == 45
    # The 65th token is only predicted: it takes no place in the context and stretches nothing.
    np.testing.assert_allclose(scores[:44], fewer, atol=1e-5)
    too_long = continuations(PRIMER, (5,), numbers(46, 1))
    with user_error("group 1", "66", "64"):
        list(score(weights, config, [fits, too_long], Strength(0.0)))


def test_tokens_outside_of_the_vocabulary_are_refused(weights):
    with user_error("97", "vocabulary"):
        list(score(weights, TINY, [continuations(PRIMER, (5, 97))], Strength(0.0)))


def test_methods_without_their_units_are_refused():
    groups = questions(PRIMER, n=1)
    for method in (Strength(-1.0), InModelContrast()):
        with user_error(method.name, "units"):
            list(score(tiny_llama(), TINY, groups, method))


def test_no_groups_and_empty_groups(weights):
    assert list(score(weights, TINY, [], Strength(0.0))) == []
    groups = [[], *questions(PRIMER, n=1), []]
    results = dict(score(weights, TINY, groups, Strength(0.0), row_length=24))
    assert results.keys() == {0, 1, 2}
    assert results[0].scores == results[2].scores == []
    assert len(results[1].scores) == 4


# Texts


@pytest.mark.parametrize(("n", "length"), [(2, 8), (8, 8), (9, 8), (31, 8), (31, 7), (5, 2)])
def test_windows_score_every_token_but_the_first_once(n, length):
    tokens = random_tokens(n).tolist()
    found = windows(tokens, length)
    scored = [token for window in found for token in window.tokens[window.start :]]
    assert scored == tokens[1:]
    assert all(len(window.tokens) <= length for window in found)
    assert all(window.start >= length // 2 for window in found[1:])
    for few, size in (([1], 8), ([], 8), ([1, 2], 1)):
        with user_error("two"):
            windows(few, size)


@dataclasses.dataclass(frozen=True)
class Twice(Method):
    """Says nothing of its scores, which are no log-probabilities."""

    name: str = "twice"
    streams: tuple = (Stream(),)

    def scores(self, logits):
        return 2 * jax.nn.log_softmax(logits[0].final)


def test_perplexity_is_that_of_transformers(tiny):
    import_torch()
    checkpoint = tiny()
    lm = checkpoint.load()
    texts = ["t8 t9 t10 t11 t40", "t30 t31"]
    for text, actual in zip(texts, lm.perplexity(texts), strict=True):
        ids = lm.tokenizer(text)["input_ids"]
        log_probs = log_softmax(hf_logits(checkpoint.hf, np.asarray([ids])))[0]
        expected = np.exp(-np.mean([log_probs[i, token] for i, token in enumerate(ids[1:])]))
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    (whole,), (cut,) = lm.perplexity(texts[:1]), lm.perplexity(texts[:1], window=2)
    assert whole != cut
    with user_error("perplexity", "dola", "renormalize"):
        lm.perplexity(texts, "dola:candidates=low")
    with user_error("perplexity", "twice"):
        lm.perplexity(texts, Twice())
    with user_error("two"):
        lm.perplexity(["t3"])
    with user_error("window 65", "64"):
        lm.perplexity(texts, window=65)
    for size in (0, 1):
        with user_error(f"windows of {size}"):
            lm.perplexity(texts, window=size)
    for function in (lm.perplexity, lm.generate, lambda text: lm.score("t3", text)):
        with user_error("one text", "list"):
            function("t3 t4")
        with user_error("1 is no text but ['t3']"):
            function(["t3 t4", ["t3"]])
        assert function([]) == []
    with user_error("prompt 0 is no text"):
        lm.score(["t3"], ["t4"])
    with user_error("answers 1 is empty"):
        lm.score("t3", ["t4", ""])


def test_perplexity_cuts_texts_at_the_shorter_context_of_two_models(tiny):
    short = tiny("gqa", max_position_embeddings=16).directory
    lm, method = tiny().load(), f"cd:amateur={short},renormalize=true"
    text = " ".join(f"t{i}" for i in range(10, 40))
    (expected,) = lm.perplexity([text], method, window=16)
    assert lm.perplexity([text], method) == [expected]
    with user_error("window 17", "16"):
        lm.perplexity([text], method, window=17)
