"""`python -m imae_jax.evaluate.iti`: finds ITI's directions on TruthfulQA's questions.

Writes one file of directions per fold, fitted on the questions of the *other* folds, and `folds.json`, which
says which question belongs to which fold: no question is scored with a direction that saw it.
`evaluate.truthfulqa --methods iti:directions=OUT` takes the whole directory; a single file goes to any
command.

Source: Li et al., arXiv 2306.03341, section 3 and their code's defaults.
"""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    add_process_arguments,
    command,
    join_processes,
    model_arguments,
)
from imae_jax.config import LlamaConfig
from imae_jax.convert.iti import Directions, write_directions
from imae_jax.decode.scoring import batch_size
from imae_jax.decode.streams import not_finite_error
from imae_jax.distributed import to_host
from imae_jax.errors import UserError
from imae_jax.files import new_directory
from imae_jax.language_model import LanguageModel
from imae_jax.layers import precision
from imae_jax.llama import Taps, Weights, forward
from imae_jax.prompts import adds_special_tokens
from imae_jax.sharding import use_mesh

from .questions import Question, load_data

FOLDS_FILE = "folds.json"
BATCH_SIZE, LENGTH_BUCKET = 16, 16
VALIDATION_SHARE = 0.2
# Of the logistic regression's penalty ½‖w‖² + C · Σ loss: the published code's, scikit-learn's default.
INVERSE_PENALTY = 1.0
NEWTON_STEPS = 30


