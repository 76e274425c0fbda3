"""In how many bits products are computed, read from the programs: float32 in all of its own, which is not the
default of accelerators, and halves in the default."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_tokens, tiny_llama
from helpers.training import UNITS, examples

from imae_jax.config import LoraConfig
from imae_jax.decode import Sampler, loop, scoring
from imae_jax.decode.methods.icd import ICD
from imae_jax.decode.methods.in_model_contrast import InModelContrast
from imae_jax.decode.streams import Models
from imae_jax.evaluate.probes import fit_probes
from imae_jax.llama import Weights
from imae_jax.losses import LossConfig
from imae_jax.sharding import make_mesh
from imae_jax.train.config import OptimizerConfig
from imae_jax.train.data import make_batch
from imae_jax.train.objectives import AnswerObjective, ImaeObjective
from imae_jax.train.step import init_state, make_optimizer, make_train_step, place_batch, state_shardings

DTYPES = [jnp.float32, jnp.bfloat16]


def check(lowered: jax.stages.Lowered, dtype: jnp.dtype, least: int) -> None:
    """All of the products of a program, of which there are `least` or more, are in the dtype's precision.

    Gradients of a half's float32 results, too: they are float32 times a half.
    """
    lines = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    found = [re.search(r"precision = \[(\w+), (\w+)\]", line).groups() for line in lines]
    assert len(found) >= least
    assert set(found) == {("HIGHEST",) * 2 if dtype == jnp.float32 else ("DEFAULT",) * 2}


def lower(function, *args, **kwargs):
    return function.trace(*args, **kwargs).lower(lowering_platforms=("tpu",))


def model_with_everything(dtype) -> Models:
    weights = tiny_llama(units=True).weights()
    random = np.random.default_rng(0)
    deltas = {"wq": {"a": random.normal(size=(32, 4)), "b": random.normal(size=(4, 4, 12))}}
    deltas = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), deltas)
    base = jax.tree.map(lambda x: x.astype(dtype), weights.base)
    return Models((dataclasses.replace(weights, base=base, lora=(deltas,) * TINY.num_layers),), (TINY,))


# Two streams of one row are the two rows that CPUs multiply one by one.
@pytest.mark.parametrize("method", [InModelContrast(), ICD("adapter", shared=True)], ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding(dtype, method):
    models, eos = model_with_everything(dtype), jnp.array([2])
    tokens = jnp.asarray(random_tokens(1, 8), jnp.int32)[None]
    args = models, tokens, jnp.ones(tokens.shape, bool), eos, np.int32(0)
    settings = {"method": method.resolve(TINY, generating=True), "sampler": Sampler()}
    # Attention's two, a layer's seven, the vocabulary.
    least = TINY.num_layers * 9 + 1
    check(lower(loop._prefill, *args, **settings, capacity=16), dtype, least)
    state = jax.eval_shape(lambda *args: loop._prefill(*args, **settings, capacity=16), *args)
    check(lower(loop._decode_chunk, models, state, eos, **settings, length=4), dtype, least)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scoring(dtype, monkeypatch):
    lowered = []

    def record(*args, **kwargs):
        lowered.append(lower(scored, *args, **kwargs))
        return scored(*args, **kwargs)

    scored = scoring._score_nodes
    monkeypatch.setattr(scoring, "_score_nodes", record)
    group = [scoring.Continuation((3, 4, 5, 6), 2)]
    assert len(list(scoring.score(model_with_everything(dtype), TINY, [group], InModelContrast()))) == 1
    check(lowered[0], dtype, TINY.num_layers * 9 + 1)


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("objective", ["units", "anti-expert LLM"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training(dtype, objective, remat):
    """Gradients inherit the precision of what they are gradients of."""
    mesh = make_mesh(data=jax.device_count())
    weights = tiny_llama(stacked=True).weights()
    frozen = Weights(jax.tree.map(lambda x: x.astype(dtype), weights.base))
    if objective == "units":
        objective = ImaeObjective(UNITS, LossConfig(), remat=remat)
    else:
        objective = AnswerObjective(LoraConfig(4), remat=remat)
    optimizer = make_optimizer(OptimizerConfig())
    shardings = state_shardings(TINY, objective, optimizer, mesh)
    state = init_state(TINY, objective, optimizer, shardings, 0)
    batch = place_batch(make_batch(examples(8), 1), mesh)
    step = make_train_step(TINY, objective, optimizer, shardings, mesh)
    check(step.lower(state, frozen, batch), dtype, 30)


def test_probes():
    x = jnp.zeros((2, 8, 4))
    check(lower(fit_probes, x, jnp.zeros(8, bool)), jnp.float32, 3)
