"""What an IMAE model does on every token of a text: gates, log-probabilities, most likely tokens.

What belongs to token x_i is computed at the position that predicts it, i − 1, as the training loss reads it;
nobody predicts the first token.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from imae_jax.anti_expert import MODES
from imae_jax.batching import run_by_length
from imae_jax.config import LlamaConfig
from imae_jax.decode import windows
from imae_jax.decode.streams import not_finite_error
from imae_jax.errors import UserError
from imae_jax.language_model import LanguageModel
from imae_jax.llama import Interventions, Options, Taps, Weights, forward, project

MODE_NAMES = ("base", "expert", "anti-expert")
BASE, EXPERT = 0, 1
TOP = 5
WINDOW = 2048
TOKENS_PER_BATCH, LENGTH_MULTIPLE, POSITIONS_PER_PROJECTION = 2048, 64, 128


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """A text to inspect.

    Attributes:
        title: heading of the text on the page.
        tokens: token ids, at least two.
        start: number of tokens of the prompt; None for a text that is no prompt with an answer.
        fact: whether a token is in T_fact, for every token of the answer; None where that is not known.
    """

    title: str
    tokens: tuple[int, ...]
    start: int | None = None
    fact: tuple[bool, ...] | None = None

    def regions(self) -> dict[str, np.ndarray]:
        """Parts of the text that summaries are made of, bool [T]; the first token is in none."""
        index = np.arange(len(self.tokens))
        regions = {"all tokens": index > 0}
        if self.start is not None:
            regions |= {"prompt": (index > 0) & (index < self.start), "answer": index >= self.start}
        if self.fact is not None:
            fact = np.zeros(len(index), bool)
            fact[self.start :] = self.fact
            regions |= {"T_fact": fact, "answer outside T_fact": regions["answer"] & ~fact}
        return regions


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a model does on an excerpt of T tokens, in M modes (`MODE_NAMES`).

    Values at token i are those computed at position i − 1; at the first token they are 0.

    Attributes:
        gates: float32 [M, L, T].
        log_probs: float32 [M, T], log-probabilities of the tokens, in nats.
        top_tokens: int32 [M, T, K], the most likely tokens in their place.
        top_log_probs: float32 [M, T, K], log-probabilities of the most likely tokens.
        context: int [T], number of tokens before the token that the model saw.
    """

    gates: np.ndarray
    log_probs: np.ndarray
    top_tokens: np.ndarray
    top_log_probs: np.ndarray
    context: np.ndarray


def check_window(window: int | None, config: LlamaConfig) -> int:
    """The window to use: by default 2048 tokens, or the model's context where that is less.

    Raises:
        UserError: `window` is over the model's context, or under 2.
    """
    # Not `context_length`: beyond this `dynamic` RoPE changes with each row's length, and so would windows.
    limit = config.max_position_embeddings
    if window is None:
        return min(WINDOW, limit)
    if not 2 <= window <= limit:
        raise UserError(f"--window {window}: give 2 to {limit}, the model's context")
    return window


def inspect(
    lm: LanguageModel,
    excerpts: Sequence[Excerpt],
    *,
    window: int | None = None,
    quiet: bool = True,
) -> list[Inspection]:
    """Runs all modes over excerpts as rows of one batch.

    An excerpt that is longer than the window is run in windows that overlap by half (`decode.windows`).

    Args:
        lm: model with units; stacked layer weights compile faster.
        excerpts: texts to inspect.
        window: tokens of a window; see `check_window`.
        quiet: no progress bar.

    Raises:
        UserError: a model without units, an excerpt that is too short, or token ids that the model lacks.
    """
    if lm.model.anti_expert_config is None:
        raise UserError(
            f"model {lm.base.reference} has no anti-expert units: give an IMAE directory (OUT/imae of a "
            "training run) as --model"
        )
    window = check_window(window, lm.config)
    for excerpt in excerpts:
        if len(excerpt.tokens) < 2:
            raise UserError(f"{excerpt.title} has {len(excerpt.tokens)} tokens: at least 2 are needed")
        lm.config.check_token_ids(excerpt.tokens)
    rows = [(e, row) for e, excerpt in enumerate(excerpts) for row in windows(excerpt.tokens, window)]
    run = functools.partial(_run_modes, lm.model.weights(), lm.config)
    values: list[tuple[np.ndarray, ...]] = [()] * len(rows)
    results = run_by_length(
        run,
        [row.tokens for _, row in rows],
        tokens_per_batch=TOKENS_PER_BATCH,
        length_multiple=LENGTH_MULTIPLE,
        mesh=lm.mesh,
    )
    for i, arrays in tqdm(results, total=len(rows), desc="inspect", unit="window", disable=quiet):
        e, row = rows[i]
        predicting = slice(row.start - 1, len(row.tokens) - 1)
        context = np.arange(row.start, len(row.tokens))
        values[i] = (*(array[predicting] for array in arrays), context)
        bad = np.isnan(values[i][1]).any(axis=0)
        if bad.any():
            mode = MODE_NAMES[int(bad.argmax())]
            models, method = lm.prepare(mode, generating=False)
            raise not_finite_error(models, method, [row.tokens], f"{mode}, {excerpts[e].title}")
    inspections = []
    for e in range(len(excerpts)):
        parts = zip(*(values[i] for i, row in enumerate(rows) if row[0] == e), strict=True)
        gates, log_probs, top_tokens, top_log_probs, context = (
            np.concatenate([np.zeros_like(arrays[0][:1]), *arrays]) for arrays in parts
        )
        tops = (np.moveaxis(array, 1, 0) for array in (top_tokens, top_log_probs))
        inspections.append(Inspection(np.moveaxis(gates, 0, -1), log_probs.T, *tops, context))
    return inspections


