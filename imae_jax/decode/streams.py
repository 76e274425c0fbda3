"""Runs the streams of a method: those of one model as rows of one batch, stream-major (row `s · B + b`)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from imae_jax.cache import KVCache
from imae_jax.config import LlamaConfig
from imae_jax.decode.methods import Method, Stream, StreamLogits
from imae_jax.errors import UserError
from imae_jax.llama import (
    Interventions,
    Llama,
    Options,
    Taps,
    TreeLayout,
    Weights,
    final_norm,
    forward,
    project,
)
from imae_jax.lora import rank_of
from imae_jax.sharding import constrain, mesh_of, use_mesh

LENGTH_BUCKET = 64
POSITIONS_PER_PROJECTION = 128
# Of a logit that does not count: exp of it is 0, and products with 0 are.
FAR_BELOW = 1e30

_forward = jax.jit(forward, static_argnames=("config", "options"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Models:
    """What a method's streams run on.

    Attributes:
        weights: weights of the model itself, and of the method's second model where it has one.
        configs: theirs; static.
    """

    weights: tuple[Weights, ...]
    configs: tuple[LlamaConfig, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, model: "Llama | Weights | Models", config: LlamaConfig) -> "Models":
        if isinstance(model, Models):
            return model
        return cls((model.weights() if isinstance(model, Llama) else model,), (config,))

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """Over which the weights are spread; None for one device."""
        return mesh_of(self.weights[0].base["embed"])

    @property
    def max_positions(self) -> int:
        """The most tokens that all models were trained for: `dynamic` RoPE stretches beyond."""
        return min(config.max_position_embeddings for config in self.configs)

    @property
    def context_length(self) -> int:
        """The most tokens that a row may have in all models."""
        return min(config.context_length for config in self.configs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamHidden:
    """Hidden states of one stream.

    Attributes:
        final: [..., D], after the final norm.
        exits: [n, ..., D], the residual stream after each of `Stream.exits`, normed if `Stream.exit_norm`;
            None where there are none.
        prompt: [..., D], the same after `Stream.prompt_exit`, at all positions.
    """

    final: jax.Array
    exits: jax.Array | None
    prompt: jax.Array | None = None


class PositionSums(NamedTuple):
    """A softmax over positions so far, of the logits z of every token: float32 [B, V] each.

    Attributes:
        peak: the largest z.
        total: Σ exp(z − peak).
        dot: Σ (z − peak) exp(z − peak).
    """

    peak: jax.Array
    total: jax.Array
    dot: jax.Array

    @property
    def entropy(self) -> jax.Array:
        """In nats."""
        return jnp.log(self.total) - self.dot / self.total


Caches = tuple[KVCache, ...]
PromptSums = tuple[PositionSums | None, ...]
"""Of every stream with a `prompt_exit`, and None of the others."""


def check(models: Models, method: Method) -> None:
    """Raises a `UserError` if the method needs units, deltas or models that are not there."""
    needed = max(stream.model for stream in method.streams) + 1
    if len(models.weights) < needed:
        raise UserError(f"method {method.name} needs a second model: load it with LanguageModel.prepare")
    for stream in method.streams:
        weights = models.weights[stream.model]
        if stream.strength and weights.units is None:
            raise UserError(
                f"method {method.name} needs a model with anti-expert units: give an IMAE directory as "
                "--model"
            )
        if stream.adapter and weights.lora is None:
            raise UserError(f"method {method.name} needs low-rank deltas: give it an adapter")
        if stream.shift and weights.shifts is None:
            raise UserError(f"method {method.name} needs shifts of heads: give it a file of directions")
        if stream.steer and weights.vectors is None:
            raise UserError(f"method {method.name} needs vectors: give it a file of them")


def num_prompts(method: Method) -> int:
    """How many prompts every row has, see `Stream.prompt`."""
    return 1 + max(stream.prompt for stream in method.streams)


def check_prompts(method: Method, given: int) -> None:
    """Raises a `UserError` if rows have fewer prompts than the method needs."""
    if given < num_prompts(method):
        raise UserError(
            f"method {method.name} compares a prompt to the same without its context: give both "
            "(without_context)"
        )


def of_stream(x: jax.Array, stream: Stream) -> jax.Array:
    """What belongs to a stream's prompt in [P, …], P = 1 where it is the same for all prompts."""
    return x[stream.prompt if x.shape[0] > 1 else 0]


