"""Prompt formats: the one place that turns a question into text."""

from typing import Any

from imae_jax.errors import UserError

FORMATS = ("auto", "chat", "plain")


def resolve_format(tokenizer: Any, format: str) -> str:
    """`chat` or `plain`; `auto` is chat where the tokenizer has a chat template.

    Raises:
        UserError: an unknown format, or `chat` without a template.
    """
    if format not in FORMATS:
        raise UserError(f"prompt format {format!r} does not exist: use {', '.join(FORMATS)}")
    has_template = bool(tokenizer.chat_template)
    if format == "chat" and not has_template:
        raise UserError("the tokenizer has no chat template: use the plain format")
    if format == "auto":
        return "chat" if has_template else "plain"
    return format


def render(tokenizer: Any, text: str, format: str) -> str:
    """The prompt for a question or message: `raw` as it is, `plain` as `Q: …\\nA:`, or `chat`."""
    if format == "raw":
        return text
    if resolve_format(tokenizer, format) == "chat":
        return chat_text(tokenizer, text)
    return question_text(text)


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
    messages = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def answer_lead(tokenizer: Any, format: str) -> str:
    """What stands between a prompt and its answer: a space, or what the chat template puts there."""
    if format == "plain":
        return " "
    answer = "ANSWER"
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    lead, found, _ = whole.removeprefix(chat_text(tokenizer, "Q")).partition(answer)
    return lead if found and not lead.strip() else ""
