"""A model spread over 8 virtual devices generates and scores as on one, by every method."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import error_of, random_tokens, user_error, with_random_units, write_questions
from flax import nnx
from helpers.models import random_adapter, random_directions, random_vectors
from helpers.programs import gathered_shapes

from imae_jax.activations import capture
from imae_jax.config import AntiExpertConfig
from imae_jax.convert import load_model
from imae_jax.convert.control_vector import write_vectors
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.convert.iti import write_directions
from imae_jax.convert.random_model import RANDOM_ADAPTER, random_model
from imae_jax.decode import Sampler, generate, loop, score, windows
from imae_jax.decode.joint import Joint, share_streams
from imae_jax.decode.scoring import Continuation
from imae_jax.evaluate.inspector.compute import Excerpt, inspect
from imae_jax.evaluate.runner.divergence import measure
from imae_jax.evaluate.truthfulqa import main as truthfulqa
from imae_jax.generate import main as generate_command
from imae_jax.sharding import AUTO, model_mesh, sharding, use_mesh

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices")

MESHES = ["tensor=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2"]
# 8 divides them, and no weight is as large as half of another.
UNIT_SIZE = 40
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 6,
    "vocab_size": 104,
}
METHODS = [
    "base",
    "expert",
    "anti-expert",
    "-0.5",
    "in-model-contrast",
    "icd:anti_expert={adapter}",
    "icd:anti_expert={second}",
    "cd:amateur={second}",
    "prunecd:skip=1",
    "dexperts:expert={right},anti_expert={adapter}",
    "dola:candidates=all",
    "dola-static:layer=1",
    "sled:scale=5",
    "end:candidates=all",
    "delta:virtual_layer=4",
    "activation-decoding:weight=2",
    "iti:directions={directions},heads=9",
    "steer:vectors={vectors},strength=2,keep_norm=true",
    "cad",
]
# Rows that no mesh divides.
PROMPTS = [random_tokens(n, seed=n, vocab_size=104).tolist() for n in (5, 12, 3)]
# The same without their beginning, for methods that compare two prompts.
OTHER_PROMPTS = [[prompt[2:] for prompt in PROMPTS]]
SEQUENCES = [
    [tuple(random_tokens(n + 9, seed=9 * i + n, vocab_size=104).tolist()) for n in range(3)] for i in range(4)
]
GROUPS = [[Continuation(x, 4, other_prompts=(x[2:4],)) for x in group] for group in SEQUENCES]


@pytest.fixture(scope="module")
def paths(tiny, tmp_path_factory):
    """References of a model with units, and of what methods need besides it."""
    directory = tmp_path_factory.mktemp("mesh")
    base = tiny("gqa", initializer_range=0.2, max_position_embeddings=512, **SIZES)
    lm = base.load()
    weights = with_random_units(lm.model.weights(), lm.config, UNIT_SIZE)
    reference = dataclasses.asdict(lm.base)
    write_imae_dir(
        directory / "imae", weights, lm.config, AntiExpertConfig(UNIT_SIZE), base=reference, training={}
    )
    write_directions(directory / "directions", random_directions(lm.config))
    write_vectors(directory / "vectors.gguf", random_vectors(lm.config), lm.config)
    return {
        "model": str(directory / "imae"),
        "second": str(tiny("gqa", initializer_range=0.2, seed=1, **SIZES).directory),
        "adapter": str(random_adapter(directory / "adapter", lm.config, lm.base.reference)),
        "right": str(random_adapter(directory / "right", lm.config, lm.base.reference, rank=8, seed=4)),
        "directions": str(directory / "directions"),
        "vectors": str(directory / "vectors.gguf"),
    }


@pytest.fixture(scope="module")
def methods(paths):
    return [method.format(**paths) for method in METHODS]


@pytest.fixture(scope="module")
def on_one(paths):
    return load_model(paths["model"])


@pytest.fixture(scope="module", params=MESHES)
def on_many(request, paths):
    return load_model(paths["model"], mesh=request.param)


def assert_close(actual, expected):
    """Values of a few 32-bit products, which devices add up in another order."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# Every method


