"""`python -m imae_jax.evaluate.compare RUN_A RUN_B`: two runs on the items that both have."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax.cli import ArgumentParser, at_least, command, lock_outputs
from imae_jax.evaluate.reporting.compare import (
    compare_runs,
    comparison_tables,
    missing_subsets,
    write_comparison,
)
from imae_jax.evaluate.reporting.tables import show
from imae_jax.evaluate.runner.identity import command_line, environment

logger = logging.getLogger(__name__)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.compare",
        description="Paired differences of two evaluation runs, question by question.",
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", type=Path, help="output directory of a run")
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar=("METHOD_OF_A", "METHOD_OF_B"),
        help="methods to compare; may be given repeatedly (default: all that both have)",
    )
    parser.add_argument("--anyway", action="store_true", help="also runs of different protocols or data")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the bootstrap")
    parser.add_argument("--out", type=Path, help="directory to write, too")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    lock_outputs(args.out)
    comparison = compare_runs(*args.runs, args.pair, anyway=args.anyway, seed=args.seed)
    for subset in missing_subsets(comparison):
        logger.warning("no item of both runs is among %s", subset)
    comparison |= {"command": command_line(parser.prog, argv), **environment()}
    if args.out is not None:
        write_comparison(comparison, args.out, overwrite=args.overwrite)
    show(comparison_tables(comparison))


if __name__ == "__main__":
    sys.exit(main())
