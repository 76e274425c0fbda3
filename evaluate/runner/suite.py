"""A suite: several benchmarks with one model and the same methods, resumable as a whole.

suite.json      what was asked for; a resumed suite must have the same
NAME/           the run of a benchmark, as its own command writes it
report/         all of them on one page
table.md        every score of every method
model_card.md   the same for the model's page on the HuggingFace hub
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from imae_jax.cli import lock_outputs, model_arguments
from imae_jax.convert import load_model
from imae_jax.distributed import barrier, is_main
from imae_jax.errors import UserError, first_line
from imae_jax.evaluate.benchmarks import benchmarks
from imae_jax.evaluate.benchmarks.benchmark import Benchmark
from imae_jax.evaluate.report import REPORT_FILE, write_report
from imae_jax.evaluate.reporting.model_card import model_card
from imae_jax.evaluate.reporting.suite import summary_table
from imae_jax.evaluate.reporting.tables import show
from imae_jax.evaluate.runner.arguments import benchmark_parser, parse_methods
from imae_jax.evaluate.runner.directory import MARKDOWN_FILE, RESULTS_FILE, RUN_FILE, read_run
from imae_jax.evaluate.runner.identity import differences, same_model
from imae_jax.evaluate.runner.run import Request, check, run
from imae_jax.files import (
    check_new_directory,
    dumps,
    jsonable,
    new_directory,
    read_json,
    read_text,
    write_text,
)

SUITE_FILE, REPORT, CARD_FILE = "suite.json", "report", "model_card.md"
# What the command gives to all runs.
RESERVED = ("out", "model", "methods", "resume", "overwrite", "controls", "placebo", "twin")
SUITES = Path(__file__).resolve().parents[1] / "suites"
# Arguments that change what is computed.
SETTINGS = (
    *("model", "revision", "base", "tokenizer", "dtype", "data", "primer", "methods", "baseline", "controls"),
    *("placebo", "twin", "limit", "split", "split_seed", "dev_share", "seed"),
)


@dataclasses.dataclass(frozen=True)
class Member:
    """A run of a suite.

    Attributes:
        name: of its directory.
        benchmark: what it runs.
        arguments: the benchmark's own, by name; True for a flag.
    """

    name: str
    benchmark: Benchmark
    arguments: Mapping[str, Any]


def read_suite(text: str) -> tuple[list[Member], str]:
    """The runs of a shipped suite or a YAML file, and the file's SHA-256.

    Raises:
        UserError: there is none, or it names no benchmark.
    """
    shipped = sorted(path.stem for path in SUITES.glob("*.yaml"))
    path = SUITES / f"{text}.yaml" if text in shipped else Path(text)
    if not path.is_file():
        raise UserError(f"--suite {text}: give {' or '.join(shipped)}, or a YAML file")
    content = read_text(path, "suite")
    try:
        entries = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise UserError(f"suite {path} is not valid YAML: {first_line(error)}") from error
    known, members = benchmarks(), []
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"suite {path} must hold `NAME: {{benchmark: …}}` for every run")
    for name, settings in entries.items():
        benchmark = settings.get("benchmark") if isinstance(settings, dict) else None
        if not isinstance(benchmark, str) or benchmark not in known:
            raise UserError(f"suite {path}: {name} needs benchmark: one of {', '.join(known)}")
        if not isinstance(name, str) or name != Path(name).name or name in (REPORT, "", ".", ".."):
            raise UserError(f"suite {path}: {name!r} is no name of a run's folder: give another")
        taken = next((key for key in settings if key in RESERVED), None)
        if taken is not None:
            raise UserError(f"suite {path}: {name} sets {taken}, which all runs share: leave it out")
        arguments = {key: value for key, value in settings.items() if key != "benchmark"}
        members.append(Member(name, known[benchmark], arguments))
    return members, hashlib.sha256(content.encode()).hexdigest()


def member_arguments(member: Member, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of a member's own command: the suite's file before what the command line says.

    Raises:
        UserError: an argument that the benchmark does not have.
    """
    words = ["--model", args.model, "--out", str(args.out / member.name)]
    for key, value in member.arguments.items():
        option = f"--{key.replace('_', '-')}"
        if key == "data" and args.data is not None and value not in ("demo", "hub"):
            value = args.data / str(value)
        if value is not False:
            words += [option] if value is True else [option, str(value)]
    try:
        parsed = benchmark_parser(member.benchmark, f"suite {args.suite}, {member.name}").parse_args(words)
    except UserError as error:
        raise UserError(f"{member.name}: {error}") from error
    own = {"out", "data", *(key.replace("-", "_") for key in member.arguments)}
    for key, value in vars(args).items():
        if key not in own and hasattr(parsed, key) and (key != "primer" or value is not None):
            setattr(parsed, key, value)
    parsed.resume = args.resume and (parsed.out / RUN_FILE).is_file()
    return parsed


