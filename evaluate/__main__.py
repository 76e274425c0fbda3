"""`python -m imae_jax.evaluate NAME …`: runs any benchmark, or another command of this folder."""

import importlib
import sys
from collections.abc import Callable, Sequence

from imae_jax.__main__ import COMMANDS
from imae_jax.cli import command, join_processes
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks import benchmarks
from imae_jax.evaluate.runner.arguments import benchmark_parser
from imae_jax.evaluate.runner.identity import command_line

PROGRAM = "python -m imae_jax.evaluate"


def benchmark_command(name: str, program: str) -> Callable[..., int]:
    """The command of a benchmark.

    Args:
        name: name of the file in `evaluate/benchmarks/`.
        program: name of the command in help and results.
    """

    @command
    def main(argv: Sequence[str] | None = None) -> None:
        benchmark = benchmarks()[name]
        parser = benchmark_parser(benchmark, program)
        args = parser.parse_args(argv)
        join_processes(args)
        from imae_jax.evaluate.runner.run import run_benchmark

        run_benchmark(benchmark, args, command_line(parser.prog, argv))

    return main


@command
def _unknown(argv: Sequence[str] | None = None) -> None:
    known = ", ".join(benchmarks())
    names = [name.removeprefix("evaluate ") for name in COMMANDS if name.startswith("evaluate ")]
    others = ", ".join(name for name in names if name not in benchmarks())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} NAME … (--help after any NAME)\n\nbenchmarks: {known}\nothers: {others}")
        return
    raise UserError(f"{argv[0]!r} is neither a benchmark ({known}) nor another command ({others})")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names. Returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, arguments = (words[0] if words else ""), words[1:]
    if f"evaluate {name}" in COMMANDS:
        return importlib.import_module(COMMANDS[f"evaluate {name}"][0]).main(arguments)
    if name in benchmarks():
        return benchmark_command(name, f"{PROGRAM} {name}")(arguments)
    return _unknown(words)


if __name__ == "__main__":
    sys.exit(main())
