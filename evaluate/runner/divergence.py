"""Every method's distribution over the next token against the base model's."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imae_jax.batching import run_by_length
from imae_jax.decode import Continuation, scoring, streams
from imae_jax.decode.joint import Joint
from imae_jax.decode.methods.imae import Strength
from imae_jax.language_model import LanguageModel
from imae_jax.sharding import row_shards, use_mesh

# Log-probability below which a token counts as ruled out: exp of it is next to nothing in float32. Masks of
# -1000 and -inf are far below it, and SLED's lower bound of -100 too.
RULED_OUT = -80.0


def measure(
    lm: LanguageModel, models: Any, joint: Joint, windows: Mapping[int, Continuation], length: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Statistics of every scored token.

    Args:
        lm: model, of which the base is compared to.
        models: weights and configs that the methods run on.
        joint: methods.
        windows: windows of the text by number, from `decode.windows`.
        length: tokens to which all windows are padded.

    Yields:
        The number of a window, and for every method float64 [4, tokens], in the order of `harm.STATISTICS`:
        cross-entropy and KL(base ‖ method) in nats, and whether the arg-max is the base model's and the token
        ruled out.
    """
    with_base, numbers = Joint((Strength(0.0), *joint.methods)), list(windows)
    with use_mesh(lm.mesh):
        rows_per_batch = scoring.batch_size()
    for i, row in run_by_length(
        functools.partial(_statistics, models, with_base),
        [windows[number].tokens for number in numbers],
        tokens_per_batch=rows_per_batch * length,
        length_multiple=length,
        mesh=lm.mesh,
    ):
        window = windows[numbers[i]]
        values = row[:, :, window.start - 1 : len(window.tokens) - 1].astype(np.float64)
        if np.isnan(values).any():
            where = f"{joint.name}, window {numbers[i]} of the text"
            raise streams.not_finite_error(models, with_base, [window.tokens], where)
        yield numbers[i], list(values)


@functools.partial(jax.jit, static_argnums=1)
def _statistics(models, method, tokens, lengths):
    """[B, M, 4, T] of the token that follows every position; the first of the method's M + 1 is base."""
    B, T = tokens.shape
    mask = jnp.arange(T) < lengths[:, None]
    caches = streams.empty_caches(models, method, B, T)
    hidden, _ = streams.run(
        models, method, tokens[None], attention_mask=mask[None], answer=mask[None], caches=caches
    )
    # As in `scoring`: nothing of size B · T · V is ever built.
    limit = max(1, scoring.POSITIONS_PER_PROJECTION // streams.projections(method)) * row_shards()
    size = math.gcd(1 << (limit.bit_length() - 1), B * T)
    following = jnp.roll(tokens, -1, axis=1)

    def in_chunks(x):
        chunks = x.reshape(*x.shape[:-3], -1, size, x.shape[-1])
        return jnp.moveaxis(chunks, -3, 0)

    def compare_chunk(chunk):
        hidden, targets = chunk
        logits = streams.logits_of(models, method, hidden)
        scores = method.scores(logits)
        base = jax.nn.log_softmax(scores[0])
        compared = jnp.stack([_compare(base, method_scores, targets) for method_scores in scores[1:]])
        return jnp.where(streams.finite(logits), compared, jnp.nan)

    chunks = (jax.tree.map(in_chunks, hidden), following.reshape(-1, size))
    values = jax.lax.map(compare_chunk, chunks)  # [chunks, M, 4, size]
    values = jnp.moveaxis(values, 0, -2).reshape(*values.shape[1:3], B, T)
    return jnp.moveaxis(values, 2, 0)


def _compare(base, scores, targets):
    """[4, P] from log-probabilities of the base model and scores of a method, [P, V] both."""
    log_q = jax.nn.log_softmax(scores)
    target_log_q = jnp.take_along_axis(log_q, targets[:, None], axis=-1)[:, 0]
    p = jnp.exp(base)
    # Where p is 0 the term is 0, whatever the method gives it.
    kl = jnp.sum(jnp.where(p > 0, p * (base - log_q), 0.0), axis=-1)
    same = jnp.argmax(scores, axis=-1) == jnp.argmax(base, axis=-1)
    return jnp.stack(
        [-target_log_q, kl, same.astype(jnp.float32), (target_log_q < RULED_OUT).astype(jnp.float32)]
    )
