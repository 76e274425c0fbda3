"""TruthfulQA's questions: from the benchmark's CSV, from JSON in the hub's form, or from the hub.

Sources: https://github.com/sylinrl/TruthfulQA (TruthfulQA.csv, data/mc_task.json) and the data set
truthfulqa/truthful_qa on the HuggingFace hub.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imae_jax.errors import UserError, first_line
from imae_jax.files import read_rows, read_text

COLUMNS = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")
BEST_INCORRECT = "Best Incorrect Answer"
DATA_DIRECTORY = Path(__file__).parent / "data"
DEMO_DATA = DATA_DIRECTORY / "demo_truthfulqa.csv"
HUB_ID = "truthfulqa/truthful_qa"
NEWER_CSV = "TruthfulQA.csv of https://github.com/sylinrl/TruthfulQA since January 2025"
FORMS = ("answers", "targets", "binary")
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
        questions: all of the source, in its order.
        reference: as the user gave it.
        kind: `csv`, `json` or `hub`; `demo` for the shipped set.
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
        reference: `demo` for the shipped questions, `hub`, or a CSV, JSON or JSONL file.
        form: `answers`, the columns of the CSV; `targets`, the choices of mc1_targets and mc2_targets, as
            they are, where the source has them; `binary`, the best against the best incorrect answer.

    Raises:
        UserError: names what is missing or wrong, and where.
    """
    if reference == "hub":
        questions, kind = _from_hub(form), "hub"
    elif Path(reference).suffix in (".json", ".jsonl"):
        questions, kind = _from_json(Path(reference), form), "json"
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
        UserError: names the missing column, or the row that has no question or answers.
    """
    text = read_text(path, "data file")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = ("Question", "Best Answer", BEST_INCORRECT) if form == "binary" else COLUMNS
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV: {error}") from error
    if missing == [BEST_INCORRECT]:
        raise UserError(f"{path} has no column {BEST_INCORRECT!r}: give {NEWER_CSV}")
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: it is not TruthfulQA's CSV")
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not valid CSV: {error}") from error
    questions = []
    for index, row in enumerate(rows):
        cells = {name: (row.get(name) or "").strip() for name in (*columns, "Category")}
        if form == "binary":
            true, false = (), _closed([cells[BEST_INCORRECT]])
        else:
            true, false = (_closed(cells[name].split(";")) for name in COLUMNS[2:])
        place = f"{path} row {index}"
        questions.append(
            _question(index, place, cells["Question"], cells["Best Answer"], true, false, cells["Category"])
        )
    if not questions:
        raise UserError(f"{path} holds no questions: give a file with rows")
    return questions


def _question(
    index: int,
    place: str,
    text: str,
    best: str,
    true: tuple[str, ...],
    false: tuple[str, ...],
    category: str = "",
) -> Question:
    """A question whose best answer is among the true ones."""
    best_answer = "".join(_closed([best]))
    if best_answer and best_answer not in true:
        true = (*true, best_answer)
    if not (text and best_answer and false):
        raise UserError(f"{place} lacks a question, a best answer or incorrect answers: fill or remove it")
    return Question(index, text, true, false, true.index(best_answer), category)


def _closed(answers: Sequence[str]) -> tuple[str, ...]:
    """Answers that are not empty, each closed with a full stop."""
    stripped = [answer.strip() for answer in answers]
    return tuple(answer if answer.endswith(".") else answer + "." for answer in stripped if answer)


def _from_json(path: Path, form: str) -> list[Question]:
    rows = read_rows(path, "data file")
    if not rows:
        raise UserError(f"{path} holds no questions: give a list of objects, or one object a line")
    return [_from_targets(i, place, row, form) for i, (place, row) in enumerate(rows)]


def _from_targets(index: int, place: str, row: Any, form: str) -> Question:
    """A question of the hub's multiple-choice form: `mc1_targets` and `mc2_targets` hold the choices.

    The choices of one are not always those of the other. Each may be `{"choices": […], "labels": […]}`, or
    `{answer: label}` as in the benchmark's mc_task.json.
    """
    if form == "binary":
        raise UserError(f"{place}: the binary protocol needs a column {BEST_INCORRECT!r}: give {NEWER_CSV}")
    choices, labels = {}, {}
    for name in ("mc1_targets", "mc2_targets"):
        targets = row.get(name) if isinstance(row, dict) else None
        if not isinstance(targets, dict):
            raise UserError(f"{place} has no {name}: the hub's multiple_choice form is needed")
        listed = targets if "choices" in targets else {"choices": [*targets], "labels": [*targets.values()]}
        choices[name], labels[name] = listed["choices"], listed.get("labels", [])
        are_lists = isinstance(choices[name], list) and isinstance(labels[name], list)
        are_pairs = are_lists and len(choices[name]) == len(labels[name])
        if not are_pairs or not all(isinstance(c, str) for c in choices[name]):
            raise UserError(f"{place}: {name} needs a label for every choice")
    mc1, mc2 = ([(c, bool(x)) for c, x in zip(choices[n], labels[n], strict=True)] for n in choices)
    question = str(row.get("question") or "").strip()
    right = [choice for choice, label in mc1 if label]
    if len(right) != 1 or not mc1[0][1]:
        raise UserError(f"{place}: the first choice of mc1_targets, and no other, must have label 1")
    if not question or len(mc1) < 2 or all(label for _, label in mc2) or not any(label for _, label in mc2):
        raise UserError(f"{place} lacks a question, a best answer or incorrect answers: fill or remove it")
    true, false = ([c for c, x in mc2 if x is wanted] for wanted in (True, False))
    if form != "targets":
        return _question(index, place, question, right[0], _closed(true), _closed(false))
    mc2_true, mc2_false = len(true), len(false)
    true += [choice for choice in right if choice not in true]
    false += [choice for choice, label in mc1 if not label and choice not in false]
    mc1_false = tuple(false.index(choice) for choice, label in mc1 if not label)
    return Question(
        index,
        question,
        tuple(true),
        tuple(false),
        true.index(right[0]),
        mc1_false=mc1_false,
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
        return [_from_targets(i, f"{HUB_ID} row {i}", row, form) for i, row in enumerate(rows)]
    return [
        _question(
            i,
            f"{HUB_ID} row {i}",
            row["question"].strip(),
            row["best_answer"].strip(),
            _closed(row["correct_answers"]),
            _closed(row["incorrect_answers"]),
            row["category"],
        )
        for i, row in enumerate(rows)
    ]


def select(texts: Sequence[str], split: str, *, seed: int = 0, dev_share: float = 0.2) -> list[int]:
    """Places of the items of a split, ascending.

    `dev` and `test` share no text, and do not depend on the order of the data.

    Args:
        texts: of the items.
        split: `dev`, `test` or `all`.
        seed: of the draw.
        dev_share: of the texts that `dev` gets, rounded to a whole number.
    """
    if split == "all":
        return list(range(len(texts)))
    unique = sorted(set(texts))
    order = np.random.default_rng(seed).permutation(len(unique))
    dev = {unique[i] for i in order[: round(dev_share * len(unique))]}
    return [i for i, text in enumerate(texts) if (text in dev) == (split == "dev")]
