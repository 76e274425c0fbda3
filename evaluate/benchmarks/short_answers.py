"""How a short answer is compared with the accepted ones, without a judge.

Sources: F1 and its normalization, Rajpurkar et al., "SQuAD", EMNLP 2016; exact match as the task `nq_open`
of lm-evaluation-harness 0.4 (https://github.com/EleutherAI/lm-evaluation-harness) has it, which differs
from SQuAD's in details.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:The |the |An |A |a |an )")


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer is an accepted one but for case, punctuation and articles, else 0."""

    def plain(text: str) -> str:
        return ARTICLES.sub("", text).lower().translate(PUNCTUATION)

    return float(plain(answer) in map(plain, accepted))


def normalized(text: str) -> str:
    """SQuAD's normal form: lower case; without punctuation and articles; single spaces."""
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The F1 of words, in 0..1, with the accepted answer that is most like it."""
    return max(_f1(normalized(answer).split(), normalized(each).split()) for each in accepted)


def _f1(words: Sequence[str], reference: Sequence[str]) -> float:
    common = sum((Counter(words) & Counter(reference)).values())
    return 2 * common / (len(words) + len(reference)) if common else 0.0


def contains(text: str, accepted: Sequence[str]) -> bool:
    """Whether the normal form of a text holds the words of an accepted answer, one after the other."""
    padded = f" {normalized(text)} "
    return any(f" {normalized(each)} " in padded for each in accepted if normalized(each))
