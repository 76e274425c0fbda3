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
QUESTIONS = (0, 20, 40, 60, 80)
# Beside -1000 a sum to some digits would say nothing of the plausible tokens.
IMPLAUSIBLE = -20.0
EVEN, UPPER, EARLY = range(0, 15, 2), range(16, 30, 2), range(30)
METHODS = json.loads((Path(__file__).parent / "truthfulqa_sums.json").read_text())["methods"] | {
    "end": "end:candidates=16+18+20+22+24+26+28",
    "end_rt0.01": "end:candidates=16+18+20+22+24+26+28,weight=1,with_last=false,renormalize=false,alpha=0.01,"
    f"implausible={IMPLAUSIBLE}",
    "delta_rt0.1": f"delta:layers=28..30,virtual_layer=31,alpha=0.1,implausible={IMPLAUSIBLE}",
    "delta_upper": "delta:layers=15..30,virtual_layer=32",
}


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


def plausible(scores, logits, alpha):
    log_p = logits.log_softmax(-1)
    return scores.masked_fill(log_p < log_p.max() + math.log(alpha), IMPLAUSIBLE)


def entropy_over_layers(layers):
    return torch.distributions.Categorical(probs=torch.stack(layers, dim=-1).softmax(-1)).entropy()


def end(z, early):
    """Of the code's multiple choice, at the position that predicts the token."""
    H = entropy_over_layers([*map(early, UPPER), z])
    return (z.log_softmax(-1) - 0.25 * H).log_softmax(-1)


def end_generating(z, early):
    """Of the code's generation, but that implausible tokens are masked there only for the penalty."""
    return plausible(z.log_softmax(-1) - entropy_over_layers([*map(early, UPPER)]), z, 0.01)


def delta(z, normed, first, virtual):
    x = torch.arange(first, 31, dtype=torch.float32)
    y = torch.stack([*map(normed, range(first, 30)), z])
    slope = ((x - x.mean())[:, None] * (y - y.mean(0))).mean(0) / (x.var(unbiased=False) + 1e-9)
    return slope * virtual + y.mean(0) - slope * x.mean()


def delta_masked(z, normed):
    extrapolated = delta(z, normed, 28, 31)
    return plausible(extrapolated.log_softmax(-1), extrapolated, 0.1)


# By name in METHODS: next-token scores [V] from the last logits [V], those of a layer without and with the
# final norm, and those of the amateur.
SCORES = {
    "baseline": lambda final, early, normed, amateur: final.log_softmax(-1),
    "dola": lambda final, early, normed, amateur: dola(final, early),
    "dola_rt0.1": lambda final, early, normed, amateur: dola(final, early, alpha=0.1),
    "dola_static8": lambda final, early, normed, amateur: contrast(final, early(8)),
    "cd": lambda final, early, normed, amateur: contrast(final, amateur),
    "cd_rt0.1_ps": lambda final, early, normed, amateur: contrast(final, amateur, 0.1, renormalize=True),
    "sled": lambda final, early, normed, amateur: sled(final, early, 2.5, renormalize=False),
    "sled_ps": lambda final, early, normed, amateur: sled(final, early, 2.0, renormalize=True),
    "end": lambda final, early, normed, amateur: end(final, early),
    "end_rt0.01": lambda final, early, normed, amateur: end_generating(final, early),
    "delta_rt0.1": lambda final, early, normed, amateur: delta_masked(final, normed),
    "delta_upper": lambda final, early, normed, amateur: delta(final, normed, 15, 32).log_softmax(-1),
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

        @functools.cache
        def normed(layer, at=place - 1):
            return model.lm_head(model.model.norm(hidden[layer][0, at]))

        # The last hidden state of transformers has passed the final norm, as the amateur's has to.
        final, amateur = early(-1), normed(24)
        for name, scores in SCORES.items():
            sums[name] += float(scores(final, early, normed, amateur)[tokens[place]])
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
        "As truthfulqa_sums.json, by tests/goldens/make.py, of demo_truthfulqa.csv with the demo's primer. "
        "END is that of github.com/Arcade-Master/END at 9526d97, "
        "DeLTa of github.com/githubhyz/DeLTa at 05c0dc8."
    )
    methods = json.dumps(METHODS)
    questions = ",\n".join(lines)
    text = f'{{"about": {json.dumps(about)},\n"methods": {methods},\n"questions": [\n{questions}\n]}}\n'
    (Path(__file__).parent / "demo_sums.json").write_text(text)


if __name__ == "__main__":
    assert SCORES.keys() == METHODS.keys()
    main()
