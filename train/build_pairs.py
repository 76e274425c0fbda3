"""`python -m imae_jax.train.build_pairs`: pairs of like answers out of data whose answers are not alike."""

import collections
import dataclasses
import difflib
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from imae_jax.cli import ArgumentParser, command, lock_outputs
from imae_jax.errors import UserError
from imae_jax.files import new_directory, read_csv
from imae_jax.train.config import DataConfig
from imae_jax.train.data import Row, load_rows
from imae_jax.train.pairs import words

TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held_out.jsonl"
TRIVIAQA_COLUMNS = ("question", "answer", "false_answer")
MOST_WORDS = 5
FILLERS = frozenset(("the", "a", "an", "of", "and"))
COMPARISON = re.compile(r"more|less|most|least|first|last|later|\w+er|\w+est")
NUMBER = re.compile(r"\d[\d,.]*\d(?!\w)|\b\d(?!\w)")
FORMS_OF_BE = {"is", "was", "are", "were"}
SMALL_WORDS = {*FILLERS, *FORMS_OF_BE, "in", "on", "by", "at", "to", "it", "he", "she", "its", "his", "her"}
# A sentence with one of these may say another thing than the question asked.
TWISTS = {
    *("not", "no", "never", "none", "neither", "nor", "only", "also", "both", "but", "however", "although"),
    *("though", "while", "actually", "yes", "instead", "rather", "unlike", "than", "before", "after"),
    *("since", "between", "same"),
}


def form(text: str) -> tuple[int, int, bool, bool, bool]:
    """Numbers of words and characters; has it digits, is it a number, does it begin with a capital?"""
    return (
        len(text.split()),
        len(text),
        any(map(str.isdigit, text)),
        NUMBER.fullmatch(text) is not None,
        text[:1].isupper(),
    )


def nearest(aliases: Sequence[str], wrong: str) -> str | None:
    """The alias that looks most like the wrong answer: in kind, number of words, case and length.

    TriviaQA's aliases are titles of Wikipedia's redirects, misspelt ones among them. Those whose words other
    aliases have, too, go first; None where there is no alias in plain letters.
    """

    def distance(alias: str) -> float:
        a, b = form(alias), form(wrong)
        kinds = 4 * (a[2] != b[2]) + 4 * (a[3] != b[3]) + 2 * (a[4] != b[4])
        return kinds + abs(a[0] - b[0]) + abs(a[1] - b[1]) / max(a[1], b[1])

    plain = [alias for alias in aliases if words(alias) and alias.isascii() and not set(alias) & set("():/")]
    plain = [alias.title() if alias.isupper() and len(alias) > 4 else alias for alias in plain]
    counts = collections.Counter(word for alias in plain for word in set(words(alias)))
    known = [alias for alias in plain if all(counts[word] > 1 for word in words(alias))]
    return min(known or plain, key=distance, default=None)


def same_answer(wrong: str, aliases: Iterable[str]) -> bool:
    """Whether a false answer is an accepted one, holds one, is held by one, or spells one in another way."""
    given = set(words(wrong)) - FILLERS
    for alias in aliases:
        accepted = set(words(alias)) - FILLERS
        if accepted and (accepted <= given or given <= accepted):
            return True
        alike = difflib.SequenceMatcher(None, wrong.lower(), alias.lower()).ratio()
        if alike >= 0.8 and not any(map(str.isdigit, wrong)):
            return True
    return False


def from_triviaqa(path: Path) -> tuple[list[Row], dict[str, int]]:
    """Pairs of TriviaQA's accepted answers and one false answer.

    Args:
        path: CSV with the columns `question`, `answer` (accepted ones, separated by semicolons) and
            `false_answer`: the set that ITI (Li et al., arXiv 2306.03341) was measured on.

    Returns:
        Pairs, and how many questions were left out and why.
    """
    pairs, skipped = {}, collections.Counter()
    for place, cells in read_csv(path, "data file"):
        missing = [name for name in TRIVIAQA_COLUMNS if name not in cells]
        if missing:
            raise UserError(f"{place} has no column {', '.join(missing)}, but {', '.join(cells)}")
        question, wrong = cells["question"].strip(), cells["false_answer"].strip()
        aliases = [alias.strip() for alias in cells["answer"].split(";")]
        right = nearest(aliases, wrong)
        if not question or len(wrong) < 3 or right is None:
            skipped["no usable text"] += 1
        elif same_answer(wrong, aliases):
            skipped["the false answer is or holds an accepted one"] += 1
        elif question in pairs:
            skipped["the question was there before"] += 1
        else:
            pairs[question] = Row(question, right, wrong)
    return list(pairs.values()), dict(skipped)


def put_in(question: str, right: str, wrong: str) -> str | None:
    """The wrong sentence with the right answer instead of the wrong one; None if the position is not sure.

    The position is, in this order: the other option of an "A or B?" whose right answer is an option; the only
    number that is not the question's, for a number; the only name that is not the question's, for a name.
    """
    right, sentence = right.strip().rstrip("."), wrong.strip()
    known = set(words(question))
    if any(COMPARISON.fullmatch(word) for word in set(words(sentence)) - known):
        return None
    if not 0 < len(right.split()) <= MOST_WORDS or len(sentence.split()) < len(right.split()) + 2:
        return None
    if re.search(r"[.!;]\s|\?|n['’]t\b|\(", sentence) or TWISTS & set(words(sentence)):
        return None
    if set(words(right)) <= set(words(sentence)):
        return None
    span = (
        _option(question, right, sentence) or _number(right, sentence, known) or _name(right, sentence, known)
    )
    if span is None:
        return None
    start, end = span
    made = sentence[:start] + right + sentence[end:]
    fits = words(made) != words(sentence) and re.search(r"\b[aA]n?\s$", sentence[:start]) is None
    # All else must be the question's own words, so that the sentence says of its answer what was asked.
    strange = set(words(sentence[:start] + " " + sentence[end:])) - known - SMALL_WORDS
    return made if fits and len(strange) <= 1 else None


