"""The training losses of the units and of the adapters, as sums and counts.

A sum and its count are divided once, after all micro-batches and devices: a mean of means would weight
tokens by the size of the batch that they happen to be in.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from imae_jax.errors import UserError
from imae_jax.llama import Weights, project
from imae_jax.plausibility import FORMS, plausible

MEANS = ("token", "example")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the losses.

    Attributes:
        beta: weight of the base's term in p_target; objective `paper`.
        alpha: α, weight of `log p_right − log p_wrong` in the targets; objective `pairs`.
        tau: τ, factor of the log-ratios of the modes to base; objective `preference`.
        valid_form: form of V_valid, the tokens that the contrast may touch: see `plausibility`. The paper
            writes `logit`, whose result changes when a constant is added to all logits, hence the default.
        delta: δ.
        gate_weight: factor of L_gate; the paper's is 1, 0 trains without it.
        keep: λ, factor of L_keep, which holds both modes to the base on all other tokens; 0 trains without
            it. None takes 0 with objective `paper`, which has no such loss, and 1 with the others.
        mean: `token`, the mean over all tokens of the batch, or `example`, the mean over rows of each
            row's mean, in which long answers weigh no more than short ones.
    """

    beta: float = 2.0
    alpha: float = 2.0
    tau: float = 0.5
    valid_form: str = "probability"
    delta: float = 0.1
    gate_weight: float = 1.0
    keep: float | None = None
    mean: str = "token"

    def __post_init__(self):
        if self.valid_form not in FORMS:
            raise UserError(f"loss.valid_form {self.valid_form!r}: use {' or '.join(FORMS)}")
        if self.mean not in MEANS:
            raise UserError(f"loss.mean {self.mean!r}: use {' or '.join(MEANS)}")
        for name in ("beta", "alpha", "tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"loss.{name} {getattr(self, name)} must be above 0 and finite")
        for name in ("gate_weight", "keep"):
            if not 0 <= (getattr(self, name) or 0.0) < math.inf:
                raise UserError(f"loss.{name} {getattr(self, name)} must be at least 0 and finite")
        if not 0 < self.delta <= 1:
            raise UserError(f"loss.delta {self.delta} must be above 0 and at most 1")


def target_log_probs(logits_base: jax.Array, logits_anti: jax.Array, settings: LossConfig) -> jax.Array:
    """`log p_target`, float32 [..., V]: softmax over V_valid of `β log p_base − log p_anti`.

    Tokens outside of V_valid get -inf; the arg-max of the base is always inside.
    """
    log_base = jax.nn.log_softmax(logits_base)
    log_anti = jax.nn.log_softmax(logits_anti)
    return _log_softmax_of_valid(settings.beta * log_base - log_anti, logits_base, settings)


def pair_targets(
    logits_base: jax.Array, logits_right: jax.Array, logits_wrong: jax.Array, settings: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """`log p_E` and `log p_A`, float32 [..., V]: what expert and anti-expert mode are to become.

    Softmax over V_valid of `log p_base ± α (log p_right − log p_wrong)`, the contrast of DExperts (Liu et
    al., arXiv 2105.03023); tokens outside of V_valid get -inf.
    """
    base, right, wrong = map(jax.nn.log_softmax, (logits_base, logits_right, logits_wrong))
    contrast = settings.alpha * (right - wrong)
    return (
        _log_softmax_of_valid(base + contrast, logits_base, settings),
        _log_softmax_of_valid(base - contrast, logits_base, settings),
    )


def _log_softmax_of_valid(scores: jax.Array, logits_base: jax.Array, settings: LossConfig) -> jax.Array:
    valid = plausible(logits_base, settings.delta, settings.valid_form)
    return jax.nn.log_softmax(jnp.where(valid, scores, -jnp.inf))


def token_weights(valid: jax.Array, mean: str) -> jax.Array:
    """What each token counts in a mean: float32 [B, P] from bool [B, P]."""
    weights = valid.astype(jnp.float32)
    if mean == "example":
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1.0)
    return weights


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`KL(p ‖ q)` [...] over the last axis, where `log_p` may hold -inf."""
    supported = log_p > -jnp.inf
    log_ratio = jnp.where(supported, jnp.where(supported, log_p, 0.0) - log_q, 0.0)
    return jnp.sum(jnp.exp(log_p) * log_ratio, axis=-1)


def fact_loss_sums(
    weights: Weights,
    hidden_base: jax.Array,
    hidden_anti: jax.Array,
    hidden_expert: jax.Array,
    targets: jax.Array,
    token_weight: jax.Array,
    settings: LossConfig,
    *,
    chunk: int = 16,
) -> dict[str, jax.Array]:
    """Sums of L_anti and L_expert over T_fact, in float32.

    The vocabulary projection and everything after it run in chunks of positions that the backward
    pass computes again, so that memory is B · chunk · V whatever the length.

    Args:
        weights: for the projection; no gradient flows into the base.
        hidden_base, hidden_anti, hidden_expert: [B, P, D], hidden states of the three modes at the
            positions that predict T_fact; `hidden_base` carries no gradient.
        targets: int32 [B, P], the tokens of T_fact.
        token_weight: float32 [B, P], from `token_weights`; 0 at padding.
        settings: settings of the losses.
        chunk: positions per row that are projected at once.

    Returns:
        Float32 scalars: `anti` and `expert`, the sums of the two losses.
    """
    chex.assert_equal_shape([hidden_base, hidden_anti, hidden_expert])
    chex.assert_shape([targets, token_weight], hidden_base.shape[:2])
    frozen = Weights(jax.lax.stop_gradient(weights.base))

    @jax.checkpoint
    def chunk_sums(arrays):
        base, anti, expert, targets, token_weight = arrays
        logits_anti = project(frozen, anti)
        target = target_log_probs(project(frozen, base), jax.lax.stop_gradient(logits_anti), settings)
        target = jax.lax.stop_gradient(target)
        kl = kl_divergence(target, jax.nn.log_softmax(project(frozen, expert)))
        picked = jnp.take_along_axis(logits_anti, targets[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits_anti, axis=-1) - picked
        return jnp.sum(token_weight * nll), jnp.sum(token_weight * kl)

    arrays = (hidden_base, hidden_anti, hidden_expert, targets, token_weight)
    anti, expert = _sum_chunks(chunk_sums, arrays, chunk)
    return {"anti": anti, "expert": expert}


def pair_loss_sums(
    weights: Weights,
    frozen: tuple[jax.Array, jax.Array, jax.Array],
    hidden_anti: jax.Array,
    hidden_expert: jax.Array,
    token_weight: jax.Array,
    settings: LossConfig,
    *,
    chunk: int = 16,
) -> dict[str, jax.Array]:
    """Sums of `KL(p_A ‖ p_anti)` and `KL(p_E ‖ p_expert)` over T_fact; chunks and arguments as in
    `fact_loss_sums`.

    Args:
        frozen: [B, P, D] of the base, the model of right and the model of wrong answers, without gradient.
    """
    projection = Weights(jax.lax.stop_gradient(weights.base))

    @jax.checkpoint
    def chunk_sums(arrays):
        *frozen, anti, expert, token_weight = arrays
        target_expert, target_anti = pair_targets(*(project(projection, h) for h in frozen), settings)
        kl_anti = kl_divergence(target_anti, jax.nn.log_softmax(project(projection, anti)))
        kl_expert = kl_divergence(target_expert, jax.nn.log_softmax(project(projection, expert)))
        return jnp.sum(token_weight * kl_anti), jnp.sum(token_weight * kl_expert)

    frozen = jax.lax.stop_gradient(frozen)
    anti, expert = _sum_chunks(chunk_sums, (*frozen, hidden_anti, hidden_expert, token_weight), chunk)
    return {"anti": anti, "expert": expert}


def preference_loss_sums(
    base: jax.Array, anti: jax.Array, expert: jax.Array, valid: jax.Array, settings: LossConfig
) -> dict[str, jax.Array]:
    """Sums over pairs of DPO's loss (Rafailov et al., arXiv 2305.18290), whose sign is the mode.

    Args:
        base, anti, expert: float32 [pairs, 2], log-probabilities of the wrong and of the right answer in
            every mode; `base` carries no gradient.
        valid: bool [pairs], False at padding.
        settings: settings of the losses.

    Returns:
        Float32 scalars: `anti` and `expert`.
    """

    def loss(mode, sign):
        wrong, right = jnp.moveaxis(mode - jax.lax.stop_gradient(base), -1, 0)
        return jnp.sum(jnp.where(valid, -jax.nn.log_sigmoid(sign * settings.tau * (right - wrong)), 0.0))

    return {"anti": loss(anti, -1.0), "expert": loss(expert, 1.0)}


def keep_loss_sums(
    weights: Weights,
    hidden_base: jax.Array,
    hidden_anti: jax.Array,
    hidden_expert: jax.Array,
    token_weight: jax.Array,
    *,
    chunk: int = 16,
) -> dict[str, jax.Array]:
    """Sum of `KL(p_base ‖ p_anti) + KL(p_base ‖ p_expert)`; chunks and arguments as in `fact_loss_sums`,
    the positions of any tokens.

    Returns:
        A float32 scalar: `keep`.
    """
    frozen = Weights(jax.lax.stop_gradient(weights.base))

    @jax.checkpoint
    def chunk_sums(arrays):
        base, *modes, token_weight = arrays
        log_base = jax.nn.log_softmax(project(frozen, base))
        return tuple(
            jnp.sum(token_weight * kl_divergence(log_base, jax.nn.log_softmax(project(frozen, mode))))
            for mode in modes
        )

    arrays = (jax.lax.stop_gradient(hidden_base), hidden_anti, hidden_expert, token_weight)
    return {"keep": sum(_sum_chunks(chunk_sums, arrays, chunk))}


def answer_loss_sums(
    weights: Weights,
    hidden_states: jax.Array,
    targets: jax.Array,
    valid: jax.Array,
    *,
    chunk: int = 16,
) -> dict[str, jax.Array]:
    """Sum of the cross-entropy over answer tokens, in float32 and in chunks as `fact_loss_sums`.

    Args:
        weights: for the projection; no gradient flows into the base.
        hidden_states: [B, P, D] at the positions that predict the tokens.
        targets: int32 [B, P].
        valid: bool [B, P], False at padding.
        chunk: positions per row that are projected at once.

    Returns:
        Float32 scalars: `nll`, and `correct`, the number of tokens that are the arg-max.
    """
    chex.assert_shape([targets, valid], hidden_states.shape[:2])
    frozen = Weights(jax.lax.stop_gradient(weights.base))

    @jax.checkpoint
    def chunk_sums(arrays):
        hidden, targets, valid = arrays
        logits = project(frozen, hidden)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - picked
        correct = valid & (jnp.argmax(logits, axis=-1) == targets)
        return jnp.sum(jnp.where(valid, nll, 0.0)), jnp.sum(correct, dtype=jnp.float32)

    nll, correct = _sum_chunks(chunk_sums, (hidden_states, targets, valid), chunk)
    return {"nll": nll, "correct": correct}


def token_log_probs(
    weights: Weights, hidden_states: jax.Array, targets: jax.Array, *, chunk: int = 16
) -> jax.Array:
    """Log-probabilities of given tokens, float32 [B, P]; arguments and chunks as in `answer_loss_sums`."""
    frozen = Weights(jax.lax.stop_gradient(weights.base))

    @jax.checkpoint
    def chunk_log_probs(arrays):
        hidden, targets = arrays
        logits = project(frozen, hidden)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    B, P = targets.shape
    chunks = jax.lax.map(chunk_log_probs, tuple(_split(x, min(chunk, P)) for x in (hidden_states, targets)))
    return jnp.moveaxis(chunks, 0, 1).reshape(B, -1)[:, :P]


def _sum_chunks(
    chunk_sums: Callable[[tuple], tuple[jax.Array, jax.Array]], arrays: tuple, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Adds up `chunk_sums` over chunks of the position axis of [B, P, …] arrays."""
    size = min(chunk, arrays[0].shape[1])

    def add(sums, arrays):
        return jax.tree.map(jnp.add, sums, chunk_sums(arrays)), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), tuple(_split(x, size) for x in arrays))[0]


