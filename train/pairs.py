"""What a file of right and wrong answers is like, before training on it: `python -m imae_jax.train pairs`."""

import collections
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from scipy.optimize import minimize
from scipy.special import expit

from imae_jax import stats
from imae_jax.errors import UserError
from imae_jax.files import read_csv, read_rows, read_text
from imae_jax.train.data import Row, to_row

# Columns in which evaluation sets keep what a model is asked, in lower case: TruthfulQA, TriviaQA, Natural
# Questions; MemoTrap; FACTOR (its spelling); AdaCAD's NQ-Synth.
QUESTION_COLUMNS = ("question", "prompt", "turncated_prefixes", "full_prefix", "context_string")
OVERLAP = 0.8
LONG = 5
FOLDS = 10
RIDGE = 1.0
SHOWN = 5


def words(text: str) -> list[str]:
    """Its words in lower case, without punctuation."""
    return re.findall(r"\w+(?:['’.,]\w+)*", text.lower())


def difference(right: str, wrong: str) -> str:
    """Whether two answers differ in `one word`, in `one phrase`, in `several places`, or in `everything`."""
    first, second = words(right), words(wrong)
    if not set(first) & set(second):
        return "everything"
    while first and second and first[0] == second[0]:
        first, second = first[1:], second[1:]
    while first and second and first[-1] == second[-1]:
        first, second = first[:-1], second[:-1]
    if max(len(first), len(second)) <= 1:
        return "one word"
    return "several places" if set(first) & set(second) else "one phrase"


def word_matrix(texts: Sequence[str], vocabulary: dict[str, int]) -> scipy.sparse.csr_matrix:
    """Which words are in which text, float64 [texts, words]; new words join the vocabulary."""
    columns = [sorted({vocabulary.setdefault(w, len(vocabulary)) for w in words(text)}) for text in texts]
    ends = np.cumsum([0, *map(len, columns)])
    indices = np.array([i for row in columns for i in row], int)
    return scipy.sparse.csr_matrix(
        (np.ones(len(indices)), indices, ends), shape=(len(texts), len(vocabulary))
    )


def overlaps(questions: Sequence[str], texts: Sequence[str]) -> dict[int, tuple[float, str]]:
    """Questions that are also among an evaluation set's texts.

    Args:
        questions: those of the pairs.
        texts: what the evaluation set asks.

    Returns:
        By the question's index, the overlap and the text: 1.0 where the text has the question's words in
        their order (a question of fewer than `LONG` words and nothing else), else the Jaccard index of
        their sets of words where it is at least `OVERLAP`.
    """
    if not texts:
        return {}
    vocabulary: dict[str, int] = {}
    ours, theirs = (word_matrix(side, vocabulary) for side in (questions, texts))
    ours.resize(ours.shape[0], len(vocabulary))
    shared = (ours @ theirs.T).tocoo()
    sizes = [np.asarray(side.sum(axis=1)).ravel() for side in (ours, theirs)]
    joined = [f" {' '.join(words(text))} " for text in texts]
    asked = [f" {' '.join(words(question))} " for question in questions]
    matches: dict[int, tuple[float, str]] = {}
    for i, j, count in zip(shared.row.tolist(), shared.col.tolist(), shared.data, strict=True):
        jaccard = count / (sizes[0][i] + sizes[1][j] - count)
        inside = count == sizes[0][i] and len(asked[i].split()) >= LONG and asked[i] in joined[j]
        overlap = 1.0 if inside or asked[i] == joined[j] else min(jaccard, 0.999)
        if overlap >= OVERLAP and overlap > matches.get(i, (0.0, ""))[0]:
            matches[i] = overlap, texts[j]
    return matches


def form_accuracy(rows: Sequence[Row], *, seed: int = 0) -> stats.Mean:
    """How often a classifier that sees only the words of a pair's answers finds the right one.

    A logistic regression (L2) on which words an answer has, without the question, cross-validated: all rows
    of a question are in one fold. 0.5 means that form tells nothing.

    Returns:
        The share of pairs whose right answer has the higher score, ties half, with a bootstrap interval; no
        value where there are fewer questions than folds.
    """
    groups: dict[str, int] = {}
    group = np.array([groups.setdefault(row.question, len(groups)) for row in rows])
    if len(groups) < FOLDS:
        return stats.Mean(None, None, 0)
    vocabulary: dict[str, int] = {}
    matrix = word_matrix([a for r in rows for a in (r.right_answer, r.hallucinated_answer)], vocabulary)
    # In the difference of its two answers, the words that a pair shares cancel.
    x = scipy.sparse.csr_matrix(matrix[::2] - matrix[1::2])
    fold = (np.random.default_rng(seed).permutation(len(groups)) % FOLDS)[group]
    scores = np.empty(len(rows))
    for k in range(FOLDS):
        train = x[fold != k]

        def loss(weights, train=train):
            margin = train @ weights
            value = np.logaddexp(0, -margin).sum() + RIDGE / 2 * weights @ weights
            return value, RIDGE * weights - train.T @ expit(-margin)

        weights = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
        scores[fold == k] = x[fold == k] @ weights
    # Words that were not seen in training score 0, up to the optimizer's last digits.
    wins = np.where(np.abs(scores) < 1e-6, 0.5, scores > 0)
    return stats.mean(wins, seed=seed)


