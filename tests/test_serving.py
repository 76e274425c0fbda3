"""Exports where others build the model: a bare `AutoModel`, several processes, vLLM."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    FAMILIES,
    UNIT_SIZE,
    assert_bitwise,
    error_of,
    import_torch,
    in_transformers,
    log_softmax,
    logits,
    random_tokens,
)
from helpers.checkpoints import changed_export, tensors_of
from helpers.documents import ROOT, blocks, run_commands

from imae_jax import decode
from imae_jax.anti_expert import MODES, parse_mode
from imae_jax.convert import load_model
from imae_jax.convert.__main__ import main as convert
from imae_jax.llama import Interventions, forward

PARITY = 2e-4
UP_PROJ = "model.layers.1.mlp.anti_expert.up_proj.weight"
# Its attention on CPU has few head sizes.
VLLM_SIZES = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], [40, 2, 61, 17, 33, 8]]


def bare_model(directory: Path, **overrides):
    """As vLLM builds it: from the config alone, with weights by their names."""
    torch = import_torch()
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(directory, trust_remote_code=True, **overrides)
    model = AutoModel.from_config(config, trust_remote_code=True)
    own = {
        name.removeprefix("model."): torch.as_tensor(tensor)
        for name, tensor in tensors_of(directory).items()
        if name != "lm_head.weight"
    }
    model.load_state_dict(own)
    return model.eval()


def hidden_states(hf, tokens):
    import torch

    with torch.no_grad():
        return hf(input_ids=torch.as_tensor(tokens)).last_hidden_state.numpy()


@pytest.mark.parametrize("kind", ["gqa", "tied", "qwen2", *FAMILIES])
def test_a_bare_model_runs_in_the_mode_of_its_config(exported, kind):
    directory, tokens = exported(kind), random_tokens(2, 9)
    lm = load_model(str(directory))
    found = {}
    for mode, strength in [*MODES.items(), (-0.5, -0.5)]:
        found[mode] = hidden_states(bare_model(directory, mode=mode), tokens)
        interventions = Interventions(strength=strength)
        expected = forward(lm.model.weights(), lm.config, jnp.asarray(tokens), interventions=interventions)
        np.testing.assert_allclose(found[mode], expected.hidden_states, rtol=0, atol=PARITY)
    assert_bitwise(hidden_states(bare_model(directory), tokens), found["expert"])
    assert all(np.abs(found[mode] - found["base"]).max() > 0.01 for mode in ("expert", "anti-expert"))


def test_the_mode_that_an_export_was_given(exported):
    directory, tokens = exported("gqa", "float32", "--mode", "base"), random_tokens(2, 9)
    expected = hidden_states(bare_model(exported(), mode="base"), tokens)
    assert_bitwise(hidden_states(bare_model(directory), tokens), expected)


def mode_adapter(directory: Path, mode: str, out: Path) -> Path:
    assert convert(["mode", "--model", str(directory), "--mode", mode, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("own", ["expert", "0.5"])
def test_an_adapter_puts_an_export_into_another_mode(exported, tmp_path, own):
    """In PEFT, which knows nothing of modes."""
    torch, peft = import_torch(), pytest.importorskip("peft")
    directory, tokens = exported("gqa", "float32", "--mode", own), random_tokens(2, 9)
    for mode, strength in {**MODES, "-0.5": -0.5}.items():
        hf = in_transformers(directory)
        with torch.no_grad():
            expected = hf(torch.as_tensor(tokens), mode=strength).logits.numpy()
            adapted = peft.PeftModel.from_pretrained(hf, mode_adapter(directory, mode, tmp_path / mode))
            found = adapted(torch.as_tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=PARITY)


def test_models_that_no_mode_adapter_fits(exported, imae_dir, tmp_path, capfd):
    command = ["mode", "--mode", "base", "--out", tmp_path / "out", "--model"]
    assert "made for an export" in error_of(capfd, convert, *command, imae_dir())
    base = exported("gqa", "float32", "--mode", "base")
    assert "runs no units, so no adapter acts" in error_of(capfd, convert, *command, base)
    command[2] = "hallucinate"
    assert "mode 'hallucinate' does not exist" in error_of(capfd, convert, *command, exported())
    assert not (tmp_path / "out").exists()


TENSOR_PARALLEL = """
import sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, tp_size=2)
unit = model.model.layers[0].mlp.anti_expert
local = [tuple(layer.weight.to_local().shape) for layer in (unit.gate_proj, unit.up_proj, unit.down_proj)]
with torch.no_grad():
    logits = {mode: model(torch.as_tensor(np.load(sys.argv[2])), mode=mode).logits for mode in sys.argv[4:]}
if torch.distributed.get_rank() == 0:
    np.savez(sys.argv[3], local=local, **{mode: x.numpy() for mode, x in logits.items()})
