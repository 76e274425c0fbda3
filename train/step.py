"""The compiled train step and the state that it turns over."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from imae_jax.anti_expert import AntiExpertUnits
from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.llama import Taps, Weights, forward
from imae_jax.losses import LossConfig, fact_loss_sums, gate_loss_sums, metrics_of, total_loss
from imae_jax.sharding import sharding, shardings_of
from imae_jax.train.config import OptimizerConfig, TrainConfig
from imae_jax.train.data import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes: the units, float32, and the optimizer's state for them alone."""

    units: dict[str, jax.Array]
    opt_state: Any


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        # The first step counts: it starts one step up the ramp, not at 0.
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=config.final_ratio * config.learning_rate,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay),
    )


def state_shardings(
    llama: LlamaConfig,
    anti_expert: AntiExpertConfig,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Where every array of a `TrainState` lies: moments beside the weights that they belong to."""
    module = nnx.eval_shape(lambda: _draw_units(llama, anti_expert, 0))
    state = nnx.state(module)
    units = nnx.to_pure_dict(nnx.map_state(lambda _, v: v.get_value(), state))
    placed = nnx.to_pure_dict(shardings_of(state, mesh))
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, placement: placement,
        jax.eval_shape(optimizer.init, units),
        placed,
        transform_non_params=lambda _: sharding(mesh),
    )
    return TrainState(placed, opt_state)


def init_state(
    llama: LlamaConfig,
    anti_expert: AntiExpertConfig,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    seed: int,
) -> TrainState:
    """Draws new units and their optimizer state, straight into their shards."""

    def init() -> TrainState:
        units = nnx.to_pure_dict(nnx.state(_draw_units(llama, anti_expert, seed)))
        return TrainState(units, optimizer.init(units))

    return jax.jit(init, out_shardings=shardings)()


def make_train_step(
    llama: LlamaConfig,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, dict, dict], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles `(state, base, batch) -> (state, metrics)`.

    `state` is donated. `base` is an argument, since a closure would bake the weights into the program,
    and is not differentiated: neither gradients nor optimizer state exist for it.

    Args:
        llama: config of the base.
        config: losses, remat.
        optimizer: from `make_optimizer`.
        shardings: of the state.
        mesh: on which everything lies.

    Returns:
        The step; `batch` holds the arrays of `data.Batch`, metrics are float32 scalars.
    """

    def loss_of(units, base, micro, counts):
        sums = micro_batch_sums(Weights(base, units), llama, micro, config.loss, config.remat)
        return total_loss(sums, counts, config.loss), sums

    def step(state: TrainState, base, batch):
        counts = loss_counts(batch, llama.num_layers)
        gradient = jax.grad(loss_of, has_aux=True)

        def accumulate(carry, micro):
            return jax.tree.map(jnp.add, carry, gradient(state.units, base, micro, counts)), None

        shape = jax.eval_shape(gradient, state.units, base, jax.tree.map(lambda x: x[0], batch), counts)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
        (grads, sums), _ = jax.lax.scan(accumulate, start, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.units)
        units = optax.apply_updates(state.units, updates)
        metrics = metrics_of(sums, counts, config.loss)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(units, opt_state), metrics

    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding(mesh)))

    def run(state, base, batch):
        with jax.set_mesh(mesh):
            return compiled(state, base, batch)

    return run


def micro_batch_sums(
    weights: Weights, llama: LlamaConfig, batch: dict[str, jax.Array], loss: LossConfig, remat: str
) -> dict[str, jax.Array]:
    """Sums of all losses over one micro-batch (IMAE, section 3.2).

    The base rows give p_target and carry no gradient: they run without units and nothing of theirs is
    saved. The anti-expert and expert rows run as one doubled batch.

    Args:
        weights: base and units.
        llama: config of the base.
        batch: arrays of `data.Batch` without the leading `A`.
        loss: settings.
        remat: see `llama.forward`.
    """
    tokens, mask = batch["tokens"], batch["attention_mask"]
    B = tokens.shape[0]
    base = forward(
        Weights(jax.lax.stop_gradient(weights.base)), llama, tokens, attention_mask=mask
    ).hidden_states
    both = forward(
        weights,
        llama,
        jnp.concatenate([tokens, tokens]),
        attention_mask=jnp.concatenate([mask, mask]),
        strength=jnp.repeat(jnp.asarray([1.0, -1.0]), B),
        taps=Taps(gates=True),
        remat=remat,
    )

    def at_facts(hidden):
        return jnp.take_along_axis(hidden, batch["fact_positions"][..., None], axis=1)

    sums = fact_loss_sums(
        weights,
        at_facts(jax.lax.stop_gradient(base)),
        at_facts(both.hidden_states[:B]),
        at_facts(both.hidden_states[B:]),
        batch["fact_targets"],
        batch["fact_valid"],
        loss,
    )
    fact, answer = (jnp.concatenate([batch[name]] * 2) for name in ("fact", "answer"))
    return sums | gate_loss_sums(both.gates, fact, answer)


def loss_counts(batch: dict[str, jax.Array], num_layers: int) -> dict[str, jax.Array]:
    """What the sums of a whole batch are divided by; at least 1, so that none divides by zero."""
    facts = jnp.sum(batch["fact"], dtype=jnp.float32)
    answers = jnp.sum(batch["answer"], dtype=jnp.float32)
    gates = 2 * num_layers
    counts = {
        "fact": facts,
        "gate": gates * answers,
        "gate_on_fact": gates * facts,
        "gate_off_fact": gates * (answers - facts),
    }
    return {name: jnp.maximum(count, 1.0) for name, count in counts.items()}


def place_batch(batch: Batch, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the devices, rows spread over the data and fsdp axes."""
    placement = sharding(mesh, *Batch.AXES)
    return {name: jax.device_put(array, placement) for name, array in batch.arrays().items()}


def _draw_units(llama: LlamaConfig, anti_expert: AntiExpertConfig, seed: int) -> AntiExpertUnits:
    return AntiExpertUnits(llama, anti_expert, rngs=nnx.Rngs(seed), stack=llama.num_layers)
