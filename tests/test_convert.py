"""Weights and tokenizers in and out: HuggingFace, GGUF, IMAE directories, and what is refused."""

import csv
import dataclasses
import json
import shutil
import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import (
    KINDS,
    SMOLLM2,
    TINY,
    TINY_GEMMA,
    UNIT_SIZE,
    assert_bitwise,
    error_of,
    hf_logits,
    import_torch,
    logits,
    random_hf_model,
    random_tokens,
    tiny_llama,
    user_error,
    with_random_units,
    word_tokenizer,
)
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.convert import load_model
from imae_jax.convert.gguf import GGUFSource
from imae_jax.convert.hf import hf_tensors, save_hf
from imae_jax.convert.hf_tokenizer import write_tokenizer
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.convert.references import _built_in, open_model
from imae_jax.convert.table import base_rows
from imae_jax.sharding import make_mesh

PARITY = 2e-4


def tensors_of(directory):
    tensors = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    names = [name for file in tensors for name in file]
    assert len(names) == len(set(names))
    return {name: array for file in tensors for name, array in file.items()}


# HuggingFace


@pytest.mark.parametrize("shards", ["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_keeps_every_bit(tiny, tmp_path, kind, dtype, shards):
    from transformers import AutoModelForCausalLM

    sharded = shards == "sharded"
    checkpoint = tiny(kind, dtype=dtype, max_shard_size="8KB" if sharded else "1GB")
    assert (len(list(checkpoint.directory.glob("*.safetensors"))) > 1) == sharded
    loaded = checkpoint.load(stacked=sharded)
    limit = 8000 if sharded else 10**9
    save_hf(loaded.model, loaded.tokenizer, tmp_path, max_shard_bytes=limit)

    expected, actual = tensors_of(checkpoint.directory), tensors_of(tmp_path)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_bitwise(actual[name], array)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    for file in map(load_file, files):
        assert file
        assert len(file) == 1 or sum(array.nbytes for array in file.values()) <= limit

    # With eager attention on both sides, equal weights and an equal config give equal results.
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert str(again.dtype) == f"torch.{dtype}"
    assert again.config.model_type == checkpoint.hf.config.model_type
    tokens = random_tokens(1, 12)
    assert_bitwise(hf_logits(again, tokens), hf_logits(checkpoint.hf, tokens))


def test_smollm2_export_is_what_was_loaded(smollm2, smollm2_hf_dir):
    again = load_model(str(smollm2_hf_dir))
    for a, e in zip(
        jax.tree.leaves(again.model.weights()), jax.tree.leaves(smollm2.model.weights()), strict=True
    ):
        assert_bitwise(a, e)
    assert again.eos_token_ids == smollm2.eos_token_ids
    message = [{"role": "user", "content": "Is the moon 384,400 km away?"}]
    assert again.tokenizer.apply_chat_template(
        message, add_generation_prompt=True
    ) == smollm2.tokenizer.apply_chat_template(message, add_generation_prompt=True)


@pytest.mark.parametrize("stacked", [True, False])
def test_lowest_layers_alone(tiny, stacked):
    from transformers import AutoModelForCausalLM

    directory = tiny().directory
    hf = AutoModelForCausalLM.from_pretrained(directory, num_hidden_layers=2, attn_implementation="eager")
    cut = load_model(f"{directory}#layers=2", stacked=stacked)
    assert cut.config.num_layers == 2
    assert cut.base.reference == f"{directory}#layers=2"
    tokens = random_tokens(2, 12)
    actual = logits(cut.model.weights(), cut.config, tokens)
    np.testing.assert_allclose(actual, hf_logits(hf, tokens), rtol=0, atol=PARITY)


@pytest.mark.parametrize("stored", [np.float32, jnp.bfloat16])
def test_values_that_float16_does_not_hold_are_named(tiny, tmp_path, capfd, stored):
    """When a model is loaded, and when it is exported without being loaded."""
    from imae_jax.convert.__main__ import main

    directory = shutil.copytree(tiny().directory, tmp_path / "model")
    tensors = {name: array.astype(stored) for name, array in tensors_of(directory).items()}
    name = "model.layers.1.mlp.up_proj.weight"

    def store(value):
        tensors[name][7, 3] = value
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    store(65000)
    weights = load_model(str(directory), dtype="float16").model.weights()
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(weights.base))
    store(70000)
    with user_error(name, "float16", "--dtype"):
        load_model(str(directory), dtype="float16")
    command = ["export", "--model", directory, "--dtype", "float16", "--out", tmp_path / "out"]
    message = error_of(capfd, main, *command)
    assert name in message and "--dtype" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_dtype(tiny, dtype):
    loaded, original = tiny().load(dtype=dtype), tiny().load()
    assert loaded.base.dtype == dtype
    for a, e in zip(*(jax.tree.leaves(m.model.weights()) for m in (loaded, original)), strict=True):
        assert_bitwise(a, e.astype(dtype))


def test_bias_on_o_proj_alone(tiny, tmp_path):
    """What ITI's export looks like: transformers' `attention_bias` would want q, k and v as well."""
    checkpoint = tiny("attention_bias", seed=1)
    source = shutil.copytree(checkpoint.directory, tmp_path / "model")
    tensors = tensors_of(source)
    with_zeros = checkpoint.hf.state_dict()
    for name in list(tensors):
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            del tensors[name]
            with_zeros[name].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    edit_json(source / "config.json", attention_bias=False)

    loaded = load_model(str(source))
    assert (loaded.config.o_bias, loaded.config.qkv_bias) == (True, False)
    tokens = random_tokens(2, 12)
    actual = logits(loaded.model.weights(), loaded.config, tokens)
    np.testing.assert_allclose(actual, hf_logits(checkpoint.hf, tokens), rtol=0, atol=PARITY)


def test_end_of_text_ids_of_the_generation_config_count(tiny, tmp_path):
    source = shutil.copytree(tiny().directory, tmp_path / "model")
    edit_json(source / "generation_config.json", eos_token_id=[7, 5])
    edit_json(source / "config.json", eos_token_id=2)
    loaded = load_model(str(source))
    assert loaded.eos_token_ids == (2, 5, 7)
    (tmp_path / "again").mkdir()
    save_hf(loaded.model, loaded.tokenizer, tmp_path / "again", eos_token_ids=loaded.eos_token_ids)
    assert load_model(str(tmp_path / "again")).eos_token_ids == (2, 5, 7)


def test_another_tokenizer(tiny, tmp_path):
    write_tokenizer(word_tokenizer(50), tmp_path)
    assert len(tiny().load(tokenizer=str(tmp_path)).tokenizer) == 50


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_configs_round_trip(kind, old):
    """`to_hf` writes the fields of transformers 4 and 5; either alone must do."""
    config = LlamaConfig.from_hf(TINY.to_hf() | {"rope_scaling": None} | KINDS[kind])
    fields = config.to_hf()
    for name in ("rope_parameters",) if old else ("rope_scaling", "rope_theta"):
        del fields[name]
    assert LlamaConfig.from_hf(fields) == config


@pytest.mark.parametrize(
    ("fields", "window", "sliding_layers"),
    [
        ({"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1}, None, ()),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 28}, None, ()),
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"] * 3}, None, ()),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, 5, (False, True, True)),
        ({"model_type": "mistral", "sliding_window": None}, None, ()),
        ({"model_type": "mistral"}, 4096, (True, True, True)),
        (
            {"model_type": "gemma3_text", "sliding_window": 5, "sliding_window_pattern": 2},
            5,
            (True, False, True),
        ),
        ({"model_type": "gemma3_text", "sliding_window": 5}, 5, (True, True, True)),
    ],
    ids=str,
)
def test_windows_are_those_of_transformers(fields, window, sliding_layers):
    """Of published configs' forms, old and new."""
    from transformers import AutoConfig

    hf = {name: value for name, value in TINY.to_hf().items() if name != "rope_parameters"}
    hf |= {"model_type": "qwen2"} | fields
    config = LlamaConfig.from_hf(hf)
    assert (config.sliding_window, config.sliding_layers) == (window, sliding_layers)
    theirs = AutoConfig.for_model(**hf)
    assert LlamaConfig.from_hf(theirs.to_dict()) == config
    assert config.lowest_layers(1).sliding_layers == (sliding_layers[:1] if any(sliding_layers[:1]) else ())
    LlamaConfig.from_hf(config.lowest_layers(1).to_hf())


def test_linear_scaling_reaches_as_far_as_the_config_says():
    """`max_position_embeddings` is the length after scaling, unless `max_sequence_length` is more."""
    hf = TINY.to_hf() | {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert LlamaConfig.from_hf(hf).context_length == 64
    assert LlamaConfig.from_hf(hf | {"max_sequence_length": 256}).context_length == 256


# What is refused


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes if path.exists() else changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def remove_a_shard(d):
    (d / "model-00002-of-00003.safetensors").unlink()


def truncate(name, share):
    def damage(directory):
        path = directory / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return damage


def pickles_only(directory):
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"pickle")


def no_weights(directory):
    for path in directory.glob("*.safetensors*"):
        path.unlink()


def index_points_outside(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def misfit(directory):
    def edit(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.rotten.weight"] = np.zeros(3, np.float32)
        tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((24, 31), np.float32)

    edit_tensors(directory / "model.safetensors", edit)


def config(**changes):
    return lambda directory: edit_json(directory / "config.json", **changes)


def remove(name):
    return lambda directory: (directory / name).unlink()


def write(name, text):
    return lambda directory: (directory / name).write_text(text)


ROPE = {"rope_theta": 1e4, "factor": 2.0}
DAMAGES = {
    "missing shard": (remove_a_shard, ["model-00002-of-00003.safetensors", "missing"]),
    "truncated shard": (
        truncate("model-00002-of-00003.safetensors", 0.5),
        ["model-00002-of-00003.safetensors", "damaged"],
    ),
    "index points outside": (index_points_outside, ["index.json", "../model.safetensors"]),
    "index is no JSON": (
        write("model.safetensors.index.json", "{"),
        ["model.safetensors.index.json", "JSON"],
    ),
    "index without map": (write("model.safetensors.index.json", "{}"), ["weight_map"]),
    "truncated": (truncate("model.safetensors", 0.9), ["model.safetensors", "damaged"]),
    "truncated header": (truncate("model.safetensors", 0.001), ["model.safetensors", "damaged"]),
    "no safetensors file": (write("model.safetensors", "hello"), ["model.safetensors", "damaged"]),
    "pickles only": (pickles_only, [".bin", "convert"]),
    "no weights": (no_weights, ["no model.safetensors"]),
    "misfit": (
        misfit,
        [
            "2 missing",
            "model.layers.1.mlp.up_proj.weight",
            "model.norm.weight",
            "1 unexpected",
            "model.layers.0.self_attn.rotten.weight",
            "1 of a wrong shape",
            "model.layers.2.self_attn.k_proj.weight [24, 31] instead of [24, 32]",
        ],
    ),
    "double precision": (
        lambda d: edit_tensors(
            d / "model.safetensors", lambda t: t.update({"model.norm.weight": np.zeros(32)})
        ),
        ["model.norm.weight", "F64", "BF16"],
    ),
    "more layers than tensors": (config(num_hidden_layers=4), ["9 missing", "model.layers.3."]),
    "fewer layers than tensors": (config(num_hidden_layers=2), ["9 unexpected", "model.layers.2."]),
    "no config": (remove("config.json"), ["config.json"]),
    "config is no JSON": (write("config.json", "{"), ["config.json", "JSON"]),
    "config is a list": (write("config.json", "[]"), ["config.json", "object"]),
    "unknown model_type": (config(model_type="mamba"), ["'mamba'", "llama", "qwen2"]),
    "no model_type": (config(model_type=...), ["model_type"]),
    "multimodal": (config(model_type="gemma3", text_config={}), ["'gemma3'", "multimodal"]),
    "softcapping": (
        config(model_type="gemma3_text", final_logit_softcapping=30.0),
        ["final_logit_softcapping"],
    ),
    "bidirectional": (
        config(model_type="gemma3_text", use_bidirectional_attention=True),
        ["use_bidirectional_attention"],
    ),
    "window of a Llama": (config(sliding_window=5), ["sliding_window 5", "llama"]),
    "Mistral with layer types": (
        config(model_type="mistral", sliding_window=5, layer_types=["full_attention"] * 3),
        ["layer_types", "mistral"],
    ),
    "layers that slide without a window": (
        config(model_type="qwen2", layer_types=["full_attention"] + ["sliding_attention"] * 2),
        ["sliding_window"],
    ),
    "chunked attention": (
        config(model_type="qwen2", layer_types=["chunked_attention"] * 3),
        ["'chunked_attention'"],
    ),
    "too few layer types": (
        config(
            model_type="qwen2", use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention"]
        ),
        ["layer_types", "3 layers"],
    ),
    "no pattern": (config(model_type="gemma3_text", sliding_window_pattern=0), ["sliding_window_pattern"]),
    "llama3 without a length": (
        config(
            rope_parameters=ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        ),
        ["original_max_position_embeddings", "llama3"],
    ),
    "linear without a factor": (
        config(rope_parameters={"rope_theta": 1e4, "rope_type": "linear"}),
        ["factor", "linear"],
    ),
    "yarn": (config(rope_parameters=ROPE | {"rope_type": "yarn"}), ["'yarn'", "llama3"]),
    "longrope": (config(rope_parameters=ROPE | {"rope_type": "longrope"}), ["'longrope'"]),
    "partial rotation": (
        config(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ["partial_rotary_factor"],
    ),
    "gelu": (config(hidden_act="gelu"), ["hidden_act", "'gelu'"]),
    "no hidden_size": (config(hidden_size=...), ["hidden_size", "None"]),
    "heads do not divide": (config(num_key_value_heads=3), ["num_kv_heads", "3", "4"]),
    "no layers": (config(num_hidden_layers=0), ["num_layers", "0"]),
    "text for a number": (config(rms_norm_eps="small"), ["config", "small"]),
    "no tokenizer": (remove("tokenizer.json"), ["tokenizer"]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_checkpoints_are_refused(tiny, tmp_path, case):
    damage, parts = DAMAGES[case]
    sharded = "shard" in case or "index" in case
    source = tiny(max_shard_size="70KB" if sharded else "1GB").directory
    source = shutil.copytree(source, tmp_path / "model")
    damage(source)
    with user_error(*parts):
        load_model(str(source))


@pytest.mark.parametrize(
    ("config", "changes", "field"),
    [
        (TINY, {"o_bias": True}, "qkv_bias False"),
        (TINY, {"o_bias": True, "mlp_bias": True}, "qkv_bias False"),
        (TINY, {"qkv_bias": True, "mlp_bias": True}, "mlp_bias True"),
        (TINY, {"qk_norm": True, "qkv_bias": True}, "qkv_bias True"),
        (TINY, {"sliding_window": 5, "sliding_layers": (True, False, True)}, "sliding_layers"),
        (TINY_GEMMA, {"qk_norm": False}, "qk_norm False"),
    ],
)
def test_what_no_config_of_transformers_says_is_not_exported(tmp_path, config, changes, field):
    model = tiny_llama(dataclasses.replace(config, **changes))
    with user_error(field, "HuggingFace"):
        save_hf(model, word_tokenizer(TINY.vocab_size), tmp_path)


@pytest.mark.parametrize(
    ("suffix", "parts"),
    [
        ("#layers=0", ["#layers=0", "3 layers"]),
        ("#layers=4", ["#layers=4", "3 layers"]),
        ("#layers=two", ["#layers=two", "layers=N"]),
        ("#heads=2", ["#heads=2", "layers=N"]),
    ],
)
def test_wrong_suffixes_are_refused(tiny, suffix, parts):
    with user_error(*parts):
        load_model(f"{tiny().directory}{suffix}")


@pytest.mark.parametrize(
    "reference", ["smollm3", "no/such/directory", "org/model-that-is-not-cached", "", "no.gguf"]
)
def test_unknown_references_are_refused(reference):
    with user_error(reference):
        load_model(reference)


@pytest.mark.parametrize("name", ["model.txt", "model.safetensors"])
def test_other_files_are_refused(tmp_path, name):
    (tmp_path / name).write_text("hello")
    with user_error(name, ".gguf"):
        load_model(str(tmp_path / name))


def test_the_directory_of_a_run_is_no_model_but_holds_one(tmp_path):
    (tmp_path / "imae").mkdir()
    (tmp_path / "imae" / "imae_config.json").write_text("{}")
    with user_error("no config.json", f"{tmp_path / 'imae'} is an IMAE directory"):
        load_model(str(tmp_path))


def test_unknown_dtype_is_refused(tiny):
    with user_error("'int8'", "bfloat16"):
        tiny().load(dtype="int8")


# GGUF


@pytest.fixture(scope="module")
def smollm2_gguf(smollm2):
    return _built_in(SMOLLM2)


@pytest.mark.slow
def test_gguf_weights_equal_transformers(smollm2, smollm2_gguf):
    import_torch()
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    expected = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
    assert_bitwise(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    config = smollm2.config
    actual = hf_tensors(smollm2.model.weights(), config, base_rows(config))
    assert actual.keys() == expected.keys()
    for name, read in actual.items():
        assert_bitwise(read(), expected[name])
    # A GGUF file holds no initializer_range, and its epsilon as a float32.
    from_hf = LlamaConfig.from_hf(hf.config.to_dict())
    assert dataclasses.replace(from_hf, rms_norm_eps=config.rms_norm_eps) == config
    assert np.float32(from_hf.rms_norm_eps) == np.float32(config.rms_norm_eps)


@pytest.fixture(scope="module")
def hf_gguf_tokenizer(smollm2_gguf):
    import_torch()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


def assert_same_tokenizer(actual, expected, texts):
    assert actual.backend_tokenizer.get_vocab() == expected.get_vocab()
    assert actual.special_tokens == expected.special_tokens_map
    ids = actual(texts)["input_ids"]
    assert ids == expected(texts)["input_ids"]
    for skip in (True, False):
        assert [actual.decode(i, skip) for i in ids] == expected.batch_decode(ids, skip_special_tokens=skip)


def test_gguf_tokenizer_on_truthfulqa(smollm2, hf_gguf_tokenizer, shared):
    with (shared / "data" / "TruthfulQA.csv").open(encoding="utf-8-sig", newline="") as file:
        cells = {cell for row in csv.DictReader(file) for cell in row.values()}
    answers = {answer for cell in cells for answer in cell.split(";")}
    texts = sorted(cells | answers | {f"Q: {cell}\nA:" for cell in cells})
    assert len(texts) > 8000
    assert_same_tokenizer(smollm2.tokenizer, hf_gguf_tokenizer, texts)


def test_gguf_tokenizer_on_special_tokens(smollm2, hf_gguf_tokenizer):
    special = list(smollm2.tokenizer.special_ids)
    assert len(special) == 17
    texts = [*special, *(f"a {token} b{token}" for token in special), "<|im_end", "日本 é e\u0301 😀"]
    assert_same_tokenizer(smollm2.tokenizer, hf_gguf_tokenizer, texts)
    assert smollm2.tokenizer("<|im_end|>")["input_ids"] == [2]
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <b>there</b>"},
        {"role": "assistant", "content": "Hello."},
    ]
    for messages in (conversation, conversation[1:2]):
        for kwargs in ({"add_generation_prompt": True, "tokenize": False}, {"tokenize": False}):
            assert smollm2.tokenizer.apply_chat_template(
                messages, **kwargs
            ) == hf_gguf_tokenizer.apply_chat_template(messages, **kwargs)


def test_smollm2_digits_stand_alone(smollm2):
    """As in the published tokenizer; transformers' reading of the file cuts the blanks up instead."""
    tokens = smollm2.tokenizer.backend_tokenizer.encode("a  1955").tokens
    assert tokens == ["a", "ĠĠ", "1", "9", "5", "5"]


def gguf_name(name, is_gemma3):
    if not name.startswith("model.layers."):
        return {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }[name]
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    part, kind = part.rsplit(".", 1)
    part = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "post_attention_norm" if is_gemma3 else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }[part]
    return f"blk.{layer}.{part}.{kind}"


def interleave(array, num_heads):
    """llama.cpp's `permute`: row i and i + H/2 of every head become neighbours."""
    heads = array.reshape(num_heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(array.shape)


def write_gguf(path, hf, metadata, *, part=(0, 1), quantization=None):
    """A GGUF file as llama.cpp's converter would write it, float32 by default, or a part of it."""
    config = hf.config
    is_gemma3 = config.model_type == "gemma3_text"
    architecture = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    rope = config.rope_parameters["full_attention"] if is_gemma3 else config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    number, count = part
    if count > 1:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
    if is_gemma3 and rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type in ("mistral", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    for name, value in metadata.items():
        if name == "rope_scale_linear":  # before November 2023
            writer.add_float32(f"{hf.config.model_type}.rope.scale_linear", value)
        else:
            getattr(writer, f"add_{name}")(value)
    if rope["rope_type"] == "llama3":
        divisors = 1 / (
            hf.model.rotary_emb.inv_freq.numpy()
            * rope["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        )
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    for i, (name, tensor) in enumerate(hf.state_dict().items()):
        array = tensor.numpy()
        if i % count != number:
            continue
        if architecture == "llama" and ".q_proj." in name:
            array = interleave(array, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            array = interleave(array, config.num_key_value_heads)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if is_gemma3 and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if quantization is not None and array.ndim == 2:
            array = gguf.quants.quantize(array, quantization)
            writer.add_tensor(gguf_name(name, is_gemma3), array, raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name(name, is_gemma3), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CORPUS = """\
In 1969 two men walked on the moon for 2 hours and 31 minutes; the third stayed in orbit, alone.
    def area(self):  # indented by four blanks
        return self.width * self.height  ==== "it's", "they'll" and "we'd"
The moon's light is the sun's light. Nobody's shadow falls upward, not even yours: 12345 times no!
"""
TEXTS = [
    CORPUS,
    "the moon",
    "two men, 1969 times",
    "it's  two   blanks    four     five",
    "tab\tline\n\n\nbreaks\r\n",
    "I'LL they'Ll",
    "========= ---",
    "日本 naïve 😀",
    "",
]


def byte_level_tokenizer(pre):
    """Metadata of a small tokenizer of llama.cpp's kind `gpt2`: two control tokens, then bytes."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=control,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
    kind = gguf.TokenType
    types = [kind.CONTROL] * 3 + [kind.NORMAL] * (len(tokens) - 4) + [kind.USER_DEFINED]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_types": types,
        "token_merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def sentencepiece_tokenizer():
    """Metadata of a small tokenizer of llama.cpp's kind `llama`: pieces with scores, no merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=160, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merged = ["".join(pair) for pair in model["merges"]]
    assert any(piece.startswith("▁▁▁▁") for piece in merged)
    letters = [piece for piece in model["vocab"] if len(piece) == 1]
    kind = gguf.TokenType
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256
    types += [kind.NORMAL] * len(merged + letters)
    return {
        "tokenizer_model": "llama",
        "token_list": [
            *["<unk>", "<s>", "</s>"],
            *(f"<0x{byte:02X}>" for byte in range(256)),
            *merged,
            *letters,
        ],
        "token_scores": [0.0] * 259 + [-float(i) for i in range(len(merged + letters))],
        "token_types": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
    }


GGUFS = {
    "llama": ("gqa", lambda: byte_level_tokenizer("smollm")),
    "llama3": ("rope_llama3", lambda: byte_level_tokenizer("llama-bpe")),
    "tied": ("tied", sentencepiece_tokenizer),
    "qwen2": ("qwen2", lambda: byte_level_tokenizer("qwen2")),
    "qwen3": ("qwen3", lambda: byte_level_tokenizer("qwen2")),
    "mistral": ("mistral", sentencepiece_tokenizer),
    "gemma3": ("gemma3", sentencepiece_tokenizer),
    "gemma3 by rule": ("gemma3", sentencepiece_tokenizer),
}
# What of a model its file cannot say: llama.cpp knows it.
GGUF_FIELDS = {
    "gemma3": {"query_pre_attn_scalar": 12},
    "gemma3 by rule": {
        "query_pre_attn_scalar": 12,
        "num_hidden_layers": 7,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "rope_scaling": None,
    },
}
GGUF_OPTIONS = {"gemma3": {"sliding_window_pattern": [True, False, True], "rope_freq_base_swa": 1e3}}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """Factory of a tiny model in transformers and of the GGUF file that holds it."""

    def make(name, **options):
        kind, metadata = GGUFS[name]
        metadata = metadata() | GGUF_OPTIONS.get(name, {}) | options
        sizes = {"vocab_size": len(metadata["token_list"])} | GGUF_FIELDS.get(name, {})
        hf = random_hf_model(import_torch(), KINDS[kind] | sizes, seed=0)
        return hf, write_gguf(tmp_path_factory.mktemp("gguf") / f"{name}.gguf", hf, metadata)

    return make


@pytest.mark.parametrize("name", GGUFS)
def test_small_gguf_equals_the_model_that_it_holds(tiny_gguf, name):
    hf, path = tiny_gguf(name)
    loaded = load_model(str(path))
    expected = LlamaConfig.from_hf(hf.config.to_dict())
    if name == "llama3":
        assert loaded.config.rope.type == "frequency_factors"
        expected = dataclasses.replace(expected, rope=loaded.config.rope)
    approximate = {"rms_norm_eps": loaded.config.rms_norm_eps, "initializer_range": 0.02}
    assert loaded.config == dataclasses.replace(expected, **approximate)
    tokens = random_tokens(2, 24, vocab_size=hf.config.vocab_size)
    actual = logits(loaded.model.weights(), loaded.config, tokens)
    np.testing.assert_allclose(actual, hf_logits(hf, tokens), rtol=0, atol=PARITY)
    assert loaded.eos_token_ids == (2,)


def test_a_fault_of_ours_is_no_damaged_gguf(tiny_gguf, monkeypatch):
    def fault(*_):
        raise AttributeError("a fault of ours")

    _, path = tiny_gguf("tied")
    monkeypatch.setattr(GGUFSource, "_sliding_layers", fault)
    with pytest.raises(AttributeError, match="a fault of ours"):
        GGUFSource(path)


@pytest.mark.parametrize("name", ["qwen2", "tied", "llama3"])
def test_small_gguf_tokenizer_equals_transformers(tiny_gguf, name):
    from transformers import AutoTokenizer

    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    # llama.cpp adds BOS for Llama 3's pre-tokenizer unasked; transformers wants to be told.
    options = {"add_bos_token": True, "bos_token_id": 1} if name == "llama3" else {}
    _, path = tiny_gguf(name, chat_template=template, **options)
    actual = load_model(str(path)).tokenizer
    expected = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert_same_tokenizer(actual, expected, TEXTS)
    assert actual.chat_template == template
    if name == "qwen2":
        assert_same_tokenizer(actual, expected, ["<think>the</think>", "a<|im_end|>b"])


def test_sentencepiece_text_survives(tiny_gguf):
    """A text that begins with blanks keeps them; transformers' reading of the file drops one."""
    tokenizer = load_model(str(tiny_gguf("tied")[1])).tokenizer
    for text in [*TEXTS, " the moon", "   three"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("name", "options", "adds_bos"),
    [
        ("llama3", {"bos_token_id": 1}, True),
        ("llama3", {"bos_token_id": 1, "add_bos_token": False}, False),
        ("qwen2", {"bos_token_id": 1}, False),
        ("qwen2", {"bos_token_id": 1, "add_bos_token": True}, True),
        ("tied", {}, True),
        ("tied", {"add_bos_token": False}, False),
    ],
)
def test_gguf_tokenizer_adds_bos_as_llama_cpp_does(tiny_gguf, name, options, adds_bos):
    tokenizer = GGUFSource(tiny_gguf(name, **options)[1]).tokenizer()
    assert (tokenizer("the moon")["input_ids"][0] == 1) == adds_bos


@pytest.mark.parametrize(("name", "whole"), [("llama3", True), ("qwen2", False)])
def test_llama3_knows_words_that_no_merges_make(tiny_gguf, name, whole):
    metadata = GGUFS[name][1]()
    options = {
        "token_list": [*metadata["token_list"], "Ġxylophone"],
        "token_types": [*metadata["token_types"], gguf.TokenType.NORMAL],
    }
    tokenizer = GGUFSource(tiny_gguf(name, **options)[1]).tokenizer()
    tokens = tokenizer.backend_tokenizer.encode("a xylophone").tokens[1:]
    assert "".join(tokens) == "Ġxylophone"
    assert (len(tokens) == 1) == whole


def test_ends_of_turns_and_messages_end_a_text(tiny_gguf):
    assert load_model(str(tiny_gguf("llama", eot_token_id=1)[1])).eos_token_ids == (1, 2)


def test_gguf_cannot_become_a_config_of_transformers_with_a_table_of_frequencies(tiny_gguf, tmp_path):
    loaded = load_model(str(tiny_gguf("llama3")[1]))
    with user_error("RoPE", "HuggingFace"):
        save_hf(loaded.model, loaded.tokenizer, tmp_path)


@pytest.mark.parametrize("share", [0.0, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999])
def test_truncated_gguf_is_refused(tiny_gguf, share):
    _, path = tiny_gguf("llama")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with user_error(path):
        load_model(str(path))


@pytest.mark.parametrize("start", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00"])
def test_random_bytes_as_gguf_are_refused(tmp_path, start):
    path = tmp_path / "model.gguf"
    path.write_bytes(start + np.random.default_rng(0).bytes(4096))
    with user_error(path):
        load_model(str(path))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tokenizer_model": "t5"}, ["'t5'", "--tokenizer"]),
        ({"tokenizer_pre": "deepseek-llm"}, ["'deepseek-llm'", "--tokenizer"]),
        ({"rope_scaling_type": gguf.RopeScalingType.YARN}, ["'yarn'"]),
        ({"rope_dimension_count": 6}, ["6 of a head's 12 dimensions"]),
        ({"expert_count": 4}, ["mixture of experts", "'llama'"]),
    ],
)
def test_gguf_of_an_unknown_kind_is_refused(tiny, tmp_path, changes, parts):
    metadata = byte_level_tokenizer("smollm") | changes
    hf = tiny("gqa", vocab_size=len(metadata["token_list"])).hf
    with user_error(*parts):
        load_model(str(write_gguf(tmp_path / "model.gguf", hf, metadata)))


def test_gguf_of_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with user_error("'mamba'", "llama"):
        load_model(str(tmp_path / "model.gguf"))


def test_mixtures_of_experts_are_refused_by_that_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with user_error("mixture of experts", "'qwen3moe'"):
        load_model(str(tmp_path / "model.gguf"))
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        with user_error("mixture of experts", f"{name} 8"):
            LlamaConfig.from_hf({"model_type": "mixtral", name: 8})


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        ({"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": 3.0}, 3.0),
        ({"rope_scaling_factor": 3.0}, 3.0),
        ({"rope_scale_linear": 3.0}, 3.0),
        ({"rope_scaling_factor": 0.0}, 1.0),
        ({"rope_scaling_type": gguf.RopeScalingType.NONE, "rope_scaling_factor": 3.0}, 1.0),
    ],
)
def test_linear_scaling_as_files_of_all_ages_write_it(tiny, tmp_path, scaling, factor):
    """Names and defaults: GGUF's specification, and llama.cpp's loader."""
    metadata = byte_level_tokenizer("smollm") | scaling
    kind = "gqa" if factor == 1 else "rope_linear"
    hf = tiny(kind, vocab_size=len(metadata["token_list"])).hf
    lm = load_model(str(write_gguf(tmp_path / "model.gguf", hf, metadata)))
    assert lm.config.rope.factor == factor
    tokens = random_tokens(2, 24, vocab_size=hf.config.vocab_size)
    actual = logits(lm.model.weights(), lm.config, tokens)
    np.testing.assert_allclose(actual, hf_logits(hf, tokens), rtol=0, atol=PARITY)


@pytest.mark.parametrize("given", [1, 2, 3])
def test_a_split_gguf_is_read_whole_from_any_of_its_parts(tiny_gguf, tmp_path, given):
    hf, path = tiny_gguf("llama")
    parts = [tmp_path / f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    metadata = byte_level_tokenizer("smollm")
    for i, part in enumerate(parts):
        write_gguf(part, hf, metadata if i == 0 else {}, part=(i, 3))
    whole, split = load_model(str(path)), load_model(str(parts[given - 1]))
    for a, e in zip(
        jax.tree.leaves(split.model.weights()), jax.tree.leaves(whole.model.weights()), strict=True
    ):
        assert_bitwise(a, e)
    assert split.base.fingerprint == whole.base.fingerprint
    assert split.tokenizer("the moon") == whole.tokenizer("the moon")
    others = [part for i, part in enumerate(parts, 1) if i != given]
    others[0].unlink()
    with user_error(parts[given - 1], "parts", others[0].name, "missing"):
        load_model(str(parts[given - 1]))
    with user_error("one of 3 parts", "-00001-of-00003.gguf"):
        load_model(str(parts[given - 1].rename(tmp_path / "renamed.gguf")))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_quantized_gguf_is_dequantized_as_the_gguf_package_does(tiny, tmp_path, name):
    """More rows than are read at a time, whose number no block's divides; heads are not to be cut."""
    kind, metadata = GGUFS[name]
    metadata = metadata()
    hf = tiny(
        kind, vocab_size=len(metadata["token_list"]), hidden_size=64, intermediate_size=192, head_dim=40
    ).hf
    path = write_gguf(tmp_path / "model.gguf", hf, metadata, quantization=gguf.GGMLQuantizationType.Q8_0)
    source = GGUFSource(path)
    for field, tensor in hf.state_dict().items():
        expected = tensor.numpy()
        if expected.ndim == 2:
            # Rows are quantized one by one, so that their order does not matter.
            stored = gguf.quants.quantize(expected, gguf.GGMLQuantizationType.Q8_0)
            expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
        assert_bitwise(source.read(field), expected)
    half = load_model(str(path), dtype="bfloat16").model.weights()
    whole = load_model(str(path)).model.weights()
    assert half.dtype == jnp.bfloat16
    for a, e in zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True):
        assert_bitwise(a, e.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_little_more_memory_than_the_weights(tiny, tmp_path, dtype):
    """Of what NumPy allocates; JAX takes these arrays as they are."""
    metadata = byte_level_tokenizer("qwen2")
    sizes = {"vocab_size": 40_000, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 32}
    hf = tiny("qwen2", **sizes).hf
    path = write_gguf(tmp_path / "model.gguf", hf, metadata, quantization=gguf.GGMLQuantizationType.Q8_0)
    opened = open_model(str(path))
    opened.load(dtype=dtype)  # What is imported and traced once does not count.
    opened = open_model(str(path))
    tracemalloc.start()
    try:
        weights = opened.load(dtype=dtype).weights()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    total = sum(array.nbytes for array in jax.tree.leaves(weights))
    assert total > 30e6
    assert total < peak < 1.15 * total


# A device mesh


SPECS = {
    "embed": P("tensor", "fsdp"),
    "norm_final": P(None),
    "unembed": P("fsdp", "tensor"),
    "norm_attn": P(None),
    "norm_mlp": P(None),
    "wq": P("fsdp", "tensor", None),
    "wk": P("fsdp", "tensor", None),
    "wv": P("fsdp", "tensor", None),
    "wo": P("tensor", None, "fsdp"),
    "bq": P("tensor", None),
    "bk": P("tensor", None),
    "bv": P("tensor", None),
    "bo": P(None),
    "w_gate": P("fsdp", "tensor"),
    "w_up": P("fsdp", "tensor"),
    "w_down": P("tensor", "fsdp"),
    "b_gate": P("tensor"),
    "b_up": P("tensor"),
    "b_down": P(None),
}


@pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices")
class TestMesh:
    @pytest.mark.parametrize("stacked", [True, False])
    def test_arrays_are_the_same_and_lie_where_they_should(self, tiny, stacked):
        fields = {"vocab_size": 96, "attention_bias": True, "mlp_bias": True}
        checkpoint = tiny(**fields)
        plain = nnx.to_flat_state(nnx.state(checkpoint.load(stacked=stacked).model))
        mesh = make_mesh(data=2, fsdp=2, tensor=2)
        sharded = nnx.to_flat_state(nnx.state(checkpoint.load(stacked=stacked, mesh=mesh).model))
        seen = set()
        for (path, expected), (sharded_path, actual) in zip(plain, sharded, strict=True):
            assert path == sharded_path
            assert_bitwise(actual[...], expected[...])
            spec = SPECS[path[-1]]
            if stacked and path[0] == "layers":
                spec = P(None, *spec)
            wanted = jax.sharding.NamedSharding(mesh, spec)
            assert actual[...].sharding.is_equivalent_to(wanted, actual.ndim)
            seen.add(path[-1])
        assert seen == SPECS.keys()

    @pytest.mark.parametrize(
        ("fields", "sizes", "name"),
        [({}, {"tensor": 2, "fsdp": 4}, "vocab_size 97"), ({}, {"tensor": 8}, "num_heads 4")],
    )
    def test_sizes_that_do_not_divide_are_refused(self, tiny, fields, sizes, name):
        with user_error(name, "tensor axis"):
            tiny(**fields).load(mesh=make_mesh(**sizes))

    def test_meshes_of_another_size_are_refused(self):
        with user_error("data=3", "8"):
            make_mesh(data=3)


# IMAE directories


TRAINING = {"steps": 3, "learning_rate": 1e-3, "note": "γ = 1"}


@pytest.fixture
def base_dir(tiny, tmp_path):
    return shutil.copytree(tiny().directory, tmp_path / "base")


@pytest.fixture
def imae(base_dir, tmp_path):
    """(directory, weights that were written to it)"""
    loaded = load_model(str(base_dir))
    weights = with_random_units(loaded.model.weights(), loaded.config)
    path = tmp_path / "imae"
    write_imae_dir(
        path,
        weights,
        loaded.config,
        AntiExpertConfig(UNIT_SIZE),
        base=dataclasses.asdict(loaded.base),
        training=TRAINING,
    )
    return path, weights


def test_imae_directory_round_trip(imae):
    path, weights = imae
    loaded = load_model(str(path))
    assert jax.tree.structure(loaded.model.weights()) == jax.tree.structure(weights)
    for a, e in zip(jax.tree.leaves(loaded.model.weights()), jax.tree.leaves(weights), strict=True):
        assert_bitwise(a, e)
    assert loaded.imae["training"] == TRAINING
    assert loaded.model.anti_expert_config == AntiExpertConfig(UNIT_SIZE)
    stacked = load_model(str(path), stacked=True).model.weights()
    for name, array in stacked.units.items():
        assert_bitwise(array, jnp.stack([layer[name] for layer in weights.units]))


def test_imae_directory_brings_its_base_in_its_dtype(base_dir, tmp_path):
    loaded = load_model(f"{base_dir}#layers=2", dtype="bfloat16")
    weights = with_random_units(loaded.model.weights(), loaded.config)
    unit_config, base = AntiExpertConfig(UNIT_SIZE), dataclasses.asdict(loaded.base)
    write_imae_dir(tmp_path / "imae", weights, loaded.config, unit_config, base=base, training={})
    again = load_model(str(tmp_path / "imae"))
    assert again.config.num_layers == 2
    assert again.base == loaded.base
    assert again.model.weights().dtype == jnp.bfloat16
    assert again.model.weights().units[0]["w_up"].dtype == jnp.float32
    assert load_model(str(tmp_path / "imae"), dtype="float32").model.weights().dtype == jnp.float32


def test_other_base_weights_are_refused(imae, base_dir):
    path, _ = imae

    def nudge(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1e-3)

    edit_tensors(base_dir / "model.safetensors", nudge)
    with user_error(path, base_dir, "other weights"):
        load_model(str(path))


def test_a_base_that_has_moved(imae, base_dir, tmp_path):
    path, weights = imae
    base_dir.rename(tmp_path / "moved")
    with user_error(path, base_dir, "--base"):
        load_model(str(path))
    loaded = load_model(str(path), base=str(tmp_path / "moved"))
    for a, e in zip(jax.tree.leaves(loaded.model.weights()), jax.tree.leaves(weights), strict=True):
        assert_bitwise(a, e)


def write_misfitting_units(path):
    def edit(tensors):
        tensors["model.layers.1.mlp.anti_expert.up_proj.weight"] = np.zeros((3, 32), np.float32)

    edit_tensors(path / "anti_expert.safetensors", edit)


def imae_config(section=None, **changes):
    def edit(path):
        path = path / "imae_config.json"
        if section is None:
            return edit_json(path, **changes)
        values = json.loads(path.read_text())[section] | changes
        return edit_json(path, **{section: {k: v for k, v in values.items() if v is not ...}})

    return edit


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (imae_config(format_version=2), ["imae_config.json", "format_version 2"]),
        (imae_config(format_version=...), ["imae_config.json", "format_version None"]),
        (imae_config(base=...), ["imae_config.json", "base"]),
        (imae_config(anti_expert=...), ["imae_config.json", "anti_expert"]),
        (imae_config("base", fingerprint=...), ["imae_config.json", "base", "fingerprint"]),
        (imae_config("base", reference=3), ["imae_config.json", "base", "reference"]),
        (imae_config("anti_expert", intermediate_size="24"), ["anti_expert", "intermediate_size"]),
        (imae_config("anti_expert", intermediate_size=25), ["wrong shape", "[24, 32]"]),
        (imae_config("anti_expert", intermediate_size=0), ["intermediate_size", "0"]),
        (imae_config("base", reference="/no/such/place"), ["/no/such/place", "does not exist"]),
        (write("imae_config.json", "{"), ["imae_config.json", "JSON"]),
        (remove("anti_expert.safetensors"), ["anti_expert.safetensors", "missing"]),
        (truncate("anti_expert.safetensors", 0.7), ["anti_expert.safetensors", "damaged"]),
        (write_misfitting_units, ["layers.1.mlp.anti_expert.up_proj.weight [3, 32]", "[24, 32]"]),
    ],
)
def test_damaged_imae_directories_are_refused(imae, damage, parts):
    path, _ = imae
    damage(path)
    with user_error(*parts):
        load_model(str(path))


def test_imae_directory_is_written_whole_or_not_at_all(imae):
    path, weights = imae
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    args = (path, weights, TINY, AntiExpertConfig(UNIT_SIZE))
    base = {"reference": "x", "revision": None, "fingerprint": "y", "dtype": "float32"}
    with user_error(path, "exists already"):
        write_imae_dir(*args, base=base, training={})
    with pytest.raises(TypeError):
        write_imae_dir(*args, base=base, training={"not JSON": object()}, overwrite=True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    write_imae_dir(*args, base=base, training={}, overwrite=True)
    assert json.loads((path / "imae_config.json").read_text())["base"] == base
    assert sorted(p.name for p in path.parent.iterdir()) == ["base", "imae"]


def test_an_imae_directory_is_no_base(imae, tmp_path):
    path, _ = imae
    imae_config("base", reference=str(path))(path)
    with user_error(path, "IMAE directory"):
        load_model(str(path))


@pytest.mark.parametrize(("mlp_size", "size"), [(11008, 4096), (1536, 576), (8192, 3072), (80, 64)])
def test_unit_width_follows_the_paper(mlp_size, size):
    config = dataclasses.replace(TINY, intermediate_size=mlp_size)
    assert AntiExpertConfig.scaled_to(config).intermediate_size == size
