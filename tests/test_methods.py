"""The decoding methods: their formulas in NumPy, whole sequences without cache, settings."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    TINY,
    import_torch,
    jit_forward,
    log_softmax,
    random_tokens,
    tiny_llama,
    user_error,
    with_random_units,
)
from helpers.models import random_adapter, random_directions, random_vectors
from safetensors.numpy import load_file, save_file

from imae_jax.cache import KVCache
from imae_jax.convert import load_model
from imae_jax.convert.control_vector import write_vectors
from imae_jax.convert.iti import write_directions
from imae_jax.decode import Continuation, generate, parse_method, score, streams
from imae_jax.decode.joint import share_streams
from imae_jax.decode.methods import REGISTRY, Stream, StreamLogits
from imae_jax.decode.methods.activation_decoding import ActivationDecoding
from imae_jax.decode.methods.adacad import AdaCAD
from imae_jax.decode.methods.cad import CAD
from imae_jax.decode.methods.cd import CD
from imae_jax.decode.methods.coiecd import COIECD
from imae_jax.decode.methods.delta import DeLTa
from imae_jax.decode.methods.dexperts import DExperts
from imae_jax.decode.methods.dola import DoLa, StaticDoLa
from imae_jax.decode.methods.end import END
from imae_jax.decode.methods.icd import ICD
from imae_jax.decode.methods.imae import Strength
from imae_jax.decode.methods.in_model_contrast import InModelContrast
from imae_jax.decode.methods.iti import ITI
from imae_jax.decode.methods.prunecd import PruneCD
from imae_jax.decode.methods.sled import SLED
from imae_jax.decode.methods.steer import Steer
from imae_jax.llama import Taps, project

# The formulas, one by one and in float64. `final` [T, V] and `exits` [n, T, V] are logits.


def softmax(x):
    return np.exp(log_softmax(x))


def contrast(
    strong, weak, *, weight=1.0, alpha=0.0, plausibility="probability", renormalize=False, implausible=-1000.0
):
    """Of logits and log-probabilities: `weight · log p_strong − weak`, renormalized, then masked."""
    difference = weight * log_softmax(strong) - weak
    if renormalize:
        difference = log_softmax(difference)
    p = softmax(strong) if plausibility == "probability" else np.float64(strong)
    kept = p >= alpha * p.max(axis=-1, keepdims=True)
    return np.where(kept if alpha else True, difference, implausible)


def icd(base, anti, *, beta=1.0, **settings):
    return contrast(base, log_softmax(anti), weight=beta, **settings)


def cd(expert, amateur, *, temperature=1.0, beta=None, **settings):
    amateur = log_softmax(np.float64(amateur) / temperature)
    if beta is None:
        return contrast(expert, amateur, **settings)
    return contrast(expert, beta * amateur, weight=1 + beta, **settings)


def dexperts(base, expert, anti, *, weight, renormalize=True, alpha=0.0, implausible=-1000.0):
    scores = log_softmax(base) + weight * (log_softmax(expert) - log_softmax(anti))
    scores = log_softmax(scores) if renormalize else scores
    return masked(scores, softmax(base), alpha=alpha, implausible=implausible)


def masked(scores, p, *, alpha, implausible):
    return np.where(p >= alpha * p.max(axis=-1, keepdims=True) if alpha else True, scores, implausible)


def end(final, exits, *, weight, with_last, renormalize=True, alpha=0.0, implausible=-1000.0):
    scores = log_softmax(final)
    layers = np.concatenate([exits, final[None]]) if with_last else exits
    for t, v in np.ndindex(*final.shape):
        shares = softmax(layers[:, t, v])
        scores[t, v] += weight * np.sum(shares * np.log(shares))
    scores = log_softmax(scores) if renormalize else scores
    return masked(scores, softmax(final), alpha=alpha, implausible=implausible)


def activation_decoding(final, prompt, *, weight, alpha=0.0, implausible=-1000.0):
    """`prompt` [positions, V] are logits of one layer."""
    scores = log_softmax(final)
    for v in range(V):
        shares = softmax(prompt[:, v])
        scores[:, v] += weight * np.sum(shares * np.log(shares))
    return masked(scores, softmax(final), alpha=alpha, implausible=implausible)


def delta(final, exits, *, layers, virtual_layer, renormalize=True, alpha=0.0, implausible=-1000.0):
    trajectory = np.concatenate([exits, final[None]]).astype(np.float64)
    slope, start = np.polyfit(layers, trajectory.reshape(len(layers), -1), 1)
    z = (start + slope * virtual_layer).reshape(final.shape)
    scores = log_softmax(z) if renormalize else z
    return masked(scores, softmax(z), alpha=alpha, implausible=implausible)


def static_dola(final, exits, **settings):
    return contrast(final, log_softmax(exits[0]), **settings)


def dola(final, exits, *, divergence="published", **settings):
    def kl(p, q):
        return np.sum(p * np.log(p / q))

    chosen = []
    for t in range(len(final)):
        q_last, divergences = softmax(final[t]), []
        for q in softmax(exits[:, t]):
            m = (q_last + q) / 2
            pairs = [(m, q_last), (m, q)] if divergence == "published" else [(q_last, m), (q, m)]
            divergences.append(sum(kl(*pair) for pair in pairs) / 2)
        chosen.append(exits[np.argmax(divergences), t])
    return static_dola(final, np.asarray(chosen)[None], **settings)


def sled(final, exits, q, *, rate=2.5, scale, steps, lower_bound, renormalize=True):
    """`q` [n, T, V] are the exits' distributions."""
    final, exits = np.float64(final), np.float64(exits)
    scores = np.full(final.shape, np.float64(lower_bound))
    for t, z in enumerate(final):
        chosen = np.argsort(-z)[:scale]
        m = np.zeros((len(exits), scale))
        for n, early in enumerate(exits[:, t]):
            d = early - z
            for place, i in enumerate(chosen):
                u = np.array(q[n, t], np.float64)
                u[i] -= 1
                # torch's cosine_similarity keeps both lengths from being smaller than 1e-8.
                cosine = u @ d / max(np.linalg.norm(u), 1e-8) / max(np.linalg.norm(d), 1e-8)
                m[n, place] = max(cosine, 0) ** 2
        per_layer = m.sum(axis=1, keepdims=True)
        layers = np.divide(m, per_layer, out=np.zeros_like(m), where=per_layer > 0)
        weights = per_layer / m.sum() if m.sum() > 0 else 0 * per_layer
        latent = np.zeros_like(z)
        latent[chosen] = (weights * layers).sum(axis=0)
        for j in range(steps):
            z = z - rate * (1 - j / 10) * (softmax(z) - latent)
        scores[t, chosen] = z[chosen]
    return log_softmax(scores) if renormalize else scores


def cad(with_context, without, *, alpha=1.0):
    return log_softmax((1 + alpha) * np.float64(with_context) - alpha * without)


