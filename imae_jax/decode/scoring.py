"""Scores of given continuations under any decoding method, computing every shared token once.

The prefix common to all sequences goes into a key/value cache, once. What follows it is laid out as
token trees: answers that begin alike share the nodes of their beginning, and trees of several
questions fill up rows of one fixed length. A token attends to the prefix and to its own ancestors,
so that every sequence gets the scores that it would get alone, and one shape is compiled for a whole
benchmark.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from imae_jax.batching import round_up
from imae_jax.config import LlamaConfig
from imae_jax.decode import streams
from imae_jax.decode.joint import Joint
from imae_jax.decode.methods import Method
from imae_jax.decode.sampling import argmax
from imae_jax.decode.streams import Caches, Models
from imae_jax.distributed import to_host
from imae_jax.errors import UserError
from imae_jax.llama import Llama, Weights
from imae_jax.sharding import row_shards, use_mesh
from imae_jax.tokenizer import Tokenizer

ROW_LENGTH = 256
PREFIX_BUCKET = 64
ROWS_PER_BATCH = {"cpu": 1, "gpu": 16, "tpu": 16}
GROUPS_PER_WINDOW = 32
POSITIONS_PER_PROJECTION = 128

Where = Callable[[int, int], str]


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
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    continuations: Sequence[str],
    *,
    add_special_tokens: bool = True,
) -> list[Continuation]:
    """Tokenizes every prompt together with its continuation.

    Args:
        tokenizer: of the model.
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


def windows(tokens: Sequence[int], length: int) -> list[Continuation]:
    """Windows of a text that overlap by half: every token but the text's first is scored once.

    All but the first window's tokens have at least `length // 2` tokens before them.

    Raises:
        UserError: fewer than two tokens, or windows of less than two.
    """
    if len(tokens) < 2 or length < 2:
        raise UserError(f"a text of {len(tokens)} tokens in windows of {length}: both need at least two")
    stride, scored, found = length // 2, 1, []
    for start in range(0, len(tokens), stride):
        part = tuple(tokens[start : start + length])
        if start + len(part) > scored:
            found.append(Continuation(part, scored - start))
            scored = start + len(part)
    return found


