"""HaluEval QA: is the right answer preferred to the hallucinated one?

Hallucinated answers are longer than right ones, so much that length alone tells them apart: a sum of
log-probabilities prefers the shorter answer anyway. Preferences are therefore reported raw and per token,
on all pairs and on those whose answers have about the same length, beside what length alone gives.

Source: Li et al., "HaluEval", EMNLP 2023 (arXiv 2305.11747); its qa_data.json has the pairs.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from imae_jax import stats
from imae_jax.cli import at_least
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Task
from imae_jax.evaluate.reporting import aggregate, plots
from imae_jax.evaluate.reporting.tables import DASH, Table
from imae_jax.files import dumps, read_json
from imae_jax.prompts import FORMATS, adds_special_tokens, answer_frame, render, resolve_format

PROTOCOL = "halueval-qa-v1"
HEADS = {"raw": "right preferred", "per_token": "per token"}
LENGTH_RATIO = 1.25
NAMES = {"scores": "preferences"}  # of plots
NOTE = (
    "How often the right answer's score is above the hallucinated one's, in per cent; by sums over tokens "
    "and by their means. Hallucinated answers are longer, so that length alone tells much: *the shorter "
    "answer* is what preferring it would score."
)


def preferences(right: float, hallucinated: float, tokens: tuple[int, int]) -> dict[str, float]:
    """Whether the right answer is preferred, 0 or 1; NaN where a score is NaN or infinite.

    Args:
        right, hallucinated: summed scores.
        tokens: token counts of the right and of the hallucinated answer.
    """
    if not (math.isfinite(right) and math.isfinite(hallucinated)):
        return dict.fromkeys(HEADS, math.nan)
    per_token = right / tokens[0] > hallucinated / tokens[1]
    return {"raw": float(right > hallucinated), "per_token": float(per_token)}


def trained_questions(run: Path, tokenizer: Any) -> set[str]:
    """The questions of the rows that a training run uses in any of its stages.

    What it held out or skipped is not among them, nor what a run of less than an epoch does not come to.

    Args:
        run: an output directory of `imae_jax.train`.
        tokenizer: the model's.

    Raises:
        UserError: it is no such directory, or its data are no longer what they were.
    """
    from imae_jax.convert.imae_dir import CONFIG_FILE
    from imae_jax.train.config import load_config
    from imae_jax.train.data import load_rows, taken, tokenize
    from imae_jax.train.objectives import UNITS_OBJECTIVES
    from imae_jax.train.run_directory import ADAPTER_STAGES, IMAE_DIR, config_file

    config, recorded = load_config(str(config_file(run))), run / IMAE_DIR / CONFIG_FILE
    rows = load_rows(config.data)
    data = tokenize(rows, tokenizer, config.data)
    if recorded.is_file():
        before = read_json(recorded).get("training", {}).get("data", {})
        now = data.statistics
        if any(before.get(key) != now[key] for key in ("rows", "held_out_rows")):
            raise UserError(
                f"--train-run {run}: its data give other rows now than it was trained on: restore them"
            )
    stages = [(UNITS_OBJECTIVES[config.objective].answers, config.batch_size, config.optimizer.steps)]
    for answers, directory in ADAPTER_STAGES.items():
        if answers in config.adapters_to_train() or (run / directory).is_dir():
            stages.append(([answers], config.icd.batch_size, config.icd.steps(len(data.train))))
    trained = {i for answers, *amount in stages for i in taken(data.stage(answers).lengths, config, *amount)}
    return {rows[data.train[i].row].question for i in trained}


def length_statistics(tokens: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What length alone tells about pairs of token counts, right and hallucinated."""
    if not tokens:
        return {"n": 0, "auc": None, "shorter": None, "mean_tokens": None}
    right, hallucinated = np.array(tokens).T
    shorter = np.mean(right < hallucinated) + np.mean(right == hallucinated) / 2
    return {
        "n": len(tokens),
        "auc": stats.length_auc(right, hallucinated),
        "shorter": 100 * float(shorter),
        "mean_tokens": [float(right.mean()), float(hallucinated.mean())],
    }


def digest(value: Any) -> str:
    return hashlib.sha256(dumps(value).encode()).hexdigest()


