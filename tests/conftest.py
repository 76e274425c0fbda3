"""What the tests share: 8 virtual CPU devices, the real model, and random tiny models.

A reference value comes from transformers or from a few lines of NumPy in the test itself.
"""

import os

# Of a flag given twice the last one counts: the user's own.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import contextlib
import csv
import ctypes
import dataclasses
import functools
import gc
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from imae_jax.config import AntiExpertConfig, LlamaConfig, RopeConfig
from imae_jax.convert import LanguageModel, load_model
from imae_jax.convert.__main__ import main as convert
from imae_jax.convert.hf import save_hf
from imae_jax.convert.hf_tokenizer import write_tokenizer
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.convert.references import BUILT_IN
from imae_jax.errors import UserError
from imae_jax.evaluate.truthfulqa import main as truthfulqa
from imae_jax.llama import Interventions, Llama, Options, Taps, Weights, forward, project
from imae_jax.tokenizer import Tokenizer

# What plug-ins say of missing drivers when JAX starts is no test's output.
jax.devices()

# As for users, whose path does not begin with the checkout: there `evaluate` is HuggingFace's package.
sys.path.sort(key=lambda entry: Path(entry).resolve() == Path(__file__).resolve().parents[1])

SMOLLM2 = "smollm2-135m-instruct"

# Sizes differ from each other, so that a swapped axis cannot pass; head_dim is not D / N.
TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=5e5),
    initializer_range=0.3,
)
# Gemma 3's parts, with windows shorter than the tests' texts; sizes that a mesh divides.
TINY_GEMMA = dataclasses.replace(
    TINY,
    vocab_size=96,
    tie_word_embeddings=True,
    activation="gelu_pytorch_tanh",
    qk_norm=True,
    post_norms=True,
    norm_plus_one=True,
    scaled_embedding=True,
    query_pre_attn_scalar=20,
    sliding_window=5,
    sliding_layers=(True, False, True),
    local_rope=RopeConfig(theta=1e3),
)
UNIT_SIZE = 24
EVEN_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 98}

# Every kind of checkpoint that can be loaded, as the fields of its HuggingFace config.
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "llama2": {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "rope_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "rope_dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "rope_llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    # Windows shorter than the tests' texts; layers of both kinds, but in Mistral.
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3": {"model_type": "qwen3"},
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 20,
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        "rope_local_base_freq": 1e3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
}
FAMILIES = ["mistral", "qwen2_window", "qwen3", "gemma3"]


TIERS = ("slow", "compile", "docs", "browser", "multiprocess", "vllm")
# Tests that use these fixtures are of these tiers.
FIXTURE_TIERS = {"browser": "browser", "hf_smollm2": "slow"}


@pytest.hookimpl(tryfirst=True)  # Before markers select tests.
def pytest_collection_modifyitems(items):
    for item in items:
        for fixture in FIXTURE_TIERS.keys() & set(item.fixturenames):
            item.add_marker(FIXTURE_TIERS[fixture])


def pytest_terminal_summary(terminalreporter, config):
    left_out = [tier for tier in TIERS if f"not {tier}" in config.option.markexpr]
    if left_out:
        terminalreporter.write_line(
            f"left out: tests marked {', '.join(left_out)}. All tests: make test-all; one of these tiers: "
            f".venv/bin/python -m pytest -m {left_out[0]}"
        )


@pytest.fixture
def without_program_cache():
    """Programs for devices that are not there cannot be read back from it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """They would fill the memory, and the 65,530 memory maps of a process, above which XLA crashes."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":  # What compilers leave is in pieces, which glibc keeps: gigabytes.
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with the benchmark's data and the reference scores, beside the checkout."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("there is no directory ../shared beside the checkout")
    return path


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    package = BUILT_IN[SMOLLM2]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    return load_model(SMOLLM2)


