"""`python -m imae_jax.evaluate.harm`: what a method does to a model on neutral text.

A method can win on multiple choice by breaking the language model. This measures the whole distribution of
every method on plain prose: cross-entropy, Kullback-Leibler divergence from the base model, and how often the
most likely token is the base model's.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    add_process_arguments,
    command,
    join_processes,
    lock_outputs,
    model_arguments,
)
from imae_jax.errors import UserError
from imae_jax.files import new_directory, read_text

from . import plots, stats
from .questions import DATA_DIRECTORY
from .runs import (
    MANY_METHODS,
    RESULTS_FILE,
    called,
    dumps,
    environment,
    method_settings,
    model_settings,
    parse_methods,
    write_outputs,
)
from .summaries import sums_of
from .tables import Table, figure, show

BENCHMARK, PROTOCOL = "harm", "harm-v1"
NEUTRAL_TEXT = DATA_DIRECTORY / "neutral.txt"
WINDOW = 512
STATISTICS = ("cross_entropy", "kl", "top1_agreement", "ruled_out")


def summarize(values: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Means over tokens with their intervals; infinite where a token's value is, NaN likewise.

    Args:
        values: float64 [4, tokens], from `divergence.measure`.
        seed: of the bootstrap.
    """
    rows = dict(zip(STATISTICS, values, strict=True))
    rows["infinite_kl"] = np.isinf(rows["kl"])
    found = {name: stats.mean_of_text(row, seed=seed) for name, row in rows.items()}
    means = {name: mean.value for name, mean in found.items()}
    intervals = {name: mean.interval for name, mean in found.items()}
    with np.errstate(over="ignore"):
        means["perplexity"] = float(np.exp(means["cross_entropy"]))
        bounds = intervals["cross_entropy"]
        intervals["perplexity"] = bounds and tuple(np.exp(bounds).tolist())
    return {"n": values.shape[1], **means, "intervals": intervals}


def results_table(results: Mapping[str, Any]) -> Table:
    """The table of a `results.json`."""

    def share(value: float) -> str:
        return f"{100 * value:.1f}"

    def cell(row: Mapping[str, Any], name: str, shown: Callable[[Any], str] = figure) -> str:
        interval = row["intervals"][name]
        bounds = "" if interval is None else f" [{', '.join(map(shown, interval))}]"
        return shown(row[name]) + bounds

    rows = [
        (
            label,
            sums_of(row["settings"]),
            cell(row, "cross_entropy"),
            figure(row["perplexity"]),
            cell(row, "kl"),
            share(row["infinite_kl"]),
            cell(row, "top1_agreement", share),
            share(row["ruled_out"]),
        )
        for label, row in results["methods"].items()
    ]
    heads = (
        "cross-entropy",
        "perplexity",
        "KL(base ‖ method)",
        "KL infinite %",
        "same top 1 %",
        "ruled out %",
    )
    return Table(f"{title(results)}, nats a token, [95 % interval]", ("method", "sums", *heads), tuple(rows))


def title(results: Mapping[str, Any]) -> str:
    return f"Neutral text, {results['protocol']}, {results['n_tokens']} tokens, {results['model']}"


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.harm",
        description="What methods do to a model on neutral text: cross-entropy and divergence from base.",
    )
    add_model_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument("--methods", default="base", help=MANY_METHODS)
    parser.add_argument("--text", type=Path, default=NEUTRAL_TEXT, help="text file (default: a shipped one)")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument(
        "--settings",
        choices=("scoring", "generating"),
        default="scoring",
        help="which defaults of methods: those of multiple choice (as evaluate.truthfulqa), or of generation",
    )
    parser.add_argument(
        "--window", type=int, default=WINDOW, help="tokens; at most the context (default: 512 or the context)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    join_processes(args)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: give at least 0")
    if args.window < 2:
        raise UserError(f"--window {args.window}: give at least 2")
    methods = parse_methods(args.methods)
    for label, method in methods.items():
        resource = method.resource
        if resource and resource.kind == "directions" and Path(resource.reference).is_dir():
            raise UserError(f"{label}: a text belongs to no fold: give one file of directions")
    text = read_text(args.text, "text")

    lock_outputs(args.out)
    with new_directory(args.out, marker=RESULTS_FILE, overwrite=args.overwrite) as out:
        from imae_jax.convert import load_model
        from imae_jax.decode import windows

        from .divergence import RULED_OUT, measure

        lm = load_model(args.model, **model_arguments(args))
        tokens = lm.tokenizer(text)["input_ids"]
        if len(tokens) < 2:
            raise UserError(f"text {args.text} has fewer than 2 tokens: give a longer one")
        lm.config.check_token_ids(tokens)
        generating = args.settings == "generating"
        prepared = {label: lm.prepare(method, generating=generating) for label, method in methods.items()}
        context = min(c.max_position_embeddings for models, _ in prepared.values() for c in models.configs)
        length = min(args.window, context)
        values = measure(lm, prepared, windows(tokens, length), length)
        results = {
            "benchmark": BENCHMARK,
            "protocol": f"{PROTOCOL}/{args.settings}",
            **model_settings(lm, args),
            "data": {"path": str(args.text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
            "window": {"length": length, "stride": max(1, length // 2)},
            "ruled_out_below": RULED_OUT,
            "n_tokens": len(tokens) - 1,
            "statistics": stats.describe_interval(f"blocks of {stats.BLOCK_LENGTH} tokens", args.seed),
            "command": called(parser.prog, argv),
            **environment(lm.mesh),
            "methods": {
                label: {
                    **summarize(values[label], seed=args.seed),
                    "settings": method_settings(lm, methods[label], prepared[label][1]),
                }
                for label in methods
            },
        }
        table = results_table(results)
        write_outputs(out, [table], {"harm": plots.harm(title(results), results["methods"])})
        (out / RESULTS_FILE).write_text(dumps(results, indent=2) + "\n", encoding="utf-8")
    show([table])


if __name__ == "__main__":
    sys.exit(main())
