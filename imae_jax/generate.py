"""`python -m imae_jax.generate`: continues prompts in any mode or with any method.

This command and those of the other rooms are the only modules that see both the library and
`imae_jax.convert`.
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    add_process_arguments,
    add_sampling_arguments,
    at_least,
    command,
    join_processes,
    lock_outputs,
    model_arguments,
)
from imae_jax.convert.identity import without_places
from imae_jax.errors import UserError
from imae_jax.files import Journal, jsonable, read_text
from imae_jax.prompts import resolve_format

if TYPE_CHECKING:
    from imae_jax.decode import Method
    from imae_jax.language_model import LanguageModel

logger = logging.getLogger(__name__)

# Of the columns of --compare; what differs from the first column's text is bold.
COLORS = ("white", "green", "cyan", "magenta", "yellow")


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    join_processes(args)
    _check(args)
    lock_outputs(args.out)

    from imae_jax.convert import load_model
    from imae_jax.decode import Sampler, parse_method, split_methods

    options = {
        "format": args.format,
        "sampler": Sampler(args.temperature, args.top_k, args.top_p, args.repetition_penalty),
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
        "seed": args.seed,
    }
    both = {"without_context": args.without_context} if args.without_context else {}
    names = [args.mode] if args.compare is None else split_methods(args.compare)
    methods = [parse_method(name) for name in names if name is not None]
    lm = load_model(args.model, **model_arguments(args))
    if not methods:
        methods = [parse_method("expert" if lm.model.anti_expert_config else "base")]
    if args.out is not None:
        _continue_file(lm, args, methods[0], options)
    elif args.stream:
        _print_stream(lm, args, methods[0], options | both)
    else:
        _print_texts(lm, args, names, methods, options | both)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m imae_jax.generate",
        description="Continues prompts with a model, in one mode or method or in several side by side.",
    )
    add_model_arguments(parser)
    add_process_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="may be given repeatedly")
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help='JSONL file of {"prompt": …}, with --out'
    )
    parser.add_argument(
        "--without-context",
        action="append",
        metavar="PROMPT",
        help="a --prompt without its context, one for each, for methods that compare the two, such as cad; "
        'in FILE {"without_context": …}',
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSONL file to write, or to resume")
    parser.add_argument(
        "--batch-size", type=at_least(1), default=8, help="prompts of FILE at a time (default: 8)"
    )
    parser.add_argument(
        "--mode",
        "--method",
        dest="mode",
        help="expert, base, anti-expert, a number (the strength), or a method, such as "
        "dola:candidates=low (default: expert where the model has anti-expert units, else base)",
    )
    parser.add_argument(
        "--compare",
        nargs="?",
        const="base,expert",
        metavar="METHODS",
        help="several methods side by side (default: base,expert)",
    )
    parser.add_argument(
        "--format",
        default="raw",
        help="raw continues the prompt as it is, plain wraps it as a question (Q: …, A:), chat in the "
        "model's chat template (default: raw)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given repeatedly")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="print text as it comes")
    return parser


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed {args.seed}: give a number from 0 to {2**31 - 1}")
    if args.compare is not None and args.mode is not None:
        raise UserError("--compare and --mode exclude each other: give one of them")
    if (args.prompts is None) != (args.out is None):
        raise UserError("--prompts FILE and --out FILE go together")
    if args.compare is not None and (args.stream or args.out):
        raise UserError("--compare goes neither with --stream nor with --out")
    if args.without_context and len(args.without_context) != len(args.prompt or []):
        raise UserError("--without-context: give one for each --prompt")
    if args.stream and (args.out or len(args.prompt) > 1):
        raise UserError("--stream goes with one --prompt")


def _print_stream(
    lm: "LanguageModel", args: argparse.Namespace, method: "Method", options: dict[str, Any]
) -> None:
    start = time.perf_counter()
    print(args.prompt[0] if args.format == "raw" else "", end="", flush=True)
    for (piece,) in lm.stream(args.prompt, method, **options):
        print(piece, end="", flush=True)
    print()
    _log_times({method.name: time.perf_counter() - start})


def _print_texts(
    lm: "LanguageModel",
    args: argparse.Namespace,
    names: Sequence[str],
    methods: Sequence["Method"],
    options: dict[str, Any],
) -> None:
    columns, seconds = [], {}
    titles = [methods[0].name] if args.compare is None else names
    for title, method in zip(titles, methods, strict=True):
        start = time.perf_counter()
        columns.append(lm.generate(args.prompt, method, **options))
        seconds[title] = time.perf_counter() - start
    if args.compare is not None:
        _print_side_by_side(args.prompt, titles, columns)
    else:
        for prompt, text in zip(args.prompt, columns[0], strict=True):
            print(prompt + text if args.format == "raw" else text.strip())
    _log_times(seconds)


def _log_times(seconds: dict[str, float]) -> None:
    times = ", ".join(f"{title}: {value:.1f} s" for title, value in seconds.items())
    logger.info("%s, compilation included", times)


def _continue_file(
    lm: "LanguageModel", args: argparse.Namespace, method: "Method", options: dict[str, Any]
) -> None:
    """Continues the prompts of a JSONL file; lines that OUT has already are not done again.

    Raises:
        UserError: after all others are done, names the lines that could not be.
    """
    from tqdm import tqdm

    source, out, size = args.prompts, args.out, args.batch_size
    lines = read_text(source, "file of prompts").split("\n")
    # What is wrong with the settings is not a line's fault.
    resolve_format(lm.tokenizer, options["format"], allow_raw=True)
    models, resolved = lm.prepare(method, generating=True)
    named = {} if method.resource is None else {"fingerprint": lm.resource_fingerprint(method)}
    model = {
        "reference": args.model,
        "fingerprint": lm.base.fingerprint,
        "units": lm.units_fingerprint,
        "tokenizer": lm.tokenizer.fingerprint,
        "dtype": lm.base.dtype,
    }
    settings = {"model": model, "method": method.settings() | named, **options}
    settings = jsonable(json.loads(json.dumps(settings, default=dataclasses.asdict)))
    fields = {"line": int, "prompt": str, "settings": dict}
    journal = Journal(out, fields, "was not written by this command: choose another --out")
    done = _done(journal, settings)
    prompts, bad = {}, {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompts[number] = _prompts_of(lm, line, resolved, options, models.context_length)
            except UserError as error:
                bad[number] = str(error)
    other = next((number for number, prompt in done.items() if prompts.get(number) != prompt), None)
    if other is not None:
        raise UserError(f"{out} has another prompt at line {other} than {source}: choose another --out")
    # Cut from all lines, those done too: what is drawn depends on a row's place in its batch.
    batches = [list(prompts)[i : i + size] for i in range(0, len(prompts), size)]
    for index, batch in enumerate(tqdm(batches, unit="batch", disable=args.quiet)):
        if done.keys() >= set(batch):
            continue
        seeded = options | {"seed": (options["seed"] + index) % 2**31}
        both = {}
        if "without_context" in prompts[batch[0]]:
            both["without_context"] = [prompts[number]["without_context"] for number in batch]
        texts = lm.generate([prompts[number]["prompt"] for number in batch], method, **seeded, **both)
        journal.append(
            *(
                {"line": number, **prompts[number], "text": text, "settings": settings}
                for number, text in zip(batch, texts, strict=True)
                if number not in done
            )
        )
    logger.info("%s holds %d lines, %d of them from before", out, len(prompts), len(done))
    if bad:
        reasons = "; ".join(f"line {number}: {reason}" for number, reason in list(bad.items())[:8])
        raise UserError(f"{len(bad)} lines of {source} were left out: {reasons}")


def _prompts_of(
    lm: "LanguageModel", line: str, method: "Method", options: dict[str, Any], context: int
) -> dict[str, str]:
    """A line's prompt, and the one without its context where the method compares the two."""
    from imae_jax.decode.streams import num_prompts

    prompts = {}
    for name in ("prompt", "without_context")[: num_prompts(method)]:
        try:
            prompts[name] = json.loads(line)[name]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'no JSON object with "{name}"') from error
        if not isinstance(prompts[name], str) or not prompts[name].strip():
            raise UserError(f"{name} is empty or no text")
        (tokens,) = lm.encode_prompts([prompts[name]], options["format"])
        length = len(tokens) + options["max_new_tokens"]
        if length > context:
            raise UserError(f"{name} and new tokens are {length}, the context is {context}")
    return prompts


def _done(journal: Journal, settings: dict[str, Any]) -> dict[int, dict[str, str]]:
    """Numbers and prompts of the lines that were continued before."""
    records = journal.resume() if journal.path.exists() else []
    if any(without_places(record["settings"]) != without_places(settings) for record in records):
        raise UserError(f"{journal.path} was written with other settings: choose another --out")
    names = ("prompt", "without_context")
    return {record["line"]: {name: record[name] for name in names if name in record} for record in records}


def _print_side_by_side(prompts: list[str], names: list[str], columns: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    table.add_column("prompt", overflow="fold", ratio=1)
    for number, title in enumerate(names):
        table.add_column(title, overflow="fold", ratio=1, style=COLORS[number % len(COLORS)])
    for prompt, *texts in zip(prompts, *columns, strict=True):
        # Text, since a model's output may hold what rich would read as markup.
        cells = [Text(prompt)]
        for text in texts:
            pairs = enumerate(zip(text, texts[0], strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(text), len(texts[0])))
            cell = Text(text[:same])
            cell.append(text[same:], style="bold")
            cells.append(cell)
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
