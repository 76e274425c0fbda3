"""Configurations of models with in-model anti-expert (IMAE) units."""

from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

# Tensor parallelism: as the base's MLP. The gate, of two rows, is on every device.
UNIT_TP_PLAN = {
    "layers.*.mlp.anti_expert.gate_proj": "colwise",
    "layers.*.mlp.anti_expert.up_proj": "colwise",
    "layers.*.mlp.anti_expert.down_proj": "rowwise",
}


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
    base_model_tp_plan = LlamaConfig.base_model_tp_plan | UNIT_TP_PLAN


class ImaeMistralConfig(ImaeConfigMixin, MistralConfig):
    model_type = "imae_mistral"
    base_model_tp_plan = MistralConfig.base_model_tp_plan | UNIT_TP_PLAN


class ImaeQwen2Config(ImaeConfigMixin, Qwen2Config):
    model_type = "imae_qwen2"
    base_model_tp_plan = Qwen2Config.base_model_tp_plan | UNIT_TP_PLAN


class ImaeQwen3Config(ImaeConfigMixin, Qwen3Config):
    model_type = "imae_qwen3"
    base_model_tp_plan = Qwen3Config.base_model_tp_plan | UNIT_TP_PLAN


class ImaeGemma3Config(ImaeConfigMixin, Gemma3TextConfig):
    model_type = "imae_gemma3_text"
    base_model_tp_plan = Gemma3TextConfig.base_model_tp_plan | UNIT_TP_PLAN
