"""The decoder against transformers, and the anti-expert units against their definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    KINDS,
    TINY,
    TINY_GEMMA,
    UNIT_SIZE,
    assert_bitwise,
    hf_logits,
    import_torch,
    jit_forward,
    log_softmax,
    logits,
    random_tokens,
    stack,
    tiny_llama,
    user_error,
    with_random_units,
)
from flax import nnx

from imae_jax.anti_expert import AntiExpertUnits, parse_mode, unit_forward
from imae_jax.cache import KVCache
from imae_jax.config import AntiExpertConfig, LlamaConfig, RopeConfig
from imae_jax.layers import rope_inverse_frequencies
from imae_jax.llama import Taps, final_norm, project
from imae_jax.params import AntiExpertParam
from imae_jax.sharding import make_mesh, sharding, shardings_of

TEXTS = [
    "Q: Why does the moon look larger when it is close to the horizon?\n"
    "A: The moon is the same size wherever it stands in the sky. When it is low, trees and houses"
    " are beside it, and the mind judges it to be larger than it is. A coin held at arm's length"
    " covers it as well at midnight as at dusk, which anyone can try.",
    "def area(width, height):\n    return width * height\n\n"
    "Bread is made of flour, water, salt and yeast. In 1862, Louis Pasteur showed that living yeast"
    " makes dough rise; bakers had used it for 5,000 years without knowing why it worked, and"
    " nobody had asked. It's a slow business, but a warm one.",
]
PARITY = 2e-4
# One shape for most tests, so that they share compiled programs.
TOKENS = random_tokens(4, 16)
MIXED = np.asarray([1.0, 0.0, -1.0, 0.3], np.float32)


@pytest.fixture(scope="module")
def text_tokens(smollm2):
    return np.stack([ids[:64] for ids in smollm2.tokenizer(TEXTS)["input_ids"]])


@pytest.fixture(scope="module")
def stacked_smollm2(smollm2):
    return stack(smollm2.model.weights())


# Parity with transformers


def checkpoint_of(tiny, kind):
    # A context of 16 makes the tests' texts longer than what `dynamic` was trained for.
    return tiny(kind, max_position_embeddings=16) if kind == "rope_dynamic" else tiny(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(tiny, kind):
    checkpoint = checkpoint_of(tiny, kind)
    loaded, tokens = checkpoint.load(), random_tokens(2, 40)
    actual = logits(loaded.model.weights(), loaded.config, tokens)
    np.testing.assert_allclose(actual, hf_logits(checkpoint.hf, tokens), rtol=0, atol=PARITY)


def test_a_model_is_callable(tiny):
    model, tokens = tiny().load().model, random_tokens(2, 8)
    expected = hf_logits(tiny().hf, tokens)
    actual = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=PARITY)


def test_logits_of_smollm2_equal_transformers(smollm2, hf_smollm2, text_tokens):
    assert text_tokens.shape == (2, 64)
    actual = logits(smollm2.model.weights(), smollm2.config, text_tokens)
    np.testing.assert_allclose(actual, hf_logits(hf_smollm2, text_tokens), rtol=0, atol=PARITY)


@pytest.mark.parametrize("kind", ["gqa", "rope_dynamic", *FAMILIES])
def test_padded_rows_equal_transformers(tiny, kind):
    checkpoint = checkpoint_of(tiny, kind)
    loaded, tokens = checkpoint.load(), random_tokens(3, 24)
    weights, config = loaded.model.weights(), loaded.config
    lengths = [19, 22, 24]
    mask = np.arange(24)[None] >= 24 - np.asarray(lengths)[:, None]
    left = logits(weights, config, tokens, attention_mask=mask)
    rolled = np.stack([np.roll(row, n) for row, n in zip(tokens, lengths, strict=True)])
    right = logits(weights, config, rolled, attention_mask=mask[:, ::-1])
    for i, n in enumerate(lengths):
        # transformers keeps the `dynamic` RoPE of the longest text so far until a short one comes.
        hf_logits(checkpoint.hf, tokens[:1, :4])
        alone = hf_logits(checkpoint.hf, tokens[i : i + 1, 24 - n :])[0]
        np.testing.assert_allclose(left[i, 24 - n :], alone, rtol=0, atol=PARITY)
        np.testing.assert_allclose(right[i, :n], alone, rtol=0, atol=PARITY)
    other_padding = np.where(mask, tokens, 5)
    assert_bitwise(logits(weights, config, other_padding, attention_mask=mask)[mask], left[mask])


def test_bfloat16_is_as_close_to_float32_as_transformers(
    smollm2, stacked_smollm2, smollm2_hf_dir, hf_smollm2, text_tokens
):
    import torch
    from transformers import AutoModelForCausalLM

    exact = hf_logits(hf_smollm2, text_tokens)
    hf = AutoModelForCausalLM.from_pretrained(
        smollm2_hf_dir, dtype=torch.bfloat16, attn_implementation="eager"
    )
    reference = hf_logits(hf, text_tokens)
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stacked_smollm2)
    actual = logits(weights, smollm2.config, text_tokens)
    assert actual.dtype == np.float32

    def kl_from_exact(x):
        p = log_softmax(exact)
        return (np.exp(p) * (p - log_softmax(x))).sum(-1)

    assert kl_from_exact(actual).mean() <= 1.5 * kl_from_exact(reference).mean()
    # Where float32 leaves no doubt: a logit of 16 to 32 is rounded to 1/8 by transformers at the end.
    second, best = np.moveaxis(np.sort(exact, axis=-1)[..., -2:], -1, 0)
    clear = best - second > 0.5
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(actual.argmax(-1)[clear], exact.argmax(-1)[clear])


@pytest.mark.parametrize("length", [16, 17, 100])
@pytest.mark.parametrize("head_dim", [12, 64])
@pytest.mark.parametrize("kind", ["gqa", "rope_linear", "rope_dynamic", "rope_llama3"])
def test_rope_frequencies_equal_transformers(kind, head_dim, length):
    torch = import_torch()
    from transformers import LlamaConfig as HFLlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = HFLlamaConfig(**TINY.to_hf() | {"head_dim": head_dim} | KINDS[kind])
    hf.max_position_embeddings = 16
    rotary = LlamaRotaryEmbedding(hf)
    positions = torch.arange(length)[None]
    rotary(torch.zeros(1), positions)  # `dynamic` adapts to the longest text seen
    config = LlamaConfig.from_hf(hf.to_dict())
    actual = rope_inverse_frequencies(config, config.rope, jnp.asarray(positions))
    # float32 powers: a relative error of a few units in the last place, times log(theta).
    np.testing.assert_allclose(actual[0], rotary.inv_freq, rtol=2e-6)


def test_llama3_frequencies_cover_all_three_bands():
    """Llama 3.1's own numbers: short wavelengths stay, long ones are divided, some are between."""
    config, positions = dataclasses.replace(TINY, head_dim=128), jnp.zeros((1, 1))
    plain, scaled = (
        rope_inverse_frequencies(config, rope, positions)
        for rope in (RopeConfig(theta=5e5), RopeConfig("llama3", theta=5e5, factor=8.0))
    )
    ratio = np.asarray(plain / scaled)[0]
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(64) / 64)
    np.testing.assert_allclose(ratio[wavelengths < 8192 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelengths > 8192], 8, rtol=1e-6)
    between = ratio[(wavelengths > 8192 / 4) & (wavelengths < 8192)]
    assert len(between) > 1
    assert np.all(np.diff(between) > 0)
    assert 1 < between[0] < between[-1] < 8


