"""The generator: prefill, then compiled chunks of a scan over new tokens."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from imae_jax.batching import round_up
from imae_jax.config import LlamaConfig
from imae_jax.decode import streams
from imae_jax.decode.methods import Method
from imae_jax.decode.methods.imae import Strength
from imae_jax.decode.sampling import Sampler
from imae_jax.decode.streams import Models
from imae_jax.distributed import to_host
from imae_jax.errors import UserError
from imae_jax.llama import Llama, Weights
from imae_jax.sharding import row_shards, use_mesh

PROMPT_BUCKET = 32
"""Prompts are padded to multiples of this, so that few lengths are compiled."""

NEVER = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one step hands to the next.

    Attributes:
        caches: one a model, see `streams.empty_caches`.
        token: int32 [B], drawn last and not yet fed.
        done: bool [B], rows that have drawn an end-of-text token.
        key: key of the whole generation, or [B], one for every row.
        step: int32 [], number of tokens drawn.
        seen: bool [B, V], tokens of prompt and new text, where the sampler needs them; else None.
        not_finite: int32 [B], the first step whose logits or scores were not finite, else `NEVER`.
        entropies: of the prompts, see `streams.entropies`.
    """

    caches: streams.Caches
    token: jax.Array
    done: jax.Array
    key: jax.Array
    step: jax.Array
    seen: jax.Array | None
    not_finite: jax.Array
    entropies: tuple[jax.Array | None, ...]


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How texts are generated.

    Attributes:
        sampler: how a token is drawn; greedy by default.
        max_new_tokens: upper bound per row.
        seed: seed of the sampler; or one for every row, which is then drawn as if it were alone.
        chunk_size: tokens per compiled call; between calls it is checked whether all rows are done.

    Raises:
        UserError: no new tokens.
    """

    sampler: Sampler = Sampler()
    max_new_tokens: int = 128
    seed: int | tuple[int, ...] = 0
    chunk_size: int = 32

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: it must be at least 1")


def generate(
    model: Llama | Weights | Models,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    *,
    method: Method = Strength(0.0),
    eos_token_ids: Sequence[int] = (),
    padding_side: str = "left",
    other_prompts: Sequence[Sequence[Sequence[int]]] = (),
    **options: Any,
) -> list[list[int]]:
    """Continues token prompts with a decoding method.

    A row's result does not depend on the other rows, nor on padding.

    Args:
        model: with layers as separate arrays (`stacked=False`) for full speed; methods that need more than
            it take what `LanguageModel.prepare` returns.
        config: base model configuration.
        prompts: token ids of every prompt.
        method: what scores the next token.
        eos_token_ids: tokens that end a row; the one drawn is part of the result.
        padding_side: `left` or `right`; the results are the same.
        other_prompts: for the prompts 1, 2, … of `Stream.prompt` those of every row.
        options: fields of `GenerationOptions`.

    Returns:
        The new token ids of every prompt.

    Raises:
        UserError: an empty prompt, a prompt over the context length, a method that the model cannot
            run, or logits or scores that are not finite.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in stream_tokens(
        Models.of(model, config),
        prompts,
        method,
        GenerationOptions(**options),
        eos_token_ids=eos_token_ids,
        padding_side=padding_side,
        other_prompts=other_prompts,
    ):
        for row, new in zip(rows, tokens, strict=True):
            row += new
    return rows


