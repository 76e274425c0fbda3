"""Ids, text, chat templates and exports, against `tokenizers`, transformers and SentencePiece."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from conftest import TINY, run_python, user_error, word_tokenizer
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert import edit_json
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from imae_jax.convert import hf_tokenizer
from imae_jax.convert.gguf_tokenizer import PATTERNS, end_token_ids
from imae_jax.convert.gguf_tokenizer import read_tokenizer as read_gguf
from imae_jax.convert.hf_tokenizer import read_tokenizer, write_tokenizer
from imae_jax.language_model import BaseReference, LanguageModel, text_so_far
from imae_jax.llama import Llama
from imae_jax.tokenizer import Tokenizer

CORPUS = """\
Who wrote Hamlet? William Shakespeare wrote Hamlet in London. I don't know, it's said he didn't.
That is all , isn't it ? yes !  Two  blanks, 1969 and 12345; "quotes" – naïve café, Москва, 東京 😀
    def fib(n):  # indented
        return n if n < 2 else fib(n - 1) + fib(n - 2)
"""
TEXTS = [
    *CORPUS.splitlines(),
    CORPUS,
    "",
    " ",
    "  two",
    "tab\tline\n\n\nbreaks\r\n",
    "<s>Who</s> wrote<s>",
    "e\u0301 \u200b\u3000 ﬁ",
]
any_text = st.text(st.one_of(st.sampled_from(" \n'<s>/▁éa1東"), st.characters(codec="utf-8")), max_size=20)
# `tmp_path_factory` and fixtures of the module are shared by all examples.
examples = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def byte_level(post_processor=None) -> tokenizers.Tokenizer:
    """As Llama 3, Qwen2 and DeepSeek have: ids 0 to 2 are special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return tokenizer


def byte_fallback(post_processor=None) -> tokenizers.Tokenizer:
    """As Llama 2's tokenizer.json: SentencePiece's spaces, and bytes for unknown characters."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted(set("▁" + CORPUS.replace(" ", "▁")) - set("東京😀\n"))
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *letters, "▁W", "▁▁", "it"])
    }
    merges = [("▁", "W"), ("▁", "▁"), ("i", "t")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return tokenizer


KINDS = {"byte level": byte_level, "byte fallback": byte_fallback}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def adding(*parts: str) -> processors.TemplateProcessing:
    ids = {"<s>": 1, "</s>": 2}
    used = [(part, ids[part]) for part in dict.fromkeys(parts) if part in ids]
    return processors.TemplateProcessing(single=list(parts), pair=[*parts, "$B"], special_tokens=used)


PROCESSORS = {
    "none": None,
    "byte level alone": processors.ByteLevel(trim_offsets=False),
    "BOS": adding("<s>", "$A"),
    "BOS and EOS": adding("<s>", "$A", "</s>"),
    "byte level, then BOS": processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), adding("<s>", "$A")]
    ),
    "BOS in a sequence of sequences": processors.Sequence([processors.Sequence([adding("<s>", "$A")])]),
    "BOS and EOS as RoBERTa's": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    "BOS and EOS as BERT's": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
}


def write(directory: Path, backend: tokenizers.Tokenizer, **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def in_transformers(directory: Path, **options):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, **options)


# Flags


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("add_bos", [True, False, None, "absent"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_checkpoints_flag_decides_about_bos(tmp_path, processor, add_bos, tokenizer_class):
    """Whatever the class is that transformers would make of it; and never twice."""
    flags = {} if add_bos == "absent" else {"add_bos_token": add_bos}
    backend = byte_level(PROCESSORS[processor])
    directory = write(tmp_path, backend, tokenizer_class=tokenizer_class, **SPECIAL, **flags)
    ids = read_tokenizer(directory)("Who wrote it?")["input_ids"]
    wanted = "BOS" in processor if add_bos in (None, "absent") else add_bos
    plain = backend.encode("Who wrote it?", add_special_tokens=False).ids
    assert ids == [1] * wanted + plain + [2] * ("EOS" in processor)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("add_eos", [True, False])
def test_the_checkpoints_flag_decides_about_eos(tmp_path, processor, add_eos):
    tokenizer = read_tokenizer(
        write(tmp_path, byte_level(PROCESSORS[processor]), **SPECIAL, add_eos_token=add_eos)
    )
    ids, plain = (tokenizer("Who?", add_special_tokens=special)["input_ids"] for special in (True, False))
    assert ids == [1] * ("BOS" in processor) + plain + [2] * add_eos


def test_flags_beside_two_templates_are_refused(tmp_path):
    twice = processors.Sequence([adding("<s>", "$A"), adding("$A", "</s>")])
    with user_error(tmp_path, "post-processor", "add_bos_token"):
        read_tokenizer(write(tmp_path, byte_level(twice), **SPECIAL, add_bos_token=True))


def test_llama_2_reads_the_same_ids_whatever_its_class(tmp_path):
    """transformers 5 builds that class's own pre-tokenizer in the place of what tokenizer.json says."""
    backend = byte_fallback(adding("<s>", "$A"))
    write(tmp_path, backend, tokenizer_class="LlamaTokenizer", add_bos_token=True, legacy=False, **SPECIAL)
    ours = read_tokenizer(tmp_path)
    assert ours(TEXTS)["input_ids"] == [encoding.ids for encoding in backend.encode_batch(TEXTS)]


