"""A question's true answer against one false answer: TriviaQA, Natural Questions and ConflictNQ.

Sources: Li et al., "Inference-Time Intervention", NeurIPS 2023 (arXiv 2306.03341), who had a model write a
plausible false answer to every question of TriviaQA and NQ; the files are those of TruthX (Zhang et al.,
ACL 2024, arXiv 2402.17811, https://github.com/ictnlp/TruthX). No script is published that scores them: here
the first of the accepted answers is the true one, and prompts have no demonstrations. ConflictNQ
(https://github.com/4-en/ConflictNQ) has true and fake short answers to questions of NQ.

Many false answers of TriviaQA are among the accepted ones. Rows where the two are equal by SQuAD's
normalization are left out, unless the protocol's name ends in `-published`.
"""

from typing import ClassVar

from imae_jax.evaluate.benchmarks.benchmark import Item
from imae_jax.evaluate.benchmarks.multiple_choice import ChoiceBenchmark
from imae_jax.evaluate.benchmarks.published import Published, check_row
from imae_jax.evaluate.benchmarks.short_answers import normalized
from imae_jax.prompts import question_text

TRUTHX = "https://github.com/ictnlp/TruthX (data)"
CONFLICT = "https://github.com/4-en/ConflictNQ (conflict_nq_test.jsonl)"
TRIVIA = {
    "sha256": "eecbe2b0b927daaca48af8abfdd58053166b1ef64a0c528413d7c910bbdb0af7",
    "rows": 3610,
    "source": TRUTHX,
}
NQ = {
    "sha256": "698241c93dbf7a7f6f7eb723fa81f33edee5ecaf5547ae403ff627e494da0ab1",
    "rows": 3610,
    "source": TRUTHX,
}
CONFLICT_NQ = {
    "sha256": "69a7653fb873a41ba24720e0f0f83eac94f1a6c7b53bdad599c81b285095dd90",
    "rows": 226,
    "source": CONFLICT,
}
# Question, true answers and false answer of a row.
COLUMNS = {
    "conflict": ("question", "real_short_answer", "fake_short_answer"),
    "lists": ("question", "answer", "false_answer"),
}


def split(answers: str) -> list[str]:
    """The accepted answers of a list that semicolons part."""
    return [answer.strip() for answer in answers.split(";") if answer.strip()]


class Choice(ChoiceBenchmark):
    name = "choice"
    title = "True or false answers"
    description = "Whether a question's true answer is preferred to a false one: TriviaQA, NQ, ConflictNQ"
    note = "Share of questions whose true answer scores above a false one, by sums and by means over tokens."
    protocols = (
        Published(name="choice-v1/triviaqa", form="lists", **TRIVIA),
        Published(name="choice-v1/triviaqa-published", form="lists", **TRIVIA),
        Published(name="choice-v1/nq", form="lists", **NQ),
        Published(name="choice-v1/nq-published", form="lists", **NQ),
        Published(name="choice-v1/conflict-nq", form="conflict", **CONFLICT_NQ),
    )
    rules: ClassVar = {
        "true answer": "the first of the accepted ones",
        "chosen": "the answer with the highest score; of equal ones the false one",
    }

    def fields(self, protocol):
        return dict.fromkeys(COLUMNS[protocol.form], str)

    def items(self, protocol, rows, args):
        items, published = [], protocol.name.endswith("-published")
        for i, (place, row) in enumerate(rows):
            question, answers, false = (row[name].strip() for name in COLUMNS[protocol.form])
            accepted = [answers] if protocol.form == "conflict" else split(answers)
            check_row(place, {"answer": accepted}, {"answer": list}, protocol.source)
            if published or normalized(false) not in map(normalized, accepted):
                # The false one first: equal scores are lost.
                both = f" {false}", f" {accepted[0]}"
                items.append(Item(i, question, question_text(question), both, data=(1, "")))
        return items

    def metrics(self, protocol):
        return "sum", "mean"


BENCHMARK = Choice()
