"""`python -m imae_jax.convert`: checkpoints from one format to another."""

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, add_model_arguments, command, lock_outputs, model_arguments
from imae_jax.errors import UserError
from imae_jax.files import new_directory


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.convert", description="Converts checkpoints between formats."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser("export", help="write a HuggingFace directory (safetensors)")
    add_model_arguments(export, with_mesh=False)
    export.add_argument("--out", required=True, help="directory to write")
    export.add_argument(
        "--max-shard-gb",
        type=float,
        help="size of a safetensors file (default: the files of a plain source, else 5)",
    )
    export.add_argument(
        "--step", type=int, metavar="N", help="MODEL is a training run: take its checkpoint of step N"
    )
    export.add_argument("--iti", metavar="FILE", help="bake ITI's directions into the biases of o_proj")
    export.add_argument("--iti-alpha", type=float, default=15.0, help="strength (default: 15)")
    export.add_argument("--iti-heads", type=int, default=48, help="number of heads (default: 48)")
    export.add_argument(
        "--mode", default="expert", help="IMAE models: mode in which transformers runs it (default: expert)"
    )
    export.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="IMAE models: hold the export in transformers against this library (default, where torch is)",
    )
    export.add_argument(
        "--results", metavar="DIR", help="IMAE models: an evaluation's output, for the model card"
    )
    export.add_argument("--base-model", metavar="ORG/NAME", help="hub id of the base, for the model card")
    export.add_argument("--push", metavar="ORG/NAME", help="upload to this repository of the HuggingFace hub")
    export.add_argument("--dry-run", action="store_true", help="with --push: only list what it would upload")
    export.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    back = commands.add_parser("import", help="make an IMAE directory of an exported IMAE model")
    back.add_argument("--model", required=True, help="directory or hub id of the export")
    back.add_argument("--revision", help="branch, tag or commit of a hub model")
    back.add_argument("--out", required=True, help="directory to write: OUT/imae and OUT/base")
    back.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    checkpoint = commands.add_parser(
        "checkpoint", help="make an IMAE directory or an adapter of a training run's checkpoint"
    )
    checkpoint.add_argument("--run", required=True, help="OUT of a training run; OUT/icd: its adapter")
    checkpoint.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    checkpoint.add_argument("--base", help="where the base is now, if it has moved")
    checkpoint.add_argument("--out", required=True, help="directory to write")
    checkpoint.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    lock_outputs(args.out)
    {"export": _export, "import": _import, "checkpoint": _checkpoint}[args.command](args)