@functools.partial(jax.jit, static_argnums=1)
def _run_modes(
    weights: Weights, config: LlamaConfig, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, ...]:
    """At every position of tokens [B, T]: the gates [B, T, M, L], the log-probability [B, T, M] of the next
    token, NaN where logits are not finite, and the top tokens and their log-probabilities [B, T, M, K]."""
    B, T = tokens.shape
    M = len(MODE_NAMES)
    strength = jnp.repeat(jnp.asarray([MODES[name] for name in MODE_NAMES]), B)
    output = forward(
        weights,
        config,
        jnp.tile(tokens, (M, 1)),
        attention_mask=jnp.tile(jnp.arange(T) < lengths[:, None], (M, 1)),
        interventions=Interventions(strength=strength),
        options=Options(Taps(gates=True)),
    )

    def predict(position):
        hidden, target = position
        logits = project(weights, hidden)
        total = jax.nn.logsumexp(logits)
        top, top_tokens = jax.lax.top_k(logits, min(TOP, config.vocab_size))
        log_prob = jnp.where(jnp.isfinite(logits).all(), logits[target] - total, jnp.nan)
        return log_prob, top_tokens, top - total

    # Nothing of size M · B · T · V is ever built.
    targets = jnp.tile(jnp.roll(tokens, -1, axis=1), (M, 1))
    positions = (output.hidden_states.reshape(M * B * T, -1), targets.reshape(-1))
    values = jax.lax.map(predict, positions, batch_size=POSITIONS_PER_PROJECTION)
    gates = output.gates.reshape(config.num_layers, M, B, T)
    by_position = (jnp.moveaxis(x.reshape(M, B, T, *x.shape[1:]), 0, 2) for x in values)
    return jnp.transpose(gates, (2, 3, 1, 0)), *by_position


def summarize(excerpts: Sequence[Excerpt], inspections: Sequence[Inspection]) -> list[dict[str, Any]]:
    """Means over each region of all excerpts that have it.

    Returns:
        For each region: `region`, `tokens` (how many), and by mode `gates` [M], `log_probs` [M] and
        `layers` [M, L], the mean gate of every layer; `gain`, by how much the expert's log-probabilities
        exceed the base's.
    """
    values_of: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for excerpt, inspection in zip(excerpts, inspections, strict=True):
        for region, mask in excerpt.regions().items():
            values = inspection.gates[:, :, mask], inspection.log_probs[:, mask]
            values_of.setdefault(region, []).append(values)
    rows = []
    for region, parts in values_of.items():
        gates, log_probs = (np.concatenate(x, axis=-1).astype(np.float64) for x in zip(*parts, strict=True))
        if log_probs.shape[-1]:
            rows.append(
                {
                    "region": region,
                    "tokens": log_probs.shape[-1],
                    "gates": gates.mean(axis=(1, 2)).tolist(),
                    "log_probs": log_probs.mean(axis=1).tolist(),
                    "layers": gates.mean(axis=2).tolist(),
                    "gain": float((log_probs[EXPERT] - log_probs[BASE]).mean()),
                }
            )
    return rows