@pytest.mark.parametrize("form", ["text", "object", "map"])
def test_special_tokens_as_text_as_objects_and_in_a_file_of_their_own(tmp_path, form):
    tokens = SPECIAL if form == "text" else {name: {"content": text} for name, text in SPECIAL.items()}
    write(tmp_path, byte_level(), pad_token=None, **({} if form == "map" else tokens))
    if form == "map":
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.special_tokens == SPECIAL
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.decode([1, 2], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    "declared", [{}, {"added_tokens_decoder": {"2": {"content": "</s>", "special": True}}}]
)
@pytest.mark.parametrize("in_map", [{}, {"eos_token": "<s>"}, {"eos_token": {"content": "<s>"}}])
@pytest.mark.parametrize("in_config", [{}, {"eos_token": None}, {"eos_token": "</s>"}])
def test_tokens_named_in_two_files_are_those_of_transformers(tmp_path, declared, in_map, in_config):
    write(tmp_path, byte_level(), tokenizer_class="PreTrainedTokenizerFast", **declared, **in_config)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(in_map))
    assert read_tokenizer(tmp_path).eos_token == in_transformers(tmp_path).eos_token


def test_a_null_names_no_token_and_erases_none(tmp_path):
    """In transformers it erases the config's."""
    backend = byte_level()
    backend.add_tokens(["<a>", "<b>"])
    write(tmp_path, backend, **SPECIAL, additional_special_tokens=["<a>"])
    more = dict.fromkeys(SPECIAL) | {"additional_special_tokens": ["<b>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(more))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.special_tokens == SPECIAL
    assert tokenizer.decode(tokenizer("<a>so<b>")["input_ids"], skip_special_tokens=True) == "so"


def test_added_tokens_that_only_the_config_has(tmp_path):
    added = {
        "380": {"content": "<|user|>", "special": True, "normalized": False},
        "381": {"content": "<think>", "special": False, "normalized": False},
    }
    write(tmp_path, byte_level(), added_tokens_decoder=added, **SPECIAL)
    ours, theirs = read_tokenizer(tmp_path), in_transformers(tmp_path)
    texts = ["a<|user|>b", "x <think> y"]
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert 380 in ours(texts[0])["input_ids"]
    assert ours.decode([380, 381], skip_special_tokens=True) == "<think>"
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={"400": added["380"]})
    with user_error("'<|user|>'", "id 400", "id 380"):
        read_tokenizer(tmp_path)


def test_a_named_special_token_is_special(tmp_path):
    """Also where tokenizer.json has it as an ordinary one."""
    backend = byte_level()
    backend.add_tokens([AddedToken("<|end|>", special=False, normalized=False)])
    tokenizer = read_tokenizer(write(tmp_path, backend, bos_token="<s>", eos_token="<|end|>"))
    assert tokenizer.decode(tokenizer("so<|end|>")["input_ids"], skip_special_tokens=True) == "so"


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=40)
    long, short = read_tokenizer(write(tmp_path, backend, **SPECIAL))(["Who wrote Hamlet?" * 9, "a"])[
        "input_ids"
    ]
    assert len(long) > 4
    assert len(short) == 1


