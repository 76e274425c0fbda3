"""Training data: rows of question and answers, their tokens, and batches as a function of the step."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imae_jax.batching import round_up
from imae_jax.config import LlamaConfig
from imae_jax.continuation import encode
from imae_jax.convert.references import HUB_ID
from imae_jax.errors import UserError, first_line
from imae_jax.files import read_csv, read_rows
from imae_jax.prompts import adds_special_tokens, answer_frame, render, resolve_format
from imae_jax.stats import length_auc
from imae_jax.token_tree import token_tree
from imae_jax.train.config import ColumnsConfig, DataConfig, TrainConfig

logger = logging.getLogger(__name__)

# `pairs` has 230 of the demo's 255: TriviaQA or NQ ask for the facts of the others. The demo keeps a file of
# its own, so that published runs can be repeated.
SHIPPED = {name: Path(__file__).parent / "data" / f"{name}.jsonl" for name in ("demo", "pairs")}
FILE_TYPES = (".jsonl", ".json", ".csv")
HALUEVAL_HUB_ID = "pminervini/HaluEval"
# Above this, the lengths of right and hallucinated answers all but tell which is which.
TELLING_AUC = 0.8
LENGTH_BUCKET = 32
TREE_BUCKET = 64  # Their lengths are sums: there would be more shapes to compile.
FACT_BUCKET = 16
GROUPED_BATCHES = 32


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
        tokens: prompt and answer, end of turn included.
        start: number of the prompt's tokens.
        fact: one bool an answer token: is it in T_fact?
        right: is the answer the right one, or the hallucinated one?
    """

    row: int
    tokens: tuple[int, ...]
    start: int
    fact: tuple[bool, ...]
    right: bool = False


@dataclasses.dataclass(frozen=True)
class Batch:
    """One optimizer step's rows as arrays, in `A` micro-batches of `B` rows; in paired ones every two
    neighbours answer one question.

    Position i of a row *predicts* token i + 1; masks and indices are of predicting positions.

    Attributes:
        tokens: int32 [A, B, T], padded on the right.
        attention_mask: bool [A, B, T].
        answer: bool [A, B, T], positions that predict an answer token.
        fact: bool [A, B, T], positions that predict a token of T_fact.
        fact_positions: int32 [A, B, P], the same as indices, padded.
        fact_targets: int32 [A, B, P], the tokens predicted there.
        fact_valid: bool [A, B, P], False at padding.
        tree: the rows as token trees, or None.
    """

    tokens: np.ndarray
    attention_mask: np.ndarray
    answer: np.ndarray
    fact: np.ndarray
    fact_positions: np.ndarray
    fact_targets: np.ndarray
    fact_valid: np.ndarray
    tree: "Trees | None" = None

    AXES = (None, "batch", "length")

    def arrays(self) -> dict[str, np.ndarray]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tree = fields.pop("tree")
        return fields | (
            {} if tree is None else {f"tree_{k}": v for k, v in dataclasses.asdict(tree).items()}
        )


