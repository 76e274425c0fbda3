"""`python -m imae_jax.convert`: checkpoints from one format to another."""

import argparse
import dataclasses
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax import runtime
from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    at_least,
    command,
    lock_outputs,
    model_arguments,
)
from imae_jax.errors import UserError
from imae_jax.files import new_directory


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.convert", description="Converts checkpoints between formats."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser("export", help="write a HuggingFace directory (safetensors)")
    _add_export_arguments(export)
    verify = commands.add_parser("verify", help="compare logits of an export in transformers with its source")
    verify.add_argument("--model", required=True, help="reference of the exported model")
    verify.add_argument("--revision", help="branch, tag or commit of a hub model")
    verify.add_argument("--base", help="where the base of an IMAE directory is now")
    verify.add_argument("--export", required=True, metavar="DIR", help="what `convert export` wrote of MODEL")
    verify.add_argument("--layers", type=int, metavar="N", help="compare the lowest N layers (default: all)")
    back = commands.add_parser("import", help="make an IMAE directory of an exported IMAE model")
    back.add_argument("--model", required=True, help="directory or hub id of the export")
    back.add_argument("--revision", help="branch, tag or commit of a hub model")
    back.add_argument("--out", required=True, help="directory to write: OUT/imae and OUT/base")
    back.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    checkpoint = commands.add_parser(
        "checkpoint", help="make an IMAE directory or an adapter of a training run's checkpoint"
    )
    checkpoint.add_argument("--run", required=True, help="OUT of a training run; OUT/icd: its adapter")
    checkpoint.add_argument("--step", type=int, metavar="N", help="step to take (default: the newest)")
    checkpoint.add_argument("--base", help="where the base is now, if it has moved")
    checkpoint.add_argument("--out", required=True, help="directory to write")
    checkpoint.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    mode = commands.add_parser("mode", help="make a LoRA adapter that puts an export into another mode")
    mode.add_argument("--model", required=True, help="directory or hub id of an exported IMAE model")
    mode.add_argument("--revision", help="branch, tag or commit of a hub model")
    mode.add_argument("--mode", required=True, help="expert, base, anti-expert or a number (the strength)")
    mode.add_argument("--out", required=True, help="directory to write")
    mode.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    lock_outputs(getattr(args, "out", None))
    run = {"export": _export, "verify": _verify, "import": _import, "checkpoint": _checkpoint, "mode": _mode}
    run[args.command](args)


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, with_mesh=False)
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument(
        "--max-shard-gb",
        type=float,
        help="size of a safetensors file (default: the files of a plain source, else 5)",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="MODEL is a training run: take its checkpoint of step N"
    )
    parser.add_argument("--iti", metavar="FILE", help="bake ITI's directions into the biases of o_proj")
    parser.add_argument("--iti-alpha", type=float, default=15.0, help="strength of ITI (default: 15)")
    parser.add_argument(
        "--iti-heads", type=at_least(1), default=48, help="heads that ITI shifts (default: 48)"
    )
    parser.add_argument(
        "--mode", default="expert", help="IMAE models: mode in which transformers runs it (default: expert)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="IMAE models: `convert verify` before it is kept"
    )
    parser.add_argument("--name", metavar="ORG/NAME", help="IMAE models: name on the card (default: OUT's)")
    parser.add_argument("--base-model", metavar="ORG/NAME", help="hub id of the base, for the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def _export(args: argparse.Namespace) -> None:
    if args.max_shard_gb is not None and not 0 < args.max_shard_gb < math.inf:
        raise UserError(f"--max-shard-gb {args.max_shard_gb} must be a number above 0")
    if not math.isfinite(args.iti_alpha):
        raise UserError(f"--iti-alpha {args.iti_alpha} must be a number")
    max_shard_bytes = None if args.max_shard_gb is None else max(1, int(args.max_shard_gb * 1e9))

    runtime.set_up()
    from imae_jax.anti_expert import MODES, parse_mode
    from imae_jax.convert import export, load_model
    from imae_jax.convert.iti import bake_into, read_directions
    from imae_jax.convert.references import Reference, open_model
    from imae_jax.convert.verify import check_installed, verify

    strength = parse_mode(args.mode)
    mode = args.mode if args.mode in MODES else strength
    if args.verify:
        check_installed()
    notes = []
    contents = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "*.md", "custom_generate")
    with new_directory(args.out, marker="config.json", contents=contents, overwrite=args.overwrite) as out:
        model, checkpoint = args.model, out / ".checkpoint"
        if args.step is not None:
            from imae_jax.train.result import write_result

            write_result(Path(args.model), args.step, checkpoint, base=args.base)
            model = str(checkpoint)
        run = None if args.step is None else args.model
        _keep_sources(args.out, args.tokenizer, args.iti, run, models=[(model, args.base)])
        if args.iti is not None or Reference.parse(model).is_adapter:
            lm = load_model(model, **model_arguments(args))
            if lm.imae is not None:
                raise UserError(f"--iti goes with a plain model, which {args.model} is not: export its base")
            _check_plain(args)
            if args.iti is not None:
                directions = read_directions(Path(args.iti), lm.config)
                biased = bake_into(lm.model, directions, args.iti_alpha, args.iti_heads)
                lm = dataclasses.replace(lm, model=biased)
            export.export_merged(lm, out, max_shard_bytes=max_shard_bytes)
        else:
            opened = open_model(model, revision=args.revision, base=args.base)
            options = {"dtype": args.dtype, "tokenizer": args.tokenizer, "max_shard_bytes": max_shard_bytes}
            if opened.imae is None:
                _check_plain(args)
                export.export_plain(opened, out, **options)
            else:
                name = args.name or Path(args.out).resolve().name
                base_model = export.export_imae(
                    opened, out, name=name, mode=mode, base_model=args.base_model, **options
                )
                if base_model is None:
                    notes.append("the card cannot link to the base: --base-model ORG/NAME says where it is")
                if args.verify:
                    notes.append(verify(opened, out).summary())
        if args.step is not None:
            shutil.rmtree(checkpoint)
    print("\n".join([*notes, f"wrote {args.out}"]))


