"""ms per train step, model FLOPs utilization (MFU) and memory; of objective `paper` against torch.

SmolLM2 on a CPU; and sizes of Llama-2-7B on one H200 (target: at least 45 % MFU, at most 60 GB):

    python benchmarks/train_step.py
    python benchmarks/train_step.py --objective pairs --batch-size 4
    python benchmarks/train_step.py --shapes meta-llama/Llama-2-7b-chat-hf --dtype bfloat16 --batch-size 24 \\
        --length 256 --remat full --attention flash

A step is what `train/step.py` compiles for an objective: the base mode without gradient (of `pairs` with
its adapters beside), anti-expert and expert mode as one doubled batch, gradients of the units alone, AdamW;
of `adapter`, stage 1, the LoRA alone. Of `pairs` and `preference` the batch is of questions, each a token
tree of a prompt, half of `--length`, and two answers of the other half; a run merges more where prompts
begin alike. The peer, of `paper` alone, is the same step with transformers' model, run eagerly (sdpa
attention): units hooked onto the MLPs, the vocabulary projected at T_fact only, frozen base, fused AdamW;
`--remat` is for both. Needs torch (`pip install -e '.[test]'`).

Each side runs in a process and on one device of its own. The first step is left out of the times, which are
medians of `--repeats`; compiling is not served by a cache. Tokens are random, every row has `--length`, and
tokens/s counts each row once, though a step runs it in several modes. Peak memory is the device's, with what
initializing took, or on a CPU the whole process's, libraries, loading and compiling included.

With `--model` both sides start from the same weights and units, and in float32 their first losses and
gradient norms must agree to 1e-4, or the script fails: both compute the same. With `--shapes` each side
draws weights of its own.

On a CPU the machine must be idle: among other processes torch's threads, which spin while they wait for each
other, take many times longer. `CPU cores used` below the number of cores tells that a side had to share.

MFU = FLOPs / (time · peak), where FLOPs are what the mathematics of a step needs. Recomputation does not
count. With N tokens, M positions of T_fact, P_base and P_unit parameters in the matrices of the layers and of
what is trained, L layers of heads that are N_h · H wide together, T tokens a row; F modes without a gradient
(1; of `pairs` 3, whose adapters are left out; of `adapter` 0) and G with one (2; of `adapter` 1):

    forward without gradient                          2 · P_base · F · N
    forward with it                                   2 · (P_base + P_unit) · G · N
    backward through activations                      2 · (P_base + P_unit) · G · N
    gradients of what is trained                      2 · P_unit · G · N
    vocabulary, forward and backward                  2 · D · V · (F + G + G) · M
    L_keep, where there is one, on all tokens         2 · D · V · (1 + G + G) · N
    attention: 4 · L · N_h · H · T a token forward,
      twice that backward                             4 · L · N_h · H · T · (F + G + 2 · G) · N

Attention is counted without the causal half off, and the backward pass down to the embeddings, though nothing
needs it below the lowest unit.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# JAX and torch are imported in the functions of their side: what is imported here counts in both peaks, since
# a process starts with the peak of the one that started it.
MATMUL_SIZE, MATMUL_REPEATS = 2048, 10
TOLERANCE = 1e-4
OURS, PEER = "imae_jax", "torch"
OBJECTIVES = ("paper", "pairs", "preference", "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shapes", help="reference of a model whose sizes random weights have, see --model")
    parser.add_argument("--objective", default="paper", choices=OBJECTIVES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--facts", type=int, help="positions of T_fact a row (default: length / 4)")
    parser.add_argument("--unit-size", type=int, help="width of the units (default: the paper's ratio)")
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    parser.add_argument("--attention", default="plain", choices=("plain", "flash"), help="imae_jax's")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peak-tflops", type=float, help="of the device, for the MFU (default: its data sheet's)"
    )
    parser.add_argument("--no-peer", action="store_true", help="imae_jax alone")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--exchange", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.facts is None:
        args.facts = args.length // 4
    if not 1 <= args.facts < args.length:
        parser.error(f"--facts {args.facts} must be between 1 and {args.length - 1}")
    if args.batch_size % args.accumulation:
        parser.error(f"--accumulation {args.accumulation} does not divide --batch-size {args.batch_size}")
    args.no_peer |= args.objective != "paper"
    if args.attention == "flash" and trees(args):
        parser.error(f"--objective {args.objective} is measured with token trees, which flash does not take")
    if args.side:
        result = SIDES[args.side](args)
        (args.exchange / f"{args.side}.json").write_text(json.dumps(result))
        return

    with tempfile.TemporaryDirectory() as directory:
        model = run_side("model", directory)
        ours = run_side(OURS, directory)
        peer = None if args.no_peer else run_side(PEER, directory, required=False)
    for figures in (ours, peer):
        if figures:
            seconds = figures["ms_per_step"] / 1e3
            figures["tokens_per_s"] = num_tokens(args) / seconds
            figures["mfu"] = ours["peak_tflops"] and model["flops"] / seconds / (ours["peak_tflops"] * 1e12)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("side", "exchange")}
        args.json.write_text(json.dumps(settings | model | {OURS: ours, PEER: peer}, default=str, indent=2))
    report(args, model, ours, peer)


def run_side(side: str, exchange: str, required: bool = True) -> dict[str, Any] | None:
    """Runs this script for one side; without a result it ends, or gives None."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--exchange", exchange]
    code = subprocess.run(command).returncode
    if code and required:
        sys.exit(code)
    return None if code else json.loads((Path(exchange) / f"{side}.json").read_text())


