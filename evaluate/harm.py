"""`python -m imae_jax.evaluate.harm`: what a method does to a model on neutral text.

A method can win on multiple choice by breaking the language model. This measures the whole distribution of
every method on plain prose: cross-entropy, Kullback-Leibler divergence from the base model, and how often the
most likely token is the base model's.
"""

import functools
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from imae_jax.decode import Continuation, scoring, streams, windows
from imae_jax.decode.joint import Joint, share_streams
from imae_jax.decode.methods.imae import Strength
from imae_jax.distributed import to_host
from imae_jax.errors import UserError
from imae_jax.files import new_directory, read_text
from imae_jax.sharding import row_shards, use_mesh

from . import plots, stats
from .questions import DATA_DIRECTORY
from .runs import (
    MANY_METHODS,
    RESULTS_FILE,
    called,
    dumps,
    environment,
    method_settings,
    model_settings,
    parse_methods,
    write_outputs,
)
from .summaries import sums_of
from .tables import Table, figure, show

if TYPE_CHECKING:
    from imae_jax.language_model import LanguageModel

BENCHMARK, PROTOCOL = "harm", "harm-v1"
NEUTRAL_TEXT = DATA_DIRECTORY / "neutral.txt"
WINDOW = 512
# Log-probability below which a token counts as ruled out: exp of it is next to nothing in float32. Masks of
# -1000 and -inf are far below it, and SLED's lower bound of -100 too.
RULED_OUT = -80.0
STATISTICS = ("cross_entropy", "kl", "top1_agreement", "ruled_out")


def measure(
    lm: "LanguageModel", prepared: Mapping[str, tuple[Any, Any]], parts: Sequence[Continuation], length: int
) -> dict[str, np.ndarray]:
    """Statistics of every scored token.

    Args:
        lm: the model.
        prepared: models and method by label, from `LanguageModel.prepare`.
        parts: from `decode.windows`.
        length: of a window, to which all are padded.

    Returns:
        By label float64 [4, tokens], in the order of `STATISTICS` and of the text: cross-entropy and
        KL(base ‖ method) in nats, and whether the arg-max is the base model's and the token ruled out.
    """
    labels = list(prepared)
    found: dict[str, list[np.ndarray]] = {label: [] for label in labels}
    base = Strength(0.0)
    with use_mesh(lm.mesh):
        batch = scoring.batch_size()
    for models, joint, places in share_streams(list(prepared.values())):
        both = Joint((base, *joint.methods))
        for number, rows in enumerate(_batches(parts, batch)):
            tokens, mask, scored = (np.zeros((batch, length), kind) for kind in (np.int32, bool, bool))
            for row, part in enumerate(rows):
                tokens[row, : len(part.tokens)], mask[row, : len(part.tokens)] = part.tokens, True
                scored[row, part.start - 1 : len(part.tokens) - 1] = True
            with use_mesh(lm.mesh):
                values = to_host(_statistics(models, tokens, mask, method=both)).astype(np.float64)
            bad = (np.isnan(values).any(axis=(0, 1)) & scored).any(axis=1)
            if bad.any():
                row = int(bad.argmax())
                where = f"{joint.name}, window {number * batch + row} of the text"
                raise streams.not_finite_error(models, both, rows[row].tokens, where)
            for column, place in enumerate(places):
                found[labels[place]].append(values[column][:, scored])
    return {label: np.concatenate(each, axis=1) for label, each in found.items()}


def _batches(parts: Sequence[Continuation], size: int) -> Iterator[Sequence[Continuation]]:
    for start in range(0, len(parts), size):
        yield parts[start : start + size]


