"""What a stage of training minimizes: its trainable part, its losses, their counts and its metrics."""

import abc
import dataclasses
import json
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from imae_jax.anti_expert import AntiExpertUnits
from imae_jax.config import AntiExpertConfig, LlamaConfig, LoraConfig
from imae_jax.llama import Interventions, Options, Taps, TreeLayout, Weights, forward
from imae_jax.lora import LoraDeltas, adapter_factors
from imae_jax.losses import (
    LossConfig,
    answer_loss_sums,
    fact_loss_sums,
    gate_loss_sums,
    keep_loss_sums,
    metrics_of,
    pair_loss_sums,
    preference_loss_sums,
    token_log_probs,
    token_weights,
    total_loss,
)
from imae_jax.token_tree import attend_to_ancestors

Arrays = dict[str, jax.Array]
# Places of the adapters in `Weights.lora` of objective `pairs`.
RIGHT, WRONG = 0, 1


class Objective(abc.ABC):
    """A stage's loss. Implementations are frozen dataclasses.

    Sums over a micro-batch are divided by counts of the whole batch, so that accumulation is exact.
    """

    shown: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics that the progress bar shows."""
    answers: ClassVar[tuple[str, ...]] = ("wrong",)
    """The rows of each question, neighbours in a batch: see `data.TokenizedData.stage`."""
    attention: str
    """See `llama.Options`."""

    @abc.abstractmethod
    def module(self, llama: LlamaConfig, seed: int) -> nnx.Module:
        """Declares the trainable part, stacked along layers, float32."""

    @abc.abstractmethod
    def attach(self, frozen: Weights, trainable: Any) -> Weights:
        """The model with its trainable part."""

    @property
    def identity(self) -> dict[str, str]:
        """Settings that a checkpoint belongs to, besides its base and its data."""
        return {}

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
        """Scalars to log; has `loss`. NaN is the mean over nothing."""

    def per_layer(self, sums: Arrays, counts: Arrays) -> dict[str, Any]:
        """What to log of every layer where the model is evaluated: [L] arrays."""
        return {}

    @abc.abstractmethod
    def answer_log_probs(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        """Summed log-probability of each row's `fact` tokens, float32 [B], in every mode of the model,
        `base` among them."""

    def _log_probs(
        self, weights: Weights, llama: LlamaConfig, batch: Arrays, interventions: Interventions
    ) -> jax.Array:
        """Those of one mode."""
        options = Options(attention=self.attention)
        hidden, _ = run(weights, llama, batch, interventions=interventions, options=options)
        return _fact_log_probs(weights, batch, hidden)


@dataclasses.dataclass(frozen=True)
class UnitsObjective(Objective):
    """What the losses of the anti-expert units share: L_gate, L_keep, and the passes that all need.

    Attributes:
        anti_expert: sizes of the units.
        settings: settings of the losses.
        remat, attention: see `llama.Options`.
        first_layer: units of layers below stay as they begin, where they contribute nothing. L_gate counts
            their gates, which nothing moves.
    """

    anti_expert: AntiExpertConfig
    settings: LossConfig
    remat: str = "none"
    attention: str = "plain"
    first_layer: int = 0

    shown = ("loss", "anti", "expert", "gate")

    @property
    def identity(self) -> dict[str, str]:
        return {"objective": json.dumps([type(self).__name__, dataclasses.asdict(self.settings)])}

    @abc.abstractmethod
    def frozen_rows(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> tuple[jax.Array, ...]:
        """Hidden states of `run` that the losses need without a gradient; those of the base come first."""

    @abc.abstractmethod
    def mode_sums(
        self,
        weights: Weights,
        batch: Arrays,
        frozen: tuple[jax.Array, ...],
        anti: jax.Array,
        expert: jax.Array,
    ) -> Arrays:
        """Sums of L_anti and L_expert from the hidden states of `frozen_rows` and of the modes."""

    def mode_count(self, batch: Arrays) -> jax.Array:
        """What those are means over: T_fact."""
        return jnp.sum(token_weights(batch["fact_valid"], self.settings.mean))

    def module(self, llama: LlamaConfig, seed: int) -> nnx.Module:
        return AntiExpertUnits(llama, self.anti_expert, rngs=nnx.Rngs(seed), stack=llama.num_layers)

    def attach(self, frozen: Weights, trainable: Any) -> Weights:
        def trained_above(stacked):
            trained = jnp.arange(len(stacked)) >= self.first_layer
            trained = trained.reshape(-1, *[1] * (stacked.ndim - 1))
            return jnp.where(trained, stacked, jax.lax.stop_gradient(stacked))

        if self.first_layer:
            trainable = jax.tree.map(trained_above, trainable)
        return dataclasses.replace(frozen, units=trainable)

    def sums(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        """Rows without a gradient run without units, and nothing of theirs is saved. The anti-expert and
        expert rows run as one doubled batch."""
        frozen = jax.lax.stop_gradient(self.frozen_rows(weights, llama, batch))
        anti, expert, gates = run(
            weights,
            llama,
            batch,
            copies=2,
            interventions=Interventions(strength=jnp.asarray([1.0, -1.0])),
            options=Options(Taps(gates=True), self.remat, self.attention),
        )
        sums = self.mode_sums(weights, batch, frozen, anti, expert)
        fact, answer = (jnp.concatenate([batch[name]] * 2) for name in ("fact", "answer"))
        sums |= gate_loss_sums(gates, fact, answer, token_weights(answer, self.settings.mean))
        if self.settings.keep:
            weight = token_weights(_other_tokens(batch), self.settings.mean)
            sums |= keep_loss_sums(weights, frozen[0], anti, expert, weights_as_run(batch, weight))
        return sums

    def counts(self, llama: LlamaConfig, batch: Arrays) -> Arrays:
        facts = jnp.sum(batch["fact"], dtype=jnp.float32)
        answers = jnp.sum(batch["answer"], dtype=jnp.float32)
        gates = 2 * llama.num_layers
        modes = self.mode_count(batch)
        counts = {
            "anti": modes,
            "expert": modes,
            "gate": gates * jnp.sum(token_weights(batch["answer"], self.settings.mean)),
            "gate_on_fact": 2 * facts,
            "gate_off_fact": 2 * (answers - facts),
        }
        if self.settings.keep:
            counts["keep"] = jnp.sum(token_weights(_other_tokens(batch), self.settings.mean))
        return counts

    def loss(self, sums: Arrays, counts: Arrays) -> jax.Array:
        return total_loss(sums, counts, self.settings)

    def metrics(self, sums: Arrays, counts: Arrays) -> Arrays:
        return metrics_of(sums, counts, self.settings)

    def per_layer(self, sums: Arrays, counts: Arrays) -> dict[str, Any]:
        return {name: jnp.divide(sums[name], counts[name]) for name in ("gate_on_fact", "gate_off_fact")}

    def answer_log_probs(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        return {
            mode: self._log_probs(weights, llama, batch, Interventions(strength=o))
            for mode, o in {"base": None, "expert": -1.0, "anti_expert": 1.0}.items()
        }


class ImaeObjective(UnitsObjective):
    """Objective `paper`: hallucinated answers alone (IMAE, section 3.2)."""

    def frozen_rows(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> tuple[jax.Array, ...]:
        return run(weights, llama, batch, options=Options(attention=self.attention))[:1]

    def mode_sums(self, weights, batch, frozen, anti, expert):
        hidden = (at_facts(batch, x) for x in (*frozen, anti, expert))
        weight = token_weights(batch["fact_valid"], self.settings.mean)
        return fact_loss_sums(weights, *hidden, batch["fact_targets"], weight, self.settings)


class PairsObjective(UnitsObjective):
    """Objective `pairs`: the contrast of two adapters of the base, one trained on right and one on wrong
    answers, on the tokens of both answers' sequences where they differ.

    What both kinds of answers share (length, register) cancels in the contrast. `Weights.lora` holds the
    adapters, as `lora.side_by_side` joins them.
    """

    answers = ("wrong", "right")

    def frozen_rows(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> tuple[jax.Array, ...]:
        """Base, right and wrong rows as one batch: each base weight is read once."""
        factors = adapter_factors(weights.lora, 2, (None, RIGHT, WRONG))
        rows = run(
            weights,
            llama,
            batch,
            copies=3,
            interventions=Interventions(adapter=factors),
            options=Options(attention=self.attention),
        )
        return rows[:3]

    def mode_sums(self, weights, batch, frozen, anti, expert):
        frozen = tuple(at_facts(batch, x) for x in frozen)
        anti, expert = at_facts(batch, anti), at_facts(batch, expert)
        weight = token_weights(batch["fact_valid"], self.settings.mean)
        return pair_loss_sums(weights, frozen, anti, expert, weight, self.settings)


class PreferenceObjective(UnitsObjective):
    """Objective `preference`: DPO on pairs, with the base as reference and the mode as sign.

    T_fact is every answer token: L_gate opens the gates on answers, L_keep is over the prompts.
    """

    answers = ("wrong", "right")

    def frozen_rows(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> tuple[jax.Array, ...]:
        return run(weights, llama, batch, options=Options(attention=self.attention))[:1]

    def mode_sums(self, weights, batch, frozen, anti, expert):
        pairs = (_fact_log_probs(weights, batch, hidden).reshape(-1, 2) for hidden in (*frozen, anti, expert))
        return preference_loss_sums(*pairs, _whole_pairs(batch), self.settings)

    def mode_count(self, batch: Arrays) -> jax.Array:
        return jnp.sum(_whole_pairs(batch), dtype=jnp.float32)


UNITS_OBJECTIVES: dict[str, type[UnitsObjective]] = {
    "paper": ImaeObjective,
    "pairs": PairsObjective,
    "preference": PreferenceObjective,
}


@dataclasses.dataclass(frozen=True)
class AnswerObjective(Objective):
    """Cross-entropy on the answers' tokens; on hallucinated ones it makes the anti-expert LLM of ICD.

    Attributes:
        lora: the low-rank deltas to train.
        mode: what the adapted model is called where it is measured.
        remat, attention: see `llama.Options`.
    """

    lora: LoraConfig
    mode: str = "anti_expert_llm"
    remat: str = "none"
    attention: str = "plain"

    shown = ("loss", "accuracy")

    def module(self, llama: LlamaConfig, seed: int) -> nnx.Module:
        return LoraDeltas(llama, self.lora, rngs=nnx.Rngs(seed), stack=llama.num_layers)

    def attach(self, frozen: Weights, trainable: Any) -> Weights:
        return dataclasses.replace(frozen, lora=trainable, lora_scale=self.lora.scale)

    def sums(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        adapted, options = Interventions(adapter=1.0), Options(remat=self.remat, attention=self.attention)
        hidden, _ = run(weights, llama, batch, interventions=adapted, options=options)
        return answer_loss_sums(weights, at_facts(batch, hidden), batch["fact_targets"], batch["fact_valid"])

    def counts(self, llama: LlamaConfig, batch: Arrays) -> Arrays:
        return {"answer": jnp.sum(batch["fact_valid"], dtype=jnp.float32)}

    def loss(self, sums: Arrays, counts: Arrays) -> jax.Array:
        return sums["nll"] / counts["answer"]

    def metrics(self, sums: Arrays, counts: Arrays) -> Arrays:
        return {"loss": self.loss(sums, counts), "accuracy": sums["correct"] / counts["answer"]}

    def answer_log_probs(self, weights: Weights, llama: LlamaConfig, batch: Arrays) -> Arrays:
        return {
            mode: self._log_probs(weights, llama, batch, Interventions(adapter=factor))
            for mode, factor in {"base": None, self.mode: 1.0}.items()
        }


def run(
    weights: Weights,
    llama: LlamaConfig,
    batch: Arrays,
    *,
    copies: int = 1,
    interventions: Interventions = Interventions(),
    options: Options = Options(),
) -> tuple[jax.Array | None, ...]:
    """`forward` of copies of a batch's rows, or of its token trees where it has them (not with attention
    `flash`, whose kernels take no mask).

    Args:
        copies: how many copies of the rows run as one batch.
        interventions: see `forward`; an array's first axis is copies.
        options: see `forward`.

    Returns:
        The copies' hidden states, each [B, T, D], of trees [B / R, S, D]; then the gates [L, copies · B, T]
        with that tap, else None.
    """
    tokens, mask, tree = batch["tokens"], batch["attention_mask"], None
    if "tree_tokens" in batch:
        ends = batch["tree_ends"]
        tokens, mask = batch["tree_tokens"], ends > 0
        tree = TreeLayout(batch["tree_positions"], attend_to_ancestors(ends))
    size = tokens.shape[0]
    tokens, mask, tree = jax.tree.map(lambda x: jnp.concatenate([x] * copies), (tokens, mask, tree))
    output = forward(
        weights,
        llama,
        tokens,
        attention_mask=mask,
        tree=tree,
        interventions=jax.tree.map(
            lambda x: jnp.repeat(x, size, axis=0) if jnp.ndim(x) else x, interventions
        ),
        options=options,
    )
    gates = output.gates
    if gates is not None and tree is not None:
        places = jnp.concatenate([batch["tree_places"]] * copies)
        gates = jnp.take_along_axis(gates, places[None], axis=2)
        gates = gates.reshape(len(gates), -1, batch["tokens"].shape[1])
    return *jnp.split(output.hidden_states, copies), gates


def weights_as_run(batch: Arrays, weight: jax.Array) -> jax.Array:
    """What each position counts, float32 [B, T], at the positions of `run`'s hidden states: a token that is
    in several rows of its tree counts for each."""
    if "tree_places" not in batch:
        return weight
    size = batch["tree_tokens"].shape[1]
    places = batch["tree_places"]
    return jax.vmap(lambda at, w: jnp.zeros(size).at[at].add(w))(places, weight.reshape(places.shape))


def at_facts(batch: Arrays, hidden: jax.Array) -> jax.Array:
    """Of one of `run`'s hidden states those that predict a token of T_fact: [B, P, D]."""
    positions = batch["fact_positions"]
    if "tree_places" in batch:
        places = batch["tree_places"].reshape(batch["tokens"].shape)
        positions = jnp.take_along_axis(places, positions, axis=1).reshape(len(hidden), -1)
    taken = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    return taken.reshape(*batch["fact_positions"].shape, -1)


def _fact_log_probs(weights: Weights, batch: Arrays, hidden: jax.Array) -> jax.Array:
    """Summed log-probability of each row's tokens of T_fact, float32 [B], from `run`'s hidden states."""
    log_probs = token_log_probs(weights, at_facts(batch, hidden), batch["fact_targets"])
    return jnp.sum(jnp.where(batch["fact_valid"], log_probs, 0.0), axis=-1)


def _whole_pairs(batch: Arrays) -> jax.Array:
    """Bool […, B / 2]: pairs that are not there to fill up a batch."""
    valid = batch["fact_valid"].any(axis=-1)
    return valid.reshape(*valid.shape[:-1], -1, 2).all(axis=-1)


def _other_tokens(batch: Arrays) -> jax.Array:
    """Bool […, B, T]: positions that predict a real token outside of T_fact."""
    # Rows without an answer only fill up a batch.
    real = batch["attention_mask"] & batch["answer"].any(axis=-1, keepdims=True)
    predicting = jnp.pad(real[..., 1:], [(0, 0)] * (real.ndim - 1) + [(0, 1)])
    return predicting & ~batch["fact"]