def adacad(with_context, without, *, floor=0.0):
    scores = []
    for c, n in zip(with_context, without, strict=True):
        p, q = softmax(c), softmax(n)
        m = (p + q) / 2
        divergence = (np.sum(p * np.log(p / m)) + np.sum(q * np.log(q / m))) / 2
        scores.append(cad(c, n, alpha=max(divergence, floor)))
    return np.stack(scores)


def coiecd(with_context, without, *, alpha=1.0, ratio=4.0):
    """As in the code: an entropy that is subtracted from all tokens before a softmax over them."""
    scores = []
    for c, n in zip(log_softmax(with_context), log_softmax(without), strict=True):
        information = log_softmax(-c + np.sum(np.exp(n) * n))
        low = information < information.min() + np.log(ratio)
        take = low if low.sum() > 1 else np.zeros_like(low)
        take = take | (information > information.max() - np.log(ratio))
        scores.append(log_softmax(np.where(take, c, n) + alpha * (c - n)))
    return np.stack(scores)


V = TINY.vocab_size
RANDOM = np.random.default_rng(0).normal(0, 3, (5, 5, V)).astype(np.float32)
FINAL, EXITS = RANDOM[0], RANDOM[1:]
MASKS = [
    {"alpha": 0.0},
    {"alpha": 0.0, "renormalize": True},
    {"alpha": 0.1},
    {"alpha": 0.1, "renormalize": True},
    {"alpha": 0.3, "implausible": -50.0},
    {"alpha": 1.0},
    {"alpha": 0.6, "plausibility": "logit"},
    {"alpha": 1.0, "plausibility": "logit", "renormalize": True},
]


def scores_of(method, final, exits=None, *, second=None, generating=False):
    """What a method of the library makes of logits."""
    rows = [StreamLogits(jnp.asarray(final), None if exits is None else jnp.asarray(exits))]
    if second is not None:
        rows.append(StreamLogits(jnp.asarray(second)))
    return np.asarray(method.resolve(TINY, generating=generating).scores(tuple(rows)))


def assert_scores(actual, expected, atol=2e-5):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=atol)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("generating", [False, True])
def test_contrasts_equal_their_formulas(mask, generating):
    settings = mask | ({"implausible": -np.inf} if generating and "implausible" not in mask else {})
    weak, every = EXITS[0], range(len(EXITS))
    for actual, expected in (
        (
            scores_of(CD(amateur="m", temperature=0.5, **mask), FINAL, second=weak, generating=generating),
            cd(FINAL, weak, temperature=0.5, **settings),
        ),
        (
            scores_of(CD(amateur="m", beta=0.5, **mask), FINAL, second=weak, generating=generating),
            cd(FINAL, weak, beta=0.5, **settings),
        ),
        (
            scores_of(ICD(anti_expert="m", beta=2.0, **mask), FINAL, second=weak, generating=generating),
            icd(FINAL, weak, beta=2.0, **settings),
        ),
        (
            scores_of(InModelContrast(beta=0.5, **mask), FINAL, second=weak, generating=generating),
            icd(FINAL, weak, beta=0.5, **settings),
        ),
        (
            scores_of(StaticDoLa(layer=1, **mask), FINAL, EXITS[:1], generating=generating),
            static_dola(FINAL, EXITS, **settings),
        ),
        *(
            (
                scores_of(
                    DoLa("all", divergence=divergence, **mask),
                    FINAL,
                    EXITS[list(every)],
                    generating=generating,
                ),
                dola(FINAL, EXITS, divergence=divergence, **settings),
            )
            for divergence in ("published", "jensen-shannon")
        ),
    ):
        assert_scores(actual, expected)
        kept = actual != settings.get("implausible", -1000)
        assert kept.all() if mask["alpha"] == 0 else not kept.all() and kept.any(axis=-1).all()


def test_dola_chooses_a_layer_for_every_position_and_by_its_divergence():
    """Of two early exits now one, now the other is nearer to the last layer; the divergences can disagree."""
    random = np.random.default_rng(1)
    far, near = (FINAL + random.normal(0, scale, FINAL.shape) for scale in (4, 0.5))
    swapped = np.arange(5)[:, None] % 2 == 0
    exits = np.stack([np.where(swapped, far, near), np.where(swapped, near, far)]).astype(np.float32)
    assert_scores(scores_of(DoLa("0..1", alpha=0.0), FINAL, exits), static_dola(FINAL, far[None]))

    # The published direction punishes what is all but impossible under one of two layers, the other cannot.
    logits = np.zeros((3, 1, V), np.float32)
    logits[0, 0, :2], logits[1, 0, :2], logits[2, 0, 2] = 8, -60, -9
    logits[2, 0, 3:9] = 9
    chosen = {}
    for divergence in ("published", "jensen-shannon"):
        method = DoLa("0..1", divergence=divergence, alpha=0.0)
        actual = scores_of(method, logits[0], logits[1:])
        assert_scores(actual, dola(logits[0], logits[1:], divergence=divergence), atol=1e-4)
        chosen[divergence] = actual
    assert np.abs(chosen["published"] - chosen["jensen-shannon"]).max() > 1


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("mask", [{}, {"alpha": 0.3, "implausible": -50.0}], ids=str)
def test_end_equals_its_literal_formula(renormalize, mask):
    for with_last, early in itertools.product((True, False), (EXITS[:2], EXITS[:2] * 30)):
        settings = {"weight": 1.5, "with_last": with_last, "renormalize": renormalize, **mask}
        actual = scores_of(END(candidates="0..1", **settings), FINAL, early)
        assert_scores(actual, end(FINAL, early, **settings), atol=1e-4)


def test_end_penalizes_tokens_whose_logit_is_the_same_in_all_layers():
    """By log of the number of layers times the weight; a token that one layer alone knows loses nothing."""
    exits = np.zeros((2, 1, V), np.float32)
    exits[0, 0, 0] = 100
    method = END(candidates="0..1", weight=2.0, with_last=False, renormalize=False)
    expected = np.full((1, V), -np.log(V) - 2 * np.log(2))
    expected[0, 0] = -np.log(V)
    assert_scores(scores_of(method, np.zeros((1, V), np.float32), exits), expected)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("mask", [{}, {"alpha": 0.3, "implausible": -50.0}], ids=str)
def test_delta_equals_least_squares(renormalize, mask):
    for layers, virtual_layer in (((1, 2, 3), 3.0), ((1, 2, 3), 4.0), ((0, 1, 2, 3), 7.5), ((0, 3), 5.0)):
        settings = {"layers": layers, "virtual_layer": virtual_layer, "renormalize": renormalize, **mask}
        early = EXITS[: len(layers) - 1]
        actual = scores_of(DeLTa(**settings), FINAL, early)
        assert_scores(actual, delta(FINAL, early, **settings), atol=1e-4)
        if layers == (0, 3):
            base = scores_of(DeLTa(**settings | {"virtual_layer": 3.0, "renormalize": True}), FINAL, early)
            kept = base > -50
            assert_scores(base[kept], log_softmax(FINAL)[kept])


