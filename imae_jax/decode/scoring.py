"""Scores of given continuations under any decoding method, computing every shared token once.

The prefix common to all sequences goes into a key/value cache, once. What follows it is laid out as
token trees: answers that begin alike share the nodes of their beginning, and trees of several
questions fill up rows of one fixed length. A token attends to the prefix and to its own ancestors,
so that every sequence gets the scores that it would get alone, and one shape is compiled for a whole
benchmark.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imae_jax.cache import KVCache
from imae_jax.config import LlamaConfig
from imae_jax.decode import streams
from imae_jax.decode.methods import Method
from imae_jax.errors import UserError
from imae_jax.llama import Llama, Weights

ROW_LENGTH = 256
PREFIX_BUCKET = 64
ROWS_PER_BATCH = {"cpu": 1, "gpu": 16, "tpu": 16}
GROUPS_PER_WINDOW = 32
POSITIONS_PER_PROJECTION = 128


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A token sequence of which the part from `start` on is scored.

    Attributes:
        tokens: prompt and continuation, tokenized together.
        start: number of the prompt's own tokens.
        boundary_merged: the last token(s) of the prompt merged with the continuation's first, so that
            `tokens[:start]` is not what the prompt alone gives.
    """

    tokens: tuple[int, ...]
    start: int
    boundary_merged: bool = False

    def __post_init__(self):
        if not 1 <= self.start < len(self.tokens):
            raise UserError(
                f"a continuation with start {self.start} of {len(self.tokens)} tokens: at least one token "
                "before it and one to score are needed"
            )


def encode(
    tokenizer: Any,
    prompts: Sequence[str],
    continuations: Sequence[str],
    *,
    add_special_tokens: bool = True,
) -> list[Continuation]:
    """Tokenizes every prompt together with its continuation.

    Args:
        tokenizer: a transformers tokenizer.
        prompts, continuations: of equal length.
        add_special_tokens: whether the tokenizer may add its own (BOS); off for chat templates, which
            hold them already.

    Raises:
        UserError: a continuation adds no token to its prompt.
    """
    texts = [p + c for p, c in zip(prompts, continuations, strict=True)]
    unique = list(dict.fromkeys(prompts))
    alone = tokenizer(unique, add_special_tokens=add_special_tokens)["input_ids"]
    alone = dict(zip(unique, alone, strict=True))
    together = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    encoded = []
    for prompt, continuation, tokens in zip(prompts, continuations, together, strict=True):
        start = len(alone[prompt])
        if start == 0:
            raise UserError("a prompt without tokens: give a prompt, or a tokenizer that adds BOS")
        if len(tokens) <= start:
            raise UserError(f"the continuation {continuation!r} has no tokens of its own")
        merged = tokens[:start] != alone[prompt]
        encoded.append(Continuation(tuple(tokens), start, merged))
    return encoded


