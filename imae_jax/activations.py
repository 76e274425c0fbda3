"""A model's inner values on texts, for directions, probes and studies of one's own."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from imae_jax.batching import run_by_length
from imae_jax.config import LlamaConfig
from imae_jax.decode.streams import not_finite_error
from imae_jax.errors import UserError
from imae_jax.language_model import LanguageModel
from imae_jax.llama import Options, Taps, Weights, forward

TOKENS_PER_BATCH, LENGTH_MULTIPLE = 512, 16
TOKENS = ("last", "all")


@dataclasses.dataclass(frozen=True)
class Activations:
    """What `capture` returns of n texts, float32.

    Attributes:
        layers: the residual stream after K layers, [n, K, D]; of all tokens a list of [T, K, D].
        heads: the output of every attention head, before `o_proj`, [n, L, N, H]; of all tokens a list of
            [T, L, N, H]. None where they are not asked for.
    """

    layers: Any
    heads: Any


def capture(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    layers: Sequence[int] = (),
    heads: bool = False,
    tokens: str = "last",
    add_special_tokens: bool = True,
    quiet: bool = True,
) -> Activations:
    """Inner values of base mode on texts, at their last token or at all of them.

    Args:
        lm: the model.
        texts: as they are.
        layers: numbers n, 0 ≤ n ≤ L, after how many layers; 0 is the embedding's output, and a control
            vector's `direction.N` is added after N + 1.
        heads: whether to capture heads.
        tokens: `last` or `all`.
        add_special_tokens: whether the tokenizer adds its own (BOS); a chat template holds them already.
        quiet: no progress bar.

    Raises:
        UserError: a layer that the model does not have, a text without tokens, or values that are not finite.
    """
    config, layers = lm.config, tuple(layers)
    for layer in layers:
        if not 0 <= layer <= config.num_layers:
            raise UserError(f"layer {layer}: the model has 0 (the embedding) to {config.num_layers}")
    if tokens not in TOKENS:
        raise UserError(f"tokens {tokens!r}: use {' or '.join(TOKENS)}")
    if isinstance(texts, str):
        raise UserError("texts is one text: give a list of texts")
    rows = lm.tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"] if texts else []
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise UserError(f"text {text!r} has no tokens: give one that has")
    values = run_by_length(
        functools.partial(_values, lm.model.weights(), config, Taps(layers, heads=heads), tokens),
        rows,
        tokens_per_batch=TOKENS_PER_BATCH,
        length_multiple=LENGTH_MULTIPLE,
        mesh=lm.mesh,
    )
    what, n = "heads" if heads else "hidden states", len(rows)
    of_layers: Any = [None] * n
    of_heads: Any = [None] * n if heads else None
    if tokens == "last":
        of_layers = np.empty((n, len(layers), config.hidden_size), np.float32)
        if heads:
            of_heads = np.empty((n, config.num_layers, config.num_heads, config.head_dim), np.float32)
    for i, each in tqdm(values, total=n, desc=what, unit="text", disable=quiet):
        if tokens == "all":
            each = jax.tree.map(lambda x, row=rows[i]: x[: len(row)], each)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(each)):
            models, method = lm.prepare("base", generating=False)
            raise not_finite_error(models, method, [rows[i]], f"{what} of {texts[i]!r}")
        of_layers[i] = each[0]
        if heads:
            of_heads[i] = each[1]
    return Activations(of_layers, of_heads)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _values(
    weights: Weights, config: LlamaConfig, taps: Taps, which: str, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Values at the last token of each row [B, …], or at all [B, T, …], of layers and of heads."""
    mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
    output = forward(weights, config, tokens, attention_mask=mask, options=Options(taps))

    def at(x: jax.Array) -> jax.Array:  # [B, T, …] or [B, …]
        x = x.astype(jnp.float32)
        return x[jnp.arange(tokens.shape[0]), lengths - 1] if which == "last" else x

    stacked = [at(x) for x in output.hidden_layers]
    empty = jnp.zeros((*tokens.shape[: 1 + (which == "all")], 0, config.hidden_size))
    layers = jnp.stack(stacked, axis=-2) if stacked else empty
    heads = None if output.heads is None else at(jnp.moveaxis(output.heads, 0, 2))
    return layers, heads