def _option(question: str, right: str, sentence: str) -> tuple[int, int] | None:
    for match in re.finditer(r"\bor (?:the )?([^,?]+)\?", question):
        option = match[1].strip()
        before = question[: match.start()].rstrip(" ,")
        if words(option) == words(right):
            # The other option is what the sentence and the text before "or" have in common at its end.
            for size in range(len(before.split()), 0, -1):
                other = " ".join(before.split()[-size:])
                if other[:1].isupper() and sentence.count(other) == 1:
                    at = sentence.index(other)
                    return at, at + len(other)
        elif before.endswith(right) and sentence.count(option) == 1:
            at = sentence.index(option)
            return at, at + len(option)
    return None


def _number(right: str, sentence: str, known: set[str]) -> tuple[int, int] | None:
    numbers = [m for m in NUMBER.finditer(sentence) if m[0] not in known]
    if NUMBER.fullmatch(right) is None or len(numbers) != 1 or sentence[numbers[0].end() :].startswith(","):
        return None
    as_year = [re.fullmatch(r"1\d{3}|20\d{2}", text) is not None for text in (right, numbers[0][0])]
    return numbers[0].span() if as_year[0] == as_year[1] else None


def _name(right: str, sentence: str, known: set[str]) -> tuple[int, int] | None:
    if not _is_name(right):
        return None
    names = re.finditer(r"[A-Z][\w'’-]*(?: [A-Z][\w'’-]*)*", sentence)
    new = [m for m in names if not set(words(m[0])) <= known | SMALL_WORDS]
    if len(new) != 1 or set(words(new[0][0])) & known or len(new[0][0].split()) != len(right.split()):
        return None
    # "Malaysian" is no name in "the Malaysian government", "Whitechapel's" no whole one.
    following = words(sentence[new[0].end() :])[:1]
    quoted = sentence[: new[0].start()].endswith(('"', "'"))
    if quoted or new[0][0].endswith(("'s", "’s")) or not set(following) <= known | FORMS_OF_BE:
        return None
    return new[0].span()


def _is_name(text: str) -> bool:
    return all(word[:1].isupper() for word in text.split()) and not any(
        c.isdigit() or c in ",;&" for c in text
    )


def from_halueval(rows: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """Pairs of HaluEval's hallucinated sentences with the same sentences around the right answers."""
    pairs, skipped = [], collections.Counter()
    for row in rows:
        made = put_in(row.question, row.right_answer, row.hallucinated_answer)
        if made is None:
            skipped["no rule is sure of the answer's place"] += 1
        else:
            pairs.append(Row(row.question, made, row.hallucinated_answer))
    return pairs, dict(skipped)


def hold_out(pairs: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """Pairs to train on, and those of the `count` questions with the lowest SHA-256: no seed, no order."""
    digests = {pair.question: hashlib.sha256(pair.question.encode()).hexdigest() for pair in pairs}
    chosen = set(sorted(digests, key=digests.__getitem__)[:count])
    return [p for p in pairs if p.question not in chosen], [p for p in pairs if p.question in chosen]


def write(out: Path, pairs: Sequence[Row], held_out: int, overwrite: bool) -> None:
    """Writes two JSONL files with HaluEval QA's fields.

    Raises:
        UserError: no pair is left to train on, or `out` may not be written.
    """
    train, rest = hold_out(pairs, held_out)
    if not train:
        raise UserError(
            f"--held-out {held_out} leaves none of {len(pairs)} pairs to train on: hold out fewer"
        )
    with new_directory(out, marker=TRAIN_FILE, overwrite=overwrite) as directory:
        for name, rows in ((TRAIN_FILE, train), (HELD_OUT_FILE, rest)):
            lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows]
            (directory / name).write_text("".join(lines), encoding="utf-8")
    print(f"wrote {out}: {len(train)} pairs in {TRAIN_FILE}, {len(rest)} in {HELD_OUT_FILE}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.train.build_pairs",
        description="Makes pairs of like answers, right and wrong, out of data whose answers are not alike.",
    )
    parser.add_argument(
        "kind",
        choices=("triviaqa", "halueval"),
        help="triviaqa: a CSV of question, accepted answers and one false answer; the accepted one that is "
        "nearest to it in form is taken. halueval: HaluEval QA; its right answers are put into the "
        "hallucinated sentences",
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--held-out", type=int, default=600, metavar="N", help="questions kept apart, by hash"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace such a directory")
    args = parser.parse_args(argv)
    if args.held_out < 0:
        raise UserError(f"--held-out {args.held_out} must be at least 0")
    lock_outputs(args.out)
    if args.kind == "triviaqa":
        pairs, skipped = from_triviaqa(args.file)
    else:
        pairs, skipped = from_halueval(load_rows(DataConfig(source=str(args.file))))
    for why, count in skipped.items():
        print(f"left out: {count} ({why})")
    write(args.out, pairs, args.held_out, args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
