"""Seconds per TruthfulQA answer of every method, against the same method one answer at a time.

    python benchmarks/score.py --data TruthfulQA.csv --primer primer.txt --peer-answers 30

The peer is what the published scripts do, in transformers and torch: one forward pass over prompt and answer
for every answer, nothing shared between answers.

base   the vocabulary projected at every position of the sequence
DoLa   so is every candidate layer; at the answer's positions the divergences over [candidates, A, V]
SLED   so is every early layer; at every position of the answer a [k, V] matrix of q_n − e_i for every early
       layer, whose cosines with d_n weigh the tokens; then the steps of the evolution

Ours runs on `--limit` questions (default: all), the peer on the first `--peer-answers` answers: seconds are
means over these, and the sums of both are compared on the peer's. Methods: base, and any settings of dola and
sled. Needs torch (`pip install -e '.[test]'`); the machine must be idle.
"""

import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imae_jax import runtime
from imae_jax.cli import ArgumentParser, command
from imae_jax.decode import Method, encode, parse_method, score
from imae_jax.decode.methods.dola import DoLa
from imae_jax.decode.methods.imae import Strength
from imae_jax.decode.methods.sled import SLED
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.protocols import get_protocol, load_primer
from imae_jax.evaluate.benchmarks.questions import read_questions
from imae_jax.evaluate.reporting.plots import bar_panels
from imae_jax.evaluate.reporting.tables import Table, number, show
from imae_jax.evaluate.runner.arguments import parse_methods
from imae_jax.evaluate.runner.identity import environment


@dataclasses.dataclass(frozen=True)
class Layers:
    """What one forward pass of the peer gives.

    Attributes:
        final: float32 [T, V].
        early: a function of a layer's number to float32 [T, V].
    """

    final: Any
    early: Callable[[int], Any]


def base_scores(method: Strength, layers: Layers, answer: slice, tokens: Any) -> Any:
    """log p of the answer's tokens [A]."""
    log_probs = layers.final.log_softmax(-1)[answer]
    return log_probs.gather(-1, tokens[:, None])[:, 0]


def dola_scores(method: DoLa, layers: Layers, answer: slice, tokens: Any) -> Any:
    """log q_N − log q_M of the answer's tokens [A], M chosen at every position."""
    import torch
    from torch.nn.functional import kl_div

    early = torch.stack([layers.early(layer)[answer] for layer in method.candidates])
    log_last, log_early = layers.final[answer].log_softmax(-1), early.log_softmax(-1)
    mixture = (log_last.exp() + log_early.exp()) / 2
    divergence = sum(
        kl_div(log_q.expand_as(mixture), mixture, reduction="none").sum(-1) for log_q in (log_last, log_early)
    )
    chosen = divergence.argmax(0)
    scores = log_last - log_early[chosen, torch.arange(len(chosen))]
    if method.renormalize:
        scores = scores.log_softmax(-1)
    if method.alpha:
        threshold = log_last.amax(-1, keepdim=True) + math.log(method.alpha)
        scores = scores.masked_fill(log_last < threshold, method.implausible)
    return scores.gather(-1, tokens[:, None])[:, 0]


def sled_scores(method: SLED, layers: Layers, answer: slice, tokens: Any) -> Any:
    """Evolved logits, or their log-softmax, of the answer's tokens [A], position by position."""
    import torch

    early = torch.stack([layers.early(layer)[answer] for layer in method.candidates])
    scores = []
    for z, z_early, token in zip(layers.final[answer], early.unbind(1), tokens, strict=True):
        top = z.topk(method.scale).indices
        one_hot = torch.zeros(method.scale, len(z)).scatter_(1, top[:, None], 1.0)
        weights = []
        for z_n in z_early:
            towards = z_n.softmax(-1)[None] - one_hot
            cosines = torch.nn.functional.cosine_similarity(towards, (z_n - z)[None], dim=-1)
            weights.append(cosines.clamp(min=0) ** 2)
        weights = torch.stack(weights)
        latent = torch.zeros_like(z).scatter_(0, top, weights.sum(0) / weights.sum().clamp(min=1e-30))
        for step in range(method.steps):
            z = z - method.rate * (1 - step / method.steps) * (z.softmax(-1) - latent)
        evolved = torch.full_like(z, method.lower_bound).scatter_(0, top, z[top])
        scores.append((evolved.log_softmax(-1) if method.renormalize else evolved)[token])
    return torch.stack(scores)


PEERS: dict[type[Method], Callable[..., Any]] = {Strength: base_scores, DoLa: dola_scores, SLED: sled_scores}


def check_peer(label: str, method: Method) -> None:
    """Refuses what the peer does not compute."""
    is_base = not isinstance(method, Strength) or method == parse_method("base")
    published = getattr(method, "divergence", "published") == "published"
    if type(method) not in PEERS or not is_base or not published or getattr(method, "early_exit_norm", False):
        raise UserError(
            f"method {label} has no peer here: use base, dola and sled, without jensen-shannon and without "
            "early_exit_norm"
        )