@dataclasses.dataclass(frozen=True)
class Trees:
    """Every `R` rows as one of `S` tokens, in depth-first order: what rows begin with alike is there once.

    A model gives every token what it would give it in its own row. Chat templates, and the two answers of a
    question, begin alike, and rows in one tree need no padding.

    Attributes:
        tokens: int32 [A, B / R, S], padded on the right.
        positions: int32 [A, B / R, S], of the tokens in their rows.
        ends: int32 [A, B / R, S], one past the last token that follows on this one in any row, 0 at padding.
            A token attends to itself and to those before it that end behind it.
        places: int32 [A, B / R, R · T], where the rows' tokens are.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    places: np.ndarray


@dataclasses.dataclass(frozen=True)
class Merging:
    """How rows become `Trees`.

    Attributes:
        rows: R, how many neighbours are merged into one tree.
        max_length: the most tokens of a tree. A batch with a longer one stays rows.
    """

    rows: int
    max_length: int


def load_rows(config: DataConfig) -> list[Row]:
    """Reads the rows of a data source.

    Raises:
        UserError: names the file, line and column that is wrong.
    """
    rows = [to_row(values, place, config.columns) for place, values in read_source(config)]
    return rows[: config.limit]


def read_source(config: DataConfig) -> list[tuple[str, Any]]:
    """The values of a data source before they are checked, each with its place for errors.

    Raises:
        UserError: there is no such source, it cannot be read or is empty.
    """
    source, is_file = config.source, Path(config.source).suffix in FILE_TYPES
    if config.path is not None and source != "halueval":
        raise UserError(f"data.path goes with data.source=halueval, not with {source!r}")
    if source in SHIPPED:
        return _read_file(SHIPPED[source])
    if source == "halueval":
        if config.path is None:
            return _read_hub(HALUEVAL_HUB_ID, "qa", "data", "pass data.path=FILE.jsonl")
        return _read_file(Path(config.path))
    if not is_file and not Path(source).exists() and HUB_ID.fullmatch(source):
        return _read_hub(source, config.hub_name, config.hub_split, "give a file, or the hub's own names")
    return _read_file(Path(source))


def _read_file(path: Path) -> list[tuple[str, Any]]:
    rows = read_csv(path, "data file") if path.suffix == ".csv" else read_rows(path, "data file")
    if not rows:
        raise UserError(f"data file {path} holds no rows")
    return rows


def _read_hub(name: str, subset: str | None, split: str, advice: str) -> list[tuple[str, Any]]:
    import datasets

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # The hub client's errors share no base class.
        raise UserError(f"{name} cannot be fetched from the hub ({first_line(error)}): {advice}") from error
    return [(f"{name} row {i}", dict(values)) for i, values in enumerate(table)]


def to_row(values: Any, place: str, columns: ColumnsConfig) -> Row:
    """A row from its columns.

    Raises:
        UserError: a column is missing or empty, or the two answers are the same.
    """
    if not isinstance(values, dict):
        raise UserError(f"{place} is not a JSON object")
    texts = {}
    for setting, column in dataclasses.asdict(columns).items():
        value = values.get(column)
        if column not in values:
            has = ", ".join(str(key) for key in values if key) or "none"
            raise UserError(f"{place} has no column {column!r}, but {has}: set data.columns.{setting}=NAME")
        if not isinstance(value, str):
            raise UserError(f"{place} has no text in {column!r}: fill or remove the row")
        if not value.strip():
            raise UserError(f"{place} has an empty {column}: fill or remove the row")
        texts[setting] = value.strip()
    if texts["right"] == texts["wrong"]:
        raise UserError(f"{place} has the same right and wrong answer: change or remove the row")
    return Row(texts["question"], texts["right"], texts["wrong"])


Question = tuple[Example, ...]
"""Rows that a batch holds together: one, or a question's hallucinated and its right answer."""


@dataclasses.dataclass(frozen=True)
class TokenizedData:
    """What a run trains on and what it is evaluated on.

    Attributes:
        train: questions with their hallucinated answers, every answer token in T_fact.
        train_right: the same questions with their right answers.
        held_out: questions that are never trained on, with their hallucinated answers.
        right: the same with their right answers.
        statistics: how many rows were skipped and why, and how long right and hallucinated answers are.
    """

    train: list[Example]
    train_right: list[Example]
    held_out: list[Example]
    right: list[Example]
    statistics: dict[str, Any]

    def stage(self, answers: Sequence[str]) -> "StageData":
        """Data of a stage that trains on `wrong` or `right` answers or, neighbouring rows, on both."""
        train = {"wrong": self.train, "right": self.train_right}
        held_out = {"wrong": self.held_out, "right": self.right}
        return StageData(
            *(list(zip(*(rows[name] for name in answers), strict=True)) for rows in (train, held_out)),
            list(zip(self.held_out, self.right, strict=True)),
        )


@dataclasses.dataclass(frozen=True)
class StageData:
    """What a stage trains on and is measured on.

    Attributes:
        train: for every question the rows that a batch holds together.
        held_out: the same of questions that are never trained on.
        answers: the held-out questions with their hallucinated and their right answers, every answer token
            in T_fact.
    """

    train: list[Question]
    held_out: list[Question]
    answers: list[tuple[Example, Example]]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every training question's longest row."""
        return [longest(question) for question in self.train]

    @property
    def fingerprint(self) -> str:
        """Hash of what is trained on, T_fact included."""
        digest = hashlib.sha256()
        for example in flat(self.train):
            digest.update(json.dumps([example.start, example.tokens, example.fact]).encode())
        return digest.hexdigest()[:16]


def flat(questions: Iterable[Question]) -> list[Example]:
    return [example for question in questions for example in question]


def longest(question: Question) -> int:
    return max(len(example.tokens) for example in question)


