"""Prompt formats: the one place that turns a question into text."""

from collections.abc import Sequence
from typing import Any

from imae_jax.errors import UserError

FORMATS = ("auto", "chat", "plain")
"""How a question can be put; a text that is no question can also be `raw`."""

# Llama 3's templates write today's date into the prompt unless they are given one: a score would
# change from day to day. This is the date they fall back to themselves.
TEMPLATE_DATE = "26 Jul 2024"


def resolve_format(tokenizer: Any, format: str, *, allow_raw: bool = False) -> str:
    """`chat`, `plain` or `raw`; `auto` is chat where the tokenizer has a chat template, else plain.

    Raises:
        UserError: an unknown format, or `chat` without a template.
    """
    known = ("raw", *FORMATS) if allow_raw else FORMATS
    if format not in known:
        raise UserError(f"prompt format {format!r} does not exist: use {', '.join(known)}")
    has_template = bool(tokenizer.chat_template)
    if format == "chat" and not has_template:
        raise UserError("the tokenizer has no chat template: use the plain format")
    if format == "auto":
        return "chat" if has_template else "plain"
    return format


def render(tokenizer: Any, text: str, format: str) -> str:
    """The prompt for a question or message in a resolved format."""
    if format == "chat":
        return chat_text(tokenizer, text)
    return question_text(text) if format == "plain" else text


def adds_special_tokens(format: str) -> bool:
    """Whether the tokenizer may add its own (BOS): a chat template holds them already."""
    return format != "chat"


def question_text(question: str) -> str:
    """`Q: …` and the `A:` that its answer follows after a space."""
    return f"Q: {question}\nA:"


def chat_text(tokenizer: Any, message: str) -> str:
    """The chat template with one user message, up to where the answer begins.

    It holds its special tokens: tokenize it with `add_special_tokens=False`.
    """
    return apply_template(tokenizer, [{"role": "user", "content": message}], add_generation_prompt=True)


def answer_frame(tokenizer: Any, format: str) -> tuple[str, str]:
    """What stands around an answer that follows a prompt: before it, and as its end of turn.

    `plain` is a space and the end-of-text token; `chat` what the template puts there; `raw` nothing.
    """
    eos = tokenizer.eos_token or ""
    if format == "raw":
        return "", ""
    if format == "plain":
        return " ", eos
    answer = "ANSWER"
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]
    whole = apply_template(tokenizer, turns)
    lead, found, tail = whole.removeprefix(chat_text(tokenizer, "Q")).partition(answer)
    if not found or lead.strip():
        return "", eos
    # Templates end a turn with a line break that nobody predicts.
    return lead, tail.rstrip("\n") or eos


def apply_template(tokenizer: Any, messages: Sequence[dict[str, str]], **kwargs: Any) -> str:
    """The chat template with messages (`role`, `content`), the same on every day."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, date_string=TEMPLATE_DATE, **kwargs)
