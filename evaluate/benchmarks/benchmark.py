"""What a benchmark is: its items, what it makes of an item's scores or texts, what it shows of them.

A new one is a file in this folder: a subclass of `Benchmark` with `task` and `record`, and an instance of
it called `BENCHMARK`. It then is a command, `python -m imae_jax.evaluate NAME`, that can be resumed after a
kill, and its runs can be compared and reported.
"""

import abc
import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from imae_jax import stats
from imae_jax.evaluate.reporting import abstention, aggregate, controls, plots
from imae_jax.evaluate.reporting.document import FinishedRun, Picture, Section, warning
from imae_jax.evaluate.reporting.tables import Table

if TYPE_CHECKING:
    from imae_jax.decode import Method
    from imae_jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Item:
    """One question or text of a benchmark, of which every method has one record.

    Attributes:
        index: number of the item in the data.
        question: text of the item, by which splits, folds and comparisons know it.
        prompt: text in front of answers, or to be continued.
        answers: texts to be scored.
        data: anything else that `Benchmark.record` needs.
        without_context: the prompt without its context, for methods that compare the two; None where prompts
            have none.
    """

    index: int
    question: str
    prompt: str = ""
    answers: tuple[str, ...] = ()
    data: Any = None
    without_context: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark with its data, for one model.

    Attributes:
        protocol: name and version of all that a score depends on besides model and method.
        items: all items of the data; the runner takes the split and the limit.
        settings: everything else that the records depend on; written into `run.json`, and equal in a resumed
            run.
        details: further fields of `results.json`.
        metrics: names of fields of the records, to be averaged; the first is McNemar's.
        excluded: questions to leave out.
        options: settings of the kind of output. Scores: those of `encode`. Texts: those of
            `LanguageModel.generate`, and `batch_size`, all with defaults. Distributions: `length` and
            `generating`.
    """

    protocol: str
    items: Sequence[Item]
    settings: Mapping[str, Any]
    metrics: tuple[str, ...]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    excluded: frozenset[str] = frozenset()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Benchmark(abc.ABC):
    """A benchmark.

    Attributes:
        name: name in `results.json`.
        title: name in tables and reports.
        description: purpose of the command, one sentence.
        note: remarks for readers of the figures.
        output: kind of output that records are made of, see `runner.passes`: `scores` of answers, `texts`
            that methods write, or `distributions` over the tokens of a text.
        heads: names of the metrics in tables. Methods are compared by those that a run has.
        questions: whether the items are questions, which can be split and limited.
        subsets: titles of subsets of the items that are compared by themselves.
        correct: metric that says which answers are right, where records also have the fields of
            `continuation.CONFIDENCE`: how well a method knows what it does not know is shown as well.
    """

    name: str
    title: str
    description: str
    note: str = ""
    output: Literal["scores", "texts", "distributions"] = "scores"
    heads: ClassVar[Mapping[str, str]] = {}
    questions: bool = True
    subsets: ClassVar[Mapping[str, str]] = {"all": "questions"}
    correct: tuple[str, ...] = ()

    # What a run does

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027 - not every one has any
        """Adds the arguments of this benchmark alone."""

    def load(self, args: argparse.Namespace, methods: Mapping[str, "Method"]) -> Any:
        """Checks arguments and reads the data, before the model is loaded; `task` gets what it returns."""
        return None

    @abc.abstractmethod
    def task(self, args: argparse.Namespace, data: Any, lm: "LanguageModel") -> Task:
        """The items and all that identifies them."""

    @abc.abstractmethod
    def record(self, item: Item, output: Any, tokenizer: Any) -> dict[str, Any]:
        """The fields of an item's record.

        Args:
            item: the item.
            output: token scores, a [tokens] array for each answer; a `passes.Text`; or [4, tokens].
            tokenizer: the model's.
        """

    def in_subset(self, subset: str, record: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
        """Whether an item of a run with these results belongs to a subset."""
        return True

    def chance(self, item: Item) -> dict[str, float]:
        """What a draw among an item's answers scores on average, in 0..1, of the metrics that have this."""
        return {}

    def aggregate(
        self, args: argparse.Namespace, task: Task, records: Mapping[str, Any], baseline: str
    ) -> dict[str, Any]:
        """What records come to: fields of `results.json`, of which `methods` has a summary by label.

        Args:
            args: arguments of the command.
            task: task with the items of the run alone.
            records: records of every method, by label, in the order of the items.
            baseline: label of the method that others are compared to.
        """
        summaries = aggregate.summarize(records, task.metrics, baseline=baseline, seed=args.seed)
        correct = next((metric for metric in self.correct if metric in task.metrics), None)
        if correct is not None:
            for label, rows in records.items():
                summaries[label]["abstention"] = abstention.summarize(rows, correct)
        return {**self.counts(args, task, baseline), "methods": summaries}

    def counts(self, args: argparse.Namespace, task: Task, baseline: str) -> dict[str, Any]:
        """What was averaged over what, and how intervals were made."""
        return {
            "metrics": list(task.metrics),
            "n_questions": len(task.items),
            "chance": aggregate.mean_chance(task.metrics, [*map(self.chance, task.items)]),
            "baseline": baseline,
            "statistics": stats.describe(args.seed),
        }

    # What is shown of results

    def shown_heads(self, results: Mapping[str, Any]) -> dict[str, str]:
        return {metric: self.heads[metric] for metric in results["metrics"]}

    def heading(self, results: Mapping[str, Any]) -> str:
        """What was run on what, one line."""
        split, drawn = results["split"], ""
        if split["name"] != "all":
            drawn = f" ({split['name']} split, seed {split['seed']})"
        count = f"{results['n_questions']} questions{drawn}"
        return f"{self.title}, {results['protocol']}, {count}, {results['model']}"

    def tables(self, results: Mapping[str, Any]) -> list[Table]:
        """The tables of a `results.json`: scores and differences."""
        methods, heads = results["methods"], self.shown_heads(results)
        title = f"{self.heading(results)}, [95 % interval]"
        scores = aggregate.scores_table(title, methods, heads, results.get("chance"))
        against = f"Against {results['baseline']}, on the same questions"
        differences = aggregate.differences_tables(against, methods, heads)
        knows = [abstention.table(methods)] if "abstention" in next(iter(methods.values())) else []
        return [scores, *differences, *knows]

    def plots(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The plots of a `results.json`, by name."""
        methods, heads, title = results["methods"], self.shown_heads(results), self.heading(results)
        return plots.of_methods(title, methods, heads, results["baseline"])

    def control_tables(self, results: Mapping[str, Any]) -> list[Table]:
        """What the directions of methods bring, of a `results.json` with controls."""
        return [controls.table(results, self.shown_heads(results))] if results.get("controls") else []

    def control_sentences(self, results: Mapping[str, Any]) -> list[str]:
        """What the directions of methods bring, in words."""
        return controls.sentences(results, self.shown_heads(results)) if results.get("controls") else []

    def control_plots(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Scores over strength, of a `results.json` with controls."""
        if not results.get("controls"):
            return {}
        return controls.dial(results, self.shown_heads(results), self.heading(results))

    def control_blocks(self, run: FinishedRun) -> tuple[Table | str, ...]:
        """Tables and sentences on controls in a report."""
        if not run.results.get("controls"):
            return ()
        lines = (f"- {line}" for line in self.control_sentences(run.results))
        return (*self.control_tables(run.results), controls.NOTE, "\n".join(lines))

    def texts(self, results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """More files of a finished run, by name."""
        return {}

    def warnings(self, results: Mapping[str, Any]) -> list[str]:
        """What takes something from the figures' worth."""
        return aggregate.note_undefined(results["methods"])

    def report(self, runs: Sequence[FinishedRun], others: Sequence[FinishedRun]) -> list[Section]:
        """The part of a report on runs of this benchmark.

        Args:
            runs: runs of this benchmark.
            others: all evaluations of the report.
        """
        sections = [Section(self.title, (self.note,))]
        return [*sections, *(Section(run.label(), self.blocks(run), level=3) for run in runs)]

    def blocks(self, run: FinishedRun) -> tuple[Table | Picture | str, ...]:
        """Tables, warnings and plots of a run in a report."""
        notes = (warning(f"Run {run.number}: {note}.") for note in self.warnings(run.results))
        tables = self.tables(run.results)
        knows = [abstention.NOTE] if any(table.title == abstention.TITLE for table in tables) else []
        return (*tables, *knows, *self.control_blocks(run), *notes, *run.pictures())
