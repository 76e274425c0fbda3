"""StrategyQA: questions whose answer, yes or no, takes several steps.

Source: Geva et al., "Did Aristotle Use a Laptop?", TACL 2021 (arXiv 2101.02235),
https://github.com/eladsegal/strategyqa. The form of a demonstration, the stop string and how an answer is
read are those of chain-of-thought prompting (Wei et al. 2022, arXiv 2201.11903) as in strqa_eval.py of DoLa
(https://github.com/voidism/DoLa); the demonstrations themselves are the last six of the file, with its
facts as the chain of thought. What names neither yes nor no behind “answer is” is wrong, where DoLa's
script guesses.
"""

import re
from typing import ClassVar

from imae_jax.evaluate.benchmarks.benchmark import Item
from imae_jax.evaluate.benchmarks.written import CUT_OFF, Written, WrittenBenchmark
from imae_jax.prompts import question_text

FILE = {
    "sha256": "0d94842ffb022db8fd5ecd2168b785d5cf67f6faf64f665476bad544a3eb9dde",
    "rows": 229,
    "source": "https://github.com/eladsegal/strategyqa (dev.json)",
}
ANSWER = re.compile(r"answer is:?\s+\W*(yes|no)\b", re.IGNORECASE)
CHAT = "Yes or no: {question}\nReason step by step, and end with “So the answer is” and yes or no."


def extract(text: str) -> bool | None:
    """The first yes or no that a text gives as its answer; None where there is none."""
    found = ANSWER.search(text)
    return found and found[1].lower() == "yes"


def demonstration(row: dict) -> str:
    facts = " ".join(fact.strip().rstrip(".") + "." for fact in row["facts"])
    answer = "yes" if row["answer"] else "no"
    return f"{question_text(row['question'])} {facts} So the answer is {answer}.\n\n"


class StrategyQA(WrittenBenchmark):
    name = "strategyqa"
    title = "StrategyQA"
    description = "StrategyQA: yes or no, by a chain of thought"
    note = "An answer that says neither yes nor no is wrong; chance is what guessing would score."
    correct = ("right",)
    heads: ClassVar = {"right": "right", "answered": "answered", **CUT_OFF}
    protocols = (
        Written(name="strategyqa-v1/six-shot", shots=6, stop=("Q:", "\n\n##"), **FILE),
        Written(name="strategyqa-v1/chat", format="chat", **FILE),
    )
    columns: ClassVar = {"question": str, "answer": bool, "facts": list}
    rules: ClassVar = {
        "right": "the first yes or no behind “answer is” is the right one",
        "answered": "there is a yes or no behind “answer is”",
    }

    def chance(self, item):
        return {"right": 0.5}

    def items(self, protocol, rows, args):
        (rows, last), items = self.parted(protocol, rows), []
        shots = "".join(map(demonstration, (row for _, row in last)))
        for i, (_, row) in enumerate(rows):
            prompt = shots + question_text(row["question"])
            if protocol.format == "chat":
                prompt = CHAT.format(question=row["question"])
            items.append(Item(i, row["question"], prompt, data=row["answer"]))
        return items

    def measure(self, item, answer):
        found = extract(answer)
        right, answered = float(found is item.data), float(found is not None)
        return {"found": found, "expected": item.data, "right": right, "answered": answered}


BENCHMARK = StrategyQA()