def tokenize(rows: Sequence[Row], tokenizer: Any, config: DataConfig) -> TokenizedData:
    """Tokenizes questions with their answers and holds some rows out.

    Raises:
        UserError: `chat` without a chat template, a row whose two answers are the same tokens, or no row is
            left to train on.
    """
    format = resolve_format(tokenizer, config.format)
    lead, end = answer_frame(tokenizer, format)
    # Text may consist of characters that the tokenizer's normalizer drops.
    texts = [text for row in rows for text in (row.question, row.right_answer, row.hallucinated_answer)]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    numbers = np.flatnonzero(np.array(lengths).reshape(-1, 3).min(axis=1) > 0)
    if not len(numbers):
        raise UserError(f"all {len(rows)} rows have a text without tokens: check the data and the tokenizer")
    prompts = [render(tokenizer, rows[i].question, format) for i in numbers]

    def with_answers(answers, right):
        texts = [f"{lead}{answer}{end}" for answer in answers]
        items = encode(tokenizer, prompts, texts, add_special_tokens=adds_special_tokens(format))
        return [
            Example(int(i), item.tokens, item.start, (True,) * (len(item.tokens) - item.start), right)
            for i, item in zip(numbers, items, strict=True)
        ]

    wrong = with_answers([rows[i].hallucinated_answer for i in numbers], False)
    right = with_answers([rows[i].right_answer for i in numbers], True)
    pairs = list(zip(wrong, right, strict=True))
    for example, right_example in pairs:
        if example.tokens == right_example.tokens:
            raise UserError(
                f"row {example.row} of the data (counted from 0) has two answers of the same tokens "
                f"({rows[example.row].right_answer!r}): change or remove it"
            )
    fitting = [pair for pair in pairs if max(len(e.tokens) for e in pair) <= config.max_length]
    used = fitting
    if config.length_ratio is not None:
        used = [p for p in fitting if _ratio(*(len(e.fact) for e in p)) <= config.length_ratio]
    held_out = _held_out([rows[e.row].question for e, _ in used], config)
    train = [pair for i, pair in enumerate(used) if i not in held_out]
    skipped = {
        "a text without tokens": len(rows) - len(pairs),
        f"more than data.max_length={config.max_length} tokens": len(pairs) - len(fitting),
        "answers of unequal length": len(fitting) - len(used),
    }
    if not train:
        taken = ", ".join(f"{count} have {why}" for why, count in skipped.items() if count)
        raise UserError(
            f"no row is left to train on: of {len(rows)}, {taken or 'none are skipped'}, and data.held_out "
            f"takes {len(held_out)}"
        )
    wrong_lengths, right_lengths = (np.array([len(e.fact) for e in side]) for side in zip(*used, strict=True))
    statistics = {
        "rows": len(train),
        "held_out_rows": [used[i][0].row for i in sorted(held_out)],
        "skipped": skipped,
        "mean_tokens_right_answer": float(right_lengths.mean()),
        "mean_tokens_hallucinated_answer": float(wrong_lengths.mean()),
        "length_auc": length_auc(right_lengths, wrong_lengths),
    }
    kept_out = [used[i] for i in sorted(held_out)]
    sides = ([pair[side] for pair in pairs] for pairs in (train, kept_out) for side in (0, 1))
    return TokenizedData(*sides, statistics)


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


def _held_out(questions: Sequence[str], config: DataConfig) -> set[int]:
    """Which rows, by their index, are held out: all rows of questions drawn by `data.split_seed`."""
    by_question: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_question.setdefault(question, []).append(index)
    groups = list(by_question.values())
    chosen: set[int] = set()
    for i in np.random.default_rng(config.split_seed).permutation(len(groups)):
        if len(chosen) >= config.held_out:
            break
        chosen |= set(groups[i])
    return chosen


def log_statistics(statistics: dict[str, Any]) -> None:
    """Logs what rows there are, and warns where the length of answers tells right from hallucinated."""
    skipped = ", ".join(f"{n} skipped ({why})" for why, n in statistics["skipped"].items() if n)
    held_out = len(statistics["held_out_rows"])
    logger.info(
        "data: %d rows, %d held out%s", statistics["rows"], held_out, f", {skipped}" if skipped else ""
    )
    logger.info(
        "answers: right %.1f tokens, hallucinated %.1f; length alone tells them apart with AUC %.2f",
        statistics["mean_tokens_right_answer"],
        statistics["mean_tokens_hallucinated_answer"],
        statistics["length_auc"],
    )
    if statistics["length_auc"] > TELLING_AUC:
        logger.warning(
            "an anti-expert can learn to write long answers instead of wrong ones: see data.length_ratio and "
            "loss.mean"
        )


def batch_rows(
    lengths: Sequence[int], batch_size: int, seed: int, step: int, group_by_length: bool = False
) -> list[int]:
    """Which examples, of these lengths in tokens, step `step` takes (from 0); see `epoch_order`."""
    rows, epoch, order = [], -1, np.empty(0, int)
    for position in range(step * batch_size, (step + 1) * batch_size):
        if position // len(lengths) != epoch:
            epoch = position // len(lengths)
            order = epoch_order(lengths, batch_size, seed, epoch, group_by_length)
        rows.append(int(order[position % len(lengths)]))
    return rows


