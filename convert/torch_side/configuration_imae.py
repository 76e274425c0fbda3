"""Configurations of Llama- and Qwen2-like models with in-model anti-expert (IMAE) units."""

from transformers import LlamaConfig, Qwen2Config


class ImaeLlamaConfig(LlamaConfig):
    """A Llama's configuration and that of its units.

    Args:
        anti_expert_intermediate_size: width A of a unit's MLP.
        mode: in which the model runs unless a call says otherwise: "expert", "base", "anti-expert" or a
            number (the units' strength: -1, 0, +1 are these three).
        kwargs: of `LlamaConfig`.
    """

    model_type = "imae_llama"

    def __init__(self, anti_expert_intermediate_size=64, mode="expert", **kwargs):
        self.anti_expert_intermediate_size = anti_expert_intermediate_size
        self.mode = mode
        super().__init__(**kwargs)


class ImaeQwen2Config(Qwen2Config):
    """A Qwen2's configuration and that of its units; see `ImaeLlamaConfig`."""

    model_type = "imae_qwen2"

    def __init__(self, anti_expert_intermediate_size=64, mode="expert", **kwargs):
        self.anti_expert_intermediate_size = anti_expert_intermediate_size
        self.mode = mode
        super().__init__(**kwargs)
