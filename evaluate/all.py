"""`python -m imae_jax.evaluate.all`: a suite of benchmarks with one model, one report, one model card."""

import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    add_process_arguments,
    command,
    join_processes,
)
from imae_jax.evaluate.runner.arguments import add_run_arguments
from imae_jax.evaluate.runner.identity import command_line


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.all",
        description="Runs a suite of benchmarks: a run of each, one report and a model card in OUT.",
    )
    parser.add_argument("--suite", default="factuality", help="factuality (default), or a YAML file")
    parser.add_argument("--data", type=Path, help="directory that the suite's data files lie in")
    parser.add_argument("--primer", help="file with TruthfulQA's six-shot primer (default: from lm-eval)")
    add_model_arguments(parser)
    add_process_arguments(parser)
    add_run_arguments(parser, questions=True)
    args = parser.parse_args(argv)
    join_processes(args)
    from imae_jax.evaluate.runner.suite import run_suite

    run_suite(args, command_line(parser.prog, argv))


if __name__ == "__main__":
    sys.exit(main())
