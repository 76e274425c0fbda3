"""Benchmarks on published files whose answers are written by the methods, greedily."""

import abc
import dataclasses
from typing import Any, ClassVar

from imae_jax.cli import at_least
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.benchmark import Item
from imae_jax.evaluate.benchmarks.published import Published, PublishedBenchmark, Rows

CUT_OFF = {"cut_off": "cut off"}
"""Share of answers that neither ended nor met a stop string within the limit of tokens."""

CHUNK_SIZE = 8  # tokens between looks for stop strings: many answers are short


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written(Published):
    """A protocol of written answers.

    Attributes:
        format: `raw`, or `chat` where the prompt is the user's turn of the model's chat template.
        stop: strings that end an answer, and are not part of it.
        max_new_tokens: limit of tokens, unless --max-new-tokens gives another.
        shots: number of last rows of the data that are demonstrations before every question, and not asked.
    """

    format: str = "raw"
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    shots: int = 0


class WrittenBenchmark(PublishedBenchmark):
    output = "texts"
    protocols: ClassVar[tuple[Written, ...]]

    def add_arguments(self, parser):
        super().add_arguments(parser)
        parser.add_argument("--max-new-tokens", type=at_least(1), help="(default: the protocol's)")
        parser.add_argument(
            "--batch-size", type=at_least(1), default=8, help="questions at a time (default: 8)"
        )

    def load(self, args, methods):
        inputs = super().load(args, methods)
        options = {**self.options(inputs.protocol, args)}
        return dataclasses.replace(inputs, settings={**inputs.settings, "generation": options})

    def task(self, args, inputs, lm):
        if inputs.protocol.format == "chat" and not lm.tokenizer.chat_templates:
            raise UserError(
                f"{inputs.protocol.name} asks in a chat, and {args.model} has no chat template: use a chat "
                "model, or another --protocol"
            )
        task = super().task(args, inputs, lm)
        return dataclasses.replace(task, options={**task.options, "chunk_size": CHUNK_SIZE})

    def options(self, protocol, args):
        return {
            "format": protocol.format,
            "stop": protocol.stop,
            "max_new_tokens": args.max_new_tokens or protocol.max_new_tokens,
            "batch_size": args.batch_size,
            "confidence": "text",
        }

    def parted(self, protocol: Written, rows: Rows) -> tuple[Rows, Rows]:
        """The rows to ask, and those that are demonstrations.

        Raises:
            UserError: nothing is left to ask.
        """
        asked = len(rows) - protocol.shots
        if asked < 1:
            raise UserError(
                f"{protocol.name} takes {protocol.shots} of {len(rows)} rows as demonstrations, and nothing "
                "is left to ask: give more rows"
            )
        return rows[:asked], rows[asked:]

    def heading(self, results):
        return f"{super().heading(results)}, at most {results['generation']['max_new_tokens']} tokens"

    @abc.abstractmethod
    def measure(self, item: Item, answer: str) -> dict[str, Any]:
        """What is recorded of an answer: metrics in 0..1, and what they rest on."""

    def record(self, item, output, tokenizer):
        measured = self.measure(item, output.text)
        return {"answer": output.text, **measured, "cut_off": float(not output.finished)} | output.confidence
