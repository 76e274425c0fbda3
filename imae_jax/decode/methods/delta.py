"""DeLTa: the trajectory of logits over layers, extrapolated to a layer that is not there."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import numpy as np

from imae_jax.config import LlamaConfig
from imae_jax.decode.methods.contrast import Constrained
from imae_jax.decode.methods.exits import candidate_layers, layer_numbers
from imae_jax.decode.methods.protocol import Stream, StreamLogits
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeLTa(Constrained):
    """`log softmax(z_L)(v)` on plausible(softmax(z_L), α), where `z_L(v)` is the value at L of the
    least-squares line through the token's logits `z_n(v)` after layers n = M … N (He et al., "DeLTa: A
    Decoding Strategy based on Logit Trajectory Prediction", arXiv 2503.02343; code:
    github.com/githubhyz/DeLTa at 05c0dc8).

    Early exits have the final norm. L = N smooths the model's logits, L > N goes beyond them. The line's
    value is a sum of the logits whose weights depend on n and L alone. As in the code, plausible tokens are
    those of the extrapolated distribution, and a repetition penalty acts on the scores.

    Differences to the code: it runs the whole text again for every token, without cache and attention mask,
    and is right for one row alone.

    Cost: one forward pass; the projections of all layers from M on in one matmul.

    Attributes:
        layers: n, the last layer N among them: `28..30`, or other forms of `exits.layer_numbers`. The paper
            tunes M for every model and task; default: the last three, as in its figure 1.
        virtual_layer: L, any number from N on; the paper tunes it; default: N + 1, as in its figure 1.
    """

    layers: str | tuple[int, ...] | None = None
    virtual_layer: float | None = None
    renormalize: bool = True

    @property
    def name(self) -> str:
        return "delta"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(exits=(self.layers or ())[:-1], exit_norm=True),)

    def resolve(self, config: LlamaConfig, *, generating: bool) -> Self:
        N, L = config.num_layers, self.virtual_layer
        layers = range(N - 2, N + 1) if N > 1 else (0, 1)
        if self.layers is not None:
            layers = layer_numbers("delta", "layers", self.layers)
        if len(layers) < 2 or max(layers) != N:
            raise UserError(f"delta: layers={self.layers!r}: give two or more, the last one, {N}, among them")
        early = candidate_layers("delta", [layer for layer in layers if layer != N], config)
        L = N + 1.0 if L is None else L
        if L < N:
            raise UserError(f"delta: virtual_layer={L:g} is below the last layer, {N}")
        resolved = super().resolve(config, generating=generating)
        return dataclasses.replace(resolved, layers=(*early, N), virtual_layer=L)

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        layers = np.asarray(self.layers)
        centred = layers - layers.mean()
        weights = 1 / len(layers) + centred * (self.virtual_layer - layers.mean()) / (centred @ centred)
        trajectory = (*logits[0].exits, logits[0].final)
        extrapolated = sum(float(w) * z for w, z in zip(weights, trajectory, strict=True))
        return self.constrain(extrapolated, extrapolated)
