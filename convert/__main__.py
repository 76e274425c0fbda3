"""`python -m imae_jax.convert`: checkpoints from one format to another."""

import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, add_model_arguments, command, model_arguments
from imae_jax.errors import UserError
from imae_jax.files import new_directory


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.convert", description="Converts checkpoints between formats."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser("export", help="write a HuggingFace directory (safetensors)")
    add_model_arguments(export, quantizable=False)
    export.add_argument("--out", required=True, help="directory to write")
    export.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="size of a safetensors file (default: 5)"
    )
    export.add_argument("--iti", metavar="FILE", help="bake ITI's directions into the biases of o_proj")
    export.add_argument("--iti-alpha", type=float, default=15.0, help="strength (default: 15)")
    export.add_argument("--iti-heads", type=int, default=48, help="number of heads (default: 48)")
    export.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    if args.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb {args.max_shard_gb} must be above 0")

    runtime.set_up()
    from imae_jax.convert import load_model
    from imae_jax.convert.hf import save_hf
    from imae_jax.convert.iti import bake_into, read_directions

    with new_directory(args.out, marker="config.json", overwrite=args.overwrite) as out:
        lm = load_model(args.model, **model_arguments(args))
        if lm.imae is not None:
            raise UserError(
                f"{args.model} holds anti-expert units, which a plain Llama checkpoint cannot: export "
                f"its base ({lm.base.reference}) instead"
            )
        model = lm.model
        if args.iti is not None:
            directions = read_directions(Path(args.iti), lm.config)
            model = bake_into(model, directions, args.iti_alpha, args.iti_heads)
        save_hf(
            model,
            lm.tokenizer,
            out,
            eos_token_ids=lm.eos_token_ids,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
        )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
