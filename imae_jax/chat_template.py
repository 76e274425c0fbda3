"""Chat templates: Jinja programs from a checkpoint, rendered in a sandbox, the same on every day."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from imae_jax.errors import UserError, first_line

# Llama 3's templates write today's date into the prompt, as `date_string` or by `strftime_now`: a score would
# change from day to day. This is the date that they fall back to themselves.
DATE = datetime.datetime(2024, 7, 26)
DATE_STRING = DATE.strftime("%d %b %Y")
_TAG = "CONTINUE_HERE"


class ChatTemplateError(UserError):
    """A template that raises, does not parse, or needs what it is not given."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, which marks what an assistant wrote: its text as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **({"ensure_ascii": False} | options))


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    # Jinja's own filter escapes what would be HTML.
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": DATE.strftime}
    return environment.from_string(template)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The text that a template makes of messages (`role`, `content`).

    Args:
        template: Jinja, with what transformers' renderer gives to templates.
        messages: the conversation.
        add_generation_prompt: whether the beginning of the assistant's next turn follows.
        continue_final_message: whether the text ends with the last message, without its end of turn.
        variables: what else the template may ask for.

    Raises:
        ChatTemplateError: with the template's reason.
    """
    messages = [dict(message) for message in messages]
    if continue_final_message:
        messages[-1]["content"] += f"{_TAG} "
    defaults = {"tools": None, "documents": None, "date_string": DATE_STRING}
    try:
        text = _compile(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **(defaults | variables)
        )
    except Exception as error:  # A template is a program: it can fail in any way.
        raise ChatTemplateError(f"the chat template cannot be used ({first_line(error)})") from error
    if continue_final_message:
        text, found, rest = text.rpartition(_TAG)
        if not found:
            raise ChatTemplateError("the chat template does not show the message that is to be continued")
        # A template that trims messages would have trimmed this one's end.
        text = text if rest.startswith(" ") else text.rstrip()
    return text
