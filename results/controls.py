"""Writes inputs of the runs of docs/results.md, which `make results` asks for."""

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax.cli import ArgumentParser, command

TRUTHFUL = "Answer truthfully."
LENGTH_RATIO = 1.25


def right_answers(rows: Path, out: Path) -> None:
    """Swaps the answers: what is trained on hallucinated answers is then trained on right ones."""
    swapped = [
        row | {"right_answer": row["hallucinated_answer"], "hallucinated_answer": row["right_answer"]}
        for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines())
    ]
    write_jsonl(out, swapped)


def matched_pairs(rows: Path, out: Path, tokenizer: str) -> None:
    """Keeps the rows whose answers' numbers of tokens differ at most by `LENGTH_RATIO`."""
    from imae_jax.convert.hf_tokenizer import read_tokenizer

    encode = read_tokenizer(Path(tokenizer))

    def ratio(row):
        lengths = [
            len(encode(" " + row[key])["input_ids"]) for key in ("right_answer", "hallucinated_answer")
        ]
        return max(lengths) / min(lengths)

    read = map(json.loads, rows.read_text(encoding="utf-8").splitlines())
    write_jsonl(out, [row for row in read if ratio(row) <= LENGTH_RATIO])


def truthful_primer(out: Path) -> None:
    """The six-shot primer with one more sentence in its instruction line."""
    from imae_jax.evaluate.benchmarks.protocols import load_primer

    instruction, _, pairs = load_primer(None).text.partition("\n")
    out.write_text(f"{instruction} {TRUTHFUL}\n{pairs}", encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def existing_file(value: str) -> Path:
    if not Path(value).is_file():
        raise argparse.ArgumentTypeError(f"{value} does not exist")
    return Path(value)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="results/controls.py", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for function in (right_answers, matched_pairs, truthful_primer):
        subparser = commands.add_parser(function.__name__.replace("_", "-"))
        subparser.set_defaults(function=function)
        if function is not truthful_primer:
            subparser.add_argument("rows", type=existing_file, help="HaluEval QA's JSONL file")
        subparser.add_argument("out", type=Path)
        if function is matched_pairs:
            subparser.add_argument("--tokenizer", required=True)
    args = parser.parse_args(argv)
    args.function(**{name: getattr(args, name) for name in inspect.signature(args.function).parameters})


if __name__ == "__main__":
    sys.exit(main())
