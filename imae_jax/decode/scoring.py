"""Scores of given continuations under any decoding method, computing every shared token once.

The prefix common to all sequences goes into a key/value cache, once. What follows it is laid out as
token trees: answers that begin alike share the nodes of their beginning, and trees of several
questions fill up rows of one fixed length. A token attends to the prefix and to its own ancestors,
so that every sequence gets the scores that it would get alone, and one shape is compiled for a whole
benchmark.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from imae_jax.batching import round_up
from imae_jax.config import LlamaConfig
from imae_jax.continuation import CONFIDENCE, Continuation
from imae_jax.cpu import argmax
from imae_jax.decode import streams
from imae_jax.decode.methods import Method
from imae_jax.decode.streams import POSITIONS_PER_PROJECTION, Caches, Models, PromptSums
from imae_jax.distributed import to_host
from imae_jax.errors import UserError
from imae_jax.llama import Llama, TreeLayout, Weights
from imae_jax.sharding import row_shards, use_mesh
from imae_jax.token_tree import TokenTree, attend_to_ancestors, common_length, token_tree

ROW_LENGTH, LONGEST_ROW = 256, 1024
PREFIX_BUCKET = 64
ROWS_PER_BATCH = {"cpu": 1, "gpu": 16, "tpu": 16}
GROUPS_PER_WINDOW = 32

Where = Callable[[int, int], str]
Prompt = tuple[tuple[int, ...], tuple[Any, ...]]
"""Padding and tokens of an `_AnswerTree` in front of an answer."""


class Scored(NamedTuple):
    """Scores of a group's continuations, one array a continuation; None for what was not asked for.

    Attributes:
        scores: float32 [n]: the score of every token from its `start` on; of a `Joint` of M methods [n, M].
        is_greedy: bool [n], whether the token is the method's arg-max.
        confidence: float32 [n, 3], of the distribution that the token is drawn from, in the order of
            `CONFIDENCE`.
    """

    scores: list[np.ndarray]
    is_greedy: list[np.ndarray] | None
    confidence: list[np.ndarray] | None

    @classmethod
    def empty(cls, size: int, *, greedy: bool, confidence: bool) -> "Scored":
        return cls(*([None] * size if wanted else None for wanted in (True, greedy, confidence)))


def score(
    model: Llama | Weights | Models,
    config: LlamaConfig,
    groups: Sequence[Sequence[Continuation]],
    method: Method,
    *,
    greedy: bool = False,
    confidence: bool = False,
    row_length: int | None = None,
    rows_per_batch: int | None = None,
    where: Where = "group {}, continuation {}".format,
) -> Iterator[tuple[int, Scored]]:
    """Scores every continuation's tokens: `s_t(x_t)` of docs/methods.md, teacher-forced.

    Args:
        model: with layers as separate arrays (`stacked=False`) for full speed; methods that need more than
            it take what `LanguageModel.prepare` returns.
        config: base model configuration.
        groups: continuations that belong together (the answers of a question): what they share is
            computed once.
        method: what scores.
        greedy: also tell which tokens are the method's arg-max, which costs a pass over the vocabulary.
        confidence: also tell how sure the method is at every token, which costs as much; not of a `Joint`.
        row_length: tokens per row; a group's tree that is longer is cut, a longer continuation gets a
            row of its own. Default: 256 to 1024, by the groups.
        rows_per_batch: rows computed at once, more where a mesh does not divide them; default by platform.
        where: names continuation j of group i in errors.

    Yields:
        The index and the `Scored` of every group, in no particular order.

    Raises:
        UserError: a sequence over the context length, a method that the model cannot run, or logits or
            scores that are not finite.
    """
    models = Models.of(model, config)
    method = method.resolve(config, generating=False)
    streams.check(models, method)
    if not groups:
        return
    check_groups(models, method, groups)
    num_prompts = streams.num_prompts(method)
    prefixes = [
        _common_prefix(c.behind(number) for group in groups for c in group) for number in range(num_prompts)
    ]
    skips = [*map(len, prefixes)]
    if row_length is None:
        row_length = _row_length(groups, skips)
    with use_mesh(models.mesh):
        (prefix_caches, prefix_sums), shards = _run_prefix(models, method, prefixes), row_shards()
        batch_rows = batch_size(rows_per_batch, row_length)

    window_size = GROUPS_PER_WINDOW * shards
    for window_start in range(0, len(groups), window_size):
        window = range(window_start, min(window_start + window_size, len(groups)))
        trees = [tree for i in window for tree in _answer_trees(i, groups[i], skips, row_length)]
        rows = _fill_rows(trees, row_length)
        prompts = _prompts(trees) if streams.needs_prompts(method) else {}
        with use_mesh(models.mesh):
            entropies = _prompt_entropies(models, method, prefix_caches, prefix_sums, prompts, batch_rows)
        wanted = {"greedy": greedy, "confidence": confidence}
        results = {i: Scored.empty(len(groups[i]), **wanted) for i in window}
        for first in range(0, len(rows), batch_rows):
            batch = rows[first : first + batch_rows]
            arrays, parents = _batch_arrays(batch, num_prompts, batch_rows, row_length, prompts)
            chunks = _projection_chunks(parents, streams.projections(method), shards)
            with use_mesh(models.mesh):
                values = _score_nodes(
                    models, prefix_caches, np.int32(skips), entropies, arrays, chunks, method=method, **wanted
                )
            values = jax.tree.map(to_host, values)
            for i, row in enumerate(batch):
                _collect(row, jax.tree.map(lambda x, i=i: x[i], values), results)
        _check_finite(models, method, groups, results, where)
        yield from results.items()


def batch_size(rows: int | None = None, length: int = ROW_LENGTH) -> int:
    """How many rows are computed at once on the ambient mesh, a multiple of `row_shards`.

    Args:
        rows: at least; default: for each shard what suits the platform.
        length: tokens of a row.
    """
    shards = row_shards()
    if rows is None:
        tokens = ROWS_PER_BATCH.get(jax.default_backend(), 1) * ROW_LENGTH
        return max(1, tokens // length) * shards
    return round_up(rows, shards)


def _row_length(groups: Sequence[Sequence[Continuation]], skips: Sequence[int]) -> int:
    """At which nine of ten groups fit whole: of a group that is cut, every part begins with its prompt.

    Args:
        groups: see `score`.
        skips: of every prompt, tokens that all sequences share.
    """

    def at_most(group: Sequence[Continuation]) -> int:
        prompts = sum({max(_starts(item, skips)) for item in group})
        return prompts + sum(len(item.tokens) - item.start for item in group)

    most = int(np.quantile([at_most(group) for group in groups], 0.9))
    return min(round_up(max(most, 1), ROW_LENGTH), LONGEST_ROW)


def check_groups(
    models: Models,
    method: Method,
    groups: Sequence[Sequence[Continuation]],
    name: Callable[[int], str] = "group {}".format,
) -> None:
    """Raises a `UserError` if a sequence holds a token that does not exist, is over the context, or has
    fewer prompts than the method needs.

    Args:
        models, method: what scores.
        groups: see `score`.
        name: names a group in errors.
    """
    # Not `context_length`: beyond this `dynamic` RoPE follows each row's length, and no two can share tokens.
    limit = models.max_positions
    for i, group in enumerate(groups):
        longest = 0
        for item in group:
            streams.check_prompts(method, 1 + len(item.other_prompts))
            for prompt in range(streams.num_prompts(method)):
                tokens = item.behind(prompt).tokens
                models.configs[0].check_token_ids(tokens)
                longest = max(longest, len(tokens))
        # A sequence's last token predicts nothing, so that it needs no place in the context.
        if longest > limit + 1:
            raise UserError(
                f"{name(i)} has a sequence of {longest} tokens, over the model's context of {limit}: "
                "shorten the prompt or the answer"
            )


def _check_finite(models, method, groups, results: dict[int, Scored], where: Where) -> None:
    """Raises a `UserError` that names a continuation whose scores are not finite, but for masks of -inf."""
    is_masked = np.asarray(method.rules_out)

    def is_bad(scores: np.ndarray) -> bool:
        return not (np.isfinite(scores) | ((scores == -np.inf) & is_masked)).all()

    bad = [(i, j) for i, each in results.items() for j, scores in enumerate(each.scores) if is_bad(scores)]
    if not bad:
        return
    # An overflow passes to what lies in the same row through weights of 0: the one to name overflows alone.
    prompts = range(streams.num_prompts(method))
    texts = {(i, j): [groups[i][j].behind(prompt).tokens[:-1] for prompt in prompts] for i, j in bad}
    overflows = (
        index for index in bad if streams.first_layer_not_finite(models, method, texts[index]) is not None
    )
    named = next(overflows, bad[0])
    raise streams.not_finite_error(models, method, texts[named], f"{method.name}, {where(*named)}")


@dataclasses.dataclass(frozen=True)
class _AnswerTree:
    """Continuations of one group as a tree, behind the tokens that all sequences share.

    Where a method has several prompts, a node is a token behind each of them. Shorter prompts are padded on
    the left: their nodes of a negative position are no tokens.

    Attributes:
        tree: its sequences are the continuations', of tuples [P] of tokens where there are several prompts.
        group: their group.
        first: index in the group of the first of them; the others follow.
        start: depth of the first scored token, the same of all.
        padding: [P] nodes in front of every prompt.
    """

    tree: TokenTree
    group: int
    first: int
    start: int
    padding: tuple[int, ...]

    def prompt(self, path: Sequence[int]) -> Prompt:
        """The tokens in front of the answer that ends a path."""
        return self.padding, tuple(self.tree.tokens[node] for node in path[: self.start])


def _starts(item: Continuation, skips: Sequence[int]) -> tuple[int, ...]:
    """[P] where the answer begins behind what all sequences share."""
    return tuple(item.behind(prompt).start - skip for prompt, skip in enumerate(skips))


def _answer_trees(
    group: int, continuations: Sequence[Continuation], skips: Sequence[int], length: int
) -> Iterator[_AnswerTree]:
    """One tree, or several where one would exceed `length` or prompts differ in length."""
    first = 0
    for starts, items in itertools.groupby(continuations, lambda item: _starts(item, skips)):
        start = max(starts)
        padding = tuple(start - each for each in starts)

        def aligned(item: Continuation, padding: tuple[int, ...] = padding) -> Sequence[Any]:
            numbered = enumerate(zip(skips, padding, strict=True))
            rows = [(0,) * pad + item.behind(prompt).tokens[skip:] for prompt, (skip, pad) in numbered]
            return rows[0] if len(rows) == 1 else [*zip(*rows, strict=True)]

        sequences = [*map(aligned, items)]
        while sequences:
            count = _how_many_fit(sequences, length)
            yield _AnswerTree(token_tree(sequences[:count]), group, first, start, padding)
            sequences, first = sequences[count:], first + count


def _how_many_fit(sequences: Sequence[Sequence[int]], length: int) -> int:
    """How many of the first sequences make a tree of at most `length` nodes; one at least."""

    def size(count: int) -> int:
        return len(token_tree(sequences[:count]))

    # No tree of much more than fits is ever built: a text's windows are one group.
    fits = 1
    while fits < len(sequences) and size(more := min(2 * fits, len(sequences))) <= length:
        fits = more
    longer = range(fits + 1, min(2 * fits, len(sequences)) + 1)
    return fits + bisect.bisect_right(longer, length, key=size)


def _fill_rows(trees: Sequence[_AnswerTree], length: int) -> list[list[_AnswerTree]]:
    """Trees in rows, first-fit decreasing."""
    rows: list[list[_AnswerTree]] = []
    room: list[int] = []
    for each in sorted(trees, key=lambda each: -len(each.tree)):
        size = len(each.tree)
        row = next((i for i, free in enumerate(room) if size <= free), None)
        if row is None:
            rows.append([each])
            room.append(length - size)
        else:
            rows[row].append(each)
            room[row] -= size
    return rows


class TreeRows(NamedTuple):
    """Trees laid out one after another in rows, padded on the right.

    Attributes:
        tokens: int32 [P, B, T], behind each of P prompts.
        depths: int32 [P, B, T], positions behind the common prefix, negative at padding of the prompt.
        ends: int32 [B, T], see `TokenTree.ends`, of the row; 0 at padding.
        answer: bool [B, T], nodes that predict a token of an answer.
        prompts: int32 [B, T], of these the number of their prompt, where prompts have one.
    """

    tokens: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    answer: np.ndarray
    prompts: np.ndarray


def _batch_arrays(
    rows: Sequence[Sequence[_AnswerTree]],
    num_prompts: int,
    batch_rows: int,
    row_length: int,
    prompts: Mapping[Prompt, int],
) -> tuple[TreeRows, np.ndarray]:
    """Rows as arrays, and the parents of the nodes to score, else -1, int32 [B, T]."""
    longest = max(sum(len(each.tree) for each in row) for row in rows)
    shape = (batch_rows, round_up(longest, row_length))

    def zeros(*leading: int, dtype: Any = np.int32) -> np.ndarray:
        return np.zeros((*leading, *shape), dtype)

    arrays = TreeRows(zeros(num_prompts), zeros(num_prompts), zeros(), zeros(dtype=bool), zeros())
    parents = np.full(shape, -1, np.int32)
    for number, row in enumerate(rows):
        offset = 0
        for each in row:
            tree, span = each.tree, slice(offset, offset + len(each.tree))
            arrays.tokens[:, number, span] = np.reshape(tree.tokens, (-1, num_prompts)).T
            arrays.depths[:, number, span] = np.subtract(tree.depths, np.vstack(each.padding))
            arrays.ends[number, span] = np.add(tree.ends, offset)
            arrays.answer[number, span] = np.greater_equal(tree.depths, each.start - 1)
            for path in tree.paths:
                scored, before = path[each.start :], path[each.start - 1 : -1]
                parents[number, np.add(scored, offset)] = np.add(before, offset)
                if prompts:
                    arrays.prompts[number, np.add(before, offset)] = prompts[each.prompt(path)]
            offset = span.stop
    return arrays, parents


def _collect(row: Sequence[_AnswerTree], values: Scored, results: dict[int, Scored]) -> None:
    """Puts the values [T, …] of a row's nodes into its continuations' results."""
    offset = 0
    for each in row:
        for index, path in enumerate(each.tree.paths, each.first):
            nodes = np.add(path[each.start :], offset)
            for result, value in zip(results[each.group], values, strict=True):
                if value is not None:
                    result[index] = value[nodes]
        offset += len(each.tree)


def _common_prefix(continuations: Iterable[Continuation]) -> tuple[int, ...]:
    """The longest common *token* prefix that leaves out every token which predicts a scored one.

    The tokens of a prompt's beginning alone would not do: its last ones can merge with what follows.
    """
    prefix: tuple[int, ...] | None = None
    for item in continuations:
        tokens = item.tokens[: item.start - 1]
        if prefix is None:
            prefix = tokens
        prefix = prefix[: common_length(prefix, tokens)]
    return prefix or ()


def _run_prefix(
    models: Models, method: Method, prefixes: Sequence[Sequence[int]]
) -> tuple[Caches, PromptSums | None]:
    length = round_up(max(map(len, prefixes)), PREFIX_BUCKET)
    tokens, mask = np.zeros((len(prefixes), 1, length), np.int32), np.zeros((len(prefixes), 1, length), bool)
    for number, prefix in enumerate(prefixes):
        tokens[number, 0, : len(prefix)], mask[number, 0, : len(prefix)] = prefix, True
    return _fill_prefix(models, tokens, mask, method=method)


@functools.partial(jax.jit, static_argnames="method")
def _fill_prefix(models, tokens, mask, *, method):
    caches = streams.empty_caches(models, method, 1, tokens.shape[-1])
    if tokens.shape[-1] == 0:
        return caches, None
    nowhere = jnp.zeros_like(mask)
    hidden, caches = streams.run(models, method, tokens, attention_mask=mask, answer=nowhere, caches=caches)
    return caches, streams.prompt_sums(models, method, hidden, mask)


def _prompts(trees: Iterable[_AnswerTree]) -> dict[Prompt, int]:
    """Numbers of the prompts of trees, from the tokens behind the common prefix."""
    distinct = dict.fromkeys(each.prompt(path) for each in trees for path in each.tree.paths)
    return {prompt: number for number, prompt in enumerate(distinct)}


def _prompt_entropies(
    models: Models,
    method: Method,
    prefix: Caches,
    before: PromptSums | None,
    prompts: Mapping[Prompt, int],
    batch_rows: int,
) -> tuple[jax.Array | None, ...]:
    """Of every stream [prompts, V], see `streams.entropies`; padded, so that few shapes are compiled."""
    if not prompts:
        return (None,) * len(method.streams)
    rows = list(prompts)
    rows += rows[:1] * (-len(rows) % batch_rows)
    num_prompts, length = len(rows[0][0]), round_up(max(len(row) for _, row in rows), PREFIX_BUCKET)
    tokens, mask = (
        np.zeros((num_prompts, len(rows), length), np.int32),
        np.zeros((num_prompts, len(rows), length), bool),
    )
    for i, (padding, row) in enumerate(rows):
        tokens[:, i, : len(row)] = np.reshape(row, (-1, num_prompts)).T
        mask[:, i, : len(row)] = np.arange(len(row)) >= np.vstack(padding)
    batches = [
        _run_prompts(models, prefix, before, tokens[:, span], mask[:, span], method=method)
        for span in (slice(i, i + batch_rows) for i in range(0, len(rows), batch_rows))
    ]
    padding = ((0, -len(rows) % GROUPS_PER_WINDOW), (0, 0))
    return jax.tree.map(lambda *parts: jnp.pad(jnp.concatenate(parts), padding), *batches)


@functools.partial(jax.jit, static_argnames="method")
def _run_prompts(models, prefix, before, tokens, mask, *, method):
    _, B, T = tokens.shape
    caches = tuple(c.repeat_rows(B).with_capacity(c.capacity + T) for c in prefix)
    nowhere = jnp.zeros_like(mask)
    hidden, _ = streams.run(models, method, tokens, attention_mask=mask, answer=nowhere, caches=caches)
    before = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, x.shape[-1])), before)
    return streams.entropies(streams.prompt_sums(models, method, hidden, mask, before))


class Chunks(NamedTuple):
    """The scored nodes of a batch in C chunks of few enough positions to project at once.

    Nodes are numbered through the batch, B · T. Siblings share their parent's logits.

    Attributes:
        count: int32 [], chunks in use.
        positions: int32 [C, P], the parents to project.
        nodes: int32 [C, Q], the nodes to score; B · T where there is none.
        parents: int32 [C, Q], the index in P of their parent.
    """

    count: np.ndarray
    positions: np.ndarray
    nodes: np.ndarray
    parents: np.ndarray


def _projection_chunks(parents: np.ndarray, projections: int, shards: int = 1) -> Chunks:
    """Cuts the scored nodes of a batch into chunks.

    Args:
        parents: int32 [B, T], -1 at nodes that are not scored.
        projections: to the vocabulary, at every position.
        shards: over which the mesh spreads the positions of a chunk.
    """
    size = parents.size
    P = min(max(1, POSITIONS_PER_PROJECTION // projections) * shards, size)
    Q = 2 * P
    row_starts = np.arange(len(parents))[:, None] * parents.shape[1]
    flat = np.where(parents < 0, -1, parents + row_starts).ravel()
    scored = np.flatnonzero(flat >= 0)
    scored = scored[np.argsort(flat[scored], kind="stable")]
    # A chunk but the last is full in P or in Q: it holds P nodes at least.
    C = -(-size // P)
    positions, parent_indices = np.zeros((C, P), np.int32), np.zeros((C, Q), np.int32)
    nodes = np.full((C, Q), size, np.int32)
    chunk, num_positions, num_nodes = 0, 0, 0
    for node in scored:
        parent = flat[node]
        is_new = num_positions == 0 or positions[chunk, num_positions - 1] != parent
        if num_nodes == Q or (is_new and num_positions == P):
            chunk, num_positions, num_nodes, is_new = chunk + 1, 0, 0, True
        if is_new:
            positions[chunk, num_positions] = parent
            num_positions += 1
        nodes[chunk, num_nodes], parent_indices[chunk, num_nodes] = node, num_positions - 1
        num_nodes += 1
    return Chunks(np.int32(chunk + (num_nodes > 0)), positions, nodes, parent_indices)


def confidence_of(scores: jax.Array) -> jax.Array:
    """How sure distributions are, float32 [P, 3] from scores [P, V]; see `CONFIDENCE`."""
    log_p = jax.nn.log_softmax(scores)
    p = jnp.exp(log_p)
    # A token that is ruled out adds nothing.
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
    first, second = jnp.moveaxis(jax.lax.top_k(p, 2)[0], -1, 0)
    return jnp.stack([entropy, first, first - second], axis=-1)


@functools.partial(jax.jit, static_argnames=("method", "greedy", "confidence"))
def _score_nodes(
    models: Models,
    prefix: Caches,
    prefix_lengths: np.ndarray,
    entropies: tuple[jax.Array | None, ...],
    rows: TreeRows,
    chunks: Chunks,
    *,
    method: Method,
    greedy: bool,
    confidence: bool,
) -> Scored:
    """`Scored` with arrays [B, T, …], of the scored nodes' tokens from the hidden states of their parents;
    scores are NaN where logits are not finite."""
    P, B, T = rows.tokens.shape
    chex.assert_equal_shape(rows[:2])
    chex.assert_shape(rows[2:], (B, T))
    last_position, capacity = models.max_positions - 1, prefix[0].capacity
    lengths = prefix_lengths[:, None, None]
    in_prefix = jnp.broadcast_to((jnp.arange(capacity) < lengths)[:, :, None], (P, B, T, capacity))
    real = rows.depths >= 0
    in_tree = attend_to_ancestors(rows.ends) & real[:, :, None]
    hidden, _ = streams.run(
        models,
        method,
        rows.tokens,
        # What nothing follows, padding too, is attended to by nobody else: its overflow must not show.
        attention_mask=(rows.ends - jnp.arange(T) > 1) & real,
        answer=rows.answer[None],
        # Only tokens that predict nothing lie beyond; `dynamic` RoPE would stretch their whole row.
        tree=TreeLayout(
            positions=jnp.clip(lengths + rows.depths, 0, last_position),
            attend=jnp.concatenate([in_prefix, in_tree], axis=-1),
        ),
        caches=tuple(cache.repeat_rows(B).with_capacity(capacity + T) for cache in prefix),
    )
    hidden = jax.tree.map(lambda x: x.reshape(*x.shape[:-3], B * T, x.shape[-1]), hidden)
    # Those to score are the same behind every prompt.
    tokens, prompts = rows.tokens[0].reshape(-1), rows.prompts.reshape(-1)

    # Nothing of size B · T · V is ever built.
    def add_chunk(chunk, values):
        nodes, parents = chunks.nodes[chunk], chunks.parents[chunk]
        parent_states = jax.tree.map(lambda x: x[..., chunks.positions[chunk], :], hidden)
        of_prompts = jax.tree.map(lambda x: x[prompts[chunks.positions[chunk]]], entropies)
        logits = streams.logits_of(models, method, parent_states, of_prompts)
        chosen = tokens[jnp.minimum(nodes, B * T - 1)]
        scores = method.token_scores(logits, parents, chosen)
        chex.assert_shape(scores, (*chosen.shape, *method.columns))
        finite = streams.finite(logits)[parents]
        new = Scored(
            jnp.where(finite.reshape(-1, *[1] * (scores.ndim - 1)), scores, jnp.nan),
            argmax(method.scores(logits))[parents] == chosen if greedy else None,
            confidence_of(method.scores(logits))[parents] if confidence else None,
        )
        return jax.tree.map(lambda v, n: v.at[nodes].set(n, mode="drop"), values, new)

    values = Scored(
        jnp.zeros((B * T, *method.columns), jnp.float32),
        jnp.zeros(B * T, bool) if greedy else None,
        jnp.zeros((B * T, len(CONFIDENCE)), jnp.float32) if confidence else None,
    )
    values = jax.lax.fori_loop(0, chunks.count, add_chunk, values)
    return jax.tree.map(lambda v: v.reshape(B, T, *v.shape[1:]), values)
