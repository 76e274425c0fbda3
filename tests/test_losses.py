"""The losses and their gradients against torch's, on transformers' Llama with units of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, UNIT_SIZE, log_softmax, random_tokens, user_error, with_random_units

from imae_jax.config import AntiExpertConfig
from imae_jax.llama import Weights, project
from imae_jax.losses import LossConfig, fact_loss_sums, kl_divergence, target_log_probs
from imae_jax.train.data import Example, make_batch
from imae_jax.train.objectives import ImaeObjective

UNITS = AntiExpertConfig(UNIT_SIZE)
LOSSES = [
    LossConfig(),
    LossConfig(beta=1.25, delta=0.4, gate_weight=0.5),
    LossConfig(valid_form="logit", delta=1.0),
    LossConfig(valid_form="logit", delta=0.3),
    LossConfig(mean="example"),
]


def examples(count: int, seed: int = 0) -> list[Example]:
    """Rows of unequal length, each with some of its answer tokens in T_fact."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length, start = int(random.integers(9, 20)), int(random.integers(2, 6))
        tokens = tuple(map(int, random.integers(3, TINY.vocab_size, length)))
        fact = random.random(length - start) < 0.5
        fact[int(random.integers(len(fact)))] = True
        rows.append(Example(i, tokens, start, tuple(fact.tolist())))
    return rows


def torch_loss(hf, units, rows: list[Example], settings: LossConfig):
    """METHODS 1.4 literally: one row, mode, layer and token at a time; `units` as torch leaves."""
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

    anti, expert, gate, num_fact, num_gate = 0.0, 0.0, 0.0, 0.0, 0.0
    for row in rows:
        base_logits = hf(torch.tensor([row.tokens])).logits[0].detach()
        anti_logits, anti_gates = run(row.tokens, 1.0)
        expert_logits, expert_gates = run(row.tokens, -1.0)
        of_token = of_fact = 1.0
        if settings.mean == "example":
            of_token, of_fact = 1 / len(row.fact), 1 / sum(row.fact)
        for number, is_fact in enumerate(row.fact):
            token = row.start + number
            at = token - 1
            for layer_gates in anti_gates + expert_gates:
                gate = gate + of_token * ((1 - layer_gates[at]) if is_fact else layer_gates[at])
                num_gate += of_token
            if not is_fact:
                continue
            num_fact += of_fact
            anti = anti - of_fact * torch.log_softmax(anti_logits[at], -1)[row.tokens[token]]
            log_base = torch.log_softmax(base_logits[at], -1)
            log_anti = torch.log_softmax(anti_logits[at].detach(), -1)
            if settings.valid_form == "probability":
                valid = log_base.exp() >= settings.delta * log_base.exp().max()
            else:
                valid = base_logits[at] >= settings.delta * base_logits[at].max()
            scores = (settings.beta * log_base - log_anti)[valid]
            target = torch.softmax(scores, -1)
            log_expert = torch.log_softmax(expert_logits[at], -1)[valid]
            expert = expert + of_fact * (target * (target.log() - log_expert)).sum()
    return anti / num_fact + expert / num_fact + settings.gate_weight * gate / num_gate


def value_and_gradient(lm, weights: Weights, rows: list[Example], objective: ImaeObjective):
    batch = {name: jnp.asarray(array[0]) for name, array in make_batch(rows, 1).arrays().items()}
    counts = objective.counts(lm.config, batch)

    def loss_of(units):
        sums = objective.sums(objective.attach(weights.base, units), lm.config, batch)
        return objective.loss(sums, counts)

    return jax.jit(jax.value_and_grad(loss_of))(weights.units)


@pytest.mark.parametrize("settings", LOSSES, ids=lambda s: f"{s.valid_form}-{s.delta}-{s.mean}")
@pytest.mark.parametrize("kind", ["gqa", "tied", "gemma3"])
def test_loss_and_gradient_equal_torch(tiny, kind, settings):
    torch = pytest.importorskip("torch")
    checkpoint = tiny(kind, initializer_range=0.2)
    lm = checkpoint.load(stacked=True)
    weights = with_random_units(lm.model.weights(), lm.config)
    rows = examples(5)

    units = {
        name: torch.tensor(np.asarray(array), requires_grad=True) for name, array in weights.units.items()
    }
    expected = torch_loss(checkpoint.hf, units, rows, settings)
    expected.backward()

    loss, gradient = value_and_gradient(lm, weights, rows, ImaeObjective(UNITS, settings))
    np.testing.assert_allclose(loss, expected.item(), rtol=2e-5)
    for name, array in gradient.items():
        reference = units[name].grad.numpy()
        np.testing.assert_allclose(array, reference, atol=2e-5 * np.abs(reference).max(), err_msg=name)


@pytest.mark.parametrize("remat", ["full", "dots"])
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


def test_units_are_smaller_than_the_base():
    """The tests above would not notice swapped widths if these were equal."""
    assert TINY.intermediate_size != UNIT_SIZE
