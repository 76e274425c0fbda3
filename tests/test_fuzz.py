"""Whatever a model's files hold, reading them gives a model or one clear error.

The examples are fixed and few here; `FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py` draws others and more.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import struct

import gguf
import numpy as np
import pytest
from conftest import TINY, UNIT_SIZE, with_random_units
from helpers.gguf_files import sentencepiece_tokenizer, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.convert import load_model
from imae_jax.convert.gguf import GGUFSource
from imae_jax.convert.hf import SafetensorsSource
from imae_jax.convert.hf_tokenizer import read_tokenizer
from imae_jax.convert.imae_dir import read_config, write_imae_dir
from imae_jax.convert.references import open_model
from imae_jax.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def fuzz(examples):
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def only_user_errors():
    try:
        yield
    except UserError as error:
        assert str(error)


numbers = st.one_of(
    st.integers(-3, 130),
    st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**64, -(2**63), 10**30]),
    st.floats(),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


# Safetensors


sizes = st.one_of(st.integers(0, 9), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64]), values)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F16", "F64", "I64", "BOOL", "F8_E4M3"]), values),
        "shape": st.one_of(st.lists(sizes, max_size=3), values),
        "data_offsets": st.one_of(st.lists(sizes, min_size=2, max_size=2), values),
        "more": values,
    },
)
honest = st.integers(0, 6).map(lambda n: {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]})
headers = st.one_of(
    st.dictionaries(st.text(max_size=8), st.one_of(entries, honest, values), max_size=4).map(json.dumps),
    values.map(json.dumps),
    st.text(max_size=40),
).map(lambda text: text.encode("utf-8", "surrogatepass"))


@fuzz(100)
@given(header=headers, body=st.binary(max_size=64), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_safetensors_headers(tmp_path_factory, header, body, length):
    directory = fresh(tmp_path_factory, "safetensors")
    length = len(header) if length is None else length
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + body)
    with only_user_errors():
        source = SafetensorsSource(directory)
        for name, shape in source.shapes.items():
            array = source.read(name)
            assert array.shape == shape
            assert array.nbytes <= len(body)


def fresh(tmp_path_factory, name):
    """One directory for all examples of a test, emptied."""
    directory = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def test_tensors_that_overlap_or_leave_the_file(tmp_path):
    """What the format's own reader must refuse."""

    def entry(start, end, shape=(1,), dtype="F32"):
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    cases = {
        "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6),
        "a hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
        "behind the end": ({"a": entry(0, 4), "b": entry(4, 8)}, 6),
        "unnamed bytes": ({"a": entry(0, 4)}, 8),
        "shape and offsets differ": ({"a": entry(0, 8)}, 8),
        "backwards": ({"a": entry(4, 0)}, 4),
        "an unknown dtype": ({"a": entry(0, 4, dtype="Q4")}, 4),
    }
    for name, (header, size) in cases.items():
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
        with pytest.raises(UserError, match=r"model\.safetensors"):
            SafetensorsSource(tmp_path)
            pytest.fail(name)


paths = st.one_of(
    st.sampled_from(
        ["../model.safetensors", "/etc/passwd", "..", "", ".", "a/b.safetensors", "nul\0.safetensors"]
    ),
    st.just("\ud800.safetensors"),
    st.just("x" * 300 + ".safetensors"),
    st.just("part.safetensors"),
    values,
)


@fuzz(100)
@given(index=st.one_of(values, st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(), paths)})))
def test_indices(tmp_path_factory, index):
    directory = fresh(tmp_path_factory, "index")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with only_user_errors():
        SafetensorsSource(directory)
        pytest.fail("there is no file to read")


# Configs


@pytest.fixture(scope="module")
def base(tiny):
    return tiny().load()


FIELDS = [*TINY.to_hf(), "hidden_act", "partial_rotary_factor", "use_sliding_window", "eos_token_id", "imae"]
ROPE_FIELDS = ["rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"]
ropes = st.dictionaries(
    st.sampled_from([*ROPE_FIELDS, "original_max_position_embeddings", "partial_rotary_factor"]),
    st.one_of(st.sampled_from(["linear", "dynamic", "llama3", "default"]), values),
)
changes = st.dictionaries(st.sampled_from(FIELDS), st.one_of(numbers, values, ropes), min_size=1, max_size=3)


