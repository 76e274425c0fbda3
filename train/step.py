"""The compiled train step and the state that it turns over."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from imae_jax.config import LlamaConfig
from imae_jax.distributed import place
from imae_jax.llama import Weights
from imae_jax.sharding import sharding, shardings_of
from imae_jax.train.config import OptimizerConfig
from imae_jax.train.data import Batch
from imae_jax.train.objectives import Objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes: the trainable part, float32, and the optimizer's state for it alone."""

    trainable: dict[str, Any]
    opt_state: Any


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of a step (from 0)."""
    return optax.warmup_cosine_decay_schedule(
        # The first step counts: it starts one step up the ramp, not at 0.
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(config.steps, config.warmup_steps + 1),
        end_value=config.final_ratio * config.learning_rate,
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    schedule = make_schedule(config)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay),
    )


def state_shardings(
    llama: LlamaConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Where every array of a `TrainState` lies: moments beside the weights that they belong to."""
    state = nnx.state(nnx.eval_shape(lambda: objective.module(llama, 0)))
    shapes = nnx.to_pure_dict(nnx.map_state(lambda _, v: v.get_value(), state))
    placed = nnx.to_pure_dict(shardings_of(state, mesh))
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, placement: placement,
        jax.eval_shape(optimizer.init, shapes),
        placed,
        transform_non_params=lambda _: sharding(mesh),
    )
    return TrainState(placed, opt_state)


def init_state(
    llama: LlamaConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    seed: int,
) -> TrainState:
    """Draws a new trainable part and its optimizer state, straight into their shards."""

    def init() -> TrainState:
        trainable = nnx.to_pure_dict(nnx.state(objective.module(llama, seed)))
        return TrainState(trainable, optimizer.init(trainable))

    return jax.jit(init, out_shardings=shardings)()


def make_train_step(
    llama: LlamaConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, Weights, dict], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles `(state, frozen, batch) -> (state, metrics)`.

    `state` is donated. `frozen`, the base and what the objective needs besides, is an argument, since a
    closure would bake the weights into the program, and is not differentiated: neither gradients nor
    optimizer state exist for it. Where the loss or the gradients are not finite, the new state is the old.

    Args:
        llama: config of the base.
        objective: what to minimize.
        optimizer: from `make_optimizer`.
        shardings: where the state's arrays lie.
        mesh: on which everything lies.

    Returns:
        The step; `batch` holds the arrays of `data.Batch`, metrics are float32 scalars, NaN where a mean is
        over nothing. Its attribute `lower` takes the same arguments, concrete or abstract, and returns
        `jax.stages.Lowered`.
    """

    def loss_of(trainable, frozen, micro, counts):
        sums = objective.sums(objective.attach(frozen, trainable), llama, micro)
        return objective.loss(sums, counts), sums

    def step(state: TrainState, frozen, batch):
        counts = objective.counts(llama, batch)
        gradient = jax.grad(loss_of, has_aux=True)

        def accumulate(carry, micro):
            return jax.tree.map(jnp.add, carry, gradient(state.trainable, frozen, micro, counts)), None

        first = jax.tree.map(lambda x: x[0], batch)
        shape = jax.eval_shape(gradient, state.trainable, frozen, first, counts)
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
        (grads, sums), _ = jax.lax.scan(accumulate, start, batch)
        metrics = objective.metrics(sums, counts) | {"grad_norm": optax.tree.norm(grads)}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        def update(state, grads):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            return TrainState(optax.apply_updates(state.trainable, updates), opt_state)

        # A loop of one turn or none changes the state in place. A `where` of old and new would hold both, and
        # so does a branch on GPUs.
        turns = finite.astype(int)
        return jax.lax.fori_loop(0, turns, lambda _, state: update(state, grads), state), metrics

    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding(mesh)))

    def run(state, frozen, batch):
        with jax.set_mesh(mesh):
            return compiled(state, frozen, batch)

    def lower(state, frozen, batch):
        with jax.set_mesh(mesh):
            return compiled.lower(state, frozen, batch)

    run.lower = lower
    return run


def make_evaluation(
    llama: LlamaConfig, objective: Objective, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., dict], Callable[..., dict]]:
    """Compiles what is measured on held-out rows; both take `(trainable, frozen, batch)`.

    Returns:
        A function for the losses, which gives `sums` and `counts` of the objective; and one for the
        answers' log-probabilities, `Objective.answer_log_probs`. The batch has one micro-batch.
    """

    def losses(trainable, frozen, batch):
        micro = jax.tree.map(lambda x: x[0], batch)
        sums = objective.sums(objective.attach(frozen, trainable), llama, micro)
        return {"sums": sums, "counts": objective.counts(llama, batch)}

    def answers(trainable, frozen, batch):
        micro = jax.tree.map(lambda x: x[0], batch)
        return objective.answer_log_probs(objective.attach(frozen, trainable), llama, micro)

    def compile(function):
        compiled = jax.jit(function, out_shardings=sharding(mesh))

        def run(*args):
            with jax.set_mesh(mesh):
                return compiled(*args)

        return run

    return compile(losses), compile(answers)


def place_batch(batch: Batch, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the devices, rows spread over the data and fsdp axes."""
    placement = sharding(mesh, *Batch.AXES)
    return {name: place(array, placement) for name, array in batch.arrays().items()}
