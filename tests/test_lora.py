"""LoRA adapters against the peft library: forward, file format, training, use as anti-expert LLM."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import UNIT_SIZE, error_of, hf_logits, logits, random_tokens, user_error, with_random_units
from helpers.training import PAIR, examples, random_deltas
from safetensors.numpy import load_file, save_file

from imae_jax.config import LORA_TARGETS, AntiExpertConfig, LoraConfig
from imae_jax.convert import load_model
from imae_jax.convert.__main__ import main as convert
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.convert.peft import open_adapter, write_adapter
from imae_jax.convert.references import fingerprint
from imae_jax.convert.table import expand, lora_rows
from imae_jax.llama import Weights
from imae_jax.lora import adapter_factors, side_by_side
from imae_jax.train.data import make_batch
from imae_jax.train.objectives import AnswerObjective

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

# Our names of projections, and PEFT's.
MODULES = dict(
    zip(
        LORA_TARGETS,
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        strict=True,
    )
)


PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
    "alpha_pattern": {"mlp.up_proj": 5},
}
# Kinds of adapters that PEFT makes, by what is set besides r and lora_alpha.
ADAPTERS = {
    "every projection": {},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"use_rslora": True},
    "some layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "a pattern": {"target_modules": r".*\.0\.self_attn\.q_proj|.*\.[12]\.mlp\.(up|down)_proj"},
    "full names": {"target_modules": ["layers.2.mlp.gate_proj", "k_proj"]},
    "without a layer": {"exclude_modules": r".*\.1\..*"},
    "without projections": {"exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "a full name beyond the layers": {
        "target_modules": ["model.layers.1.mlp.up_proj", "layers.1.mlp.gate_proj", "q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["h", "layers"],
    },
    "own ranks": PATTERNS,
    "own ranks, rslora": PATTERNS | {"use_rslora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


def save_adapter(checkpoint, path, **settings):
    """A random adapter saved by peft, as a model of peft."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(MODULES.values())} | settings
    hf = type(checkpoint.hf).from_pretrained(checkpoint.directory, attn_implementation="eager")
    model = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(path)
    return model


@pytest.fixture
def adapter(request, tiny, tmp_path):
    """A random adapter of one of `ADAPTERS` saved by peft, and its model in peft."""
    checkpoint = tiny("gqa", seed=3)
    settings = ADAPTERS[getattr(request, "param", "every projection")]
    return checkpoint, save_adapter(checkpoint, tmp_path / "adapter", **settings), tmp_path / "adapter"


@pytest.mark.parametrize("adapter", ADAPTERS, indirect=True)
@pytest.mark.parametrize("stacked", [True, False])
def test_adapted_logits_equal_peft(adapter, stacked):
    checkpoint, model, path = adapter
    lm = checkpoint.load(stacked=stacked)
    opened = open_adapter(path, lm.config)
    deltas = opened.read(stacked=stacked)
    weights = dataclasses.replace(lm.model.weights(), lora=deltas, lora_scale=opened.lora.scale)
    tokens = random_tokens(3, 11)
    adapted, base = hf_logits(model, tokens), hf_logits(checkpoint.hf, tokens)
    rows = logits(weights, lm.config, tokens, adapter=jnp.asarray([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(rows[[0, 2]], adapted[[0, 2]], atol=2e-4)
    np.testing.assert_array_equal(rows[1], logits(weights, lm.config, tokens)[1])
    np.testing.assert_allclose(rows[1], base[1], atol=2e-4)
    assert np.abs(adapted - base).max() > 0.1


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("adapter", ["every projection", "own ranks"], indirect=True)
def test_an_adapter_is_a_model_reference(adapter, stacked):
    _, model, path = adapter
    lm = load_model(str(path), stacked=stacked)
    tokens = random_tokens(2, 9)
    np.testing.assert_allclose(
        logits(lm.model.weights(), lm.config, tokens), hf_logits(model, tokens), atol=2e-4
    )


def test_rows_of_several_adapters_in_one_batch(tiny):
    """Of different ranks, scales and projections: each row is what its adapter alone gives."""
    lm = tiny("gqa", seed=3).load(stacked=True)
    adapters = [(random_deltas(lm.config, lora, seed), lora.scale) for seed, lora in enumerate(PAIR)]
    both = dataclasses.replace(lm.model.weights(), lora=side_by_side(adapters))
    tokens = random_tokens(3, 11)
    rows = logits(both, lm.config, tokens, adapter=adapter_factors(both.lora, 2, (1, None, 0)))
    np.testing.assert_allclose(rows[1], logits(lm.model.weights(), lm.config, tokens)[1], atol=1e-5)
    for row, (deltas, scale) in ((0, adapters[1]), (2, adapters[0])):
        alone = dataclasses.replace(lm.model.weights(), lora=deltas, lora_scale=scale)
        expected = logits(alone, lm.config, tokens, adapter=1.0)[row]
        np.testing.assert_allclose(rows[row], expected, atol=1e-4)
        assert np.abs(rows[row] - rows[1]).max() > 0.1


def test_an_adapters_fingerprint_is_of_all_that_it_computes_with(adapter, tiny):
    checkpoint, _, path = adapter

    def fingerprint(**kwargs):
        return load_model(str(path), **kwargs).base.fingerprint

    first = fingerprint()
    assert fingerprint(base=str(checkpoint.directory)) == first
    assert fingerprint(base=str(tiny("gqa", seed=4).directory)) != first
    assert fingerprint(base=f"{checkpoint.directory}#layers=3") == first
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 7}))
    assert fingerprint() != first


