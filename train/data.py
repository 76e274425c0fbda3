"""Training data: rows of question and answers, their tokens, and batches as a function of the step."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imae_jax.decode.scoring import Continuation, encode
from imae_jax.errors import UserError, first_line
from imae_jax.prompts import adds_special_tokens, answer_frame, render, resolve_format
from imae_jax.train.config import DataConfig

DEMO_FILE = Path(__file__).parent / "data" / "demo.jsonl"
HALUEVAL_HUB_ID = "pminervini/HaluEval"
FIELDS = ("question", "right_answer", "hallucinated_answer")
LENGTH_BUCKET = 32
FACT_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """A question with a right and a hallucinated answer."""

    question: str
    right_answer: str
    hallucinated_answer: str


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized row.

    Attributes:
        row: its number in the data source.
        tokens: prompt and hallucinated answer, end of turn included.
        start: number of the prompt's tokens.
        fact: one bool an answer token: is it in T_fact?
    """

    row: int
    tokens: tuple[int, ...]
    start: int
    fact: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
    """One optimizer step's rows as arrays, in `A` micro-batches of `B` rows.

    Position i of a row *predicts* token i + 1; masks and indices are of predicting positions.

    Attributes:
        tokens: int32 [A, B, T], padded on the right.
        attention_mask: bool [A, B, T].
        answer: bool [A, B, T], positions that predict an answer token.
        fact: bool [A, B, T], positions that predict a token of T_fact.
        fact_positions: int32 [A, B, P], the same as indices, padded.
        fact_targets: int32 [A, B, P], the tokens predicted there.
        fact_valid: bool [A, B, P], False at padding.
    """

    tokens: np.ndarray
    attention_mask: np.ndarray
    answer: np.ndarray
    fact: np.ndarray
    fact_positions: np.ndarray
    fact_targets: np.ndarray
    fact_valid: np.ndarray

    AXES = (None, "batch", "length")

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def load_rows(config: DataConfig) -> list[Row]:
    """Reads the rows of a data source.

    Raises:
        UserError: names the file, line and field that is wrong.
    """
    if config.path is not None and config.source != "halueval":
        raise UserError(f"data.path goes with data.source=halueval, not with {config.source!r}")
    if config.source == "demo":
        rows = read_jsonl(DEMO_FILE)
    elif config.source == "halueval":
        rows = read_jsonl(Path(config.path)) if config.path else _halueval_from_hub()
    else:
        rows = read_jsonl(Path(config.source))
    return rows[: config.limit]


