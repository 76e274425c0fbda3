"""`python -m imae_jax.evaluate.halueval`: is HaluEval QA's right answer preferred to the hallucinated one?

Hallucinated answers are longer than right ones, so much that length alone tells them apart: a sum of
log-probabilities prefers the shorter answer anyway. Preferences are therefore reported raw and per token, on
all pairs and on those whose answers have about the same length, beside what length alone gives.

Source: Li et al., "HaluEval", EMNLP 2023 (arXiv 2305.11747); its qa_data.json has the pairs.
"""

import hashlib
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    add_process_arguments,
    command,
    join_processes,
    model_arguments,
)
from imae_jax.errors import UserError
from imae_jax.prompts import FORMATS, adds_special_tokens, answer_frame, render, resolve_format

from . import plots, stats
from .questions import select
from .runs import (
    Run,
    add_run_arguments,
    called,
    check_arguments,
    dumps,
    environment,
    model_settings,
    parse_methods,
    plan,
)
from .summaries import (
    against_baseline,
    baseline_of,
    differences_table,
    note_undefined,
    scores_table,
    summarize,
)
from .tables import Table, show

logger = logging.getLogger(__name__)

BENCHMARK, PROTOCOL = "halueval", "halueval-qa-v1"
HEADS = {"raw": "right preferred", "per_token": "per token"}
LENGTH_RATIO = 1.25


def preferences(right: float, hallucinated: float, tokens: tuple[int, int]) -> dict[str, float]:
    """Whether the right answer is preferred, 0 or 1; NaN where a score is NaN or infinite.

    Args:
        right, hallucinated: summed scores.
        tokens: how many the right and the hallucinated answer have.
    """
    if not (math.isfinite(right) and math.isfinite(hallucinated)):
        return dict.fromkeys(HEADS, math.nan)
    per_token = right / tokens[0] > hallucinated / tokens[1]
    return {"raw": float(right > hallucinated), "per_token": float(per_token)}


def is_matched(tokens: Sequence[int], ratio: float) -> bool:
    """Whether a pair's numbers of tokens differ by at most a factor."""
    return max(tokens) / min(tokens) <= ratio


def trained_questions(run: Path, tokenizer: Any) -> set[str]:
    """The questions of the rows that a training run takes in any of its stages.

    What it held out or skipped is not among them, nor what a run of less than an epoch does not come to.

    Args:
        run: directory of `imae_jax.train`.
        tokenizer: the model's.

    Raises:
        UserError: it is no such directory, or its data are no longer what they were.
    """
    from imae_jax.convert.hf import read_json
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


def tables_of(results: Mapping[str, Any]) -> list[Table]:
    """The tables of a `results.json`: preferences and differences, of all pairs and of matched ones."""
    tables, lengths = [], results["length"]
    for part, name in (("all", "all pairs"), ("matched", f"lengths within × {float(lengths['ratio']):g}")):
        methods, of_length = results["parts"][part], lengths[part]
        if not of_length["n"]:
            continue
        title = f"HaluEval QA, {results['protocol']}, {results['model']}, {name}, [95 % interval]"
        table = scores_table(
            f"{title}; AUC of length alone {of_length['auc']:.3f}",
            {k: row | {"settings": results["methods"][k]["settings"]} for k, row in methods.items()},
            HEADS,
        )
        shorter = ("the shorter answer", "length", str(of_length["n"]), f"{of_length['shorter']:.2f}", "–")
        tables.append(Table(table.title, table.columns, (*table.rows, shorter)))
        compared = against_baseline(methods)
        if compared:
            tables.append(differences_table(f"Against {results['baseline']}, {name}", compared, HEADS))
    return tables


