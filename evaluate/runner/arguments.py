"""Arguments that all benchmarks share, and the methods that they name."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imae_jax.cli import ArgumentParser, add_model_arguments, add_process_arguments, at_least
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.questions import SPLITS
from imae_jax.evaluate.runner.directory import CONTENTS, RESULTS_FILE, RUN_FILE, marker
from imae_jax.files import check_new_directory, read_text

if TYPE_CHECKING:
    from imae_jax.decode import Method
    from imae_jax.evaluate.benchmarks.benchmark import Benchmark

NUM_DRAWS = 5
MANY_METHODS = "comma-separated methods (base,expert,in-model-contrast:beta=2, a number, …), or a YAML file"


def benchmark_parser(benchmark: "Benchmark", program: str) -> ArgumentParser:
    """The parser of a benchmark's command; `program` is the command's name in help and results."""
    about = f"{benchmark.description}. Writes scores, results, tables and plots into OUT."
    parser = ArgumentParser(prog=program, description=about)
    add_model_arguments(parser)
    add_process_arguments(parser)
    add_run_arguments(parser, questions=benchmark.questions)
    benchmark.add_arguments(parser)
    return parser


def add_run_arguments(parser: argparse.ArgumentParser, *, questions: bool) -> None:
    """Adds the arguments of every run.

    Args:
        parser: the command's.
        questions: whether the benchmark's items are questions, which can be split and limited.
    """
    parser.add_argument("--methods", default="base", help=MANY_METHODS)
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    if questions:
        parser.add_argument("--limit", type=at_least(1), help="use the first N questions of the split")
        parser.add_argument(
            "--split", choices=SPLITS, default="all", help="dev, to choose settings on; test: the others"
        )
        parser.add_argument("--split-seed", type=at_least(0), default=0, help="seed of the dev/test split")
        parser.add_argument(
            "--dev-share", type=float, default=0.2, help="fraction of questions in the dev split"
        )
        parser.add_argument(
            "--baseline", help="method that others are compared to (default: base, else the first)"
        )
    add_control_arguments(parser)
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the bootstrap")
    parser.add_argument("--resume", action="store_true", help="resume the unfinished run in OUT")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds which controls are run; `controls.with_controls` reads them."""
    parser.add_argument(
        "--controls",
        type=at_least(0),
        nargs="?",
        const=NUM_DRAWS,
        metavar="DRAWS",
        help="also run every method with its sign reversed, and with so many random directions "
        f"(default: {NUM_DRAWS}): says how much of a gain is the direction's",
    )
    for name, about in (
        ("placebo", "learned from data without the signal, such as imae:units_from=DIR"),
        ("twin", "another training seed, instead of random directions; repeatable"),
    ):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="LABEL=METHOD",
            help=f"with --controls, a control of the method LABEL: {about}",
        )


def check_arguments(args: argparse.Namespace, methods: Mapping[str, "Method"]) -> None:
    """Refuses what can be refused before a model is loaded."""
    if "split" in args:
        if not 0 < args.dev_share < 1:
            raise UserError(f"--dev-share {args.dev_share}: give a share between 0 and 1")
        if args.baseline is not None and args.baseline not in methods:
            raise UserError(f"--baseline {args.baseline} is not among --methods: {', '.join(methods)}")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one of them")
    out = args.out
    if args.resume and not (out / RUN_FILE).is_file():
        raise UserError(f"{out} holds no run to resume: leave --resume out")
    if not out.exists() or args.overwrite:
        check_new_directory(out, marker=marker(out), contents=CONTENTS, overwrite=args.overwrite)
        return
    unfinished = (out / RUN_FILE).is_file() and not (out / RESULTS_FILE).exists()
    if not args.resume:
        if unfinished:
            raise UserError(f"{out} holds an unfinished run: pass --resume to resume it, or --overwrite")
        raise UserError(f"{out} exists already: choose another output, or pass --overwrite")


def parse_methods(text: str) -> dict[str, "Method"]:
    """Methods by label, from a comma-separated list or a YAML file with a list of settings.

    In YAML an entry may carry a `label` of its own, which it needs where names repeat.
    """
    import yaml

    from imae_jax.decode.methods import parse_method, split_methods

    if text.endswith((".yaml", ".yml")):
        try:
            entries = yaml.safe_load(read_text(text, "methods file"))
        except yaml.YAMLError as error:
            raise UserError(f"methods file {text} is not valid YAML: {error}") from error
        are_settings = isinstance(entries, list) and all(
            isinstance(entry, dict) and "name" in entry for entry in entries
        )
        if not entries or not are_settings:
            raise UserError(f"methods file {text} must hold a list of `- {{name: …}}`")
    else:
        entries = split_methods(text)
    methods: dict[str, Any] = {}
    for entry in entries:
        label = entry
        if isinstance(entry, dict):
            label = str(entry.get("label", entry["name"]))
            entry = {key: value for key, value in entry.items() if key != "label"}
        if label in methods:
            raise UserError(f"method {label!r} is listed twice: give each a label of its own")
        methods[label] = parse_method(entry)
    return methods
