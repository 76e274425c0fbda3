"""`python -m imae_jax.evaluate.report RUN…`: training and evaluation runs on one page of Markdown."""

import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax.cli import ArgumentParser, command, lock_outputs
from imae_jax.evaluate.reporting.report import REPORT_FILE, write_report
from imae_jax.files import new_directory


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.report",
        description="Gathers training and evaluation runs on one page: OUT/report.md and its plots.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="output directory of a run")
    parser.add_argument("--out", required=True, type=Path, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    lock_outputs(args.out)
    contents = (REPORT_FILE, "report.html", "*.png")  # report.html: of earlier versions
    with new_directory(args.out, marker=REPORT_FILE, contents=contents, overwrite=args.overwrite) as out:
        write_report(args.runs, out)
    print(f"wrote {args.out / REPORT_FILE}")


if __name__ == "__main__":
    sys.exit(main())
