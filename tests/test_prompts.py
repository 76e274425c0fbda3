"""Prompt formats: chat templates as they are in the wild."""

import pytest
from conftest import user_error, word_tokenizer

from imae_jax.language_model import LanguageModel
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
def test_what_stands_around_an_answer(tokenizer, name):
    tokenizer.chat_template, frame = TEMPLATES[name]
    assert answer_frame(tokenizer, "chat") == frame
    prompt, (lead, end) = chat_text(tokenizer, "Why?"), frame
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    if name != "user only":
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        assert whole.rstrip("\n") == f"{prompt}{lead}So.{end}"


def test_plain_and_raw_frames(tokenizer):
    assert answer_frame(tokenizer, "plain") == (" ", "</s>")
    assert answer_frame(tokenizer, "raw") == ("", "")


def test_prompts_do_not_change_from_day_to_day(tokenizer):
    """Llama 3's templates ask for today's date unless they are given one."""
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today: {{ date_string }}. {{ messages[0].content }}"
    )
    assert chat_text(tokenizer, "Why?") == "Today: 26 Jul 2024. Why?"


def test_formats(tokenizer):
    assert resolve_format(tokenizer, "auto") == "plain"
    with user_error("no chat template"):
        resolve_format(tokenizer, "chat")
    with user_error("format 'raw' does not exist"):
        resolve_format(tokenizer, "raw")
    with user_error("format 'xml' does not exist", "raw"):
        resolve_format(tokenizer, "xml", allow_raw=True)
    tokenizer.chat_template = TEMPLATES["chatml"][0]
    assert resolve_format(tokenizer, "auto") == "chat"


def test_auto_is_chat_in_every_respect(smollm2):
    """A template holds its special tokens: the tokenizer must add none, whichever name was given."""
    answers = ["William Shakespeare.", "Christopher Marlowe."]
    chat, auto = (smollm2.score("Who wrote Hamlet?", answers, format=f) for f in ("chat", "auto"))
    assert chat == auto
    assert chat[0] > chat[1]


def test_new_text_keeps_its_leading_space(smollm2):
    class Sentencepiece:
        """Drops the first space, as Llama 2's decoder does."""

        def decode(self, ids, skip_special_tokens):
            return "".join(" " + "abc"[i] for i in ids)[1:]

    lm = LanguageModel(smollm2.model, Sentencepiece(), (), smollm2.base)
    assert lm._new_text([0], [1, 2]) == " b c"