@pytest.mark.parametrize("flag", [True, False, None])
def test_blanks_before_punctuation_are_cleaned_up_where_the_checkpoint_asks(tmp_path, flag):
    tokenizer = read_tokenizer(write(tmp_path, byte_level(), clean_up_tokenization_spaces=flag, **SPECIAL))
    text = "That is all , is n't it ? yes ! he 's"
    expected = "That is all, isn't it? yes! he's" if flag else text
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == expected
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_of_any_text_equal_transformers(tmp_path_factory, kind):
    directory = write(
        tmp_path_factory.mktemp("any"),
        KINDS[kind](adding("<s>", "$A")),
        tokenizer_class="PreTrainedTokenizerFast",
        **SPECIAL,
    )
    ours, theirs = read_tokenizer(directory), in_transformers(directory)

    @examples
    @given(text=any_text, ids=st.lists(st.integers(0, len(ours) - 1), max_size=12))
    def check(text, ids):
        for special in (True, False):
            encoded = ours(text, add_special_tokens=special)["input_ids"]
            assert encoded == theirs(text, add_special_tokens=special)["input_ids"]
        for tokens in (encoded, ids):
            for skip in (True, False):
                assert ours.decode(tokens, skip) == theirs.decode(tokens, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no tokenizer", "--tokenizer DIRECTORY"]),
        ("{", ["cannot be loaded", "--tokenizer DIRECTORY"]),
        ("{}", ["cannot be loaded", "--tokenizer DIRECTORY"]),
        ('{"version": "1.0", "model": {"type": "Unheard"}}', ["cannot be loaded"]),
    ],
)
def test_damaged_tokenizers_are_refused(tmp_path, content, parts):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with user_error(str(tmp_path), *parts):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("tokenizer_config.json", {"bos_token": ["<s>"]}, ["bos_token", "a token"]),
        ("tokenizer_config.json", {"bos_token": {"text": "<s>"}}, ["bos_token", "a token"]),
        ("tokenizer_config.json", {"add_bos_token": "true"}, ["add_bos_token", "true or false"]),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "<x>"}}},
            ["'x'", "by their ids"],
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "<x>"}}, ["'1'", "by their ids"]),
        ("tokenizer_config.json", {"chat_template": [{"template": "x"}]}, ["chat templates", "a text"]),
        (
            "special_tokens_map.json",
            {"additional_special_tokens": ["<x>", 3]},
            ["1 of additional", "a token"],
        ),
        ("added_tokens.json", {"<x>": "5"}, ["<x>", "an integer"]),
    ],
)
def test_values_of_other_kinds_beside_a_tokenizer_are_named(tmp_path, file, content, parts):
    write(tmp_path, byte_level(), **SPECIAL)
    edit_json(tmp_path / file, **content)
    with user_error(tmp_path / file, *parts):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("step", ["_set_ends", "_make_special", "_chat_templates"])
def test_a_fault_of_ours_is_no_damaged_tokenizer(tmp_path, monkeypatch, step):
    def fault(*_):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(hf_tokenizer, step, fault)
    with pytest.raises(KeyError, match="a fault of ours"):
        read_tokenizer(write(tmp_path, byte_level(), **SPECIAL))


