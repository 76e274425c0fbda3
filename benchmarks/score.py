"""ms per TruthfulQA answer against scoring one answer at a time without a shared prefix.

    python benchmarks/score.py --data TruthfulQA.csv --primer primer.txt

The peer is what the published scripts do: transformers, one full forward pass over prompt and answer
for every answer. It runs on the first `--peer-answers` answers; ours on `--limit` questions. Needs
torch (`pip install -e '.[test]'`).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from imae_jax import runtime
from imae_jax.convert import load_model
from imae_jax.convert.hf import save_hf
from imae_jax.decode import encode, score
from imae_jax.evaluate.protocols import get_protocol, load_primer
from imae_jax.evaluate.truthfulqa import read_questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", required=True)
    parser.add_argument("--primer", help="default: from lm-eval")
    parser.add_argument("--method", default="base")
    parser.add_argument("--limit", type=int, help="questions (default: all)")
    parser.add_argument("--peer-answers", type=int, default=40)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    runtime.set_up()

    lm = load_model(args.model)
    protocol, primer = get_protocol("tqa-v1/qa-primer"), load_primer(args.primer)
    questions = read_questions(args.data)[: args.limit]
    groups = []
    for question in questions:
        answers = question.true + question.false
        prompt = protocol.prompt(lm.tokenizer, primer.text, question.text)
        continuations = [protocol.continuation(lm.tokenizer, answer) for answer in answers]
        groups.append(encode(lm.tokenizer, [prompt] * len(answers), continuations))
    num_answers = sum(map(len, groups))

    models, method = lm.prepare(args.method, generating=False)
    list(score(models, lm.config, groups[:2], method))
    start = time.perf_counter()
    sums = {i: [float(s.sum()) for s in scores] for i, scores in score(models, lm.config, groups, method)}
    ours = 1e3 * (time.perf_counter() - start) / num_answers

    with tempfile.TemporaryDirectory() as directory:
        save_hf(lm.model, lm.tokenizer, Path(directory))
        peer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sample = [(i, j) for i, group in enumerate(groups) for j in range(len(group))][: args.peer_answers]
    worst, start = 0.0, time.perf_counter()
    for i, j in sample:
        item = groups[i][j]
        tokens = torch.tensor([item.tokens])
        with torch.no_grad():
            log_probs = peer(tokens).logits[0, item.start - 1 : -1].log_softmax(-1)
        expected = float(log_probs.gather(1, tokens[0, item.start :, None]).sum())
        worst = max(worst, abs(sums[i][j] - expected) / abs(expected))
    theirs = 1e3 * (time.perf_counter() - start) / len(sample)

    figures = {
        "questions": len(questions),
        "answers": num_answers,
        "imae_jax_ms_per_answer": ours,
        "one_at_a_time_ms_per_answer": theirs,
        "speedup": theirs / ours,
        "worst_relative_difference": worst if args.method == "base" else None,
    }
    print(f"{args.model}, {args.method}, {len(questions)} questions, {num_answers} answers")
    print(f"imae_jax                    {ours:8.1f} ms/answer ({ours * num_answers / 1e3:.0f} s in all)")
    print(f"one at a time, no sharing   {theirs:8.1f} ms/answer (on {len(sample)} answers)")
    print(f"speed-up                    {theirs / ours:8.1f}")
    if args.method == "base":
        print(f"worst relative difference   {worst:8.1e}")
    if args.json:
        args.json.write_text(json.dumps(vars(args) | figures, default=str, indent=2))


if __name__ == "__main__":
    main()
