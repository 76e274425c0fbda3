"""Prompts with their continuations as tokens: what is scored and trained on."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from imae_jax.errors import UserError
from imae_jax.tokenizer import Tokenizer

CONFIDENCE = ("entropy", "max_probability", "margin")
"""How sure a distribution is: entropy in nats, the largest probability, that less the second one."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A token sequence of which the part from `start` on is scored.

    Attributes:
        tokens: prompt and continuation, tokenized together.
        start: number of the prompt's own tokens.
        boundary_merged: the last token(s) of the prompt merged with the continuation's first, so that
            `tokens[:start]` is not what the prompt alone gives.
        other_prompts: tokens of the prompts 1, 2, … of `Stream.prompt`, which the same tokens follow.
    """

    tokens: tuple[int, ...]
    start: int
    boundary_merged: bool = False
    other_prompts: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        if not 1 <= self.start < len(self.tokens):
            raise UserError(
                f"a continuation with start {self.start} of {len(self.tokens)} tokens: at least one token "
                "before it and one to score are needed"
            )

    def behind(self, prompt: int) -> "Continuation":
        """The same tokens behind the prompt of that number; see `Stream.prompt`."""
        if prompt == 0:
            return self
        tokens = self.other_prompts[prompt - 1]
        return Continuation(tokens + self.tokens[self.start :], len(tokens))


def encode(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    continuations: Sequence[str],
    *,
    add_special_tokens: bool = True,
    count: Literal["prompt", "continuation"] = "prompt",
    without_context: Sequence[str] | None = None,
) -> list[Continuation]:
    """Tokenizes every prompt together with its continuation.

    Args:
        tokenizer: tokenizer of the model.
        prompts, continuations: texts of equal length.
        add_special_tokens: whether the tokenizer may add its own (BOS); off for chat templates, which
            hold them already.
        count: which of the two is tokenized alone, to count where the scored part begins: after the
            prompt's own number of tokens, or the continuation's own number before the end.
        without_context: the prompts without their contexts, for methods that compare the two.

    Raises:
        UserError: a continuation adds no token to its prompt, or other ones without a context.
    """
    if without_context is not None:
        options = {"add_special_tokens": add_special_tokens, "count": count}
        pairs = zip(
            encode(tokenizer, prompts, continuations, **options),
            encode(tokenizer, without_context, continuations, **options),
            strict=True,
        )
        return [_with_other_prompt(*pair, text) for text, pair in zip(continuations, pairs, strict=True)]
    texts = [p + c for p, c in zip(prompts, continuations, strict=True)]
    counted = prompts if count == "prompt" else continuations
    unique = list(dict.fromkeys(counted))
    alone = tokenizer(unique, add_special_tokens=add_special_tokens)["input_ids"]
    alone = dict(zip(unique, alone, strict=True))
    together = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    encoded = []
    for text, continuation, tokens in zip(counted, continuations, together, strict=True):
        own = alone[text]
        start = len(own) if count == "prompt" else len(tokens) - len(own)
        if start <= 0:
            raise UserError("a prompt without tokens: give a prompt, or a tokenizer that adds BOS")
        if len(tokens) <= start:
            raise UserError(f"the continuation {continuation!r} has no tokens of its own: give another")
        merged = own != (tokens[:start] if count == "prompt" else tokens[start:])
        encoded.append(Continuation(tuple(tokens), start, merged))
    return encoded


def _with_other_prompt(item: Continuation, other: Continuation, text: str) -> Continuation:
    if item.tokens[item.start :] != other.tokens[other.start :]:
        raise UserError(
            f"the continuation {text!r} has other tokens behind the prompt without its context: let both "
            "prompts end alike"
        )
    return dataclasses.replace(item, other_prompts=(other.tokens[: other.start],))


def windows(tokens: Sequence[int], length: int) -> list[Continuation]:
    """Windows of a text that overlap by half: every token but the text's first is scored once.

    All but the first window's tokens have at least `length // 2` tokens before them.

    Raises:
        UserError: fewer than two tokens, or windows of less than two.
    """
    if len(tokens) < 2 or length < 2:
        raise UserError(f"a text of {len(tokens)} tokens in windows of {length}: both need at least two")
    stride, scored, continuations = length // 2, 1, []
    for start in range(0, len(tokens), stride):
        window = tuple(tokens[start : start + length])
        if start + len(window) > scored:
            continuations.append(Continuation(window, scored - start))
            scored = start + len(window)
    return continuations