def one_at_a_time(model: Any, method: Method, items: Sequence[Any]) -> tuple[list[float], float]:
    """Sums of the answers' scores, and the seconds that all of them took.

    Args:
        model: of transformers, float32.
        method: resolved.
        items: `Continuation`s.
    """
    import torch

    sums, start = [], time.perf_counter()
    with torch.inference_mode():
        for item in items:
            tokens = torch.tensor(item.tokens)
            needs_exits = not isinstance(method, Strength)
            output = model(tokens[None], output_hidden_states=needs_exits)

            def early(layer: int, hidden: Any = output.hidden_states) -> Any:
                return model.lm_head(hidden[layer][0])

            answer = slice(item.start - 1, len(item.tokens) - 1)
            layers = Layers(output.logits[0], early)
            sums.append(float(PEERS[type(method)](method, layers, answer, tokens[item.start :]).sum()))
    return sums, time.perf_counter() - start


def figures_of(lm: Any, method: Method, groups: Sequence[Any], model: Any, peer_answers: int) -> dict:
    """Both sides' seconds an answer, and how far their sums are apart."""
    models, method = lm.prepare(method, generating=False)
    list(score(models, lm.config, groups[:2], method))  # compiles
    start = time.perf_counter()
    sums = {
        (i, j): float(scores.sum())
        for i, scored in score(models, lm.config, groups, method)
        for j, scores in enumerate(scored.scores)
    }
    ours = (time.perf_counter() - start) / len(sums)
    sample = [(i, j) for i, group in enumerate(groups) for j in range(len(group))][:peer_answers]
    items = [groups[i][j] for i, j in sample]
    one_at_a_time(model, method, items[:1])  # what torch sets up at first
    expected, seconds = one_at_a_time(model, method, items)
    differences = (
        abs(sums[place] - value) / abs(value) for place, value in zip(sample, expected, strict=True)
    )
    return {
        "seconds_per_answer": ours,
        "peer_seconds_per_answer": seconds / len(sample),
        "speedup": seconds / len(sample) / ours,
        "worst_relative_difference": max(differences),
        "settings": method.settings(),
    }


def table_of(results: dict[str, Any]) -> Table:
    rows = []
    for name, row in results["methods"].items():
        ours, peer = row["seconds_per_answer"], row["peer_seconds_per_answer"]
        cells = (number(ours, 4), number(peer, 3), number(row["speedup"], 1))
        rows.append((name, *cells, f"{row['worst_relative_difference']:.1e}"))
    title = (
        f"{results['model']}, {results['protocol']}, {results['questions']} questions, "
        f"{results['answers']} answers; the peer {results['peer_answers']}"
    )
    columns = ("method", "s/answer", "one at a time, s/answer", "× faster", "worst relative difference")
    return Table(title, columns, tuple(rows))


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python benchmarks/score.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", required=True)
    parser.add_argument("--primer", help="default: from lm-eval")
    parser.add_argument("--methods", default="base,dola,sled:scale=10")
    parser.add_argument("--limit", type=int, help="questions (default: all)")
    parser.add_argument("--peer-answers", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--png", type=Path, help="also draw them")
    args = parser.parse_args(argv)
    for name, value in (("--limit", args.limit), ("--peer-answers", args.peer_answers)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: give at least 1")
    methods = parse_methods(args.methods)
    for label, method in methods.items():
        check_peer(label, method)

    runtime.set_up()
    import torch
    from transformers import AutoModelForCausalLM

    from imae_jax.convert import load_model
    from imae_jax.convert.hf import save_hf

    lm = load_model(args.model, dtype="float32")
    protocol, primer = get_protocol("tqa-v1/qa-primer"), load_primer(args.primer)
    groups = []
    for question in read_questions(args.data)[: args.limit]:
        answers = question.true + question.false
        prompt = protocol.prompt(lm.tokenizer, primer.text, question.text)
        continuations = [protocol.continuation(lm.tokenizer, answer) for answer in answers]
        groups.append(encode(lm.tokenizer, [prompt] * len(answers), continuations))
    with tempfile.TemporaryDirectory() as directory:
        save_hf(lm.model, lm.tokenizer, Path(directory))
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    num_answers = sum(map(len, groups))
    results = {
        "model": args.model,
        "protocol": protocol.name,
        "questions": len(groups),
        "answers": num_answers,
        "peer_answers": min(args.peer_answers, num_answers),
        "environment": environment() | {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "methods": {
            label: figures_of(lm, method, groups, model, args.peer_answers)
            for label, method in methods.items()
        },
    }
    show([table_of(results)])
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.png:
        series = {
            series: {label: 1e3 * row[key] for label, row in results["methods"].items()}
            for series, key in (
                ("imae_jax", "seconds_per_answer"),
                ("one at a time", "peer_seconds_per_answer"),
            )
        }
        title = f"{args.model}, {results['questions']} questions"
        bar_panels({"ms/answer": series}, title).savefig(args.png, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
