"""What a method does to a model on neutral text.

A method can win on multiple choice by breaking the language model. This measures the whole distribution of
every method on plain prose: cross-entropy, Kullback-Leibler divergence from the base model, and how often the
most likely token is the base model's.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from imae_jax import stats
from imae_jax.cli import at_least
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Task
from imae_jax.evaluate.benchmarks.questions import DATA_DIRECTORY
from imae_jax.evaluate.reporting import plots
from imae_jax.evaluate.reporting.aggregate import sums_of
from imae_jax.evaluate.reporting.tables import Table, figure
from imae_jax.files import read_text

PROTOCOL = "harm-v1"
NEUTRAL_TEXT = DATA_DIRECTORY / "neutral.txt"
WINDOW = 512
STATISTICS = ("cross_entropy", "kl", "top1_agreement", "ruled_out")
COLUMNS = (
    "method",
    "sums",
    "cross-entropy",
    "perplexity",
    "KL(base ‖ method)",
    "KL infinite %",
    "same top 1 %",
    "ruled out %",
)


def summarize(values: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Means over tokens with their intervals; infinite where a token's value is, NaN likewise.

    Args:
        values: float64 [4, tokens], in the order of `STATISTICS`.
        seed: seed of the bootstrap.
    """
    rows = dict(zip(STATISTICS, values, strict=True))
    rows["infinite_kl"] = np.isinf(rows["kl"])
    estimates = {name: stats.mean_of_text(row, seed=seed) for name, row in rows.items()}
    means = {name: mean.value for name, mean in estimates.items()}
    intervals = {name: mean.interval for name, mean in estimates.items()}
    with np.errstate(over="ignore"):
        means["perplexity"] = float(np.exp(means["cross_entropy"]))
        bounds = intervals["cross_entropy"]
        intervals["perplexity"] = bounds and tuple(np.exp(bounds).tolist())
    return {"n": values.shape[1], **means, "intervals": intervals}


def share(value: float) -> str:
    return f"{100 * value:.1f}"


def cell(row: Mapping[str, Any], name: str, form: Any = figure) -> str:
    """A mean with its interval."""
    interval = row["intervals"][name]
    bounds = "" if interval is None else f" [{', '.join(map(form, interval))}]"
    return form(row[name]) + bounds


class Harm(Benchmark):
    name = "harm"
    title = "Harm on neutral text"
    description = "What methods do to a model on neutral text: cross-entropy and divergence from base"
    note = (
        "In square brackets: 95 % percentile bootstrap intervals over blocks of consecutive tokens. All "
        "methods are measured on the same tokens."
    )
    output = "distributions"
    questions = False
    subsets: ClassVar = {}

    def add_arguments(self, parser):
        parser.add_argument(
            "--text", type=Path, default=NEUTRAL_TEXT, help="text file (default: a shipped one)"
        )
        parser.add_argument(
            "--settings",
            choices=("scoring", "generating"),
            default="scoring",
            help="which defaults of methods: those of multiple choice, or those of generation",
        )
        parser.add_argument(
            "--window",
            type=at_least(2),
            default=WINDOW,
            help="tokens in a window (default: 512 or the context)",
        )

    def load(self, args, methods):
        return read_text(args.text, "text"), methods

    def task(self, args, data, lm):
        from imae_jax.decode import windows
        from imae_jax.decode.streams import needs_prompts
        from imae_jax.evaluate.runner.divergence import RULED_OUT
        from imae_jax.evaluate.runner.passes import split_folds

        text, methods = data
        tokens = lm.tokenizer(text)["input_ids"]
        if len(tokens) < 2:
            raise UserError(f"text {args.text} has fewer than 2 tokens: give a longer one")
        lm.config.check_token_ids(tokens)
        generating = args.settings == "generating"
        folds = {label: split_folds(method, ())[0][0] for label, method in methods.items()}
        prepared = {label: lm.prepare(method, generating=generating) for label, method in folds.items()}
        for label, (_, method) in prepared.items():
            on_prompts = any(stream.steer and stream.steer_scope == "prompt" for stream in method.streams)
            if on_prompts or needs_prompts(method):
                raise UserError(f"{label} needs prompts, and a text alone has none: leave it out")
        context = min(models.max_positions for models, _ in prepared.values())
        length = min(args.window, context)
        settings = {
            "data": {"path": str(args.text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
            "window": {"length": length, "stride": max(1, length // 2)},
        }
        return Task(
            f"{PROTOCOL}/{args.settings}",
            [Item(i, f"window {i}", data=window) for i, window in enumerate(windows(tokens, length))],
            settings,
            (),
            details={"ruled_out_below": RULED_OUT, "n_tokens": len(tokens) - 1},
            options={"length": length, "generating": generating},
        )

    def record(self, item, output, tokenizer):
        return {name: values.tolist() for name, values in zip(STATISTICS, output, strict=True)}

    def aggregate(self, args, task, records, baseline):
        methods = {}
        for label, rows in records.items():
            values = [[float(value) for row in rows for value in row[name]] for name in STATISTICS]
            methods[label] = summarize(np.array(values), seed=args.seed)
        blocks = f"blocks of {stats.BLOCK_LENGTH} tokens"
        return {"statistics": stats.describe_interval(blocks, args.seed), "methods": methods}

    def heading(self, results):
        return f"Neutral text, {results['protocol']}, {results['n_tokens']} tokens, {results['model']}"

    def tables(self, results):
        rows = [
            (
                label,
                sums_of(row),
                cell(row, "cross_entropy"),
                figure(row["perplexity"]),
                cell(row, "kl"),
                share(row["infinite_kl"]),
                cell(row, "top1_agreement", share),
                share(row["ruled_out"]),
            )
            for label, row in results["methods"].items()
        ]
        return [Table(f"{self.heading(results)}, nats a token, [95 % interval]", COLUMNS, tuple(rows))]

    def plots(self, results):
        return {"harm": plots.harm(self.heading(results), results["methods"])}

    def warnings(self, results):
        return []


BENCHMARK = Harm()