def _split(x: jax.Array, size: int) -> jax.Array:
    """[B, P, …] to chunks [⌈P / size⌉, B, size, …], padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def gate_loss_sums(
    gates: jax.Array, fact: jax.Array, answer: jax.Array, token_weight: jax.Array
) -> dict[str, jax.Array]:
    """Sums of L_gate and of the gate itself over layers and answer tokens.

    Args:
        gates: float32 [L, B, T].
        fact: bool [B, T], True at positions that predict a token of T_fact.
        answer: bool [B, T], True at positions that predict an answer token; includes `fact`.
        token_weight: float32 [B, T], from `token_weights` of `answer`.

    Returns:
        Float32: `gate`, a scalar, the sum of `1 − a` on T_fact and of `a` on the rest of the answer;
        `gate_on_fact` and `gate_off_fact` [L], each layer's sums of `a` on either, unweighted.
    """
    chex.assert_shape([fact, answer, token_weight], gates.shape[1:])
    return {
        "gate": jnp.sum(token_weight * jnp.where(fact, 1 - gates, gates)),
        "gate_on_fact": jnp.sum(jnp.where(fact, gates, 0.0), axis=(1, 2)),
        "gate_off_fact": jnp.sum(jnp.where(answer & ~fact, gates, 0.0), axis=(1, 2)),
    }


def total_loss(sums: dict[str, jax.Array], counts: dict[str, jax.Array], settings: LossConfig) -> jax.Array:
    """`L_anti + L_expert + L_gate + λ L_keep`, each mean over its own count.

    Args:
        sums: sums of this micro-batch; `keep` only where λ is not 0.
        counts: of the whole batch, by the names of the sums: of weights of tokens or of pairs, and of gates
            over layers and modes. A mean over nothing adds nothing.
        settings: settings of the losses.
    """
    counts = jax.tree.map(lambda count: jnp.maximum(count, 1.0), counts)
    loss = (sums["anti"] + sums["expert"]) / counts["anti"]
    loss = loss + settings.gate_weight * sums["gate"] / counts["gate"]
    return loss + settings.keep * sums["keep"] / counts["keep"] if settings.keep else loss


def metrics_of(sums: dict[str, Any], counts: dict[str, Any], settings: LossConfig) -> dict[str, Any]:
    """The means to report, from the sums and counts of a whole batch; the gate's over all layers. NaN is the
    mean over nothing."""
    means = {name: jnp.mean(total) / counts[name] for name, total in sums.items()}
    return {"loss": total_loss(sums, counts, settings)} | means
