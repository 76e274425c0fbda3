"""The losses and their gradients against torch's, on transformers' Llama with units of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, UNIT_SIZE, log_softmax, random_tokens, user_error, with_random_units
from helpers.training import PAIR, UNITS, examples, pairs, random_deltas

from imae_jax.convert.peft import write_adapter
from imae_jax.llama import Weights, project
from imae_jax.lora import side_by_side
from imae_jax.losses import LossConfig, fact_loss_sums, kl_divergence, target_log_probs
from imae_jax.train.data import Example, Merging, in_batches, make_batch
from imae_jax.train.objectives import ImaeObjective, PairsObjective, PreferenceObjective, UnitsObjective

LOSSES = [
    LossConfig(),
    LossConfig(beta=1.25, delta=0.4, gate_weight=0.5),
    LossConfig(valid_form="logit", delta=1.0),
    LossConfig(valid_form="logit", delta=0.3),
    LossConfig(mean="example"),
    LossConfig(keep=0.5),
]


def torch_modes(hf, units):
    """`run(tokens, strength)`: logits, and the gates of every layer, with `units` as torch leaves."""
    import torch

    gates: list = []

    def mlp_with_unit(mlp, layer, strength):
        def run(h):
            u = {name: array[layer] for name, array in units.items()}
            a = torch.softmax(h @ u["gate"] + u["gate_bias"], dim=-1)[..., :1]
            gates.append(a[0, :, 0])
            inner = mlp.act_fn((a * h) @ u["w_gate"]) * ((a * h) @ u["w_up"])
            return type(mlp).forward(mlp, h) + strength * inner @ u["w_down"]

        return run

    def run(tokens, strength):
        gates.clear()
        for layer, block in enumerate(hf.model.layers):
            block.mlp.forward = mlp_with_unit(block.mlp, layer, strength)
        logits = hf(torch.tensor([tokens])).logits[0]
        for block in hf.model.layers:
            del block.mlp.forward
        return logits, list(gates)

    return run


def torch_log_probs(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def torch_kl(log_p, log_q):
    kept = log_p > -np.inf
    return (log_p[kept].exp() * (log_p[kept] - log_q[kept])).sum()


def valid_softmax(scores, base_logits, settings: LossConfig):
    """Log-softmax over V_valid; -inf elsewhere."""
    import torch

    if settings.valid_form == "probability":
        valid = base_logits.softmax(-1) >= settings.delta * base_logits.softmax(-1).max()
    else:
        valid = base_logits >= settings.delta * base_logits.max()
    return torch.where(valid, scores, -torch.inf).log_softmax(-1)


def torch_loss(hf, units, rows: list[Example], settings: LossConfig, adapters=None):
    """METHODS 1.4 and 6 literally: one row, mode, layer and token at a time; `units` as torch leaves.

    With `adapters`, models of right and of wrong answers, the objective `pairs`.
    """
    import torch

    run = torch_modes(hf, units)
    anti, expert, gate, keep, num_fact, num_gate, num_keep = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for row in rows:
        with torch.no_grad():
            base_logits = hf(torch.tensor([row.tokens])).logits[0]
        log_base = base_logits.log_softmax(-1)
        anti_logits, anti_gates = run(row.tokens, 1.0)
        expert_logits, expert_gates = run(row.tokens, -1.0)
        log_anti, log_expert = anti_logits.log_softmax(-1), expert_logits.log_softmax(-1)
        contrast = None
        if adapters is not None:
            right, wrong = (torch_log_probs(model, row.tokens) for model in adapters)
            contrast = settings.alpha * (right - wrong)
        of_token = of_fact = of_other = 1.0
        if settings.mean == "example":
            of_token, of_fact = 1 / len(row.fact), 1 / sum(row.fact)
            of_other = 1 / (len(row.tokens) - 1 - sum(row.fact))
        for token in range(1, len(row.tokens)):
            at, number = token - 1, token - row.start
            is_fact = number >= 0 and row.fact[number]
            if number >= 0:
                for layer_gates in anti_gates + expert_gates:
                    gate = gate + of_token * ((1 - layer_gates[at]) if is_fact else layer_gates[at])
                    num_gate += of_token
            if not is_fact:
                kept = torch_kl(log_base[at], log_anti[at]) + torch_kl(log_base[at], log_expert[at])
                keep, num_keep = keep + of_other * kept, num_keep + of_other
                continue
            num_fact += of_fact
            if contrast is None:
                anti = anti - of_fact * log_anti[at, row.tokens[token]]
                scores = settings.beta * log_base[at] - log_anti[at].detach()
            else:
                target = valid_softmax(log_base[at] - contrast[at], base_logits[at], settings)
                anti = anti + of_fact * torch_kl(target, log_anti[at])
                scores = log_base[at] + contrast[at]
            target = valid_softmax(scores, base_logits[at], settings)
            expert = expert + of_fact * torch_kl(target, log_expert[at])
    loss = anti / num_fact + expert / num_fact + settings.gate_weight * gate / num_gate
    return loss + (settings.keep or 0.0) * keep / num_keep


def torch_preference_loss(hf, units, rows: list[Example], settings: LossConfig):
    """DPO's two losses (METHODS 6), L_gate with every answer token in T_fact, L_keep over the prompts."""
    import torch

    run = torch_modes(hf, units)
    anti, expert, gate, keep, num_gate, num_keep = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for wrong, right in zip(rows[::2], rows[1::2], strict=True):
        ratios = {}
        for name, row in (("wrong", wrong), ("right", right)):
            log_base = torch_log_probs(hf, row.tokens)
            for o in (1.0, -1.0):
                logits, gates = run(row.tokens, o)
                log_mode = logits.log_softmax(-1)
                ratios[name, o] = 0.0
                for token in range(1, len(row.tokens)):
                    at, id = token - 1, row.tokens[token]
                    if token >= row.start:
                        ratios[name, o] += log_mode[at, id] - log_base[at, id]
                        gate, num_gate = gate + sum(1 - g[at] for g in gates), num_gate + len(gates)
                    else:
                        keep = keep + torch_kl(log_base[at], log_mode[at])
                        num_keep += 0.5  # the two modes' divergences are added
        log_sigmoid = torch.nn.functional.logsigmoid
        expert = expert - log_sigmoid(settings.tau * (ratios["right", -1.0] - ratios["wrong", -1.0]))
        anti = anti - log_sigmoid(settings.tau * (ratios["wrong", 1.0] - ratios["right", 1.0]))
    loss = (anti + expert) / (len(rows) / 2) + settings.gate_weight * gate / num_gate
    return loss + settings.keep * keep / num_keep