# The layer loop


@pytest.mark.parametrize("config", [TINY, TINY_GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("stacked", [True, False])
def test_loops_and_cache_agree(config, stacked):
    weights, tokens = tiny_llama(config, units=True).weights(), TOKENS % config.vocab_size
    expected = logits(weights, config, tokens, strength=MIXED)
    weights = stack(weights) if stacked else weights
    actual = logits(weights, config, tokens, strength=MIXED)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=PARITY)

    cache, start = KVCache.empty(config, 4, 20, jnp.float32), 0
    for end in (12, 13, 14, 15, 16):
        output = jit_forward(weights, config, tokens[:, start:end], cache=cache, strength=MIXED)
        actual, cache = project(weights, output.hidden_states), output.cache
        np.testing.assert_allclose(actual, expected[:, start:end], rtol=0, atol=PARITY)
        start = end
    assert int(cache.length) == 16
    np.testing.assert_array_equal(cache.real, np.broadcast_to(np.arange(20) < 16, (4, 20)))


@functools.partial(jax.jit, static_argnames="remat")
def loss_and_gradients(units, weights, *, remat):
    def loss(units):
        changed = dataclasses.replace(weights, units=units)
        output = jit_forward(changed, TINY, jnp.asarray(TOKENS), strength=1.0, remat=remat)
        return jnp.mean(project(weights, output.hidden_states) ** 2)

    return jax.value_and_grad(loss)(units)


def test_units_and_deltas_in_the_bases_dtype_change_no_bit():
    weights = tiny_llama(units=True).weights()
    random = np.random.default_rng(0)
    deltas = {"wq": {"a": random.normal(size=(32, 4)), "b": random.normal(size=(4, 4, 12))}}
    deltas = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), deltas)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights.base)
    weights = dataclasses.replace(weights, base=base, lora=(deltas,) * TINY.num_layers)
    narrow = weights.in_one_dtype({})
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
    arguments = {"strength": jnp.array([-1.0, 0.7]), "adapter": 1.0}
    outputs = [jit_forward(x, TINY, jnp.asarray(TOKENS[:2]), **arguments) for x in (weights, narrow)]
    assert_bitwise(*(np.asarray(output.hidden_states.astype(jnp.float32)) for output in outputs))