def read_jsonl(path: Path) -> list[Row]:
    """Reads a JSONL file with HaluEval QA's fields."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data file {path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
        rows.append(_row(values, f"{path} line {number}"))
    if not rows:
        raise UserError(f"data file {path} holds no rows")
    return rows


def _row(values: Any, place: str) -> Row:
    if not isinstance(values, dict):
        raise UserError(f"{place} is not a JSON object")
    for field in FIELDS:
        value = values.get(field)
        if not isinstance(value, str):
            raise UserError(f"{place} has no text field {field!r}: HaluEval QA's fields are needed")
        if not value.strip():
            raise UserError(f"{place} has an empty {field}: fill or remove the row")
    return Row(**{field: values[field].strip() for field in FIELDS})


def _halueval_from_hub() -> list[Row]:
    import datasets

    try:
        table = datasets.load_dataset(HALUEVAL_HUB_ID, "qa", split="data")
    except Exception as error:  # The hub client's errors share no base class.
        raise UserError(
            f"HaluEval QA cannot be fetched from the hub ({first_line(error)}): pass data.path=FILE.jsonl"
        ) from None
    return [
        _row(
            {
                "question": r["question"],
                "right_answer": r["right_answer"],
                "hallucinated_answer": r["hallucinated_answer"],
            },
            f"{HALUEVAL_HUB_ID} row {i}",
        )
        for i, r in enumerate(table)
    ]


def tokenize(rows: Sequence[Row], tokenizer: Any, config: DataConfig) -> tuple[list[Example], dict[str, Any]]:
    """Tokenizes questions with their hallucinated answers.

    Returns:
        The examples, with every answer token in T_fact, and statistics: how many rows were skipped
        and why, and how long right and hallucinated answers are.

    Raises:
        UserError: `chat` without a chat template, or no row is left.
    """
    format = resolve_format(tokenizer, config.format)
    lead, end = answer_frame(tokenizer, format)
    prompts = [render(tokenizer, row.question, format) for row in rows]

    def with_answers(answers):
        texts = [f"{lead}{answer}{end}" for answer in answers]
        return encode(tokenizer, prompts, texts, add_special_tokens=adds_special_tokens(format))

    wrong = with_answers([row.hallucinated_answer for row in rows])
    right = with_answers([row.right_answer for row in rows])
    right_lengths = np.array([len(item.tokens) - item.start for item in right])
    wrong_lengths = np.array([len(item.tokens) - item.start for item in wrong])
    fits = np.array([len(item.tokens) <= config.max_length for item in wrong])
    matched = np.ones(len(rows), bool)
    if config.length_ratio is not None:
        longer, shorter = np.maximum(right_lengths, wrong_lengths), np.minimum(right_lengths, wrong_lengths)
        matched = longer <= config.length_ratio * shorter
    examples = [
        Example(i, item.tokens, item.start, (True,) * (len(item.tokens) - item.start))
        for i, item in enumerate(wrong)
        if fits[i] and matched[i]
    ]
    if not examples:
        raise UserError(
            f"every row has more than data.max_length={config.max_length} tokens, or answers that "
            f"data.length_ratio={config.length_ratio} leaves out: raise them"
        )
    used = fits & matched
    statistics = {
        "skipped_too_long": int((~fits).sum()),
        "skipped_unequal_length": int((fits & ~matched).sum()),
        "mean_tokens_right_answer": float(right_lengths[used].mean()),
        "mean_tokens_hallucinated_answer": float(wrong_lengths[used].mean()),
        "length_auc": _auc(wrong_lengths[used], right_lengths[used]),
    }
    return examples, statistics


def _auc(first: np.ndarray, second: np.ndarray) -> float:
    """Chance that a draw of `first` exceeds one of `second`, ties half: 0.5 if lengths tell nothing."""
    ordered = np.sort(second)
    below = np.searchsorted(ordered, first, side="left")
    not_above = np.searchsorted(ordered, first, side="right")
    return float((below + not_above).mean() / (2 * len(second)))


def continuation_of(example: Example) -> Continuation:
    return Continuation(example.tokens, example.start)


def batch_rows(num_examples: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which examples step `step` takes (from 0): every epoch is a permutation drawn from the seed."""
    rows, epoch, order = [], -1, np.empty(0, int)
    for position in range(step * batch_size, (step + 1) * batch_size):
        if position // num_examples != epoch:
            epoch = position // num_examples
            order = np.random.default_rng([seed, epoch]).permutation(num_examples)
        rows.append(int(order[position % num_examples]))
    return rows


def make_batch(examples: Sequence[Example], accumulation: int) -> Batch:
    """Lays examples out as arrays; lengths are rounded up so that few shapes are compiled."""
    micro = len(examples) // accumulation
    length = _round_up(max(len(e.tokens) for e in examples), LENGTH_BUCKET)
    facts = _round_up(max(1, *(sum(e.fact) for e in examples)), FACT_BUCKET)
    shape = (len(examples), length)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    answer, fact = np.zeros(shape, bool), np.zeros(shape, bool)
    positions = np.zeros((len(examples), facts), np.int32)
    targets, valid = np.zeros_like(positions), np.zeros(positions.shape, bool)
    for i, example in enumerate(examples):
        ids = np.asarray(example.tokens, np.int32)
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
        predicting = np.arange(example.start - 1, len(ids) - 1)
        answer[i, predicting] = True
        about_fact = predicting[np.asarray(example.fact, bool)]
        fact[i, about_fact] = True
        positions[i, : len(about_fact)] = about_fact
        targets[i, : len(about_fact)] = ids[about_fact + 1]
        valid[i, : len(about_fact)] = True

    def split(x):
        return x.reshape(accumulation, micro, *x.shape[1:])

    return Batch(*map(split, (tokens, mask, answer, fact, positions, targets, valid)))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