def test_no_command_imports_transformers(tmp_path):
    write_tokenizer(word_tokenizer(9, "{{ messages[0].content }}"), tmp_path)
    code = (
        "import sys, pathlib; import imae_jax.convert, imae_jax.generate, imae_jax.train.stages\n"
        "import imae_jax.evaluate.truthfulqa, imae_jax.evaluate.inspector.excerpts\n"
        "from imae_jax.convert.hf_tokenizer import read_tokenizer\n"
        f"t = read_tokenizer(pathlib.Path({str(tmp_path)!r}))\n"
        "t.apply_chat_template([{'role': 'user', 'content': 't3'}])\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules"
    )
    run = run_python(["-c", code], tmp_path)
    assert run.returncode == 0, run.stderr


# Exports


def exported_kinds(tmp_path: Path) -> dict[str, Tokenizer]:
    bos = adding("<s>", "$A")
    template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    deepseek = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False}
    llama2 = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    prefixed = byte_level(bos)
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    added = {"380": {"content": "<|x|>", "special": True, "normalized": False}}
    directories = {
        "Llama 3": write(tmp_path / "3", byte_level(bos), chat_template=template, **SPECIAL),
        "Llama 2": write(tmp_path / "2", byte_fallback(bos), **llama2, **SPECIAL),
        "BOS by a flag": write(
            tmp_path / "d", byte_level(PROCESSORS["byte level alone"]), **deepseek, **SPECIAL
        ),
        "no BOS by a flag": write(tmp_path / "n", byte_level(bos), add_bos_token=False, **SPECIAL),
        "a space before": write(tmp_path / "p", prefixed, **SPECIAL),
        "tokens of the config": write(tmp_path / "a", byte_level(), added_tokens_decoder=added, **SPECIAL),
    }
    kinds = {name: read_tokenizer(directory) for name, directory in directories.items()}
    return kinds | {"GGUF": gguf_sentencepiece(), "GGUF, byte level": gguf_byte_level("llama-bpe")}


def test_exported_tokenizers_read_the_same_in_transformers(tmp_path):
    for number, (name, tokenizer) in enumerate(exported_kinds(tmp_path).items()):
        directory = tmp_path / f"out{number}"
        directory.mkdir()
        write_tokenizer(tokenizer, directory)
        for again in (read_tokenizer(directory), in_transformers(directory)):
            ids = tokenizer(TEXTS)["input_ids"]
            assert again(TEXTS)["input_ids"] == ids, name
            for skip in (True, False):
                texts = [tokenizer.decode(tokens, skip) for tokens in ids]
                assert [again.decode(i, skip_special_tokens=skip) for i in ids] == texts, name
            assert again.chat_template == tokenizer.chat_template
            assert again.bos_token_id == tokenizer.bos_token_id
            assert again.eos_token_id == tokenizer.eos_token_id


