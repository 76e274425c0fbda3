"""What a stage of training minimizes: its trainable part, its losses, their counts and its metrics."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from imae_jax.anti_expert import AntiExpertUnits
from imae_jax.config import AntiExpertConfig, LlamaConfig, LoraConfig
from imae_jax.llama import Taps, Weights, forward
from imae_jax.lora import LoraDeltas
from imae_jax.losses import (
    LossConfig,
    answer_loss_sums,
    fact_loss_sums,
    gate_loss_sums,
    metrics_of,
    token_weights,
    total_loss,
)

Arrays = dict[str, jax.Array]


class Objective(abc.ABC):
    """A stage's loss. Implementations are frozen dataclasses.

    Sums over a micro-batch are divided by counts of the whole batch, so that accumulation is exact.
    """

    shown: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics that the progress bar shows."""

    @abc.abstractmethod
    def module(self, llama: LlamaConfig, seed: int) -> nnx.Module:
        """Declares the trainable part, stacked along layers, float32."""

    @abc.abstractmethod
    def attach(self, base: dict[str, Any], trainable: Any) -> Weights:
        """The model with its trainable part."""

    @abc.abstractmethod
    def sums(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        """Float32 scalars, summed over a micro-batch: arrays of `data.Batch` without the leading A."""

    @abc.abstractmethod
    def counts(self, llama: LlamaConfig, batch: Arrays) -> Arrays:
        """What the sums are divided by, from the whole batch; scalars, some of which may be 0."""

    @abc.abstractmethod
    def loss(self, sums: Arrays, counts: Arrays) -> jax.Array:
        """The scalar to minimize; linear in `sums`."""

    @abc.abstractmethod
    def metrics(self, sums: Arrays, counts: Arrays) -> Arrays:
        """Scalars to log; has `loss`."""

    def per_layer(self, sums: Arrays, counts: Arrays) -> dict[str, Any]:
        """What to log of every layer where the model is evaluated: [L] arrays."""
        return {}

    @abc.abstractmethod
    def answer_log_probs(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        """Summed log-probability of the `fact` tokens in every mode of the model, `base` among them."""


@dataclasses.dataclass(frozen=True)
class ImaeObjective(Objective):
    """The anti-expert units' three losses (IMAE, section 3.2).

    Attributes:
        anti_expert: sizes of the units.
        settings: of the losses.
        remat, attention: see `llama.forward`.
        first_layer: units of layers below stay as they begin, where they contribute nothing. L_gate counts
            their gates, which nothing moves.
    """

    anti_expert: AntiExpertConfig
    settings: LossConfig
    remat: str = "none"
    attention: str = "plain"
    first_layer: int = 0

    shown = ("loss", "anti", "expert", "gate")

    def module(self, llama: LlamaConfig, seed: int) -> nnx.Module:
        return AntiExpertUnits(llama, self.anti_expert, rngs=nnx.Rngs(seed), stack=llama.num_layers)

    def attach(self, base: dict[str, Any], trainable: Any) -> Weights:
        def trained_above(stacked):
            trained = jnp.arange(len(stacked)) >= self.first_layer
            trained = trained.reshape(-1, *[1] * (stacked.ndim - 1))
            return jnp.where(trained, stacked, jax.lax.stop_gradient(stacked))

        if self.first_layer:
            trainable = jax.tree.map(trained_above, trainable)
        return Weights(base, units=trainable)

    def sums(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        """The base rows give p_target and carry no gradient: they run without units and nothing of
        theirs is saved. The anti-expert and expert rows run as one doubled batch."""
        tokens, mask = batch["tokens"], batch["attention_mask"]
        B = tokens.shape[0]
        frozen = Weights(jax.lax.stop_gradient(weights.base))
        base = forward(frozen, llama, tokens, attention_mask=mask, attention=self.attention).hidden_states
        both = forward(
            weights,
            llama,
            jnp.concatenate([tokens, tokens]),
            attention_mask=jnp.concatenate([mask, mask]),
            strength=jnp.repeat(jnp.asarray([1.0, -1.0]), B),
            taps=Taps(gates=True),
            remat=self.remat,
            attention=self.attention,
        )
        sums = fact_loss_sums(
            weights,
            at_facts(batch, jax.lax.stop_gradient(base)),
            at_facts(batch, both.hidden_states[:B]),
            at_facts(batch, both.hidden_states[B:]),
            batch["fact_targets"],
            token_weights(batch["fact_valid"], self.settings.mean),
            self.settings,
        )
        fact, answer = (jnp.concatenate([batch[name]] * 2) for name in ("fact", "answer"))
        weight = token_weights(answer, self.settings.mean)
        return sums | gate_loss_sums(both.gates, fact, answer, weight)

    def counts(self, llama: LlamaConfig, batch: Arrays) -> Arrays:
        facts = jnp.sum(batch["fact"], dtype=jnp.float32)
        answers = jnp.sum(batch["answer"], dtype=jnp.float32)
        gates = 2 * llama.num_layers
        return {
            "fact": jnp.sum(token_weights(batch["fact_valid"], self.settings.mean)),
            "gate": gates * jnp.sum(token_weights(batch["answer"], self.settings.mean)),
            "gate_on_fact": 2 * facts,
            "gate_off_fact": 2 * (answers - facts),
        }

    def loss(self, sums: Arrays, counts: Arrays) -> jax.Array:
        return total_loss(sums, counts, self.settings)

    def metrics(self, sums: Arrays, counts: Arrays) -> Arrays:
        return metrics_of(sums, counts, self.settings)

    def per_layer(self, sums: Arrays, counts: Arrays) -> dict[str, Any]:
        return {name: sums[name] / counts[name] for name in ("gate_on_fact", "gate_off_fact")}

    def answer_log_probs(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        return {
            mode: _log_prob_sum(weights, llama, batch, strength=o, attention=self.attention)
            for mode, o in {"base": None, "expert": -1.0, "anti_expert": 1.0}.items()
        }


@dataclasses.dataclass(frozen=True)
class AnswerObjective(Objective):
    """Cross-entropy on the hallucinated answers' tokens: the anti-expert LLM of ICD.

    Attributes:
        lora: the low-rank deltas to train.
        remat, attention: see `llama.forward`.
    """

    lora: LoraConfig
    remat: str = "none"
    attention: str = "plain"

    shown = ("loss", "accuracy")

    def module(self, llama: LlamaConfig, seed: int) -> nnx.Module:
        return LoraDeltas(llama, self.lora, rngs=nnx.Rngs(seed), stack=llama.num_layers)

    def attach(self, base: dict[str, Any], trainable: Any) -> Weights:
        return Weights(base, lora=trainable, lora_scale=self.lora.scale)

    def sums(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        output = forward(
            weights,
            llama,
            batch["tokens"],
            attention_mask=batch["attention_mask"],
            adapter=1.0,
            remat=self.remat,
            attention=self.attention,
        )
        hidden = at_facts(batch, output.hidden_states)
        return answer_loss_sums(weights, hidden, batch["fact_targets"], batch["fact_valid"])

    def counts(self, llama: LlamaConfig, batch: Arrays) -> Arrays:
        return {"answer": jnp.sum(batch["fact_valid"], dtype=jnp.float32)}

    def loss(self, sums: Arrays, counts: Arrays) -> jax.Array:
        return sums["nll"] / counts["answer"]

    def metrics(self, sums: Arrays, counts: Arrays) -> Arrays:
        return {"loss": self.loss(sums, counts), "accuracy": sums["correct"] / counts["answer"]}

    def answer_log_probs(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        return {
            mode: _log_prob_sum(weights, llama, batch, adapter=factor, attention=self.attention)
            for mode, factor in {"base": None, "anti_expert_llm": 1.0}.items()
        }


def _log_prob_sum(weights: Weights, llama: LlamaConfig, batch: Arrays, **options: Any) -> jax.Array:
    output = forward(weights, llama, batch["tokens"], attention_mask=batch["attention_mask"], **options)
    hidden = at_facts(batch, output.hidden_states)
    return -answer_loss_sums(weights, hidden, batch["fact_targets"], batch["fact_valid"])["nll"]


def at_facts(batch: Arrays, hidden: jax.Array) -> jax.Array:
    """[B, T, D] at the positions that predict a token of T_fact: [B, P, D]."""
    return jnp.take_along_axis(hidden, batch["fact_positions"][..., None], axis=1)