def report(args: argparse.Namespace, model: dict, ours: dict, peer: dict | None) -> None:
    name = args.model if args.shapes is None else f"sizes of {args.shapes}"
    print(
        f"{name}, objective {args.objective}, {args.dtype}, batch {args.batch_size} × {args.length} tokens, "
        f"{args.facts} of T_fact a row, units of {model['unit_size']}"
    )
    print(f"remat {args.remat}, attention {args.attention}, accumulation {args.accumulation}")
    print(f"{OURS}: {ours['device']}, {ours['versions']}")
    if peer:
        print(f"{PEER}: {peer['device']}, {peer['versions']}")
    peak = f"{ours['peak_tflops']:.3g} TFLOP/s" if ours["peak_tflops"] else "unknown: give --peak-tflops"
    print(f"{model['flops'] / 1e12:.3g} TFLOP a step; peak {peak} ({ours['peak_source']})")
    rows = {
        "compile s": ("compile_s", 1, ".1f"),
        "ms/step": ("ms_per_step", 1, ".1f"),
        "tokens/s, a row once": ("tokens_per_s", 1, ".1f"),
        "MFU %": ("mfu", 100, ".1f"),
        "CPU cores used": ("cores", 1, ".2f"),
        "peak memory GB": ("peak_bytes", 1e-9, ".2f"),
        "first loss": ("loss", 1, ".5f"),
        "first gradient norm": ("grad_norm", 1, ".5f"),
    }
    print(f"{'':24}{OURS:>12}" + (f"{PEER:>12}{'ratio':>8}" if peer else ""))
    for label, (key, scale, form) in rows.items():
        values = [figures[key] for figures in (ours, peer) if figures]
        line = "".join("-".rjust(12) if v is None else f"{v * scale:{form}}".rjust(12) for v in values)
        compared = peer and key in ("ms_per_step", "tokens_per_s", "mfu", "peak_bytes") and values[0]
        print(f"{label:24}{line}" + (f"{values[0] / values[1]:8.2f}" if compared else ""))
    if peer is None:
        sys.exit(None if args.no_peer else "the peer failed")
    if args.shapes is None and args.dtype == "float32":
        for key in ("loss", "grad_norm"):
            if not math.isclose(ours[key], peer[key], rel_tol=TOLERANCE):
                sys.exit(f"the sides do not compute the same: {key} {ours[key]} and {peer[key]}")


