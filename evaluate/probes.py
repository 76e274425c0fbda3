"""What `iti` computes: attention heads' outputs on answers, a probe of each head, and their directions.

Source: Li et al., arXiv 2306.03341, section 3 and their code's defaults.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from imae_jax.batching import run_by_length
from imae_jax.config import LlamaConfig
from imae_jax.convert.iti import Directions
from imae_jax.decode.streams import not_finite_error
from imae_jax.language_model import LanguageModel
from imae_jax.layers import precision
from imae_jax.llama import Options, Taps, Weights, forward
from imae_jax.prompts import adds_special_tokens

TOKENS_PER_BATCH, LENGTH_MULTIPLE = 512, 16
VALIDATION_SHARE = 0.2
# Of the logistic regression's penalty ½‖w‖² + C · Σ loss: the published code's, scikit-learn's default.
INVERSE_PENALTY = 1.0
NEWTON_STEPS = 30


def collect_heads(lm: LanguageModel, texts: Sequence[str], *, quiet: bool = True) -> np.ndarray:
    """Every attention head's output, before `o_proj`, at the last token of texts: float32 [n, L, N, H]."""
    rows = lm.tokenizer(list(texts), add_special_tokens=adds_special_tokens("plain"))["input_ids"]
    config = lm.config
    heads = np.empty((len(rows), config.num_layers, config.num_heads, config.head_dim), np.float32)
    values = run_by_length(
        functools.partial(_last_heads, lm.model.weights(), config),
        rows,
        tokens_per_batch=TOKENS_PER_BATCH,
        length_multiple=LENGTH_MULTIPLE,
        mesh=lm.mesh,
    )
    for i, head_outputs in tqdm(values, total=len(rows), desc="heads", unit="text", disable=quiet):
        heads[i] = head_outputs
        if not np.isfinite(heads[i]).all():
            models, method = lm.prepare("base", generating=False)
            raise not_finite_error(models, method, [rows[i]], f"heads of {texts[i]!r}")
    return heads


@functools.partial(jax.jit, static_argnums=1)
def _last_heads(weights: Weights, config: LlamaConfig, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Head outputs at the last token of each row: [B, L, N, H]."""
    mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
    heads = forward(weights, config, tokens, attention_mask=mask, options=Options(Taps(heads=True))).heads
    last = heads[:, jnp.arange(tokens.shape[0]), lengths - 1]  # [L, B, N, H]
    return jnp.swapaxes(last, 0, 1).astype(jnp.float32)


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
        seed: seed of the split.
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