def _check_plain(args: argparse.Namespace) -> None:
    """Raises a `UserError` where an argument for IMAE models comes with a plain model."""
    for name in ("name", "base_model", "verify"):
        if getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')} goes with an IMAE model, which {args.model} is not: leave it out"
            )


def _keep_sources(out: str, *paths: str | Path | None, models: Sequence[tuple[str, str | None]] = ()) -> None:
    """Raises a `UserError` where `out` would replace something that is read.

    Args:
        out: path to be written.
        paths: paths that are read; a None is no path.
        models: references that are read, each with the base that it has moved to, or None.
    """
    from imae_jax.convert.references import local_paths

    directory = Path(out).resolve()
    if not directory.exists():  # A new output has a temporary name until it is written.
        return
    read = [path for path in paths if path is not None]
    read += [path for model in models for path in local_paths(*model)]
    for path in read:
        if Path(path).resolve().is_relative_to(directory):
            raise UserError(f"{out} holds {Path(path).resolve()}, which is read: choose another output")


def _verify(args: argparse.Namespace) -> None:
    runtime.set_up()
    from imae_jax.convert.references import open_model
    from imae_jax.convert.verify import verify

    opened = open_model(args.model, revision=args.revision, base=args.base)
    print(verify(opened, Path(args.export), args.layers).summary())


def _import(args: argparse.Namespace) -> None:
    runtime.set_up()
    from imae_jax.convert.export import import_model
    from imae_jax.convert.references import open_model

    opened = open_model(args.model, revision=args.revision)
    _keep_sources(args.out, models=[(args.model, None)])
    import_model(opened, args.out, overwrite=args.overwrite)
    print(f"wrote {args.out}/imae and its base, {args.out}/base")


def _mode(args: argparse.Namespace) -> None:
    runtime.set_up()
    from imae_jax.convert.export import export_mode
    from imae_jax.convert.peft import CONFIG_FILE
    from imae_jax.convert.references import open_model

    opened = open_model(args.model, revision=args.revision)
    _keep_sources(args.out, models=[(args.model, None)])
    with new_directory(args.out, marker=CONFIG_FILE, overwrite=args.overwrite) as out:
        export_mode(opened, out, args.mode)
    print(f"wrote {args.out}")


def _checkpoint(args: argparse.Namespace) -> None:
    runtime.set_up()
    from imae_jax.train.result import write_result

    _keep_sources(args.out, args.run, models=[] if args.base is None else [(args.base, None)])
    step = write_result(Path(args.run), args.step, Path(args.out), base=args.base, overwrite=args.overwrite)
    print(f"wrote {args.out} (step {step})")


if __name__ == "__main__":
    sys.exit(main())