def collect_heads(lm: LanguageModel, texts: Sequence[str], *, progress: Any = lambda x: x) -> np.ndarray:
    """Every attention head's output, before `o_proj`, at the last token of texts: float32 [n, L, N, H]."""
    rows = lm.tokenizer(list(texts), add_special_tokens=adds_special_tokens("plain"))["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    weights, config = lm.model.weights(), lm.config
    found = np.empty((len(rows), config.num_layers, config.num_heads, config.head_dim), np.float32)
    with use_mesh(lm.mesh):
        size = batch_size(BATCH_SIZE)
    for start in progress(range(0, len(rows), size)):
        chosen = order[start : start + size]
        longest = max(len(rows[i]) for i in chosen)
        tokens = np.zeros((size, -(-longest // LENGTH_BUCKET) * LENGTH_BUCKET), np.int32)
        last = np.zeros(size, np.int32)
        for place, i in enumerate(chosen):
            tokens[place, : len(rows[i])] = rows[i]
            last[place] = len(rows[i]) - 1
        with use_mesh(lm.mesh):
            heads = to_host(_last_heads(weights, tokens, last, config=config))
        found[chosen] = heads[: len(chosen)]
        bad = next((i for i in chosen if not np.isfinite(found[i]).all()), None)
        if bad is not None:
            models, method = lm.prepare("base", generating=False)
            raise not_finite_error(models, method, rows[bad], f"heads of {texts[bad]!r}")
    return found


def _heads_at(weights: Weights, tokens: jax.Array, last: jax.Array, *, config: LlamaConfig) -> jax.Array:
    mask = jnp.arange(tokens.shape[1]) <= last[:, None]
    heads = forward(weights, config, tokens, attention_mask=mask, taps=Taps(heads=True)).heads
    of_rows = heads[:, jnp.arange(tokens.shape[0]), last]  # [L, B, N, H]
    return jnp.swapaxes(of_rows, 0, 1).astype(jnp.float32)


_last_heads = jax.jit(_heads_at, static_argnames="config")


@jax.jit
def fit_probes(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logistic regressions of all heads at once, by Newton's method.

    Minimizes `½‖w‖² + C Σ log(1 + exp(−s (w·x + b)))` with s = ±1; the intercept b is not penalized.

    Args:
        x: float32 [P, n, H], activations of P heads.
        y: bool [n], is the answer true?

    Returns:
        w [P, H] and b [P].
    """
    P, n, H = x.shape
    x = jnp.concatenate([x, jnp.ones((P, n, 1))], axis=-1)
    penalty = jnp.ones(H + 1).at[H].set(0.0)
    target = y.astype(jnp.float32)
    multiply = functools.partial(jnp.einsum, precision=precision(x.dtype))

    def objective(w):
        logits = multiply("pnh,ph->pn", x, w)
        losses = jnp.sum(jax.nn.softplus(logits) - target * logits, axis=-1)
        return 0.5 * jnp.sum(penalty * w * w, axis=-1) + INVERSE_PENALTY * losses

    def step(_, w):
        p = jax.nn.sigmoid(multiply("pnh,ph->pn", x, w))
        gradient = INVERSE_PENALTY * multiply("pnh,pn->ph", x, p - target) + penalty * w
        curvature = INVERSE_PENALTY * multiply("pnh,pn,pni->phi", x, p * (1 - p), x)
        hessian = curvature + jnp.diag(penalty) + 1e-6 * jnp.eye(H + 1)
        direction = jnp.linalg.solve(hessian, gradient[..., None])[..., 0]
        # Far from the optimum a whole step can overshoot: the longest of these that helps is taken.
        lengths = 0.5 ** jnp.arange(8.0)
        values = jax.vmap(lambda t: objective(w - t * direction))(lengths)
        best = lengths[jnp.argmin(values, axis=0)]
        better = jnp.min(values, axis=0) <= objective(w)
        return jnp.where(better[:, None], w - best[:, None] * direction, w)

    w = jax.lax.fori_loop(0, NEWTON_STEPS, step, jnp.zeros((P, H + 1)))
    return w[:, :H], w[:, H]


def find_directions(
    heads: np.ndarray, labels: np.ndarray, question_of: np.ndarray, *, seed: int = 0
) -> Directions:
    """Directions, spreads and ranks of all heads.

    Args:
        heads: float32 [n, L, N, H] of answers.
        labels: bool [n], is the answer true?
        question_of: int [n], number of each answer's question: probes are validated on other questions.
        seed: of the split.
    """
    n, L, N, H = heads.shape
    questions = np.random.default_rng(seed).permutation(np.unique(question_of))
    validation = np.isin(question_of, questions[: max(1, round(VALIDATION_SHARE * len(questions)))])
    x = np.moveaxis(heads.reshape(n, L * N, H), 0, 1)
    w, b = fit_probes(x[:, ~validation], labels[~validation])
    logits = np.einsum("pnh,ph->pn", x[:, validation], np.asarray(w)) + np.asarray(b)[:, None]
    accuracy = ((logits > 0) == labels[validation]).mean(axis=1)
    theta = x[:, labels].mean(axis=1) - x[:, ~labels].mean(axis=1)
    theta /= np.maximum(np.linalg.norm(theta, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    sigma = np.einsum("pnh,ph->pn", x, theta).std(axis=1)
    rank = np.empty(L * N, np.int32)
    rank[np.argsort(-accuracy, kind="stable")] = np.arange(L * N)
    shape = (L, N)
    return Directions(
        theta.reshape(L, N, H).astype(np.float32),
        sigma.reshape(shape).astype(np.float32),
        rank.reshape(shape),
        accuracy.reshape(shape).astype(np.float32),
    )


def assign_folds(questions: Sequence[Question], folds: int, seed: int) -> dict[str, int]:
    """The fold of every question, by its text."""
    texts = list(dict.fromkeys(question.text for question in questions))
    order = np.random.default_rng(seed).permutation(len(texts))
    return {texts[i]: place % folds for place, i in enumerate(order.tolist())}


def fold_files(directory: Path, questions: Sequence[str]) -> dict[Path, list[int]]:
    """Which questions, by their place, each file of a directory of folds is for.

    Raises:
        UserError: a question belongs to no fold.
    """
    try:
        folds = json.loads((directory / FOLDS_FILE).read_text(encoding="utf-8"))["questions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} holds no readable {FOLDS_FILE}: run imae_jax.evaluate.iti") from error
    files: dict[Path, list[int]] = {}
    for place, question in enumerate(questions):
        if question not in folds:
            raise UserError(f"{directory}: question {question!r} belongs to no fold: fit directions on it")
        files.setdefault(directory / f"fold{folds[question]}.safetensors", []).append(place)
    return files


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.iti",
        description="Finds ITI's directions by cross-validation over questions: OUT/fold0.safetensors, …",
    )
    add_model_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument("--data", default="demo", help="TruthfulQA.csv, demo (embedded questions) or hub")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of folds and validation splits")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    join_processes(args)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: give at least 0")
    questions = load_data(args.data).questions
    if not 2 <= args.folds <= len(questions) // 2:
        raise UserError(f"--folds {args.folds} of {len(questions)} questions: give 2 to half their number")
    with new_directory(args.out, marker=FOLDS_FILE, overwrite=args.overwrite) as out:
        from tqdm import tqdm

        from imae_jax.convert import load_model

        lm = load_model(args.model, **model_arguments(args))
        answers = [(i, a, a in q.true) for i, q in enumerate(questions) for a in (*q.true, *q.false)]
        texts = [f"Q: {questions[i].text} A: {answer}" for i, answer, _ in answers]
        heads = collect_heads(
            lm, texts, progress=lambda x: tqdm(x, desc="heads", unit="batch", disable=args.quiet)
        )
        question_of, labels = (np.array([answer[k] for answer in answers]) for k in (0, 2))
        folds = assign_folds(questions, args.folds, args.seed)
        fold_of = np.array([folds[questions[i].text] for i in question_of])
        accuracies = []
        for fold in range(args.folds):
            others = fold_of != fold
            found = find_directions(heads[others], labels[others], question_of[others], seed=args.seed)
            write_directions(out / f"fold{fold}.safetensors", found)
            accuracies.append(np.sort(found.accuracy, axis=None)[::-1][: min(48, found.accuracy.size)].mean())
        record = {"model": args.model, "data": args.data, "seed": args.seed, "questions": folds}
        (out / FOLDS_FILE).write_text(
            json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    shown = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
    print(f"wrote {args.out}: validation accuracy of the best {min(48, found.rank.size)} heads {shown}")


if __name__ == "__main__":
    sys.exit(main())
