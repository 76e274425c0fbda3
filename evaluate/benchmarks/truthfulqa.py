"""TruthfulQA multiple choice: MC1, MC2, MC3 and the binary choice.

Source: Lin, Hilton, Evans, "TruthfulQA: Measuring How Models Mimic Human Falsehoods", ACL 2022; MC3 as
in the code of DoLa (Chuang et al., arXiv 2309.03883); the binary choice of the update of January 2025
(https://github.com/sylinrl/TruthfulQA), here by the answers' scores.
"""

import argparse
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from imae_jax.convert.identity import without_places
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Task
from imae_jax.evaluate.benchmarks.protocols import (
    PROTOCOLS,
    Primer,
    Protocol,
    get_protocol,
    label,
    load_primer,
)
from imae_jax.evaluate.benchmarks.questions import Data, Question, load_data
from imae_jax.evaluate.reporting import aggregate, paper
from imae_jax.evaluate.reporting.document import Section, warning
from imae_jax.evaluate.reporting.tables import DASH, Table, figure, stack
from imae_jax.evaluate.runner.identity import same_model
from imae_jax.prompts import resolve_format

logger = logging.getLogger(__name__)

NOTE_INTERVALS = (
    "In square brackets: 95 % percentile bootstrap intervals over questions. They are about the choice of "
    "questions, not about training seeds. McNemar's test is of MC1 (or of the binary choice), exact and "
    "two-sided; p-values are not corrected for the number of methods."
)
NOTE_SUMS = (
    "The column *sums* says what was added up over an answer's tokens: `log p`, or differences of "
    "log-probabilities that are `raw` or `renormalized`. Raw sums are likelihood ratios, not "
    "log-probabilities of any one distribution: compare figures of the same kind."
)
NOTE_HARM = (
    "KL(base ‖ method), nats a token, and the share of tokens where the most likely one is base's, are of "
    "neutral text ({}): a gain bought with a broken model shows there."
)


def mc_metrics(
    true: Sequence[float], false: Sequence[float], best: int, *, ties_win: bool = False
) -> dict[str, float]:
    """MC1, MC2 and MC3 of one question, each in 0..1; NaN where a score is NaN or infinite.

    Args:
        true, false: summed scores of the answers.
        best: index of the best answer in `true`.
        ties_win: whether MC1 counts a tie of the best answer with a false one.
    """
    if not all(map(math.isfinite, (*true, *false))):
        return dict.fromkeys(("mc1", "mc2", "mc3"), math.nan)
    top_false, top = max(false), max(*true, *false)
    mass_true = sum(math.exp(score - top) for score in true)
    mass_false = sum(math.exp(score - top) for score in false)
    return {
        "mc1": float(true[best] > top_false or (ties_win and true[best] == top_false)),
        "mc2": mass_true / (mass_true + mass_false),
        "mc3": sum(score > top_false for score in true) / len(true),
    }


