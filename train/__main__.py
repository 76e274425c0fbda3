"""`python -m imae_jax.train`: trains anti-expert units on a frozen LLM."""

import importlib
import sys
from collections.abc import Sequence

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, add_process_arguments, command

COMMANDS = {"plan": "imae_jax.train.plan_command", "pairs": "imae_jax.train.pairs"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    return train_command(arguments)


@command
def train_command(argv: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.train",
        description="Trains anti-expert units on a frozen LLM and writes OUT/imae.",
        epilog="With `icd` before the settings it stops after the anti-expert LLM; `python -m "
        "imae_jax.train plan --help` tells what a run needs in memory, `… pairs --help` what data are like.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, or the name of a shipped config")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument(
        "--from-step", type=int, metavar="N", help="go on from the checkpoint of step N and drop later ones"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a run in the same out")
    parser.add_argument(
        "--anti-expert-llm",
        metavar="MODEL",
        help="separate LLM trained on hallucinations, for the token filter (same as "
        "filter.anti_expert_llm=MODEL)",
    )
    add_process_arguments(parser)
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="override a setting, e.g. optimizer.steps=50",
    )
    args = parser.parse_intermixed_args(argv)

    runtime.set_up()
    from imae_jax import distributed
    from imae_jax.train.config import load_config
    from imae_jax.train.loop import train

    settings = list(args.settings)
    only_icd = "icd" in settings[:1]
    if only_icd:
        settings.pop(0)
    if args.anti_expert_llm is not None:
        settings.append(f"filter.anti_expert_llm={args.anti_expert_llm}")
    config = load_config(args.config, settings)
    distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        detect=args.distributed,
        heartbeat_timeout=args.heartbeat_timeout,
    )
    with distributed.end_together():
        path = train(
            config,
            only_icd=only_icd,
            resume=args.resume,
            from_step=args.from_step,
            overwrite=args.overwrite,
            quiet=args.quiet,
        )
        if distributed.is_main():
            print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
