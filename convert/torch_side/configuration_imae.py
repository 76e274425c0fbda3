"""Configurations of models with in-model anti-expert (IMAE) units."""

from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config


class ImaeConfigMixin:
    """A base's configuration and that of its units.

    Args:
        anti_expert_intermediate_size: width A of a unit's MLP.
        mode: mode in which the model runs unless a call says otherwise: "expert", "base", "anti-expert" or a
            number (the units' strength: -1, 0, +1 are these three).
        kwargs: settings of the base's configuration.
    """

    def __init__(self, anti_expert_intermediate_size=64, mode="expert", **kwargs):
        self.anti_expert_intermediate_size = anti_expert_intermediate_size
        self.mode = mode
        super().__init__(**kwargs)


class ImaeLlamaConfig(ImaeConfigMixin, LlamaConfig):
    model_type = "imae_llama"


class ImaeMistralConfig(ImaeConfigMixin, MistralConfig):
    model_type = "imae_mistral"


class ImaeQwen2Config(ImaeConfigMixin, Qwen2Config):
    model_type = "imae_qwen2"


class ImaeQwen3Config(ImaeConfigMixin, Qwen3Config):
    model_type = "imae_qwen3"


class ImaeGemma3Config(ImaeConfigMixin, Gemma3TextConfig):
    model_type = "imae_gemma3_text"