def test_files_that_say_all_are_copied_as_they_are(tmp_path):
    source = write(tmp_path / "source", byte_level(adding("<s>", "$A")), add_bos_token=True, **SPECIAL)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "special_tokens_map.json").write_text(json.dumps(SPECIAL))
    (source / "tokenizer.model").write_bytes(b"not read beside tokenizer.json")
    (tmp_path / "out").mkdir()
    write_tokenizer(read_tokenizer(source), tmp_path / "out")
    for path in source.rglob("*"):
        if path.is_file() and path.name != "tokenizer_config.json":
            assert (tmp_path / "out" / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert in_transformers(tmp_path / "out").get_chat_template() == "{{ messages[0].content }}"


# Chat templates


def test_where_chat_templates_lie(tmp_path):
    def found(**config):
        edit_json(tmp_path / "tokenizer_config.json", **config)
        return read_tokenizer(tmp_path).chat_templates

    write(tmp_path, byte_level(), **SPECIAL)
    assert found() == {}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "OLD"}))
    assert found() == {"default": "OLD"}
    assert found(chat_template="CONFIG") == {"default": "CONFIG"}
    named = [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
    assert found(chat_template=named) == {"default": "A", "rag": "B"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    (tmp_path / "chat_template.jinja").write_text("FILE")
    assert found() == {"default": "FILE", "rag": "B", "tool_use": "TOOLS"}


# The essence of templates in the wild.
TEMPLATES = {
    "Llama 2": """\
{% if messages[0]['role'] == 'system' %}{% set rest, system = messages[1:], messages[0]['content'] %}
{%- else %}{% set rest, system = messages, false %}{% endif %}
{%- for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate') }}{% endif %}
{%- set text = m['content'] %}
{%- if loop.index0 == 0 and system != false %}
{%- set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}{% endif %}
{%- if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "Llama 3.1": """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "<|h|>system<|/h|>\\n\\n" }}
{%- if tools is not none %}
    {{- tools | tojson(indent=4) }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|h|>' + message['role'] + '<|/h|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|h|>assistant<|/h|>\\n\\n' }}
{%- endif %}
""",
    "Qwen 3": """\
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == "assistant" and loop.index0 > ns.last %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
        {{- message.content.lstrip('\\n') }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "Mistral": """\
{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}""",
    "Gemma": """\
{{ bos_token }}
{%- for message in messages %}
    {%- set role = "model" if message["role"] == "assistant" else message["role"] %}
{{ '<start_of_turn>' + role }}
{{ message['content'] | trim }}{{ '<end_of_turn>
' }}
{%- endfor %}
    {% if add_generation_prompt %}
{{'<start_of_turn>model
'}}
    {% endif %}
""",
    "SmolLM 2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "marked": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m | tojson }}\n{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    from transformers import PreTrainedTokenizerFast

    template, backend = TEMPLATES[name], byte_level()
    ours = Tokenizer(backend, SPECIAL, {"default": template})
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **SPECIAL)
    user, answer = (
        {"role": "user", "content": " Hi <b>'there'</b>\n"},
        {"role": "assistant", "content": "So. 東京 "},
    )
    conversations = [
        [user],
        [user, answer],
        [user, answer, user],
        [{"role": "system", "content": "Be brief."}, user, answer],
    ]
    for messages in conversations:
        for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
            if name == "Mistral" and messages[0]["role"] == "system":
                with user_error("Only user and assistant roles"):
                    ours.apply_chat_template(messages, tokenize=False, **options)
                continue
            expected = theirs.apply_chat_template(
                messages, tokenize=False, date_string="26 Jul 2024", **options
            )
            assert ours.apply_chat_template(messages, tokenize=False, **options) == expected
            if not options:
                assert ours.apply_chat_template(messages)["input_ids"] == ours(expected, False)["input_ids"]


# SentencePiece


SP_KINDS = {
    "Llama": {},
    "Gemma": {"add_dummy_prefix": False, "user_defined_symbols": ["\n", "\n\n", "<start>"]},
    "normalizing": {
        "normalization_rule_name": "nfkc",
        "remove_extra_whitespaces": True,
        "byte_fallback": False,
        "vocab_size": 130,
    },
    "unigram": {"model_type": "unigram", "vocab_size": 360},
    "across words": {"split_by_whitespace": False, "allow_whitespace_only_pieces": True, "vocab_size": 500},
}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", SP_KINDS)
def test_sentencepiece_models_alone(tmp_path_factory, kind, legacy):
    """Ids are SentencePiece's own."""
    spm = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("model")
    (directory / "corpus.txt").write_text(CORPUS * 5)
    defaults = {
        "model_type": "bpe",
        "vocab_size": 380,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    spm.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "tokenizer"),
        **defaults | SP_KINDS[kind],
    )
    processor = spm.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    tokenizer = read_tokenizer(directory)
    assert tokenizer.special_tokens == SPECIAL

    @examples
    @given(text=any_text.filter(lambda text: "<s>" not in text and "\0" not in text))
    def check(text):
        ids = processor.encode(text)
        assert tokenizer(text)["input_ids"] == [1, *ids]
        if 0 not in ids:  # SentencePiece writes ⁇ for what it does not know.
            assert tokenizer.decode(ids) == processor.decode(ids)

    check()
    if SP_KINDS[kind].get("add_dummy_prefix", True):
        # A space begins a text, and with `legacy` what follows a special token, too.
        pieces = [tokenizer.convert_ids_to_tokens(i) for i in tokenizer("</s>W</s>")["input_ids"]]
        assert "".join(pieces) == ("<s></s>▁W</s>" if legacy else "<s></s>W</s>")
    (directory / "out").mkdir()
    write_tokenizer(tokenizer, directory / "out")
    theirs = in_transformers(directory / "out")
    assert theirs(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_a_sentencepiece_model_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0b")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentencepiece", None)
        with user_error("tokenizer.model", "pip install 'imae_jax[sentencepiece]'", "--tokenizer DIRECTORY"):
            read_tokenizer(tmp_path)
    pytest.importorskip("sentencepiece")
    for content in (b"IQ== 0\nIg== 1\n", b""):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with user_error("tokenizer.model", "no SentencePiece model"):
            read_tokenizer(tmp_path)


# GGUF


def metadata_of(backend: tokenizers.Tokenizer, **more) -> dict:
    model = json.loads(backend.to_str())["model"]
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [3 if token in special else 6 if token.startswith("<0x") else 1 for token in tokens]
    merges = [" ".join(pair) for pair in model["merges"]]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    values = {"tokens": tokens, "token_type": types, "merges": merges, **ids} | more
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def gguf_tokenizer(metadata: dict, architecture: str = "llama") -> Tokenizer:
    return read_gguf(metadata, "model.gguf", architecture, 64)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"ggml.bos_token_id": "1"}, ["bos_token_id", "an integer"]),
        ({"ggml.add_bos_token": "yes"}, ["add_bos_token", "true or false"]),
        ({"ggml.tokens": ["a", 2]}, ["ggml.tokens", "a list of texts"]),
        ({"ggml.scores": [0.5]}, ["ggml.scores", "1 values"]),
        ({"ggml.token_type": [1, 1]}, ["ggml.token_type", "2 values"]),
        ({"ggml.unknown_token_id": 9999}, ["no token 9999"]),
        ({"ggml.scores": None}, ["no tokenizer.ggml.scores"]),
        ({"chat_template": ["x"]}, ["chat_template", "a text"]),
        ({"chat_templates": ["rag"], "chat_template.rag": 5}, ["chat_template.rag", "a text"]),
    ],
)
def test_gguf_values_of_other_kinds_are_named(change, parts):
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    metadata = {"ggml.model": "llama", "ggml.tokens": tokens, "ggml.scores": [0.0] * 5 + [-1.0]} | change
    with user_error("model.gguf", *parts):
        gguf_tokenizer({f"tokenizer.{name}": value for name, value in metadata.items()})