def greedy(lm, method, prompts):
    models, method = lm.prepare(method, generating=True)
    return generate(
        models,
        lm.config,
        prompts,
        method=method,
        other_prompts=[other[: len(prompts)] for other in OTHER_PROMPTS],
        max_new_tokens=5,
        chunk_size=4,
    )


@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens_are_those_of_one_device(on_one, on_many, paths, method):
    method = method.format(**paths)
    assert greedy(on_many, method, PROMPTS) == greedy(on_one, method, PROMPTS)


def test_a_single_row_is_decoded(on_one, on_many):
    """Whose cache has an axis less on one device; and two rows are multiplied one by one there."""
    for method in ("expert", "in-model-contrast"):
        assert greedy(on_many, method, PROMPTS[:1]) == greedy(on_one, method, PROMPTS[:1])


def test_what_is_drawn_depends_on_the_seed_alone(on_one, on_many):
    drawn = [
        generate(
            *(lm.model, lm.config, PROMPTS),
            sampler=Sampler(1.0, 20, 0.9, 1.2),
            max_new_tokens=5,
            chunk_size=4,
        )
        for lm in (on_one, on_many)
    ]
    assert drawn[0] == drawn[1]


def sums(lm, methods):
    """Of every method [M, groups, continuations]; methods that share streams run in one pass."""
    found = [None] * len(methods)
    prepared = [lm.prepare(method, generating=False) for method in methods]
    for models, joint, places in share_streams(prepared):
        scored = dict(score(models, lm.config, GROUPS, joint, row_length=32))
        for column, place in enumerate(places):
            found[place] = [[part[:, column].sum() for part in scored[i].scores] for i in range(len(GROUPS))]
    return np.array(found)


def test_sums_are_those_of_one_device(on_one, on_many, methods):
    for actual, expected in zip(sums(on_many, methods), sums(on_one, methods), strict=True):
        assert_close(actual, expected)


def test_texts_perplexities_and_scores(on_one, on_many):
    """Through `LanguageModel`, with its tokenizer."""
    both = [
        (lm.generate(["t5 t6", "t7"], "expert", max_new_tokens=4), lm.perplexity(["t5 t6 t7"], "expert"))
        for lm in (on_one, on_many)
    ]
    assert both[0][0] == both[1][0]
    assert_close(both[1][1], both[0][1])


# What else runs a model


def test_harm(on_one, on_many):
    parts, values = dict(enumerate(windows(random_tokens(40, vocab_size=104).tolist(), 16))), []
    for lm in (on_one, on_many):
        models, sled = lm.prepare("sled:scale=5", generating=False)
        measured = measure(lm, models, Joint((sled,)), parts, 16)
        values.append(np.concatenate([statistics for _, (statistics,) in measured], axis=1))
    assert_close(values[1], values[0])


def test_heads_and_layers(on_one, on_many):
    texts = [" ".join(f"t{5 + i + j}" for j in range(3 + i)) for i in range(5)]
    many, one = (capture(lm, texts, layers=(0, 2), heads=True) for lm in (on_many, on_one))
    assert_close(many.heads, one.heads)
    assert_close(many.layers, one.layers)


@pytest.mark.parametrize("mesh", MESHES[-1:])
def test_inspector(paths, mesh):
    excerpts = [Excerpt("text", tuple(random_tokens(n, seed=n, vocab_size=104).tolist())) for n in (9, 5)]
    many, one = (inspect(load_model(paths["model"], stacked=True, mesh=m), excerpts) for m in (mesh, None))
    for actual, expected in zip(many, one, strict=True):
        for name in ("gates", "log_probs", "top_log_probs"):
            assert_close(getattr(actual, name), getattr(expected, name))
        np.testing.assert_array_equal(actual.context, expected.context)


# Where arrays lie


