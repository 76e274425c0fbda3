"""`python -m imae_jax.evaluate.compare RUN_A RUN_B`: two runs on the items that both have."""

import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imae_jax.cli import ArgumentParser, command, lock_outputs
from imae_jax.errors import UserError
from imae_jax.files import new_directory

from . import plots, stats
from .answers import HEADS as ANSWERS_HEADS
from .halueval import HEADS as HALUEVAL_HEADS
from .halueval import is_matched
from .runs import (
    COMPARISON_FILE,
    called,
    differences,
    dumps,
    environment,
    read_lines,
    read_run,
    write_outputs,
)
from .summaries import differences_table, sums_of, values_of
from .tables import Table, show
from .truthfulqa import HEADS as TRUTHFULQA_HEADS

logger = logging.getLogger(__name__)

# What must be equal for items to mean the same.
MUST_AGREE = ("protocol", "data.sha256", "length.ratio", "generation.max_new_tokens")
HEADS = {
    "truthfulqa": TRUTHFULQA_HEADS,
    "truthfulqa-answers": ANSWERS_HEADS,
    "halueval": HALUEVAL_HEADS,
}
# Of HaluEval's pairs, by the name of a comparison's part.
PARTS = {"all": "all questions", "matched": "pairs of matched length"}


def compare_runs(
    path_a: Path,
    path_b: Path,
    pairs: Sequence[Sequence[str]] | None = None,
    *,
    anyway: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Differences B − A of every pair of methods, item by item; of HaluEval also on matched pairs alone.

    A pair of answers is matched if it is so in both runs, whose tokenizers may differ.

    Args:
        path_a, path_b: directories of finished runs.
        pairs: methods of A and of B; default: all that both have.
        anyway: compare runs of different protocols or data, on the questions that both have.
        seed: of the bootstrap.

    Raises:
        UserError: the runs do not go together, or have no item in common.
    """
    a, b = read_run(path_a), read_run(path_b)
    if a["benchmark"] != b["benchmark"] or a["benchmark"] not in HEADS:
        raise UserError(f"{path_a} is of {a['benchmark']}, {path_b} of {b['benchmark']}: nothing to compare")
    differing = [d for d in differences(a, b) if d[0] in MUST_AGREE]
    for name, of_a, of_b in [] if anyway else differing:
        raise UserError(
            f"{path_a} and {path_b} differ in {name} ({of_a}, {of_b}): pass --anyway to compare them all the "
            "same"
        )
    metrics = [metric for metric in a["metrics"] if metric in b["metrics"]]
    if not metrics:
        raise UserError(f"{path_a} and {path_b} have no metric in common")
    if pairs is None:
        pairs = [(label, label) for label in a["methods"] if label in b["methods"]]
    if not pairs:
        raise UserError(f"no method is in both {path_a} and {path_b}: give --pair METHOD_OF_A METHOD_OF_B")
    lines_a, lines_b = read_lines(path_a), read_lines(path_b)
    ratios = [run["length"]["ratio"] for run in (a, b) if "length" in run]
    parts: dict[str, dict[str, Any]] = {}
    settings = {}
    for of_a, of_b in pairs:
        for path, results, label in ((path_a, a, of_a), (path_b, b, of_b)):
            if label not in results["methods"]:
                raise UserError(f"{path} has no method {label!r}: it has {', '.join(results['methods'])}")
        own, other = _by_question(lines_a, of_a), _by_question(lines_b, of_b)
        common = [question for question in own if question in other]
        if not common:
            raise UserError(f"{path_a} and {path_b} have no question in common")
        name = of_a if of_a == of_b else f"{of_a} → {of_b}"
        settings[name] = [a["methods"][of_a]["settings"], b["methods"][of_b]["settings"]]
        chosen = {"all": common}
        if ratios:
            tokens = {q: (own[q]["tokens"], other[q]["tokens"]) for q in common}
            matched = [q for q in common if all(map(is_matched, tokens[q], ratios))]
            chosen |= {"matched": matched} if matched else {}
        for part, questions in chosen.items():
            values_a, values_b = (
                {metric: values_of([of[q] for q in questions], metric) for metric in metrics}
                for of in (own, other)
            )
            parts.setdefault(part, {})[name] = stats.compare(metrics, values_b, values_a, seed=seed)
    return {
        "runs": [str(path_a), str(path_b)],
        "benchmark": a["benchmark"],
        "protocols": [a["protocol"], b["protocol"]],
        "models": [a["model"], b["model"]],
        "metrics": metrics,
        "differing": {name: [of_a, of_b] for name, of_a, of_b in differing},
        "statistics": stats.describe(seed),
        "settings": settings,
        "parts": parts,
    }


def _by_question(lines: Sequence[Mapping[str, Any]], method: str) -> dict[tuple[str, int], Mapping[str, Any]]:
    """A method's lines by question, since a row's number depends on the data; equal ones are counted."""
    seen: Counter[str] = Counter()
    found = {}
    for line in lines:
        if line["method"] == method:
            found[line["question"], seen[line["question"]]] = line
            seen[line["question"]] += 1
    return found


def comparison_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """The tables of a `comparison.json`: differences, the second run less the first."""
    sums = {name: [sums_of(s) for s in pair] for name, pair in comparison["settings"].items()}
    tables = []
    for part, compared in comparison["parts"].items():
        table = differences_table(_title(comparison, part), compared, _heads(comparison))
        rows = [(row[0], " → ".join(dict.fromkeys(sums[row[0]])), *row[1:]) for row in table.rows]
        tables.append(Table(table.title, ("method", "sums", *table.columns[1:]), tuple(rows)))
    return tables


def comparison_plots(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The plots of a `comparison.json`, by name."""
    heads, parts = _heads(comparison), comparison["parts"]
    return {
        f"{part}-differences" if len(parts) > 1 else "differences": plots.differences(
            _title(comparison, part), compared, heads
        )
        for part, compared in parts.items()
    }


def _heads(comparison: Mapping[str, Any]) -> dict[str, str]:
    return {metric: HEADS[comparison["benchmark"]][metric] for metric in comparison["metrics"]}


def _title(comparison: Mapping[str, Any], part: str) -> str:
    first, second = comparison["runs"]
    shown = PARTS[part] if len(comparison["parts"]) > 1 else "questions"
    title = f"{second} less {first}, on {shown} that both have; {comparison['protocols'][0]}"
    if comparison["differing"]:
        title += f"; the runs differ in {', '.join(comparison['differing'])}"
    return title


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.compare",
        description="Paired differences of two evaluation runs, question by question.",
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", type=Path, help="output directory of a run")
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar=("METHOD_OF_A", "METHOD_OF_B"),
        help="methods to compare; may be given repeatedly (default: all that both have)",
    )
    parser.add_argument("--anyway", action="store_true", help="also runs of different protocols or data")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--out", type=Path, help="directory to write, too")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: give at least 0")
    lock_outputs(args.out)
    comparison = compare_runs(*args.runs, args.pair, anyway=args.anyway, seed=args.seed)
    if comparison["benchmark"] == "halueval" and "matched" not in comparison["parts"]:
        logger.warning("no pair's answers are of matched length in both runs")
    comparison |= {"command": called(parser.prog, argv), **environment()}
    tables = comparison_tables(comparison)
    if args.out is not None:
        with new_directory(args.out, marker=COMPARISON_FILE, overwrite=args.overwrite) as out:
            write_outputs(out, tables, comparison_plots(comparison))
            (out / COMPARISON_FILE).write_text(dumps(comparison, indent=2) + "\n", encoding="utf-8")
    show(tables)


if __name__ == "__main__":
    sys.exit(main())