def gguf_byte_level(pre: str | None, architecture: str = "llama", **more) -> Tokenizer:
    return gguf_tokenizer(metadata_of(byte_level(), model="gpt2", pre=pre, **more), architecture)


def gguf_sentencepiece(**more) -> Tokenizer:
    backend = byte_fallback()
    merged = {"▁W": -1.0, "▁▁": -2.0, "it": -3.0}
    scores = [merged.get(token, -9.0) for token in sorted(backend.get_vocab(), key=backend.token_to_id)]
    return gguf_tokenizer(metadata_of(backend, model="llama", scores=scores, **more))


def test_gguf_sentencepiece_equals_the_tokenizer_json(tmp_path):
    assert gguf_sentencepiece()(TEXTS)["input_ids"] == [
        e.ids for e in byte_fallback(adding("<s>", "$A")).encode_batch(TEXTS)
    ]
    both = gguf_sentencepiece(add_bos_token=False, add_eos_token=True)
    assert both("W")["input_ids"] == [both.convert_tokens_to_ids("▁W"), 2]
    # Gemma's flag.
    without = gguf_sentencepiece(add_space_prefix=False)
    assert without.backend_tokenizer.encode("it is").tokens == ["<s>", "it", "▁", "i", "s"]
    assert without.decode(without(" it")["input_ids"], skip_special_tokens=True) == " it"


