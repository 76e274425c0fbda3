"""`python -m imae_jax.evaluate.iti`: finds ITI's directions on TruthfulQA's questions.

Writes a file of directions per fold, fitted on the questions of the *other* folds, and `folds.json`: see
`evaluate.folds`. `--methods iti:directions=OUT` takes the whole directory.

Source: Li et al., arXiv 2306.03341, section 3 and their code's defaults.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imae_jax.cli import ArgumentParser, command, join_processes, model_arguments
from imae_jax.evaluate import folds
from imae_jax.evaluate.benchmarks.questions import load_data

BEST_HEADS = 48  # the number that `iti` shifts by default


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.iti",
        description="Finds ITI's directions by cross-validation over questions: OUT/fold0.safetensors, …",
    )
    folds.add_arguments(parser)
    parser.add_argument("--data", default="demo", help="TruthfulQA.csv, demo (embedded questions) or hub")
    args = parser.parse_args(argv)
    join_processes(args)
    questions = load_data(args.data).questions
    with folds.new_folds(args, questions, {"data": args.data}) as (out, answers):
        accuracies = _fit(args, out, answers)
    print(f"wrote {args.out}: validation accuracy of the best heads {accuracies}")


def _fit(args: argparse.Namespace, out: Path, answers: folds.Answers) -> str:
    """Writes the files of all folds; returns the mean validation accuracy of the best heads in each."""
    from imae_jax.activations import capture
    from imae_jax.convert import load_model
    from imae_jax.convert.iti import write_directions
    from imae_jax.evaluate import probes

    lm = load_model(args.model, **model_arguments(args))
    heads = capture(lm, answers.texts, heads=True, quiet=args.quiet).heads
    accuracies = []
    for fold in range(args.folds):
        others = answers.fold_of != fold
        directions = probes.find_directions(
            heads[others], answers.labels[others], answers.question_of[others], seed=args.seed
        )
        write_directions(out / f"fold{fold}.safetensors", directions)
        accuracies.append(np.sort(directions.accuracy, axis=None)[-BEST_HEADS:].mean())
    return ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)


if __name__ == "__main__":
    sys.exit(main())
