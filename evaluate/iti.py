"""`python -m imae_jax.evaluate.iti`: finds ITI's directions on TruthfulQA's questions.

Writes one file of directions per fold, fitted on the questions of the *other* folds, and `folds.json`, which
says which question belongs to which fold: no question is scored with a direction that saw it.
`evaluate.truthfulqa --methods iti:directions=OUT` takes the whole directory; a single file goes to any
command.

Source: Li et al., arXiv 2306.03341, section 3 and their code's defaults.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    add_process_arguments,
    at_least,
    command,
    join_processes,
    lock_outputs,
    model_arguments,
)
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.questions import Question, load_data
from imae_jax.files import new_directory

FOLDS_FILE = "folds.json"
BEST_HEADS = 48  # the number that `iti` shifts by default


def assign_folds(questions: Sequence[Question], folds: int, seed: int) -> dict[str, int]:
    """The fold of every question, by its text."""
    texts = list(dict.fromkeys(question.text for question in questions))
    order = np.random.default_rng(seed).permutation(len(texts))
    return {texts[i]: rank % folds for rank, i in enumerate(order.tolist())}


def fold_files(directory: Path, questions: Sequence[str]) -> dict[Path, list[int]]:
    """The indices of the questions that each file of a directory of folds is for.

    Raises:
        UserError: a question belongs to no fold.
    """
    try:
        folds = json.loads((directory / FOLDS_FILE).read_text(encoding="utf-8"))["questions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} holds no readable {FOLDS_FILE}: run imae_jax.evaluate.iti") from error
    files: dict[Path, list[int]] = {}
    for i, question in enumerate(questions):
        if question not in folds:
            raise UserError(f"{directory}: question {question!r} belongs to no fold: fit directions on it")
        files.setdefault(directory / f"fold{folds[question]}.safetensors", []).append(i)
    return files


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.iti",
        description="Finds ITI's directions by cross-validation over questions: OUT/fold0.safetensors, …",
    )
    add_model_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument("--data", default="demo", help="TruthfulQA.csv, demo (embedded questions) or hub")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--folds", type=int, default=2, help="number of folds (default: 2)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of folds and validation splits")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    join_processes(args)
    questions = load_data(args.data).questions
    if not 2 <= args.folds <= len(questions) // 2:
        raise UserError(f"--folds {args.folds} of {len(questions)} questions: give 2 to half their number")
    lock_outputs(args.out)
    with new_directory(args.out, marker=FOLDS_FILE, overwrite=args.overwrite) as out:
        accuracies = _fit(args, questions, out)
    print(f"wrote {args.out}: validation accuracy of the best heads {accuracies}")


def _fit(args: argparse.Namespace, questions: Sequence[Question], out: Path) -> str:
    """Writes the files of all folds; returns the mean validation accuracy of the best heads in each."""
    from imae_jax.convert import load_model
    from imae_jax.convert.iti import write_directions
    from imae_jax.evaluate import probes

    lm = load_model(args.model, **model_arguments(args))
    answers = [(i, a, a in q.true) for i, q in enumerate(questions) for a in (*q.true, *q.false)]
    texts = [f"Q: {questions[i].text} A: {answer}" for i, answer, _ in answers]
    heads = probes.collect_heads(lm, texts, quiet=args.quiet)
    question_of, labels = (np.array([answer[k] for answer in answers]) for k in (0, 2))
    folds = assign_folds(questions, args.folds, args.seed)
    fold_of = np.array([folds[questions[i].text] for i in question_of])
    accuracies = []
    for fold in range(args.folds):
        others = fold_of != fold
        directions = probes.find_directions(
            heads[others], labels[others], question_of[others], seed=args.seed
        )
        write_directions(out / f"fold{fold}.safetensors", directions)
        accuracies.append(np.sort(directions.accuracy, axis=None)[-BEST_HEADS:].mean())
    record = {"model": args.model, "data": args.data, "seed": args.seed, "questions": folds}
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (out / FOLDS_FILE).write_text(text, encoding="utf-8")
    return ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)


if __name__ == "__main__":
    sys.exit(main())
