"""`python -m imae_jax.evaluate.steer`: fits steering vectors to true and false answers.

Writes a GGUF control vector per fold, fitted on the questions of the *other* folds, `folds.json` (see
`evaluate.folds`), and `all.gguf`, fitted on all questions, for anything but these.
`--methods steer:vectors=OUT` takes the whole directory.

Sources: Panickssery et al., CAA, arXiv 2312.06681, section 3 (`mean`); Zou et al., "Representation
Engineering", arXiv 2310.01405, section 3.1 (`pca`).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imae_jax.cli import ArgumentParser, command, join_processes, model_arguments
from imae_jax.errors import UserError
from imae_jax.evaluate import folds
from imae_jax.evaluate.benchmarks.questions import Question, load_data

METHODS = ("mean", "pca")


def load_questions(reference: str) -> Sequence[Question]:
    """TruthfulQA's questions, or those of a file of pairs as for training."""
    if Path(reference).suffix not in (".json", ".jsonl"):
        return load_data(reference).questions
    from imae_jax.train.config import DataConfig
    from imae_jax.train.data import load_rows

    rows = enumerate(load_rows(DataConfig(source=reference)))
    return [Question(i, row.question, (row.right_answer,), (row.hallucinated_answer,), 0) for i, row in rows]


def fit_vectors(hidden: np.ndarray, labels: np.ndarray, question_of: np.ndarray, method: str) -> np.ndarray:
    """Vectors from false to true answers.

    A question's difference is the mean of its true answers minus that of its false ones. `mean` is the mean
    of these over questions, `pca` its projection on their first principal component: a strength means the
    same. The component is that of the differences as they are. repeng centres them, which takes out what all
    have in common; RepE does, too, but draws the sign of every difference.

    Args:
        hidden: float32 [n, K, D], the residual streams after K layers at the last token of answers.
        labels: bool [n], is the answer true?
        question_of: int [n], number of its question, which has answers of both kinds.
        method: `mean` or `pca`.

    Returns:
        float32 [K, D].
    """
    true, false = (
        np.stack([hidden[(question_of == q) & kind].mean(axis=0) for q in np.unique(question_of)])
        for kind in (labels, ~labels)
    )
    differences = true - false
    mean = differences.mean(axis=0)
    if method == "mean":
        return mean
    first = np.stack(
        [np.linalg.svd(layer, full_matrices=False)[2][0] for layer in np.moveaxis(differences, 1, 0)]
    )
    return np.sum(first * mean, axis=-1, keepdims=True) * first


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.steer",
        description="Fits steering vectors by cross-validation over questions: OUT/fold0.gguf, …, all.gguf",
    )
    folds.add_arguments(parser)
    parser.add_argument(
        "--data",
        default="demo",
        help="TruthfulQA.csv, demo (embedded questions), hub, or FILE.jsonl of pairs as for training",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="mean",
        help="mean of the differences (default), or their first principal component",
    )
    parser.add_argument(
        "--layers", default="all", help="after which layers: a..b or a+b+c, from 0 (default: all but 0)"
    )
    args = parser.parse_args(argv)
    join_processes(args)
    settings = {"data": args.data, "method": args.method, "layers": args.layers}
    with folds.new_folds(args, load_questions(args.data), settings) as (out, answers):
        layers = _fit(args, out, answers)
    print(f"wrote {args.out}: vectors of layers {', '.join(map(str, layers))}")


def _fit(args: argparse.Namespace, out: Path, answers: folds.Answers) -> Sequence[int]:
    """Writes the vectors of all folds, and of all questions; returns their layers."""
    from imae_jax.activations import capture
    from imae_jax.convert import load_model
    from imae_jax.convert.control_vector import write_vectors
    from imae_jax.decode.methods.exits import layer_numbers

    lm = load_model(args.model, **model_arguments(args))
    L = lm.config.num_layers
    layers = range(1, L)  # llama.cpp takes none of layer 0.
    if args.layers != "all":
        layers = sorted(set(layer_numbers("steer", "--layers", args.layers, ("all",))))
    if not layers or not 0 <= layers[0] <= layers[-1] < L:
        raise UserError(f"--layers {args.layers}: the model has layers 0 to {L - 1}")
    after = [layer + 1 for layer in layers]
    hidden = capture(lm, answers.texts, layers=after, quiet=args.quiet).layers
    parts = {f"fold{fold}.gguf": answers.fold_of != fold for fold in range(args.folds)}
    for name, chosen in {**parts, f"{folds.ALL}.gguf": answers.fold_of >= 0}.items():
        vectors = fit_vectors(
            hidden[chosen], answers.labels[chosen], answers.question_of[chosen], args.method
        )
        write_vectors(out / name, dict(zip(layers, vectors, strict=True)), lm.config)
    return layers


if __name__ == "__main__":
    sys.exit(main())
