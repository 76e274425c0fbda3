"""`python -m imae_jax.evaluate.report RUN…`: a Markdown page with tables and plots of runs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imae_jax.cli import ArgumentParser, command
from imae_jax.convert.hf import read_json
from imae_jax.errors import UserError
from imae_jax.files import new_directory
from imae_jax.train.plots import GATES, LOSSES, MODES, training_plot
from imae_jax.train.run_log import EVALUATION_FILE, METRICS_FILE, read_lines

from .truthfulqa import METRICS, RESULTS_FILE

REPORT_FILE = "report.md"


def bar_plot(results: dict[str, Any], path: Path) -> None:
    """MC1, MC2 and MC3 of every method as grouped bars."""
    from matplotlib.figure import Figure

    methods = results["methods"]
    figure = Figure(figsize=(1.8 + 2.0 * len(METRICS), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for number, (name, row) in enumerate(methods.items()):
        offset = (number - (len(methods) - 1) / 2) * width
        values = [row[metric] or 0.0 for metric in METRICS]
        bars = axes.bar([i + offset for i in range(len(METRICS))], values, width, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axes.set_xticks(range(len(METRICS)), [metric.upper() for metric in METRICS])
    axes.set_ylabel("score × 100")
    axes.set_title(f"{results['protocol']}, {results['n_questions']} questions", fontsize=9)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not lines:
        raise UserError(f"{path} holds no steps: the run has not trained yet")
    keys = {"step", "tokens_per_second", *LOSSES, *GATES}
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not keys <= line.keys():
            raise UserError(f"{path} line {number} lacks some of {', '.join(sorted(keys))}")
    return lines


def _read_results(path: Path) -> dict[str, Any]:
    results = read_json(path)
    keys = ("protocol", "model", "n_questions", "n_answers", "dtype", "versions", "methods")
    missing = [key for key in keys if key not in results]
    if missing or not results["methods"]:
        raise UserError(f"{path} lacks {', '.join(missing) or 'methods'}: evaluate again")
    return results


def results_markdown(results: dict[str, Any]) -> str:
    """A `results.json` as a Markdown table."""
    head = "| method | " + " | ".join(metric.upper() for metric in METRICS) + " | seconds |"
    rows = [head, "|---|" + "---:|" * (len(METRICS) + 1)]
    for name, row in results["methods"].items():
        values = " | ".join("–" if row[m] is None else f"{row[m]:.2f}" for m in METRICS)
        rows.append(f"| {name} | {values} | {row['seconds']:.1f} |")
    return "\n".join(rows)


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Writes `report.md` and its plots for training and evaluation runs.

    Args:
        runs: output directories of `imae_jax.train` and `imae_jax.evaluate.truthfulqa`.
        out: an existing, empty directory.

    Raises:
        UserError: a directory is neither.
    """
    parts = ["# Report", ""]
    for number, run in enumerate(runs, 1):
        if (run / RESULTS_FILE).is_file():
            results = _read_results(run / RESULTS_FILE)
            plot = f"{number}-truthfulqa.png"
            bar_plot(results, out / plot)
            parts += [
                f"## TruthfulQA: {results['model']}",
                "",
                f"Protocol `{results['protocol']}`, {results['n_questions']} questions, "
                f"{results['n_answers']} answers, {results['dtype']}.",
                "",
                results_markdown(results),
                "",
                f"![MC1, MC2, MC3 of every method]({plot})",
                "",
                f"Versions: {_joined(results['versions'])}.",
                "",
            ]
        elif (run / METRICS_FILE).is_file():
            lines = read_metrics(run / METRICS_FILE)
            plot = f"{number}-training.png"
            measured = read_lines(run / EVALUATION_FILE)
            training_plot(lines, out / plot, measured)
            first, last = lines[0], lines[-1]
            held_out = ["held out"] if measured else []
            right = {
                mode: f"{measured[-1][key]:.3f}"
                for key, mode in MODES.items()
                if measured and key in measured[-1]
            }
            parts += [
                f"## Training: {run}",
                "",
                f"{last['step']} steps, {last['tokens_per_second']:.0f} tokens/s at the end.",
                "",
                f"| {' | '.join(['loss', 'first step', 'last step', *held_out])} |",
                "|---|---:|---:|" + "---:|" * len(held_out),
                *(
                    f"| {label} | " + " | ".join(f"{x[k]:.3f}" for x in [first, last, *measured[-1:]]) + " |"
                    for k, label in LOSSES.items()
                ),
                "",
                *(
                    ["Mean log-probability of right answers' tokens, held out: " + _joined(right) + ".", ""]
                    if right
                    else []
                ),
                f"![training curves]({plot})",
                "",
            ]
        else:
            raise UserError(
                f"{run} holds neither {RESULTS_FILE} nor {METRICS_FILE}: give output directories of "
                "imae_jax.train or imae_jax.evaluate.truthfulqa"
            )
    (out / REPORT_FILE).write_text("\n".join(parts), encoding="utf-8")


def _joined(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.report",
        description="Gathers training and evaluation runs into one Markdown page with plots.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="output directory of a run")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    with new_directory(args.out, marker=REPORT_FILE, overwrite=args.overwrite) as out:
        write_report(args.runs, out)
    print(f"wrote {Path(args.out) / REPORT_FILE}")


if __name__ == "__main__":
    sys.exit(main())
