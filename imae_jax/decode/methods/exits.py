"""Which layers' residual streams methods project early."""

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
        named = f"{', '.join(NAMED)}, "
        layers = layer_numbers(f"{method}: candidates", candidates, named)
    if not layers:
        raise UserError(f"{method}: candidates={candidates!r} holds no layer of a model with {N}")
    for layer in layers:
        if not 0 <= layer < N:
            raise UserError(
                f"{method}: layer {layer} is no early one: the model has 0 (the embedding) to {N - 1}"
            )
    return tuple(sorted(set(layers)))


def layer_numbers(setting: str, layers: str | Sequence[int], named: str = "") -> Sequence[int]:
    """Numbers of layers from `a..b`, both included, from `a+b+c`, or from a sequence.

    Args:
        setting: method and setting, for errors.
        layers: what the setting says.
        named: what else it could say, for errors.

    Raises:
        UserError: `layers` has none of these forms.
    """
    try:
        if not isinstance(layers, str):
            return [int(layer) for layer in layers]
        first, dots, last = layers.partition("..")
        if dots:
            return range(int(first), int(last) + 1)
        return [int(layer) for layer in layers.split("+")]
    except (TypeError, ValueError) as error:
        raise UserError(f"{setting}={layers!r}: use {named}a..b, or numbers such as 0+2+4") from error
