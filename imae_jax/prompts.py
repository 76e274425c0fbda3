"""Prompt formats: the one place that turns a question into text."""

import functools
import logging

from imae_jax.chat_template import ChatTemplateError
from imae_jax.errors import UserError
from imae_jax.tokenizer import Tokenizer

FORMATS = ("auto", "chat", "plain")
"""How a question can be put; a text that is no question can also be `raw`."""

logger = logging.getLogger(__name__)
_QUESTION, _ANSWER = "QUESTION", "ANSWER"


def resolve_format(tokenizer: Tokenizer, format: str, *, allow_raw: bool = False) -> str:
    """`chat`, `plain` or `raw`; `auto` is chat where the tokenizer has a chat template, else plain.

    Raises:
        UserError: an unknown format, or `chat` without a template that works.
    """
    known = ("raw", *FORMATS) if allow_raw else FORMATS
    if format not in known:
        raise UserError(f"prompt format {format!r} does not exist: use {', '.join(known)}")
    if format == "auto":
        format = "chat" if tokenizer.chat_templates else "plain"
    if format == "chat":
        try:
            shown = chat_text(tokenizer, _QUESTION)
        except ChatTemplateError as error:
            raise UserError(f"{error}: use the plain format (--format plain)") from error
        if _QUESTION not in shown:
            raise UserError(
                "the chat template does not write a message's text (it may want a list of parts): use the "
                "plain format (--format plain)"
            )
    return format


def render(tokenizer: Tokenizer, text: str, format: str, *, generating: bool = False) -> str:
    """The prompt for a question or message in a resolved format; see `chat_text` for `generating`."""
    if format == "chat":
        return chat_text(tokenizer, text, generating=generating)
    return question_text(text) if format == "plain" else text


def adds_special_tokens(format: str) -> bool:
    """Whether the tokenizer may add its own (BOS): a chat template holds them already."""
    return format != "chat"


def question_text(question: str) -> str:
    """`Q: …` and the `A:` that its answer follows after a space."""
    return f"Q: {question}\nA:"


def chat_text(tokenizer: Tokenizer, message: str, *, generating: bool = False) -> str:
    """The chat template with one user message, up to where the answer begins.

    It holds its special tokens: tokenize it with `add_special_tokens=False`.

    Args:
        tokenizer: with a chat template.
        message: the user's.
        generating: whether the model writes the answer, after the template's generation prompt. An answer
            that is given stands where the template puts it in a conversation, which differs where the
            generation prompt opens a block for thinking.
    """
    return _opening(tokenizer, message) if generating else _turns(tokenizer, message)[0]


def answer_frame(tokenizer: Tokenizer, format: str) -> tuple[str, str]:
    """What stands around an answer that follows a prompt: before it, and as its end of turn.

    `plain` is a space and the end-of-text token; `chat` what the template puts there; `raw` nothing.
    """
    if format == "raw":
        return "", ""
    if format == "plain":
        return " ", tokenizer.eos_token or ""
    return _turns(tokenizer, _QUESTION)[1:]


def _opening(tokenizer: Tokenizer, message: str) -> str:
    user = {"role": "user", "content": message}
    return tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)


def _turns(tokenizer: Tokenizer, message: str) -> tuple[str, str, str]:
    """A message with its answer, cut into prompt, what is before the answer, and its end of turn."""
    opening, eos = _opening(tokenizer, message), tokenizer.eos_token or ""
    turns = [{"role": "user", "content": message}, {"role": "assistant", "content": _ANSWER}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    before, found, tail = whole.rpartition(_ANSWER)
    if not found:
        return opening, "", eos
    # Templates end a turn with a line break that nobody predicts.
    end = tail.rstrip("\n") or eos
    lead = before.removeprefix(opening)
    if not before.startswith(opening):
        pairs = enumerate(zip(opening, before, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(opening), len(before)))
        _warn(
            "the chat template's generation prompt is no beginning of its conversations: it has "
            f"{opening[shared:]!r} where they have {before[shared:]!r}; answers are scored and trained as "
            "they stand in a conversation"
        )
    if before.startswith(opening) and not lead.strip():
        return opening, lead, end
    return before, "", end


@functools.cache
def _warn(message: str) -> None:
    """Once, not for every prompt."""
    logger.warning(message)
