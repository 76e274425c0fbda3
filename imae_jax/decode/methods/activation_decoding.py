"""Activation decoding: tokens that few positions of the prompt speak for."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax

from imae_jax.config import LlamaConfig
from imae_jax.decode.methods.contrast import Constrained
from imae_jax.decode.methods.protocol import Stream, StreamLogits
from imae_jax.errors import UserError

PUBLISHED_LAYERS = {32: 26, 40: 34, 80: 70}
"""By the number of a model's layers, for questions of other domains than those it was tuned on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationDecoding(Constrained):
    """`log p(v) − w H(v)` on plausible(p, α), where H(v) is the entropy, in nats, of the softmax *over the
    positions i of the prompt* of `z_l(v | x_≤i)`, the token's logits in the early exit of layer l (Chen et
    al., "In-Context Sharpness as Alerts", arXiv 2403.01548; code: github.com/hkust-nlp/Activation_Decoding
    at 8ed7756).

    A token that few positions of the prompt activate, and these sharply, loses little. H is computed once a
    prompt. What is wrong in the code, and is not so here:

    - In a batch the last row's H is taken for all rows.
    - Its script of multiple choice passes options that the program does not have; the program takes H over
      the whole text, so that the answer's own positions count.

    Cost: one forward pass; a projection of every position of the prompt, once.

    Attributes:
        weight: w, α in the paper. Published: 0.5 for 7B, 0.8 for 13B, 1 for 70B; on questions from the domain
            that it was tuned on between 0.2 and 1.
        layer: l, from 1 on; published: `PUBLISHED_LAYERS`. Default: these, or 13/16 of the layers. The last
            one's logits are the model's own.
        early_exit_norm: apply the final norm before the early exit; the published code does not.
    """

    weight: float = 0.5
    layer: int | None = None
    early_exit_norm: bool = False

    @property
    def name(self) -> str:
        return "activation-decoding"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (Stream(prompt_exit=self.layer, exit_norm=self.early_exit_norm),)

    def resolve(self, config: LlamaConfig, *, generating: bool) -> Self:
        N, layer = config.num_layers, self.layer
        if layer is None:
            layer = PUBLISHED_LAYERS.get(N, max(1, N * 13 // 16))
        if not 1 <= layer <= N:
            raise UserError(f"activation-decoding: layer {layer} does not exist: the model has 1 to {N}")
        return dataclasses.replace(super().resolve(config, generating=generating), layer=layer)

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        last = logits[0].final
        return self.constrain(jax.nn.log_softmax(last) - self.weight * logits[0].prompt_entropy, last)