def epoch_order(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> np.ndarray:
    """The order of examples in an epoch (from 0): a permutation drawn from the seed.

    Grouped, neighbours of `GROUPED_BATCHES` batches at a time are sorted by length and their batches
    shuffled: batches of like lengths have little padding.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if not group_by_length:
        return order
    lengths, size = np.asarray(lengths), GROUPED_BATCHES * batch_size
    batches = []
    for block in (order[i : i + size] for i in range(0, len(order), size)):
        block = block[np.argsort(lengths[block], kind="stable")]
        cut = [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
        # A batch that is not full stays last: before others it would shift them across their bounds.
        full = len(block) // batch_size
        batches += [cut[i] for i in rng.permutation(full)] + cut[full:]
    return np.concatenate(batches)


def taken(lengths: Sequence[int], config: TrainConfig, batch_size: int, steps: int) -> list[int]:
    """Which questions, of these lengths in tokens, any of that many steps takes: a run of less than an epoch
    leaves some alone."""
    order = epoch_order(lengths, batch_size, config.seed, 0, config.data.group_by_length)
    return sorted(order[: steps * batch_size].tolist())


def in_batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Batches of `size` of neighbouring examples; the last is filled up with rows that count nothing."""
    filler = dataclasses.replace(examples[0], start=len(examples[0].tokens), fact=()) if examples else None
    batches = [list(examples[i : i + size]) for i in range(0, len(examples), size)]
    return [batch + [filler] * (size - len(batch)) for batch in batches]


def make_batch(examples: Sequence[Example], accumulation: int, *, merging: Merging | None = None) -> Batch:
    """Lays examples out as arrays; lengths are rounded up so that few shapes are compiled.

    Args:
        examples: as many for every micro-batch.
        accumulation: micro-batches.
        merging: makes `Batch.tree`; R divides the rows of a micro-batch.
    """
    examples = list(examples)
    length = round_up(max(len(e.tokens) for e in examples), LENGTH_BUCKET)
    facts = round_up(max(1, max(sum(e.fact) for e in examples)), FACT_BUCKET)
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
        return x.reshape(accumulation, -1, *x.shape[1:])

    tree = merging and _merged(examples, merging)
    if tree is not None:
        tree = Trees(**{name: split(array) for name, array in vars(tree).items()})
    return Batch(*map(split, (tokens, mask, answer, fact, positions, targets, valid)), tree)


def choose_merging(
    batches: Iterable[Sequence[Example]], llama: LlamaConfig, shards: int, max_length: int
) -> Merging | None:
    """How to merge the rows of micro-batches like these so that they cost least; None: not at all.

    A token costs a multiple of 6 · D for matmuls, in layers whose MLP is about 2.7 · D wide, and of the
    length that it runs in for attention.

    Args:
        batches: some micro-batches, all of one size.
        llama: config of the model; with `dynamic` RoPE tables follow each row's length, and no two rows can
            share tokens.
        shards: into which a micro-batch is split along its rows; a tree lies on one.
        max_length: length limit of a tree: attention must need no more memory than rows of that length.
    """
    if llama.rope.type == "dynamic":
        return None
    costs: dict[int, int] = {}

    def add(rows: int, count: int, length: int) -> None:
        costs[rows] = costs.get(rows, 0) + count * length * (6 * llama.hidden_size + length)

    for batch in batches:
        plain = len(batch), round_up(max(len(e.tokens) for e in batch), LENGTH_BUCKET)
        add(0, *plain)
        for rows in range(2, len(batch) // shards + 1):
            if len(batch) % (rows * shards) == 0:
                tree = _merged(batch, Merging(rows, max_length))
                add(rows, *(plain if tree is None else tree.tokens.shape))
    best = min(costs, key=costs.get, default=0)
    return Merging(best, max_length) if best else None


def _merged(examples: Sequence[Example], merging: Merging) -> Trees | None:
    """The trees, without A, of a batch whose micro-batches have all rows of their trees; None where one would
    be too long."""
    groups = [examples[i : i + merging.rows] for i in range(0, len(examples), merging.rows)]
    merged = [token_tree([example.tokens for example in group]) for group in groups]
    longest = max(map(len, merged))
    if longest > merging.max_length:
        return None
    shape = (len(groups), round_up(longest, TREE_BUCKET))
    tokens, positions, ends = (np.zeros(shape, np.int32) for _ in range(3))
    length = round_up(max(len(e.tokens) for e in examples), LENGTH_BUCKET)
    places = np.zeros((len(groups), merging.rows, length), np.int32)
    for i, tree in enumerate(merged):
        for array, values in ((tokens, tree.tokens), (positions, tree.depths), (ends, tree.ends)):
            array[i, : len(tree)] = values
        for row, path in enumerate(tree.paths):
            places[i, row, : len(path)] = path
    return Trees(tokens, positions, ends, places.reshape(len(groups), -1))
