"""A loaded model with its tokenizer: text in, text or scores out."""

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from imae_jax.config import LlamaConfig
from imae_jax.continuation import encode, windows
from imae_jax.decode.loop import GenerationOptions, stream_tokens
from imae_jax.decode.methods import Method, Resource, parse_method
from imae_jax.decode.noise import with_noise
from imae_jax.decode.scoring import score
from imae_jax.decode.streams import Models, check
from imae_jax.errors import UserError
from imae_jax.llama import Llama, Weights
from imae_jax.prompts import adds_special_tokens, answer_frame, render, resolve_format
from imae_jax.sharding import mesh_of
from imae_jax.tokenizer import Tokenizer

STREAMED_CHUNK_SIZE = 4
WINDOW = 2048


@dataclasses.dataclass(frozen=True)
class BaseReference:
    """Where a base model came from, as an IMAE directory remembers it.

    Attributes:
        reference: as the user gave it; local paths are absolute.
        revision: commit of a hub model, else None.
        fingerprint: of every tensor that is read and of the config, see `convert.identity`; of an adapter, of
            its tensors and settings and its base's fingerprint. None where they have not been read.
        dtype: that the base was loaded in.
    """

    reference: str
    revision: str | None
    fingerprint: str | None
    dtype: str


@dataclasses.dataclass(frozen=True)
class LoadedResource:
    """A method's resource in memory: a second model, or arrays that join the model's own weights.

    Attributes:
        second: the second model, or None.
        weights: fields of `Weights` for a method's settings.
        fingerprint: fingerprint of what was loaded.
    """

    second: "LanguageModel | None" = None
    weights: Callable[[Method], dict[str, Any]] = lambda method: {}
    fingerprint: str | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
        text: without special tokens and stop strings.
        finished: whether an end-of-text token or a stop string ended it, and not the number of tokens.
        tokens: the drawn tokens that `text` comes from, without those behind it.
    """

    text: str
    finished: bool
    tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, repr=False)
class LanguageModel:
    """What `imae_jax.convert.load_model` returns.

    Attributes:
        model: the Flax model, with units where the reference has them.
        tokenizer: tokenizer of the checkpoint; see `imae_jax.tokenizer`.
        eos_token_ids: tokens that end a text.
        base: where the base came from.
        imae: `imae_config.json` of an IMAE directory, else None.
        load_resource: loads what a method's settings name; see `convert.references`.
        units_fingerprint: fingerprint of the units' tensors, None without units.
    """

    model: Llama
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    base: BaseReference
    imae: dict[str, Any] | None = None
    load_resource: Callable[["LanguageModel", Resource], "LoadedResource"] | None = None
    units_fingerprint: str | None = None
    _loaded: dict[Resource, "LoadedResource"] = dataclasses.field(default_factory=dict, compare=False)
    _casts: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict, compare=False)
    _noise: dict[Any, Weights] = dataclasses.field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        parts = [self.base.reference, f"{self.config.num_layers} layers", self.base.dtype]
        if (units := self.model.anti_expert_config) is not None:
            parts.append(f"units of {units.intermediate_size}")
        return f"<LanguageModel {', '.join(parts)}>"

    @property
    def config(self) -> LlamaConfig:
        return self.model.config

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices over which the model is spread, and on which it generates and scores; None for one."""
        return mesh_of(self.model.embed.get_value())

    def prepare(self, method: str | Method, *, generating: bool) -> tuple[Models, Method]:
        """A method, resolved for this model and task, and all that it runs on.

        Second models, adapters and directions are loaded once and kept.

        Args:
            method: `expert`, `base`, `anti-expert`, a strength, or any decoding method.
            generating: False for scoring given answers.

        Raises:
            UserError: a method that the model cannot run, or a resource that does not fit.
        """
        method, weights = parse_method(method), self.model.weights().in_one_dtype(self._casts)
        models = Models((weights,), (self.config,))
        resource = method.resource
        if resource is not None:
            if resource not in self._loaded:
                try:
                    self._loaded[resource] = self.load_resource(self, resource)
                except UserError as error:
                    raise UserError(f"{method.name}: {resource}: {error}") from error
            loaded = self._loaded[resource]
            if loaded.second is not None:
                second = loaded.second
                models = Models((weights, second.model.weights()), (self.config, second.config))
            else:
                weights = dataclasses.replace(weights, **loaded.weights(method)).in_one_dtype(self._casts)
                models = Models((weights,), (self.config,))
            method = method.with_resource(shared=loaded.second is None)
        method = method.resolve(self.config, generating=generating)
        check(models, method)
        return self._with_noise(models, method), method

    def _with_noise(self, models: Models, method: Method) -> Models:
        """The models, with random signs in what the method does to the first one if it asks for them."""
        seed = getattr(method, "noise", None)
        if seed is None:
            return models
        streams = [stream for stream in method.streams if stream.model == 0]
        names = ("strength", "adapter", "shift", "steer")
        acts = tuple(any(getattr(s, name) for s in streams) for name in names)
        # The method says how many heads are shifted, and after which layers vectors are added.
        key = seed, method.noise_scale, acts, method if any(acts[2:]) else method.resource
        if key not in self._noise:
            try:
                self._noise[key] = with_noise(models.weights[0], streams, seed, method.noise_scale)
            except UserError as error:
                raise UserError(f"{method.name}: {error}") from error
        return dataclasses.replace(models, weights=(self._noise[key], *models.weights[1:]))

    def resource_fingerprint(self, method: Method) -> str | None:
        """Of what `prepare` has loaded for a method; None for methods that need nothing besides the model."""
        return None if method.resource is None else self._loaded[method.resource].fingerprint

    def generate(self, prompts: Sequence[str], method: str | Method = "base", **options: Any) -> list[str]:
        """Continues texts.

        Args:
            prompts: texts, questions or messages.
            method: `expert`, `base`, `anti-expert`, a strength, or any decoding method.
            options: `format`: `raw` continues the text as it is (the default), `plain` wraps it as
                `Q: …\\nA:`, `chat` in the model's chat template. `stop`: strings that end a text and are not
                part of it; the one that is complete first counts, and a special token, which is no part of
                any text, ends it where it is drawn. `without_context`: the same prompts without their
                contexts, for methods that compare the two, such as `cad`. And the fields of
                `GenerationOptions`, such as `max_new_tokens`, `sampler` and `seed`.

        Returns:
            The new text of every prompt, without special tokens.

        Raises:
            UserError: a prompt that is empty or too long, or a method that the model cannot run.
        """
        return [completion.text for completion in self.complete(prompts, method, **options)]

    def complete(
        self, prompts: Sequence[str], method: str | Method = "base", **options: Any
    ) -> list[Completion]:
        """As `generate`, but also says of every text what ended it."""
        whole = [Completion("", False)] * len(prompts)
        for pieces in self._pieces(prompts, method, **options):
            whole = [
                dataclasses.replace(piece, text=before.text + piece.text)
                for before, piece in zip(whole, pieces, strict=True)
            ]
        ids = self.encode_prompts(prompts, options.get("format", "raw"))
        return [
            dataclasses.replace(each, tokens=tokens_of(self.tokenizer, prompt, each.tokens, each.text))
            for prompt, each in zip(ids, whole, strict=True)
        ]

    def stream(
        self, prompts: Sequence[str], method: str | Method = "base", **options: Any
    ) -> Iterator[list[str]]:
        """As `generate`, but yields every prompt's next piece of text, of `chunk_size` tokens."""
        for completions in self._pieces(prompts, method, **{"chunk_size": STREAMED_CHUNK_SIZE} | options):
            yield [completion.text for completion in completions]

    def _pieces(
        self,
        prompts: Sequence[str],
        method: str | Method,
        *,
        format: str = "raw",
        stop: Sequence[str] = (),
        without_context: Sequence[str] | None = None,
        **options: Any,
    ) -> Iterator[list[Completion]]:
        """Every prompt's next piece of text, whether it is the last one, and all tokens drawn so far."""
        ends_text = set(self.eos_token_ids) | special_stops(self.tokenizer, stop)
        models, method = self.prepare(method, generating=True)
        ids, other_prompts = self.encode_prompts(prompts, format), []
        if without_context is not None:
            _check_texts("without_context", without_context)
            if len(without_context) != len(prompts):
                raise UserError(f"without_context: {len(without_context)} texts for {len(prompts)} prompts")
            other_prompts.append(self.encode_prompts(without_context, format))
        rows: list[list[int]] = [[] for _ in prompts]
        emitted, closed = [0] * len(prompts), [False] * len(prompts)

        def pieces(last: bool) -> list[Completion]:
            new = []
            for i, row in enumerate(rows):
                ended = bool(row) and row[-1] in ends_text
                text = ""
                if not closed[i]:
                    text, closed[i] = text_so_far(self.tokenizer, ids[i], row, stop, finished=last or ended)
                new.append(Completion(text[emitted[i] :], ended or closed[i], tuple(row)))
                emitted[i] = max(emitted[i], len(text))
            return new

        options = GenerationOptions(**options)
        for tokens in stream_tokens(
            models,
            ids,
            method,
            options,
            eos_token_ids=sorted(ends_text),
            other_prompts=other_prompts,
            closed=closed,
        ):
            for row, new in zip(rows, tokens, strict=True):
                row += new
            completions = pieces(last=False)
            yield completions
            if all(completion.finished for completion in completions):
                return
        yield pieces(last=True)

    def encode_prompts(self, prompts: Sequence[str], format: str) -> list[list[int]]:
        """Token ids of prompts to be continued, in a format; see `generate`."""
        format = resolve_format(self.tokenizer, format, allow_raw=True)
        _check_texts("prompts", prompts)
        if not prompts:
            return []
        texts = [render(self.tokenizer, prompt, format, generating=True) for prompt in prompts]
        return self.tokenizer(texts, add_special_tokens=adds_special_tokens(format))["input_ids"]

    def score(
        self,
        prompt: str,
        answers: Sequence[str],
        method: str | Method = "base",
        *,
        format: str = "plain",
        without_context: str | None = None,
    ) -> list[float]:
        """Summed scores of answers to a prompt: log-probabilities for the modes of a model.

        Args:
            prompt: a question (`plain`, `chat`), or a text (`raw`) that each answer continues as it is.
            answers: what to score.
            method: as in `generate`.
            format: as in `generate`.
            without_context: the same prompt without its context, for methods that compare the two.

        Raises:
            UserError: an answer without tokens, a method that the model cannot run, or logits that are not
                finite.
        """
        format = resolve_format(self.tokenizer, format, allow_raw=True)
        _check_texts("prompt", [prompt])
        _check_texts("without_context", [] if without_context is None else [without_context])
        _check_texts("answers", answers)
        for i, answer in enumerate(answers):
            if not answer:
                raise UserError(f"answers {i} is empty: there is nothing to score")
        if not answers:
            return []
        lead, _ = answer_frame(self.tokenizer, format)

        def repeated(prompt: str | None) -> list[str] | None:
            return None if prompt is None else [render(self.tokenizer, prompt, format)] * len(answers)

        group = encode(
            self.tokenizer,
            repeated(prompt),
            [lead + answer for answer in answers],
            add_special_tokens=adds_special_tokens(format),
            without_context=repeated(without_context),
        )
        models, method = self.prepare(method, generating=False)
        ((_, scored),) = score(models, self.config, [group], method, where=lambda _, j: f"answer {j}")
        return [float(np.sum(s, dtype=np.float64)) for s in scored.scores]

    def perplexity(
        self, texts: Sequence[str], method: str | Method = "base", *, window: int | None = None
    ) -> list[float]:
        """Perplexity of every text: exp of the mean negative log-probability of its tokens.

        The first token is only context. A text longer than a window goes in windows that overlap by half.
        Attention takes memory with the square of a window.

        Args:
            texts: as they are; a tokenizer that adds BOS adds it.
            method: as in `generate`; one whose scores are log-probabilities.
            window: tokens; default: 2048, or the model's context where that is less.

        Raises:
            UserError: a text of fewer than two tokens, a window over the context, or a method whose scores
                are no log-probabilities.
        """
        _check_texts("texts", texts)
        if not texts:
            return []
        models, method = self.prepare(method, generating=False)
        if not method.normalized:
            raise UserError(
                f"perplexity of {method.name}: its scores are no log-probabilities; give it renormalize=true"
            )
        context = models.max_positions
        window = min(WINDOW, context) if window is None else window
        if window > context:
            raise UserError(f"window {window} exceeds the model's context of {context}")
        groups = [windows(ids, window) for ids in self.tokenizer(list(texts))["input_ids"]]
        means = [0.0] * len(groups)
        for i, scored in score(models, self.config, groups, method, where=lambda i, _: f"text {i}"):
            means[i] = np.concatenate(scored.scores).mean(dtype=np.float64)
        return np.exp(-np.asarray(means)).tolist()


