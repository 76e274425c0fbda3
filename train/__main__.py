"""`python -m imae_jax.train`: trains anti-expert units on a frozen LLM."""

import sys
from collections.abc import Sequence

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, command


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.train",
        description="Trains anti-expert units on a frozen LLM and writes OUT/imae.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, or the name of a shipped config")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run in the same out")
    parser.add_argument(
        "--anti-expert-llm",
        metavar="MODEL",
        help="separate LLM trained on hallucinations, for the token filter (same as "
        "filter.anti_expert_llm=MODEL)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="override a setting, e.g. optimizer.steps=50",
    )
    args = parser.parse_intermixed_args(argv)

    runtime.set_up()
    from imae_jax.train.config import load_config
    from imae_jax.train.loop import train

    settings = list(args.settings)
    only_icd = "icd" in settings[:1]
    if only_icd:
        settings.pop(0)
    if args.anti_expert_llm is not None:
        settings.append(f"filter.anti_expert_llm={args.anti_expert_llm}")
    config = load_config(args.config, settings)
    path = train(config, only_icd=only_icd, resume=args.resume, overwrite=args.overwrite, quiet=args.quiet)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
