"""ms per generated token against transformers' `generate`, on the same weights in the same run.

    python benchmarks/decode.py --model smollm2-135m-instruct

Both decode greedily from the same prompt to exactly `--new-tokens` tokens; the first run of each,
which compiles, is left out; the figure is the median of `--repeats`. Needs torch (`pip install -e
'.[test]'`).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from imae_jax import runtime
from imae_jax.convert import load_model
from imae_jax.convert.hf import save_hf
from imae_jax.decode import generate, parse_method

PROMPT = "The three laws of thermodynamics are"


def median_ms(run: Callable[[], object], repeats: int, new_tokens: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="+", default=["base"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    runtime.set_up()

    lm = load_model(args.model)
    prompts = [lm.tokenizer(PROMPT)["input_ids"]] * args.batch_size
    ids = torch.tensor(prompts)
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        save_hf(lm.model, lm.tokenizer, Path(directory))
        peer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    figures["transformers generate"] = median_ms(
        lambda: peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=args.new_tokens,
            max_new_tokens=args.new_tokens,
            do_sample=False,
            pad_token_id=0,
        ),
        args.repeats,
        args.new_tokens,
    )
    for name in args.methods:
        method = parse_method(name)
        figures[f"imae_jax {name}"] = median_ms(
            lambda method=method: generate(
                lm.model, lm.config, prompts, method=method, max_new_tokens=args.new_tokens
            ),
            args.repeats,
            args.new_tokens,
        )
    reference = figures["transformers generate"]
    print(f"{args.model}, batch {args.batch_size}, {args.new_tokens} new tokens, {lm.base.dtype}")
    print(f"{'':28}{'ms/token':>10}{'ratio':>8}")
    for name, value in figures.items():
        print(f"{name:28}{value:10.1f}{value / reference:8.2f}")
    if args.json:
        args.json.write_text(json.dumps(vars(args) | {"ms_per_token": figures}, default=str, indent=2))


if __name__ == "__main__":
    main()