@pytest.fixture(scope="session")
def smollm2_hf_dir(smollm2, tmp_path_factory) -> Path:
    """SmolLM2 as this project exports it to HuggingFace's format."""
    directory = tmp_path_factory.mktemp("smollm2")
    save_hf(smollm2.model, smollm2.tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def hf_smollm2(smollm2_hf_dir):
    """SmolLM2 in transformers, float32; test_convert holds its weights against the GGUF file's."""
    import_torch()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_hf_dir, attn_implementation="eager").eval()


@dataclasses.dataclass(frozen=True)
class TinyCheckpoint:
    """A random model in transformers, and the directory that transformers saved it to."""

    hf: Any
    directory: Path

    def load(self, **kwargs) -> LanguageModel:
        return load_model(str(self.directory), **kwargs)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Factory of `TinyCheckpoint`s; equal calls share one, so tests must not write into it."""
    torch = import_torch()

    @functools.cache
    def make(kind="gqa", *, dtype="float32", max_shard_size="1GB", seed=0, **fields):
        hf = random_hf_model(torch, KINDS[kind] | fields, seed)
        for parameter in hf.parameters():  # not `hf.to`, which casts RoPE's frequencies as well
            parameter.data = parameter.data.to(getattr(torch, dtype))
        directory = tmp_path_factory.mktemp(kind)
        hf.save_pretrained(directory, max_shard_size=max_shard_size)
        write_tokenizer(word_tokenizer(hf.config.vocab_size), directory)
        return TinyCheckpoint(hf, directory)

    return make


def import_torch():
    torch = pytest.importorskip("torch")
    # Its threads spin while they wait for each other, which on a busy machine takes many times longer.
    torch.set_num_threads(1)
    import transformers

    transformers.utils.logging.disable_progress_bar()  # In standard error, where tests read errors.
    return torch


def random_hf_model(torch, fields: dict[str, Any], seed: int):
    """A model with every weight random: norms are not ones, biases not zeros."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = TINY.to_hf() | {"architectures": None} | fields
    model_type = fields.pop("model_type")
    if "rope_parameters" in fields:
        fields = {k: v for k, v in fields.items() if k not in ("rope_theta", "rope_scaling")}
    config = AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
    return model


def hf_logits(hf, tokens: np.ndarray, **kwargs) -> np.ndarray:
    import torch

    kwargs = {name: torch.as_tensor(np.asarray(value)) for name, value in kwargs.items()}
    with torch.no_grad():
        return hf(torch.as_tensor(np.asarray(tokens)), **kwargs).logits.float().numpy()


def word_tokenizer(vocab_size: int, chat_template: str | None = None) -> Tokenizer:
    """A tokenizer whose text for token 7 is "t7"."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer.add_special_tokens(list(special.values()))
    templates = {} if chat_template is None else {"default": chat_template}
    return Tokenizer(tokenizer, special, templates, config={"chat_template": chat_template})


def tiny_llama(
    config: LlamaConfig = TINY, *, units: bool = False, stacked: bool = False, seed: int = 0
) -> Llama:
    """A model of this library with every weight random, its units' too."""
    anti_expert = AntiExpertConfig(UNIT_SIZE) if units else None
    shapes = nnx.eval_shape(lambda: Llama(config, anti_expert, rngs=nnx.Rngs(0), stacked=stacked))
    graphdef, state = nnx.split(shapes)
    random = np.random.default_rng(seed)

    def draw(path, x):
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(random.normal(mean, 0.3, x.shape), x.dtype)

    return nnx.merge(graphdef, jax.tree.map_with_path(draw, state))


def with_random_units(weights: Weights, config: LlamaConfig, size: int = UNIT_SIZE) -> Weights:
    """Weights with units of standard deviation 0.1, in the same form (stacked or not)."""
    stacked = isinstance(weights.base["layers"], dict)
    D, L = config.hidden_size, config.num_layers
    shapes = {
        "gate": (D, 2),
        "gate_bias": (2,),
        "w_gate": (D, size),
        "w_up": (D, size),
        "w_down": (size, D),
    }
    random = np.random.default_rng(0)
    units = {
        name: jnp.asarray(random.normal(0, 0.1, (L, *shape)), jnp.float32) for name, shape in shapes.items()
    }
    if not stacked:
        units = tuple({name: array[i] for name, array in units.items()} for i in range(L))
    return dataclasses.replace(weights, units=units)