class HaluEval(Benchmark):
    name = "halueval"
    title = "HaluEval QA"
    description = "HaluEval QA: how often the right answer's score exceeds the hallucinated one's"
    note = NOTE
    heads: ClassVar = HEADS
    subsets: ClassVar = {"all": "all questions", "matched": "pairs of matched length"}

    def add_arguments(self, parser):
        parser.add_argument(
            "--data",
            default="demo",
            help="JSONL file with HaluEval QA's fields, hub, or demo (default)",
        )
        parser.add_argument(
            "--train-run",
            type=Path,
            metavar="RUN",
            help="exclude the questions that this run was trained on",
        )
        parser.add_argument("--format", default="auto", help=f"{', '.join(FORMATS)} (default: auto)")
        parser.add_argument(
            "--length-ratio",
            type=at_least(1.0),
            default=LENGTH_RATIO,
            metavar="R",
            help="largest ratio of a matched pair's token counts (default: 1.25)",
        )

    def load(self, args, methods):
        from imae_jax.train.config import DataConfig
        from imae_jax.train.data import load_rows

        return load_rows(DataConfig(source="halueval" if args.data == "hub" else args.data))

    def task(self, args, rows, lm):
        format = resolve_format(lm.tokenizer, args.format)
        lead, _ = answer_frame(lm.tokenizer, format)
        trained = trained_questions(args.train_run, lm.tokenizer) if args.train_run else set()
        fields = [[row.question, row.right_answer, row.hallucinated_answer] for row in rows]
        items = [
            Item(i, question, render(lm.tokenizer, question, format), (lead + right, lead + hallucinated))
            for i, (question, right, hallucinated) in enumerate(fields)
        ]
        details = {
            "prompt": "the question in the training format; the answer without an end of turn",
            "excluded": "questions of --train-run's training rows",
            "raw": "sum of the right answer's scores exceeds that of the hallucinated one",
            "per_token": "the same of the means over tokens",
            "matched": f"answers' token counts differ at most by a factor of {args.length_ratio:g}",
            "length_auc": "chance that a hallucinated answer has more tokens than a right one, ties half",
        }
        settings = {
            "data": {"path": args.data, "sha256": digest(fields)},
            "train_run": args.train_run and {"path": args.train_run, "sha256": digest(sorted(trained))},
        }
        return Task(
            f"{PROTOCOL}/{format}",
            items,
            settings,
            tuple(HEADS),
            details={"protocol_details": details},
            excluded=frozenset(trained),
            options={"add_special_tokens": adds_special_tokens(format)},
        )

    def chance(self, item):
        return dict.fromkeys(HEADS, 0.5)

    def record(self, item, output, tokenizer):
        right, hallucinated = (float(np.sum(scores, dtype=np.float64)) for scores in output)
        tokens = tuple(map(len, output))
        return {
            "right": right,
            "hallucinated": hallucinated,
            "tokens": list(tokens),
            **preferences(right, hallucinated, tokens),
        }

    def in_subset(self, subset, record, results):
        tokens = record["tokens"]
        return subset == "all" or max(tokens) / min(tokens) <= _ratio(results)

    def aggregate(self, args, task, records, baseline):
        """Summaries of all pairs and of matched ones, beside what length alone tells of them."""
        parts, length = {}, {"ratio": args.length_ratio}
        for subset in self.subsets:
            chosen = {
                label: [row for row in rows if self.in_subset(subset, row, {"length": length})]
                for label, rows in records.items()
            }
            pairs = [tuple(row["tokens"]) for row in next(iter(chosen.values()))]
            length[subset] = length_statistics(pairs)
            parts[subset] = {}
            if pairs:
                parts[subset] = aggregate.summarize(chosen, task.metrics, baseline=baseline, seed=args.seed)
        methods = {label: dict(summary) for label, summary in parts["all"].items()}
        return {**self.counts(args, task, baseline), "length": length, "methods": methods, "parts": parts}

    def tables(self, results):
        """Preferences and differences, of all pairs and of matched ones."""
        tables, names = [], {"all": "all pairs", "matched": f"lengths within × {_ratio(results):g}"}
        for subset, name in names.items():
            methods, length = results["parts"][subset], results["length"][subset]
            if not length["n"]:
                continue
            title = f"HaluEval QA, {results['protocol']}, {results['model']}, {name}, [95 % interval]"
            table = aggregate.scores_table(
                f"{title}; AUC of length alone {length['auc']:.3f}",
                {k: row | {"settings": results["methods"][k]["settings"]} for k, row in methods.items()},
                HEADS,
                results.get("chance"),
            )
            shorter = ("the shorter answer", "length", length["n"], f"{length['shorter']:.2f}", DASH)
            tables.append(Table(table.title, table.columns, (*table.rows, shorter)))
            tables += aggregate.differences_tables(f"Against {results['baseline']}, {name}", methods, HEADS)
        return tables

    def plots(self, results):
        figures = {}
        for subset, methods in results["parts"].items():
            length = results["length"][subset]
            if not length["n"]:
                continue
            title = (
                f"HaluEval QA, {subset}: {length['n']} pairs, length alone has AUC {length['auc']:.2f}; "
                f"{results['model']}"
            )
            drawn = plots.of_methods(title, methods, HEADS, results["baseline"])
            figures |= {f"{subset}-{NAMES.get(name, name)}": figure for name, figure in drawn.items()}
        return figures

    def warnings(self, results):
        notes = aggregate.note_undefined(results["parts"]["all"])
        if not results["length"]["matched"]["n"]:
            notes.append(f"no pair's answers are within a factor of {_ratio(results):g} in length")
        return notes


def _ratio(results: Any) -> float:
    """The length ratio; an infinite one is a text in JSON."""
    return float(results["length"]["ratio"])


BENCHMARK = HaluEval()