def metrics_of(protocol: Protocol, question: Question, sums: Sequence[float]) -> dict[str, float]:
    """A protocol's metrics of a question, from the sums of `Question.answers`; NaN if one is not finite."""
    # Also where the score that is not finite is of an answer that one of the metrics does not count.
    if not all(map(math.isfinite, sums)):
        return dict.fromkeys(protocol.metrics, math.nan)
    true, false = list(sums[: len(question.true)]), list(sums[len(question.true) :])
    ties = {"ties_win": protocol.ties_win}
    metrics = mc_metrics(true, false, question.best, **ties)
    if question.mc1_false is not None:
        compared = [false[i] for i in question.mc1_false]
        metrics["mc1"] = mc_metrics(true, compared, question.best, **ties)["mc1"]
    counted = true[: question.mc2_true], false[: question.mc2_false]
    metrics["mc2"] = mc_metrics(*counted, 0)["mc2"]
    metrics["binary"] = metrics["mc1"]
    return {name: metrics[name] for name in protocol.metrics}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A protocol with its data.

    Attributes:
        protocol, data, primer: the questions, and how they are asked.
        settings: identity of data and primer, for `run.json` and `results.json`.
    """

    protocol: Protocol
    data: Data
    primer: Primer
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        return label(self.protocol, self.primer, self.data)


def add_data_arguments(parser: argparse.ArgumentParser, protocols: Sequence[str] = tuple(PROTOCOLS)) -> None:
    """Adds which questions are asked, and how; `read_inputs` reads them."""
    parser.add_argument(
        "--data",
        default="demo",
        help="TruthfulQA.csv, hub, or demo for the shipped questions (default)",
    )
    parser.add_argument("--protocol", default="tqa-v1/qa-primer", help=f"one of {', '.join(protocols)}")
    parser.add_argument("--primer", help="file with the six-shot primer (default: from lm-eval)")
    parser.add_argument("--any-data", action="store_true", help="accept data that are not the protocol's")


def read_inputs(args: argparse.Namespace, protocol: Protocol) -> Inputs:
    """The data and the primer that arguments name.

    Raises:
        UserError: the data are not the protocol's, and --any-data is off.
    """
    data = load_data(args.data, protocol.form)
    primer = load_primer(args.primer, demo=args.data == "demo", instruction=protocol.instruction)
    objection = protocol.objection(data)
    if objection is not None:
        if not args.any_data:
            raise UserError(f"{objection}: pass --any-data to use them, and the results say so")
        logger.warning("%s; the results say so", objection)
    if primer.name == "custom":
        logger.warning("the primer is not the one that %s pins; the results say so", protocol.name)
    settings = {
        "data": {"path": args.data, "kind": data.kind, "sha256": data.sha256},
        "primer": {"name": primer.name, "source": primer.source, "sha256": primer.sha256},
    }
    return Inputs(protocol, data, primer, settings)


class TruthfulQA(Benchmark):
    name = "truthfulqa"
    title = "TruthfulQA"
    description = "TruthfulQA multiple choice: MC1, MC2, MC3"
    note = f"{NOTE_INTERVALS}\n\n{NOTE_SUMS}"
    heads: ClassVar = {"mc1": "MC1", "mc2": "MC2", "mc3": "MC3", "binary": "binary"}

    def add_arguments(self, parser):
        add_data_arguments(parser)

    def load(self, args, methods):
        return read_inputs(args, get_protocol(args.protocol))

    def task(self, args, inputs, lm):
        protocol, tokenizer = inputs.protocol, lm.tokenizer
        resolve_format(tokenizer, protocol.format)
        items = [
            Item(
                question.index,
                question.text,
                protocol.prompt(tokenizer, inputs.primer.text, question.text),
                tuple(protocol.continuation(tokenizer, answer) for answer in question.answers),
                (protocol, question),
            )
            for question in inputs.data.questions
        ]
        return Task(
            inputs.label,
            items,
            inputs.settings,
            protocol.metrics,
            details={"protocol_details": protocol.describe()},
            options={"add_special_tokens": protocol.add_special_tokens},
        )

    def chance(self, item):
        """MC1 and MC3 of an order drawn at random, MC2 of equal scores."""
        protocol, question = item.data
        true, false = len(question.true), len(question.false)
        compared = false if question.mc1_false is None else len(question.mc1_false)
        counted = true if question.mc2_true is None else question.mc2_true
        first = 1 / (1 + compared)
        share = counted / (counted + (false if question.mc2_false is None else question.mc2_false))
        levels = {"mc1": first, "mc2": share, "mc3": 1 / (1 + false), "binary": first}
        return {name: levels[name] for name in protocol.metrics}

    def record(self, item, output, tokenizer):
        protocol, question = item.data
        sums = [float(np.sum(scores, dtype=np.float64)) for scores in output]
        return {
            "category": question.category,
            "true": sums[: len(question.true)],
            "false": sums[len(question.true) :],
            "best": question.best,
            **metrics_of(protocol, question, sums),
        }

    def report(self, runs, others):
        """A section for each protocol and set of questions; the paper's scores last."""
        together: dict[str, list[Any]] = {}
        for run in runs:
            together.setdefault(_questions(run.results), []).append(run)
        sections = [Section(title, self._scores(group, others), 3) for title, group in together.items()]
        pictures = [picture for run in runs for picture in run.pictures()]
        if pictures:
            sections.append(Section("Plots of TruthfulQA", pictures, level=3))
        return [Section(self.title, (self.note,)), *sections, paper.truthfulqa_section(self.heads)]

    def _scores(self, runs, others):
        """Tables of runs with one protocol on the same questions."""
        heads, scores, compared, sources = self.shown_heads(runs[0].results), {}, {}, {}
        harm = {run.number: harm_of(run, others) for run in runs}
        for run in runs:
            methods = run.results["methods"]
            table = aggregate.scores_table("", methods, heads, run.results.get("chance"))
            if any(harm.values()):
                table = with_harm(table, harm[run.number])
            scores[run.label()] = table
            for differences in aggregate.differences_tables("", methods, heads):
                compared[f"{run.label()}, less {run.results['baseline']}"] = differences
            sources |= dict.fromkeys(source for _, source in harm[run.number].values())
        title = f"Scores × 100 [95 % interval]{', and harm on neutral text' if sources else ''}"
        blocks = [stack(title, scores)]
        if sources:
            blocks.append(NOTE_HARM.format(", ".join(sources)))
        if compared:
            blocks.append(stack("Differences on the same questions [95 % interval]", compared))
        blocks += [block for run in runs for block in self.control_blocks(run)]
        notes = (f"Run {run.number}: {note}." for run in runs for note in self.warnings(run.results))
        return [*blocks, *map(warning, notes)]


def with_harm(table: Table, harm: Mapping[str, tuple[Mapping[str, Any], str]]) -> Table:
    """A table of scores with what methods do to neutral text."""
    rows = []
    for row in table.rows:
        measured = harm[row[0]][0] if row[0] in harm else None
        agreement = DASH if measured is None else f"{100 * measured['top1_agreement']:.1f} %"
        rows.append((*row, DASH if measured is None else figure(measured["kl"]), agreement))
    return Table(table.title, (*table.columns, "KL(base ‖ method)", "same top 1"), tuple(rows))


def harm_of(run: Any, others: Sequence[Any]) -> dict[str, tuple[Mapping[str, Any], str]]:
    """The harm of a run's methods and its source: the first run of harm with their model and settings."""
    harm: dict[str, tuple[Mapping[str, Any], str]] = {}
    for other in others:
        if other.results["benchmark"] != "harm" or not same_model(run.results, other.results):
            continue
        for name, row in run.results["methods"].items():
            for measured in other.results["methods"].values():
                if without_places(measured["settings"]) == without_places(row["settings"]):
                    harm.setdefault(name, (measured, f"run {other.number}"))
    return harm


def _questions(results: Mapping[str, Any]) -> str:
    """Protocol and questions in words; equal for runs whose scores are of the same ones alone."""
    data, split, limit = results["data"], results["split"], results["limit"]
    drawn = ""
    if split["name"] != "all":
        drawn = f", {split['name']} split (seed {split['seed']}, dev share {split['dev_share']:g})"
    cut = "" if limit is None else f", the first {limit} alone"
    return (
        f"{results['protocol']}: {results['n_questions']} questions of {Path(data['path']).name} "
        f"(SHA-256 {data['sha256'][:8]}){drawn}{cut}"
    )


BENCHMARK = TruthfulQA()