def stream_tokens(
    models: Models,
    prompts: Sequence[Sequence[int]],
    method: Method,
    options: GenerationOptions,
    *,
    eos_token_ids: Sequence[int],
    padding_side: str = "left",
    other_prompts: Sequence[Sequence[Sequence[int]]] = (),
    closed: Sequence[bool] | None = None,
) -> Iterator[list[list[int]]]:
    """As `generate`, but yields every row's new tokens after the prefill and after every chunk.

    Args:
        closed: rows whose text has ended otherwise, such as at a stop string: the caller may set them between
            two yields. Nothing more comes of them, neither tokens nor errors.
    """
    config, max_new_tokens, chunk_size = models.configs[0], options.max_new_tokens, options.chunk_size
    method = method.resolve(config, generating=True)
    streams.check(models, method)
    streams.check_prompts(method, 1 + len(other_prompts))
    if not prompts:
        return
    seed = np.asarray(options.seed, np.int32)
    if seed.ndim and seed.shape != (len(prompts),):
        raise UserError(f"{seed.size} seeds for {len(prompts)} prompts: give one, or one for each")
    every_prompt = [prompts, *other_prompts][: streams.num_prompts(method)]
    for each, suffix in zip(every_prompt, ("", " without its context"), strict=False):
        _check_prompts(each, max_new_tokens, config, models.context_length, suffix)

    num_chunks = -(-(max_new_tokens - 1) // chunk_size)
    eos = np.asarray(list(eos_token_ids) or [-1], np.int32)
    with use_mesh(models.mesh):
        # Every device gets as many rows as any other; nobody reads the copies.
        copies = -len(prompts) % row_shards()
        tokens, mask = _pad([[*each, *[each[0]] * copies] for each in every_prompt], padding_side)
        state = _prefill(
            models,
            tokens,
            mask,
            eos,
            np.pad(seed, (0, copies)) if seed.ndim else seed,
            method=method,
            sampler=options.sampler,
            capacity=tokens.shape[-1] + num_chunks * chunk_size,
        )
    closed = [False] * len(prompts) if closed is None else closed
    rows: list[list[int]] = [[] for _ in prompts]
    eos_set, ended = set(eos_token_ids), [False] * len(prompts)

    for number in range(1 + num_chunks):
        drawn = state.token[:, None]
        if number > 0:
            with use_mesh(models.mesh):
                state, drawn = _decode_chunk(
                    models, state, eos, method=method, sampler=options.sampler, length=chunk_size
                )
        drawn, not_finite = (to_host(x)[: len(prompts)].tolist() for x in (drawn, state.not_finite))
        new: list[list[int]] = [[] for _ in prompts]
        for i, row in enumerate(rows):
            if not (ended[i] or closed[i]):
                sound = drawn[i][: min(not_finite[i], max_new_tokens) - len(row)]
                end = next((j + 1 for j, token in enumerate(sound) if token in eos_set), None)
                new[i], ended[i] = sound[:end], end is not None
                row += new[i]
        yield new
        # Only now is known whose text goes on.
        still_open = [i for i in range(len(prompts)) if not (ended[i] or closed[i])]
        failed = [(not_finite[i], i) for i in still_open if not_finite[i] < max_new_tokens]
        if failed:
            step, i = min(failed)
            at = "prefill" if step == 0 else f"new token {step}"
            where = f"{method.name}, prompt {i}, {at}"
            sequences = [[*each[i], *rows[i]] for each in every_prompt]
            raise streams.not_finite_error(models, method, sequences, where)
        if not still_open:
            return


@functools.partial(jax.jit, static_argnames=("method", "sampler", "capacity"))
def _prefill(models, tokens, mask, eos, seed, *, method, sampler, capacity):
    (_, B, T), key = tokens.shape, _for_each(jax.random.key, seed)
    caches = streams.empty_caches(models, method, B, capacity)
    last = T - 1 - jnp.argmax(mask[..., ::-1], axis=-1)  # [P, B]
    answer = jnp.arange(T) == last[..., None]
    hidden, caches = streams.run(models, method, tokens, attention_mask=mask, answer=answer, caches=caches)
    entropies = streams.entropies(streams.prompt_sums(models, method, hidden, mask))

    def at_last(x, stream):  # [..., B, T, D] to [..., B, D].
        return x[..., jnp.arange(B), streams.of_stream(last, stream), :]

    each = zip(hidden, method.streams, strict=True)
    hidden = tuple(jax.tree.map(lambda x, s=stream: at_last(x, s), states) for states, stream in each)
    scores, finite = _scores(models, method, hidden, entropies)
    seen = None
    if sampler.needs_seen:
        seen = jnp.zeros(scores.shape, bool).at[jnp.arange(B)[:, None], tokens[0]].max(mask[0])
    token = sampler.sample(scores, _of_step(key, 0), seen)
    seen = _with_token(seen, token)
    not_finite = jnp.where(finite, NEVER, 0).astype(jnp.int32)
    done, step = jnp.isin(token, eos), jnp.ones((), jnp.int32)
    return DecodeState(caches, token, done, key, step, seen, not_finite, entropies)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Programs of `stream_tokens` for given shapes: the prefill, and a chunk."""

    prefill: jax.stages.Compiled
    chunk: jax.stages.Compiled


def compile_programs(
    models: Models, method: Method, batch_size: int, prompt_tokens: int, new_tokens: int
) -> Compiled:
    """Compiles what greedy decoding runs, without running it.

    Args:
        models: as in `stream_tokens`; their arrays may be abstract, on devices that are not there.
        method: resolved.
        new_tokens: of every row; the chunk has one less, or `GenerationOptions.chunk_size`.
    """
    length = min(GenerationOptions.chunk_size, new_tokens - 1)
    num_chunks = -(-(new_tokens - 1) // length)
    T = round_up(prompt_tokens, PROMPT_BUCKET)
    shape = (streams.num_prompts(method), batch_size, T)
    tokens, mask = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool))
    eos, static = np.full(1, -1, np.int32), {"method": method, "sampler": Sampler()}
    with use_mesh(models.mesh):
        capacity = T + num_chunks * length
        prefill = _prefill.lower(
            models, tokens, mask, eos, np.int32(0), **static, capacity=capacity
        ).compile()
        state = jax.tree.map(
            lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
            prefill.out_info,
            prefill.output_shardings,
        )
        chunk = _decode_chunk.lower(models, state, eos, **static, length=length).compile()
    return Compiled(prefill, chunk)


def _scores(models, method, hidden, entropies):
    """What tokens are drawn from, float32 [B, V], and whether it is sound, bool [B]."""
    logits = streams.logits_of(models, method, hidden, entropies)
    with jax.named_scope(method.name):
        scores = method.unnormalized_scores(logits)
        # Of a method of one's own, an axis too many would be drawn from in silence.
        chex.assert_equal_shape([scores, *(stream.final for stream in logits)])
        # Tokens that a method rules out have -inf, but not all of them; NaN passes through the maximum.
        return scores, streams.finite(logits) & jnp.isfinite(scores.max(axis=-1))


def _for_each(function, x):
    return jax.vmap(function)(x) if x.ndim else function(x)


def _of_step(key, step):
    return _for_each(lambda each: jax.random.fold_in(each, step), key)


def _with_token(seen, token):
    return None if seen is None else seen.at[jnp.arange(token.shape[0]), token].set(True)


@functools.partial(jax.jit, static_argnames=("method", "sampler", "length"), donate_argnames="state")
def _decode_chunk(models, state, eos, *, method, sampler, length):
    def step(state: DecodeState, _):
        tokens = state.token[None, :, None]
        every = jnp.ones(tokens.shape, bool)
        hidden, caches = streams.run(
            models, method, tokens, attention_mask=every, answer=every, caches=state.caches
        )
        hidden = jax.tree.map(lambda x: x[..., 0, :], hidden)
        scores, finite = _scores(models, method, hidden, state.entropies)
        token = sampler.sample(scores, _of_step(state.key, state.step), state.seen)
        token = jnp.where(state.done, state.token, token)
        done = state.done | jnp.isin(token, eos)
        seen = _with_token(state.seen, token)
        not_finite = jnp.where(finite | state.done, NEVER, state.step)
        not_finite = jnp.minimum(state.not_finite, not_finite)
        new = (caches, token, done, state.key, state.step + 1, seen, not_finite, state.entropies)
        return DecodeState(*new), token

    state, drawn = jax.lax.scan(step, state, length=length)
    return state, drawn.T


def _pad(prompts: Sequence[Sequence[Sequence[int]]], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [P, B, T] of P prompts of B rows."""
    if side not in ("left", "right"):
        raise UserError(f"padding_side {side!r}: use left or right")
    length = round_up(max(len(prompt) for each in prompts for prompt in each), PROMPT_BUCKET)
    tokens = np.zeros((len(prompts), len(prompts[0]), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for number, each in enumerate(prompts):
        for i, prompt in enumerate(each):
            span = slice(length - len(prompt), length) if side == "left" else slice(len(prompt))
            tokens[number, i, span] = prompt
            mask[number, i, span] = True
    return tokens, mask


def _check_prompts(prompts, max_new_tokens: int, config: LlamaConfig, limit: int, suffix: str) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i}{suffix} is empty: give at least one token")
        config.check_token_ids(prompt)
        if len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"prompt {i}{suffix} has {len(prompt)} tokens, and {max_new_tokens} new ones are asked for: "
                f"together they exceed the model's context of {limit}; shorten one of them"
            )
