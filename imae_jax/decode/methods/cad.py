"""CAD, context-aware decoding: the same prompt with its context against without."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Self

import jax

from imae_jax.decode.methods.protocol import Method, Stream, StreamLogits, control


@dataclasses.dataclass(frozen=True)
class ContextContrast(Method):
    """What methods share that compare `z_ctx`, the logits behind a prompt, with `z_no`, those behind the same
    prompt without its context.

    Cost: two rows of one batch, of which one begins with the shorter prompt.

    Attributes:
        flip: reverses the sign of the difference `z_ctx − z_no`, as a control.
    """

    flip: bool = control(False)

    @property
    def streams(self) -> tuple[Stream, ...]:
        return Stream(), Stream(prompt=1)

    @property
    def normalized(self) -> bool:
        return True

    def flipped(self) -> Self:
        return dataclasses.replace(self, flip=not self.flip)

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return jax.nn.log_softmax(self.unnormalized_scores(logits))

    def unnormalized_scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        with_context, without = (stream.final for stream in logits)
        sign = -1.0 if self.flip else 1.0
        return self.combine(with_context, without, sign * (with_context - without))

    @abc.abstractmethod
    def combine(self, with_context: jax.Array, without: jax.Array, difference: jax.Array) -> jax.Array:
        """Logits, float32 [..., V], from both prompts' and their difference."""


@dataclasses.dataclass(frozen=True)
class CAD(ContextContrast):
    """`log softmax(z_ctx + α (z_ctx − z_no))` (Shi et al., "Trusting Your Evidence: Hallucinate Less with
    Context-aware Decoding", arXiv 2305.14739, equation 2; code: github.com/xhan77/context-aware-decoding).

    The code runs the two prompts as two processes that add their logits at every token. Its demo takes one
    token off the prompt instead of the context.

    Attributes:
        alpha: α; published: 1 for knowledge conflicts, 0.5 for summaries.
    """

    alpha: float = 1.0

    @property
    def name(self) -> str:
        return "cad"

    def combine(self, with_context, without, difference):
        return with_context + self.alpha * difference