SLEDS = [
    {"scale": 10, "steps": 10, "lower_bound": -100.0},
    {"scale": 1, "steps": 10, "lower_bound": -100.0},
    {"scale": V, "steps": 10, "lower_bound": -100.0, "rate": 1.0},
    {"scale": 10, "steps": 1, "lower_bound": -1000.0},
    {"scale": 10, "steps": 10, "lower_bound": -30.0, "renormalize": False},
]


@pytest.mark.parametrize("settings", SLEDS, ids=str)
def test_sled_equals_its_literal_formula(settings):
    expected = sled(FINAL, EXITS, softmax(EXITS), **settings)
    assert_scores(scores_of(SLED("all", **settings), FINAL, EXITS), expected)


def peaked(gap):
    """Early exits that are surest of the last layer's best token, of its fifth, and of one out of reach."""
    exits = np.array(EXITS[:3]) / 3
    order = np.argsort(-FINAL, axis=-1)
    for n, place in enumerate((0, 4, V - 1)):
        exits[n, np.arange(5), order[:, place]] = gap
    return exits


@pytest.mark.parametrize("gap", [8, 12, 17, 30, 90, 800])
def test_sled_of_exits_that_are_nearly_sure(gap):
    """`q − e_i` is taken from a float32 q, as published: from where q rounds to 1 on, it is not −Σ others.

    The formula in float64 from that same q leaves the errors of float32 sums, a few 1e-7 of cosines
    that move scores by at most the sum of the rates, 5.5 · 2.5; and those of logits of size `gap`.
    """
    exits, settings = peaked(gap), SLEDS[0]
    q = np.asarray(jax.nn.softmax(exits))
    actual = scores_of(SLED("all", **settings), FINAL, exits)
    assert_scores(actual, sled(FINAL, exits, q, **settings), atol=1e-4)
    surest = 1 - softmax(exits).max(axis=-1)
    assert (q.max(axis=-1) == 1).all() == (gap >= 30)
    if gap <= 12:
        # A float64 q differs from it by up to 2^-24 beside 1 − q.
        atol = 5.5 * 2.5 * 2 * 2**-24 / surest.min()
        assert_scores(actual, sled(FINAL, exits, softmax(exits), **settings), atol=max(atol, 1e-4))


def test_sled_without_a_direction_keeps_the_last_layer():
    """Exits equal to the last layer point nowhere: P_latent is 0, and only softmax(z) is subtracted."""
    settings = SLEDS[0]
    exits = np.stack([FINAL, FINAL])
    actual = scores_of(SLED("0..1", **settings), FINAL, exits)
    assert np.isfinite(actual).all()
    assert_scores(actual, sled(FINAL, exits, softmax(exits), **settings))


@pytest.mark.parametrize("spread", [0.1, 1, 5])
def test_methods_of_two_prompts_equal_their_formulas(spread):
    """With few and with many likely tokens."""
    both = with_context, without = spread * FINAL, spread * EXITS[0]
    for method, formula, settings in (
        (CAD, cad, {"alpha": 0.5}),
        (AdaCAD, adacad, {}),
        (AdaCAD, adacad, {"floor": 0.3}),
        (COIECD, coiecd, {"alpha": 0.7}),
        (COIECD, coiecd, {"ratio": 2.0}),
    ):
        assert_scores(scores_of(method(**settings), with_context, second=without), formula(*both, **settings))
        assert_scores(
            scores_of(method(**settings).flipped().flipped(), with_context, second=without),
            formula(*both, **settings),
        )
    assert_scores(scores_of(CAD().flipped(), with_context, second=without), cad(*both, alpha=-1.0))


# Whole sequences without cache

