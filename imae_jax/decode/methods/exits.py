"""Which layers methods name, and which residual streams they project early."""

from collections.abc import Sequence

from imae_jax.config import LlamaConfig
from imae_jax.errors import UserError

NAMED = ("low", "high", "all")
# Up to this many layers a bucket holds every second layer of a half; above, 20 layers (Chuang et al., arXiv
# 2309.03883, appendix).
SMALL_MODEL = 40


def candidate_layers(method: str, candidates: str | Sequence[int], config: LlamaConfig) -> tuple[int, ...]:
    """Numbers of the candidate layers, ascending; 0 is the embedding's output.

    Args:
        method: for errors.
        candidates: `low` or `high`, DoLa's buckets; `all` layers but the last; `a..b`, both included; or
            numbers, in a sequence or with `+` between them.
        config: configuration of the model.

    Raises:
        UserError: no such bucket, or a layer that is not before the last.
    """
    N = config.num_layers
    if candidates == "all":
        layers = range(N)
    elif candidates in ("low", "high"):
        half = N // 2 if N <= SMALL_MODEL else None
        if candidates == "low":
            # With tied embeddings the embedding's output projects back onto the token itself.
            start = 2 if config.tie_word_embeddings else 0
            layers = range(start, half if half is not None else 20, 2)
        else:
            layers = range(half if half is not None else N - 20, N, 2)
    else:
        layers = layer_numbers(method, "candidates", candidates, NAMED)
    if not layers:
        raise UserError(f"{method}: candidates={candidates!r} holds no layer of a model with {N}")
    for layer in layers:
        if not 0 <= layer < N:
            raise UserError(
                f"{method}: layer {layer} is no early one: the model has 0 (the embedding) to {N - 1}"
            )
    return tuple(sorted(set(layers)))


def layer_numbers(
    method: str, setting: str, value: str | Sequence[int], names: Sequence[str] = ()
) -> Sequence[int]:
    """The numbers of `a..b`, both included, of `a+b+c`, or of a sequence.

    Args:
        method, setting, names: for errors; `names` is what may stand instead of numbers.

    Raises:
        UserError: it is none of these.
    """
    try:
        if not isinstance(value, str):
            return [int(layer) for layer in value]
        first, dots, last = value.partition("..")
        if dots:
            return range(int(first), int(last) + 1)
        return [int(layer) for layer in value.split("+")]
    except (TypeError, ValueError) as error:
        forms = ", ".join([*names, "a..b", "or numbers such as 0+2+4"])
        raise UserError(f"{method}: {setting}={value!r}: use {forms}") from error