def test_what_is_written_is_what_peft_reads(adapter, tmp_path):
    checkpoint, model, path = adapter
    lm = checkpoint.load()
    opened = open_adapter(path, lm.config)
    deltas, lora = opened.read(stacked=True), opened.lora
    write_adapter(tmp_path / "ours", deltas, lm.config, lora, base_reference=str(checkpoint.directory))
    theirs, ours = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(theirs[name], ours[name])
    hf = type(checkpoint.hf).from_pretrained(checkpoint.directory, attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(hf, tmp_path / "ours").eval()
    tokens = random_tokens(2, 9)
    np.testing.assert_allclose(hf_logits(again, tokens), hf_logits(model, tokens), atol=1e-5)


def transposed(row, array):
    """A matrix of PEFT's in our shape."""
    return array.T.reshape(row.shape)


def test_loss_and_gradient_of_the_anti_expert_llm_equal_torch(tiny):
    checkpoint = tiny("gqa", initializer_range=0.2)
    lm = checkpoint.load(stacked=True)
    lora = LoraConfig(rank=4, alpha=6)
    objective = AnswerObjective(lora)
    hf = type(checkpoint.hf).from_pretrained(checkpoint.directory, attn_implementation="eager")
    model = peft.get_peft_model(hf, peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(MODULES.values())))
    random = np.random.default_rng(0)
    deltas: dict = {name: {} for name in LORA_TARGETS}
    leaves = {}
    layers = model.base_model.model.model.layers
    for row in lora_rows(lm.config, lora):
        _, target, part = row.path.split(".")
        stack = []
        for i, layer in enumerate(layers):
            block = layer.mlp if target.startswith("w_") else layer.self_attn
            module = getattr(getattr(block, MODULES[target]), "lora_A" if part == "a" else "lora_B").default
            value = random.normal(0, 0.2, row.hf_shape).astype(np.float32)
            module.weight.data = torch.tensor(value)
            leaves[target, part, i] = module.weight, row
            stack.append(transposed(row, value))
        deltas[target][part] = jnp.asarray(np.stack(stack))

    rows = [dataclasses.replace(e, fact=(True,) * len(e.fact)) for e in examples(5)]
    total, count = 0.0, 0
    for row in rows:
        log_probs = model(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
        for i in range(row.start, len(row.tokens)):
            total, count = total - log_probs[i - 1, row.tokens[i]], count + 1
    (total / count).backward()

    batch = {name: jnp.asarray(array[0]) for name, array in make_batch(rows, 1).arrays().items()}
    counts = objective.counts(lm.config, batch)
    base = lm.model.weights().base

    def loss_of(deltas):
        return objective.loss(
            objective.sums(objective.attach(Weights(base), deltas), lm.config, batch), counts
        )

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(deltas)
    np.testing.assert_allclose(loss, (total / count).item(), rtol=1e-5)
    for (target, part, i), (parameter, row) in leaves.items():
        expected = transposed(row, parameter.grad.numpy())
        np.testing.assert_allclose(gradient[target][part][i], expected, atol=2e-5 * np.abs(expected).max())


@pytest.fixture
def base_config(tiny):
    return tiny("gqa", seed=3).load().config


@pytest.fixture
def variant(adapter, tmp_path):
    """Writes the adapter with other settings or tensors."""
    path = adapter[2]
    settings = json.loads((path / "adapter_config.json").read_text())

    def write(name, tensors=None, **change):
        copy = tmp_path / name
        copy.mkdir()
        (copy / "adapter_config.json").write_text(json.dumps(settings | change))
        save_file(
            tensors or load_file(path / "adapter_model.safetensors"), copy / "adapter_model.safetensors"
        )
        return copy

    return write


def test_settings_that_plain_lora_does_not_have_are_refused(variant, base_config):
    for setting, value in {
        "use_dora": True,
        "bias": "lora_only",
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [3],
        "layer_replication": [[0, 2], [1, 3]],
        "lora_bias": True,
        "target_parameters": ["mlp.experts"],
        "use_qalora": True,
        "alora_invocation_tokens": [5, 6],
        "fan_in_fan_out": True,
        "peft_type": "LOHA",
        "init_lora_weights": "pissa_niter_4",
        "a_setting_of_tomorrow": {"gain": 2},
    }.items():
        with user_error(f"{setting}={value!r}", "merge_and_unload"):
            open_adapter(variant(setting, **{setting: value}), base_config)
    for init in ("pissa", "OLoRA", "corda", "loftq", "lora_ga", "something new"):
        with user_error(f"init_lora_weights={init!r}", "changes the base's weights"):
            open_adapter(variant(init, init_lora_weights=init), base_config)
    with user_error("r and lora_alpha"):
        open_adapter(variant("none", r=None), base_config)
    for number, patterns in enumerate([{"q_proj": -1}, {"(": 2}, ["q_proj"], {"q_proj": "2"}]):
        with user_error("rank_pattern", "patterns to numbers"):
            open_adapter(variant(f"patterns {number}", rank_pattern=patterns), base_config)


def test_settings_that_name_other_modules_than_the_tensors_are_refused(variant, adapter, base_config):
    tensors = load_file(adapter[2] / "adapter_model.safetensors")
    fewer = {k: v for k, v in tensors.items() if "k_proj" not in k}
    for what, change in {
        "target_modules": {"target_modules": ["q_proj"]},
        "a pattern": {"target_modules": r".*\.q_proj"},
        "default targets": {"target_modules": None},
        "exclude_modules": {"exclude_modules": ["k_proj"]},
        "layers_to_transform": {"layers_to_transform": [0]},
        "layers_pattern": {"layers_to_transform": [0, 1, 2], "layers_pattern": "blocks"},
    }.items():
        with user_error(what, "name none" if what == "layers_pattern" else "unexpected"):
            open_adapter(variant(what, **change), base_config)
    with user_error("6 missing", "k_proj.lora_A"):
        open_adapter(variant("without k", tensors=fewer), base_config)
    for what, change in {
        "5": {"target_modules": 5},
        "[True]": {"layers_to_transform": [True]},
        "pattern": {"target_modules": "q_proj(", "layers_to_transform": None},
        "goes with a list": {"target_modules": ".*proj", "layers_to_transform": 1},
        "acts on lm_head": {"target_modules": [*MODULES.values(), "lm_head"]},
        "acts on model.embed_tokens": {"target_modules": ".*"},
    }.items():
        with user_error(what):
            open_adapter(variant(f"bad {what}", **change), base_config)


def test_tensors_that_do_not_fit_are_refused(variant, adapter, base_config):
    tensors = load_file(adapter[2] / "adapter_model.safetensors")
    name = next(iter(tensors))
    with user_error("1 missing", name):
        fewer = {k: v for k, v in tensors.items() if k != name}
        open_adapter(variant("fewer", tensors=fewer), base_config)
    with user_error("another base", "missing", "layers.2."):
        # Of a base with a layer less, whose other sizes are the same.
        fewer = {k: v for k, v in tensors.items() if ".layers.2." not in k}
        open_adapter(variant("fewer layers", tensors=fewer), base_config)
    with user_error("another base", "unexpected", "layers.9."):
        more = tensors | {k.replace(".2.", ".9."): v for k, v in tensors.items() if ".layers.2." in k}
        open_adapter(variant("more layers", tensors=more), base_config)
    with user_error("holds no deltas"):
        other = {"some.other.lora_A.weight": tensors[name]}
        open_adapter(variant("other", tensors=other), base_config)
    for number, more in enumerate(["lm_head.lora_A.weight", "model.embed_tokens.weight", "score.weight"]):
        with user_error(more, "merge_and_unload"):
            with_more = tensors | {f"base_model.model.{more}": tensors[name]}
            open_adapter(variant(f"more {number}", tensors=with_more), base_config)
    with user_error("wrong shape"):
        open_adapter(variant("rank", r=5), base_config)
    with user_error("wrong shape"):
        open_adapter(variant("ranks", rank_pattern={"q_proj": 2}), base_config)
    with user_error("match nothing", "wz"):
        LoraConfig(targets=("wz",))


def test_adapters_on_head_or_embeddings_are_refused(tiny, tmp_path):
    checkpoint = tiny("gqa", seed=3)
    for module in ("lm_head", "embed_tokens"):
        path = tmp_path / module
        save_adapter(checkpoint, path, target_modules=["q_proj", module])
        with user_error(path, module, "merge_and_unload"):
            load_model(str(path))


def test_an_adapter_in_bfloat16(adapter):
    checkpoint, _, path = adapter
    file = path / "adapter_model.safetensors"
    tensors = {name: array.astype(jnp.bfloat16) for name, array in load_file(file).items()}
    save_file(tensors, file)
    config = checkpoint.load().config
    deltas = open_adapter(path, config).read(stacked=True)
    assert {array.dtype for array in jax.tree.leaves(deltas)} == {jnp.dtype(jnp.float32)}
    for row, layer in expand(lora_rows(config, LoraConfig(rank=4)), config.num_layers):
        _, target, part = row.path.split(".")
        expected = transposed(row, tensors[row.hf_name(layer)].astype(np.float32))
        np.testing.assert_array_equal(deltas[target][part][layer], expected)


def test_a_merged_weight_that_float16_does_not_hold_is_named(adapter):
    _, _, path = adapter
    file = path / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name] * np.float32(1e6)
    save_file(tensors, file)
    with user_error("w_up", "float16", "--dtype"):
        load_model(str(path), dtype="float16")