LAYERS, LENGTH, HEADS, ALPHA_ITI = 2, 32, 3, 3.0


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A tiny model, what methods load besides it, and the same things loaded plainly."""
    directory = tmp_path_factory.mktemp("methods")
    checkpoint = tiny("gqa", num_hidden_layers=LAYERS, initializer_range=0.15)
    second = tiny("gqa", num_hidden_layers=1, initializer_range=0.15, seed=5)
    lm = checkpoint.load()
    references = {
        "second": str(second.directory),
        "cut": f"{checkpoint.directory}#layers=1",
        "adapter": str(random_adapter(directory / "adapter", lm.config, lm.base.reference)),
        "right": str(random_adapter(directory / "right", lm.config, lm.base.reference, rank=5, seed=4)),
        "pruned": str(without_layer_1(checkpoint.directory, directory / "pruned")),
        "directions": str(directory / "directions.safetensors"),
        "vectors": str(directory / "vectors.gguf"),
    }
    directions, vectors = random_directions(lm.config), random_vectors(lm.config)
    write_directions(directory / "directions.safetensors", directions)
    write_vectors(references["vectors"], vectors, lm.config)
    names = ("second", "cut", "adapter", "right", "pruned")
    loaded = {name: load_model(references[name]) for name in names}
    weights = {name: (other.model.weights(), other.config) for name, other in loaded.items()}
    weights |= {"base": (lm.model.weights(), lm.config), "units": (tiny_weights_with_units(lm), lm.config)}
    return SimpleNamespace(
        lm=lm,
        config=lm.config,
        hf=checkpoint.hf,
        references=references,
        directions=directions,
        vectors=vectors,
        weights=weights,
    )


def without_layer_1(checkpoint, path):
    """Of a checkpoint with two layers, one that has the upper one alone."""
    path.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, path)
    config = json.loads((path / "config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS == 2
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {k.replace(".layers.1.", ".layers.0."): v for k, v in tensors.items() if ".layers.0." not in k}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tiny_weights_with_units(lm):
    return with_random_units(lm.model.weights(), lm.config)


def padded(tokens):
    """One row of `LENGTH` as `forward` takes it."""
    real = np.arange(LENGTH)[None] < len(tokens)
    row = np.zeros((1, LENGTH), int)
    row[real] = tokens
    return {"tokens": row, "attention_mask": real}


def whole(world, tokens, name="base", *, norm=False, **kwargs):
    """Logits of a sequence alone, without cache: the last layer's [T, V] and every exit's [layers, T, V]."""
    weights, config = world.weights[name]
    taps = Taps(hidden_layers=tuple(range(config.num_layers)))
    output = jit_forward(weights, config, **padded(tokens), taps=taps, **kwargs)
    exits = np.stack(output.hidden_layers)
    if norm:
        size = np.sqrt(np.mean(np.float64(exits) ** 2, axis=-1, keepdims=True) + config.rms_norm_eps)
        exits = (exits / size * np.asarray(weights.base["norm_final"])).astype(np.float32)
    final, exits = (np.asarray(project(weights, x)) for x in (output.hidden_states, exits))
    return SimpleNamespace(final=final[0, : len(tokens)], exits=exits[:, 0, : len(tokens)])


def baked(world, tokens, start):
    """Logits of a model with the shifts in `o_proj`'s bias, on the unshifted model's cache of the prompt."""
    weights, config = world.weights["base"]
    found = world.directions
    best = found.rank < HEADS
    layers = []
    for layer, of_heads in enumerate(found.directions * (found.sigma * best)[..., None]):
        arrays = weights.base["layers"][layer]
        layers.append(arrays | {"bo": jnp.einsum("NH,NHD->D", ALPHA_ITI * of_heads, arrays["wo"])})
    shifted = dataclasses.replace(weights, base=weights.base | {"layers": tuple(layers)})
    cache = KVCache.empty(config, 1, 2 * LENGTH, jnp.float32)
    before, after = (padded(part) for part in (tokens[: start - 1], tokens[start - 1 :]))
    cache = jit_forward(weights, config, **before, cache=cache).cache
    hidden = jit_forward(shifted, config, **after, cache=cache).hidden_states
    final = np.full((len(tokens), V), np.nan)
    final[start - 1 :] = project(shifted, hidden)[0, : len(tokens) - start + 1]
    return SimpleNamespace(final=final)


def hooked(world, tokens, start, *, strength, layers, scope, keep_norm=False):
    """Log-probabilities of transformers' model, whose layers' outputs a hook changes."""
    torch = import_torch()
    answer = np.arange(len(tokens)) >= start - 1
    where = torch.tensor({"answer": answer, "prompt": ~answer, "all": answer | True}[scope])

    def add(vector):
        def hook(module, inputs, output):
            old = output[0] if isinstance(output, tuple) else output
            new = old + strength * torch.tensor(vector)
            if keep_norm:
                new = new * old.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True)
            new = torch.where(where[None, :, None], new, old)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    modules = world.hf.model.layers
    hooks = [modules[n].register_forward_hook(add(world.vectors[n])) for n in layers]
    try:
        with torch.no_grad():
            return log_softmax(world.hf(torch.tensor([tokens])).logits[0].numpy())
    finally:
        for hook in hooks:
            hook.remove()


@dataclasses.dataclass(frozen=True)
class Case:
    """A method's settings, and its scores [T, V] by other means.

    Attributes:
        settings: text, with names of `world.references` in braces.
        scores: (world, tokens, start of the answer, defaults of the task) to scores.
        units: does it run on the model with units?
    """

    settings: str
    scores: Callable[..., np.ndarray]
    units: bool = False


def icd_with(name):
    def scores(world, tokens, start, task, **settings):
        return icd(whole(world, tokens).final, whole(world, tokens, name).final, **task | settings)

    return scores


def exits_with(formula, layers, *, norm=False, **fixed):
    def scores(world, tokens, start, task):
        logits = whole(world, tokens, norm=norm)
        return formula(logits.final, logits.exits[list(layers)], **task | fixed)

    return scores


def sled_with(layers, *, norm=False, **fixed):
    def scores(world, tokens, start, task):
        logits = whole(world, tokens, norm=norm)
        exits = logits.exits[list(layers)]
        steps, lower_bound = (1, -1000.0) if task["alpha"] else (10, -100.0)
        settings = {"steps": steps, "lower_bound": lower_bound} | fixed
        return sled(logits.final, exits, np.asarray(jax.nn.softmax(exits)), **settings)

    return scores


def of_exits(formula, early, *, norm=False, scoring, generating, **fixed):
    """Of END and DeLTa, whose settings differ between the tasks."""

    def scores(world, tokens, start, task):
        logits = whole(world, tokens, norm=norm)
        settings = fixed | (generating if task["alpha"] else scoring)
        return formula(logits.final, logits.exits[list(early)], implausible=task["implausible"], **settings)

    return scores


def activation_decoding_with(layer, *, norm=False, **fixed):
    def scores(world, tokens, start, task):
        logits = whole(world, tokens, norm=norm)
        of_layer = logits.final if layer == LAYERS else logits.exits[layer]
        return activation_decoding(logits.final, of_layer[:start], **task | fixed)

    return scores


def units_with(world, tokens, strength, **kwargs):
    return whole(world, tokens, "units", strength=np.float32([strength]), **kwargs).final


def without_context(prompt):
    """What stands for a prompt without its context: its last two thirds."""
    return prompt[len(prompt) // 3 :]


def contexts_with(formula, **settings):
    def scores(world, tokens, start, task):
        other = (*without_context(tokens[:start]), *tokens[start:])
        cut = len(tokens) - len(other)
        scores = np.full((len(tokens), V), np.nan)
        scores[cut:] = formula(whole(world, tokens).final[cut:], whole(world, other).final, **settings)
        return scores

    return scores


CASES = {
    "imae": Case("-3", lambda w, x, _, __: log_softmax(units_with(w, x, -3)), units=True),
    "in-model-contrast": Case(
        "in-model-contrast:beta=2,anti_strength=3",
        lambda w, x, _, task: icd(units_with(w, x, 0), units_with(w, x, 3), beta=2.0, **task),
        units=True,
    ),
    "icd": Case(
        "icd:anti_expert={second},beta=1.5,alpha=0.2",
        functools.partial(icd_with("second"), beta=1.5, alpha=0.2),
    ),
    "icd, adapter": Case("icd:anti_expert={adapter}", icd_with("adapter")),
    "cd": Case(
        "cd:amateur={cut},temperature=0.5,renormalize=true",
        lambda w, x, _, task: cd(
            whole(w, x).final, whole(w, x, "cut").final, temperature=0.5, renormalize=True, **task
        ),
    ),
    "cd, beta": Case(
        "cd:amateur={cut},beta=0.5",
        lambda w, x, _, task: cd(whole(w, x).final, whole(w, x, "cut").final, beta=0.5, **task),
    ),
    "prunecd": Case(
        "prunecd:skip=1", lambda w, x, _, task: cd(whole(w, x).final, whole(w, x, "pruned").final, **task)
    ),
    "prunecd, beta": Case(
        "prunecd:skip=1,beta=0.5,renormalize=true",
        lambda w, x, _, task: cd(
            whole(w, x).final, whole(w, x, "pruned").final, beta=0.5, renormalize=True, **task
        ),
    ),
    "dexperts": Case(
        "dexperts:expert={right},anti_expert={adapter},weight=1.5",
        lambda w, x, _, task: dexperts(
            *(whole(w, x, name).final for name in ("base", "right", "adapter")), weight=1.5, **task
        ),
    ),
    "dola": Case("dola:candidates=all", exits_with(dola, range(LAYERS))),
    "dola-static": Case(
        "dola-static:layer=1,renormalize=true,early_exit_norm=true",
        exits_with(static_dola, (1,), norm=True, renormalize=True),
    ),
    "sled": Case(
        "sled:candidates=0..1,scale=20,rate=2,early_exit_norm=true",
        sled_with((0, 1), norm=True, scale=20, rate=2.0),
    ),
    "end": Case(
        "end:candidates=0..1",
        of_exits(
            end,
            (0, 1),
            scoring={"weight": 0.25, "with_last": True, "alpha": 0.0},
            generating={"weight": 1.0, "with_last": False, "alpha": 0.01},
        ),
    ),
    "delta": Case(
        "delta:virtual_layer=4",
        of_exits(
            delta,
            (0, 1),
            norm=True,
            scoring={"alpha": 0.0},
            generating={"alpha": 0.1},
            layers=(0, 1, 2),
            virtual_layer=4.0,
        ),
    ),
    "activation-decoding": Case("activation-decoding:weight=2", activation_decoding_with(1, weight=2.0)),
    "activation-decoding, normed": Case(
        "activation-decoding:layer=1,early_exit_norm=true,weight=3",
        activation_decoding_with(1, norm=True, weight=3.0),
    ),
    "activation-decoding, last": Case(
        "activation-decoding:layer=2,weight=3,alpha=0.05",
        lambda w, x, start, task: activation_decoding_with(LAYERS, weight=3.0)(
            w, x, start, task | {"alpha": 0.05}
        ),
    ),
    "iti": Case(
        f"iti:directions={{directions}},heads={HEADS},alpha={ALPHA_ITI}",
        lambda w, x, start, _: log_softmax(baked(w, x, start).final),
    ),
    "steer": Case(
        "steer:vectors={vectors},strength=-1.5",
        lambda w, x, start, _: hooked(w, x, start, strength=-1.5, layers=(0, 1), scope="answer"),
    ),
    "steer, prompt": Case(
        "steer:vectors={vectors},strength=2,layers=0,scope=prompt",
        lambda w, x, start, _: hooked(w, x, start, strength=2, layers=(0,), scope="prompt"),
    ),
    "steer, all": Case(
        "steer:vectors={vectors},strength=4,layers=0..1,scope=all,keep_norm=true",
        lambda w, x, start, _: hooked(w, x, start, strength=4, layers=(0, 1), scope="all", keep_norm=True),
    ),
    "cad": Case("cad:alpha=0.5", contexts_with(cad, alpha=0.5)),
    "adacad": Case("adacad:floor=0.1", contexts_with(adacad, floor=0.1)),
    "coiecd": Case("coiecd:ratio=3", contexts_with(coiecd, ratio=3.0)),
}


@pytest.fixture
def compiled_fast():
    """Tiny programs run for milliseconds and are compiled for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def every_case(test):
    return pytest.mark.usefixtures("compiled_fast")(pytest.mark.parametrize("name", CASES)(test))


