"""Natural Questions with a passage: does the answer follow the passage, also where it contradicts what is
known?

Prompts with and without the passage: those of context-aware decoding (Shi et al. 2023, arXiv 2305.14739), as
in the data of AdaCAD (https://github.com/HanNight/AdaCAD); in the `-chat` protocols they are the user's turn.
Passages:

- `oracle`: one that holds the answer, from the file of DeCoRe (https://github.com/aryopg/DeCoRe).
- `swap`: the same, with the accepted answers replaced by another question's answer of the same type (a
  date, a number or a name, of whatever it be), as in Longpre et al., "Entity-Based Knowledge Conflicts",
  EMNLP 2021. Questions whose answer is of no such type, or is still there afterwards, are left out.
- `conflict`: the first fake passage of ConflictNQ (https://github.com/4-en/ConflictNQ).

The answer is the first line that is written, within 32 tokens. It is like a reference by 1 where it
contains it, else by the F1 of their words. It is the passage's or the remembered one where it is like that
by at least 1/2, and more than like the other; else neither.
"""

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from imae_jax.cli import at_least
from imae_jax.evaluate.benchmarks.benchmark import Item
from imae_jax.evaluate.benchmarks.published import Rows
from imae_jax.evaluate.benchmarks.short_answers import contains, exact_match, f1
from imae_jax.evaluate.benchmarks.written import Written, WrittenBenchmark

PROMPT = (
    "{passage}\nUsing only the references listed above, answer the following question: \n"
    "Question: {question}\nAnswer:"
)
WITHOUT_PASSAGE = "Answer the following question: \nQuestion: {question}\nAnswer:"
ORACLE = {
    "sha256": "6a7f72b846f663a133ef952244e5a4e43f06bcf190afe34e8fbe687ce0d1653e",
    "rows": 2655,
    "source": "https://github.com/aryopg/DeCoRe (nq-open-oracle.jsonl.gz)",
}
CONFLICT = {
    "sha256": "69a7653fb873a41ba24720e0f0f83eac94f1a6c7b53bdad599c81b285095dd90",
    "rows": 226,
    "source": "https://github.com/4-en/ConflictNQ (conflict_nq_test.jsonl)",
}
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
TYPES = {
    "date": re.compile(rf"\b(?:{MONTHS})\b|\b(?:1\d|20)\d\d\b"),
    "number": re.compile(r"\A\W?\d"),
    "name": re.compile(r"\A[A-Z][\w.'’-]*(?: (?:of|the|and|de|von|van|[A-Z][\w.'’-]*))*\Z"),
}
CONFLICTING = {"context": "passage's", "memory": "remembered", "neither": "neither"}
KNOWN = {"exact_match": "exact match", "f1": "F1", "contained": "contains an answer"}


def entity_type(answer: str) -> str | None:
    """`date`, `number` or `name`, by an answer's letters; None for anything else."""
    return next((name for name, pattern in TYPES.items() if pattern.search(answer)), None)


def swapped(rows: Rows, seed: int) -> dict[int, tuple[str, str]]:
    """Passages whose answers are replaced by those of other questions, with the new answer, by row.

    Args:
        rows: of the oracle file.
        seed: seed of the draw.
    """
    random, found, pool = np.random.default_rng(seed), {}, {}
    for answer in dict.fromkeys(row["answers"][0] for _, row in rows):
        pool.setdefault(entity_type(answer), []).append(answer)
    for i, (_, row) in enumerate(rows):
        passage, accepted = row["passage"], row["answers"]
        kind = entity_type(accepted[0])
        if kind is None:
            continue
        drawn = (pool[kind][k] for k in random.permutation(len(pool[kind])))
        other = next((each for each in drawn if not contains(passage, [each])), None)
        if other is None:
            continue
        literal = "|".join(re.escape(answer) for answer in sorted(accepted, key=len, reverse=True))
        changed = re.sub(rf"(?<!\w)(?:{literal})(?!\w)", lambda _, other=other: other, passage)
        if changed != passage and not contains(changed, accepted):
            found[i] = changed, other
    return found


