"""ms per generated token of every decoding method, against base and transformers' `generate`.

    python benchmarks/decode.py --methods base,dola,sled:scale=10
    python benchmarks/decode.py --model OUT/imae --methods base,expert,icd:anti_expert=OUT/icd/adapter

Methods are measured as by `python -m imae_jax.evaluate.cost`, the peer likewise: greedily, on the same random
prompts, to exactly `--new-tokens` tokens, each in a process of its own, without the prefill and without the
first run. The bound is the time that reading the base's weights once takes at the bandwidth of a
matrix-vector product over 1 GiB, measured in the same run. Needs torch (`pip install -e '.[test]'`).

The machine must be idle: among other processes torch's threads, which spin while they wait for each other,
take many times longer. `cores` in the JSON file tells how many were busy.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, command
from imae_jax.evaluate.cost import BASE, add_cost_arguments, measure_all, with_base, workloads_of
from imae_jax.evaluate.measurement import Source, load_base
from imae_jax.evaluate.reporting.plots import bar_panels
from imae_jax.evaluate.reporting.tables import Table, number, show
from imae_jax.evaluate.runner.arguments import parse_methods
from imae_jax.evaluate.timing import MemoryMeter, Timing, Workload, in_own_process, time_runs

PEER, BOUND = "transformers generate", "bandwidth bound"


def measure_peer(exported: Path, workload: Workload) -> dict[str, Any]:
    """The figures of `cost.measure` for transformers, on the CPU."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    peer = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").eval()
    shape = (workload.batch_size, workload.prompt_tokens)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, peer.config.vocab_size, shape))

    class Clock(StoppingCriteria):
        """Stops nothing; notes when each token was drawn."""

        def __init__(self):
            self.times: list[float] = []

        def __call__(self, input_ids, scores, **kwargs):
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run() -> Timing:
        clock, start = Clock(), time.perf_counter()
        peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=workload.new_tokens,
            max_new_tokens=workload.new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        first, last = clock.times[0], clock.times[-1]
        return Timing(first - start, last - first, len(clock.times) - 1)

    memory = MemoryMeter()
    figures = time_runs(run, workload.repeats, memory)
    weight_bytes = sum(x.nbytes for x in peer.parameters())
    return figures | {"memory_bytes": memory.peak_bytes(weight_bytes), "weight_bytes": weight_bytes}


def export_base(source: Source, directory: Path) -> int:
    """Writes the base for the peer.

    Returns:
        The bytes of its weights that a step reads.
    """
    import jax

    from imae_jax.convert.hf import save_hf

    runtime.set_up()
    lm = load_base(source)
    save_hf(lm.model, lm.tokenizer, directory)
    base = lm.model.weights().base
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(base))
    # Of which a token reads one row, unless it is the vocabulary projection as well.
    return num_bytes - base["embed"].nbytes if "unembed" in base else num_bytes


def bytes_per_second() -> float:
    """Of reading a matrix of 1 GiB, the best of three."""
    import jax
    import jax.numpy as jnp

    runtime.set_up()
    matrix, vector = jnp.ones((2**30 // 4 // 4096, 4096), jnp.float32), jnp.ones(4096, jnp.float32)
    product = jax.jit(jnp.matmul)
    product(matrix, vector).block_until_ready()
    seconds = (median_seconds(lambda: product(matrix, vector).block_until_ready(), 9) for _ in range(3))
    return matrix.nbytes / min(seconds)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def table_of(results: dict[str, Any], batch_size: str) -> Table:
    figures = results["batch_sizes"][batch_size]
    base, peer, rows = figures[BASE], figures[PEER], []
    for name, row in figures.items():
        ms, memory = row["ms_per_token"], row.get("memory_bytes")
        ratios = (ms / base["ms_per_token"], ms / peer["ms_per_token"])
        cells = (number(ms), *map(number, ratios), number(1e3 * int(batch_size) / ms, 1))
        rows.append((name, *cells, number(memory and memory / 1e9)))
    workload = results["workload"]
    title = (
        f"{results['model']}, {results['dtype']}, batch {batch_size}, {workload['prompt_tokens']} + "
        f"{workload['new_tokens']} tokens"
    )
    columns = ("method", "ms/token", "× base", "× transformers", "tokens/s", "memory GB")
    return Table(title, columns, tuple(rows))


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python benchmarks/decode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype")
    parser.add_argument("--methods", default=BASE)
    add_cost_arguments(parser, batch_sizes="1,32")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--png", type=Path, help="also draw them")
    args = parser.parse_args(argv)

    workloads, methods = workloads_of(args), with_base(parse_methods(args.methods))
    source = Source(args.model, {"dtype": args.dtype, "revision": None, "tokenizer": None, "base": None})
    results = measure_all(source, methods, workloads, quiet=args.quiet)
    with tempfile.TemporaryDirectory() as directory:
        weight_bytes = in_own_process(export_base, source, Path(directory))
        results["bytes_per_second"] = in_own_process(bytes_per_second)
        bound = {"ms_per_token": 1e3 * weight_bytes / results["bytes_per_second"]}
        for workload in workloads:
            peer = in_own_process(measure_peer, Path(directory), workload)
            results["batch_sizes"][str(workload.batch_size)] |= {PEER: peer, BOUND: bound}
    show([table_of(results, batch_size) for batch_size in results["batch_sizes"]])
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.png:
        series = {
            f"batch {batch_size}": {name: row["ms_per_token"] for name, row in figures.items()}
            for batch_size, figures in results["batch_sizes"].items()
        }
        title = f"{results['model']}, {results['dtype']}"
        bar_panels({"ms/token": series}, title).savefig(args.png, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
