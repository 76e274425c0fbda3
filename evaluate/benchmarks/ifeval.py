"""IFEval: are instructions that can be checked followed? A method that breaks this harms.

Source: Zhou et al., "Instruction-Following Evaluation for Large Language Models", 2023 (arXiv 2311.07911),
https://github.com/google-research/google-research/tree/master/instruction_following_eval. Answers are
checked by the task `ifeval` of lm-evaluation-harness 0.4 itself, which needs `pip install
'imae_jax[ifeval]'`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from imae_jax import stats
from imae_jax.errors import UserError, first_line
from imae_jax.evaluate.benchmarks.benchmark import Item
from imae_jax.evaluate.benchmarks.written import CUT_OFF, Written, WrittenBenchmark
from imae_jax.evaluate.reporting.tables import Estimate, Table

INSTALL = "pip install 'imae_jax[ifeval]'"
KINDS_OF_CHECK = ("strict", "loose")


def load_checker() -> Any:
    """The harness's module that checks answers.

    Raises:
        UserError: it, or what it needs, is not installed.
    """
    try:
        import langdetect
        import nltk
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise UserError(f"IFEval's checker cannot be loaded ({first_line(error)}): {INSTALL}") from error
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise UserError(
            "IFEval's checker needs nltk's punkt_tab: python -m nltk.downloader punkt_tab"
        ) from error
    langdetect.DetectorFactory.seed = 0  # It draws; equal texts are to get equal results.
    return utils


class IFEval(WrittenBenchmark):
    name = "ifeval"
    title = "IFEval"
    description = "IFEval: whether instructions that can be checked are followed"
    note = (
        "Share of prompts all of whose instructions are followed, and of instructions; *loose* also accepts "
        "an answer without its first or last line, or without asterisks."
    )
    heads: ClassVar = {"prompt_strict": "prompts, strict", "prompt_loose": "prompts, loose", **CUT_OFF}
    protocols = (
        Written(
            name="ifeval-v1/chat",
            format="chat",
            max_new_tokens=1280,
            sha256="67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
            rows=541,
            source="https://github.com/josejg/instruction_following_eval (ifeval.jsonl)",
        ),
    )
    columns: ClassVar = {"key": int, "prompt": str, "instruction_id_list": list}
    rules: ClassVar = {"followed": "as lm-evaluation-harness's ifeval checks it"}

    def load(self, args, methods):
        load_checker()
        return super().load(args, methods)

    def items(self, protocol, rows, args):
        known = load_checker().instructions_registry.INSTRUCTION_DICT
        for place, row in rows:
            kwargs, names = row.get("kwargs"), row["instruction_id_list"]
            are_settings = isinstance(kwargs, list) and all(isinstance(each, dict) for each in kwargs)
            if not are_settings or len(kwargs) != len(names):
                raise UserError(f"{place}: 'kwargs' must be a list with an object for every instruction")
            for name in set(names) - known.keys():
                raise UserError(f"{place}: instruction {name!r} is unknown to the checker: remove the row")
        return [Item(i, row["prompt"], row["prompt"], data=row) for i, (_, row) in enumerate(rows)]

    def measure(self, item, answer):
        checked = load_checker().process_results(item.data, [answer])
        return {f"prompt_{kind}": float(checked[f"prompt_level_{kind}_acc"]) for kind in KINDS_OF_CHECK} | {
            kind: list(map(bool, checked[f"inst_level_{kind}_acc"])) for kind in KINDS_OF_CHECK
        }

    def aggregate(self, args, task, records, baseline):
        """Also the share of instructions that are followed."""
        results = super().aggregate(args, task, records, baseline)
        for label, rows in records.items():
            results["methods"][label]["instructions"] = {
                kind: share_of_instructions(rows, kind, args.seed) for kind in KINDS_OF_CHECK
            }
        return results

    def tables(self, results):
        rows = [
            (label, *(Estimate(each["value"], each["interval"]) for each in row["instructions"].values()))
            for label, row in results["methods"].items()
        ]
        heads = [f"instructions, {kind}" for kind in KINDS_OF_CHECK]
        first, *others = super().tables(results)
        return [first, Table("By instruction, [95 % interval]", ("method", *heads), tuple(rows)), *others]


def share_of_instructions(rows: list[Mapping[str, Any]], kind: str, seed: int) -> dict[str, Any]:
    """The share of instructions that are followed, in per cent; its interval is over prompts."""
    followed, counts = ([count(row[kind]) for row in rows] for count in (sum, len))
    return stats.ratio(followed, counts, seed=seed).scaled(100)


BENCHMARK = IFEval()
