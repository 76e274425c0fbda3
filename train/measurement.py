"""What held-out rows tell of a model while it is trained."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from imae_jax.config import LlamaConfig
from imae_jax.llama import Weights
from imae_jax.train import data
from imae_jax.train.objectives import Objective
from imae_jax.train.step import make_evaluation, place_batch

logger = logging.getLogger(__name__)

ChooseMerging = Callable[[Sequence[Sequence[data.Example]]], data.Merging | None]


class Measurement:
    """Mean losses, the gate of every layer, how right and wrong answers fare.

    Args:
        llama: config of the base.
        objective: whose losses are measured.
        mesh: on which the weights lie.
        stage: has the held-out rows.
        batch_size: questions at a time.
        choose_merging: how the rows of such batches become token trees.
    """

    def __init__(
        self,
        llama: LlamaConfig,
        objective: Objective,
        mesh: jax.sharding.Mesh,
        stage: data.StageData,
        batch_size: int,
        choose_merging: ChooseMerging,
    ):
        self._mesh, self._batch_size, self._stage = mesh, batch_size, stage
        self._objective = objective
        self._losses, self._answers = make_evaluation(llama, objective, mesh)
        self._merging = {
            len(questions[0]): choose_merging(self._batches(sorted(questions, key=data.longest)))
            for questions in (stage.held_out, stage.answers)
            if questions
        }

    def __call__(self, trainable: Any, frozen: Weights, limit: int | None) -> dict[str, Any]:
        """Metrics of the first `limit` questions.

        For every mode: the mean log-probability of the tokens of `right_` and of `wrong_` answers; `margin_`,
        by how much a right answer's summed log-probability exceeds the wrong one's, the mean over pairs;
        `wins_`, the share of pairs where it does, ties counted half.
        """
        questions = sorted(self._stage.held_out[:limit], key=data.longest)
        batches = self._run(self._losses, questions, trainable, frozen)
        totals = jax.tree.map(lambda *x: sum(x), *batches)
        sums, counts = totals["sums"], totals["counts"]
        metrics = {k: float(v) for k, v in self._objective.metrics(sums, counts).items()}

        pairs = sorted(self._stage.answers[:limit], key=data.longest)
        batches = self._run(self._answers, pairs, trainable, frozen)
        tokens = np.array([[len(example.fact) for example in pair] for pair in pairs]).sum(axis=0)
        for mode in batches[0]:
            log_probs = np.concatenate([batch[mode] for batch in batches])[: 2 * len(pairs)].reshape(-1, 2)
            margins = log_probs[:, 1] - log_probs[:, 0]
            wrong, right = log_probs.sum(axis=0, dtype=np.float64) / tokens
            wins = np.mean((np.sign(margins) + 1) / 2)
            metrics |= {f"right_{mode}": float(right), f"wrong_{mode}": float(wrong)}
            metrics |= {f"margin_{mode}": float(margins.mean()), f"wins_{mode}": float(wins)}
        bad = [k for k, v in metrics.items() if not math.isfinite(v) and counts.get(k, 1) > 0]
        if bad:
            logger.warning("held-out rows: %s not finite, which is recorded as null", ", ".join(bad))
        per_layer = self._objective.per_layer(sums, counts)
        return metrics | {f"{k}_by_layer": np.asarray(v).tolist() for k, v in per_layer.items()}

    def _run(
        self, function: Any, questions: Sequence[data.Question], trainable: Any, frozen: Weights
    ) -> list[Any]:
        """What `function` gives for every batch."""
        merging = self._merging[len(questions[0])]
        batches = (data.make_batch(rows, 1, merging=merging) for rows in self._batches(questions))
        return [
            jax.device_get(function(trainable, frozen, place_batch(batch, self._mesh))) for batch in batches
        ]

    def _batches(self, questions: Sequence[data.Question]) -> list[list[data.Example]]:
        return data.in_batches(data.flat(questions), len(questions[0]) * self._batch_size)