TASKS = {
    False: {"alpha": 0.0, "implausible": -1000.0},
    True: {"alpha": 0.1, "implausible": -np.inf},
}


def prepared(world, name, *, generating):
    text = CASES[name].settings.format(**world.references)
    if CASES[name].units:
        return streams.Models.of(world.weights["units"][0], world.config), parse_method(text)
    return world.lm.prepare(text, generating=generating)


def numbers(n, seed):
    return tuple(random_tokens(n, seed=seed).tolist())


def test_every_method_has_a_case(world):
    methods = [parse_method(case.settings.format(**world.references)) for case in CASES.values()]
    assert {method.settings()["name"] for method in methods} == set(REGISTRY)


@every_case
def test_scores_equal_recomputation_without_cache(world, name):
    groups = []
    for i in range(3):
        prompt, first, second = numbers(2 + 3 * i, 10 + i), numbers(3, 20 + i), numbers(4, 30 + i)
        answers = (first, first + second, second, first[:1] + second)
        prompt, other = (5, 6, 7, *prompt), without_context((5, 6, 7, *prompt))
        groups.append([Continuation((*prompt, *a), len(prompt), other_prompts=(other,)) for a in answers])
    models, method = prepared(world, name, generating=False)
    results = dict(score(models, world.config, groups, method, row_length=24, rows_per_batch=2))
    for i, group in enumerate(groups):
        for actual, item in zip(results[i].scores, group, strict=True):
            expected = CASES[name].scores(world, item.tokens, item.start, TASKS[False])
            places = np.arange(item.start, len(item.tokens))
            expected = expected[places - 1, np.asarray(item.tokens)[places]]
            assert_scores(actual, expected, atol=1e-4)


# Their number, and that of new tokens, is the same in all tests: a shape is compiled once.
PROMPTS = [numbers(1 + (7 * i + 3) % 24, i) for i in range(32)]


def generated(world, name, prompts=PROMPTS, **kwargs):
    models, method = prepared(world, name, generating=True)
    return generate(
        models,
        world.config,
        prompts,
        method=method,
        other_prompts=[[*map(without_context, prompts)]],
        max_new_tokens=6,
        chunk_size=5,
        **kwargs,
    )


@every_case
def test_generation_equals_recomputation_without_cache(world, name):
    actual = generated(world, name)
    for prompt, new in list(zip(PROMPTS, actual, strict=True))[:3]:
        row = prompt
        for _ in new:
            scores = CASES[name].scores(world, row, len(prompt), TASKS[True])
            row += (int(np.argmax(scores[-1])),)
        assert list(row[len(prompt) :]) == new
    base = generate(world.lm.model, world.config, PROMPTS, max_new_tokens=6, chunk_size=5)
    assert sum(a != b for a, b in zip(actual, base, strict=True)) > 3


@every_case
def test_a_row_does_not_depend_on_others_or_on_padding(world, name):
    some = PROMPTS[::4]
    models, method = prepared(world, name, generating=False)
    method = method.resolve(world.config, generating=False)

    @jax.jit
    def next_scores(tokens, mask):
        _, B, T = tokens.shape
        last = T - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
        caches = streams.empty_caches(models, method, B, T)
        answer = jnp.arange(T) == last[..., None]
        hidden, _ = streams.run(models, method, tokens, attention_mask=mask, answer=answer, caches=caches)
        entropies = streams.entropies(streams.prompt_sums(models, method, hidden, mask))
        hidden = [
            jax.tree.map(lambda x, last=last[stream.prompt]: x[..., jnp.arange(B), last, :], states)
            for states, stream in zip(hidden, method.streams, strict=True)
        ]
        return method.scores(streams.logits_of(models, method, hidden, entropies))

    def scores(rows, side):
        every_prompt = [rows, [*map(without_context, rows)]][: streams.num_prompts(method)]
        tokens = np.zeros((len(every_prompt), len(rows), 24), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for number, prompts in enumerate(every_prompt):
            for i, row in enumerate(prompts):
                place = slice(24 - len(row), None) if side == "left" else slice(len(row))
                tokens[number, i, place], mask[number, i, place] = row, True
        return np.asarray(next_scores(tokens, mask))

    left, right = scores(PROMPTS, "left"), scores(PROMPTS, "right")
    alone = np.concatenate([scores([row], "right") for row in some])
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone, left[::4], rtol=1e-5, atol=1e-5)

    tokens = generated(world, name)
    assert generated(world, name, padding_side="right") == tokens
    assert [generated(world, name, [row])[0] for row in some] == tokens[::4]


