"""Prompt formats: chat templates as they are in the wild."""

import dataclasses

import pytest
from conftest import user_error, word_tokenizer

from imae_jax.prompts import answer_frame, chat_text, resolve_format

TEMPLATES = {
    # ChatML, as SmolLM2 and Qwen2 have it: the turn's end is not the end-of-text token.
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("", "<|im_end|>"),
    ),
    # Llama 2: spaces around the answer.
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        (" ", " </s>"),
    ),
    # Llama 3: trims, ends with its own token.
    "llama3": (
        "{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}",
        ("", "<|eot|>"),
    ),
    # One that shows the user's turns alone: the end-of-text token stands in.
    "user only": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", ("", "</s>")),
}


@pytest.fixture
def tokenizer():
    return word_tokenizer(20)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_stands_around_an_answer(name):
    template, frame = TEMPLATES[name]
    tokenizer = word_tokenizer(20, template)
    assert answer_frame(tokenizer, "chat") == frame
    prompt, (lead, end) = chat_text(tokenizer, "Why?"), frame
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    if name != "user only":
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert whole.rstrip("\n") == f"{prompt}{lead}So.{end}"


def test_plain_and_raw_frames(tokenizer):
    assert answer_frame(tokenizer, "plain") == (" ", "</s>")
    assert answer_frame(tokenizer, "raw") == ("", "")


@pytest.mark.parametrize("generating", [True, False])
@pytest.mark.parametrize("date", ["date_string", "strftime_now('%d %b %Y')"])
def test_prompts_do_not_change_from_day_to_day(date, generating):
    """Llama 3's templates ask for today's date, unless they are given one or in any case."""
    tokenizer = word_tokenizer(20, f"Today: {{{{ {date} }}}}. {{{{ messages[0].content }}}}")
    assert chat_text(tokenizer, "Why?", generating=generating) == "Today: 26 Jul 2024. Why?"


def test_formats(tokenizer):
    assert resolve_format(tokenizer, "auto") == "plain"
    with user_error("no chat template"):
        resolve_format(tokenizer, "chat")
    with user_error("format 'raw' does not exist"):
        resolve_format(tokenizer, "raw")
    with user_error("format 'xml' does not exist", "raw"):
        resolve_format(tokenizer, "xml", allow_raw=True)
    assert resolve_format(word_tokenizer(20, TEMPLATES["chatml"][0]), "auto") == "chat"


def test_auto_is_chat_in_every_respect(smollm2):
    """A template holds its special tokens: the tokenizer must add none, whichever name was given."""
    answers = ["William Shakespeare.", "Christopher Marlowe."]
    chat, auto = (smollm2.score("Who wrote Hamlet?", answers, format=f) for f in ("chat", "auto"))
    assert chat == auto
    assert chat[0] > chat[1]


THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ EMPTY }}{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ OPENED }}{% endif %}"
)


@pytest.mark.parametrize(
    ("opened", "empty", "warned"),
    [("<think>\n", "", True), ("", "<think>\n\n</think>\n\n", False), ("<think>", "<think></think>", False)],
)
def test_given_answers_stand_where_a_conversation_has_them(caplog, opened, empty, warned):
    """A generation prompt may open a block for thinking, or leave it to the model; finished turns differ."""
    template = THINKING.replace("{{ OPENED }}", opened).replace("{{ EMPTY }}", empty)
    tokenizer = word_tokenizer(20, template)
    lead, end = answer_frame(tokenizer, "chat")
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    for _ in range(2):
        assert chat_text(tokenizer, "Why?") + lead + "So." + end == whole
    assert lead == "", "what a template writes before an answer is no part of it"
    assert chat_text(tokenizer, "Why?", generating=True) == f"<|user|>Why?<|assistant|>{opened}"
    assert len(caplog.records) == warned
    assert all("'<think>\\n'" in record.message for record in caplog.records)


BAD_TEMPLATES = {
    "it raises": ("{{ raise_exception('A system message must come first') }}", "A system message must come"),
    "it does not parse": ("{% for m in messages %}{% endif %}", "endif"),
    "an unknown filter": ("{{ messages | fromjson }}", "fromjson"),
    "parts for content": (
        "{% for m in messages %}{% for c in m.content %}{{ c['text'] }}{% endfor %}{% endfor %}",
        "parts",
    ),
    "a fault of Python": ("{{ 1 // 0 }}", "zero"),
    "a way out of the sandbox": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a missing variable": ("{{ documents[0].title }}", "None"),
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
@pytest.mark.parametrize("format", ["auto", "chat"])
def test_templates_that_do_not_work_are_refused(case, format):
    template, part = BAD_TEMPLATES[case]
    with user_error(part, "--format plain"):
        resolve_format(word_tokenizer(20, template), format)


def test_several_templates():
    tokenizer = word_tokenizer(20)
    named = {"rag": "{{ documents[0].title }}", "tool_use": "{{ messages[0].content }}"}
    with user_error("'rag', 'tool_use'", "default", "--format plain"):
        resolve_format(dataclasses.replace(tokenizer, chat_templates=named), "chat")
    named["default"] = "<{{ messages[0].content }}>"
    assert chat_text(dataclasses.replace(tokenizer, chat_templates=named), "Why?") == "<Why?>"
