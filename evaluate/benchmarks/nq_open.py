"""Natural Questions without a passage: what a method answers from memory.

Sources: Kwiatkowski et al., "Natural Questions", TACL 2019; Lee et al., ACL 2019, who made its open form.
Prompt, stop strings and exact match are those of the task `nq_open` of lm-evaluation-harness 0.4, whose
demonstrations come from the training questions; here they are the last five of the file.
"""

from typing import ClassVar

from imae_jax.evaluate.benchmarks.answer_metrics import is_refusal
from imae_jax.evaluate.benchmarks.benchmark import Item
from imae_jax.evaluate.benchmarks.short_answers import exact_match, f1
from imae_jax.evaluate.benchmarks.written import CUT_OFF, Written, WrittenBenchmark

INSTRUCTION = "Answer these questions:\n\n"
FILE = {
    "sha256": "f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616",
    "rows": 3610,
    "source": "https://github.com/google-research-datasets/natural-questions (NQ-open.dev.jsonl)",
    "stop": ("\n", ".", ","),
}
RULES = {
    "exact_match": "but for case, punctuation and articles, as the harness's nq_open",
    "f1": "of words, SQuAD's, with the accepted answer that is most like it",
    "refused": "the answer begins as one that says nothing does",
}


def ask(question: str) -> str:
    return f"Q: {question}?\nA:"


class NQOpen(WrittenBenchmark):
    name = "nq_open"
    title = "Natural Questions, closed book"
    description = "Natural Questions without a passage: exact match, F1, refusals"
    note = "Read *exact match* beside *refused*: a method that answers nothing says nothing wrong."
    correct = ("exact_match",)
    heads: ClassVar = {"exact_match": "exact match", "f1": "F1", "refused": "refused", **CUT_OFF}
    protocols = (
        Written(name="nq-open-v1/five-shot", shots=5, **FILE),
        Written(name="nq-open-v1/zero-shot", **FILE),
    )
    columns: ClassVar = {"question": str, "answer": list}
    rules: ClassVar = RULES

    def items(self, protocol, rows, args):
        rows, last = self.parted(protocol, rows)
        shots = "".join(f"{ask(row['question'])} {row['answer'][0]}\n" for _, row in last)
        return [
            Item(i, row["question"], f"{INSTRUCTION}{shots}{ask(row['question'])}", data=row["answer"])
            for i, (_, row) in enumerate(rows)
        ]

    def measure(self, item, answer):
        answer = answer.strip()
        return {
            "exact_match": exact_match(answer, item.data),
            "f1": f1(answer, item.data),
            "refused": float(is_refusal(answer)),
        }


BENCHMARK = NQOpen()