def _export(args: argparse.Namespace) -> None:
    if args.max_shard_gb is not None and not 0 < args.max_shard_gb < math.inf:
        raise UserError(f"--max-shard-gb {args.max_shard_gb} must be a number above 0")
    if not math.isfinite(args.iti_alpha):
        raise UserError(f"--iti-alpha {args.iti_alpha} must be a number")
    if args.iti_heads < 1:
        raise UserError(f"--iti-heads {args.iti_heads} must be at least 1")
    if args.dry_run and args.push is None:
        raise UserError("--dry-run goes with --push: it lists what would be uploaded")
    max_shard_bytes = None if args.max_shard_gb is None else max(1, int(args.max_shard_gb * 1e9))

    runtime.set_up()
    from imae_jax.anti_expert import MODES, parse_mode
    from imae_jax.convert import load_model
    from imae_jax.convert.export import check_repository, push, read_results, write_card, write_model
    from imae_jax.convert.hf import MAX_SHARD_BYTES, save_hf
    from imae_jax.convert.iti import bake_into, read_directions
    from imae_jax.convert.peft import is_adapter
    from imae_jax.convert.references import local_paths, open_model
    from imae_jax.convert.verify import Verification, verify

    if args.push is not None:
        check_repository(args.push)
    strength = parse_mode(args.mode)
    results = None if args.results is None else read_results(args.results)
    notes = []
    with new_directory(args.out, marker="config.json", overwrite=args.overwrite) as out:
        of_step, read = out / ".checkpoint", [args.tokenizer, args.iti, args.results]
        if args.step is not None:
            from imae_jax.train.result import write_result

            read.append(args.model)
            write_result(Path(args.model), args.step, of_step, base=args.base)
            args.model = str(of_step)
        _keep_sources(args.out, *read, *local_paths(args.model, args.base))
        if args.iti is not None or is_adapter(Path(args.model)):
            lm = load_model(args.model, **model_arguments(args))
            if lm.imae is not None:
                raise UserError(f"--iti goes with a plain model, which {args.model} is not: export its base")
            _check_plain(args)
            model = lm.model
            if args.iti is not None:
                directions = read_directions(Path(args.iti), lm.config)
                model = bake_into(model, directions, args.iti_alpha, args.iti_heads)
            size = max_shard_bytes or MAX_SHARD_BYTES
            save_hf(model, lm.tokenizer, out, eos_token_ids=lm.eos_token_ids, max_shard_bytes=size)
        else:
            opened = open_model(args.model, revision=args.revision, base=args.base)
            if opened.imae is None:
                _check_plain(args)
            write_model(
                opened,
                out,
                dtype=args.dtype,
                tokenizer=args.tokenizer,
                max_shard_bytes=max_shard_bytes,
                mode=args.mode if args.mode in MODES else strength,
            )
            if opened.imae is not None:
                verification = verify(opened, out, args.dtype) if args.verify else "--no-verify was given"
                if isinstance(verification, Verification):
                    notes.append(verification.summary())
                else:
                    notes.append(f"not verified: {verification}")
                    verification = None
                base_model = write_card(
                    out,
                    opened,
                    name=args.push or Path(args.out).resolve().name,
                    verification=verification,
                    results=results,
                    base_model=args.base_model,
                )
                if base_model is None:
                    notes.append("the card cannot link to the base: --base-model ORG/NAME says where it is")
        if args.step is not None:
            shutil.rmtree(of_step)
    print("\n".join([*notes, f"wrote {args.out}"]))
    if args.push is not None:
        files = push(Path(args.out), args.push, dry_run=args.dry_run)
        print("\n".join([f"{'would push' if args.dry_run else 'pushed'} to {args.push}:", *files]))


def _check_plain(args: argparse.Namespace) -> None:
    """Raises a `UserError` where an argument for a model card comes with a plain model, which gets none."""
    for name, value in (("--results", args.results), ("--base-model", args.base_model)):
        if value is not None:
            raise UserError(f"{name} goes with an IMAE model, which {args.model} is not: leave it out")


def _keep_sources(out: str, *read: str | Path | None) -> None:
    """Raises a `UserError` where `out` would replace something that is read."""
    directory = Path(out).resolve()
    for path in read:
        path = None if path is None else Path(path).resolve()
        # A new output has a temporary name until it is written.
        if path is not None and directory.exists() and path.is_relative_to(directory):
            raise UserError(f"{out} holds {path}, which is read: choose another output")


def _import(args: argparse.Namespace) -> None:
    runtime.set_up()
    from imae_jax.convert.export import import_model
    from imae_jax.convert.references import local_paths, open_model

    opened = open_model(args.model, revision=args.revision)
    _keep_sources(args.out, *local_paths(args.model))
    import_model(opened, args.out, overwrite=args.overwrite)
    print(f"wrote {args.out}/imae and its base, {args.out}/base")


def _checkpoint(args: argparse.Namespace) -> None:
    runtime.set_up()
    from imae_jax.convert.references import local_paths
    from imae_jax.train.result import write_result

    _keep_sources(args.out, args.run, *([] if args.base is None else local_paths(args.base)))
    step = write_result(Path(args.run), args.step, Path(args.out), base=args.base, overwrite=args.overwrite)
    print(f"wrote {args.out} (step {step})")


if __name__ == "__main__":
    sys.exit(main())