@functools.partial(jax.jit, static_argnames="method")
def _statistics(models, tokens, mask, *, method):
    """[M, 4, B, T] of the token that follows every position; the first of the method's M + 1 is base."""
    B, T = tokens.shape
    caches = streams.empty_caches(models, method, B, T)
    hidden, _ = streams.run(models, method, tokens, attention_mask=mask, answer=mask, caches=caches)
    # As in `scoring`: nothing of size B · T · V is ever built.
    limit = max(1, scoring.POSITIONS_PER_PROJECTION // streams.projections(method)) * row_shards()
    size = math.gcd(1 << (limit.bit_length() - 1), B * T)
    following = jnp.roll(tokens, -1, axis=1)

    def in_chunks(x):
        chunks = x.reshape(*x.shape[:-3], -1, size, x.shape[-1])
        return jnp.moveaxis(chunks, -3, 0)

    def of_chunk(chunk):
        hidden, targets = chunk
        logits = streams.logits_of(models, method, hidden)
        scores = method.scores(logits)
        base = jax.nn.log_softmax(scores[0])
        compared = jnp.stack([_compare(base, own, targets) for own in scores[1:]])
        return jnp.where(streams.finite(logits), compared, jnp.nan)

    chunks = (jax.tree.map(in_chunks, hidden), following.reshape(-1, size))
    values = jax.lax.map(of_chunk, chunks)  # [chunks, M, 4, size]
    return jnp.moveaxis(values, 0, -2).reshape(*values.shape[1:3], B, T)


def _compare(base, scores, targets):
    """[4, P] from log-probabilities of the base model and scores of a method, [P, V] both."""
    log_q = jax.nn.log_softmax(scores)
    of_target = jnp.take_along_axis(log_q, targets[:, None], axis=-1)[:, 0]
    p = jnp.exp(base)
    # Where p is 0 the term is 0, whatever the method gives it.
    kl = jnp.sum(jnp.where(p > 0, p * (base - log_q), 0.0), axis=-1)
    same = jnp.argmax(scores, axis=-1) == jnp.argmax(base, axis=-1)
    return jnp.stack([-of_target, kl, same.astype(jnp.float32), (of_target < RULED_OUT).astype(jnp.float32)])


def summarize(values: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Means over tokens with their intervals; infinite where a token's value is, NaN likewise.

    Args:
        values: float64 [4, tokens], from `measure`.
        seed: of the bootstrap.
    """
    rows = dict(zip(STATISTICS, values, strict=True))
    rows["infinite_kl"] = np.isinf(rows["kl"])
    found = {name: stats.mean_of_text(row, seed=seed) for name, row in rows.items()}
    means = {name: mean.value for name, mean in found.items()}
    intervals = {name: mean.interval for name, mean in found.items()}
    with np.errstate(over="ignore"):
        means["perplexity"] = float(np.exp(means["cross_entropy"]))
        bounds = intervals["cross_entropy"]
        intervals["perplexity"] = bounds and tuple(np.exp(bounds).tolist())
    return {"n": values.shape[1], **means, "intervals": intervals}


def results_table(results: Mapping[str, Any]) -> Table:
    """The table of a `results.json`."""

    def share(value: float) -> str:
        return f"{100 * value:.1f}"

    def cell(row: Mapping[str, Any], name: str, shown: Callable[[Any], str] = figure) -> str:
        interval = row["intervals"][name]
        bounds = "" if interval is None else f" [{', '.join(map(shown, interval))}]"
        return shown(row[name]) + bounds

    rows = [
        (
            label,
            sums_of(row["settings"]),
            cell(row, "cross_entropy"),
            figure(row["perplexity"]),
            cell(row, "kl"),
            share(row["infinite_kl"]),
            cell(row, "top1_agreement", share),
            share(row["ruled_out"]),
        )
        for label, row in results["methods"].items()
    ]
    heads = (
        "cross-entropy",
        "perplexity",
        "KL(base ‖ method)",
        "KL infinite %",
        "same top 1 %",
        "ruled out %",
    )
    return Table(f"{title(results)}, nats a token, [95 % interval]", ("method", "sums", *heads), tuple(rows))


def title(results: Mapping[str, Any]) -> str:
    return f"Neutral text, {results['protocol']}, {results['n_tokens']} tokens, {results['model']}"


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.harm",
        description="What methods do to a model on neutral text: cross-entropy and divergence from base.",
    )
    add_model_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument("--methods", default="base", help=MANY_METHODS)
    parser.add_argument("--text", type=Path, default=NEUTRAL_TEXT, help="text file (default: a shipped one)")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument(
        "--settings",
        choices=("scoring", "generating"),
        default="scoring",
        help="which defaults of methods: those of multiple choice (as evaluate.truthfulqa), or of generation",
    )
    parser.add_argument(
        "--window", type=int, default=WINDOW, help="tokens; at most the context (default: 512 or the context)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    args = parser.parse_args(argv)
    join_processes(args)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: give at least 0")
    if args.window < 2:
        raise UserError(f"--window {args.window}: give at least 2")
    methods = parse_methods(args.methods)
    for label, method in methods.items():
        resource = method.resource
        if resource and resource.kind == "directions" and Path(resource.reference).is_dir():
            raise UserError(f"{label}: a text belongs to no fold: give one file of directions")
    text = read_text(args.text, "text")

    with new_directory(args.out, marker=RESULTS_FILE, overwrite=args.overwrite) as out:
        from imae_jax.convert import load_model

        lm = load_model(args.model, **model_arguments(args))
        tokens = lm.tokenizer(text)["input_ids"]
        if len(tokens) < 2:
            raise UserError(f"text {args.text} has fewer than 2 tokens: give a longer one")
        lm.config.check_token_ids(tokens)
        generating = args.settings == "generating"
        prepared = {label: lm.prepare(method, generating=generating) for label, method in methods.items()}
        context = min(c.max_position_embeddings for models, _ in prepared.values() for c in models.configs)
        length = min(args.window, context)
        values = measure(lm, prepared, windows(tokens, length), length)
        results = {
            "benchmark": BENCHMARK,
            "protocol": f"{PROTOCOL}/{args.settings}",
            **model_settings(lm, args),
            "data": {"path": str(args.text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
            "window": {"length": length, "stride": max(1, length // 2)},
            "ruled_out_below": RULED_OUT,
            "n_tokens": len(tokens) - 1,
            "statistics": stats.describe_interval(f"blocks of {stats.BLOCK_LENGTH} tokens", args.seed),
            "command": called(parser.prog, argv),
            **environment(lm.mesh),
            "methods": {
                label: {
                    **summarize(values[label], seed=args.seed),
                    "settings": method_settings(lm, methods[label], prepared[label][1]),
                }
                for label in methods
            },
        }
        table = results_table(results)
        write_outputs(out, [table], {"harm": plots.harm(title(results), results["methods"])})
        (out / RESULTS_FILE).write_text(dumps(results, indent=2) + "\n", encoding="utf-8")
    show([table])


if __name__ == "__main__":
    sys.exit(main())