def source_of(answer: str, context: Sequence[str], memory: Sequence[str]) -> str:
    """Whether an answer is the passage's (`context`), the remembered one (`memory`), or `neither`."""
    likeness = [
        1.0 if contains(answer, references) else f1(answer, references) for references in (context, memory)
    ]
    if max(likeness) < 0.5 or likeness[0] == likeness[1]:
        return "neither"
    return "context" if likeness[0] > likeness[1] else "memory"


class NQContext(WrittenBenchmark):
    name = "nq_context"
    title = "Natural Questions with a passage"
    description = "Natural Questions with a passage that is right or contradicts what is known"
    note = (
        "With passages in conflict: share of answers that are the *passage's*, the *remembered* one (the "
        "real answer, whether or not this model knows it) or *neither*."
    )
    correct = ("exact_match",)
    heads: ClassVar = {**KNOWN, **CONFLICTING}
    protocols = tuple(
        Written(name=f"nq-context-v1/{form}{end}", form=form, format=format, max_new_tokens=32, **file)
        for format, end in (("raw", ""), ("chat", "-chat"))
        for form, file in (("oracle", ORACLE), ("swap", ORACLE), ("conflict", CONFLICT))
    )
    rules: ClassVar = {
        "exact_match": "but for case, punctuation and articles, as the harness's nq_open",
        "like": "1 where the answer contains a reference, else F1 of words",
        "context": "like the passage's answer by at least 1/2, and more than like the remembered one",
    }

    def add_arguments(self, parser):
        super().add_arguments(parser)
        parser.add_argument("--swap-seed", type=at_least(0), default=0, help="seed of …/swap (default: 0)")

    def load(self, args, methods):
        inputs = super().load(args, methods)
        if inputs.protocol.form == "swap" and args.swap_seed:
            inputs = dataclasses.replace(inputs, label=f"{inputs.label}+swap-seed-{args.swap_seed}")
        return inputs

    def read(self, path):
        """Rows with the text of their first passage as `passage`."""
        rows, content = super().read(path)
        return [
            (place, {**row, "passage": first_passage(row)} if isinstance(row, dict) else row)
            for place, row in rows
        ], content

    def fields(self, protocol):
        if protocol.form == "conflict":
            return dict.fromkeys(("question", "passage", "real_short_answer", "fake_short_answer"), str)
        return {"question": str, "passage": str, "answers": list}

    def items(self, protocol, rows, args):
        known = {i: row.get("answers") or [row["real_short_answer"]] for i, (_, row) in enumerate(rows)}
        if protocol.form == "swap":
            passages = swapped(rows, args.swap_seed)
        else:
            passages = {i: (row["passage"], row.get("fake_short_answer")) for i, (_, row) in enumerate(rows)}
        return [
            Item(
                i,
                rows[i][1]["question"],
                PROMPT.format(passage=passage, question=rows[i][1]["question"]),
                data=(known[i], conflicting),
                without_context=WITHOUT_PASSAGE.format(question=rows[i][1]["question"]),
            )
            for i, (passage, conflicting) in passages.items()
        ]

    def options(self, protocol, args):
        # What comes behind the first line is not graded.
        return super().options(protocol, args) | {"confidence": "line"}

    def metrics(self, protocol):
        return tuple(KNOWN if protocol.form == "oracle" else CONFLICTING)

    def measure(self, item, answer):
        (answer, *_), (known, conflicting) = answer.strip().split("\n"), item.data
        if conflicting is None:
            return {
                "exact_match": exact_match(answer, known),
                "f1": f1(answer, known),
                "contained": float(contains(answer, known)),
            }
        source = source_of(answer, [conflicting], known)
        return {"expected": conflicting, **{name: float(name == source) for name in CONFLICTING}}


def first_passage(row: Mapping[str, Any]) -> Any:
    """The text of a row's first passage, in either file's form; None where there is none."""
    for field, text in (("ctxs", "text"), ("fake_passages", "passage")):
        with contextlib.suppress(KeyError, IndexError, TypeError):
            return row[field][0][text]
    return None


BENCHMARK = NQContext()