def read_questions(path: Path) -> list[str]:
    """What an evaluation set asks: the column named in `QUESTION_COLUMNS` of a table, or a text's lines.

    Raises:
        UserError: the file cannot be read, or its columns do not say what it asks.
    """
    if path.suffix not in (".csv", ".json", ".jsonl"):
        return [line.strip() for line in read_text(path, "evaluation set").split("\n") if line.strip()]
    rows = (read_csv if path.suffix == ".csv" else read_rows)(path, "evaluation set")
    texts: list[str] = []
    for _, values in rows:
        by_name = {str(k).lower(): v for k, v in values.items()} if isinstance(values, dict) else {}
        asked = [by_name[name] for name in QUESTION_COLUMNS if isinstance(by_name.get(name), str)]
        texts += asked[:1]
    if not texts:
        names = ", ".join(QUESTION_COLUMNS)
        raise UserError(
            f"evaluation set {path} has none of the columns {names}: give its questions line by line"
        )
    return texts


@dataclasses.dataclass(frozen=True)
class Report:
    """What `pairs` prints.

    Attributes:
        rows: the rows that can be used.
        problems: what is wrong with the others.
        differences: how many pairs differ in what, see `difference`.
        right_length, wrong_length: mean length of right and wrong answers, in `unit`.
        length_auc: chance that a wrong answer is longer than a right one, ties half.
        form: see `form_accuracy`.
        same_questions, same_pairs: how many rows repeat an earlier row's question, or all of it.
        overlaps: by evaluation set, see `overlaps`.
    """

    rows: list[Row]
    problems: list[str]
    unit: str
    right_length: float
    wrong_length: float
    length_auc: float
    differences: dict[str, int]
    form: stats.Mean
    same_questions: int
    same_pairs: int
    overlaps: dict[str, dict[int, tuple[float, str]]]


def check(
    records: Sequence[tuple[str, Any]], config: Any, against: Sequence[Path] = (), tokenizer: Any = None
) -> Report:
    """Examines a data source's records.

    Args:
        records: from `read_source`.
        config: a `DataConfig`.
        against: files of evaluation sets.
        tokenizer: a model's `Tokenizer`, to count tokens instead of words.

    Raises:
        UserError: no row can be used, or an evaluation set cannot be read.
    """
    rows, problems = [], []
    for place, values in records:
        try:
            rows.append(to_row(values, place, config.columns))
        except UserError as error:
            problems.append(str(error))
    if not rows:
        raise UserError(problems[0])
    cut = words if tokenizer is None else lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    right, wrong = ([cut(r.right_answer) for r in rows], [cut(r.hallucinated_answer) for r in rows])
    alike = [row.question for row, a, b in zip(rows, right, wrong, strict=True) if a == b]
    problems += [f"the answers to {question!r} have the same {_unit(tokenizer)}" for question in alike]
    lengths = [np.array([len(answer) for answer in side]) for side in (right, wrong)]
    questions = [row.question for row in rows]
    kinds = collections.Counter(difference(row.right_answer, row.hallucinated_answer) for row in rows)
    return Report(
        rows=rows,
        problems=problems,
        unit=_unit(tokenizer),
        right_length=float(lengths[0].mean()),
        wrong_length=float(lengths[1].mean()),
        length_auc=stats.length_auc(*lengths),
        differences={k: kinds[k] for k in ("one word", "one phrase", "several places", "everything")},
        form=form_accuracy(rows),
        same_questions=len(rows) - len({tuple(words(question)) for question in questions}),
        same_pairs=len(rows) - len(set(rows)),
        overlaps={str(path): overlaps(questions, read_questions(path)) for path in against},
    )


def _unit(tokenizer: Any) -> str:
    return "words" if tokenizer is None else "tokens"


def describe(report: Report) -> list[str]:
    """Lines for the terminal."""
    n, form = len(report.rows), report.form
    lines = [f"pairs: {n}" + (f"; {len(report.problems)} problem(s):" if report.problems else "")]
    lines += _some(report.problems)
    lines.append(
        f"length: right {report.right_length:.1f} {report.unit}, wrong {report.wrong_length:.1f}; it alone "
        f"tells them apart with AUC {report.length_auc:.2f} (0.5: not at all)"
    )
    shares = [f"{kind} {count} ({count / n:.0%})" for kind, count in report.differences.items()]
    lines.append("the two answers differ in: " + ", ".join(shares))
    if form.value is None:
        lines.append(f"form: fewer than {FOLDS} questions, too few to say")
    else:
        low, high = form.interval
        lines.append(
            f"form: the answers' words, without the question, give away the right one of {form.value:.1%} of "
            f"the pairs (95 % interval {low:.1%} to {high:.1%}; 50 %: form tells nothing)"
        )
    lines.append(f"repeated: {report.same_questions} question(s), {report.same_pairs} whole pair(s)")
    for name, matches in report.overlaps.items():
        exact = sum(overlap == 1 for overlap, _ in matches.values())
        lines.append(f"overlap with {name}: {exact} question(s) word for word, {len(matches) - exact} nearly")
        lines += _some(
            [
                f"{overlap:.2f} {report.rows[i].question!r} ~ {text!r}"
                for i, (overlap, text) in matches.items()
            ]
        )
    return lines


def _some(lines: Sequence[str]) -> list[str]:
    more = [f"  … and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"  {line if len(line) <= 200 else line[:199] + '…'}" for line in lines[:SHOWN]] + more
