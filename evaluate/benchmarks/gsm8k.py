"""GSM8K: problems in arithmetic, with the reasoning written out; what a method does to a chain of thought.

Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021 (arXiv 2110.14168),
https://github.com/openai/grade-school-math. Prompt, stop strings and both ways to read an answer are those
of the task `gsm8k` of lm-evaluation-harness 0.4, whose demonstrations come from the training problems; here
they are the last five of the file.
"""

import re
from typing import ClassVar

from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.benchmark import Item
from imae_jax.evaluate.benchmarks.written import CUT_OFF, Written, WrittenBenchmark

FILE = {
    "sha256": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    "rows": 1319,
    "source": "https://github.com/openai/grade-school-math (test.jsonl)",
}
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
IGNORED = str.maketrans("", "", ",$")
CHAT = "{question}\nReason step by step, and write the answer alone behind #### at the end."


def extract(text: str) -> dict[str, str]:
    """The number that a text gives as its answer, "" where there is none.

    Returns:
        `strict`: the first number behind `####`; `flexible`: the last number.
    """
    strict, flexible = STRICT.findall(text), FLEXIBLE.findall(text)
    found = {"strict": strict[0] if strict else "", "flexible": flexible[-1] if flexible else ""}
    return {name: number.translate(IGNORED).removesuffix(".") for name, number in found.items()}


def ask(question: str) -> str:
    return f"Question: {question}\nAnswer:"


class GSM8K(WrittenBenchmark):
    name = "gsm8k"
    title = "GSM8K"
    description = "GSM8K: problems in arithmetic, by a chain of thought"
    note = "*strict*: the number behind `####` is the answer; *flexible*: the last number of the text is."
    correct = ("flexible",)
    heads: ClassVar = {"strict": "strict", "flexible": "flexible", **CUT_OFF}
    protocols = (
        Written(name="gsm8k-v1/five-shot", shots=5, stop=("Question:", "</s>", "<|im_end|>"), **FILE),
        Written(name="gsm8k-v1/chat", format="chat", **FILE),
    )
    columns: ClassVar = {"question": str, "answer": str}
    rules: ClassVar = {
        "strict": "the first number behind ####, without commas and dollar signs, is the answer's",
        "flexible": "the last number is",
    }

    def items(self, protocol, rows, args):
        for place, row in rows:
            if not extract(row["answer"])["strict"]:
                raise UserError(f"{place}: the answer has no number behind ####: give the data file")
        (rows, last), items = self.parted(protocol, rows), []
        shots = "".join(f"{ask(row['question'])} {row['answer']}\n\n" for _, row in last)
        for i, (_, row) in enumerate(rows):
            prompt = shots + ask(row["question"])
            if protocol.format == "chat":
                prompt = CHAT.format(question=row["question"])
            items.append(Item(i, row["question"], prompt, data=extract(row["answer"])["strict"]))
        return items

    def measure(self, item, answer):
        found = extract(answer)
        right = {name: float(number == item.data) for name, number in found.items()}
        return {"found": found, "expected": item.data, **right}


BENCHMARK = GSM8K()