@pytest.mark.parametrize("text", ["<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eom_id|>"])
def test_tokens_that_end_a_turn_are_found_by_their_text(text):
    """Whatever type a file gives them."""
    backend = byte_level()
    metadata = metadata_of(backend, model="gpt2", pre="llama-bpe")
    place = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"].append(text)
    metadata["tokenizer.ggml.token_type"].append(1)
    tokenizer = gguf_tokenizer(metadata)
    assert end_token_ids(metadata, tokenizer) == {2, place}
    assert tokenizer(f"a{text}")["input_ids"][-1] == place
    assert tokenizer.decode([place], skip_special_tokens=True) == ""


WORDS = {
    # The digits and letters of a text, as each family cuts them.
    "gpt-2": ["1969", "HamletWho"],
    "smollm": ["1", "9", "6", "9", "HamletWho"],
    "llama-bpe": ["196", "9", "HamletWho"],
    "qwen2": ["1", "9", "6", "9", "HamletWho"],
    "deepseek-r1-qwen": ["1", "9", "6", "9", "HamletWho"],
    "tekken": ["1", "9", "6", "9", "Hamlet", "Who"],
    "deepseek-coder": ["1", "9", "6", "9", "HamletWho"],
    "default": ["196", "9", "HamletWho"],
}


@pytest.mark.parametrize("pre", WORDS)
def test_how_families_cut_text(pre):
    pieces = gguf_byte_level(pre).backend_tokenizer.pre_tokenizer.pre_tokenize_str("1969HamletWho")
    assert [piece for piece, _ in pieces] == WORDS[pre]


@pytest.mark.parametrize("pre", PATTERNS)
def test_any_text_survives_gguf_tokenizers(pre):
    tokenizer = gguf_byte_level(pre, add_bos_token=False)

    @examples
    @given(text=any_text)
    def check(text):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    check()


def test_older_files_do_not_say_how_they_cut_text(caplog):
    def words(tokenizer):
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1969")
        return len(pieces)

    assert words(gguf_byte_level(None, "qwen2")) == 4
    llama3 = metadata_of(byte_level(), model="gpt2", pre="default")
    llama3["tokenizer.ggml.tokens"][1] = "<|begin_of_text|>"
    assert words(gguf_tokenizer(llama3)) == 2
    assert not caplog.records
    gguf_byte_level(None)
    assert "model.gguf" in caplog.text
    assert "--tokenizer DIRECTORY" in caplog.text


