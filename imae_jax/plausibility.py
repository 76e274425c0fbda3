"""Which tokens a contrast may touch: the adaptive plausibility constraint (Li et al., arXiv 2210.15097)."""

import jax
import jax.numpy as jnp

FORMS = ("probability", "logit")


def plausible(logits: jax.Array, threshold: float, form: str = "probability") -> jax.Array:
    """Plausible tokens, bool [..., V]; the arg-max is always one.

    Args:
        logits: logits of the stronger side, [..., V]. In the probability form log-probabilities do as well.
        threshold: 0 < α ≤ 1. For 0 the constraint is off: callers skip it.
        form: `probability`, `p(v) ≥ α · max p`, as the code of ICD, CD and DoLa computes it; `logit`,
            `logit(v) ≥ α · max logit`, as IMAE's paper writes it, where α = 1 keeps the arg-max alone.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    if form == "probability":
        return logits >= top + jnp.log(threshold)
    return (logits >= threshold * top) | (logits >= top)
