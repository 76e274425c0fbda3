"""Several methods in one pass: the forward streams that they have in common run once."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from imae_jax.decode.methods import Method, Stream, StreamLogits
from imae_jax.decode.streams import Models
from imae_jax.llama import Weights


@dataclasses.dataclass(frozen=True)
class Joint(Method):
    """M methods as one, for the scorer: `token_scores` gives [..., M].

    Streams that intervene alike are one stream; it has the early exits of all of them.

    Attributes:
        methods: resolved, and all for the same models.
    """

    methods: tuple[Method, ...]

    @property
    def name(self) -> str:
        return "+".join(method.name for method in self.methods)

    @property
    def streams(self) -> tuple[Stream, ...]:
        merged: list[Stream] = []
        for stream in (stream for method in self.methods for stream in method.streams):
            place = _place(merged, stream)
            if place is None:
                merged.append(stream)
            elif stream.exits:
                exits = tuple(sorted({*merged[place].exits, *stream.exits}))
                merged[place] = dataclasses.replace(stream, exits=exits)
        return tuple(merged)

    def split(self, logits: Sequence[StreamLogits]) -> list[tuple[StreamLogits, ...]]:
        """Every method's own logits, from those of `streams`."""
        merged = self.streams

        def of(stream: Stream) -> StreamLogits:
            place = _place(merged, stream)
            if not stream.exits:
                return StreamLogits(logits[place].final)
            exits = logits[place].exits
            if stream.exits != merged[place].exits:
                chosen = [merged[place].exits.index(layer) for layer in stream.exits]
                exits = exits[jnp.asarray(chosen)]
            return StreamLogits(logits[place].final, exits)

        return [tuple(of(stream) for stream in method.streams) for method in self.methods]

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        each = zip(self.methods, self.split(logits), strict=True)
        return jnp.stack([method.scores(own) for method, own in each])

    def token_scores(
        self, logits: Sequence[StreamLogits], positions: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        each = zip(self.methods, self.split(logits), strict=True)
        return jnp.stack([method.token_scores(own, positions, tokens) for method, own in each], axis=-1)


def share_streams(prepared: Sequence[tuple[Models, Method]]) -> list[tuple[Models, Joint, list[int]]]:
    """Which methods run in one pass: those with a stream in common, where their models go together.

    Args:
        prepared: from `LanguageModel.prepare`.

    Returns:
        Passes with their models, their methods, and the places of these in `prepared`.
    """
    passes: list[tuple[Models, Joint, list[int]]] = []
    for place, (models, method) in enumerate(prepared):
        joint, places, apart = Joint((method,)), [place], []
        for other in passes:
            both = _together(other[0], models)
            if both is not None and _have_one_in_common(other[1], method):
                models, places = both, [*other[2], *places]
                joint = Joint((*other[1].methods, *joint.methods))
            else:
                apart.append(other)
        passes = [*apart, (models, joint, places)]
    return passes


def _have_one_in_common(a: Method, b: Method) -> bool:
    return any(_place(a.streams, stream) is not None for stream in b.streams)


def _place(streams: Sequence[Stream], wanted: Stream) -> int | None:
    """The stream that intervenes as `wanted` does, and whose early exits can be joined with its own."""
    for place, stream in enumerate(streams):
        alike = dataclasses.replace(stream, exits=(), exit_norm=False) == dataclasses.replace(
            wanted, exits=(), exit_norm=False
        )
        if alike and (not stream.exits or not wanted.exits or stream.exit_norm == wanted.exit_norm):
            return place
    return None


def _together(a: Models, b: Models) -> Models | None:
    """Models that have what both have, or None where they hold different arrays in one place."""
    if len(a.weights) < len(b.weights):
        a, b = b, a
    if a.configs[: len(b.configs)] != b.configs:
        return None
    weights = list(a.weights)
    for place, other in enumerate(b.weights):
        both = _joined(weights[place], other)
        if both is None:
            return None
        weights[place] = both
    return Models(tuple(weights), a.configs)


def _joined(a: Weights, b: Weights) -> Weights | None:
    if b.lora is not None and a.lora is None:
        a = dataclasses.replace(a, lora=b.lora, lora_scale=b.lora_scale)
    if b.shifts is not None and a.shifts is None:
        a = dataclasses.replace(a, shifts=b.shifts)
    scales = b.lora is None or a.lora_scale == b.lora_scale
    same = scales and all(
        _same(getattr(a, name), getattr(b, name)) for name in ("base", "units", "lora", "shifts")
    )
    return a if same else None


def _same(a, b) -> bool:
    """Whether b is None or made of the very arrays of a."""
    own, other = jax.tree.leaves(a), jax.tree.leaves(b)
    return b is None or (len(own) == len(other) and all(x is y for x, y in zip(own, other, strict=True)))
