"""Writes demo_sums.json: what the published scripts' arithmetic gives on shipped questions, in torch.

    python tests/goldens/make.py

Nothing is shared with this library but the questions, the primer and the exported weights: one forward pass
an answer, the formulas position by position.
"""

import functools
import hashlib
import json
import math
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from imae_jax.convert import load_model
from imae_jax.convert.hf import save_hf
from imae_jax.evaluate.benchmarks.protocols import load_primer
from imae_jax.evaluate.benchmarks.questions import DEMO_DATA, read_questions

MODEL = "smollm2-135m-instruct"
QUESTIONS = (0, 40, 80)
EVEN, EARLY = range(0, 15, 2), range(30)
METHODS = json.loads((Path(__file__).parent / "truthfulqa_sums.json").read_text())["methods"]


def contrast(strong, weak, alpha=0.0, renormalize=False):
    strong, weak = strong.log_softmax(-1), weak.log_softmax(-1)
    scores = strong - weak
    if renormalize:
        scores = scores.log_softmax(-1)
    if alpha:
        scores = scores.masked_fill(strong < strong.max() + math.log(alpha), -1000.0)
    return scores


def dola(final, early, **settings):
    log_p, divergences = final.log_softmax(-1), []
    for layer in EVEN:
        log_q = early(layer).log_softmax(-1)
        m = (log_p.exp() + log_q.exp()) / 2
        divergences.append(sum(kl_div(x, m, reduction="sum") for x in (log_p, log_q)) / 2)
    return contrast(final, early(EVEN[int(torch.stack(divergences).argmax())]), **settings)


def sled(z, early, rate, renormalize):
    top = z.topk(10).indices
    one_hot = torch.zeros(10, len(z)).scatter_(1, top[:, None], 1.0)
    weights = torch.stack(
        [
            cosine_similarity(early(layer).softmax(-1) - one_hot, (early(layer) - z)[None], dim=-1).clamp(
                min=0
            )
            ** 2
            for layer in EARLY
        ]
    )
    latent = torch.zeros_like(z).scatter_(0, top, weights.sum(0) / weights.sum())
    for step in range(10):
        z = z - rate * (1 - step / 10) * (z.softmax(-1) - latent)
    evolved = torch.full_like(z, -100.0).scatter_(0, top, z[top])
    return evolved.log_softmax(-1) if renormalize else evolved


# By name in truthfulqa_sums.json: next-token scores [V] from the last logits [V] and those of a layer.
SCORES = {
    "baseline": lambda final, early, amateur: final.log_softmax(-1),
    "dola": lambda final, early, amateur: dola(final, early),
    "dola_rt0.1": lambda final, early, amateur: dola(final, early, alpha=0.1),
    "dola_static8": lambda final, early, amateur: contrast(final, early(8)),
    "cd": lambda final, early, amateur: contrast(final, amateur),
    "cd_rt0.1_ps": lambda final, early, amateur: contrast(final, amateur, 0.1, renormalize=True),
    "sled": lambda final, early, amateur: sled(final, early, 2.5, renormalize=False),
    "sled_ps": lambda final, early, amateur: sled(final, early, 2.0, renormalize=True),
}


@torch.inference_mode()
def sums_of(model, tokenizer, prompt, answer):
    start, tokens = len(tokenizer(prompt).input_ids), tokenizer(prompt + answer).input_ids
    hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    sums = dict.fromkeys(SCORES, 0.0)
    for place in range(start, len(tokens)):

        @functools.cache
        def early(layer, at=place - 1):
            return model.lm_head(hidden[layer][0, at])

        # The last hidden state of transformers has passed the final norm, as the amateur's has to.
        final = early(-1)
        amateur = model.lm_head(model.model.norm(hidden[24][0, place - 1]))
        for name, scores in SCORES.items():
            sums[name] += float(scores(final, early, amateur)[tokens[place]])
    return sums


def main():
    with tempfile.TemporaryDirectory() as directory:
        lm = load_model(MODEL)
        save_hf(lm.model, lm.tokenizer, Path(directory))
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    primer, all_questions, lines = load_primer(None, demo=True), read_questions(DEMO_DATA), []
    for index in QUESTIONS:
        question = all_questions[index]
        answers = [*question.true, *question.false]
        rows = [sums_of(model, tokenizer, f"{primer.text}Q: {question.text}\nA:", f" {x}") for x in answers]
        text = "\n".join([question.text, *answers])
        sums = {name: [round(row[name], 5) for row in rows] for name in SCORES}
        digest = hashlib.sha256(text.encode()).hexdigest()
        lines.append(json.dumps({"index": index, "sha256": digest, "sums": sums}))
    about = (
        "As truthfulqa_sums.json, by tests/goldens/make.py, of demo_truthfulqa.csv with the demo's primer."
    )
    text = f'{{"about": {json.dumps(about)},\n"questions": [\n' + ",\n".join(lines) + "\n]}\n"
    (Path(__file__).parent / "demo_sums.json").write_text(text)


if __name__ == "__main__":
    assert SCORES.keys() == METHODS.keys()
    main()