@pytest.mark.parametrize("options", [{}, {"stacked": True}], ids=str)
def test_no_device_holds_a_whole_weight(paths, options):
    """Of the model, and of all that methods load besides it."""
    mesh = MESHES[-1]
    lm = load_model(paths["model"], mesh=mesh, **options)
    assert dict(lm.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for _, variable in nnx.to_flat_state(nnx.state(lm.model)):
        axes = variable.get_metadata("axes")
        array = variable.get_value()
        assert array.sharding.is_equivalent_to(sharding(lm.mesh, *axes), array.ndim), axes
    for method in (f"icd:anti_expert={paths[name]}" for name in ("adapter", "second")):
        models, _ = lm.prepare(method, generating=False)
        for array in jax.tree.leaves((models.weights[0].lora, models.weights[1:])):
            shards = 4 if array.ndim > 1 + lm.model.stacked else 1
            assert array.addressable_shards[0].data.size <= 2 * array.size // shards, array.shape
    models, _ = lm.prepare(f"iti:directions={paths['directions']},heads=9", generating=True)
    for shift in jax.tree.leaves(models.weights[0].shifts):
        assert shift.addressable_shards[0].data.size == shift.size // 2


def test_an_adapter_as_a_model_is_spread(paths, on_many):
    lm = load_model(paths["adapter"], mesh=on_many.mesh)
    for layer, other in zip(lm.model.layers, on_many.model.layers, strict=True):
        merged, plain = layer.wq.get_value(), other.wq.get_value()
        assert merged.sharding.is_equivalent_to(plain.sharding, plain.ndim)
        assert not np.array_equal(merged, plain)


@pytest.mark.slow
def test_random_models_are_spread(paths):
    lm = random_model(paths["second"], dtype="float32", units=True, mesh=MESHES[0])
    for weight in (lm.model.embed, lm.model.layers[0].wq, lm.model.units[0].w_up):
        array = weight.get_value()
        assert array.addressable_shards[0].data.size == array.size // 8
    (row,) = greedy(lm, f"icd:anti_expert={RANDOM_ADAPTER}", PROMPTS[:1])
    assert len(row) == 5


@pytest.mark.parametrize("method", ["base", "expert", "in-model-contrast", "dola:candidates=all"])
def test_decoding_gathers_nothing_along_tensor(on_many, method):
    """Neither weights nor logits; along `fsdp` the weights of a layer are. Caches stay in their place."""
    models, method = on_many.prepare(method, generating=True)
    rows, eos = 4, np.array([-1], np.int32)
    tokens = np.ones((1, rows, 32), np.int32)
    settings = {"method": method, "sampler": Sampler()}
    with use_mesh(on_many.mesh):
        args = models, tokens, tokens.astype(bool), eos, np.int32(0)
        state = loop._prefill(*args, **settings, capacity=40)
        compiled = loop._decode_chunk.lower(models, state, eos, **settings, length=4).compile()
    sizes = {int(np.prod(shape)) for shape in gathered_shapes(compiled.as_text())}
    along_tensor = [
        array.size
        for array in jax.tree.leaves(models.weights)
        if any("tensor" in (axes if isinstance(axes, tuple) else (axes,)) for axes in array.sharding.spec)
    ]
    assert along_tensor
    assert not sizes & {*along_tensor, rows * on_many.config.vocab_size}
    if on_many.mesh.shape["fsdp"] == 1:
        assert max(sizes, default=0) <= rows  # Tokens.
    after = compiled.output_shardings[0]
    for cache, placed in zip(state.caches, after.caches, strict=True):
        layout = sharding(on_many.mesh, "batch", "act_heads", None, None)
        for array, sharding_after in zip(cache.keys, placed.keys, strict=True):
            assert array.sharding.is_equivalent_to(layout, 4)
            assert sharding_after.is_equivalent_to(layout, 4)
    per_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.caches))
    assert compiled.memory_analysis().alias_size_in_bytes >= per_device


# Commands


