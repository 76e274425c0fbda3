"""FACTOR: is a factual completion of a text preferred to three that contradict the facts?

Source: Muhlgay et al., "Generating Benchmarks for Factuality Evaluation of Language Models", EACL 2024
(arXiv 2307.06908), https://github.com/AI21Labs/factor. Two ways to score are published under one name:

- `mean`, as its own eval_factuality.py: the column `turncated_prefixes`; a space that ends the prefix is
  moved to the completion, without which nothing stands between the two; spaces in front of completions are
  removed; no special tokens; scored are as many last tokens as the completion has alone, by their mean.
- `sum`, as factor_eval.py of DoLa (https://github.com/voidism/DoLa) and of SLED: news with `full_prefix`,
  expert with `turncated_prefixes`; a space before the completion, whatever the prefix ends with; special
  tokens as the tokenizer adds them; scored are the tokens after the prefix's own number, by their sum.

Where eval_factuality.py would cut a prefix that is too long, the run is refused here.
"""

import dataclasses
from typing import ClassVar

from imae_jax.evaluate.benchmarks.benchmark import Item
from imae_jax.evaluate.benchmarks.multiple_choice import ChoiceBenchmark
from imae_jax.evaluate.benchmarks.published import Published

SOURCE = "https://github.com/AI21Labs/factor"
COMPLETIONS = ("completion", "contradiction_0", "contradiction_1", "contradiction_2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol(Published):
    """`prefix` is the column of the prefix; `form` is `mean` or `sum`."""

    prefix: str
    source: str = SOURCE


FULL, CUT = "full_prefix", "turncated_prefixes"
NEWS = {"sha256": "f4f3110a66bfca3a1decb88f14ce55b4e9656be80894bcd94216cc2c61be8260", "rows": 1036}
EXPERT = {"sha256": "39cbceba9b43e713069a155e2028f6a2335b792983110b935a71ddb065766bde", "rows": 236}


def join(prefix: str, completions: tuple[str, ...], form: str) -> tuple[str, tuple[str, ...]]:
    """A prefix and its completions as a prompt and what continues it."""
    if form == "sum":
        return prefix, tuple(f" {completion}" for completion in completions)
    stripped = (completion.lstrip(" ") for completion in completions)
    if not prefix.endswith(" "):
        return prefix, tuple(stripped)
    return prefix[:-1], tuple(f" {completion}" for completion in stripped)


class Factor(ChoiceBenchmark):
    name = "factor"
    title = "FACTOR"
    description = "FACTOR: whether a factual completion of a text is preferred to false ones"
    note = "Share of texts whose factual completion scores above three false ones, a few words apart from it."
    protocols = (
        Protocol(name="factor-v1/news-mean", form="mean", prefix=CUT, **NEWS),
        Protocol(name="factor-v1/news-sum", form="sum", prefix=FULL, **NEWS),
        Protocol(name="factor-v1/expert-mean", form="mean", prefix=CUT, **EXPERT),
        Protocol(name="factor-v1/expert-sum", form="sum", prefix=CUT, **EXPERT),
    )
    rules: ClassVar = {"chosen": "the completion with the highest score; of equal ones the factual one"}

    def fields(self, protocol):
        return dict.fromkeys((protocol.prefix, *COMPLETIONS), str)

    def items(self, protocol, rows, args):
        items = []
        for i, (_, row) in enumerate(rows):
            prefix, completions = row[protocol.prefix], tuple(row[name] for name in COMPLETIONS)
            prompt, answers = join(prefix, completions, protocol.form)
            items.append(Item(i, prefix + completions[0], prompt, answers, data=(0, "", protocol.form)))
        return items

    def metrics(self, protocol):
        return (protocol.form,)

    def options(self, protocol, args):
        if protocol.form == "sum":
            return {}
        return {"add_special_tokens": False, "count": "continuation"}


BENCHMARK = Factor()
