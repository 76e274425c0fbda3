"""The way back to HuggingFace: IMAE models in transformers, import, streamed files, memory, the card."""

import dataclasses
import json
import os
import pickle
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import (
    FAMILIES,
    KINDS,
    TINY,
    assert_bitwise,
    error_of,
    hf_logits,
    import_torch,
    in_transformers,
    log_softmax,
    logits,
    output_of,
    random_tokens,
    run_python,
    user_error,
    write_rows,
    write_units,
)
from helpers.checkpoints import changed_export, tensors_of
from helpers.documents import ROOT, blocks
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from imae_jax import decode
from imae_jax.anti_expert import MODES
from imae_jax.config import AntiExpertConfig
from imae_jax.convert import export, load_model, verify
from imae_jax.convert.__main__ import main as convert
from imae_jax.convert.hf import SafetensorsSource, save_hf, write_safetensors
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.convert.references import open_model
from imae_jax.generate import main as generate
from imae_jax.sharding import make_mesh
from imae_jax.train.__main__ import main as train

PARITY = 2e-4
IMAE_KINDS = ["gqa", "llama2", "tied", "attention_bias", "mlp_bias", "qwen2", "rope_llama3", *FAMILIES]


def padded(lengths=(9, 5, 7), seed=0):
    """Tokens padded on the left, their mask, and the positions of real tokens."""
    tokens = random_tokens(len(lengths), max(lengths), seed=seed)
    mask = np.arange(max(lengths)) >= max(lengths) - np.asarray(lengths)[:, None]
    return tokens * mask, mask, np.maximum(np.cumsum(mask, -1) - 1, 0)


# IMAE models in transformers


@pytest.mark.parametrize("kind", IMAE_KINDS)
def test_every_mode_equals_this_library(exported, imae_dir, kind):
    hf, lm = in_transformers(exported(kind)), load_model(str(imae_dir(kind)))
    tokens, mask, positions = padded()
    inputs = {"attention_mask": mask.astype(int), "position_ids": positions}
    every = {}
    for mode, strength in [*MODES.items(), (0.5, 0.5), (-1.5, -1.5)]:
        every[mode] = hf_logits_of(hf, tokens, inputs, mode)
        expected = logits(
            lm.model.weights(), lm.config, tokens, attention_mask=jnp.asarray(mask), strength=strength
        )
        np.testing.assert_allclose(every[mode][mask], expected[mask], rtol=0, atol=PARITY)
    assert np.abs(every["expert"] - every["base"])[mask].max() > 0.01
    assert_bitwise(hf_logits_of(hf, tokens, inputs, None), every["expert"])
    import torch

    by_row = hf_logits_of(hf, tokens, inputs, torch.tensor([-1.0, 0.0, 1.0]))
    for row, mode in enumerate(("expert", "base", "anti-expert")):
        np.testing.assert_allclose(by_row[row], every[mode][row], rtol=0, atol=1e-5)


def hf_logits_of(hf, tokens, inputs, mode):
    import torch

    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        return hf(torch.as_tensor(tokens), **inputs, mode=mode).logits.float().numpy()


def test_base_mode_is_the_base_bit_for_bit(exported, tiny):
    from transformers import AutoModelForCausalLM

    hf = in_transformers(exported())
    base = AutoModelForCausalLM.from_pretrained(tiny(initializer_range=0.2).directory).eval()
    tokens = random_tokens(2, 9)
    assert_bitwise(hf_logits_of(hf, tokens, {}, "base"), hf_logits(base, tokens))


def test_modes_of_calls_model_and_config(exported):
    import torch

    directory, tokens = exported(), random_tokens(2, 9)
    hf = in_transformers(directory)
    of = {mode: hf_logits_of(hf, tokens, {}, mode) for mode in MODES}
    hf.set_mode("anti-expert")
    assert_bitwise(hf_logits_of(hf, tokens, {}, None), of["anti-expert"])
    assert_bitwise(hf_logits_of(in_transformers(directory, mode="base"), tokens, {}, None), of["base"])
    dial = exported("gqa", "float32", "--mode", "-0.5")
    assert_bitwise(hf_logits_of(in_transformers(dial), tokens, {}, None), hf_logits_of(hf, tokens, {}, -0.5))
    for wrong in ("hallucinate", float("nan"), None):
        with pytest.raises(ValueError, match="does not exist"):
            hf.set_mode(wrong)
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        hf_logits_of(hf, tokens, {}, torch.zeros(3))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16(exported, imae_dir, attention):
    """Half precision rounds on both sides: distributions are compared, not logits."""
    lm = load_model(str(imae_dir("gqa", "bfloat16")))
    hf = in_transformers(exported("gqa", "bfloat16"), attn_implementation=attention)
    assert str(hf.dtype) == "torch.bfloat16"
    assert str(hf.model.layers[0].mlp.anti_expert.gate.weight.dtype) == "torch.bfloat16"
    tokens = random_tokens(2, 24)
    for mode, strength in MODES.items():
        p = log_softmax(logits(lm.model.weights(), lm.config, tokens, strength=strength))
        q = log_softmax(hf_logits_of(hf, tokens, {}, mode))
        assert (np.exp(p) * (p - q)).sum(-1).mean() < 0.015


