"""What `iti` computes of attention heads' outputs on answers: a probe of each head, and their directions.

Source: Li et al., arXiv 2306.03341, section 3 and their code's defaults.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from imae_jax.convert.iti import Directions
from imae_jax.layers import precision

VALIDATION_SHARE = 0.2
# Of the logistic regression's penalty ½‖w‖² + C · Σ loss: the published code's, scikit-learn's default.
INVERSE_PENALTY = 1.0
NEWTON_STEPS = 30


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