def run_suite(args: argparse.Namespace, command: str) -> None:
    """Runs what a suite still lacks, then writes its tables, its report and its model card.

    Args:
        args: the command's.
        command: the command line, for the results.

    Raises:
        UserError: one of the runs cannot be made; nothing has been computed then.
    """
    members, digest = read_suite(args.suite)
    methods = {label: method.settings() for label, method in parse_methods(args.methods).items()}
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings = jsonable(settings | {"methods": methods, "suite": {"path": args.suite, "sha256": digest}})
    _check_out(args, settings)
    requests: list[Request] = []
    for member in members:
        if not (args.resume and (args.out / member.name / RESULTS_FILE).is_file()):
            line = f"{command} ({member.name})"
            requests.append(check(member.benchmark, member_arguments(member, args), line))
    barrier("arguments checked")  # What one process makes, no other may take for an older suite.
    if not args.resume:
        with new_directory(args.out, marker=SUITE_FILE, overwrite=args.overwrite) as new:
            (new / SUITE_FILE).write_text(dumps(settings, indent=2) + "\n", encoding="utf-8")
    barrier("suite begins")
    if requests:
        lm = load_model(args.model, **model_arguments(args))
        for request in requests:
            run(request, lm)
    if is_main():
        _finish(args, members)
    barrier("suite is finished")


def _check_out(args: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """Refuses an output that may not be replaced, or another suite than the one to be resumed."""
    out, file = args.out, args.out / SUITE_FILE
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other: give one of them")
    lock_outputs(out)
    if args.resume:
        if not file.is_file():
            raise UserError(f"{out} holds no suite to resume: leave --resume out")
        for name, old, new in differences(read_json(file), settings):
            raise UserError(
                f"{out} is a suite with another {name} ({old}, now {new}): restore it, or choose another "
                "output"
            )
        return
    if out.exists() and not args.overwrite:
        hint = "pass --resume to go on" if file.is_file() else "choose another output"
        raise UserError(f"{out} exists already: {hint}, or pass --overwrite")
    check_new_directory(out, marker=SUITE_FILE, overwrite=args.overwrite)


def _finish(args: argparse.Namespace, members: list[Member]) -> None:
    """Writes what the runs come to together, and shows it."""
    results = {member.name: (member.benchmark, read_run(args.out / member.name)) for member in members}
    first, *others = results
    for name in others:
        if not same_model(results[first][1], results[name][1]):
            raise UserError(
                f"{args.out / name} was scored with another model than {args.out / first}: it has changed "
                "since; remove one of them and pass --resume"
            )
    table = summary_table(results)
    write_text(args.out / MARKDOWN_FILE, table.markdown())
    write_text(args.out / CARD_FILE, model_card(results, args.model))
    with new_directory(args.out / REPORT, marker=REPORT_FILE, overwrite=True) as report:
        write_report([args.out / member.name for member in members], report)
    show([table])
    print(f"wrote {args.out / REPORT / REPORT_FILE} and {args.out / CARD_FILE}")