def stack(weights: Weights) -> Weights:
    """The stacked form of weights with an array per layer."""

    def stack_layers(layers):
        return None if layers is None else jax.tree.map(lambda *x: jnp.stack(x), *layers)

    base = weights.base | {"layers": stack_layers(weights.base["layers"])}
    return Weights(base, stack_layers(weights.units))


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = TINY.vocab_size) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab_size, shape)


_jit_forward = jax.jit(forward, static_argnames=("config", "options"))


def jit_forward(
    weights,
    config,
    tokens,
    *,
    taps=Taps(),
    remat="none",
    strength=None,
    adapter=None,
    shift=None,
    steer=None,
    keep_norm=None,
    **kwargs,
):
    interventions = Interventions(strength, adapter, shift, steer, keep_norm)
    options = Options(taps, remat)
    return _jit_forward(weights, config, tokens, interventions=interventions, options=options, **kwargs)


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def _logits(weights, config, tokens, **kwargs):
    return project(weights, jit_forward(weights, config, tokens, **kwargs).hidden_states)


def logits(weights: Weights, config: LlamaConfig, tokens: np.ndarray, **kwargs) -> np.ndarray:
    return np.asarray(_logits(weights, config, jnp.asarray(tokens), **kwargs))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def assert_bitwise(actual: Any, expected: Any) -> None:
    """Equal in every bit: -0 is not 0."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = f"u{actual.dtype.itemsize}"
    actual, expected = (np.ascontiguousarray(x).view(bits) for x in (actual, expected))
    different = np.count_nonzero(actual != expected)
    assert different == 0, f"{different} of {actual.size} values differ"


@contextlib.contextmanager
def user_error(*parts: str):
    """Expects a `UserError` of one line that names all of `parts`."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert str(part) in message


def with_changes(command: Sequence[Any], **changes) -> list[Any]:
    """Arguments of a command with other values after its `--name`s."""
    command = [*command]
    for name, value in changes.items():
        command[command.index(f"--{name.replace('_', '-')}") + 1] = value
    return command


def error_of(capfd, command: Callable[..., int], *arguments: Any) -> str:
    """The one line with which a command refuses its arguments; warnings may come before it."""
    capfd.readouterr()
    assert command([*map(str, arguments)]) == 2
    *warnings, error = capfd.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert all(line.startswith("warning: ") for line in warnings), warnings
    return error


def output_of(capfd, command: Callable[..., int], *arguments: Any) -> str:
    assert command([*map(str, arguments)]) == 0
    return capfd.readouterr().out


