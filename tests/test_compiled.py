"""What XLA's compilers for TPUs and GPUs make of our programs. Nothing runs on such a device."""

import functools
import importlib.util
import json
import math

import jax
import pytest
from conftest import TINY

from imae_jax.compiled import COLLECTIVES, Program
from imae_jax.convert.random_model import abstract_model
from imae_jax.decode import Continuation, scoring
from imae_jax.decode.loop import compile_programs
from imae_jax.sharding import make_mesh
from imae_jax.targets import TARGETS, abstract_devices
from imae_jax.train import plan as plan_module
from imae_jax.train.config import load_config
from imae_jax.train.setup import run_mesh

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("without_program_cache")]

# The widths are what matters; both layers are alike.
LAYERS = 2
LLAMA = f"meta-llama/Llama-2-7b-chat-hf#layers={LAYERS}"
PROMPT, NEW = 32, 64
METHODS = ("base", "expert", "in-model-contrast", "icd:anti_expert=adapter")


def on(*names: str):
    """For every target, skipped where its compiler is not installed."""

    def param(name):
        absent, reason = TARGETS[name].compiler is None, f"[{TARGETS[name].extra}] is not installed"
        return pytest.param(name, marks=pytest.mark.skipif(absent, reason=reason))

    return pytest.mark.parametrize("target", [param(name) for name in names])


def skip_without(target: str):
    if TARGETS[target].compiler is None:
        pytest.skip(f"[{TARGETS[target].extra}] is not installed")


def prepare(target, reference, name="base", *, dtype="bfloat16", tensor=1, generating=True):
    devices = abstract_devices(target, tensor)
    mesh = make_mesh(tensor=tensor, devices=devices) if tensor > 1 else None
    units = name in ("expert", "in-model-contrast", "0.5")
    lm = abstract_model(reference, dtype=dtype, units=units, devices=devices, mesh=mesh)
    return lm.prepare(name, generating=generating)


def nbytes(tree) -> int:
    """On one device."""
    shards = (x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(tree))
    return sum(math.prod(s) * x.dtype.itemsize for s, x in zip(shards, jax.tree.leaves(tree), strict=True))


@functools.cache
def decoding(target, name, tensor=1, rows=1):
    """The program of a chunk, what it reads at best at every token, and its caches, in bytes."""
    models, method = prepare(target, LLAMA, name, tensor=tensor)
    chunk = compile_programs(models, method, rows, PROMPT, NEW).chunk
    weights = nbytes(models.weights) - nbytes(models.weights[0].base["embed"])
    config = models.configs[0]
    slots = rows * len(method.streams) * (PROMPT + NEW) * config.num_kv_heads // tensor
    caches = 2 * config.num_layers * slots * config.head_dim * 2
    return chunk, weights + caches, caches


@on("v5e", "v6e", "h200")
@pytest.mark.parametrize("name", METHODS)
def test_a_decoded_token_reads_every_weight_once(target, name):
    chunk, at_best, caches = decoding(target, name)
    program = Program(chunk.as_text())
    width = 4096
    # No copy, transpose or conversion of a weight.
    assert program.written(program.loop, least=2 * width * width) == []
    # A TPU may keep a matrix in its fast memory from token to token.
    assert at_best * 0.9 < program.bytes_read(program.loop) < at_best * 1.03
    assert chunk.memory_analysis().alias_size_in_bytes >= caches
    assert not program.collectives(program.loop)
    assert "f64[" not in program.text


@on("h200")
def test_kernels_of_a_decoded_token(target):
    kernels = {name: Program(decoding(target, name)[0].as_text()) for name in METHODS}
    base, expert, contrast, icd = (program.kernels(program.loop) for program in kernels.values())
    assert base <= 17 * LAYERS + 20
    assert expert <= base + 5 * LAYERS
    assert contrast <= 1.5 * base
    assert icd <= 2.5 * base


one_row_on_gpus = pytest.mark.xfail(
    strict=True,
    reason="XLA's GPU compiler makes a slice of the lookup of one token, and gathers the embeddings for it",
)