def test_a_directory_without_the_adapters_tensors_says_what_it_is(adapter, tmp_path):
    checkpoint, _, path = adapter
    merged = tmp_path / "merged"
    shutil.copytree(checkpoint.directory, merged)
    shutil.copyfile(path / "adapter_config.json", merged / "adapter_config.json")
    with user_error(merged, "whole checkpoint", "remove adapter_config.json"):
        load_model(str(merged))
    file = path / "adapter_model.safetensors"
    torch.save({}, path / "adapter_model.bin")
    file.unlink()
    with user_error(path, "pickled", "adapter_model.bin"):
        load_model(str(path))
    (path / "adapter_model.bin").unlink()
    with user_error(path, "adapter_model.safetensors", "again"):
        load_model(str(path))


@pytest.mark.parametrize("named", ["/home/trainer/base", None])
def test_an_adapter_whose_base_has_moved(adapter, named):
    checkpoint, model, path = adapter
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named}))
    with user_error(path, "--base"):
        load_model(str(path))
    lm, tokens = load_model(str(path), base=str(checkpoint.directory)), random_tokens(1, 9)
    actual = logits(lm.model.weights(), lm.config, tokens)
    np.testing.assert_allclose(actual, hf_logits(model, tokens), atol=2e-4)


def test_the_base_of_an_adapter_must_be_plain(adapter, tmp_path, capfd):
    """Not an IMAE model, whose units were trained on weights without the adapter, and not an adapter."""
    checkpoint, _, path = adapter
    lm = checkpoint.load()
    weights, sizes = with_random_units(lm.model.weights(), lm.config), AntiExpertConfig(UNIT_SIZE)
    write_imae_dir(
        tmp_path / "imae", weights, lm.config, sizes, base=dataclasses.asdict(lm.base), training={}
    )
    export = ["export", "--out", tmp_path / "exported"]
    assert convert([str(argument) for argument in [*export, "--model", tmp_path / "imae"]]) == 0
    settings = json.loads((path / "adapter_config.json").read_text())

    def variant(name, base):
        shutil.copytree(path, tmp_path / name)
        named = settings | {"base_model_name_or_path": str(base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(named))
        return tmp_path / name

    # The last two are each other's.
    cases = [
        (variant("on imae", tmp_path / "imae"), "imae", "plain base model is needed"),
        (variant("on exported", tmp_path / "exported"), "exported", "units of its own"),
        (variant("on adapter", path), path.name, "plain base model is needed"),
        (variant("one", tmp_path / "another"), "another", "is an adapter"),
        (variant("another", tmp_path / "one"), "one", "is an adapter"),
    ]
    for directory, base, reason in cases:
        for read in (load_model, fingerprint):
            with user_error(directory, tmp_path / base, reason):
                read(str(directory))
        message = error_of(capfd, convert, "export", "--model", directory, "--out", tmp_path / "out")
        assert reason in message and "--iti" not in message