def test_generate_command(paths, capfd):
    command = ["--model", paths["model"], "--prompt", "t5 t6", "--prompt", "t9", "--max-new-tokens", "5"]
    texts = []
    for mesh in ([], ["--mesh", "tensor=2"]):
        assert generate_command([*command, *mesh]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_truthfulqa_command(paths, tmp_path, capfd):
    """Resumed on another mesh, which changes no score."""
    data = write_questions(tmp_path / "questions.csv")
    (tmp_path / "primer.txt").write_text("Q: t3 t4\nA: t5 .\n\n")
    command = ["--model", paths["model"], "--methods", "base,expert", "--data", data, "--any-data", "--quiet"]
    command += ["--primer", tmp_path / "primer.txt"]
    runs = {}
    for name, mesh in (("one", []), ("many", ["--mesh", MESHES[1]])):
        assert truthfulqa([*map(str, [*command, "--out", tmp_path / name]), *mesh]) == 0
        lines = (tmp_path / name / "scores.jsonl").read_text().splitlines()
        runs[name] = [json.loads(line) for line in lines]
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["mesh"] == (None if name == "one" else {"data": 2, "fsdp": 1, "tensor": 4})
    for one, many in zip(runs["one"], runs["many"], strict=True):
        assert one["question"] == many["question"]
        assert_close(many["true"] + many["false"], one["true"] + one["false"])
    # A run that was killed goes on, on another mesh.
    (tmp_path / "one" / "results.json").unlink()
    scores = tmp_path / "one" / "scores.jsonl"
    scores.write_text("".join(line + "\n" for line in scores.read_text().splitlines()[:5]))
    again = [*map(str, [*command, "--out", tmp_path / "one"]), "--resume", "--mesh", MESHES[0]]
    assert truthfulqa(again) == 0
    capfd.readouterr()


BAD = {
    "not all devices": ("data=2,tensor=2", "needs 4 devices but there are 8"),
    "not a divisor": ("tensor=3", "needs 6 devices but there are 8"),
    "axis": ("pipeline=2", "'pipeline=2' is no axis with its size"),
    "size": ("tensor=two", "'tensor=two' is no axis with its size"),
    "zero": ("tensor=0", "'tensor=0' is no axis with its size"),
    "twice": ("tensor=2,tensor=4", "'tensor=4' is no axis with its size"),
    "nothing": ("", "'' is no axis with its size"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", [generate_command, truthfulqa], ids=["generate", "truthfulqa"])
def test_bad_meshes(paths, tmp_path, capfd, command, case):
    mesh, part = BAD[case]
    arguments = ["--prompt", "t5"] if command is generate_command else ["--out", str(tmp_path / "out")]
    assert part in error_of(capfd, command, "--model", paths["model"], "--mesh", mesh, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("axes", [("data", "fsdp", "tensor"), ("tensor", "data", "fsdp")])
def test_a_mesh_that_jax_makes_by_default(paths, on_one, axes):
    """Its axis types are explicit."""
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    lm = load_model(paths["model"], mesh=jax.make_mesh([sizes[name] for name in axes], axes))
    assert greedy(lm, "in-model-contrast", PROMPTS) == greedy(on_one, "in-model-contrast", PROMPTS)
    assert model_mesh(lm.mesh, lm.config, None) == lm.mesh


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        (lambda: jax.make_mesh((2, 4), ("fsdp", "tensor")), ["fsdp, tensor", "needs data, fsdp, tensor"]),
        (lambda: jax.make_mesh((8, 1, 1), ("x", "fsdp", "tensor")), ["x, fsdp, tensor"]),
        (lambda: 8, ["mesh 8 is of type int", "fsdp=2,tensor=4"]),
        (lambda: {"tensor": 8}, ["is of type dict", "fsdp=2,tensor=4"]),
    ],
    ids=["an axis less", "another axis", "a number", "a dict"],
)
def test_what_is_no_mesh_of_a_model(paths, mesh, parts):
    with user_error(*parts):
        load_model(paths["model"], mesh=mesh())


def test_a_width_that_tensor_does_not_divide(tiny, capfd):
    command = ["--model", tiny("gqa").directory, "--mesh", "tensor=8", "--prompt", "t5"]
    error = error_of(capfd, generate_command, *command)
    assert "num_heads 4 is not divisible by the mesh's tensor axis of 8" in error


def test_a_second_model_that_tensor_does_not_divide(tiny, on_many):
    other = tiny("gqa", **SIZES | {"num_attention_heads": 1, "num_key_value_heads": 1}).directory
    with user_error("cd: amateur=", "num_heads 1 is not divisible", "tensor"):
        on_many.prepare(f"cd:amateur={other}", generating=True)


def test_one_device_needs_no_mesh(paths, on_one):
    """By default a CPU's virtual devices, which share its memory, are one."""
    assert on_one.mesh is None
    assert model_mesh(AUTO, on_one.config, None) is None
    assert load_model(paths["model"], mesh=AUTO).mesh is None
