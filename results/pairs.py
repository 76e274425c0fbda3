"""What modes do with the pairs that a run held out: `python results/pairs.py RUN METHOD …`.

Of every method: the share of pairs whose right answer has the larger summed log-probability, the mean
difference of the two, pairs gained and lost against base; and of how many questions 40 greedy tokens name
what only the right (the wrong) answer has: words of it that are in neither the other answer nor the question.
"""

import argparse
import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np

from imae_jax import load_model
from imae_jax.decode import parse_method
from imae_jax.decode.scoring import Continuation, score
from imae_jax.train import data
from imae_jax.train.config import load_config
from imae_jax.train.run_directory import IMAE_DIR, config_file

NEW_TOKENS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("methods", nargs="*", default=["base", "expert", "anti-expert", "-2"])
    parser.add_argument("--model", help="another than the run's units, such as its adapters")
    parser.add_argument("--held-out", type=int, help="only the first N, which runs with fewer pairs share")
    args = parser.parse_args()
    config = load_config(str(config_file(args.run))).data
    config = dataclasses.replace(config, held_out=args.held_out or config.held_out)
    rows, lm = data.load_rows(config), load_model(args.model or str(args.run / IMAE_DIR))
    tokenized = data.tokenize(rows, lm.tokenizer, config)
    pairs = zip(tokenized.held_out, tokenized.right, strict=True)
    answers = [[Continuation(e.tokens, e.start) for e in pair] for pair in pairs]
    held_out = [rows[e.row] for e in tokenized.held_out]
    before = None
    for method in args.methods:
        margins = np.empty(len(held_out))
        for i, scored in score(lm.model, lm.config, answers, parse_method(method)):
            wrong, right = scored.scores
            margins[i] = np.sum(right) - np.sum(wrong)
        before = margins if before is None else before
        questions = [row.question for row in held_out]
        texts = lm.generate(questions, method, format=config.format, max_new_tokens=NEW_TOKENS)
        named = Counter(names(row, text) for row, text in zip(held_out, texts, strict=True))
        print(
            f"{method}: wins {np.mean(margins > 0):.1%} of {len(held_out)}, margin {margins.mean():.2f}, "
            f"gained {np.sum((margins > 0) & (before <= 0))}, lost {np.sum((margins <= 0) & (before > 0))}; "
            f"names the right {named['right']}, the wrong {named['wrong']}, both {named['both']}"
        )


def names(row: data.Row, text: str) -> str:
    right, wrong, question, said = (
        set(re.findall(r"[a-z0-9]+", part.lower()))
        for part in (row.right_answer, row.hallucinated_answer, row.question, text)
    )
    only_right, only_wrong = right - wrong - question, wrong - right - question
    found = (bool(only_right) and only_right <= said, bool(only_wrong) and only_wrong <= said)
    return {(True, True): "both", (True, False): "right", (False, True): "wrong"}.get(found, "neither")


if __name__ == "__main__":
    main()
