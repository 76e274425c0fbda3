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

from imae_jax.config import LlamaConfig
from imae_jax.decode import streams
from imae_jax.decode.methods import Method
from imae_jax.decode.streams import Caches, Models
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
    model: Llama | Weights | Models,
    config: LlamaConfig,
    groups: Sequence[Sequence[Continuation]],
    method: Method,
    *,
    row_length: int = ROW_LENGTH,
    rows_per_batch: int | None = None,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Scores every continuation's tokens: `s_t(x_t)` of METHODS section 2, teacher-forced.

    Args:
        model: with layers as separate arrays (`stacked=False`) for full speed; methods that need more than
            it take what `LanguageModel.prepare` returns.
        config: of the base.
        groups: continuations that belong together (the answers of a question): what they share is
            computed once.
        method: what scores.
        row_length: tokens per row; a group's tree that is longer is cut, a longer continuation gets a
            row of its own.
        rows_per_batch: rows computed at once; default by platform.

    Yields:
        `(i, scores)` for every group, in no particular order: one float32 array per continuation with
        the score of every token from its `start` on; of a `Joint`, one column a method.

    Raises:
        UserError: a sequence over the context length, or a method that the model cannot run.
    """
    models = Models.of(model, config)
    method = method.resolve(config, generating=False)
    streams.check(models, method)
    if not groups:
        return
    check_groups(models, groups)
    prefix = _common_prefix(c for group in groups for c in group)
    prefix_caches = _prefix_caches(models, method, prefix)
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
            stacked = (np.stack(a) for a in zip(*arrays, strict=True))
            values = _score_nodes(models, prefix_caches, *stacked, method=method)
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


def check_groups(models: Models, groups: Sequence[Sequence[Continuation]]) -> None:
    """Raises a `UserError` if a sequence holds a token that does not exist, or is over the context."""
    # Not `context_length`: beyond this `dynamic` RoPE follows each row's length, and no two can share tokens.
    limit = min(c.max_position_embeddings for c in models.configs)
    for i, group in enumerate(groups):
        for item in group:
            models.configs[0].check_token_ids(item.tokens)
        longest = max((len(c.tokens) for c in group), default=0)
        if longest > limit:
            raise UserError(
                f"group {i} has a sequence of {longest} tokens, over the model's context of {limit}: "
                "shorten the prompt or the answer"
            )


class _TokenTree:
    """Sequences merged where they begin alike; a node's score is its token's, given its ancestors.

    Nodes from depth `first_predictor` on predict tokens that are scored.
    """

    def __init__(self, first_predictor: int):
        self.first_predictor = first_predictor
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

    def arrays(self, length: int) -> tuple[np.ndarray, ...]:
        """tokens, parents and depths int32 [T], predictors of answers' tokens bool [T], and ancestors (self
        included) bool [T, T]."""
        tokens, parents, depths = (np.zeros(length, np.int32) for _ in range(3))
        answer, ancestors = np.zeros(length, bool), np.zeros((length, length), bool)
        offset = 0
        for tree in self.trees:
            part = slice(offset, offset + len(tree.tokens))
            tokens[part], depths[part] = tree.tokens, tree.depths
            answer[part] = depths[part] >= tree.first_predictor
            for node, parent in enumerate(tree.parents, offset):
                if parent >= 0:
                    parents[node] = parent + offset
                    ancestors[node] = ancestors[parent + offset]
                ancestors[node, node] = True
            offset = part.stop
        return tokens, parents, depths, answer, ancestors


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
    """One tree a group, or several where one would exceed `length` or prompts differ in length."""
    trees = []
    for group, continuations in groups.items():
        tree = None
        for index, item in enumerate(continuations):
            tokens, predictor = item.tokens[skip:], item.start - skip - 1
            full = tree is not None and len(tree.tokens) + tree.missing(tokens) > length
            if tree is None or full or tree.first_predictor != predictor:
                tree = _TokenTree(predictor)
                trees.append(tree)
            tree.add(tokens, group, index)
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


def _prefix_caches(models: Models, method: Method, prefix: Sequence[int]) -> Caches:
    length = -(-len(prefix) // PREFIX_BUCKET) * PREFIX_BUCKET
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(prefix)] = prefix
    mask = np.arange(length)[None] < len(prefix)
    return _fill_prefix(models, tokens, mask, method=method)


@functools.partial(jax.jit, static_argnames="method")
def _fill_prefix(models, tokens, mask, *, method):
    caches = streams.empty_caches(models, method, 1, tokens.shape[1])
    if tokens.shape[1] == 0:
        return caches
    nowhere = jnp.zeros_like(mask)
    return streams.run(models, method, tokens, attention_mask=mask, answer=nowhere, caches=caches)[1]


@functools.partial(jax.jit, static_argnames="method")
def _score_nodes(models, prefix, tokens, parents, depths, answer, ancestors, *, method):
    """Scores [B, T] of every node's token from the hidden states of its parent; [B, T, M] of a `Joint`."""
    B, T = tokens.shape
    real, capacity = prefix[0].real[0], prefix[0].capacity
    in_prefix = jnp.broadcast_to(real, (B, T, capacity))
    hidden, _ = streams.run(
        models,
        method,
        tokens,
        attention_mask=jnp.ones((B, T), bool),
        answer=answer,
        positions=jnp.sum(real, dtype=jnp.int32) + depths,
        attend=jnp.concatenate([in_prefix, ancestors], axis=-1),
        caches=tuple(cache.repeat_rows(B).with_capacity(capacity + T) for cache in prefix),
    )

    # Nothing of size B · T · V is ever built: [..., B, T, D] to [chunks, ..., positions, D].
    limit = max(1, POSITIONS_PER_PROJECTION // streams.projections(method))
    size = math.gcd(1 << (limit.bit_length() - 1), B * T)

    def in_chunks(x):
        of_parents = x[..., jnp.arange(B)[:, None], parents, :]
        chunks = of_parents.reshape(*x.shape[:-3], -1, size, x.shape[-1])
        return jnp.moveaxis(chunks, -3, 0)

    def of_chunk(chunk):
        hidden, tokens = chunk
        return method.token_scores(streams.logits_of(models, method, hidden), tokens)

    chunks = (jax.tree.map(in_chunks, hidden), tokens.reshape(-1, size))
    scores = jax.lax.map(of_chunk, chunks)
    return scores.reshape(B, T, *scores.shape[2:])