torch.distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_tensor_parallelism_of_two_processes(exported, tmp_path):
    """transformers', with gloo: every process has half of each unit."""
    directory, tokens = exported("gqa", "float32", vocab_size=98), random_tokens(2, 9)
    np.save(tmp_path / "tokens.npy", tokens)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    command = [
        sys.executable,
        "-c",
        TENSOR_PARALLEL,
        directory,
        tmp_path / "tokens.npy",
        tmp_path / "out.npz",
        *MODES,
    ]
    environment = os.environ | address | {"WORLD_SIZE": "2", "HF_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            env=environment | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert not any("not applied" in error for error in errors), errors
    found, hf = np.load(tmp_path / "out.npz"), in_transformers(directory)
    hidden_size, half = hf.config.hidden_size, UNIT_SIZE // 2
    assert found["local"].tolist() == [[half, hidden_size], [half, hidden_size], [hidden_size, half]]
    import torch

    for mode in MODES:
        with torch.no_grad():
            expected = hf(torch.as_tensor(tokens), mode=mode).logits.numpy()
        np.testing.assert_allclose(found[mode], expected, rtol=0, atol=PARITY)


# Exports that are not whole


def drop_one(tensors):
    del tensors[UP_PROJ]


def widen_one(tensors):
    tensors[UP_PROJ] = np.concatenate([tensors[UP_PROJ]] * 2)


@pytest.mark.parametrize("change", [drop_one, widen_one])
@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForCausalLM"])
def test_units_that_do_not_fit_are_refused(exported, tmp_path, auto_class, change):
    """transformers would run them with random weights."""
    import transformers

    directory = changed_export(exported(), tmp_path / "model", change)
    load = getattr(transformers, auto_class).from_pretrained
    with pytest.raises(ValueError, match=r"weights are missing or do not fit the config: .*up_proj"):
        load(directory, trust_remote_code=True, ignore_mismatched_sizes=True)
    model, info = load(exported(), trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__.startswith("ImaeLlama")
    assert not info["missing_keys"]


def test_a_unit_loads_whole_or_not_at_all(exported):
    """What vLLM asks of a unit, without vLLM."""
    torch = import_torch()
    tensors = tensors_of(exported())
    prefix = UP_PROJ.removesuffix("up_proj.weight")
    own = {n.removeprefix(prefix): torch.as_tensor(t) for n, t in tensors.items() if n.startswith(prefix)}

    def unit():
        return bare_model(exported()).layers[0].mlp.anti_expert

    *most, last = own.items()
    filled = unit()
    assert list(filled.load_weights(most)) == []
    assert sorted(filled.load_weights([last])) == sorted(own)
    for name, parameter in filled.named_parameters():
        assert torch.equal(parameter, own[name])
    for name, tensor in own.items():
        with pytest.raises(ValueError, match=rf"{name} has shape \[.*config.json"):
            unit().load_weights([(name, torch.cat([tensor] * 2))])


@pytest.mark.parametrize("mode", ["hallucinate", True, None, float("inf")])
def test_a_mode_that_does_not_exist(exported, tmp_path, mode):
    shutil.copytree(exported(), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mode": mode}))
    with pytest.raises(ValueError, match=f"mode {mode!r} does not exist: use expert"):
        bare_model(tmp_path / "model")
    with pytest.raises(ValueError, match=f"mode {mode!r} does not exist: use expert"):
        in_transformers(tmp_path / "model")


# vLLM


@pytest.fixture(scope="module")
def vllm_python():
    python = os.environ.get("VLLM_PYTHON")
    if python is None:
        pytest.skip("vLLM runs with a Python of its own: VLLM_PYTHON names none")
    return python


def vllm_environment(directory: Path) -> dict[str, str]:
    """Processes may share a core here, where vLLM binds each to one of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return environment | cpu | {"HF_HOME": str(directory), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def in_vllm(vllm_python, tmp_path_factory):
    """Runs jobs of `helpers/vllm_side.py`, all in one process."""

    def run(jobs):
        directory = tmp_path_factory.mktemp("vllm")
        (directory / "jobs.json").write_text(json.dumps(jobs))
        script = Path(__file__).parent / "helpers" / "vllm_side.py"
        command, environment = [vllm_python, script, "jobs.json", "results.json"], vllm_environment(directory)
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads((directory / "results.json").read_text())

    return run


def job(directory, prompts=PROMPTS, engine=None, adapters=(), **overrides):
    return {
        "model": str(directory),
        "overrides": overrides,
        "prompts": prompts,
        "max_tokens": 12,
        "engine": engine or {},
        "adapters": list(map(str, adapters)),
    }


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["gqa", "tied", "qwen2", "qwen2_tied", *FAMILIES])
def test_vllm_computes_what_this_library_does(exported, in_vllm, kind):
    directory, base = (exported(kind, "float32", "--mode", mode, **VLLM_SIZES) for mode in ("expert", "base"))
    jobs = {
        "expert": job(directory),
        "base": job(base),
        "anti-expert": job(directory, mode="anti-expert"),
    }
    results = dict(zip(jobs, in_vllm(list(jobs.values())), strict=True))
    lm, scores = load_model(str(directory)), {}
    for mode, result in results.items():
        models, method = lm.prepare(mode, generating=True)
        expected = decode.generate(
            models, lm.config, PROMPTS, method=method, max_new_tokens=12, eos_token_ids=lm.eos_token_ids
        )
        assert result["tokens"] == expected
        scores[mode] = np.concatenate(result["logprobs"])
        expected = [prompt_logprobs(lm, row, MODES[mode]) for row in PROMPTS]
        np.testing.assert_allclose(scores[mode], np.concatenate(expected), rtol=0, atol=2e-3)
    assert np.abs(scores["expert"] - scores["base"]).max() > 0.01
    assert np.abs(scores["anti-expert"] - scores["base"]).max() > 0.01


def prompt_logprobs(lm, row, strength):
    scores = log_softmax(logits(lm.model.weights(), lm.config, np.asarray([row]), strength=strength))[0]
    return scores[np.arange(len(row) - 1), row[1:]]


@pytest.mark.vllm
@pytest.mark.multiprocess
def test_vllm_divides_units_among_two_processes(exported, in_vllm):
    directory = exported("tied", "float32", **VLLM_SIZES)
    whole, halves = in_vllm([job(directory), job(directory, engine={"tensor_parallel_size": 2})])
    assert halves["tokens"] == whole["tokens"]
    np.testing.assert_allclose(*(np.concatenate(x["logprobs"]) for x in (halves, whole)), rtol=0, atol=2e-3)


@pytest.mark.vllm
def test_every_request_has_a_mode_of_its_own(exported, in_vllm, tmp_path):
    """Requests of one batch; an adapter whose mode is the config's is there, too."""
    directory = exported("qwen2", "float32", **VLLM_SIZES)
    modes = [*MODES, "0.5"]
    adapters = [mode_adapter(directory, mode, tmp_path / mode) for mode in modes]
    prompt = PROMPTS[0]
    engine = {"enable_lora": True, "max_loras": len(modes), "max_lora_rank": 32}
    [result] = in_vllm([job(directory, [prompt] * len(modes), engine, adapters)])
    lm = load_model(str(directory))
    for mode, tokens, scores in zip(modes, result["tokens"], result["logprobs"], strict=True):
        models, method = lm.prepare(mode, generating=True)
        expected = decode.generate(
            models, lm.config, [prompt], method=method, max_new_tokens=12, eos_token_ids=lm.eos_token_ids
        )
        assert [tokens] == expected
        np.testing.assert_allclose(scores, prompt_logprobs(lm, prompt, parse_mode(mode)), rtol=0, atol=2e-3)


@pytest.mark.vllm
def test_vllm_refuses_what_does_not_fit(exported, in_vllm, tmp_path):
    """Its own loaders would leave a missing matrix as it was allocated, and cut a wide one."""
    whole = exported("qwen2", "float32", **VLLM_SIZES)
    expected = {
        "not initialized from checkpoint": job(changed_export(whole, tmp_path / "missing", drop_one)),
        "as config.json says": job(changed_export(whole, tmp_path / "wide", widen_one)),
        "down_proj.weight has shape": job(whole, anti_expert_intermediate_size=UNIT_SIZE // 2),
        "does not exist": job(whole, mode="hallucinate"),
    }
    for part, result in zip(expected, in_vllm(list(expected.values())), strict=True):
        assert part in result.get("error", "no error"), part


@contextlib.contextmanager
def vllm_server(python, command: str, directory: Path):
    """Runs a `vllm serve …` of the documentation, in float32; yields its port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    module = "vllm.entrypoints.openai.api_server"  # `vllm serve` of vllm-cpu 0.32 finds no version of vllm
    more = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--port", str(port)]
    arguments = ["--model", *shlex.split(command.replace("\\\n", " "))[2:], *more]
    with open(directory / "server.log", "w") as log:
        server = subprocess.Popen(
            [python, "-m", module, *arguments],
            cwd=directory,
            env=vllm_environment(directory),
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(300):
            time.sleep(1)
            assert server.poll() is None, (directory / "server.log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health"):
                break
        yield port
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.vllm
@pytest.mark.docs
def test_servers_of_the_documentation_answer_in_their_modes(smollm2, vllm_python, tmp_path):
    """Each as docs/serving.md starts it, asked by its client and by its curl."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    run_commands(text, tmp_path)
    [curl] = [block for block in blocks(text, "sh") if block.startswith("curl")]
    [snippet] = blocks(text, "python")

    def output(program, script, mode, port):
        script = script.replace("8000", str(port)).replace('"expert"', f'"{mode}"')
        command, environment = [*program, "-c", script], vllm_environment(tmp_path)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    lm, asked = load_model("imae-smollm2-135m"), []
    for command in [block for block in blocks(text, "sh") if block.startswith("vllm serve")]:
        modes = re.findall(r" (\S+)=out/modes/", command) or re.findall(r"served-model-name (\S+)", command)
        with vllm_server(vllm_python, command, tmp_path) as port:
            for mode in modes:
                prompts = ["How many legs does a spider have?"]
                [expected] = lm.generate(prompts, mode, format="chat", max_new_tokens=32)
                assert output([vllm_python], snippet, mode, port) == expected
                [choice] = json.loads(output(["bash"], curl, mode, port))["choices"]
                assert choice["message"]["content"].startswith(expected)
                asked.append(mode)
    assert asked == ["expert", "base", "expert", "base"]