def value_and_gradient(lm, weights: Weights, rows: list[Example], objective: UnitsObjective, rows_of_tree=0):
    """With two more rows that only fill up the batch, and count nothing."""
    (filled,) = in_batches(rows, len(rows) + 2)
    merging = Merging(rows_of_tree, 512) if rows_of_tree else None
    arrays = make_batch(filled, 1, merging=merging).arrays()
    batch = {name: jnp.asarray(array[0]) for name, array in arrays.items()}
    counts = objective.counts(lm.config, batch)

    def loss_of(units):
        sums = objective.sums(objective.attach(weights, units), lm.config, batch)
        return objective.loss(sums, counts)

    return jax.jit(jax.value_and_grad(loss_of))(weights.units)


@pytest.mark.parametrize("settings", LOSSES, ids=lambda s: f"{s.valid_form}-{s.delta}-{s.mean}")
@pytest.mark.parametrize("kind", ["gqa", "tied", "gemma3"])
def test_loss_and_gradient_equal_torch(tiny, kind, settings):
    pytest.importorskip("torch")
    checkpoint = tiny(kind, initializer_range=0.2)
    lm = checkpoint.load(stacked=True)
    weights = with_random_units(lm.model.weights(), lm.config)
    rows = examples(5)

    units = torch_leaves(weights.units)
    expected = torch_loss(checkpoint.hf, units, rows, settings)
    loss, gradient = value_and_gradient(lm, weights, rows, ImaeObjective(UNITS, settings))
    assert_loss_and_gradient(loss, gradient, expected, units)


def torch_leaves(units):
    import torch

    return {name: torch.tensor(np.asarray(array), requires_grad=True) for name, array in units.items()}


def assert_loss_and_gradient(loss, gradient, expected, units):
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=2e-5)
    for name, array in gradient.items():
        reference = units[name].grad.numpy()
        np.testing.assert_allclose(array, reference, atol=2e-5 * np.abs(reference).max(), err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [LossConfig(keep=1.0), LossConfig(alpha=0.7, valid_form="logit", delta=0.3, keep=0.5, mean="example")],
    ids=["token", "example"],
)
@pytest.mark.parametrize("rows_of_tree", [0, 2, 8], ids=["rows", "trees of a question", "one tree"])
def test_loss_and_gradient_of_pairs_equal_torch(tiny, tmp_path, settings, rows_of_tree):
    """Adapters in peft, each a model of its own there."""
    peft = pytest.importorskip("peft")
    checkpoint = tiny("gqa", initializer_range=0.2)
    lm = checkpoint.load(stacked=True)
    deltas = [random_deltas(lm.config, lora, seed) for seed, lora in enumerate(PAIR)]
    models = []
    for number, (adapter, lora) in enumerate(zip(deltas, PAIR, strict=True)):
        path = tmp_path / str(number)
        write_adapter(path, adapter, lm.config, lora, base_reference=str(checkpoint.directory))
        hf = type(checkpoint.hf).from_pretrained(checkpoint.directory, attn_implementation="eager")
        models.append(peft.PeftModel.from_pretrained(hf, path).eval())
    scaled = [(adapter, lora.scale) for adapter, lora in zip(deltas, PAIR, strict=True)]
    weights = with_random_units(lm.model.weights(), lm.config)
    weights = dataclasses.replace(weights, lora=side_by_side(scaled))
    rows, units = pairs(3), torch_leaves(weights.units)
    expected = torch_loss(checkpoint.hf, units, rows, settings, models)
    loss, gradient = value_and_gradient(lm, weights, rows, PairsObjective(UNITS, settings), rows_of_tree)
    assert_loss_and_gradient(loss, gradient, expected, units)