def test_an_adapter_of_the_same_base_shares_its_weights(world):
    """Two rows of one batch give what the merged adapter gives as a second model."""
    groups = [[Continuation(numbers(9, i), 4) for i in range(3)]]
    models, shared = prepared(world, "icd, adapter", generating=False)
    assert shared.shared
    assert len(models.weights) == len(streams.empty_caches(models, shared, 1, 8)) == 1
    second, config = world.weights["adapter"]
    both = streams.Models((world.weights["base"][0], second), (world.config, config))
    apart = dataclasses.replace(shared, shared=False)
    results = [
        np.concatenate(next(score(m, world.config, groups, method))[1].scores)
        for m, method in ((models, shared), (both, apart))
    ]
    np.testing.assert_allclose(*results, atol=1e-4)
    assert np.abs(results[0]).max() > 0.1

    models, method = prepared(world, "icd", generating=False)
    assert not method.shared
    assert len(models.weights) == 2


def test_the_base_of_an_adapter_may_be_written_in_another_way(world, tmp_path):
    base = world.lm.base.reference
    (tmp_path / "link").symlink_to(base)
    for number, name in enumerate(
        [f"{base}/", f"{base}/../{os.path.basename(base)}", str(tmp_path / "link")]
    ):
        adapter = random_adapter(tmp_path / str(number), world.config, name)
        models, method = world.lm.prepare(f"icd:anti_expert={adapter}", generating=False)
        assert method.shared
        assert len(models.weights) == 1


def test_resources_are_loaded_once(world, monkeypatch):
    lm = dataclasses.replace(world.lm, _loaded={})
    loads = []

    def load(lm, resource):
        loads.append(resource.reference)
        return world.lm.load_resource(lm, resource)

    lm = dataclasses.replace(lm, load_resource=load)
    for settings in ("cd:amateur={cut}", "cd:amateur={cut},alpha=0.2", "cd:amateur={second}"):
        lm.prepare(settings.format(**world.references), generating=False)
    assert loads == [world.references["cut"], world.references["second"]]


def test_methods_of_a_bfloat16_model_share_its_units(tiny_imae):
    """Units are float32 and cast for decoding: once, so that streams are shared."""
    lm = load_model(str(tiny_imae.directory), dtype="bfloat16")
    prepared = [lm.prepare(method, generating=False) for method in ("base", "in-model-contrast", "1")]
    assert prepared[0][0].weights[0].units[0]["w_up"].dtype == jnp.bfloat16
    ((_, joint, members),) = share_streams(prepared)
    assert sorted(members) == [0, 1, 2]
    assert len(joint.streams) == 2, "base and anti-expert, each once"


def test_text_and_tokens_of_a_method_agree(world):
    """`LanguageModel` loads what a method names: its two calls are `generate` and `score` of tokens."""
    text = "cd:amateur={cut},alpha=0.3".format(**world.references)
    models, method = world.lm.prepare(text, generating=True)
    (row,) = generate(models, world.config, [(8, 9, 10)], method=method, max_new_tokens=6, eos_token_ids=(2,))
    assert world.lm.generate(["t8 t9 t10"], text, max_new_tokens=6) == [
        " " + world.lm.tokenizer.decode(row, skip_special_tokens=True)
    ]
    models, method = world.lm.prepare(text, generating=False)
    ((_, scored),) = score(models, world.config, [[Continuation((8, 9, 10, 11), 2)]], method)
    (total,) = world.lm.score("t8 t9", [" t10 t11"], text, format="raw")
    np.testing.assert_allclose(total, scored.scores[0].sum(), rtol=1e-6)


