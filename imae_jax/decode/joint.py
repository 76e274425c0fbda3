"""Several methods in one pass: the forward streams that they have in common run once."""

import dataclasses
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from imae_jax.decode.methods import Method, Stream, StreamLogits
from imae_jax.decode.streams import Models
from imae_jax.llama import Weights


@dataclasses.dataclass(frozen=True)
class Joint(Method):
    """M methods as one, for the scorer: `token_scores` gives [..., M].

    Methods with the same interventions share a stream; its early exits are the union of theirs.

    Attributes:
        methods: resolved methods, all for the same models.
    """

    methods: tuple[Method, ...]

    @property
    def name(self) -> str:
        return "+".join(method.name for method in self.methods)

    @property
    def streams(self) -> tuple[Stream, ...]:
        merged: list[Stream] = []
        for stream in (stream for method in self.methods for stream in method.streams):
            index = _find_stream(merged, stream)
            if index is None:
                merged.append(stream)
            elif _projects_early(stream):
                exits = tuple(sorted({*merged[index].exits, *stream.exits}))
                prompt_exit = merged[index].prompt_exit if stream.prompt_exit is None else stream.prompt_exit
                merged[index] = dataclasses.replace(stream, exits=exits, prompt_exit=prompt_exit)
        return tuple(merged)

    @property
    def rules_out(self) -> tuple[bool, ...]:
        return tuple(method.rules_out for method in self.methods)

    @property
    def columns(self) -> tuple[int, ...]:
        return (len(self.methods),)

    def split(self, logits: Sequence[StreamLogits]) -> list[tuple[StreamLogits, ...]]:
        """Every method's own logits, from those of `streams`."""
        merged = self.streams

        def logits_for(stream: Stream) -> StreamLogits:
            index = _find_stream(merged, stream)
            exits = logits[index].exits if stream.exits else None
            if stream.exits and stream.exits != merged[index].exits:
                exits = exits[jnp.asarray([merged[index].exits.index(layer) for layer in stream.exits])]
            return StreamLogits(logits[index].final, exits, logits[index].prompt_entropy)

        return [tuple(map(logits_for, method.streams)) for method in self.methods]

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        each = zip(self.methods, self.split(logits), strict=True)
        return jnp.stack([method.scores(its_logits) for method, its_logits in each])

    def token_scores(
        self, logits: Sequence[StreamLogits], positions: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        each = zip(self.methods, self.split(logits), strict=True)
        scores = [method.token_scores(its_logits, positions, tokens) for method, its_logits in each]
        return jnp.stack(scores, axis=-1)


def share_streams(prepared: Sequence[tuple[Models, Method]]) -> list[tuple[Models, Joint, list[int]]]:
    """Which methods run in one pass: those with a stream in common, where their models merge.

    Args:
        prepared: from `LanguageModel.prepare`.

    Returns:
        Passes with their models, their methods, and the indices of these in `prepared`.
    """
    passes: list[tuple[Models, Joint, list[int]]] = []
    for i, (models, method) in enumerate(prepared):
        joint, indices, apart = Joint((method,)), [i], []
        for other_models, other, other_indices in passes:
            merged = _merge_models(other_models, models)
            if merged is not None and _share_a_stream(other, method):
                models, indices = merged, [*other_indices, *indices]
                joint = Joint((*other.methods, *joint.methods))
            else:
                apart.append((other_models, other, other_indices))
        passes = [*apart, (models, joint, indices)]
    return passes


def _share_a_stream(a: Method, b: Method) -> bool:
    return any(_find_stream(a.streams, stream) is not None for stream in b.streams)


def _find_stream(streams: Sequence[Stream], wanted: Stream) -> int | None:
    """The stream with the interventions of `wanted` whose early exits can be merged with its own."""

    def interventions(stream: Stream) -> Stream:
        return dataclasses.replace(stream, exits=(), prompt_exit=None, exit_norm=False)

    for index, stream in enumerate(streams):
        both_project = _projects_early(stream) and _projects_early(wanted)
        exits_merge = not both_project or stream.exit_norm == wanted.exit_norm
        prompts_merge = None in (stream.prompt_exit, wanted.prompt_exit) or (
            stream.prompt_exit == wanted.prompt_exit
        )
        if exits_merge and prompts_merge and interventions(stream) == interventions(wanted):
            return index
    return None


def _projects_early(stream: Stream) -> bool:
    return bool(stream.exits) or stream.prompt_exit is not None


def _merge_models(a: Models, b: Models) -> Models | None:
    """Models that have what both have, or None where they hold different arrays for one thing."""
    if len(a.weights) < len(b.weights):
        a, b = b, a
    if a.configs[: len(b.configs)] != b.configs:
        return None
    merged = [_merge_weights(*pair) for pair in zip(a.weights, b.weights, strict=False)]
    return None if None in merged else Models((*merged, *a.weights[len(merged) :]), a.configs)


def _merge_weights(a: Weights, b: Weights) -> Weights | None:
    if b.units is not None and a.units is None:
        a = dataclasses.replace(a, units=b.units)
    if b.lora is not None and a.lora is None:
        a = dataclasses.replace(a, lora=b.lora, lora_scale=b.lora_scale)
    if b.shifts is not None and a.shifts is None:
        a = dataclasses.replace(a, shifts=b.shifts)
    if b.vectors is not None and a.vectors is None:
        a = dataclasses.replace(a, vectors=b.vectors)
    same_scale = b.lora is None or a.lora_scale == b.lora_scale
    fields = ("base", "units", "lora", "shifts", "vectors")
    return a if same_scale and all(_has_arrays_of(getattr(a, f), getattr(b, f)) for f in fields) else None


def _has_arrays_of(a, b) -> bool:
    """Whether b is None or made of the very arrays of a."""
    these, those = jax.tree.leaves(a), jax.tree.leaves(b)
    return b is None or (len(these) == len(those) and all(map(operator.is_, these, those)))