@pytest.mark.parametrize("remat", ["full", "narrow", "dots"])
def test_rematerialization_changes_no_result(remat):
    weights = tiny_llama(units=True, stacked=True).weights()
    expected = loss_and_gradients(weights.units, weights, remat="none")
    actual = loss_and_gradients(weights.units, weights, remat=remat)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(e).max() > 1e-3
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4 * np.abs(e).max())


@pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices")
@pytest.mark.parametrize(
    ("config", "stacked"),
    [(dataclasses.replace(TINY, vocab_size=96), False), (TINY_GEMMA, False), (TINY_GEMMA, True)],
    ids=["llama", "gemma", "gemma-stacked"],
)
def test_a_mesh_changes_no_result(config, stacked):
    model = tiny_llama(config, units=True, stacked=stacked)
    tokens = jnp.asarray(random_tokens(8, 12, vocab_size=96))
    strength = jnp.linspace(-1, 1, 8)
    expected = logits(model.weights(), config, tokens, strength=strength)

    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    graphdef, state = nnx.split(model)
    state = jax.device_put(state, shardings_of(state, mesh))
    weights = nnx.merge(graphdef, state).weights()
    with jax.set_mesh(mesh):
        tokens = jax.device_put(tokens, sharding(mesh, "batch", "length"))
        output = jit_forward(weights, config, tokens, strength=strength)
    rows = sharding(mesh, "batch", "length", "act_embed")
    assert output.hidden_states.sharding.is_equivalent_to(rows, ndim=3)
    actual = project(weights, output.hidden_states)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=PARITY)


# Base mode


OVERFLOWING = "overflowing"


def units_of(kind, weights, config):
    weights = with_random_units(weights, config)
    if kind == OVERFLOWING:
        units = jax.tree.map(lambda x: x * 1e25, weights.units)
        weights = dataclasses.replace(weights, units=units)
    return weights


