"""Flash attention against softmax attention in NumPy and against the plain kind, and what it compiles to."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, TINY_GEMMA, assert_bitwise, random_tokens, tiny_llama, user_error
from flax import nnx

from imae_jax.cache import KVCache
from imae_jax.flash_attention import flash_attention
from imae_jax.llama import ATTENTION_KINDS, Interventions, Options, TreeLayout, Weights, forward
from imae_jax.sharding import make_mesh, sharding, shardings_of

pytestmark = pytest.mark.slow

# What runs here: the code for other devices, and the TPU's kernel as plain operations.
KERNELS = {
    "other": functools.partial(flash_attention, platform="cpu"),
    "tpu": functools.partial(flash_attention, platform="tpu", interpret=True),
}
# One model and one shape, which a mesh divides: the tests share compiled programs.
CONFIG = dataclasses.replace(TINY, vocab_size=96)
MISTRAL = dataclasses.replace(CONFIG, sliding_window=5, sliding_layers=(True,) * 3)
LENGTHS = np.asarray([16, 9, 1, 13, 2, 16, 8, 15])
TOKENS, REAL = random_tokens(8, 16, vocab_size=96), np.arange(16) < LENGTHS[:, None]

needs_8_devices = pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices")


def draw(batch, length, heads, kv_heads, head_dim=12, dtype=np.float32):
    """q, k, v and a cotangent of the output."""
    random = np.random.default_rng(0)
    q_shape, kv_shape = (batch, length, heads, head_dim), (batch, kv_heads, length, head_dim)
    return [jnp.asarray(random.normal(size=s), dtype) for s in (q_shape, kv_shape, kv_shape, q_shape)]


def output_and_gradients(attention, q, k, v, cotangent):
    out, vjp = jax.vjp(attention, q, k, v)
    return out, *vjp(cotangent)


def softmax_attention(q, k, v, cotangent, window=None):
    """Output and gradients in float64, a row and a head at a time."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    group, scale = q.shape[2] // k.shape[1], q.shape[3] ** -0.5
    unseen = np.triu(np.ones((q.shape[1],) * 2, bool), 1)
    if window is not None:
        unseen |= np.tril(np.ones((q.shape[1],) * 2, bool), -window)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        queries, keys, values, d_out = q[b, :, n], k[b, n // group], v[b, n // group], cotangent[b, :, n]
        weights = np.exp(np.where(unseen, -np.inf, queries @ keys.T * scale))
        weights /= weights.sum(-1, keepdims=True)
        out[b, :, n] = weights @ values
        d_weights = d_out @ values.T
        d_scores = scale * weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
        dq[b, :, n] = d_scores @ keys
        dk[b, n // group] += d_scores.T @ queries
        dv[b, n // group] += weights.T @ d_out
    return out, dq, dk, dv


def assert_close(actual, expected, tolerance=1e-5):
    """Relative to the largest value: elements are sums in which terms cancel."""
    assert actual.shape == expected.shape
    assert np.isfinite(np.asarray(actual, np.float32)).all()
    error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max()
    assert error <= tolerance * np.abs(np.asarray(expected, np.float64)).max()


# The kernels


# Two tokens, less than a block, one block of 384, two of 512 with padding, five of 128.
@pytest.mark.parametrize("length", [2, 100, 300, 1000, 640])
@pytest.mark.parametrize("kernel", KERNELS)
def test_output_and_gradients_equal_softmax_attention(kernel, length):
    arrays = draw(1 if length > 300 else 2, length, 4, 2)
    actual = jax.jit(functools.partial(output_and_gradients, KERNELS[kernel]))(*arrays)
    for x, reference in zip(actual, softmax_attention(*arrays), strict=True):
        assert_close(x, reference)


@pytest.mark.parametrize("window", [2, 5, 130, 400])
@pytest.mark.parametrize("kernel", KERNELS)
def test_windows(kernel, window):
    arrays = draw(1, 300, 4, 2)
    attention = functools.partial(KERNELS[kernel], window=window)
    actual = jax.jit(functools.partial(output_and_gradients, attention))(*arrays)
    for x, reference in zip(actual, softmax_attention(*arrays, window=window), strict=True):
        assert_close(x, reference)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_heads_share_keys_and_values(kernel, heads):
    arrays = draw(2, 40, *heads)
    actual = jax.jit(functools.partial(output_and_gradients, KERNELS[kernel]))(*arrays)
    for x, reference in zip(actual, softmax_attention(*arrays), strict=True):
        assert_close(x, reference)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_stays_bfloat16(kernel):
    arrays = draw(2, 40, 4, 2, dtype=jnp.bfloat16)
    actual = jax.jit(functools.partial(output_and_gradients, KERNELS[kernel]))(*arrays)
    for x, reference in zip(actual, softmax_attention(*arrays), strict=True):
        assert x.dtype == jnp.bfloat16
        assert_close(x, reference, tolerance=4 * 2.0**-8)


# The decoder


@functools.cache
def jit_gradient(kernel, remat="none", config=CONFIG):
    """(weights, tokens, real) → hidden states, and the gradient of a loss that reads real tokens alone."""

    def loss(parts, tokens, real):
        weights = Weights(*parts)
        kind = "plain" if kernel == "plain" else "flash"
        states = forward(
            weights,
            config,
            tokens,
            attention_mask=real,
            interventions=Interventions(strength=jnp.linspace(-1, 1, tokens.shape[0])),
            options=Options(remat=remat, attention=kind),
        ).hidden_states
        terms = states * jnp.cos(jnp.arange(states.shape[-1]))
        return jnp.sum(jnp.where(real[..., None], terms, 0)), states

    def run(weights, tokens, real):
        with pytest.MonkeyPatch.context() as patch:
            if kernel != "plain":
                patch.setattr("imae_jax.llama.flash_attention", KERNELS[kernel])
            gradient, states = jax.grad(loss, has_aux=True)((weights.base, weights.units), tokens, real)
        return states, gradient

    return jax.jit(run)


def assert_trees_close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        try:
            assert_close(x, y, tolerance)
        except AssertionError as error:
            raise AssertionError(jax.tree_util.keystr(path)) from error


@pytest.mark.parametrize(
    ("kernel", "remat", "config"),
    [
        ("other", "none", CONFIG),
        ("other", "dots", CONFIG),
        ("tpu", "full", CONFIG),
        ("tpu", "dots", CONFIG),
        ("other", "dots", TINY_GEMMA),
        ("tpu", "dots", TINY_GEMMA),
        ("tpu", "none", MISTRAL),
    ],
)
def test_flash_equals_plain_on_rows_padded_on_the_right(kernel, remat, config):
    weights = tiny_llama(config, units=True, stacked=True).weights()
    states, gradient = jit_gradient(kernel, remat=remat, config=config)(weights, TOKENS, REAL)
    expected_states, expected = jit_gradient("plain", config=config)(weights, TOKENS, REAL)
    assert np.isfinite(states).all()
    assert_close(np.asarray(states)[REAL], np.asarray(expected_states)[REAL])
    assert_trees_close(gradient, expected, 1e-4)


@pytest.mark.parametrize("config", [CONFIG, TINY_GEMMA], ids=["llama", "gemma"])
def test_the_loop_over_layers_takes_flash(config):
    run = jax.jit(forward, static_argnames=("config", "options"))
    weights = tiny_llama(config).weights()
    states, expected = (
        np.asarray(
            run(weights, config, TOKENS, attention_mask=REAL, options=Options(attention=kind)).hidden_states
        )
        for kind in ("flash", "plain")
    )
    assert_close(states[REAL], expected[REAL])


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_reaches_neither_real_tokens_nor_gradients(kernel):
    weights = tiny_llama(CONFIG, units=True, stacked=True).weights()
    run = jit_gradient(kernel, remat="dots")
    states, gradient = run(weights, TOKENS, REAL)
    other_states, other = run(weights, np.where(REAL, TOKENS, 5), REAL)
    assert_bitwise(np.asarray(states)[REAL], np.asarray(other_states)[REAL])
    assert not np.array_equal(states, other_states)
    assert_trees_close(gradient, other, 1e-6)


@needs_8_devices
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mesh_changes_no_gradient(kernel):
    model = tiny_llama(CONFIG, units=True, stacked=True)
    expected_states, expected = jit_gradient("plain")(model.weights(), TOKENS, REAL)

    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    graphdef, state = nnx.split(model)
    state = jax.device_put(state, shardings_of(state, mesh))
    weights = nnx.merge(graphdef, state).weights()
    with jax.set_mesh(mesh):
        tokens, real = (jax.device_put(x, sharding(mesh, "batch", "length")) for x in (TOKENS, REAL))
        states, gradient = jit_gradient(kernel, "dots")(weights, tokens, real)
    assert states.sharding.is_equivalent_to(sharding(mesh, "batch", "length", "act_embed"), ndim=3)
    assert_close(np.asarray(states)[REAL], np.asarray(expected_states)[REAL])
    assert_trees_close(gradient, expected, 1e-4)


@needs_8_devices
@pytest.mark.parametrize("kernel", KERNELS)
def test_devices_work_on_their_own_rows_and_heads(kernel):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    heads = sharding(mesh, "batch", None, "act_heads", None)
    kv_heads = sharding(mesh, "batch", "act_heads", None, None)
    q, k, v, cotangent = draw(4, 100, 4, 2)
    arrays = [jax.device_put(x, s) for x, s in ((q, heads), (k, kv_heads), (v, kv_heads), (cotangent, heads))]
    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(output_and_gradients, KERNELS[kernel])).lower(*arrays).compile()
        actual = compiled(*arrays)
    assert not re.search(r"all-(gather|reduce|to-all)|collective-permute", compiled.as_text())
    for x, layout in zip(actual, (heads, heads, kv_heads, kv_heads), strict=True):
        assert x.sharding.is_equivalent_to(layout, ndim=4)
    for x, reference in zip(actual, softmax_attention(q, k, v, cotangent), strict=True):
        assert_close(x, reference)


# Lowering for devices that are not here


@pytest.fixture
def cudnn(monkeypatch):
    """Lets JAX trace cuDNN's kernel on a machine without it."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91002)


def lowered_gradient(
    monkeypatch, platform, *, attention="flash", dtype=jnp.bfloat16, head_dim=16, mesh=None, config=CONFIG
):
    """The program of a scan with remat over 384 tokens for a platform, as text."""
    config = dataclasses.replace(config, head_dim=head_dim)
    model = tiny_llama(config, stacked=True)
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: x.astype(dtype), state)
    if mesh is not None:
        state = jax.device_put(state, shardings_of(state, mesh))
    weights = nnx.merge(graphdef, state).weights()
    kernel = functools.partial(flash_attention, platform=platform)
    monkeypatch.setattr("imae_jax.llama.flash_attention", kernel)

    def loss(base, tokens):
        output = forward(Weights(base), config, tokens, options=Options(remat="dots", attention=attention))
        return jnp.sum(output.hidden_states.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss)).trace(weights.base, jnp.zeros((8, 384), jnp.int32))
    return traced.lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),)).as_text()


@needs_8_devices
@pytest.mark.parametrize("spread", [False, True], ids=["one device", "mesh"])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_training_step_lowers_for_accelerators(cudnn, monkeypatch, platform, spread):
    mesh = make_mesh(data=2, fsdp=2, tensor=2) if spread else None
    with jax.set_mesh(mesh) if spread else contextlib.nullcontext():
        text = lowered_gradient(monkeypatch, platform, mesh=mesh)
        plain = lowered_gradient(monkeypatch, platform, attention="plain", mesh=mesh)
    kernels = {"gpu": ["__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("], "tpu": ["@tpu_custom_call("]}
    for kernel in kernels[platform]:
        assert kernel in text
        assert kernel not in plain
    # TPU: the forward pass, and again for the gradient, which is two kernels.
    assert len(re.findall(r"@(tpu_custom_call|__cudnn\$fmha\w+)\(", text)) == {"gpu": 3, "tpu": 4}[platform]
    # 8 rows of 4 heads, or 2 rows of 2 heads on each of 8 devices.
    assert re.search(r"x384x384x(f32|bf16)", plain)
    assert not re.search(r"384x384x", text)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_training_step_with_windows_lowers_for_accelerators(cudnn, monkeypatch, platform):
    text = lowered_gradient(monkeypatch, platform, config=TINY_GEMMA)
    # Layers of both kinds are in the scan's body.
    assert len(re.findall(r"@(tpu_custom_call|__cudnn\$fmha\w+)\(", text)) == {"gpu": 6, "tpu": 8}[platform]
    assert not re.search(r"384x384x", text)


# Errors


def test_unknown_kinds_are_refused():
    assert ATTENTION_KINDS == ("plain", "flash")
    with user_error("attention", "'flsh'", "plain or flash"):
        Options(attention="flsh")


@pytest.mark.parametrize("argument", ["cache", "tree"])
def test_flash_takes_neither_cache_nor_mask(argument):
    value = {
        "cache": KVCache.empty(CONFIG, 8, 16, jnp.float32),
        "tree": TreeLayout(jnp.zeros((8, 16), int), jnp.ones((8, 16, 16), bool)),
    }[argument]
    with user_error("attention=flash", "attention=plain"):
        forward(
            tiny_llama(CONFIG).weights(),
            CONFIG,
            TOKENS,
            options=Options(attention="flash"),
            **{argument: value},
        )


def test_what_the_kernels_do_not_take_is_refused(cudnn, monkeypatch):
    with user_error("attention=flash", "float16", "dtype=bfloat16", "attention=plain"):
        lowered_gradient(monkeypatch, "tpu", dtype=jnp.float16)
    for platform in ("gpu", "tpu"):
        with user_error("attention=flash", "float32", "dtype=bfloat16", "attention=plain"):
            lowered_gradient(monkeypatch, platform, dtype=jnp.float32)
    with user_error("attention=flash", "multiple of 8", "12", "attention=plain"):
        lowered_gradient(monkeypatch, "gpu", head_dim=12)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is there")
def test_without_cudnn_flash_is_refused(monkeypatch):
    with user_error("attention=flash", "cuDNN", "attention=plain"):
        lowered_gradient(monkeypatch, "gpu")
