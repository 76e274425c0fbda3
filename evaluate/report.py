"""`python -m imae_jax.evaluate.report RUN…`: a Markdown page with tables and plots of runs."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax.cli import ArgumentParser, command
from imae_jax.errors import UserError
from imae_jax.files import new_directory
from imae_jax.train.plots import GATES, LOSSES, MODES, training_plot
from imae_jax.train.run_log import EVALUATION_FILE, METRICS_FILE, read_lines

from .runs import MARKDOWN_FILE, RESULTS_FILE, RUN_FILE, read_run

REPORT_FILE = "report.md"
TITLES = {"truthfulqa": "TruthfulQA", "halueval": "HaluEval QA", "harm": "Neutral text"}


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


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Writes `report.md` and its plots for training and evaluation runs.

    Args:
        runs: output directories of `imae_jax.train` and of evaluations.
        out: an existing, empty directory.

    Raises:
        UserError: a directory is neither.
    """
    parts = ["# Report", ""]
    for number, run in enumerate(runs, 1):
        if (run / RESULTS_FILE).is_file() or (run / RUN_FILE).is_file():
            results = read_run(run)
            parts += [f"## {TITLES[results['benchmark']]}: {results['model']}", ""]
            parts += [f"Protocol `{results['protocol']}`, {results['dtype']}.", ""]
            parts += [_read(run / MARKDOWN_FILE), ""]
            for plot in sorted(run.glob("*.png")):
                copy = f"{number}-{plot.name}"
                shutil.copyfile(plot, out / copy)
                parts += [f"![{plot.stem}]({copy})", ""]
            parts += [f"Versions: {_joined(results['versions'])}.", ""]
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
                "imae_jax.train or imae_jax.evaluate"
            )
    (out / REPORT_FILE).write_text("\n".join(parts), encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


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
