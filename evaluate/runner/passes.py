"""Forward passes over a benchmark's items: which methods share them, and what they give.

A kind of output has a function that plans passes and one that runs a pass: scores of given answers, texts
that methods write, or distributions over a text's next tokens.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imae_jax.continuation import CONFIDENCE
from imae_jax.decode import Continuation, Method, encode, score, streams
from imae_jax.decode.joint import Joint, share_streams
from imae_jax.decode.loop import GenerationOptions
from imae_jax.decode.scoring import check_groups
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.benchmark import Item, Task
from imae_jax.evaluate.folds import FOLD_FILES, fold_files
from imae_jax.evaluate.runner import divergence
from imae_jax.evaluate.runner.identity import method_settings
from imae_jax.language_model import Completion, LanguageModel, tokens_of


@dataclasses.dataclass(frozen=True)
class Pass:
    """Methods whose outputs are computed together.

    Attributes:
        models: weights and configs that the method runs on.
        method: one method, or a `Joint` of those that share streams.
        labels: names of the methods, in the order of the `Joint`'s.
        items: numbers of the items that the pass is for.
    """

    models: Any
    method: Method
    labels: tuple[str, ...]
    items: tuple[int, ...]


def prepare(
    lm: LanguageModel, methods: Mapping[str, Method], items: Sequence[Item], *, generating: bool
) -> tuple[dict[str, dict[str, Any]], list[Pass]]:
    """Every method's resolved settings, and a pass for each method, or for each of its folds.

    Raises:
        UserError: a method that the model cannot run, or a resource that does not fit.
    """
    settings, passes = {}, []
    for label, method in methods.items():
        folds = split_folds(method, items)
        resolved = [lm.prepare(fold, generating=generating) for fold, _ in folds]
        settings[label] = method_settings(lm, folds[0][0], resolved[0][1])
        if len(folds) > 1:
            # Which questions a file is for decides as much as what it holds.
            assignment = json.dumps([list(numbers) for _, numbers in folds])
            settings[label] |= {
                method.resource.setting: method.resource.reference,
                "folds": len(folds),
                "fingerprint": [lm.resource_fingerprint(fold) for fold, _ in folds],
                "assignment": hashlib.sha256(assignment.encode()).hexdigest(),
            }
        for (models, fold), (_, numbers) in zip(resolved, folds, strict=True):
            passes.append(Pass(models, fold, (label,), tuple(numbers)))
    return settings, passes


def split_folds(method: Method, items: Sequence[Item]) -> list[tuple[Method, Sequence[int]]]:
    """A method with the numbers of its items; with a directory of folds it is one method for each fold."""
    resource = method.resource
    if resource is None or resource.kind not in FOLD_FILES or not Path(resource.reference).is_dir():
        return [(method, range(len(items)))]
    files = fold_files(resource, [item.question for item in items])
    return [
        (dataclasses.replace(method, **{resource.setting: str(file)}), numbers)
        for file, numbers in files.items()
    ]


def share(passes: Sequence[Pass], num_items: int) -> list[Pass]:
    """Merges passes that have a forward stream in common; folds stay passes of their own."""
    whole = [each for each in passes if len(each.items) == num_items]
    shared = [
        Pass(models, joint, tuple(whole[i].labels[0] for i in members), whole[0].items)
        for models, joint, members in share_streams([(each.models, each.method) for each in whole])
    ]
    folds = [each for each in passes if len(each.items) != num_items]
    return shared + [dataclasses.replace(each, method=Joint((each.method,))) for each in folds]


def without_context(items: Iterable[Item]) -> list[str] | None:
    """The prompts of items without their contexts; None where they have none."""
    prompts = [item.without_context for item in items]
    return None if None in prompts else prompts


class Scores:
    """Token scores of every answer: of each item and method a list of [tokens] arrays."""

    generating = False

    def __init__(self, lm: LanguageModel, task: Task):
        self._config, self._items = lm.config, task.items
        pairs = [(item.prompt, answer) for item in task.items for answer in item.answers]
        prompts, answers = zip(*pairs, strict=True)
        encoded = encode(
            lm.tokenizer,
            prompts,
            answers,
            without_context=without_context(item for item in task.items for _ in item.answers),
            **{"add_special_tokens": True, "count": "prompt"} | dict(task.options),
        )
        self.facts = {
            "n_answers": len(encoded),
            "boundary_merged": sum(answer.boundary_merged for answer in encoded),
        }
        continuations = iter(encoded)
        self._groups = [[next(continuations) for _ in item.answers] for item in task.items]

    def plan(self, passes: Sequence[Pass]) -> list[Pass]:
        passes = share(passes, len(self._items))
        for each in passes:
            check_groups(each.models, each.method, self._groups, lambda i: f"question {self._items[i].index}")
        return passes

    def run(self, each: Pass, missing: Sequence[int]) -> Iterator[tuple[int, list[Any]]]:
        index = [self._items[i].index for i in missing]
        results = score(
            each.models,
            self._config,
            [self._groups[i] for i in missing],
            each.method,
            where=lambda i, j: f"question {index[i]}, answer {j}",
        )
        for i, scored in results:
            yield missing[i], [[answer[:, k] for answer in scored.scores] for k in range(len(each.labels))]


def first_line_with_text(text: str) -> str:
    """The text up to the end of the first line that is not empty."""
    stripped = text.lstrip()
    return text[: len(text) - len(stripped)] + stripped.split("\n")[0]


@dataclasses.dataclass(frozen=True)
class Text:
    """What a method continues a prompt with.

    Attributes:
        text, finished: see `Completion`.
        confidence: means over the text's tokens of the fields of `CONFIDENCE`; NaN of a text without tokens.
            None where it was not asked for.
    """

    text: str
    finished: bool
    confidence: Mapping[str, float] | None = None


class Texts:
    """What methods continue prompts with: of each item and method a `Text`."""

    generating = True
    facts: Mapping[str, Any] = {}

    def __init__(self, lm: LanguageModel, task: Task):
        self._lm, self._prompts = lm, [item.prompt for item in task.items]
        self._without_context = without_context(task.items)
        self._index = [item.index for item in task.items]
        defaults = {"max_new_tokens": GenerationOptions.max_new_tokens, "seed": 0, "batch_size": 8}
        self._options = {"format": "raw"} | defaults | task.options
        self._batch_size = self._options.pop("batch_size")
        self._measured = self._options.pop("confidence", None)

    def plan(self, passes: Sequence[Pass]) -> list[Pass]:
        for each in passes:
            streams.check_prompts(each.method, 1 if self._without_context is None else 2)
        lengths = [len(ids) for ids in self._lm.encode_prompts(self._prompts, self._options["format"])]
        longest, index = max(zip(lengths, self._index, strict=True))
        context, new = min(each.models.context_length for each in passes), self._options["max_new_tokens"]
        if longest + new > context:
            raise UserError(
                f"the longest prompt (question {index}) has {longest} tokens, with {new} new ones over the "
                f"model's context of {context}: lower --max-new-tokens, or give shorter prompts"
            )
        return list(passes)

    def run(self, each: Pass, missing: Sequence[int]) -> Iterator[tuple[int, list[Any]]]:
        # Cut from all items, those done too: what is drawn depends on a row's place in its batch.
        for number, first in enumerate(range(0, len(each.items), self._batch_size)):
            batch = each.items[first : first + self._batch_size]
            if set(batch) & set(missing):
                options = self._options | {"seed": (self._options["seed"] + number) % 2**31}
                prompts, others = [self._prompts[i] for i in batch], None
                if self._without_context is not None:
                    others = [self._without_context[i] for i in batch]
                completions = self._lm.complete(prompts, each.method, without_context=others, **options)
                measured = self._confidence(each, prompts, others, completions)
                for i, completion, confidence in zip(batch, completions, measured, strict=True):
                    if i in missing:
                        yield i, [Text(completion.text, completion.finished, confidence)]

    def _confidence(
        self,
        each: Pass,
        prompts: Sequence[str],
        without_context: Sequence[str] | None,
        completions: Sequence[Completion],
    ) -> list[Mapping[str, float] | None]:
        """How sure the method was of each of its texts, or of the first line that holds one."""
        if self._measured is None:
            return [None] * len(completions)
        ids = self._lm.encode_prompts(prompts, self._options["format"])
        tokens = [completion.tokens for completion in completions]
        if self._measured == "line":
            lines = (first_line_with_text(completion.text) for completion in completions)
            each_line = zip(ids, tokens, lines, strict=True)
            tokens = [tokens_of(self._lm.tokenizer, *arguments) for arguments in each_line]
        written = [i for i, row in enumerate(tokens) if row]
        others: list[tuple[tuple[int, ...], ...]] = [()] * len(ids)
        if without_context is not None:
            shorter = self._lm.encode_prompts(without_context, self._options["format"])
            others = [(tuple(row),) for row in shorter]
        groups = [
            [Continuation((*ids[i], *tokens[i]), len(ids[i]), other_prompts=others[i])] for i in written
        ]
        means = [dict.fromkeys(CONFIDENCE, math.nan) for _ in completions]
        for number, scored in score(each.models, self._lm.config, groups, each.method, confidence=True):
            values = scored.confidence[0].mean(axis=0, dtype=np.float64)
            means[written[number]] = dict(zip(CONFIDENCE, values.tolist(), strict=True))
        return means


class Distributions:
    """Whole next-token distributions: of each window and method what `divergence.measure` gives."""

    facts: Mapping[str, Any] = {}

    def __init__(self, lm: LanguageModel, task: Task):
        self._lm, self._length = lm, task.options["length"]
        self._windows: list[Continuation] = [item.data for item in task.items]
        self.generating = task.options["generating"]

    def plan(self, passes: Sequence[Pass]) -> list[Pass]:
        for each in passes:
            streams.check_prompts(each.method, 1)
        return share(passes, len(self._windows))

    def run(self, each: Pass, missing: Sequence[int]) -> Iterator[tuple[int, list[Any]]]:
        windows = {i: self._windows[i] for i in missing}
        yield from divergence.measure(self._lm, each.models, each.method, windows, self._length)


KINDS = {"scores": Scores, "texts": Texts, "distributions": Distributions}