def test_generation_with_cache_padding_and_modes_by_row(exported, imae_dir):
    import torch

    hf, lm = in_transformers(exported()), load_model(str(imae_dir()))
    tokens, mask, _ = padded()
    inputs = {"input_ids": torch.as_tensor(tokens), "attention_mask": torch.as_tensor(mask).long()}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    rows = [row[m].tolist() for row, m in zip(tokens, mask, strict=True)]
    with_mode = {}
    for mode in MODES:
        out = hf.generate(**inputs, **settings, mode=mode)
        models, method = lm.prepare(mode, generating=True)
        expected = decode.generate(
            models, lm.config, rows, method=method, max_new_tokens=12, eos_token_ids=lm.eos_token_ids
        )
        with_mode[mode] = new_tokens(out, tokens)
        assert with_mode[mode] == expected
    assert with_mode["expert"] != with_mode["anti-expert"]
    assert new_tokens(hf.generate(**inputs, **settings), tokens) == with_mode["expert"]
    assert new_tokens(hf.generate(**inputs, **settings, use_cache=False), tokens) == with_mode["expert"]
    mixed = hf.generate(**inputs, **settings, mode=torch.tensor([-1.0, 0.0, 1.0]))
    assert new_tokens(mixed, tokens) == [with_mode[mode][row] for row, mode in enumerate(MODES)]
    assert hf.generate(**inputs, **settings | {"num_beams": 2}).shape[0] == 3


