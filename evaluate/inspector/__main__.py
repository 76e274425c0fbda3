"""`python -m imae_jax.evaluate.inspector`: one HTML page to look inside an IMAE model on texts.

The page holds, for every token, the gate of every unit and the log-probability and most likely tokens in the
base, expert and anti-expert modes. It needs no network.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax import runtime
from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    add_process_arguments,
    command,
    join_processes,
    lock_outputs,
    model_arguments,
)
from imae_jax.errors import UserError
from imae_jax.files import write_text

MOST_TOKENS = 20_000


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    join_processes(args)
    if args.rows is not None and args.data is None:
        raise UserError("--rows goes with --data RUN")
    rows = None if args.rows is None else _row_numbers(args.rows)
    if args.format is not None and (args.text is None or args.text.suffix != ".jsonl"):
        raise UserError("--format goes with --text FILE.jsonl: other texts are taken as they are")
    lock_outputs(args.html)
    from imae_jax.convert import load_model
    from imae_jax.evaluate.inspector.compute import check_window, inspect
    from imae_jax.evaluate.inspector.excerpts import encode_texts, read_texts, rows_of_run
    from imae_jax.evaluate.inspector.page import GENERATOR, render_page

    texts = None if args.text is None else read_texts(args.text)
    _check_output(args.html, GENERATOR, overwrite=args.overwrite)
    lm = load_model(args.model, stacked=True, **model_arguments(args))
    window = check_window(args.window, lm.config)
    if texts is not None:
        excerpts = encode_texts(lm, texts, args.format or "raw")
        source = {"text": args.text, "format": args.format or "raw"}
    else:
        excerpts, facts = rows_of_run(lm, args.data, rows)
        source = {"data": f"{args.data}, {facts}"}
    count = sum(len(excerpt.tokens) for excerpt in excerpts)
    if count > MOST_TOKENS:
        raise UserError(f"{count} tokens are more than a page holds ({MOST_TOKENS}): give less text or rows")

    inspections = inspect(lm, excerpts, window=window, quiet=args.quiet)
    git = runtime.git_state()
    settings = source | {
        "model": args.model,
        "base": lm.base.reference,
        "sizes": f"{lm.config.num_layers} layers of width {lm.config.hidden_size}, units of width "
        f"{lm.model.anti_expert_config.intermediate_size}, {lm.base.dtype}",
        "windows": f"of {window} tokens, overlapping by {window - window // 2}",
        "versions": ", ".join(f"{name} {version}" for name, version in runtime.versions().items()),
    }
    if git:
        settings["commit"] = git["commit"] + (" with changes" if git["dirty"] else "")
    page = render_page(lm.tokenizer, excerpts, inspections, model=args.model, settings=settings)
    write_text(args.html, page)
    print(f"wrote {args.html}: {count} tokens, {len(page.encode()) / 1e6:.1f} MB")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.inspector",
        description="Writes an HTML page of an IMAE model's gates and predictions on every token of texts.",
    )
    add_model_arguments(parser)
    add_process_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help='a text, or FILE.jsonl of {"prompt": …, "answer": …}, the answer optional',
    )
    source.add_argument(
        "--data", type=Path, metavar="RUN", help="output directory of a training run: its rows, with T_fact"
    )
    parser.add_argument(
        "--rows", help="row numbers of --data, e.g. 0,5,7 (default: the first 8 held-out ones)"
    )
    parser.add_argument(
        "--format",
        help="how lines of FILE.jsonl are put: raw as they are, plain (Q: …, A:) or chat (default: raw)",
    )
    parser.add_argument("--html", type=Path, required=True, metavar="FILE", help="page to write")
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens at a time of longer texts; windows overlap by half (default: 2048 or the context)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    return parser


def _row_numbers(text: str) -> list[int]:
    """`0,5,7` as numbers."""
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers) or len(set(map(int, numbers))) < len(numbers):
        raise UserError(f"--rows {text}: give different row numbers such as 0,5,7")
    return [int(number) for number in numbers]


def _check_output(path: Path, generator: str, *, overwrite: bool) -> None:
    """Raises a `UserError` unless `path` can be written and holds nobody's other file."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: choose another --html")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another --html, or pass --overwrite")
    try:
        if path.exists() and generator.encode() not in path.read_bytes()[:1024]:
            raise UserError(f"{path} is not a page of this command: choose another --html")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: its directory is read-only")


if __name__ == "__main__":
    sys.exit(main())
