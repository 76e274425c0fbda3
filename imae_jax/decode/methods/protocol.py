"""What a decoding method is."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax

from imae_jax.config import LlamaConfig

IMPLAUSIBLE_SCORE = -1000.0
"""Score of implausible tokens in multiple choice, so that a sum stays finite; -inf when generating."""


def control(default: Any, *, compare: bool = True) -> Any:
    """A setting that plain runs leave alone: keyword-only, and recorded where it is not the default."""
    return dataclasses.field(default=default, kw_only=True, compare=compare, metadata={"control": True})


@dataclasses.dataclass(frozen=True)
class Stream:
    """One forward pass. The streams of one model run as rows of one batch, so that weights that they
    share are read once.

    Attributes:
        model: 0 for the model itself, 1 for the method's second one.
        prompt: 0 for the prompt itself, 1 for the same without its context: the tokens that follow are the
            same in all streams.
        strength: the anti-expert units' `o`; 0 leaves them out.
        adapter: factor of the low-rank deltas; 0 leaves them out. Of several adapters side by side, a factor
            each.
        shift: factor of the heads' shifts; 0 leaves them out.
        skip: numbers of layers, from 1 on, that are passed by.
        steer: factor of the vectors that are added to the residual stream; 0 leaves them out.
        steer_scope: where they are added: `answer`, at positions that predict an answer's token, the first
            one included; `prompt`, at all others; `all`.
        keep_norm: whether the residual stream keeps its norm there.
        exits: numbers of layers (0: the embedding) whose residual stream is projected, too.
        prompt_exit: number of the layer whose residual stream is projected at the prompt's positions, if any.
        exit_norm: whether the final norm comes before these projections; of the last layer it always does.
    """

    model: int = 0
    prompt: int = 0
    strength: float = 0.0
    adapter: float | tuple[float, ...] = 0.0
    shift: float = 0.0
    skip: tuple[int, ...] = ()
    steer: float = 0.0
    steer_scope: str = "answer"
    keep_norm: bool = False
    exits: tuple[int, ...] = ()
    prompt_exit: int | None = None
    exit_norm: bool = False

    @property
    def acts(self) -> bool:
        """Whether anything acts on the rows besides the weights of the base."""
        return any((self.strength, self.adapter, self.shift, self.steer))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamLogits:
    """What a stream gives.

    Attributes:
        final: float32 [..., V].
        exits: float32 [n, ..., V], one for each of `Stream.exits`; None where there are none.
        prompt_entropy: float32 [..., V], entropy in nats of the softmax of a token's logits over the prompt's
            positions, after layer `Stream.prompt_exit`; None without it.
    """

    final: jax.Array
    exits: jax.Array | None = None
    prompt_entropy: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Resource:
    """Something that a method's settings name and that is loaded before it runs.

    Attributes:
        kind: `model`, a second model; `anti_expert_llm`, an adapter of this model or a second model;
            `adapters`, several of this model side by side; `directions`, shifts of heads; `vectors`,
            additions to the residual stream; `units`, anti-expert units instead of the model's own.
        reference: what to load; of `adapters`, one for each.
        setting: which setting named it, for errors.
    """

    kind: str
    reference: str | tuple[str, ...]
    setting: str

    def __str__(self) -> str:
        reference = self.reference
        return f"{self.setting}={reference if isinstance(reference, str) else ', '.join(reference)}"


class Method(abc.ABC):
    """A decoding method.

    Implementations are frozen dataclasses: hashable, since compiled functions take them as static
    arguments. A setting of None stands for the published default, which can differ between tasks and
    models: `resolve` fills it in.
    """

    def __init_subclass__(cls) -> None:
        # Whoever overrides `scores` alone means them when generating, too.
        if "scores" in vars(cls) and "unnormalized_scores" not in vars(cls):
            cls.unnormalized_scores = Method.unnormalized_scores

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name in results and tables."""

    @property
    @abc.abstractmethod
    def streams(self) -> tuple[Stream, ...]:
        """The forward passes that `scores` needs, in its order."""

    @abc.abstractmethod
    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        """Next-token scores, float32 [..., V], of a method that is resolved, from every stream's logits."""

    def unnormalized_scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        """What a next token is drawn from, float32 [..., V]: `scores` plus any number that all tokens share.

        Raw logits where `scores` are their log-softmax: a repetition penalty acts on these, as in
        transformers, and its result depends on that number.
        """
        return self.scores(logits)

    def token_scores(
        self, logits: Sequence[StreamLogits], positions: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        """`scores` of some tokens alone, float32 [Q].

        To be overridden where that is cheaper than building [P, V].

        Args:
            logits: logits of P positions.
            positions: int32 [Q], in front of which of them a token comes.
            tokens: int32 [Q].
        """
        return self.scores(logits)[positions, tokens]

    @property
    def normalized(self) -> bool:
        """Whether the scores are log-probabilities, but for tokens that are masked.

        A method that says so can be asked for perplexities, and tables call its sums `log p`.
        """
        return False

    @property
    def rules_out(self) -> bool | tuple[bool, ...]:
        """Whether -inf is a score, of tokens that are masked; else it is an overflow. For every column."""
        return False

    @property
    def columns(self) -> tuple[int, ...]:
        """What `token_scores` has behind [Q]: nothing, or the number of methods that are scored as one."""
        return ()

    def resolve(self, config: LlamaConfig, *, generating: bool) -> Self:
        """The method with every setting filled in for a model and a task.

        Raises:
            UserError: a setting contradicts the model.
        """
        return self

    @property
    def resource(self) -> "Resource | None":
        """What the method needs besides the model, by the reference in its settings."""
        return None

    def with_resource(self, *, shared: bool) -> Self:
        """The method once its resource is loaded.

        Args:
            shared: the resource joined the model's own weights; False: it is a second model.
        """
        return self

    def flipped(self) -> "Method | None":
        """The method with the sign of its direction reversed: a control. None where it has no direction."""
        return None

    @property
    def centred(self) -> bool:
        """Whether base mode lies half-way between the method and `flipped`."""
        return True

    def settings(self) -> dict[str, Any]:
        """What to write into results: enough to build the method again."""
        values = {field.name: getattr(self, field.name) for field in setting_fields(type(self))}
        for field in setting_fields(type(self)):
            if field.metadata.get("control") and values[field.name] == field.default:
                del values[field.name]
        return {"name": self.name, **values}


@dataclasses.dataclass(frozen=True)
class WithNoise(Method):
    """A method along a learned direction, which a random one of the same size can replace.

    Attributes:
        noise: seed of the random direction, see `decode.noise`; None for the learned one.
        noise_scale: factor of the random direction's size.

    Methods that differ in these alone are equal: they run on other weights, in one compiled program.
    """

    noise: int | None = control(None, compare=False)
    noise_scale: float = control(1.0, compare=False)


@dataclasses.dataclass(frozen=True)
class WithUnits(WithNoise):
    """A method that runs anti-expert units.

    Attributes:
        units_from: reference of an IMAE model whose units run instead of the model's own.
    """

    units_from: str = control("")

    @property
    def resource(self) -> Resource | None:
        return Resource("units", self.units_from, "units_from") if self.units_from else None


def setting_fields(method: type[Method]) -> list[dataclasses.Field]:
    """The fields that a user sets: all but those with `metadata={"setting": False}`."""
    return [field for field in dataclasses.fields(method) if field.metadata.get("setting", True)]