def score(
    model: Llama | Weights,
    config: LlamaConfig,
    groups: Sequence[Sequence[Continuation]],
    method: Method,
    *,
    row_length: int = ROW_LENGTH,
    rows_per_batch: int | None = None,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Scores every continuation's tokens: `s_t(x_t)` of METHODS section 2, teacher-forced.

    Args:
        model: with layers as separate arrays (`stacked=False`) for full speed.
        config: of the base.
        groups: continuations that belong together (the answers of a question): what they share is
            computed once.
        method: what scores.
        row_length: tokens per row; a group's tree that is longer is cut, a longer continuation gets a
            row of its own.
        rows_per_batch: rows computed at once; default by platform.

    Yields:
        `(i, scores)` for every group, in no particular order: one float32 array per continuation with
        the score of every token from its `start` on.

    Raises:
        UserError: a sequence over the context length, or a method that the model cannot run.
    """
    weights = model.weights() if isinstance(model, Llama) else model
    streams.check(weights, method)
    if not groups:
        return
    # Not `context_length`: beyond this `dynamic` RoPE follows each row's length, and no two can share tokens.
    limit = config.max_position_embeddings
    for i, group in enumerate(groups):
        for item in group:
            config.check_token_ids(item.tokens)
        longest = max((len(c.tokens) for c in group), default=0)
        if longest > limit:
            raise UserError(
                f"group {i} has a sequence of {longest} tokens, over the model's context of {limit}: "
                "shorten the prompt or the answer"
            )
    prefix = _common_prefix(c for group in groups for c in group)
    prefix_cache = _prefix_cache(weights, config, method, prefix)
    batch_rows = rows_per_batch or ROWS_PER_BATCH.get(jax.default_backend(), 1)

    for window_start in range(0, len(groups), GROUPS_PER_WINDOW):
        window = range(window_start, min(window_start + GROUPS_PER_WINDOW, len(groups)))
        pieces = _pieces({i: groups[i] for i in window}, len(prefix), row_length)
        rows = _fill_rows(pieces, row_length)
        node_scores: dict[int, np.ndarray] = {}
        for first in range(0, len(rows), batch_rows):
            batch = rows[first : first + batch_rows]
            length = max(row_length, *(row.length for row in batch))
            length = -(-length // row_length) * row_length
            arrays = [row.arrays(length) for row in batch]
            arrays += [_Row([]).arrays(length)] * (batch_rows - len(batch))
            tokens, parents, depths, ancestors = (np.stack(a) for a in zip(*arrays, strict=True))
            values = _score_nodes(
                weights,
                prefix_cache,
                tokens,
                parents,
                depths,
                ancestors,
                config=config,
                method=method,
            )
            for row, row_values in zip(batch, np.asarray(values), strict=False):
                offset = 0
                for tree in row.trees:
                    node_scores[id(tree)] = row_values[offset : offset + len(tree.tokens)]
                    offset += len(tree.tokens)
        results = {i: [np.empty(0, np.float32)] * len(groups[i]) for i in window}
        for tree in pieces:
            for group, index, nodes in tree.members:
                first = groups[group][index].start - len(prefix)
                results[group][index] = node_scores[id(tree)][nodes[first:]]
        yield from results.items()


class _TokenTree:
    """Sequences merged where they begin alike; a node's score is its token's, given its ancestors."""

    def __init__(self):
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.members: list[tuple[int, int, list[int]]] = []
        self._children: dict[tuple[int, int], int] = {}

    def missing(self, tokens: Sequence[int]) -> int:
        """How many nodes `add` would append."""
        node = -1
        for depth, token in enumerate(tokens):
            node = self._children.get((node, token), None)
            if node is None:
                return len(tokens) - depth
        return 0

    def add(self, tokens: Sequence[int], group: int, index: int) -> None:
        node, path = -1, []
        for depth, token in enumerate(tokens):
            child = self._children.get((node, token))
            if child is None:
                child = self._children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            path.append(child)
            node = child
        self.members.append((group, index, path))


@dataclasses.dataclass
class _Row:
    """Trees laid out one after another."""

    trees: list[_TokenTree]

    @property
    def length(self) -> int:
        return sum(len(tree.tokens) for tree in self.trees)

    def arrays(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """tokens, parents and depths int32 [T], and ancestors (self included) bool [T, T]."""
        tokens, parents, depths = (np.zeros(length, np.int32) for _ in range(3))
        ancestors = np.zeros((length, length), bool)
        offset = 0
        for tree in self.trees:
            part = slice(offset, offset + len(tree.tokens))
            tokens[part], depths[part] = tree.tokens, tree.depths
            for node, parent in enumerate(tree.parents, offset):
                if parent >= 0:
                    parents[node] = parent + offset
                    ancestors[node] = ancestors[parent + offset]
                ancestors[node, node] = True
            offset = part.stop
        return tokens, parents, depths, ancestors


def _common_prefix(continuations: Iterable[Continuation]) -> tuple[int, ...]:
    """The longest common *token* prefix that leaves out every token which predicts a scored one.

    The tokens of a prompt's beginning alone would not do: its last ones can merge with what follows.
    """
    prefix: tuple[int, ...] | None = None
    for item in continuations:
        tokens = item.tokens[: item.start - 1]
        if prefix is None:
            prefix = tokens
        if tokens[: len(prefix)] != prefix:
            same = 0
            while same < min(len(prefix), len(tokens)) and prefix[same] == tokens[same]:
                same += 1
            prefix = prefix[:same]
    return prefix or ()


def _pieces(groups: dict[int, Sequence[Continuation]], skip: int, length: int) -> list[_TokenTree]:
    """One tree a group, or several where one would exceed `length`."""
    trees = []
    for group, continuations in groups.items():
        tree = _TokenTree()
        for index, item in enumerate(continuations):
            tokens = item.tokens[skip:]
            if tree.tokens and len(tree.tokens) + tree.missing(tokens) > length:
                trees.append(tree)
                tree = _TokenTree()
            tree.add(tokens, group, index)
        trees.append(tree)
    return trees


def _fill_rows(trees: Sequence[_TokenTree], length: int) -> list[_Row]:
    """First-fit decreasing."""
    rows: list[_Row] = []
    for tree in sorted(trees, key=lambda t: -len(t.tokens)):
        size = len(tree.tokens)
        row = next((r for r in rows if r.length + size <= length), None)
        if row is None:
            rows.append(_Row([tree]))
        else:
            row.trees.append(tree)
    return rows


def _prefix_cache(weights, config, method, prefix: Sequence[int]) -> KVCache:
    length = -(-len(prefix) // PREFIX_BUCKET) * PREFIX_BUCKET
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(prefix)] = prefix
    mask = np.arange(length)[None] < len(prefix)
    return _fill_prefix(weights, tokens, mask, config=config, method=method)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def _fill_prefix(weights, tokens, mask, *, config, method):
    rows = streams.num_rows(method, 1)
    cache = KVCache.empty(config, rows, tokens.shape[1], weights.dtype)
    if tokens.shape[1] == 0:
        return cache
    return streams.run(weights, config, method, tokens, attention_mask=mask, cache=cache)[1]


@functools.partial(jax.jit, static_argnames=("config", "method"))
def _score_nodes(weights, prefix, tokens, parents, depths, ancestors, *, config, method):
    """Scores [B, T] of every node's token from the hidden state of its parent."""
    B, T = tokens.shape
    seen = jnp.sum(prefix.real[0], dtype=jnp.int32)
    cache = prefix.repeat_rows(B).with_capacity(prefix.capacity + T)
    in_prefix = jnp.broadcast_to(prefix.real[0], (B, T, prefix.capacity))
    hidden, _ = streams.run(
        weights,
        config,
        method,
        tokens,
        attention_mask=jnp.ones((B, T), bool),
        positions=seen + depths,
        attend=jnp.concatenate([in_prefix, ancestors], axis=-1),
        cache=cache,
    )
    predictors = jnp.take_along_axis(hidden, parents[None, :, :, None], axis=2)

    def of_chunk(chunk):
        hidden, tokens = chunk
        return streams.token_scores(weights, method, jnp.moveaxis(hidden, 1, 0), tokens)

    # [S, B, T, D] to [chunks, positions, S, D]: nothing of size B · T · V is ever built.
    S, D = hidden.shape[0], hidden.shape[-1]
    size = math.gcd(POSITIONS_PER_PROJECTION, B * T)
    flat = jnp.moveaxis(predictors.reshape(S, B * T, D), 0, 1).reshape(-1, size, S, D)
    return jax.lax.map(of_chunk, (flat, tokens.reshape(-1, size))).reshape(B, T)
