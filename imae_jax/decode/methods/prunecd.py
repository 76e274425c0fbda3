"""PruneCD: the model against itself without some of its layers."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax

from imae_jax.config import LlamaConfig
from imae_jax.decode.methods.cd import AmateurContrast
from imae_jax.decode.methods.exits import layer_numbers
from imae_jax.decode.methods.protocol import Stream, StreamLogits
from imae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PruneCD(AmateurContrast):
    """The contrast of `cd` with the model itself, some middle layers of which are passed by (Yu et al.,
    "PruneCD: Contrasting Pruned Self Model to Improve Decoding Factuality", arXiv 2509.16598).

    The upper layers sharpen what the pruned model predicts, which early exits lack. No code is published.
    The paper searches the layers for every model, by what multiple choice and perplexity lose without them:
    there are none to take by default.

    Cost: two rows of one batch over the same weights. Both go through every layer, and the pruned one's
    results of those that it passes by are thrown away.

    Attributes:
        skip: the layers to pass by, numbered as early exits are, 1 to N: `10..14`, or other forms of
            `exits.layer_numbers`.
    """

    skip: str | tuple[int, ...] = ""

    def __post_init__(self):
        super().__post_init__()
        if not self.skip:
            raise UserError("prunecd needs skip=LAYERS: which the amateur passes by, such as 10..14")

    @property
    def name(self) -> str:
        return "prunecd"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return Stream(), Stream(skip=self.skip)

    def resolve(self, config: LlamaConfig, *, generating: bool) -> Self:
        N, skip = config.num_layers, layer_numbers("prunecd", "skip", self.skip)
        for layer in skip:
            if not 1 <= layer <= N:
                raise UserError(f"prunecd: layer {layer} does not exist: the model has 1 to {N}")
        if not 0 < len(set(skip)) < N:
            raise UserError(f"prunecd: skip={self.skip!r}: give some of the layers 1 to {N}, not all")
        resolved = super().resolve(config, generating=generating)
        return dataclasses.replace(resolved, skip=tuple(sorted(set(skip))))

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return self.against(logits[0].final, logits[1].final)