@fuzz(200)
@given(changes=changes)
def test_model_configs(changes):
    with only_user_errors():
        config = LlamaConfig.from_hf(TINY.to_hf() | changes)
        assert config.context_length >= 1
        hash(config)


@fuzz(60)
@given(changes=st.one_of(values, changes, st.fixed_dictionaries({"model_type": st.just("imae_llama")})))
def test_checkpoints_with_other_configs(tiny, base, tmp_path_factory, changes):
    """Opened only: a config that fits its tensors is one that loads."""
    directory = fresh(tmp_path_factory, "config")
    for path in tiny().directory.iterdir():
        (directory / path.name).symlink_to(path)
    changed = changes
    if isinstance(changes, dict):
        changed = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(changed))
    with only_user_errors():
        opened = open_model(str(directory))
        for loaded in (opened.config, opened.eos_token_ids(base.tokenizer)):
            hash(loaded)
        from imae_jax.convert.hf import check_tensors
        from imae_jax.convert.table import base_rows

        check_tensors(base_rows(opened.config), opened.config, opened.source, opened.num_source_layers)


sections = st.one_of(
    values,
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("reference", "revision", "fingerprint", "dtype"), values)
    ),
    st.fixed_dictionaries({"intermediate_size": values}),
)


@fuzz(50)
@given(
    changes=st.dictionaries(st.sampled_from(["format_version", "base", "anti_expert"]), sections, min_size=1)
)
def test_imae_configs(base, tmp_path_factory, changes):
    directory = fresh(tmp_path_factory, "imae")
    weights, unit_config = with_random_units(base.model.weights(), TINY), AntiExpertConfig(UNIT_SIZE)
    write_imae_dir(
        directory / "imae", weights, TINY, unit_config, base=dataclasses.asdict(base.base), training={}
    )
    path = directory / "imae" / "imae_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with only_user_errors():
        imae = read_config(directory / "imae")
        assert isinstance(imae["anti_expert"]["intermediate_size"], int)
        load_model(str(directory / "imae"))


# Tokenizers

names = st.sampled_from(["<s>", "</s>", "t5", "", "\ud800"])
fields = ["content", "special", "normalized", "lstrip"]
tokens = st.one_of(
    names, values, st.dictionaries(st.sampled_from(fields), st.one_of(st.booleans(), names, values))
)
many = st.one_of(
    st.lists(tokens, max_size=3), st.dictionaries(st.text(max_size=2), tokens, max_size=2), values
)
by_id = st.dictionaries(st.sampled_from(["5", "97", "98", "-1", "x", "²"]), tokens, max_size=3)
template = st.one_of(values, st.lists(st.dictionaries(st.sampled_from(["name", "template"]), values)))
tokenizer_configs = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), tokens),
        **dict.fromkeys(("add_bos_token", "add_eos_token", "legacy", "split_special_tokens"), values),
        **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), many),
        "added_tokens_decoder": st.one_of(by_id, values),
        "clean_up_tokenization_spaces": values,
        "chat_template": template,
    },
)
post_processors = st.sampled_from(
    [
        None,
        {"type": "RobertaProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]},
        {"type": "BertProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "Sequence", "processors": [{"type": "Sequence", "processors": []}]},
        {"type": "Unheard"},
    ]
)


@fuzz(150)
@given(
    config=st.one_of(tokenizer_configs, values),
    special=st.one_of(tokenizer_configs, values),
    added=st.one_of(st.dictionaries(names, st.integers(-1, 99)), values),
    post_processor=post_processors,
)
def test_tokenizers_with_other_files_beside_them(
    tiny, tmp_path_factory, config, special, added, post_processor
):
    directory = fresh(tmp_path_factory, "tokenizer")
    whole = json.loads((tiny().directory / "tokenizer.json").read_text()) | {"post_processor": post_processor}
    contents = {"tokenizer": whole, "tokenizer_config": config, "special_tokens_map": special}
    for name, content in (contents | {"added_tokens": added}).items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    with only_user_errors():
        tokenizer = read_tokenizer(directory)
        assert all(type(i) is int for i in tokenizer("t5 t6")["input_ids"])
        assert all(isinstance(text, str) for text in tokenizer.chat_templates.values())


@pytest.fixture(scope="module")
def valid_sentencepiece(tmp_path_factory):
    model = pytest.importorskip("sentencepiece").SentencePieceTrainer
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "corpus.txt").write_text("Who wrote Hamlet? Someone who wrote a lot.\n" * 50)
    model.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=40,
        minloglevel=2,
    )
    return (directory / "tokenizer.model").read_bytes()