@pytest.mark.parametrize("units", ["random", OVERFLOWING])
@pytest.mark.parametrize("loop", ["scan", "remat", "unrolled", "cache"])
def test_base_mode_is_the_base_bit_for_bit(loop, units):
    plain = tiny_llama().weights()
    plain = stack(plain) if loop in ("scan", "remat") else plain
    weights = units_of(units, plain, TINY)
    kwargs = {
        "remat": {"remat": "full"},
        "cache": {"cache": KVCache.empty(TINY, 4, 16, jnp.float32)},
    }.get(loop, {})
    base = logits(plain, TINY, TOKENS, **kwargs)
    mixed = logits(weights, TINY, TOKENS, strength=MIXED, **kwargs)
    zeros = logits(weights, TINY, TOKENS, strength=np.zeros(4, np.float32), **kwargs)
    assert_bitwise(mixed[1], base[1])
    assert_bitwise(zeros, base)
    if loop in ("scan", "unrolled"):
        assert_bitwise(logits(weights, TINY, TOKENS, strength=None), base)
        assert_bitwise(logits(weights, TINY, TOKENS, strength=0.0), base)
    for i in (0, 2, 3):
        assert not np.isclose(mixed[i], base[i], atol=1e-3).all()
        assert np.isfinite(mixed[i]).all() == (units != OVERFLOWING)


@pytest.mark.parametrize(("stacked", "units"), [(False, OVERFLOWING), (True, "random")])
def test_base_mode_of_smollm2_is_the_base_bit_for_bit(smollm2, stacked_smollm2, text_tokens, stacked, units):
    plain = stacked_smollm2 if stacked else smollm2.model.weights()
    weights = units_of(units, plain, smollm2.config)
    base = logits(plain, smollm2.config, text_tokens)
    mixed = logits(weights, smollm2.config, text_tokens, strength=np.asarray([-1.0, 0.0]))
    zeros = logits(weights, smollm2.config, text_tokens, strength=np.zeros(2))
    assert_bitwise(zeros, base)
    assert_bitwise(mixed[1], base[1])
    assert not np.isclose(mixed[0], base[0], atol=1e-3).all()


# The units


def unit_reference(unit, h, strength):
    """METHODS: a = softmax(W_g h + b_g)[0];  o · W_down (silu(W_gate a h) · (W_up a h))."""
    unit = {name: np.asarray(array, np.float64) for name, array in unit.items()}
    h = np.asarray(h, np.float64)
    gate_logits = h @ unit["gate"] + unit["gate_bias"]
    a = 1 / (1 + np.exp(gate_logits[..., 1] - gate_logits[..., 0]))
    gated = a[..., None] * h
    inner = gated @ unit["w_gate"]
    inner = inner / (1 + np.exp(-inner)) * (gated @ unit["w_up"])
    return np.asarray(strength, np.float64)[:, None, None] * (inner @ unit["w_down"]), a


def test_unit_follows_its_definition():
    unit = tiny_llama(units=True).weights().units[1]
    h = np.random.default_rng(1).normal(size=(4, 7, TINY.hidden_size)).astype(np.float32)
    strength = np.asarray([-1.0, 1.0, 0.37, 2.5], np.float32)
    expected, expected_gate = unit_reference(unit, h, strength)
    actual, gate = jax.jit(unit_forward)(unit, jnp.asarray(h), jnp.asarray(strength))
    np.testing.assert_allclose(gate, expected_gate, rtol=1e-5)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_closed_gate_contributes_nothing():
    unit = tiny_llama(units=True).weights().units[0]
    closed = unit | {"gate": jnp.zeros_like(unit["gate"]), "gate_bias": jnp.asarray([-200.0, 0.0])}
    h = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, TINY.hidden_size)), jnp.float32)
    out, gate = unit_forward(closed, h, jnp.asarray([1.0, -1.0]))
    np.testing.assert_array_equal(gate, 0)
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("stacked", [True, False])
def test_units_act_beside_every_mlp(tiny, stacked):
    """Against transformers with the reference unit hooked onto the MLP of every layer."""
    import torch

    checkpoint = tiny("mlp_bias")
    loaded = checkpoint.load()
    weights = with_random_units(loaded.model.weights(), loaded.config)
    tokens, strength = random_tokens(3, 12), np.asarray([-1.0, 1.0, 0.4], np.float32)
    gates, hooks = [], []

    def hook(i):
        def add_unit(module, args, out):
            y, a = unit_reference(weights.units[i], args[0].numpy(), strength)
            gates.append(a)
            return out + torch.as_tensor(y).float()

        return checkpoint.hf.model.layers[i].mlp.register_forward_hook(add_unit)

    try:
        hooks += [hook(i) for i in range(loaded.config.num_layers)]
        expected = hf_logits(checkpoint.hf, tokens)
    finally:
        for handle in hooks:
            handle.remove()
    weights = stack(weights) if stacked else weights
    output = jit_forward(weights, loaded.config, tokens, strength=strength, taps=Taps(gates=True))
    actual = project(weights, output.hidden_states)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=PARITY)
    assert output.gates.dtype == jnp.float32
    np.testing.assert_allclose(output.gates, np.stack(gates), rtol=0, atol=1e-4)