# Settings


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ("icd:anti_expert=out/icd/adapter", ICD("out/icd/adapter")),
        ("icd:anti_expert=a=b,beta=2,alpha=0.1", ICD("a=b", 2.0, alpha=0.1)),
        ("cd:amateur=model#layers=24, temperature=0.5", CD("model#layers=24", 0.5)),
        ("dola", DoLa()),
        ("dola:candidates=low,alpha=0,implausible=-inf", DoLa("low", alpha=0.0, implausible=-np.inf)),
        ("dola:candidates=0+2+4,renormalize=True", DoLa("0+2+4", renormalize=True)),
        ("dola:divergence=jensen-shannon,early_exit_norm=true", DoLa("high", "jensen-shannon", True)),
        ("dola-static:layer=8", StaticDoLa(8)),
        ("cd:amateur=m,beta=0.5", CD("m", beta=0.5)),
        ("prunecd:skip=10..14,beta=0.5", PruneCD("10..14", beta=0.5)),
        ({"name": "prunecd", "skip": [3, 5]}, PruneCD((3, 5))),
        ("dexperts:expert=a,anti_expert=b,weight=1", DExperts("a", "b", 1.0)),
        (
            "end:weight=3,candidates=16+18,with_last=false",
            END(weight=3.0, candidates="16+18", with_last=False),
        ),
        ("activation-decoding:layer=26,weight=0.8", ActivationDecoding(layer=26, weight=0.8)),
        ("delta:layers=28..30,virtual_layer=31.5", DeLTa(layers="28..30", virtual_layer=31.5)),
        ("sled:rate=2,scale=50,steps=1", SLED(rate=2.0, scale=50, steps=1)),
        ("iti:directions=file,alpha=15,heads=48", ITI("file", 15.0, 48)),
        ({"name": "iti", "directions": "file", "heads": 3}, ITI("file", heads=3)),
        (
            "steer:vectors=f,strength=-2,layers=8+9,scope=all,keep_norm=true",
            Steer("f", -2.0, "8+9", "all", True),
        ),
        ({"name": "steer", "vectors": "f", "layers": [8, 9]}, Steer("f", layers=(8, 9))),
        ({"name": "sled", "candidates": [0, 3], "steps": None}, SLED((0, 3))),
        ({"name": "sled", "candidates": (0, 3)}, SLED((0, 3))),
        ({"name": "dola", "candidates": 8, "alpha": 1}, DoLa("8", alpha=1.0)),
        (
            {"name": "cd", "amateur": "m", "alpha": 0.1, "implausible": -1000.0, "renormalize": True},
            CD("m", alpha=0.1, implausible=-1000.0, renormalize=True),
        ),
        (
            {"name": "sled", "candidates": "0..29", "scale": 10, "steps": 10, "lower_bound": -100},
            SLED("0..29", scale=10, steps=10, lower_bound=-100.0),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_methods_are_read_from_text_and_yaml(settings, method):
    parsed = parse_method(settings)
    assert parsed == method
    assert type(parsed) is type(method)
    types = [type(value) for value in dataclasses.astuple(parsed)]
    assert types == [type(value) for value in dataclasses.astuple(method)]
    assert hash(parsed) == hash(method)


ROUND = [
    Strength(-1.0),
    InModelContrast(2.0, alpha=0.1),
    ICD("m", 2.0),
    CD("m", renormalize=True),
    CD("m", beta=0.5),
    PruneCD("1", beta=0.5),
    DExperts("a", "b", 1.0, renormalize=False),
    DoLa("low", "jensen-shannon"),
    DoLa((0, 1)),
    StaticDoLa(1, implausible=-7.0),
    SLED("0+1", scale=9, renormalize=False),
    END(candidates="0+1"),
    DeLTa(),
    DeLTa(layers=(0, 2), virtual_layer=9.0),
    ActivationDecoding(),
    ITI("f", heads=3),
    Steer("f", layers=(0, 1), scope="prompt"),
]


@pytest.mark.parametrize("method", ROUND, ids=lambda method: method.name)
@pytest.mark.parametrize("task", ["unresolved", "scoring", "generating"])
def test_methods_are_built_again_from_their_settings(method, task):
    """From a dictionary, and from what results.json keeps of it."""
    assert method.streams, "before it is resolved, too: whether units act is asked then"
    if task != "unresolved":
        method = method.resolve(dataclasses.replace(TINY, num_layers=LAYERS), generating=task == "generating")
        assert (
            method.resolve(dataclasses.replace(TINY, num_layers=LAYERS), generating=task == "generating")
            == method
        )
    assert method.settings()["name"] in REGISTRY
    for settings in (method.settings(), json.loads(json.dumps(method.settings()))):
        again = parse_method(settings)
        assert again == method
        assert hash(again) == hash(method)


def test_settings_of_a_loaded_method_name_its_resource_again(world):
    _, method = prepared(world, "icd, adapter", generating=False)
    again = parse_method(method.settings())
    assert world.lm.prepare(again, generating=False)[1] == method


def fields(method, *names):
    return tuple(getattr(method, name) for name in names)


@pytest.mark.parametrize(
    "method", [InModelContrast(), ICD("m"), CD("m"), DoLa(), StaticDoLa()], ids=lambda m: m.name
)
def test_contrasts_are_plain_in_multiple_choice_and_masked_in_generation(method):
    names = ("alpha", "implausible", "renormalize")
    assert fields(method.resolve(TINY, generating=False), *names) == (0.0, -1000.0, False)
    assert fields(method.resolve(TINY, generating=True), *names) == (0.1, -np.inf, False)
    method = dataclasses.replace(method, alpha=0.2, implausible=-3.0, renormalize=True)
    for generating in (False, True):
        assert fields(method.resolve(TINY, generating=generating), *names) == (0.2, -3.0, True)


def test_sled_takes_ten_steps_in_multiple_choice_and_one_in_generation():
    names = ("steps", "lower_bound", "candidates", "rate", "scale", "renormalize")
    for generating, task in ((False, (10, -100.0)), (True, (1, -1000.0))):
        assert fields(SLED().resolve(TINY, generating=generating), *names) == (
            *task,
            (0, 1, 2),
            2.5,
            75,
            True,
        )
        kept = SLED(steps=3, lower_bound=-7.0).resolve(TINY, generating=generating)
        assert fields(kept, "steps", "lower_bound") == (3, -7.0)


@pytest.mark.parametrize(
    ("layers", "tied", "low", "high"),
    [
        (32, False, range(0, 16, 2), range(16, 32, 2)),
        (32, True, range(2, 16, 2), range(16, 32, 2)),
        (40, False, range(0, 20, 2), range(20, 40, 2)),
        (80, False, range(0, 20, 2), range(60, 80, 2)),
        (80, True, range(2, 20, 2), range(60, 80, 2)),
    ],
)
def test_buckets_of_layers(layers, tied, low, high):
    config = dataclasses.replace(TINY, num_layers=layers, tie_word_embeddings=tied)
    for candidates, expected in (
        ("low", low),
        ("high", high),
        ("all", range(layers)),
        ("3..5", (3, 4, 5)),
        ("8+2+8", (2, 8)),
        ("4", (4,)),
        ((9, 1), (1, 9)),
    ):
        for method, norm in itertools.product((DoLa, SLED), (False, True)):
            resolved = method(candidates, early_exit_norm=norm).resolve(config, generating=False)
            assert resolved.candidates == tuple(expected)
            assert resolved.streams == (Stream(exits=tuple(expected), exit_norm=norm),)


# What is refused


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ("dola:layer=3", ["dola", "'layer'", "candidates"]),
        ("icd:shared=true,anti_expert=m", ["icd", "'shared'", "anti_expert"]),
        ("dola:alpha=0.1,alpha=0.2", ["dola", "alpha", "twice"]),
        ("icd", ["icd", "anti_expert="]),
        ("cd", ["cd", "amateur="]),
        ("iti", ["iti", "directions="]),
        *(
            (f"{name},alpha={alpha}", [name.partition(":")[0], "alpha=", alpha])
            for name, alpha in itertools.product(
                ("icd:anti_expert=m", "cd:amateur=m", "dola:candidates=low", "dola-static:layer=1"),
                ("-0.1", "1.5", "nan"),
            )
        ),
        ("iti:directions=f,alpha=nan", ["iti", "alpha=", "nan"]),
        ("icd:anti_expert=m,beta=nan", ["icd", "beta=", "nan"]),
        ("in-model-contrast:anti_strength=inf", ["in-model-contrast", "anti_strength=", "inf"]),
        ("dola:alpha=much", ["dola", "alpha", "'much'"]),
        ("dola:implausible=0", ["dola", "implausible=0"]),
        ("dola:plausibility=odds", ["dola", "'odds'", "probability", "logit"]),
        ("dola:divergence=kl", ["dola", "'kl'", "published", "jensen-shannon"]),
        ("cd:amateur=m,temperature=0", ["cd", "temperature=0"]),
        ("cd:amateur=m,beta=0", ["cd", "beta=0"]),
        ("prunecd", ["prunecd", "skip="]),
        ("prunecd:skip=1,beta=-1", ["prunecd", "beta=-1"]),
        ("dexperts:expert=m", ["dexperts", "anti_expert="]),
        ("dexperts:anti_expert=m", ["dexperts", "expert="]),
        ("end:weight=nan", ["end", "weight=", "nan"]),
        ("delta:virtual_layer=inf", ["delta", "virtual_layer=", "inf"]),
        ("sled:scale=0", ["sled", "scale=0"]),
        ("sled:steps=0", ["sled", "steps=0"]),
        ("sled:rate=nan", ["sled", "rate=", "nan"]),
        ("sled:lower_bound=nan", ["sled", "lower_bound=", "nan"]),
        ("sled:steps=2.5", ["sled", "steps", "'2.5'"]),
        ({"name": "sled", "steps": 2.5}, ["sled", "steps", "2.5"]),
        ({"name": "dola", "candidates": [0, "x"]}, ["dola", "candidates"]),
        ("iti:directions=f,heads=0", ["iti", "heads=0"]),
        ("steer", ["steer", "vectors="]),
        ("steer:vectors=f,strength=inf", ["steer", "strength=", "inf"]),
        ("steer:vectors=f,scope=token", ["steer", "'token'", "answer, prompt, all"]),
        ("steer:vectors=f,keep_norm=2", ["steer", "keep_norm", "'2'"]),
        ("imae:gate_threshold=0.5", ["imae", "gate_threshold", "strength"]),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings, parts):
    with user_error(*parts):
        parse_method(settings)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ("dola:candidates=middle", ["dola", "candidates='middle'", "low", "high"]),
        ("dola:candidates=0+3", ["dola", "layer 3", "2"]),
        ("dola:candidates=-1", ["dola", "layer -1"]),
        ("dola:candidates=2..1", ["dola", "candidates='2..1'"]),
        ("end:candidates=0..3", ["end", "layer 3"]),
        ("activation-decoding:layer=0", ["activation-decoding", "layer 0", "3"]),
        ("activation-decoding:layer=4", ["activation-decoding", "layer 4", "3"]),
        ("prunecd:skip=0..1", ["prunecd", "layer 0", "3"]),
        ("prunecd:skip=4", ["prunecd", "layer 4", "3"]),
        ("prunecd:skip=1..3", ["prunecd", "skip='1..3'", "not all"]),
        ("prunecd:skip=2..1", ["prunecd", "skip='2..1'"]),
        ("prunecd:skip=high", ["prunecd", "skip='high'", "a..b"]),
        ("delta:layers=0..2", ["delta", "layers='0..2'", "3"]),
        ("delta:layers=3", ["delta", "layers='3'", "two"]),
        ("delta:layers=-1..3", ["delta", "layer -1"]),
        ("delta:layers=0..4", ["delta", "layers='0..4'", "3"]),
        ("delta:layers=high", ["delta", "layers='high'", "a..b"]),
        ("delta:virtual_layer=2.5", ["delta", "virtual_layer=2.5", "3"]),
        ("sled:candidates=0..3", ["sled", "layer 3"]),
        ("sled:candidates=0..999999999999", ["sled", "layer 3"]),
        ("sled:candidates=", ["sled", "candidates=''"]),
        ({"name": "sled", "candidates": []}, ["sled", "candidates"]),
        ("dola-static:layer=3", ["dola-static", "layer 3"]),
        (f"sled:scale={V + 1}", ["sled", f"scale={V + 1}", V]),
    ],
    ids=str,
)
def test_settings_that_contradict_the_model_are_refused(settings, parts):
    with user_error(*parts):
        parse_method(settings).resolve(TINY, generating=False)
    with user_error(*parts):
        generate(tiny_llama(), TINY, [[5, 6]], method=parse_method(settings), max_new_tokens=1)