@pytest.mark.parametrize(
    ("target", "tensor", "rows"),
    [
        ("v5p", 4, 1),
        ("h200", 8, 4),
        pytest.param("h200", 8, 1, marks=one_row_on_gpus),
    ],
)
def test_a_tensor_parallel_token_exchanges_activations_alone(target, tensor, rows):
    skip_without(target)
    chunk, _, caches = decoding(target, "base", tensor, rows)
    program = Program(chunk.as_text())
    assert set(program.collectives(program.loop)) == {"all-reduce"}
    large = [
        x
        for x in program.within(program.loop)
        if x.opcode.removesuffix("-start") in COLLECTIVES and max(a.nbytes for a in x.results) >= 4096
    ]
    if rows > 1:
        assert program.written(program.loop, least=2 * 4096 * 4096 // tensor) == []
    # Of each layer attention's output and the MLP's; and the embedding, of which each device has some rows.
    assert len(large) <= 2 * LAYERS + 1
    # The highest score, its index, whether all are finite.
    assert program.collectives(program.loop)["all-reduce"] <= len(large) + 3
    assert chunk.memory_analysis().alias_size_in_bytes >= caches


@on("v5e", "v6e", "h200")
@pytest.mark.parametrize(
    "name",
    [
        "0.5",
        "cd:amateur={small}",
        "prunecd:skip=1",
        "dexperts:expert=adapter,anti_expert=adapter",
        "dola",
        "sled:scale=2",
        "end",
        "delta",
        "activation-decoding",
        "iti:directions=random",
        "steer:vectors=random,keep_norm=true",
        "cad",
    ],
)
def test_other_methods_compile(target, name, small):
    models, method = prepare(target, small, name.format(small=small))
    programs = compile_programs(models, method, 2, PROMPT, NEW)
    assert "f64[" not in programs.prefill.as_text() + programs.chunk.as_text()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A model that 8 devices divide, with widths that fill a TPU's registers."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1024, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    path = tmp_path_factory.mktemp("small")
    (path / "config.json").write_text(
        json.dumps(TINY.to_hf() | sizes | heads | {"max_position_embeddings": 512})
    )
    return str(path)


@on("v5e", "h200")
def test_float32_is_multiplied_in_float32(target, small):
    models, method = prepare(target, small, dtype="float32")
    text = compile_programs(models, method, 4, PROMPT, NEW).chunk.as_text()
    products = [line for line in text.splitlines() if " dot(" in line or " convolution(" in line]
    assert len(products) >= 4 * LAYERS  # Some are merged.
    assert [line for line in products if "operand_precision={highest,highest}" not in line] == []


@on("v5e", "v6e", "h200")
def test_the_scorer_compiles(target, small, tiny, monkeypatch):
    calls = []
    score_nodes = scoring._score_nodes

    def record(*arguments, **settings):
        calls.append((arguments, settings))
        return score_nodes(*arguments, **settings)

    monkeypatch.setattr(scoring, "_score_nodes", record)
    lm = tiny("gqa").load()
    models, method = lm.prepare("sled:scale=2", generating=False)
    assert len(list(scoring.score(models, lm.config, [[Continuation((3, 4, 5, 6), 2)]], method))) == 1
    ((arguments, settings),) = calls
    device = jax.sharding.SingleDeviceSharding(abstract_devices(target, 1)[0])
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), arguments)
    assert "f64[" not in score_nodes.lower(*arguments, **settings).compile().as_text()


def train_step(target, small, monkeypatch, *settings, devices=1):
    """The compiled step of units that are large beside activations, in bfloat16, and its plan."""
    compiled = []

    def temporaries(lowered, mesh):
        compiled.append(lowered.compile())
        return compiled[-1].memory_analysis().temp_size_in_bytes

    monkeypatch.setattr(plan_module, "_temporaries", temporaries)
    sizes = ["units.intermediate_size=16384", "data.max_length=32", "batch_size=8", "dtype=bfloat16"]
    config = load_config(None, [f"model={small}", "out=unused", "remat=full", *sizes, *settings])
    (stage,) = plan_module.plan(config, run_mesh(config, False, abstract_devices(target, devices)))
    return compiled[0], stage


@pytest.mark.parametrize(
    ("target", "mesh"),
    [
        ("v5e", {}),
        ("v6e", {}),
        ("v5p", {"fsdp": 4}),
        ("v5p", {"tensor": 4}),
        ("v5p", {"fsdp": 2, "tensor": 2}),
        ("h200", {}),
        ("h200", {"fsdp": 8}),
        ("h200", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_a_train_step_holds_its_state_once(target, mesh, small, monkeypatch):
    """On one TPU with its own attention."""
    skip_without(target)
    flash = not mesh and TARGETS[target].gpu is None
    settings = [f"attention={'flash' if flash else 'plain'}", *(f"mesh.{k}={v}" for k, v in mesh.items())]
    devices = math.prod(mesh.values())
    compiled, stage = train_step(target, small, monkeypatch, *settings, devices=devices)
    state, memory, text = stage.trainable + stage.optimizer, compiled.memory_analysis(), compiled.as_text()
    assert state <= memory.alias_size_in_bytes <= state * 1.01
    # Gradients and activations, under fsdp one layer's units whole, and no second state.
    fsdp = mesh.get("fsdp", 1)
    whole = stage.trainable * fsdp // LAYERS if fsdp > 1 else 0
    assert memory.temp_size_in_bytes < stage.gradients + whole + state
    assert "f64[" not in text
    assert ("splash" in text) == flash


@on("h200")
@pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="nvidia-cudnn-cu12 is not installed")
def test_flash_attention_on_gpus_is_cudnns(target, small, monkeypatch):
    compiled, _ = train_step(target, small, monkeypatch, "attention=flash")
    assert "__cudnn$fmha" in compiled.as_text()
