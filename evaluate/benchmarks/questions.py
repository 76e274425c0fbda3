"""TruthfulQA's questions, from the benchmark's CSV or from the hub, and splits of questions.

Sources: https://github.com/sylinrl/TruthfulQA (TruthfulQA.csv) and the data set truthfulqa/truthful_qa on the
HuggingFace hub.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imae_jax.errors import UserError, first_line
from imae_jax.files import read_csv

COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
BEST_INCORRECT = "Best Incorrect Answer"
DATA_DIRECTORY = Path(__file__).parents[1] / "data"
DEMO_DATA = DATA_DIRECTORY / "demo_truthfulqa.csv"
HUB_ID = "truthfulqa/truthful_qa"
NEWER_CSV = "TruthfulQA.csv of https://github.com/sylinrl/TruthfulQA since January 2025"
SPLITS = ("dev", "test", "all")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its answers.

    Attributes:
        index: number of its row in the data, from 0.
        text: the question.
        true, false: the answers; `true` holds the best one.
        best: index of the best answer in `true`.
        category: the CSV's, or "".
        mc1_false: indices of the false answers that MC1 compares with; None: all.
        mc2_true, mc2_false: how many of the first answers MC2 counts; None: all.
    """

    index: int
    text: str
    true: tuple[str, ...]
    false: tuple[str, ...]
    best: int
    category: str = ""
    mc1_false: tuple[int, ...] | None = None
    mc2_true: int | None = None
    mc2_false: int | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        return self.true + self.false


@dataclasses.dataclass(frozen=True)
class Data:
    """Questions and where they came from.

    Attributes:
        questions: all questions of the source, in its order.
        reference: reference of the source, as the user gave it.
        kind: `csv` or `hub`; `demo` for the shipped set.
    """

    questions: tuple[Question, ...]
    reference: str
    kind: str

    @property
    def sha256(self) -> str:
        """Hash of the questions and answers as they are scored: line ends or columns do not matter."""
        digest = hashlib.sha256()
        for q in self.questions:
            line = [q.text, q.true, q.false, q.best, q.mc1_false, q.mc2_true, q.mc2_false]
            digest.update(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()


def load_data(reference: str, form: str = "answers") -> Data:
    """The questions of a source.

    Args:
        reference: `demo` for the shipped questions, `hub`, or a CSV file.
        form: `answers`, the columns of the CSV; `targets`, the choices of mc1_targets and mc2_targets, as
            they are, where the source has them; `binary`, the best against the best incorrect answer.

    Raises:
        UserError: names what is missing or wrong, and where.
    """
    if reference == "hub":
        questions, kind = _from_hub(form), "hub"
    else:
        demo = reference == "demo"
        path = DEMO_DATA if demo else Path(reference)
        questions, kind = read_questions(path, form), "demo" if demo else "csv"
    first: dict[str, int] = {}
    for question in questions:
        other = first.setdefault(question.text, question.index)
        if other != question.index:
            raise UserError(
                f"{reference} rows {other} and {question.index} ask the same question {question.text!r}: "
                "remove one"
            )
    return Data(tuple(questions), reference, kind)


def read_questions(path: str | Path, form: str = "answers") -> list[Question]:
    """Reads the benchmark's CSV, or any subset of its rows. Answers are closed with a full stop.

    Raises:
        UserError: names the missing column, or the line that has no question or answers.
    """
    rows = read_csv(path, "data file")
    if not rows:
        raise UserError(f"{path} holds no questions: give a file with rows")
    columns = ("Question", "Best Answer", BEST_INCORRECT) if form == "binary" else COLUMNS
    missing = [name for name in columns if name not in rows[0][1]]
    if missing == [BEST_INCORRECT]:
        raise UserError(f"{path} has no column {BEST_INCORRECT!r}: give {NEWER_CSV}")
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: it is not TruthfulQA's CSV")
    questions = []
    for index, (line, row) in enumerate(rows):
        true, false = [], [row[columns[-1]]]
        if form != "binary":
            true, false = (row[name].split(";") for name in COLUMNS[2:])
        answers = row["Best Answer"], true, false
        questions.append(_question(index, line, row["Question"], *answers, row.get("Category", "").strip()))
    return questions


def _question(
    index: int, row: str, text: str, best: str, true: Sequence[str], false: Sequence[str], category: str
) -> Question:
    """A question whose best answer is among the true ones; `row` names it in errors."""
    (best,), true, false = _closed([best]) or ("",), _closed(true), _closed(false)
    if best not in true:
        true = (*true, best)
    if not (text.strip() and best and false):
        raise UserError(f"{row} lacks a question, a best answer or incorrect answers: fill or remove it")
    return Question(index, text.strip(), true, false, true.index(best), category)


def _closed(answers: Sequence[str]) -> tuple[str, ...]:
    """Answers that are not empty, each closed with a full stop."""
    stripped = [answer.strip() for answer in answers]
    return tuple(answer if answer.endswith(".") else answer + "." for answer in stripped if answer)


def _from_targets(index: int, row: dict[str, Any]) -> Question:
    """A question of the hub's multiple-choice form: the choices of mc1 and mc2, which may differ."""
    mc1, mc2 = (
        list(zip(row[name]["choices"], row[name]["labels"], strict=True))
        for name in ("mc1_targets", "mc2_targets")
    )
    right = [choice for choice, label in mc1 if label]
    if len(right) != 1 or not mc1[0][1]:
        raise UserError(f"{HUB_ID} row {index}: the first choice of mc1_targets, and no other, must be right")
    true, false = ([choice for choice, label in mc2 if bool(label) is wanted] for wanted in (True, False))
    mc2_true, mc2_false = len(true), len(false)
    true += [choice for choice in right if choice not in true]
    false += [choice for choice, label in mc1 if not label and choice not in false]
    return Question(
        index,
        row["question"].strip(),
        tuple(true),
        tuple(false),
        true.index(right[0]),
        mc1_false=tuple(false.index(choice) for choice, label in mc1 if not label),
        mc2_true=mc2_true,
        mc2_false=mc2_false,
    )


def _from_hub(form: str) -> list[Question]:
    if form == "binary":
        raise UserError(f"the hub's {HUB_ID} has no {BEST_INCORRECT!r}: give {NEWER_CSV}")
    import datasets

    name = "multiple_choice" if form == "targets" else "generation"
    try:
        rows = list(datasets.load_dataset(HUB_ID, name, split="validation"))
    except Exception as error:  # The hub client's errors share no base class.
        raise UserError(
            f"TruthfulQA cannot be fetched from the hub ({first_line(error)}): pass --data FILE"
        ) from error
    if form == "targets":
        return [_from_targets(i, row) for i, row in enumerate(rows)]
    names = ("question", "best_answer", "correct_answers", "incorrect_answers", "category")
    return [_question(i, f"{HUB_ID} row {i}", *(row[name] for name in names)) for i, row in enumerate(rows)]


def select(texts: Sequence[str], split: str, *, seed: int = 0, dev_share: float = 0.2) -> list[int]:
    """Numbers of the items of a split, ascending.

    `dev` and `test` share no text, and do not depend on the order of the data.

    Args:
        texts: texts of the items.
        split: `dev`, `test` or `all`.
        seed: seed of the draw.
        dev_share: fraction of the texts in `dev`, rounded to a whole number of them.
    """
    if split == "all":
        return list(range(len(texts)))
    unique = sorted(set(texts))
    order = np.random.default_rng(seed).permutation(len(unique))
    dev = {unique[i] for i in order[: round(dev_share * len(unique))]}
    return [i for i, text in enumerate(texts) if (text in dev) == (split == "dev")]