def test_several_templates_of_a_gguf():
    metadata = metadata_of(byte_level(), model="gpt2", pre="qwen2")
    metadata["tokenizer.chat_template"] = "A"
    assert gguf_tokenizer(metadata).chat_templates == {"default": "A"}
    metadata |= {"tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "B"}
    assert gguf_tokenizer(metadata).chat_templates == {"default": "A", "rag": "B"}


# Stop strings


@pytest.mark.parametrize("clean_up", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_so_far_is_the_beginning_of_the_whole(kind, clean_up):
    """At every token, for any tokens: so nothing depends on where chunks end, or on streaming."""
    tokenizer = Tokenizer(KINDS[kind](), SPECIAL, clean_up_tokenization_spaces=clean_up)
    first_byte = tokenizer.convert_tokens_to_ids("<0x00>" if kind == "byte fallback" else "!")
    pieces = st.one_of(
        st.sampled_from(
            ["東", "京", "東京", "é", " 's", " n't", " ' ", " '", " .", "a", " ", "  ", "s", "m", "x y"]
        ).map(lambda text: tokenizer(text, False)["input_ids"]),
        st.integers(0, len(tokenizer) - 1).map(lambda i: [i]),
        st.integers(first_byte, min(first_byte + 255, len(tokenizer) - 1)).map(lambda i: [i]),
    )
    rows = st.lists(pieces, max_size=10).map(lambda parts: [i for part in parts for i in part])

    @settings(examples, max_examples=400)
    @given(
        row=rows,
        prompt=st.sampled_from([[1], tokenizer("Who")["input_ids"], tokenizer("東")["input_ids"]]),
        stop=st.lists(
            st.sampled_from(["東京", "京", "'s", " '", "a東", "xx", "y", "é", "\ufffd"]), max_size=3
        ),
    )
    def check(row, prompt, stop):
        whole, stopped = text_so_far(tokenizer, prompt, row, stop, finished=True)
        assert not any(string in whole for string in stop)
        shown = ""
        for n in range(len(row) + 1):
            text, closed = text_so_far(tokenizer, prompt, row[:n], stop, finished=False)
            assert whole.startswith(text)
            assert text.startswith(shown)
            shown = text
            if closed:
                assert stopped
                assert text == whole
                break
        if not stop and not clean_up:
            assert whole == tokenizer.continuation(prompt, row)

    check()


def scripted(chain: list[int], tokenizer: Tokenizer, eos: int) -> LanguageModel:
    """A model that continues `chain[i]` with `chain[i + 1]`, by orthogonal embeddings."""
    assert len({*chain}) == len(chain), "a token repeats"
    V, D = len(tokenizer), 64
    config = dataclasses.replace(
        TINY, vocab_size=V, hidden_size=D, num_layers=1, max_position_embeddings=256, intermediate_size=8
    )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, None, rngs=nnx.Rngs(0), stacked=False)))

    def value(path, leaf):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(leaf.shape, leaf.dtype)
        tokens = {"['embed'].value": chain, "['unembed'].value": chain[1:]}.get(name, [])
        array = jnp.zeros(leaf.shape, leaf.dtype)
        for place, token in enumerate(tokens):
            index = (token, place) if leaf.shape == (V, D) else (place, token)
            array = array.at[index].set(1.0)
        return array

    model = nnx.merge(graphdef, jax.tree.map_with_path(value, state))
    return LanguageModel(model, tokenizer, (eos,), BaseReference("scripted", None, "", "float32"))


LETTERS = "bcdefghijklmnopqrstuvwxyzBCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.mark.parametrize("n", [1, 2, 3, 26, 27, 28, 29, 30, 31, 32, 33])
def test_text_ends_before_a_stop_string_wherever_chunks_end(n):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(["</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    (chain,) = tokenizer([f"a{LETTERS[:n]}東京!"])["input_ids"]
    lm = scripted([*chain, 0], tokenizer, 0)
    for stop in (["東京"], ["京"], ["zz東", "東京"], ["\ufffd", "東京"], ["東京!?", "京!"]):
        expected = LETTERS[:n] + ("東" if stop == ["京"] or "京!" in stop else "")
        options = {"max_new_tokens": 48, "stop": stop}
        assert lm.generate(["a"], **options) == [expected]
        for chunk_size in (1, 4, 5):
            streamed = lm.stream(["a"], chunk_size=chunk_size, **options)
            assert "".join(piece for (piece,) in streamed) == expected
    (completion,) = lm.complete(["a"], max_new_tokens=48)
    assert (completion.text, completion.finished) == (f"{LETTERS[:n]}東京!", True)


def test_a_special_token_as_a_stop_string():
    backend = byte_level()
    backend.add_special_tokens(["<|eot|>"])
    tokenizer = Tokenizer(backend, SPECIAL)
    chain = tokenizer("W<|eot|>H", False)["input_ids"]
    lm = scripted([*chain, 2], tokenizer, 2)
    assert lm.generate(["W"], max_new_tokens=4) == ["H"]
    (completion,) = lm.complete(["W"], max_new_tokens=4, stop=["<|eot|>"])
    assert (completion.text, completion.finished) == ("", True)
    with user_error("'<|eot|>'", "give the token alone"):
        lm.generate(["W"], stop=["\n<|eot|>"])
