"""LoRA adapters against the peft library: forward, file format, training, use as anti-expert LLM."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import hf_logits, logits, random_tokens, user_error
from safetensors.numpy import load_file, save_file
from test_losses import examples

from imae_jax.config import LORA_TARGETS, LoraConfig
from imae_jax.convert import load_model
from imae_jax.convert.peft import read_adapter, write_adapter
from imae_jax.convert.table import lora_rows
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


@pytest.fixture(params=["every projection", "q and v", "rslora"])
def adapter(request, tiny, tmp_path):
    """A random adapter saved by peft, and its model in peft."""
    modules = ["q_proj", "v_proj"] if request.param == "q and v" else list(MODULES.values())
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM", use_rslora=request.param == "rslora"
    )
    checkpoint = tiny("gqa", seed=3)
    hf = type(checkpoint.hf).from_pretrained(checkpoint.directory, attn_implementation="eager")
    model = peft.get_peft_model(hf, settings).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    return checkpoint, model, tmp_path / "adapter"


@pytest.mark.parametrize("stacked", [True, False])
def test_adapted_logits_equal_peft(adapter, stacked):
    checkpoint, model, path = adapter
    lm = checkpoint.load(stacked=stacked)
    deltas, lora = read_adapter(path, lm.config, stacked=stacked)
    weights = dataclasses.replace(lm.model.weights(), lora=deltas, lora_scale=lora.scale)
    tokens = random_tokens(3, 11)
    adapted, base = hf_logits(model, tokens), hf_logits(checkpoint.hf, tokens)
    rows = logits(weights, lm.config, tokens, adapter=jnp.asarray([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(rows[[0, 2]], adapted[[0, 2]], atol=2e-4)
    np.testing.assert_array_equal(rows[1], logits(weights, lm.config, tokens)[1])
    np.testing.assert_allclose(rows[1], base[1], atol=2e-4)
    assert np.abs(adapted - base).max() > 0.1


@pytest.mark.parametrize("stacked", [True, False])
def test_an_adapter_is_a_model_reference(adapter, stacked):
    _, model, path = adapter
    lm = load_model(str(path), stacked=stacked)
    tokens = random_tokens(2, 9)
    np.testing.assert_allclose(
        logits(lm.model.weights(), lm.config, tokens), hf_logits(model, tokens), atol=2e-4
    )


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
    deltas, lora = read_adapter(path, lm.config, stacked=True)
    write_adapter(tmp_path / "ours", deltas, lm.config, lora, base_reference=str(checkpoint.directory))
    theirs, ours = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(theirs[name], ours[name])
    hf = type(checkpoint.hf).from_pretrained(checkpoint.directory, attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(hf, tmp_path / "ours").eval()
    tokens = random_tokens(2, 9)
    np.testing.assert_allclose(hf_logits(again, tokens), hf_logits(model, tokens), atol=1e-5)


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
            stack.append(row.from_hf(value))
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
        return objective.loss(objective.sums(objective.attach(base, deltas), lm.config, batch), counts)

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(deltas)
    np.testing.assert_allclose(loss, (total / count).item(), rtol=1e-5)
    for (target, part, i), (parameter, row) in leaves.items():
        expected = row.from_hf(parameter.grad.numpy())
        np.testing.assert_allclose(gradient[target][part][i], expected, atol=2e-5 * np.abs(expected).max())


def test_bad_adapters(adapter, tiny, tmp_path):
    _, _, path = adapter
    config = tiny("gqa", seed=3).load().config
    settings = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")

    def variant(name, *, tensors=tensors, **change):
        copy = tmp_path / name
        copy.mkdir()
        (copy / "adapter_config.json").write_text(json.dumps(settings | change))
        save_file(tensors, copy / "adapter_model.safetensors")
        return copy

    with user_error("use_dora=True"):
        read_adapter(variant("dora", use_dora=True), config, stacked=True)
    with user_error("rank_pattern"):
        read_adapter(variant("ranks", rank_pattern={"q_proj": 2}), config, stacked=True)
    with user_error("r and lora_alpha"):
        read_adapter(variant("none", r=None), config, stacked=True)
    name = next(iter(tensors))
    with user_error("1 missing", name):
        fewer = {k: v for k, v in tensors.items() if k != name}
        read_adapter(variant("fewer", tensors=fewer), config, stacked=True)
    with user_error("holds no deltas"):
        other = {"some.other.lora_A.weight": tensors[name]}
        read_adapter(variant("other", tensors=other), config, stacked=True)
    with user_error("wrong shape"):
        read_adapter(variant("rank", r=5), config, stacked=True)
    with user_error("match nothing", "wz"):
        LoraConfig(targets=("wz",))
