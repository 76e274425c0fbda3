"""Fits by cross-validation over questions, which `iti` and `steer` share.

A directory of folds holds a file for each fold, fitted on the questions of the *other* folds, and
`folds.json`, which says which question belongs to which fold: no question is scored with what was fitted on
it. Evaluations take the whole directory, any command one of its files.
"""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    add_process_arguments,
    at_least,
    lock_outputs,
)
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.questions import Question
from imae_jax.files import dumps, new_directory

if TYPE_CHECKING:
    from imae_jax.decode.methods import Resource

FOLDS_FILE = "folds.json"
FOLD_FILES = {"directions": "fold{}.safetensors", "vectors": "fold{}.gguf"}
"""Names of the files by `Resource.kind`."""
ALL = "all"
"""Stem of the file that is fitted on all folds, where there is one."""


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--folds", type=int, default=2, help="number of folds (default: 2)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of folds and validation splits")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


@dataclasses.dataclass(frozen=True)
class Answers:
    """All answers of the questions.

    Attributes:
        texts: questions with an answer, as ITI's code puts them.
        labels: bool [n], is the answer true?
        question_of: int [n], number of its question.
        fold_of: int [n], that question's fold.
    """

    texts: list[str]
    labels: np.ndarray
    question_of: np.ndarray
    fold_of: np.ndarray


@contextlib.contextmanager
def new_folds(
    args: argparse.Namespace, questions: Sequence[Question], settings: Mapping[str, Any]
) -> Iterator[tuple[Path, Answers]]:
    """The directory of folds that becomes `args.out` when the block succeeds, and what to fit on.

    Args:
        args: of `add_arguments`.
        questions: all of them.
        settings: what else to record.

    Raises:
        UserError: too few questions for the folds.
    """
    folds = assign_folds([question.text for question in questions], args.folds, args.seed)
    if not 2 <= args.folds <= len(folds) // 2:
        raise UserError(f"--folds {args.folds} of {len(folds)} questions: give 2 to half their number")
    answers = [(i, a, a in q.true) for i, q in enumerate(questions) for a in (*q.true, *q.false)]
    question_of, labels = (np.array([answer[k] for answer in answers]) for k in (0, 2))
    texts = [f"Q: {questions[i].text} A: {answer}" for i, answer, _ in answers]
    fold_of = np.array([folds[questions[i].text] for i in question_of])
    lock_outputs(args.out)
    with new_directory(args.out, marker=FOLDS_FILE, overwrite=args.overwrite) as out:
        yield out, Answers(texts, labels, question_of, fold_of)
        record = {"model": args.model, **settings, "seed": args.seed, "questions": folds}
        (out / FOLDS_FILE).write_text(dumps(record, indent=2) + "\n", encoding="utf-8")


def assign_folds(questions: Sequence[str], folds: int, seed: int) -> dict[str, int]:
    """The fold of every question, by its text."""
    texts = list(dict.fromkeys(questions))
    order = np.random.default_rng(seed).permutation(len(texts))
    return {texts[i]: rank % folds for rank, i in enumerate(order.tolist())}


def fold_files(resource: "Resource", questions: Sequence[str]) -> dict[Path, list[int]]:
    """The indices of the questions that each file of a directory of folds is for.

    For other data than it was fitted on there is a file of all folds, or the first.

    Raises:
        UserError: some questions belong to a fold, but not all.
    """
    directory = Path(resource.reference)
    try:
        folds = json.loads((directory / FOLDS_FILE).read_text(encoding="utf-8"))["questions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory} holds no readable {FOLDS_FILE}: make it with imae_jax.evaluate.iti or steer"
        ) from error
    if not any(question in folds for question in questions):
        first = directory / FOLD_FILES[resource.kind].format(0)
        whole = first.with_stem(ALL)
        return {whole if whole.exists() else first: [*range(len(questions))]}
    files: dict[Path, list[int]] = {}
    for i, question in enumerate(questions):
        if question not in folds:
            raise UserError(
                f"{directory}: question {question!r} belongs to no fold, others do: fit {resource.kind} on it"
            )
        files.setdefault(directory / FOLD_FILES[resource.kind].format(folds[question]), []).append(i)
    return files