def plots_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The plots of a `results.json`, by name."""
    figures = {}
    for part, methods in results["parts"].items():
        of_length = results["length"][part]
        if not of_length["n"]:
            continue
        title = (
            f"HaluEval QA, {part}: {of_length['n']} pairs, length alone has AUC {of_length['auc']:.2f}; "
            f"{results['model']}"
        )
        figures[f"{part}-preferences"] = plots.bars(title, methods, HEADS, "right answer preferred, %")
        difference = plots.differences(
            f"{title}: difference to {results['baseline']}, 95 % interval", against_baseline(methods), HEADS
        )
        if difference is not None:
            figures[f"{part}-differences"] = difference
    return figures


def length_statistics(tokens: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What length alone tells of pairs of token counts, right and hallucinated."""
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


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.halueval",
        description="HaluEval QA: how often the right answer's score exceeds the hallucinated one's.",
    )
    add_model_arguments(parser)
    add_process_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument(
        "--data", default="demo", help="JSONL file with HaluEval QA's fields, hub, or demo (training rows)"
    )
    parser.add_argument(
        "--train-run", type=Path, metavar="RUN", help="leave out every question that this run was trained on"
    )
    parser.add_argument("--format", default="auto", help=f"{', '.join(FORMATS)} (default: auto)")
    parser.add_argument(
        "--length-ratio",
        type=float,
        default=LENGTH_RATIO,
        metavar="R",
        help="answers of a matched pair differ in tokens by at most this factor",
    )
    args = parser.parse_args(argv)
    join_processes(args)

    methods = parse_methods(args.methods)
    check_arguments(args, methods)
    if not args.length_ratio >= 1:
        raise UserError(f"--length-ratio {args.length_ratio}: give at least 1")
    from imae_jax.convert import load_model
    from imae_jax.decode import encode
    from imae_jax.train.config import DataConfig
    from imae_jax.train.data import load_rows

    source = "halueval" if args.data == "hub" else args.data
    rows = load_rows(DataConfig(source=source))
    fields = [[row.question, row.right_answer, row.hallucinated_answer] for row in rows]
    lm = load_model(args.model, **model_arguments(args))
    trained = trained_questions(args.train_run, lm.tokenizer) if args.train_run else set()
    questions = [row.question for row in rows]
    # Drawn from all, so that no other run's exclusions move a question from one split to the other.
    split = select(questions, args.split, seed=args.split_seed, dev_share=args.dev_share)
    index = [i for i in split if questions[i] not in trained][: args.limit]
    n_excluded = sum(question in trained for question in questions)
    if not index:
        raise UserError(
            f"--split {args.split} holds none of {len(rows)} pairs: {n_excluded} are of questions that the "
            "run was trained on"
        )

    format = resolve_format(lm.tokenizer, args.format)
    lead, _ = answer_frame(lm.tokenizer, format)
    prompts = [render(lm.tokenizer, rows[i].question, format) for i in index for _ in range(2)]
    answers = [lead + answer for i in index for answer in (rows[i].right_answer, rows[i].hallucinated_answer)]
    encoded = encode(lm.tokenizer, prompts, answers, add_special_tokens=adds_special_tokens(format))
    groups = [encoded[i : i + 2] for i in range(0, len(encoded), 2)]
    tokens = [tuple(len(item.tokens) - item.start for item in group) for group in groups]
    matched = [is_matched(pair, args.length_ratio) for pair in tokens]

    def line(place: int, scores: list[np.ndarray]) -> dict[str, Any]:
        right, hallucinated = (float(np.sum(s, dtype=np.float64)) for s in scores)
        return {
            "question": rows[index[place]].question,
            "right": right,
            "hallucinated": hallucinated,
            "tokens": list(tokens[place]),
            **preferences(right, hallucinated, tokens[place]),
        }

    planned = plan(lm, methods, [rows[i].question for i in index], groups)
    common = {
        "benchmark": BENCHMARK,
        "protocol": f"{PROTOCOL}/{format}",
        **model_settings(lm, args),
        "data": {"path": args.data, "sha256": digest(fields)},
        "train_run": args.train_run and {"path": args.train_run, "sha256": digest(sorted(trained))},
        "split": {"name": args.split, "seed": args.split_seed, "dev_share": args.dev_share},
        "limit": args.limit,
    }
    run = Run(args.out, {**common, "methods": planned.settings}, resume=args.resume, overwrite=args.overwrite)
    costs = run.score(lm, planned.passes, groups, line, index=index, quiet=args.quiet)

    baseline = baseline_of(planned.settings, args.baseline)
    parts, length = {}, {"ratio": args.length_ratio}
    for part, chosen in (("all", [True] * len(index)), ("matched", matched)):
        of_part = [i for i, taken in zip(index, chosen, strict=True) if taken]
        lines = {label: run.of(label, of_part) for label in methods}
        parts[part] = summarize(lines, tuple(HEADS), baseline=baseline, seed=args.seed) if of_part else {}
        length[part] = length_statistics([pair for pair, taken in zip(tokens, chosen, strict=True) if taken])
    results = {
        **common,
        "protocol_details": {
            "prompt": "the question in the training format; the answer without an end of turn",
            "excluded": "questions of --train-run's training rows",
            "raw": "sum of the right answer's scores exceeds that of the hallucinated one",
            "per_token": "the same of the means over tokens",
            "matched": f"answers' token counts differ at most by a factor of {args.length_ratio:g}",
            "length_auc": "chance that a hallucinated answer has more tokens than a right one, ties half",
        },
        "metrics": list(HEADS),
        "n_questions": len(index),
        "n_excluded": n_excluded,
        "n_answers": len(encoded),
        "boundary_merged": sum(c.boundary_merged for c in encoded),
        "length": length,
        "baseline": baseline,
        "statistics": stats.describe(args.seed),
        "command": called(parser.prog, argv),
        **environment(lm.mesh),
        "resumed_lines": run.resumed,
        "methods": {name: {"settings": s, **costs[name]} for name, s in planned.settings.items()},
        "parts": parts,
    }
    tables = tables_of(results)
    run.finish(results, tables, plots_of(results), index)
    for note in note_undefined(parts["all"]):
        logger.warning(note)
    if not length["matched"]["n"]:
        logger.warning("no pair's answers are within a factor of %g in length", args.length_ratio)
    show(tables)


if __name__ == "__main__":
    sys.exit(main())