@pytest.mark.parametrize("stacked", [True, False])
def test_mixed_strengths_equal_separate_passes(stacked):
    weights = tiny_llama(units=True, stacked=stacked).weights()
    mixed = log_softmax(logits(weights, TINY, TOKENS, strength=MIXED))
    for i, o in enumerate(MIXED):
        alone = log_softmax(logits(weights, TINY, TOKENS, strength=np.full(4, o)))[i]
        np.testing.assert_allclose(mixed[i], alone, rtol=1e-5, atol=1e-5)


def test_untrained_units_change_nothing():
    plain = tiny_llama(stacked=True).weights()
    units = AntiExpertUnits(TINY, AntiExpertConfig(UNIT_SIZE), rngs=nnx.Rngs(0), stack=TINY.num_layers)
    weights = dataclasses.replace(plain, units=nnx.to_pure_dict(nnx.state(units)))
    assert np.abs(weights.units["w_up"]).max() > 0.1
    actual = logits(weights, TINY, TOKENS, strength=MIXED)
    assert_bitwise(actual, logits(plain, TINY, TOKENS))


def test_units_and_base_are_told_apart_by_type():
    model = tiny_llama(units=True, stacked=True)
    _, units, base = nnx.split(model, AntiExpertParam, nnx.Param)
    assert set(nnx.to_pure_dict(units)) == {"units"}
    assert set(nnx.to_pure_dict(base)) == {"embed", "norm_final", "unembed", "layers"}


def test_strength_without_units_is_refused():
    with user_error("no anti-expert units"):
        jit_forward(tiny_llama().weights(), TINY, jnp.asarray(random_tokens(1, 4)), strength=-1.0)


@pytest.mark.parametrize(
    ("mode", "strength"),
    [("expert", -1.0), ("base", 0.0), ("anti-expert", 1.0), ("-0.25", -0.25), (0.5, 0.5)],
)
def test_modes_are_strengths(mode, strength):
    assert parse_mode(mode) == strength


@pytest.mark.parametrize("mode", ["exprt", "nan", "inf", ""])
def test_unknown_modes_are_refused(mode):
    with user_error(repr(mode), "anti-expert"):
        parse_mode(mode)


# Taps


@pytest.mark.parametrize("stacked", [True, False])
def test_hidden_layers_equal_transformers(tiny, stacked):
    import torch

    checkpoint = tiny()
    loaded = checkpoint.load(stacked=stacked)
    weights, config = loaded.model.weights(), loaded.config
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        hf = checkpoint.hf(torch.as_tensor(tokens), output_hidden_states=True)
    layers = (3, 0, 2, 1)
    output = jit_forward(weights, config, tokens, taps=Taps(hidden_layers=layers))
    assert output.gates is None
    for n, actual in zip(layers, output.hidden_layers, strict=True):
        # transformers norms the last one.
        actual = final_norm(weights, config, actual) if n == config.num_layers else actual
        np.testing.assert_allclose(actual, hf.hidden_states[n], rtol=0, atol=PARITY)


def test_taps_that_are_off_are_not_returned():
    output = jit_forward(tiny_llama(units=True).weights(), TINY, TOKENS, strength=MIXED)
    assert output.hidden_layers == ()
    assert output.gates is None
    assert output.cache is None
