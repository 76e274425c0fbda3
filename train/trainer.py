"""The loop over the optimizer steps of one objective, with hooks. It knows nothing of files."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from imae_jax.config import LlamaConfig
from imae_jax.llama import Weights
from imae_jax.train.config import OptimizerConfig
from imae_jax.train.data import Batch
from imae_jax.train.objectives import Objective
from imae_jax.train.step import (
    TrainState,
    init_state,
    make_optimizer,
    make_train_step,
    place_batch,
    state_shardings,
)


@dataclasses.dataclass
class Step:
    """An optimizer step that is done, for hooks.

    Attributes:
        number: its number, counted from 1.
        is_last: whether it ends the stage.
        state: the state after the step. The next step donates it: keep no reference.
        metrics: the step's metrics. Hooks see what hooks before them added; those that log come last.
        tokens: number of tokens in its batch, without padding.
        seconds: time that it took, hooks not counted.
    """

    number: int
    is_last: bool
    state: TrainState
    metrics: dict[str, float]
    tokens: int
    seconds: float


Hook = Callable[[Step], None]
"""Called after every step, on all processes. What it raises ends the stage."""


class NotFinite(Exception):
    """A step's loss or gradient was not finite: the state is what it was before.

    Attributes:
        number: number of the step, from 1.
        names: metrics that are not finite.
        state: before the step.
    """

    def __init__(self, number: int, names: Sequence[str], state: TrainState):
        super().__init__(f"{', '.join(names)} not finite at step {number}")
        self.number, self.names, self.state = number, names, state


class Trainer:
    """Optimizer and compiled step of one objective.

    Args:
        llama: config of the base.
        objective: what to minimize.
        optimizer: its settings; they say how many steps there are.
        mesh: on which everything lies.
        seed: draws the trainable part.
    """

    def __init__(
        self,
        llama: LlamaConfig,
        objective: Objective,
        optimizer: OptimizerConfig,
        mesh: jax.sharding.Mesh,
        seed: int,
    ):
        self.steps = optimizer.steps
        self.mesh = mesh
        transformation = make_optimizer(optimizer)
        self.shardings = state_shardings(llama, objective, transformation, mesh)
        self._init = lambda: init_state(llama, objective, transformation, self.shardings, seed)
        self.train_step = make_train_step(llama, objective, transformation, self.shardings, mesh)

    def init_state(self) -> TrainState:
        """The state before the first step, in its shards."""
        return self._init()

    def state_shape(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self._init)

    def run(
        self,
        state: TrainState,
        frozen: Weights,
        batches: Callable[[int], Batch],
        *,
        start: int = 0,
        hooks: Sequence[Hook] = (),
    ) -> TrainState:
        """Takes all steps that are left.

        Args:
            state: after `start` steps; donated.
            frozen: the base, stacked, and what the objective needs besides.
            batches: the batch of a step, by its number from 0.
            start: steps that are done.
            hooks: called in this order after every step.

        Returns:
            The state after the last step.

        Raises:
            NotFinite: loss or gradients are not finite.
        """

        def laid_out(done: int) -> tuple[int, dict[str, jax.Array]]:
            batch = batches(done)
            return int(batch.attention_mask.sum()), place_batch(batch, self.mesh)

        following = laid_out(start) if start < self.steps else None
        for number in range(start + 1, self.steps + 1):
            began = time.perf_counter()
            tokens, placed = following
            state, metrics = self.train_step(state, frozen, placed)
            # The next batch is laid out while the devices compute; then the loss is waited for, so that
            # no step is taken after one that failed.
            following = laid_out(number) if number < self.steps else None
            metrics = {key: float(value) for key, value in jax.device_get(metrics).items()}
            bad = [key for key in ("loss", "grad_norm") if not np.isfinite(metrics[key])]
            if bad:
                raise NotFinite(number, bad, state)
            seconds = time.perf_counter() - began
            step = Step(number, number == self.steps, state, metrics, tokens, seconds)
            for hook in hooks:
                hook(step)
        return state