def _in_scope(stream: Stream, answer: jax.Array) -> jax.Array:
    """Where a stream's vectors are added, float32 [B, T]."""
    scopes = {"answer": answer, "prompt": ~answer, "all": jnp.ones_like(answer)}
    return scopes[stream.steer_scope].astype(jnp.float32)


def empty_caches(models: Models, method: Method, batch_size: int, capacity: int) -> Caches:
    """One cache a model, with a row for every stream and row of the batch."""
    return tuple(
        KVCache.empty(config, len(group) * batch_size, capacity, weights.dtype)
        for group, weights, config in zip(_groups(method), models.weights, models.configs, strict=False)
    )


def run(
    models: Models,
    method: Method,
    tokens: jax.Array,
    *,
    attention_mask: jax.Array,
    answer: jax.Array,
    caches: Caches,
    tree: TreeLayout | None = None,
) -> tuple[tuple[StreamHidden, ...], Caches]:
    """One forward pass of every stream.

    Args:
        models: with what the method needs.
        method: resolved.
        tokens, attention_mask, tree: as in `llama.forward`, for [P, B, …] rows of every prompt of the method;
            P = 1 where they are the same for all.
        answer: bool [1, B, T] or as above, positions that predict a token of an answer: where heads are
            shifted, and vectors added unless a stream's scope is another.
        caches: from `empty_caches`.

    Returns:
        Hidden states [B, T, D] of every stream, in the method's order, and the new caches.
    """
    _, B, T = tokens.shape
    chex.assert_equal_shape([tokens, attention_mask])
    chex.assert_shape(answer, (None, B, T))
    hidden: list[StreamHidden | None] = [None] * len(method.streams)
    new_caches = []
    for model, (group, cache) in enumerate(zip(_groups(method), caches, strict=True)):
        weights, config = models.weights[model], models.configs[model]
        streams = [method.streams[i] for i in group]

        def rows_of(x: Any, streams: Sequence[Stream] = tuple(streams)) -> Any:
            return jax.tree.map(lambda a: jnp.concatenate([of_stream(a, each) for each in streams]), x)

        prompt_exits = {stream.prompt_exit for stream in streams} - {None}
        layers = tuple(sorted(prompt_exits.union(*(stream.exits for stream in streams))))
        output = forward(
            weights,
            config,
            rows_of(tokens),
            attention_mask=rows_of(attention_mask),
            tree=rows_of(tree),
            interventions=_interventions(weights, config, streams, answer),
            cache=cache,
            options=Options(Taps(hidden_layers=layers)),
        )
        after = dict(zip(layers, output.hidden_layers, strict=True))
        for copy, i in enumerate(group):
            rows, stream = slice(copy * B, (copy + 1) * B), method.streams[i]
            exits = prompt = None
            if stream.exits:
                exits = jnp.stack([after[layer][rows] for layer in stream.exits])
                exits = final_norm(weights, config, exits) if stream.exit_norm else exits
            if stream.prompt_exit is not None:
                prompt = after[stream.prompt_exit][rows]
                if stream.exit_norm or stream.prompt_exit == config.num_layers:
                    prompt = final_norm(weights, config, prompt)
            hidden[i] = StreamHidden(output.hidden_states[rows], exits, prompt)
        new_caches.append(output.cache)
    return tuple(hidden), tuple(new_caches)