@pytest.fixture(scope="module")
def misfits(world, tiny, tmp_path_factory):
    """Resources that do not fit the model, by name."""
    directory = tmp_path_factory.mktemp("misfits")
    wider = tiny("gqa", vocab_size=V + 1).directory
    narrower = dataclasses.replace(world.config, intermediate_size=48)
    deeper = dataclasses.replace(world.config, num_layers=LAYERS + 1)
    write_directions(directory / "deeper", random_directions(deeper))
    (directory / "garbage").write_bytes(b"no safetensors")
    paths = {
        "wider": wider,
        "narrower": random_adapter(directory / "narrower", narrower, world.lm.base.reference),
        "moved": random_adapter(directory / "moved", world.config, "/home/trainer/base"),
        "deeper": directory / "deeper",
        "garbage": directory / "garbage",
        "nothing": directory / "nothing",
        "directory": directory,
    }
    return world.references | {name: str(path) for name, path in paths.items()}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ("cd:amateur={wider}", ["amateur", "{wider}", "vocabulary"]),
        ("icd:anti_expert={wider}", ["anti_expert", "{wider}", "vocabulary"]),
        ("cd:amateur={nothing}", ["amateur", "{nothing}"]),
        ("dexperts:expert={second},anti_expert={adapter}", ["expert", "{second}", "no LoRA adapter of"]),
        ("dexperts:expert={adapter},anti_expert={nothing}", ["anti_expert", "{nothing}", "no LoRA adapter"]),
        ("dexperts:expert={adapter},anti_expert={narrower}", ["anti_expert", "{narrower}", "wrong shape"]),
        ("icd:anti_expert={nothing}", ["anti_expert", "{nothing}"]),
        ("icd:anti_expert={moved}", ["anti_expert", "{moved}", "say where it is in adapter_config.json"]),
        ("icd:anti_expert={narrower}", ["anti_expert", "{narrower}", "wrong shape"]),
        ("cd:amateur={cut}0", ["amateur", "{cut}0", LAYERS]),
        ("iti:directions={deeper}", ["directions", "{deeper}", (LAYERS, TINY.num_heads, TINY.head_dim)]),
        ("iti:directions={garbage}", ["directions", "{garbage}"]),
        ("iti:directions={nothing}", ["directions", "{nothing}"]),
        ("iti:directions={directory}", ["directions", "{directory}"]),
        ("iti:directions={directions},heads=9", ["iti", "heads=9", "8"]),
        ("steer:vectors={garbage}", ["vectors", "{garbage}", "not a GGUF file"]),
        ("steer:vectors={nothing}", ["vectors", "{nothing}", "does not exist"]),
        ("steer:vectors={directory}", ["vectors", "{directory}", "give one GGUF file"]),
        ("steer:vectors={vectors},layers=1+2", ["steer", "layers=1+2", "no direction.2", "0, 1"]),
        ("steer:vectors={vectors},layers=-1", ["steer", "layers=-1", "no direction.-1"]),
        ("steer:vectors={vectors},layers=1..0", ["steer", "layers=1..0"]),
        ("steer:vectors={vectors},layers=last", ["steer", "layers='last'", "all, a..b"]),
        ("steer:vectors={vectors},strength=0,noise=1", ["steer", "noise=1"]),
        ("expert", ["expert", "units"]),
        ("in-model-contrast", ["in-model-contrast", "units"]),
    ],
)
@pytest.mark.parametrize("generating", [False, True])
def test_resources_that_do_not_fit_are_refused(world, misfits, settings, parts, generating):
    with user_error(*(str(part).format(**misfits) for part in parts)):
        world.lm.prepare(settings.format(**misfits), generating=generating)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (CD("m"), ["cd", "second model", "prepare"]),
        (ICD("m"), ["icd", "second model", "prepare"]),
        (ICD("m", shared=True), ["icd", "adapter"]),
        (DExperts("a", "b"), ["dexperts", "adapter"]),
        (ITI("f"), ["iti", "directions"]),
        (Steer("f"), ["steer", "vectors"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_methods_without_their_resources_are_refused(method, parts):
    weights = tiny_llama().weights()
    with user_error(*parts):
        generate(weights, TINY, [[5, 6]], method=method, max_new_tokens=1)
    with user_error(*parts):
        list(score(weights, TINY, [[Continuation((5, 6, 7), 2)]], method))


def test_the_context_of_both_models_counts(world, tiny):
    short = str(tiny("gqa", num_hidden_layers=2, max_position_embeddings=16).directory)
    text = f"cd:amateur={short}"
    models, method = world.lm.prepare(text, generating=False)
    # The last token predicts nothing and needs no place.
    list(score(models, world.config, [[Continuation(numbers(17, 1), 4)]], method))
    with user_error("18", "16"):
        list(score(models, world.config, [[Continuation(numbers(18, 1), 4)]], method))
    models, method = world.lm.prepare(text, generating=True)
    assert len(generate(models, world.config, [numbers(12, 1)], method=method, max_new_tokens=4)[0]) == 4
    with user_error("12", "5", "16"):
        generate(models, world.config, [numbers(12, 1)], method=method, max_new_tokens=5)
