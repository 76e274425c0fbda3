"""`python -m imae_jax.generate`: continues prompts in any mode or with any method.

This command and those of the other rooms are the only modules that see both the library and
`imae_jax.convert`.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, add_model_arguments, command, model_arguments
from imae_jax.errors import UserError


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.generate",
        description="Continues prompts with a model, in one mode or in several side by side.",
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", required=True, help="may be given repeatedly")
    parser.add_argument(
        "--mode",
        default=None,
        help="expert, base, anti-expert, a number (the strength), or a method (default: expert where "
        "the model has anti-expert units, else base)",
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
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed {args.seed}: give a number from 0 to {2**31 - 1}")
    if args.compare is not None and args.mode is not None:
        raise UserError("--compare and --mode exclude each other: give one of them")

    runtime.set_up()
    from imae_jax.convert import load_model
    from imae_jax.decode import Sampler, parse_method, split_methods

    sampler = Sampler(args.temperature, args.top_k, args.top_p)
    names = split_methods(args.compare) if args.compare else [args.mode]
    methods = [parse_method(name) for name in names if name is not None]
    lm = load_model(args.model, **model_arguments(args))
    if not methods:
        methods = [parse_method("expert" if lm.model.anti_expert_config else "base")]

    columns, notes = [], []
    for method in methods:
        start = time.perf_counter()
        columns.append(
            lm.generate(
                args.prompt,
                method,
                format=args.format,
                sampler=sampler,
                max_new_tokens=args.max_new_tokens,
                seed=args.seed,
            )
        )
        notes.append(f"{method.name}: {time.perf_counter() - start:.1f} s")
    if args.compare is not None:
        _print_side_by_side(args.prompt, [method.name for method in methods], columns)
    else:
        for prompt, text in zip(args.prompt, columns[0], strict=True):
            print(prompt + text if args.format == "raw" else text.strip())
    print(", ".join(notes) + ", compilation included", file=sys.stderr)


def _print_side_by_side(prompts: list[str], names: list[str], columns: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for title in ("prompt", *names):
        table.add_column(title, overflow="fold", ratio=1)
    for row in zip(prompts, *columns, strict=True):
        # Text, since a model's output may hold what rich would read as markup.
        cells: list[Any] = [Text(cell.strip()) for cell in row]
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