def prompt_sums(
    models: Models,
    method: Method,
    hidden: Sequence[StreamHidden],
    mask: jax.Array,
    before: PromptSums | None = None,
) -> PromptSums:
    """Every stream's softmax of logits over the positions of prompts.

    Args:
        hidden: from `run`, [B, T, D].
        mask: bool [P, B, T], True at the prompts' positions.
        before: of the positions before these.
    """
    before = before or (None,) * len(hidden)
    sums: list[PositionSums | None] = []
    for stream, states, so_far in zip(method.streams, hidden, before, strict=True):
        weights, looks = models.weights[stream.model], states.prompt is not None
        sums.append(
            _sums_over_positions(weights, states.prompt, of_stream(mask, stream), so_far) if looks else None
        )
    return tuple(sums)


def _sums_over_positions(
    weights: Weights, states: jax.Array, mask: jax.Array, before: PositionSums | None
) -> PositionSums:
    B, T, _ = states.shape
    size = math.gcd(1 << (max(1, POSITIONS_PER_PROJECTION // B).bit_length() - 1), T)
    if before is None:
        zeros = jnp.zeros((B, weights.base["embed"].shape[0]), jnp.float32)
        before = PositionSums(zeros - FAR_BELOW, zeros, zeros)

    def add_chunk(sums: PositionSums, chunk: tuple[jax.Array, jax.Array]) -> tuple[PositionSums, None]:
        states, mask = chunk
        z = constrain(project(weights, states), "batch", None, "act_vocab")
        z = jnp.where(mask[..., None], z, -FAR_BELOW)
        peak = jnp.maximum(sums.peak, z.max(axis=1))
        z, fall = z - peak[:, None], sums.peak - peak
        shares = jnp.where(mask[..., None], jnp.exp(z), 0.0)
        total = jnp.exp(fall) * sums.total + shares.sum(axis=1)
        dot = jnp.exp(fall) * (sums.dot + fall * sums.total) + (z * shares).sum(axis=1)
        return PositionSums(peak, total, dot), None

    chunks = (jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0) for x in (states, mask))
    return jax.lax.scan(add_chunk, before, tuple(chunks))[0]


def entropies(sums: PromptSums) -> tuple[jax.Array | None, ...]:
    """What `logits_of` takes, from `prompt_sums`."""
    return tuple(None if each is None else each.entropy for each in sums)


def logits_of(
    models: Models,
    method: Method,
    hidden: Sequence[StreamHidden],
    prompt_entropies: Sequence[jax.Array | None] | None = None,
) -> tuple[StreamLogits, ...]:
    """Logits of every stream. The streams of one model, early exits included, are projected in one matmul.

    Args:
        prompt_entropies: of every stream, float32 [..., V] or None.

    Raises:
        UserError: the method looks at a prompt, and there is none.
    """
    if prompt_entropies is None:
        if needs_prompts(method):
            raise UserError(f"method {method.name} needs prompts, and texts alone have none: leave it out")
        prompt_entropies = (None,) * len(hidden)
    logits: list[StreamLogits | None] = [None] * len(method.streams)
    for model, group in enumerate(_groups(method)):
        states = []
        for i in group:
            states.append(hidden[i].final[None])
            if hidden[i].exits is not None:
                states.append(hidden[i].exits)
        projected = project(models.weights[model], jnp.concatenate(states))
        projected = constrain(projected, None, "batch", "act_vocab")
        start = 0
        for i in group:
            end = start + 1 + len(method.streams[i].exits)
            exits = projected[start + 1 : end] if end > start + 1 else None
            logits[i] = StreamLogits(projected[start], exits, prompt_entropies[i])
            start = end
    return tuple(logits)


def finite(logits: Sequence[StreamLogits]) -> jax.Array:
    """Whether the final logits of all streams are, bool [...]: an overflow of float16 would become text."""
    return jnp.stack([jnp.isfinite(x.final).all(axis=-1) for x in logits]).all(axis=0)


def not_finite_error(
    models: Models, method: Method, sequences: Sequence[Sequence[int]], where: str
) -> UserError:
    """The error for logits or scores that are NaN or infinite.

    Args:
        models, method: as in `run`.
        sequences: tokens after which they are, behind every prompt; one more pass over them finds the layer
            where it begins.
        where: what was computed.
    """
    layer = first_layer_not_finite(models, method, sequences)
    begins = "" if layer is None else f", from layer {layer} on" if layer else ", from the embeddings on"
    dtype = models.weights[0].dtype
    if dtype == jnp.float16:
        cure = "float16 holds numbers up to 65504 only: load the model with --dtype float32 (or bfloat16)"
    else:
        cure = "check the checkpoint and the method's settings, or load the model with --dtype float32"
    return UserError(f"{where}: logits or scores are not finite in {dtype.name}{begins}; {cure}")


def first_layer_not_finite(models: Models, method: Method, sequences: Sequence[Sequence[int]]) -> int | None:
    """The first layer of any stream after which a text's residual stream is not finite, or None.

    0 is the embedding's output. `sequences`: the text behind every prompt.
    """
    first_layers = []
    for stream in method.streams:
        config, tokens = models.configs[stream.model], sequences[stream.prompt]
        length = len(tokens)
        rows = np.pad(np.asarray([tokens], np.int32), ((0, 0), (0, -length % LENGTH_BUCKET)))
        mask = np.arange(rows.shape[1])[None] < length
        with use_mesh(models.mesh):
            hidden_layers = _forward(
                models.weights[stream.model],
                config,
                rows,
                attention_mask=mask,
                interventions=_interventions(
                    models.weights[stream.model],
                    config,
                    [dataclasses.replace(stream, steer_scope="all")],
                    np.ones((1, *rows.shape), bool),
                ),
                options=Options(Taps(hidden_layers=tuple(range(config.num_layers + 1)))),
            ).hidden_layers
        bad = (layer for layer, x in enumerate(hidden_layers) if not jnp.isfinite(x[:, :length]).all())
        first_layers.append(next(bad, None))
    return min((layer for layer in first_layers if layer is not None), default=None)


def needs_prompts(method: Method) -> bool:
    """Whether a method, once it is resolved, looks at the positions of a prompt."""
    return any(stream.prompt_exit is not None for stream in method.streams)


def projections(method: Method) -> int:
    """Projections to the vocabulary at every position."""
    return sum(1 + len(stream.exits) for stream in method.streams)


def _interventions(
    weights: Weights, config: LlamaConfig, streams: Sequence[Stream], answer: jax.Array
) -> Interventions:
    """What acts on the rows of streams of one model, stream-major.

    Args:
        weights, config: of the model.
        streams: S of them.
        answer: bool [P, B, T], as in `run`.
    """

    def per_row(values: Any) -> jax.Array:
        return jnp.repeat(jnp.asarray(values), answer.shape[1], axis=0)

    strength, shift = (
        np.asarray([getattr(s, name) for s in streams], np.float32) for name in ("strength", "shift")
    )
    # [S, 1], or [S, rank] where adapters lie side by side.
    count = max((len(s.adapter) for s in streams if isinstance(s.adapter, tuple)), default=1)
    adapter = np.asarray([np.broadcast_to(s.adapter, count) for s in streams], np.float32)
    if count > 1:
        adapter = np.repeat(adapter, rank_of(weights.lora) // count, axis=1)
    acting = jnp.concatenate([of_stream(answer, s) for s in streams])
    steer = [s.steer * _in_scope(s, of_stream(answer, s)) for s in streams]
    keep_norm = [s.steer != 0 and s.keep_norm for s in streams]
    skip = np.asarray([np.isin(np.arange(config.num_layers) + 1, s.skip) for s in streams])
    return Interventions(
        strength=per_row(strength) if strength.any() else None,
        adapter=per_row(adapter) if adapter.any() else None,
        shift=per_row(shift)[:, None] * acting if shift.any() else None,
        steer=jnp.concatenate(steer) if any(s.steer for s in streams) else None,
        keep_norm=per_row(keep_norm) if any(keep_norm) else None,
        skip=per_row(skip) if skip.any() else None,
    )


def _groups(method: Method) -> list[list[int]]:
    """Numbers of the streams of each model."""
    streams: tuple[Stream, ...] = method.streams
    models = max(stream.model for stream in streams) + 1
    return [[i for i, stream in enumerate(streams) if stream.model == m] for m in range(models)]