def score(
    model: Llama | Weights | Models,
    config: LlamaConfig,
    groups: Sequence[Sequence[Continuation]],
    method: Method,
    *,
    row_length: int = ROW_LENGTH,
    rows_per_batch: int | None = None,
    where: Where = "group {}, continuation {}".format,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Scores every continuation's tokens: `s_t(x_t)` of docs/methods.md, teacher-forced.

    Args:
        model: with layers as separate arrays (`stacked=False`) for full speed; methods that need more than
            it take what `LanguageModel.prepare` returns.
        config: of the base.
        groups: continuations that belong together (the answers of a question): what they share is
            computed once.
        method: what scores.
        row_length: tokens per row; a group's tree that is longer is cut, a longer continuation gets a
            row of its own.
        rows_per_batch: rows computed at once, more where a mesh does not divide them; default by platform.
        where: what continuation j of group i is called in errors.

    Yields:
        `(i, scores)` for every group, in no particular order: one float32 array per continuation with
        the score of every token from its `start` on.

    Raises:
        UserError: a sequence over the context length, a method that the model cannot run, or logits or
            scores that are not finite.
    """
    for i, scored in _score(model, config, groups, method, row_length, rows_per_batch, where, greedy=False):
        yield i, [scores for (scores,) in scored]


def score_greedy(
    model: Llama | Weights | Models,
    config: LlamaConfig,
    groups: Sequence[Sequence[Continuation]],
    method: Method,
    *,
    row_length: int = ROW_LENGTH,
    rows_per_batch: int | None = None,
    where: Where = "group {}, continuation {}".format,
) -> Iterator[tuple[int, list[np.ndarray], list[np.ndarray]]]:
    """As `score`, but also yields which tokens are the method's arg-max: one bool array per continuation."""
    for i, scored in _score(model, config, groups, method, row_length, rows_per_batch, where, greedy=True):
        yield i, [scores for scores, _ in scored], [greedy for _, greedy in scored]


def _score(
    model, config, groups, method, row_length, rows_per_batch, where, *, greedy: bool
) -> Iterator[tuple[int, list[tuple[np.ndarray, ...]]]]:
    models = Models.of(model, config)
    method = method.resolve(config, generating=False)
    streams.check(models, method)
    if not groups:
        return
    check_groups(models, groups)
    prefix = _common_prefix(c for group in groups for c in group)
    with use_mesh(models.mesh):
        prefix_caches, shards = _prefix_caches(models, method, prefix), row_shards()
        batch_rows = batch_size(rows_per_batch)

    window_size = GROUPS_PER_WINDOW * shards
    for window_start in range(0, len(groups), window_size):
        window = range(window_start, min(window_start + window_size, len(groups)))
        pieces = _pieces({i: groups[i] for i in window}, len(prefix), row_length)
        rows = _fill_rows(pieces, row_length)
        of_nodes: dict[int, tuple[np.ndarray, ...]] = {}
        for first in range(0, len(rows), batch_rows):
            batch = rows[first : first + batch_rows]
            length = round_up(max(row_length, *(row.length for row in batch)), row_length)
            batch_arrays = [row.arrays(length) for row in batch]
            batch_arrays += [_Row([]).arrays(length)] * (batch_rows - len(batch))
            *arrays, parents = (np.stack(a) for a in zip(*batch_arrays, strict=True))
            chunks = _projection_chunks(parents, streams.projections(method), shards)
            with use_mesh(models.mesh):
                values = _score_nodes(models, prefix_caches, *arrays, *chunks, method=method, greedy=greedy)
            for row, *row_values in zip(batch, *map(to_host, values), strict=False):
                offset = 0
                for tree in row.trees:
                    part = slice(offset, offset + len(tree.tokens))
                    of_nodes[id(tree)] = tuple(v[part] for v in row_values)
                    offset = part.stop
        results: dict[int, list[tuple[np.ndarray, ...]]] = {i: [()] * len(groups[i]) for i in window}
        for tree in pieces:
            for group, index, nodes in tree.members:
                first = groups[group][index].start - len(prefix)
                results[group][index] = tuple(v[nodes[first:]] for v in of_nodes[id(tree)])
        _check_finite(models, method, groups, results, where)
        yield from results.items()


def batch_size(rows: int | None = None) -> int:
    """How many rows are computed at once on the ambient mesh, a multiple of `row_shards`.

    Args:
        rows: at least; default: for each shard what suits the platform.
    """
    shards = row_shards()
    if rows is None:
        return ROWS_PER_BATCH.get(jax.default_backend(), 1) * shards
    return round_up(rows, shards)


def check_groups(models: Models, groups: Sequence[Sequence[Continuation]]) -> None:
    """Raises a `UserError` if a sequence holds a token that does not exist, or is over the context."""
    # Not `context_length`: beyond this `dynamic` RoPE follows each row's length, and no two can share tokens.
    limit = models.max_positions
    for i, group in enumerate(groups):
        for item in group:
            models.configs[0].check_token_ids(item.tokens)
        longest = max((len(c.tokens) for c in group), default=0)
        # A sequence's last token predicts nothing, so that it needs no place in the context.
        if longest > limit + 1:
            raise UserError(
                f"group {i} has a sequence of {longest} tokens, over the model's context of {limit}: "
                "shorten the prompt or the answer"
            )


def _check_finite(models, method, groups, results, where: Where) -> None:
    """Raises a `UserError` that names a continuation whose scores are not finite, but for masks of -inf."""
    methods = method.methods if isinstance(method, Joint) else (method,)
    masked = np.array([each.rules_out for each in methods])

    def is_bad(scores: np.ndarray) -> bool:
        scores = scores.reshape(-1, len(methods))
        return not (np.isfinite(scores) | ((scores == -np.inf) & masked)).all()

    bad = [(i, j) for i, each in results.items() for j, (scores, *_) in enumerate(each) if is_bad(scores)]
    if not bad:
        return
    # An overflow passes to what lies in the same row through weights of 0: the one to name overflows alone.
    texts = {place: groups[place[0]][place[1]].tokens[:-1] for place in bad}
    overflows = (
        place for place in bad if streams.first_layer_not_finite(models, method, texts[place]) is not None
    )
    named = next(overflows, bad[0])
    raise streams.not_finite_error(models, method, texts[named], f"{method.name}, {where(*named)}")


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
        """tokens and depths int32 [T], predictors of answers' tokens bool [T], ancestors (self included) bool
        [T, T], and parents of the nodes to score, else -1, int32 [T]."""
        tokens, depths = (np.zeros(length, np.int32) for _ in range(2))
        answer, ancestors = np.zeros(length, bool), np.zeros((length, length), bool)
        parents = np.full(length, -1, np.int32)
        offset = 0
        for tree in self.trees:
            part = slice(offset, offset + len(tree.tokens))
            tokens[part], depths[part] = tree.tokens, tree.depths
            answer[part] = depths[part] >= tree.first_predictor
            for node, parent in enumerate(tree.parents, offset):
                if parent >= 0:
                    ancestors[node] = ancestors[parent + offset]
                ancestors[node, node] = True
                if depths[node] > tree.first_predictor:
                    parents[node] = parent + offset
            offset = part.stop
        return tokens, depths, answer, ancestors, parents


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
    length = round_up(len(prefix), PREFIX_BUCKET)
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


def _projection_chunks(parents: np.ndarray, projections: int, shards: int = 1) -> tuple[np.ndarray, ...]:
    """Cuts the scored nodes of a batch into chunks of few enough positions to project at once.

    Only parents of scored nodes are projected, and siblings share their parent's logits.

    Args:
        parents: int32 [B, T], -1 at nodes that are not scored.
        projections: to the vocabulary, at every position.
        shards: over which the mesh spreads the positions of a chunk.

    Returns:
        The number of chunks in use, and for each chunk the positions to project [C, P], numbered through
        the batch, and its nodes [C, Q]: their places in the batch, and the places of their parents in P.
        Unused nodes have the place B · T.
    """
    size = parents.size
    P = min(max(1, POSITIONS_PER_PROJECTION // projections) * shards, size)
    Q = 2 * P
    row_starts = np.arange(len(parents))[:, None] * parents.shape[1]
    flat = np.where(parents < 0, -1, parents + row_starts).ravel()
    nodes = np.flatnonzero(flat >= 0)
    nodes = nodes[np.argsort(flat[nodes], kind="stable")]
    # A chunk but the last is full in P or in Q: it holds P nodes at least.
    C = -(-size // P)
    positions, parent_places = np.zeros((C, P), np.int32), np.zeros((C, Q), np.int32)
    places = np.full((C, Q), size, np.int32)
    chunk, num_positions, num_nodes = 0, 0, 0
    for node in nodes:
        parent = flat[node]
        is_new = num_positions == 0 or positions[chunk, num_positions - 1] != parent
        if num_nodes == Q or (is_new and num_positions == P):
            chunk, num_positions, num_nodes, is_new = chunk + 1, 0, 0, True
        if is_new:
            positions[chunk, num_positions] = parent
            num_positions += 1
        places[chunk, num_nodes], parent_places[chunk, num_nodes] = node, num_positions - 1
        num_nodes += 1
    return np.int32(chunk + (num_nodes > 0)), positions, places, parent_places


@functools.partial(jax.jit, static_argnames=("method", "greedy"))
def _score_nodes(
    models,
    prefix,
    tokens,
    depths,
    answer,
    ancestors,
    num_chunks,
    positions,
    places,
    parent_places,
    *,
    method,
    greedy,
):
    """Scores [B, T], of a `Joint` [B, T, M], of the scored nodes' tokens from the hidden states of their
    parents, NaN where logits are not finite; with `greedy` also whether the token is the arg-max there,
    bool [B, T]. See `_Row.arrays` and `_projection_chunks`."""
    B, T = tokens.shape
    chex.assert_equal_shape([tokens, depths, answer])
    chex.assert_shape(ancestors, (B, T, T))
    columns = (len(method.methods),) if isinstance(method, Joint) else ()
    last_position = models.max_positions - 1
    real, capacity = prefix[0].real[0], prefix[0].capacity
    in_prefix = jnp.broadcast_to(real, (B, T, capacity))
    hidden, _ = streams.run(
        models,
        method,
        tokens,
        # What nothing follows, padding too, is attended to by nobody else: its overflow must not show.
        attention_mask=jnp.sum(ancestors, axis=1) > 1,
        answer=answer,
        # Only tokens that predict nothing lie beyond; `dynamic` RoPE would stretch their whole row.
        positions=jnp.minimum(jnp.sum(real, dtype=jnp.int32) + depths, last_position),
        attend=jnp.concatenate([in_prefix, ancestors], axis=-1),
        caches=tuple(cache.repeat_rows(B).with_capacity(capacity + T) for cache in prefix),
    )
    hidden = jax.tree.map(lambda x: x.reshape(*x.shape[:-3], B * T, x.shape[-1]), hidden)
    tokens = tokens.reshape(-1)

    # Nothing of size B · T · V is ever built.
    def add_chunk(chunk, values):
        at = places[chunk]
        of_parents = jax.tree.map(lambda x: x[..., positions[chunk], :], hidden)
        logits = streams.logits_of(models, method, of_parents)
        chosen = tokens[jnp.minimum(at, B * T - 1)]
        scores = method.token_scores(logits, parent_places[chunk], chosen)
        chex.assert_shape(scores, (*chosen.shape, *columns))
        finite = streams.finite(logits)[parent_places[chunk]]
        new = [jnp.where(finite.reshape(-1, *[1] * (scores.ndim - 1)), scores, jnp.nan)]
        if greedy:
            new.append(argmax(method.scores(logits))[parent_places[chunk]] == chosen)
        return tuple(v.at[at].set(n, mode="drop") for v, n in zip(values, new, strict=True))

    values = (jnp.zeros((B * T, *columns), jnp.float32), jnp.zeros(B * T, bool))[: 1 + greedy]
    values = jax.lax.fori_loop(0, num_chunks, add_chunk, values)
    return tuple(v.reshape(B, T, *v.shape[1:]) for v in values)