def new_tokens(out, prompts, eos=2):
    rows = out[:, prompts.shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def test_compiled_and_trained(exported):
    """`torch.compile` without a C++ compiler's work, and gradients through checkpointed layers."""
    import torch

    hf, tokens = in_transformers(exported()), torch.as_tensor(random_tokens(2, 9))
    compiled = torch.compile(hf, backend="eager", fullgraph=True)
    with torch.no_grad():
        for mode in ("expert", "base", torch.tensor([1.0, 0.0])):
            assert torch.equal(compiled(tokens, mode=mode).logits, hf(tokens, mode=mode).logits)
    gradients = []
    for checkpointing in (False, True):
        hf.zero_grad()
        hf.train()
        if checkpointing:
            hf.gradient_checkpointing_enable()
        hf(tokens, labels=tokens, mode="anti-expert").loss.backward()
        gradients.append(hf.model.layers[0].mlp.anti_expert.down_proj.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_device_map(exported, tmp_path):
    pytest.importorskip("accelerate")
    directory, tokens = exported(), random_tokens(2, 9)
    expected = hf_logits_of(in_transformers(directory), tokens, {}, "expert")
    placed = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    placed |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    hf = in_transformers(directory, device_map=placed, offload_folder=tmp_path)
    assert_bitwise(hf_logits_of(hf, tokens, {}, "expert"), expected)
    assert "ImaeLlamaDecoderLayer" in hf._no_split_modules


def test_saved_again_by_transformers(exported, tmp_path):
    """What transformers writes can be loaded by it and by this library."""
    directory, tokens = exported("qwen2"), random_tokens(2, 9)
    hf = in_transformers(directory)
    pickled = pickle.loads(pickle.dumps(hf))
    assert_bitwise(hf_logits_of(pickled, tokens, {}, "expert"), hf_logits_of(hf, tokens, {}, "expert"))
    hf.save_pretrained(tmp_path / "again")
    again = in_transformers(tmp_path / "again")
    assert_bitwise(hf_logits_of(again, tokens, {}, "expert"), hf_logits_of(hf, tokens, {}, "expert"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "again" / name).write_bytes((directory / name).read_bytes())
    loaded = [load_model(str(path)).model.weights() for path in (tmp_path / "again", directory)]
    for a, e in zip(*map(jax.tree.leaves, loaded), strict=True):
        assert_bitwise(a, e)


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "gemma3"])
def test_units_attached_to_a_base(exported, imae_dir, tiny, kind):
    from transformers import AutoModelForCausalLM

    from imae_jax.convert.torch_side.modeling_imae import attach

    base = AutoModelForCausalLM.from_pretrained(tiny(kind, initializer_range=0.2).directory).eval()
    torch, tokens = import_torch(), random_tokens(2, 9)
    before = hf_logits(base, tokens)
    model, hf = attach(base, imae_dir(kind)), in_transformers(exported(kind))
    for mode in MODES:
        assert_bitwise(hf_logits_of(model, tokens, {}, mode), hf_logits_of(hf, tokens, {}, mode))
    second = attach(base, imae_dir(kind))
    for parameter in second.model.layers[0].mlp.anti_expert.parameters():
        torch.nn.init.zeros_(parameter)
    assert_bitwise(hf_logits_of(model, tokens, {}, "expert"), hf_logits_of(hf, tokens, {}, "expert"))
    assert_bitwise(hf_logits(base, tokens), before)
    assert not any("anti_expert" in name for name in base.state_dict())

    assert torch.equal(
        model.generate(torch.as_tensor(tokens), max_new_tokens=5, do_sample=False),
        hf.generate(torch.as_tensor(tokens), max_new_tokens=5, do_sample=False),
    )
    other = AutoModelForCausalLM.from_pretrained(tiny("llama2", num_hidden_layers=2).directory)
    with pytest.raises(ValueError, match="do not fit"):
        attach(other, imae_dir())
    with pytest.raises(ValueError, match="imae_"):
        attach(hf, imae_dir(kind))


# In-model contrast in transformers


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 2.0, "alpha": 0.0, "renormalize": True, "anti_strength": 1.5}]
)
def test_contrast_equals_this_library(exported, imae_dir, settings):
    import torch

    directory = exported()
    hf, lm = in_transformers(directory), load_model(str(imae_dir()))
    tokens, mask, _ = padded()
    inputs = {"input_ids": torch.as_tensor(tokens), "attention_mask": torch.as_tensor(mask).long()}
    out = hf.generate(
        **inputs,
        custom_generate=str(directory),
        trust_remote_code=True,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    models, method = lm.prepare({"name": "in-model-contrast", **settings}, generating=True)
    rows = [row[m].tolist() for row, m in zip(tokens, mask, strict=True)]
    expected = decode.generate(
        models, lm.config, rows, method=method, max_new_tokens=12, eos_token_ids=lm.eos_token_ids
    )
    assert new_tokens(out.sequences, tokens) == expected
    if settings.get("alpha") != 0.0:
        assert torch.isinf(out.scores[0]).any()


def test_contrast_samples_streams_and_stops(exported):
    import torch

    directory = exported()
    hf = in_transformers(directory)
    tokens = torch.as_tensor(random_tokens(2, 6))
    command = {"custom_generate": str(directory), "trust_remote_code": True, "pad_token_id": 0}

    class Streamer:
        pieces, ended = (), False

        def put(self, piece):
            self.pieces += (piece.reshape(-1),)

        def end(self):
            self.ended = True

    streamer = Streamer()
    sample = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 6}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(hf.generate(tokens, **command, **sample, num_return_sequences=3))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert runs[0].shape[0] == 6
    out = hf.generate(tokens[:1], **command, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert torch.equal(torch.cat(streamer.pieces), out[0])
    assert streamer.ended
    first = int(out[0, 6])
    stopped = hf.generate(tokens[:1], **command, max_new_tokens=6, do_sample=False, eos_token_id=first)
    assert stopped.shape[1] == 7
    tokenizer = character_tokenizer()
    stop = {"tokenizer": tokenizer, "stop_strings": [tokenizer.decode(first)]}
    stopped = hf.generate(tokens[:1], **command, max_new_tokens=6, do_sample=False, **stop)
    assert stopped.shape[1] == 7
    for wrong in ({"alpha": 1.5}, {"beta": float("nan")}, {"num_beams": 2}, {"stop_strings": ["t5"]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            hf.generate(tokens, **command, max_new_tokens=2, **wrong)
    with pytest.raises(ValueError, match="anti-expert"):
        plain_generate(directory)(model=torch.nn.Identity())


def character_tokenizer():
    """Stop strings need a tokenizer that can write any text."""
    # Reversed, so that those which are no ASCII come first, where special tokens are.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[: TINY.vocab_size][::-1]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def plain_generate(directory):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module("custom_generate/generate.generate", str(directory))


# Import


@pytest.mark.parametrize(("kind", "dtype"), [("gqa", "float32"), ("qwen2", "bfloat16"), ("tied", "float16")])
def test_import_gives_the_same_model_bit_for_bit(exported, imae_dir, tmp_path, capfd, kind, dtype):
    directory = exported(kind, dtype)
    original = load_model(str(imae_dir(kind, dtype)))
    output_of(capfd, convert, "import", "--model", directory, "--out", tmp_path / "back")
    for path in (directory, tmp_path / "back" / "imae"):
        again = load_model(str(path))
        assert again.config == original.config
        assert again.model.anti_expert_config == original.model.anti_expert_config
        assert again.imae["anti_expert"] == original.imae["anti_expert"]
        assert again.tokenizer("t5 t6")["input_ids"] == original.tokenizer("t5 t6")["input_ids"]
        assert again.eos_token_ids == original.eos_token_ids
        leaves = [jax.tree.leaves(lm.model.weights()) for lm in (again, original)]
        for a, e in zip(*leaves, strict=True):
            assert_bitwise(a, e)
    units = [path / "anti_expert.safetensors" for path in (tmp_path / "back" / "imae", imae_dir(kind, dtype))]
    assert units[0].read_bytes() == units[1].read_bytes()
    command = ["import", "--model", directory, "--out", tmp_path / "back"]
    assert "exists already" in error_of(capfd, convert, *command)
    output_of(capfd, convert, *command, "--overwrite")


def test_the_lowest_layers_of_an_export(exported, tmp_path, capfd):
    directory = exported()
    cut = f"{directory}#layers=2"
    output_of(capfd, convert, "import", "--model", cut, "--out", tmp_path / "back")
    command = ["export", "--model", cut, "--out", tmp_path / "cut", "--verify"]
    assert "2 layers" in output_of(capfd, convert, *command)
    expected = load_model(cut)
    assert expected.config.num_layers == len(expected.model.weights().units) == 2
    for path in (tmp_path / "back" / "imae", tmp_path / "cut"):
        leaves = [jax.tree.leaves(lm.model.weights()) for lm in (load_model(str(path)), expected)]
        for a, e in zip(*leaves, strict=True):
            assert_bitwise(a, e)


# Checkpoints


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory) -> Path:
    """A finished run on a mesh of 8 devices, with checkpoints of steps 3 and 4."""
    directory = tmp_path_factory.mktemp("run")
    settings = [f"model={checkpoint.directory}", f"out={directory / 'run'}", "batch_size=8", "save_every=3"]
    settings += [f"data.source={write_rows(directory / 'rows.jsonl')}", "units.intermediate_size=24"]
    settings += ["optimizer.steps=4"]
    if jax.device_count() == 8:
        settings += ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    assert train([*settings, "--quiet"]) == 0
    return directory / "run"


def test_a_checkpoint_is_what_its_run_writes(run, tmp_path):
    """Written on 8 devices, read on one; nothing in the run's directory changes."""
    (run / "checkpoints" / "5.orbax-checkpoint-tmp-1").mkdir()  # as while a run writes it
    before = sorted(path for path in run.rglob("*"))
    command = [
        "-m",
        "imae_jax.convert",
        "checkpoint",
        "--run",
        run / "checkpoints",
        "--out",
        tmp_path / "imae",
    ]
    done = run_python(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(step 4)" in done.stdout
    files = [path / "imae" / "anti_expert.safetensors" for path in (tmp_path, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(path for path in run.rglob("*")) == before
    configs = [json.loads((path / "imae" / "imae_config.json").read_text()) for path in (tmp_path, run)]
    assert configs[0]["training"]["config"] == configs[1]["training"]["config"]
    for config in configs:
        del config["training"]
    assert configs[0] == configs[1]


def test_export_of_a_step(run, tmp_path, capfd):
    for step in (3, 4):
        command = ["export", "--model", run, "--step", step, "--out", tmp_path / str(step)]
        assert "verified" in output_of(capfd, convert, *command, "--verify")
    assert not any(path.name.startswith(".") for path in (tmp_path / "4").iterdir())
    units = [load_model(str(path)).model.weights().units for path in (tmp_path / "4", run / "imae")]
    for a, e in zip(*map(jax.tree.leaves, units), strict=True):
        assert_bitwise(a, e)
    other = tensors_of(tmp_path / "3")
    assert any((tensor != other[name]).any() for name, tensor in tensors_of(tmp_path / "4").items())


def test_wrong_checkpoints(run, tiny, tmp_path, capfd):
    command = ["checkpoint", "--out", tmp_path / "out", "--run"]
    assert "there: 3, 4" in error_of(capfd, convert, *command, run, "--step", 7)
    assert "no training run" in error_of(capfd, convert, *command, run / "imae")
    other = tiny(seed=1).directory
    assert "other weights" in error_of(capfd, convert, *command, run, "--base", other)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (largest,) = sorted((copy / "checkpoints" / "3").rglob("d/*"), key=lambda path: path.stat().st_size)[-1:]
    largest.write_bytes(largest.read_bytes()[:100])
    assert "damaged" in error_of(capfd, convert, *command, copy, "--step", 3)
    shutil.rmtree(copy / "checkpoints")
    assert "there: none" in error_of(capfd, convert, *command, copy)
    error = error_of(capfd, convert, "export", "--model", copy, "--step", 3, "--out", tmp_path / "out")
    assert "there: none" in error
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    # Said before the base is read.
    (tmp_path / "out").mkdir()
    assert "out exists already" in error_of(capfd, convert, *command, run, "--base", tmp_path / "nowhere")


def test_only_exports_are_imported(tiny, tmp_path, capfd):
    error = error_of(capfd, convert, "import", "--model", tiny().directory, "--out", tmp_path / "out")
    assert "no anti-expert units" in error
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_not_replaced(exported, tiny, tmp_path, capfd):
    shutil.copytree(exported(), tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    for command in ("export", "import"):
        arguments = [command, "--model", tmp_path / "model", "--out", tmp_path / "model", "--overwrite"]
        assert "is read" in error_of(capfd, convert, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_base_that_an_adapter_brings_is_not_replaced(tiny, imae_dir, tmp_path, capfd):
    """Nor anything else that is read."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny().directory, base)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = (base / "model.safetensors").read_bytes()
    plain, into_base = tiny().directory, ["--out", base, "--overwrite"]
    for arguments in (
        ["--model", adapter],
        ["--model", base, "--iti", "directions"],
        ["--model", plain, "--tokenizer", base],
        ["--model", plain, "--iti", base / "directions"],
        ["--model", imae_dir(), "--base", base],
    ):
        assert "is read" in error_of(capfd, convert, "export", *arguments, *into_base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert (base / "model.safetensors").read_bytes() == before


def test_a_plain_model_gets_no_card(tiny, tmp_path, capfd):
    command = ["export", "--model", tiny().directory, "--out", tmp_path / "out"]
    for option in (["--base-model", "org/name"], ["--name", "org/name"], ["--verify"]):
        assert f"{option[0]} goes with an IMAE model" in error_of(capfd, convert, *command, *option)
    assert list(tmp_path.iterdir()) == []


def test_the_generation_config_is_the_bases(tiny, tmp_path, capfd):
    shutil.copytree(tiny().directory, tmp_path / "base")
    settings = {"bos_token_id": 1, "eos_token_id": [2, 5], "do_sample": True, "top_p": 0.9, "pad_token_id": 0}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    output_of(capfd, convert, "export", "--model", tmp_path / "base", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == settings


def test_an_export_is_no_base(exported, imae_dir, tmp_path):
    with user_error("units of its own"):
        load_model(str(imae_dir()), base=str(exported()))


def test_loading_runs_no_code_of_a_directory(exported, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    for path in exported().iterdir():
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())
    trap = tmp_path / "ran"
    for name in ("modeling_imae.py", "configuration_imae.py", "tokenization.py"):
        (directory / name).write_text(f"open({str(trap)!r}, 'w')")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization.Tokenizer", None]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        load_model(str(directory))
    except Exception as error:
        assert "tokenizer" in str(error)
    assert not trap.exists()


# Files


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_models_come_back_byte_for_byte(tiny, tmp_path, capfd, kind, dtype, sharded):
    """Files and their division, too, are the source's."""
    directory = tiny(kind, dtype=dtype, max_shard_size="8KB" if sharded else "1GB").directory
    output_of(capfd, convert, "export", "--model", directory, "--out", tmp_path / "out")
    files = sorted(directory.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    assert [path.name for path in sorted((tmp_path / "out").glob("*.safetensors"))] == [p.name for p in files]
    for path in files:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    if sharded:
        index = "model.safetensors.index.json"
        maps = [json.loads((d / index).read_text())["weight_map"] for d in (directory, tmp_path / "out")]
        assert maps[0] == maps[1]


def test_mixed_dtypes_come_back_byte_for_byte(tmp_path):
    random = np.random.default_rng(0)
    tensors = {
        "b.weight": random.normal(size=(3, 5)).astype(jnp.bfloat16),
        "a.weight": random.normal(size=(7,)).astype(jnp.float16),
        "å.weight": random.normal(size=(2, 3, 4)).astype(np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "c.scalar": np.full((), 1.5, np.float32),
        "a.bias": random.normal(size=(1,)).astype(jnp.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source = SafetensorsSource(tmp_path)
    write_safetensors(tmp_path / "again.safetensors", source, list(source.shapes)[::-1])
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_dtype_and_shard_size_of_an_export(imae_dir, tmp_path, capfd):
    out = tmp_path / "out"
    command = ["export", "--model", imae_dir(), "--out", out, "--dtype", "bfloat16", "--max-shard-gb", 1e-5]
    assert "verified" in output_of(capfd, convert, *command, "--verify")
    assert len(list(out.glob("*.safetensors"))) > 5
    for name, tensor in tensors_of(out).items():
        assert tensor.dtype == (np.float32 if ".anti_expert." in name else jnp.bfloat16)
    assert str(in_transformers(out).dtype) == "torch.bfloat16"
    assert load_model(str(out)).base.dtype == "bfloat16"


def test_an_adapter_is_merged(tiny, tmp_path, capfd):
    """`--model ADAPTER` of PEFT's format, against PEFT's own merge."""
    peft, torch = pytest.importorskip("peft"), import_torch()
    from transformers import AutoModelForCausalLM

    directory = tiny().directory
    hf = AutoModelForCausalLM.from_pretrained(directory)
    model = peft.get_peft_model(hf, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    output_of(capfd, convert, "export", "--model", tmp_path / "adapter", "--out", tmp_path / "merged")
    expected = model.merge_and_unload().state_dict()
    actual = tensors_of(tmp_path / "merged")
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        # Products of rank 4: a few roundings of float32.
        np.testing.assert_allclose(tensor, expected[name].numpy(), rtol=0, atol=1e-6)
    other = tiny("llama2").directory
    wrong = ["export", "--model", tmp_path / "adapter", "--base", other, "--out", tmp_path / "out"]
    assert "another base" in error_of(capfd, convert, *wrong)


# The card


def test_model_card(imae_dir, tmp_path, capfd):
    out = tmp_path / "Model-IMAE"
    command = ["export", "--model", imae_dir(), "--out", out]
    assert "--base-model" in output_of(capfd, convert, *command)
    assert 'from_pretrained("Model-IMAE"' in (out / "README.md").read_text()
    named = ["--name", "org/name", "--base-model", "org/base"]
    assert "--base-model" not in output_of(capfd, convert, *command, *named, "--overwrite")
    import yaml

    _, header, text = (out / "README.md").read_text().split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["base_model"] == "org/base"
    assert header["datasets"] == ["pminervini/HaluEval"]
    assert header["library_name"] == "transformers"
    assert 'from_pretrained("org/name"' in text
    assert str(imae_dir().parent) not in text + (out / "config.json").read_text()


def test_the_cards_snippet_runs(exported):
    card = (exported() / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0].replace('"model"', repr(str(exported())))
    exec(snippet.replace("max_new_tokens=32", "max_new_tokens=3"), {})


# What is verified, and what goes wrong


def turn_one_weight(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] *= -1


def swap_gate(tensors):
    name = "model.layers.2.mlp.anti_expert.gate.bias"
    tensors[name] = np.ascontiguousarray(tensors[name][::-1])


def turn_units(tensors):
    for name in tensors:
        if name.endswith("anti_expert.down_proj.weight"):
            tensors[name] = -tensors[name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [turn_one_weight, swap_gate, turn_units])
def test_a_wrong_tensor_is_found(imae_dir, exported, tmp_path, change, dtype):
    opened = open_model(str(imae_dir("gqa", dtype)))
    # The copy itself is right.
    verify.verify(opened, changed_export(exported("gqa", dtype), tmp_path / "same", lambda tensors: None))
    wrong = changed_export(exported("gqa", dtype), tmp_path / "wrong", change)
    with user_error("does not compute", "in expert mode"):
        verify.verify(opened, wrong)


def test_verification_is_float64(imae_dir, exported):
    """Only RoPE's tables are float32: rounding is far below the limit, and below what float32 gives."""
    for kind, dtype in (("gqa", "float32"), ("gemma3", "float32"), ("gqa", "float16")):
        found = verify.verify(open_model(str(imae_dir(kind, dtype))), exported(kind, dtype))
        assert max(found.difference.values()) < verify.MAX_DIFFERENCE / 50
    assert set(found.kl) == set(MODES)
    assert 0 < max(found.kl.values()) < 1e-5


def test_an_export_that_computes_something_else_is_not_written(imae_dir, tmp_path, capfd, monkeypatch):
    def change_epsilon(hf, opened, mode):
        return original(hf, opened, mode) | {"rms_norm_eps": 1e-3}

    original = export._imae_config
    monkeypatch.setattr(export, "_imae_config", change_epsilon)
    command = ["export", "--model", imae_dir(), "--out", tmp_path / "out"]
    assert "does not compute" in error_of(capfd, convert, *command, "--verify")
    assert list(tmp_path.iterdir()) == []
    assert "verified" not in output_of(capfd, convert, *command)
    command = ["verify", "--model", imae_dir(), "--export", tmp_path / "out"]
    assert "does not compute" in error_of(capfd, convert, *command)


def test_verification_of_the_lowest_layers(imae_dir, exported, tiny, capfd):
    command = ["verify", "--model", imae_dir(), "--export", exported()]
    assert f", {TINY.num_layers} layers" in output_of(capfd, convert, *command)
    assert ", 1 layers" in output_of(capfd, convert, *command, "--layers", 1)
    assert f"give 1 to {TINY.num_layers}" in error_of(capfd, convert, *command, "--layers", 0)
    command = ["verify", "--model", imae_dir(), "--export", tiny().directory]
    assert "no export" in error_of(capfd, convert, *command)
    command = ["verify", "--model", tiny().directory, "--export", exported()]
    assert "only IMAE models" in error_of(capfd, convert, *command)


def test_an_export_of_another_model_is_not_compared(imae_dir, exported, tiny, tmp_path, capfd):
    other = tiny("gqa", vocab_size=TINY.vocab_size + 8, initializer_range=0.2).directory
    write_units(other, tmp_path / "larger")
    trained = changed_export(tiny("gqa", initializer_range=0.2).directory, tmp_path / "base", turn_one_weight)
    write_units(trained, tmp_path / "retrained")
    for model, difference in (("larger", "vocab_size"), ("retrained", "base")):
        command = ["verify", "--model", tmp_path / model, "--export", exported()]
        error = error_of(capfd, convert, *command)
        assert f"exported from another model than {tmp_path / model}: its {difference} is" in error


def test_without_torch_nothing_is_verified(imae_dir, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    command = ["export", "--model", imae_dir(), "--out", tmp_path / "out", "--verify"]
    assert "needs torch" in error_of(capfd, convert, *command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--mode", "hallucinate"], "'hallucinate'"),
        (["--max-shard-gb", "0"], "--max-shard-gb"),
        (["--max-shard-gb", "inf"], "--max-shard-gb"),
        (["--max-shard-gb", "nan"], "--max-shard-gb"),
        (["--iti-alpha", "nan"], "--iti-alpha"),
        (["--iti-heads", "0"], "--iti-heads"),
        (["--revision", "main"], "--revision"),
        (["--dtype", "int8"], "int8"),
        (["--iti", "directions"], "plain model"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(imae_dir, tmp_path, capfd, arguments, part):
    out = tmp_path / "out"
    error = error_of(capfd, convert, "export", "--model", imae_dir(), "--out", out, *arguments)
    assert part.strip("'") in error
    assert list(tmp_path.iterdir()) == []


TERMINATED = """
import os, runpy, signal, sys

def terminate(event, arguments):
    if event == "open" and "/.out." in str(arguments[0]) and "w" in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGTERM)

sys.addaudithook(terminate)
runpy.run_module("imae_jax.convert", run_name="__main__")
"""


@pytest.mark.multiprocess
def test_a_terminated_export_leaves_nothing_behind(imae_dir, tmp_path):
    """The signal comes while it writes its first file."""
    command = ["-c", TERMINATED, "export", "--model", imae_dir(), "--out", tmp_path / "out"]
    process = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert process.returncode == 128 + signal.SIGTERM
    assert process.stderr == "terminated\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="Linux' limits")
def test_a_full_disk_leaves_nothing_behind(imae_dir, tmp_path, capfd):
    """A limit on the size of a file stands for the disk's."""
    import resource

    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        error = error_of(capfd, convert, "export", "--model", imae_dir(), "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be written" in error
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written(imae_dir, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    error = error_of(capfd, convert, "export", "--model", imae_dir(), "--out", tmp_path / "file" / "out")
    assert "cannot be written" in error
    assert (tmp_path / "file").read_text() == "mine"


LIMITED = """
import resource, sys
from imae_jax.convert.__main__ import main
main(["export", "--model", sys.argv[1], "--out", sys.argv[2]])  # all that is loaded once
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]),) * 2)
sys.exit(main(sys.argv[4:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux' limits")
def test_models_larger_than_memory(tiny, tmp_path):
    """192 MiB of tensors in 13 files, and room for 64 MiB beyond what the program itself takes."""
    size = 2**17
    fields = {"intermediate_size": size, "num_hidden_layers": 4}
    small = tiny(**fields | {"intermediate_size": 80})
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (source / name).write_bytes((small.directory / name).read_bytes())
    hf = json.loads((small.directory / "config.json").read_text()) | fields
    (source / "config.json").write_text(json.dumps(hf))
    tensors = load_file(small.directory / "model.safetensors")
    groups = {"model-00001-of-00013.safetensors": {}}
    for name, tensor in tensors.items():
        if ".mlp." in name:
            shape = tuple(size if n == 80 else n for n in tensor.shape)
            file = f"model-{len(groups) + 1:05d}-of-00013.safetensors"
            groups[file] = {name: np.full(shape, len(groups), np.float32)}
        else:
            groups["model-00001-of-00013.safetensors"][name] = tensor
    for file, group in groups.items():
        save_file(group, source / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, group in groups.items() for name in group}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))

    lm = open_model(str(source))
    units = {
        f"model.layers.{i}.mlp.anti_expert.{name}": np.zeros(shape, np.float32)
        for i in range(4)
        for name, shape in {
            "gate.weight": (2, 32),
            "gate.bias": (2,),
            "gate_proj.weight": (8, 32),
            "up_proj.weight": (8, 32),
            "down_proj.weight": (32, 8),
        }.items()
    }
    save_file(units, tmp_path / "units.safetensors")
    unit_source = SafetensorsSource(tmp_path, ["units.safetensors"])
    base = dataclasses.asdict(lm.identified())
    write_imae_dir(tmp_path / "imae", unit_source, lm.config, AntiExpertConfig(8), base=base, training={})
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    room = 64 * 2**20
    assert total > 2.9 * room
    command = ["export", "--model", tmp_path / "imae", "--out", tmp_path / "out"]
    command = [sys.executable, "-c", LIMITED, small.directory, tmp_path / "small", room, *command]
    # A thread's stack and arena take room, too.
    few_threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    environment = os.environ | few_threads | {"XLA_FLAGS": "", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    written = SafetensorsSource(tmp_path / "out")
    name = "model.layers.3.mlp.down_proj.weight"
    assert_bitwise(written.read(name), SafetensorsSource(source).read(name))
    assert len(written.shapes) == len(tensors) + len(units)


# Devices


@pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices")
@pytest.mark.parametrize("stacked", [True, False])
def test_a_sharded_model_is_gathered_tensor_by_tensor(tiny, tmp_path, stacked):
    checkpoint = tiny(vocab_size=96)
    lm = checkpoint.load(stacked=stacked, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    save_hf(lm.model, lm.tokenizer, tmp_path)
    expected = tensors_of(checkpoint.directory)
    for name, tensor in tensors_of(tmp_path).items():
        assert_bitwise(tensor, expected[name])


PROCESS = """
import sys
from pathlib import Path
from imae_jax import distributed
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from imae_jax.convert import load_model
from imae_jax.convert.hf import save_hf
from imae_jax.sharding import make_mesh
from imae_jax.train.__main__ import main as train
with distributed.end_together():
    lm = load_model(sys.argv[3], stacked=True, mesh=make_mesh(fsdp=2, tensor=2))
    assert not lm.model.embed[...].is_fully_addressable
    save_hf(lm.model, lm.tokenizer, Path(sys.argv[4]), max_shard_bytes=20_000)
    distributed.barrier("written")
"""


@pytest.mark.multiprocess
def test_the_main_process_writes_what_others_hold(tiny, tmp_path):
    checkpoint = tiny(vocab_size=96)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", PROCESS, address]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(checkpoint.directory), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    expected, actual = tensors_of(checkpoint.directory), tensors_of(tmp_path)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_bitwise(tensor, expected[name])
    assert load_model(str(tmp_path)).config == checkpoint.load().config


# The documentation


@pytest.mark.docs
def test_commands_and_snippets_of_the_documentation_run(run, tmp_path, monkeypatch, capfd):
    """In their order."""
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    shutil.copytree(run, tmp_path / "out" / "first")
    monkeypatch.chdir(tmp_path)
    mains = {"imae_jax.convert": convert, "imae_jax.generate": generate}
    for line in "".join(blocks(text, "bash")).splitlines():
        program, option, module, *arguments = shlex.split(line)
        assert (program, option) == ("python", "-m")
        output_of(capfd, mains[module], *arguments)
    for snippet in blocks(text, "python"):
        exec(snippet, {})