def run_python(arguments, directory: Path) -> subprocess.CompletedProcess:
    """Runs Python as a user would: on the machine's own devices."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def checkpoint(tiny):
    """A tiny model whose widths 2 divides, as mesh axes need."""
    return tiny("gqa", initializer_range=0.2, **EVEN_SIZES)


def write_rows(path: Path, count: int = 12) -> Path:
    """HaluEval QA rows in the words of the tiny tokenizer."""
    random = np.random.default_rng(0)

    def words(n):
        return " ".join(f"t{i}" for i in random.integers(3, TINY.vocab_size, n))

    lines = [
        {"question": words(5), "right_answer": words(3), "hallucinated_answer": words(3 + i % 4)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def settings(checkpoint, tmp_path):
    """A run of 8 steps as `key=value` settings."""
    rows = write_rows(tmp_path / "rows.jsonl")
    return [
        f"model={checkpoint.directory}",
        f"out={tmp_path / 'run'}",
        f"data.source={rows}",
        "batch_size=8",
        "optimizer.steps=8",
        "optimizer.warmup_steps=2",
        "save_every=3",
        "units.intermediate_size=24",
    ]


@pytest.fixture(scope="session")
def tiny_imae(tiny, tmp_path_factory) -> TinyCheckpoint:
    """A tiny model with random units, and room for prompts."""
    base = tiny("gqa", initializer_range=0.2, max_position_embeddings=512)
    lm, path = base.load(), tmp_path_factory.mktemp("imae") / "imae"
    weights = with_random_units(lm.model.weights(), lm.config)
    reference = dataclasses.asdict(lm.base)
    write_imae_dir(path, weights, lm.config, AntiExpertConfig(UNIT_SIZE), base=reference, training={})
    return TinyCheckpoint(base.hf, path)


@pytest.fixture(scope="session")
def own_module_cache(tmp_path_factory):
    """transformers copies the code of a model that it trusts."""
    import_torch()
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="session")
def imae_dir(tiny, tmp_path_factory):
    """Factory of IMAE directories with random units."""

    @functools.cache
    def make(kind="gqa", dtype="float32", **fields) -> Path:
        directory = tiny(kind, dtype=dtype, initializer_range=0.2, **fields).directory
        return write_units(directory, tmp_path_factory.mktemp("imae") / f"{kind}-{dtype}")

    return make


def write_units(base: Path, path: Path) -> Path:
    """An IMAE directory with random units."""
    lm = load_model(str(base))
    write_imae_dir(
        path,
        with_random_units(lm.model.weights(), lm.config),
        lm.config,
        AntiExpertConfig(UNIT_SIZE),
        base=dataclasses.asdict(lm.base),
        training={"config": {"data": {"source": "halueval"}, "loss": {"beta": 2.0}}},
    )
    return path


@pytest.fixture(scope="session")
def exported(imae_dir, own_module_cache, tmp_path_factory):
    """Factory of exports; tests must not write into them."""

    @functools.cache
    def make(kind="gqa", dtype="float32", *arguments, **fields) -> Path:
        out = tmp_path_factory.mktemp("export") / "model"
        command = ["export", "--model", str(imae_dir(kind, dtype, **fields)), "--out", str(out)]
        assert convert([*command, *arguments]) == 0
        return out

    return make


def in_transformers(directory, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **kwargs).eval()


def write_questions(path: Path, count: int = 6, seed: int = 0) -> Path:
    """A CSV in TruthfulQA's form, in the words of the tiny tokenizer: two true and two false answers."""
    random = np.random.default_rng(seed)

    def words(n):
        # Of a full stop the tokenizer makes an unknown word.
        return " ".join(f"t{i}" for i in random.integers(3, TINY.vocab_size, n)) + " ."

    with path.open("w", newline="") as file:
        columns = ("Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for i in range(count):
            true, false = ([words(n), words(n + i % 2)] for n in (2, 3))
            cells = (("one", "two")[i % 2], words(5), true[0], "; ".join(true), "; ".join(false))
            writer.writerow(dict(zip(columns, cells, strict=True)))
    return path


@pytest.fixture(scope="session")
def scored(tiny_imae, tmp_path_factory) -> tuple[list[Any], Path]:
    """A finished TruthfulQA run of a tiny model: its arguments and its directory, not to be changed."""
    directory = tmp_path_factory.mktemp("scored")
    (directory / "primer.txt").write_text("Q: t3 t4\nA: t5 .\n\n")
    out = directory / "out"
    methods = "base,expert,anti-expert,in-model-contrast:renormalize=true,in-model-contrast"
    command = ["--model", tiny_imae.directory, "--methods", methods, "--out", out, "--any-data"]
    command += ["--data", write_questions(directory / "questions.csv"), "--primer", directory / "primer.txt"]
    assert truthfulqa([*map(str, command), "--quiet"]) == 0
    return command, out


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A session of the system's chromium, which logs what a page writes and asks for."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver and importlib.util.find_spec("selenium")):
        pytest.skip("chromium, chromedriver or the package selenium is not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
        *("disable-dev-shm-usage", "disable-background-networking", "disable-component-update"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
        "window-size=1280,1000",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=Service(driver))
    session.get("about:blank")  # A new tab's own page fetches parts of the browser.
    yield session
    session.quit()


def losses_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