def text_so_far(
    tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], stop: Sequence[str], *, finished: bool
) -> tuple[str, bool]:
    """The text of new tokens up to a stop string, as far as no further token changes it.

    Args:
        tokenizer: tokenizer of the model.
        prompt, new: token ids.
        stop: strings that end a text; the one that is complete first counts.
        finished: whether no token follows.

    Returns:
        The text, and whether a stop string ended it.
    """
    text = tokenizer.continuation(prompt, new, finished=finished)
    ends = [(text.find(string) + len(string), text.find(string)) for string in stop if string in text]
    if ends:
        return text[: min(ends)[1]], True
    if not finished:
        # The end may be the beginning of a stop string.
        held_back = max(map(len, stop), default=1) - 1
        text = text[: max(len(text) - held_back, 0)]
    return text, False


def tokens_of(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], text: str
) -> tuple[int, ...]:
    """The fewest tokens behind a prompt, of those given, that hold the beginning `text` of their text."""
    count = bisect.bisect_left(
        range(len(tokens) + 1),
        len(text),
        key=lambda n: len(tokenizer.continuation(prompt, tokens[:n], finished=True)),
    )
    return tuple(tokens[:count])


def special_stops(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    """Ids of the stop strings that are special tokens.

    Raises:
        UserError: a stop string that is empty, or that no text can contain.
    """
    _check_texts("stop", stop)
    if not all(stop):
        raise UserError("a stop string is empty: leave it out")
    special = tokenizer.special_ids
    for string in stop:
        part = next((token for token in special if token in string and string not in special), None)
        if part is not None:
            raise UserError(
                f"the stop string {string!r} contains the special token {part!r}, which is in no text: give "
                "the token alone"
            )
    return {special[string] for string in stop if string in special}


def _check_texts(name: str, texts: Sequence[str]) -> None:
    """Refuses one text, which is a sequence of texts too, and what no tokenizer takes."""
    if isinstance(texts, str):
        raise UserError(f"{name} is one text: give a list of texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{name} {i} is no text but {text!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name} {i} holds half of a character (a lone surrogate)") from error
