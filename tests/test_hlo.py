"""What the compiled train step does on a mesh, read from its program: gathers, replicas, donation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.programs import gathered_shapes
from helpers.training import examples

from imae_jax.compiled import held_bytes
from imae_jax.config import AntiExpertConfig
from imae_jax.llama import Weights
from imae_jax.losses import LossConfig
from imae_jax.sharding import make_mesh
from imae_jax.train.config import OptimizerConfig
from imae_jax.train.data import make_batch
from imae_jax.train.objectives import ImaeObjective
from imae_jax.train.step import init_state, make_optimizer, make_train_step, place_batch, state_shardings

FSDP = TENSOR = 2


@pytest.fixture(scope="module")
def compiled(tiny):
    """The step on a 2×2×2 mesh, its state and base. Widths differ from one another and from the rest."""
    sizes = {"hidden_size": 64, "intermediate_size": 112, "vocab_size": 208, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 20}
    mesh = make_mesh(2, FSDP, TENSOR)
    lm = tiny("gqa", **sizes, **heads).load(stacked=True, mesh=mesh)
    objective = ImaeObjective(AntiExpertConfig(48), LossConfig())
    optimizer = make_optimizer(OptimizerConfig())
    shardings = state_shardings(lm.config, objective, optimizer, mesh)
    state = init_state(lm.config, objective, optimizer, shardings, 0)
    step = make_train_step(lm.config, objective, optimizer, shardings, mesh)
    base = lm.model.weights().base
    batch = place_batch(make_batch(examples(8), 1), mesh)
    return step.lower(state, Weights(base), batch).compile(), state, base


def test_no_weight_is_gathered_along_the_tensor_axis(compiled):
    """`fsdp` gathers a layer's weights along `embed` as it comes to it; `tensor` never does, and no
    stack of all layers is gathered."""
    program, state, base = compiled
    shapes = gathered_shapes(program.as_text())
    assert shapes, "fsdp gathers weights"
    weights = {**base["layers"], **state.trainable}
    tensor_sharded = {}
    for name, array in weights.items():
        L, *of_layer = array.shape
        local = array.sharding.shard_shape(array.shape)[1:]
        axes = [i for i, (n, m) in enumerate(zip(of_layer, local, strict=True)) if n != m]
        by_tensor = [i for i in axes if array.sharding.spec[i + 1] == "tensor"]
        if by_tensor:
            tensor_sharded[name] = tuple(of_layer)
            whole = [n if i not in by_tensor else n // TENSOR for i, n in enumerate(of_layer)]
            # The layer is seen to be gathered along fsdp alone, in whatever rank XLA gives it.
            assert any(np.prod(shape) == np.prod(whole) for shape in shapes), name
        gathered_stacks = [shape for shape in shapes if shape[0] == L and shape[1:] == tuple(of_layer)]
        assert gathered_stacks == [], name
    assert {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"} <= tensor_sharded.keys()
    for name, of_layer in tensor_sharded.items():
        forbidden = {of_layer, (1, *of_layer), tuple(reversed(of_layer))}
        assert not forbidden & set(shapes), name
    V, D = base["embed"].shape
    assert not any(sorted(shape) == sorted((V, D)) for shape in shapes)


def test_optimizer_state_is_sharded_as_its_weights(compiled):
    _, state, _ = compiled
    weights = {array.shape: array.sharding for array in state.trainable.values()}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(state.trainable)
    for moment in moments:
        assert moment.sharding.is_equivalent_to(weights[moment.shape], moment.ndim)
    replicated = [x for x in moments if x.size > 100 and x.sharding.is_fully_replicated]
    assert replicated == []


def test_the_state_is_updated_in_place(compiled):
    program, state, _ = compiled
    per_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes == per_device
    outputs = {int(i) for i in re.findall(r"\{(\d+)\}: \(\d+, \{\}, may-alias\)", program.as_text())}
    assert len(outputs) == len(jax.tree.leaves(state))


def test_bytes_of_a_program_count_what_it_updates_once(without_program_cache):
    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, x):
        return state + 1, x * 2

    state, x = jax.ShapeDtypeStruct((1000,), jnp.float32), jax.ShapeDtypeStruct((300,), jnp.float32)
    held = held_bytes(update.lower(state, x).compile())
    # Of results a program has a table besides.
    assert 4 * (1000 + 300 + 300) <= held < 4 * (1000 + 300 + 300) + 100