def trees(args: argparse.Namespace) -> bool:
    return args.objective in ("pairs", "preference")


def answer_length(args: argparse.Namespace) -> int:
    return max(args.facts, args.length // 2)


def tree_length(args: argparse.Namespace) -> int:
    """Tokens of a row, or of a question's tree."""
    return args.length + (answer_length(args) if trees(args) else 0)


def num_tokens(args: argparse.Namespace) -> int:
    return args.batch_size * tree_length(args)


def random_rows(args: argparse.Namespace, vocab_size: int) -> tuple[Any, Any]:
    """Tokens [B, T], and for each of the last tokens of a row, its answer, whether it is in T_fact. The two
    rows of a question, where there are, follow each other and have the question in common."""
    import numpy as np

    random = np.random.default_rng(0)
    rows = args.batch_size * (2 if trees(args) else 1)
    tokens = random.integers(0, vocab_size, (rows, args.length))
    fact = np.arange(answer_length(args)) < args.facts
    if trees(args):
        start = args.length - len(fact)
        tokens[1::2, :start] = tokens[::2, :start]
    return tokens, random.permuted(np.tile(fact, (rows, 1)), axis=1)


def timed(step: Callable[[], object], repeats: int) -> dict[str, Any]:
    times, cpu_began = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    cores = 1e3 * (time.process_time() - cpu_began) / sum(times)
    return {"ms_per_step": statistics.median(times), "times_ms": times, "cores": cores}


def peak_resident_bytes() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def step_flops(config: Any, trained: int, args: argparse.Namespace) -> int:
    """The formula of this module's docstring; `trained` is the number of trained parameters."""
    D, L, H = config.hidden_size, config.num_layers, config.head_dim
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    base = L * (D * H * heads + 3 * D * config.intermediate_size)
    frozen, modes = {"paper": (1, 2), "pairs": (3, 2), "preference": (1, 2), "adapter": (0, 1)}[
        args.objective
    ]
    length, tokens = tree_length(args), num_tokens(args)
    facts = args.batch_size * (2 if trees(args) else 1) * args.facts
    matmuls = 2 * base * frozen + 2 * (base + trained) * modes * 2 + 2 * trained * modes
    attention = 4 * L * config.num_heads * H * length * (frozen + modes + 2 * modes)
    projected = (frozen + 2 * modes) * facts + ((1 + 2 * modes) * tokens if trees(args) else 0)
    return (matmuls + attention) * tokens + 2 * D * config.vocab_size * projected


def objective_of(args: argparse.Namespace, unit_size: int) -> Any:
    from imae_jax.config import AntiExpertConfig, LoraConfig
    from imae_jax.losses import LossConfig
    from imae_jax.train.objectives import UNITS_OBJECTIVES, AnswerObjective

    if args.objective == "adapter":
        return AnswerObjective(LoraConfig(), remat=args.remat, attention=args.attention)
    loss = LossConfig(keep=0.0 if args.objective == "paper" else 1.0)
    kind = UNITS_OBJECTIVES[args.objective]
    return kind(AntiExpertConfig(unit_size), loss, args.remat, args.attention)


def prepare_model(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the model that both sides load, or its config alone; gives what else they share."""
    import jax
    from flax import nnx

    from imae_jax import runtime
    from imae_jax.config import AntiExpertConfig
    from imae_jax.convert import load_model
    from imae_jax.convert.hf import save_hf
    from imae_jax.convert.references import model_config
    from imae_jax.losses import LossConfig
    from imae_jax.train.config import OptimizerConfig

    runtime.set_up()
    directory = args.exchange / "model"
    directory.mkdir()
    if args.shapes is None:
        lm = load_model(args.model, dtype=args.dtype)
        save_hf(lm.model, lm.tokenizer, directory)
        config = lm.config
    else:
        config, _ = model_config(args.shapes)
        (directory / "config.json").write_text(json.dumps(config.to_hf()))
    unit_size = args.unit_size or AntiExpertConfig.scaled_to(config).intermediate_size
    trained = nnx.state(nnx.eval_shape(lambda: objective_of(args, unit_size).module(config, 0)))
    return {
        "unit_size": unit_size,
        "flops": step_flops(config, sum(x.size for x in jax.tree.leaves(trained)), args),
        "loss": dataclasses.asdict(LossConfig()),
        "optimizer": dataclasses.asdict(OptimizerConfig()),
    }


def measure_jax(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np
    from flax import nnx

    from imae_jax import runtime
    from imae_jax.compiled import held_bytes
    from imae_jax.config import LlamaConfig, LoraConfig
    from imae_jax.convert import load_model
    from imae_jax.convert.references import DTYPES
    from imae_jax.llama import Llama, Weights
    from imae_jax.lora import LoraDeltas, side_by_side
    from imae_jax.sharding import MESH_AXES
    from imae_jax.train.config import OptimizerConfig
    from imae_jax.train.data import Example, Merging, make_batch
    from imae_jax.train.step import init_state, make_optimizer, make_train_step, place_batch, state_shardings

    runtime.set_up()
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices()[0]
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=axis_types, devices=[device])

    shared = json.loads((args.exchange / "model.json").read_text())
    directory = args.exchange / "model"
    if args.shapes is None:
        lm = load_model(str(directory), dtype=args.dtype, stacked=True, mesh=mesh)
        llama, base = lm.config, lm.model.weights().base
        del lm
    else:
        llama = LlamaConfig.from_hf(json.loads((directory / "config.json").read_text()))
        dtype = DTYPES[args.dtype]
        base = jax.jit(
            lambda: nnx.to_pure_dict(nnx.state(Llama(llama, rngs=nnx.Rngs(0), dtype=dtype), nnx.Param))
        )()
    optimizer = make_optimizer(OptimizerConfig(**shared["optimizer"]))
    objective = objective_of(args, shared["unit_size"])
    frozen = Weights(base)
    if args.objective == "pairs":
        lora = LoraConfig()
        two = [
            (LoraDeltas(llama, lora, rngs=nnx.Rngs(i), stack=llama.num_layers), lora.scale) for i in (0, 1)
        ]
        deltas = jax.jit(
            lambda: side_by_side([(nnx.to_pure_dict(nnx.state(d)), scale) for d, scale in two])
        )()
        frozen = dataclasses.replace(frozen, lora=deltas)
    shardings = state_shardings(llama, objective, optimizer, mesh)
    state = init_state(llama, objective, optimizer, shardings, seed=0)
    if args.shapes is None and not args.no_peer:
        np.savez(args.exchange / "units.npz", **state.trainable)

    tokens, fact = random_rows(args, llama.vocab_size)
    start = args.length - fact.shape[1]
    examples = [
        Example(i, tuple(row.tolist()), start, tuple(of_row.tolist()))
        for i, (row, of_row) in enumerate(zip(tokens, fact, strict=True))
    ]
    merging = Merging(2, 2 * args.length) if trees(args) else None
    batch = place_batch(make_batch(examples, args.accumulation, merging=merging), mesh)
    train_step = make_train_step(llama, objective, optimizer, shardings, mesh)
    began = time.perf_counter()
    compiled = train_step.lower(state, frozen, batch).compile()
    compile_s = time.perf_counter() - began

    def step():
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, frozen, batch))
        return {name: float(metrics[name]) for name in ("loss", "grad_norm")}

    figures = {"compile_s": compile_s, "held_bytes": held_bytes(compiled)} | step()
    figures |= timed(step, args.repeats)
    figures["device_peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    figures["peak_bytes"] = figures["device_peak_bytes"] or peak_resident_bytes()
    figures["peak_tflops"], figures["peak_source"] = peak_of(device, args.peak_tflops)
    figures["device"], figures["backend"] = device.device_kind, device.platform
    versions = runtime.versions()
    figures["versions"] = ", ".join(f"{name} {versions[name]}" for name in ("imae_jax", "jax", "jaxlib"))
    return figures


def peak_of(device: Any, given: float | None) -> tuple[float | None, str]:
    """TFLOP/s of a device, and where the figure comes from."""
    import jax
    import jax.numpy as jnp

    from imae_jax.targets import of_kind

    if given is not None:
        return given, "as given"
    target = of_kind(device.device_kind)
    if target is not None:
        return float(target.tflops), "published, dense bfloat16"
    if device.platform != "cpu":
        return None, device.device_kind
    matrix = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(matrix, matrix))
    times = timed(lambda: jax.block_until_ready(multiply(matrix, matrix)), MATMUL_REPEATS)["times_ms"]
    source = f"measured: the best of {MATMUL_REPEATS} float32 matmuls of {MATMUL_SIZE}³ in JAX"
    return 2 * MATMUL_SIZE**3 / (min(times) / 1e3) / 1e12, source


def measure_torch(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    shared = json.loads((args.exchange / "model.json").read_text())
    backend = json.loads((args.exchange / f"{OURS}.json").read_text())["backend"]
    if backend == "tpu" or (backend == "gpu" and not torch.cuda.is_available()):
        sys.exit(f"{OURS} ran on a {backend}, which torch does not see: pass --no-peer")
    device = torch.device("cuda" if backend == "gpu" else "cpu")
    dtype, settings = getattr(torch, args.dtype), shared["optimizer"]

    transformers.logging.disable_progress_bar()
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    load, directory = transformers.AutoModelForCausalLM, args.exchange / "model"
    if args.shapes is None:
        model = load.from_pretrained(directory, **options).to(device)
    else:
        with device:
            model = load.from_config(transformers.AutoConfig.from_pretrained(directory), **options)
    model.eval().requires_grad_(False)
    peer = TorchUnits(model, shared["unit_size"], args, device, dtype)
    parameters = [array for unit in peer.units for array in unit.values()]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    tokens, fact = (
        torch.from_numpy(array).to(device) for array in random_rows(args, model.config.vocab_size)
    )
    counts = {"fact": int(fact.sum()), "gate": 2 * len(peer.units) * fact.numel()}
    micro_batches = list(zip(tokens.chunk(args.accumulation), fact.chunk(args.accumulation), strict=True))

    def step():
        total = 0.0
        for rows, is_fact in micro_batches:
            loss = peer.loss(rows, is_fact, counts, shared["loss"])
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(total), "grad_norm": float(norm)}

    figures = {"compile_s": None} | step() | timed(step, args.repeats)
    on_gpu = device.type == "cuda"
    figures["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()
    figures["device"] = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    figures["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return figures


class TorchUnits:
    """Units hooked onto the MLPs of a transformers model, and the loss of objective `paper`."""

    def __init__(self, model: Any, unit_size: int, args: argparse.Namespace, device: Any, dtype: Any):
        import numpy as np
        import torch

        self.model, self.dtype, self.length = model, dtype, args.length
        # Of the running forward pass: the units' strength a row, None without units; and their gates.
        self.strength, self.gates = None, []
        size = model.config.hidden_size
        shapes = {"gate": (size, 2), "gate_bias": (2,), "w_gate": (size, unit_size)}
        shapes |= {"w_up": (size, unit_size), "w_down": (unit_size, size)}

        def draw(name, shape):
            if name in ("gate_bias", "w_down"):
                return torch.zeros(shape, device=device)
            return torch.randn(shape, device=device) * model.config.initializer_range

        layers = model.model.layers
        self.units = [{name: draw(name, shape) for name, shape in shapes.items()} for _ in layers]
        if args.shapes is None:
            for name, stack in np.load(args.exchange / "units.npz").items():
                for unit, array in zip(self.units, stack, strict=True):
                    unit[name].copy_(torch.from_numpy(array))
        for layer, unit in zip(layers, self.units, strict=True):
            for array in unit.values():
                array.requires_grad_()
            layer.mlp.register_forward_hook(functools.partial(self._add_unit, unit))
            if args.remat != "none":
                layer.forward = recomputed(layer.forward, args.remat)

    def _add_unit(self, unit, mlp, inputs, output):
        from torch.nn import functional

        if self.strength is None:
            return output
        h, names = inputs[0], ("gate", "w_gate", "w_up", "w_down")
        gate, w_gate, w_up, w_down = (unit[name].to(self.dtype) for name in names)
        a = ((h @ gate).float() + unit["gate_bias"]).softmax(-1)[..., :1]
        # A recomputed layer's gates are not needed, and would keep its activations alive.
        if len(self.gates) < len(self.units):
            self.gates.append(a[..., 0])
        gated = a.to(self.dtype) * h
        return output + self.strength * ((functional.silu(gated @ w_gate) * (gated @ w_up)) @ w_down)

    def _run(self, rows, strength):
        self.gates.clear()
        self.strength = strength
        return self.model.model(rows, use_cache=False).last_hidden_state

    def loss(self, rows: Any, fact: Any, counts: dict[str, int], settings: dict[str, float]) -> Any:
        """A micro-batch's part of the loss of its batch.

        Args:
            rows: tokens [B, T].
            fact: bool [B, answer], which of the last tokens are in T_fact.
            counts: what the sums of the whole batch are divided by.
            settings: β, δ and the weight of the gates.
        """
        import torch
        from torch.nn import functional

        positions, start = fact.flatten().nonzero()[:, 0], self.length - fact.shape[1]

        def at_facts(hidden):
            # Position i predicts token i + 1.
            return hidden[:, start - 1 : -1].flatten(0, 1)[positions]

        def log_probs(hidden):
            return self.model.lm_head(hidden).float().log_softmax(-1)

        with torch.no_grad():
            log_base = log_probs(at_facts(self._run(rows, None)))
        modes = torch.ones(2 * len(rows), 1, 1, device=rows.device, dtype=self.dtype)
        modes[len(rows) :] = -1
        halves = self._run(torch.cat([rows, rows]), modes).chunk(2)
        log_anti, log_expert = log_probs(torch.cat([at_facts(half) for half in halves])).chunk(2)
        with torch.no_grad():
            valid = log_base >= log_base.amax(-1, keepdim=True) + math.log(settings["delta"])
            scores = settings["beta"] * log_base - log_anti
            target = scores.masked_fill(~valid, -math.inf).softmax(-1)
        anti = functional.nll_loss(log_anti, rows[:, start:].flatten()[positions], reduction="sum")
        expert = functional.kl_div(log_expert, target, reduction="sum")
        gates = torch.stack(self.gates)[..., start - 1 : -1]
        gate = torch.where(torch.cat([fact, fact]), 1 - gates, gates).sum()
        return (anti + expert) / counts["fact"] + settings["gate_weight"] * gate / counts["gate"]


def recomputed(forward: Callable, remat: str) -> Callable:
    """A layer of which the backward pass keeps nothing, or with `dots` the results of weight matmuls."""
    import torch
    from torch.utils import checkpoint

    options = {}
    if remat == "dots":
        matmuls = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        options["context_fn"] = functools.partial(checkpoint.create_selective_checkpoint_contexts, matmuls)

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint.checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return run


SIDES = {"model": prepare_model, OURS: measure_jax, PEER: measure_torch}

if __name__ == "__main__":
    main()