@pytest.mark.parametrize("rows_of_tree", [0, 2, 8], ids=["rows", "trees of a question", "one tree"])
@pytest.mark.parametrize("kind", ["gqa", "gemma3"])
def test_loss_and_gradient_of_preference_equal_torch(tiny, kind, rows_of_tree):
    pytest.importorskip("torch")
    checkpoint = tiny(kind, initializer_range=0.2)
    lm = checkpoint.load(stacked=True)
    weights = with_random_units(lm.model.weights(), lm.config)
    rows = [dataclasses.replace(row, fact=(True,) * len(row.fact)) for row in pairs(3)]
    settings, units = LossConfig(tau=0.7, keep=0.5), torch_leaves(weights.units)
    expected = torch_preference_loss(checkpoint.hf, units, rows, settings)
    loss, gradient = value_and_gradient(lm, weights, rows, PreferenceObjective(UNITS, settings), rows_of_tree)
    assert_loss_and_gradient(loss, gradient, expected, units)


@pytest.mark.parametrize("remat", ["full", "narrow", "dots"])
def test_remat_changes_no_gradient(tiny, remat):
    lm = tiny("gqa", initializer_range=0.2).load(stacked=True)
    weights = with_random_units(lm.model.weights(), lm.config)
    kept, again = (
        value_and_gradient(lm, weights, examples(4), ImaeObjective(UNITS, LossConfig(), policy))[1]
        for policy in ("none", remat)
    )
    for name, array in kept.items():
        np.testing.assert_allclose(array, again[name], atol=1e-5 * float(jnp.abs(array).max()))


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_chunks_of_the_projection_change_nothing(chunk):
    random = np.random.default_rng(0)
    B, P, D, V = 2, 10, TINY.hidden_size, TINY.vocab_size
    weights = Weights({"unembed": jnp.asarray(random.normal(size=(D, V)), jnp.float32)})
    hidden = [jnp.asarray(random.normal(size=(B, P, D)), jnp.float32) for _ in range(3)]
    targets, valid = random.integers(0, V, (B, P)), random.random((B, P)) < 0.6
    sums = fact_loss_sums(
        weights, *hidden, jnp.asarray(targets), jnp.asarray(valid, jnp.float32), LossConfig(), chunk=chunk
    )

    base, anti, expert = (log_softmax(project(weights, h)) for h in hidden)
    log_target = np.asarray(target_log_probs(jnp.asarray(base), jnp.asarray(anti), LossConfig()))
    with np.errstate(invalid="ignore"):
        terms = np.where(log_target > -np.inf, np.exp(log_target) * (log_target - expert), 0.0)
    nll = -np.take_along_axis(anti, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(sums["expert"], (terms.sum(-1) * valid).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["anti"], (nll * valid).sum(), rtol=1e-5)


def test_target_is_the_contrast_on_the_valid_tokens():
    base = np.log([0.5, 0.3, 0.15, 0.04, 0.01])
    anti = np.log([0.1, 0.6, 0.1, 0.1, 0.1])
    target = np.exp(target_log_probs(jnp.asarray(base), jnp.asarray(anti), LossConfig(beta=2.0, delta=0.1)))
    # 0.04 and 0.01 are below 0.1 · 0.5.
    expected = np.array([0.5**2 / 0.1, 0.3**2 / 0.6, 0.15**2 / 0.1, 0, 0])
    np.testing.assert_allclose(target, expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_logit_form_at_one_keeps_the_arg_max_alone(shift):
    logits = jnp.asarray(random_tokens(7, 11).astype(np.float32)) + jnp.arange(11) * 0.01 + shift
    settings = LossConfig(valid_form="logit", delta=1.0)
    target = np.exp(target_log_probs(logits, -logits, settings))
    np.testing.assert_array_equal(target, np.eye(11)[np.asarray(logits).argmax(-1)])


def test_kl_is_zero_for_equal_and_finite_where_the_target_is_zero():
    log_p = jnp.asarray([[np.log(0.25), np.log(0.75), -np.inf]])
    log_q = jnp.log(jnp.asarray([[0.25, 0.25, 0.5]]))
    np.testing.assert_allclose(kl_divergence(log_p, log_q), [0.75 * np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(kl_divergence(log_q, log_q), [0.0], atol=1e-7)
    gradient = jax.grad(lambda q: kl_divergence(log_p, q).sum())(log_q)
    assert np.isfinite(gradient).all()


def test_bad_settings():
    with user_error("loss.valid_form", "'ratio'"):
        LossConfig(valid_form="ratio")
    with user_error("loss.mean", "'batch'"):
        LossConfig(mean="batch")
    with user_error("loss.delta", "0"):
        LossConfig(delta=0.0)
    for name, value in (("keep", -1.0), ("keep", np.inf), ("alpha", 0.0), ("tau", np.nan)):
        with user_error(f"loss.{name} {value}"):
            LossConfig(**{name: value})


def test_units_are_smaller_than_the_base():
    """The tests above would not notice swapped widths if these were equal."""
    assert TINY.intermediate_size != UNIT_SIZE