@fuzz(100)
@given(data=st.data())
def test_sentencepiece_models(valid_sentencepiece, tmp_path_factory, data):
    changed = bytearray(valid_sentencepiece)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(changed)))
        new = data.draw(st.binary(min_size=1, max_size=4))
        changed[place : place + len(new)] = new
    directory = fresh(tmp_path_factory, "sentencepiece")
    (directory / "tokenizer.model").write_bytes(changed)
    with only_user_errors():
        read_tokenizer(directory)("Who wrote it?")


# GGUF


@pytest.fixture(scope="module")
def valid_gguf(tiny, tmp_path_factory):
    metadata = sentencepiece_tokenizer()
    hf = tiny("tied", vocab_size=len(metadata["token_list"])).hf
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", hf, metadata).read_bytes()


@fuzz(100)
@given(data=st.data())
def test_gguf_files(valid_gguf, tmp_path_factory, data):
    """A valid file with some bytes of its metadata changed, or cut."""
    changed = bytearray(valid_gguf)
    # The metadata come first: header and sizes, then the tokenizer.
    places = st.one_of(st.integers(0, 700), st.integers(0, 20_000))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(places)
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8), st.just(bytes(8))))
        changed[place : place + len(new)] = new
    if data.draw(st.booleans()):
        changed = changed[: data.draw(st.integers(0, len(changed)))]
    path = fresh(tmp_path_factory, "gguf") / "model.gguf"
    path.write_bytes(changed)
    with only_user_errors():
        source = GGUFSource(path)
        source.end_token_ids(source.tokenizer())
        for name, shape in source.shapes.items():
            array = source.read(name)
            assert array.shape == shape
            assert array.nbytes <= 8 * len(valid_gguf)


DEFAULTS = {
    **{f"llama.{name}": 4 for name in ("block_count", "attention.head_count", "attention.head_count_kv")},
    **{f"llama.{name}": 8 for name in ("embedding_length", "feed_forward_length", "context_length")},
    "llama.attention.key_length": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 1.0,
    "llama.rope.dimension_count": 2,
    "llama.attention.sliding_window": 0,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "a", "b", "ab"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -1.0],
    "tokenizer.ggml.token_type": [2, 3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}
scalars = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-2, 9),
    st.floats(width=32),
    st.booleans(),
    st.sampled_from(["gpt2", "llama", "linear", "yarn", "ab"]),
    st.text(st.characters(codec="utf-8"), max_size=5),
)
lists = st.one_of(
    st.lists(st.integers(-2, 9), min_size=1, max_size=6),
    st.lists(st.text(st.characters(codec="utf-8"), max_size=3), min_size=1, max_size=6),
)


@fuzz(120)
@given(metadata=st.dictionaries(st.sampled_from([*DEFAULTS]), st.one_of(scalars, lists), max_size=3))
def test_gguf_metadata(tmp_path_factory, metadata):
    """Values of any kind under the names that are read."""
    path = fresh(tmp_path_factory, "metadata") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (DEFAULTS | metadata).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for name in ("token_embd.weight", *"abcd"):
        writer.add_tensor(name, np.zeros((5, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with only_user_errors():
        source = GGUFSource(path)
        hash(source.config)
        tokenizer = source.tokenizer()
        assert all(isinstance(i, int) for i in source.end_token_ids(tokenizer))
        assert tokenizer("a b").keys() >= {"input_ids"}
    if not metadata:
        assert GGUFSource(path).tokenizer().decode([4]) == "ab"
