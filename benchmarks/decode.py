"""ms per generated token and peak memory of every decoding method, against base and transformers' `generate`.

    python benchmarks/decode.py --methods base,dola,sled:scale=10
    python benchmarks/decode.py --model OUT/imae --methods base,expert,icd:anti_expert=OUT/icd/adapter

All decode greedily from the same prompt to exactly `--new-tokens` tokens, each in a process of its own, so
that peak memory is its own too; the first run, which compiles, is left out; the figure is the median of
`--repeats`. The bound is the time that reading the base's weights once takes at the bandwidth of a
matrix-vector product over 1 GiB, measured in the same run. Needs torch (`pip install -e '.[test]'`).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROMPT = "The three laws of thermodynamics are"
PEER = "transformers generate"


def median_ms(run: Callable[[], object], repeats: int, new_tokens: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / new_tokens


def peak_bytes() -> int:
    """Of this process; of the accelerator where there is one."""
    import jax

    statistics_of = jax.devices()[0].memory_stats()
    if statistics_of:
        return statistics_of["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_ours(args: argparse.Namespace, method: str) -> dict[str, float]:
    from imae_jax import runtime
    from imae_jax.convert import load_model
    from imae_jax.decode import generate

    runtime.set_up()
    lm = load_model(args.model, dtype=args.dtype)
    prompts = [lm.tokenizer(PROMPT)["input_ids"]] * args.batch_size
    models, resolved = lm.prepare(method, generating=True)

    def run():
        return generate(models, lm.config, prompts, method=resolved, max_new_tokens=args.new_tokens)

    return {"ms_per_token": median_ms(run, args.repeats, args.new_tokens), "peak_bytes": peak_bytes()}


def measure_peer(args: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peer = AutoModelForCausalLM.from_pretrained(args.exported, dtype="auto").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(args.exported)(PROMPT)["input_ids"]] * args.batch_size)

    def run():
        return peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=args.new_tokens,
            max_new_tokens=args.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    figure = median_ms(run, args.repeats, args.new_tokens)
    return {"ms_per_token": figure, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure_bound(args: argparse.Namespace) -> dict[str, float]:
    """Also exports the base for the peer."""
    import jax
    import jax.numpy as jnp

    from imae_jax.convert import load_model
    from imae_jax.convert.hf import save_hf

    lm = load_model(args.model, dtype=args.dtype)
    save_hf(lm.model, lm.tokenizer, Path(args.exported))
    base = lm.model.weights().base
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(base))
    if "unembed" in base:
        weight_bytes -= base["embed"].nbytes  # of which a token reads one row
    matrix = jnp.ones((2**30 // 4 // 4096, 4096), jnp.float32)
    product = jax.jit(jnp.matmul)
    vector = jnp.ones(4096, jnp.float32)
    seconds = (
        min(median_ms(lambda: product(matrix, vector).block_until_ready(), 9, 1) for _ in range(3)) / 1e3
    )
    bandwidth = matrix.nbytes / seconds
    return {"ms_per_token": 1e3 * weight_bytes / bandwidth, "bytes_per_second": bandwidth, "peak_bytes": 0}


def plot(figures: dict[str, dict[str, float]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(figures)
    figure = Figure(figsize=(8, 0.5 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, [figures[name]["ms_per_token"] for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms per token", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype")
    parser.add_argument("--methods", default="base", help="comma-separated, base first")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--png", type=Path, help="also draw them")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--exported", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure = {"bound": measure_bound, PEER: measure_peer}.get(args.only)
        print(json.dumps(measure(args) if measure else measure_ours(args, args.only)))
        return

    from imae_jax.decode import split_methods

    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in ("bound", PEER, *split_methods(args.methods)):
            command = [sys.executable, *sys.argv, "--only", name, "--exported", directory]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures[name] = json.loads(run.stdout.splitlines()[-1])
    base = figures.get("base", figures[PEER])
    title = f"{args.model}, batch {args.batch_size}, {args.new_tokens} new tokens"
    print(title)
    print(f"{'':40}{'ms/token':>10}{'× base':>8}{'× peer':>8}{'GB':>7}{'× base':>8}")
    for name, figure in figures.items():
        ms, size = figure["ms_per_token"], figure["peak_bytes"]
        memory = f"{size / 1e9:7.2f}{size / base['peak_bytes']:8.2f}" if size else ""
        ratios = f"{ms / base['ms_per_token']:8.2f}{ms / figures[PEER]['ms_per_token']:8.2f}"
        print(f"{name[-39:]:40}{ms:10.1f}{ratios}{memory}")
    if args.json:
        args.json.write_text(json.dumps(vars(args) | {"figures": figures}, default=str, indent=2) + "\n")
    if args.png:
        plot(figures, title, args.png)


if __name__ == "__main__":
    main()
