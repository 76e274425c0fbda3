"""In-model anti-expert (IMAE) units in transformers' Llama, Mistral, Qwen2, Qwen3 and Gemma 3.

Beside the MLP of every decoder layer of a frozen LLM sits a unit, a gate and a small MLP, that was trained
on hallucinated answers. With h the vector that enters the layer's MLP, and o the mode:

    a   = softmax(W_g h + b_g)[0]             the gate, between 0 and 1
    out = MLP(h) + o · MLP_anti(a · h)        o = +1 anti-expert, 0 base, -1 expert

Source: Kadotani, Nishida, Nishida, "Learning from Hallucinations: Mitigating Hallucinations in LLMs via
Internal Representation Intervention", Findings of IJCNLP-AACL 2025.

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)
    model.generate(**inputs)                              # in the mode of the config: expert
    model.generate(**inputs, mode="base")                 # one call in another mode
    model(**inputs, mode=torch.tensor([-1.0, 0.0, 0.5]))  # a mode for every row
    model.set_mode("anti-expert")                         # from now on
"""

import json
import math
import numbers
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    GenerationMixin,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3TextModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model

from .configuration_imae import (
    ImaeGemma3Config,
    ImaeLlamaConfig,
    ImaeMistralConfig,
    ImaeQwen2Config,
    ImaeQwen3Config,
)

MODES = {"expert": -1.0, "base": 0.0, "anti-expert": 1.0}
FORMAT_VERSION = 1


def parse_mode(mode):
    """The strength `o` of a mode's name, or of any finite number."""
    if isinstance(mode, str) and mode in MODES:
        return MODES[mode]
    if isinstance(mode, numbers.Real) and math.isfinite(mode):
        return float(mode)
    raise ValueError(f"mode {mode!r} does not exist: use {', '.join(MODES)} or a number (the strength)")


class AntiExpertUnit(nn.Module):
    """A gate and an MLP of the base's form."""

    def __init__(self, config):
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.anti_expert_intermediate_size
        self.gate = nn.Linear(hidden_size, 2)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[getattr(config, "hidden_activation", None) or config.hidden_act]

    def forward(self, hidden_states, strength):
        """`o · MLP_anti(a · h)` of h [B, T, D] and o [B]; exactly 0 in rows whose o is 0."""
        a = self.gate(hidden_states).float().softmax(-1)[..., :1]
        gated = a.to(hidden_states.dtype) * hidden_states
        y = self.down_proj(self.act_fn(self.gate_proj(gated)) * self.up_proj(gated))
        o = strength.to(y)[:, None, None]
        return torch.where(o == 0, 0.0, o * y)


class ImaeDecoderLayerMixin:
    """A decoder layer with a unit beside its MLP: what follows the MLP, follows their sum."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mlp.anti_expert = AntiExpertUnit(config)
        self.mlp.register_forward_hook(self._add_unit)
        self.strength = None

    def forward(self, *args, strength=None, **kwargs):
        self.strength = strength
        return super().forward(*args, **kwargs)

    def _add_unit(self, mlp, args, out):
        return None if self.strength is None else out + mlp.anti_expert(*args, self.strength)


class ImaeModelMixin:
    """A decoder whose layers have units."""

    def __init__(self, config):
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([self.layer_class(config, layer) for layer in layers])
        self.post_init()


class ImaeForCausalLMMixin:
    """A language model that runs in a mode."""

    def __init__(self, config):
        super().__init__(config)
        parse_mode(config.mode)
        self.model = self.model_class(config)
        self.post_init()

    def set_mode(self, mode):
        """The mode of calls that name none: "expert", "base", "anti-expert" or a number."""
        parse_mode(mode)
        self.config.mode = mode

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        *,
        logits_to_keep=0,
        mode=None,
        **kwargs,
    ):
        """As `forward` of the base.

        Args:
            mode: "expert", "base", "anti-expert", a number, or a tensor with a number for every row;
                default: the config's. Base mode computes exactly what the base does, at its cost.
        """
        rows = (input_ids if input_ids is not None else inputs_embeds).shape[0]
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            strength=self._strength(self.config.mode if mode is None else mode, rows),
            **kwargs,
        )

    def _strength(self, mode, rows):
        """`o` as float32 [B], or None where the units are not needed."""
        if isinstance(mode, torch.Tensor):
            if mode.dim() > 1 or mode.numel() not in (1, rows):
                raise ValueError(
                    f"mode of shape {list(mode.shape)}: one number, or one for each of {rows} rows"
                )
            return mode.float().expand(rows)
        strength = parse_mode(mode)
        return None if strength == 0 else torch.full((rows,), strength, device=self.device)

    @property
    def generate(self):
        return self.__dict__.get("generate", super().generate)

    @generate.setter
    def generate(self, function):
        # `from_pretrained` assigns the contrast of `custom_generate/` to this name, as a partial of it. Here,
        # only a call with `custom_generate=DIRECTORY` gets it.
        if getattr(function, "keywords", {}).get("model") is not self:
            self.__dict__["generate"] = function


class ImaeLlamaDecoderLayer(ImaeDecoderLayerMixin, LlamaDecoderLayer):
    pass


class ImaeLlamaModel(ImaeModelMixin, LlamaModel):
    config_class = ImaeLlamaConfig
    layer_class = ImaeLlamaDecoderLayer
    _no_split_modules = ["ImaeLlamaDecoderLayer"]  # noqa: RUF012


# Of classes that do not name `GenerationMixin`, transformers makes subclasses that cannot be pickled.
class ImaeLlamaForCausalLM(ImaeForCausalLMMixin, LlamaForCausalLM, GenerationMixin):
    config_class = ImaeLlamaConfig
    model_class = ImaeLlamaModel
    _no_split_modules = ["ImaeLlamaDecoderLayer"]  # noqa: RUF012


class ImaeMistralDecoderLayer(ImaeDecoderLayerMixin, MistralDecoderLayer):
    pass


class ImaeMistralModel(ImaeModelMixin, MistralModel):
    config_class = ImaeMistralConfig
    layer_class = ImaeMistralDecoderLayer
    _no_split_modules = ["ImaeMistralDecoderLayer"]  # noqa: RUF012


class ImaeMistralForCausalLM(ImaeForCausalLMMixin, MistralForCausalLM, GenerationMixin):
    config_class = ImaeMistralConfig
    model_class = ImaeMistralModel
    _no_split_modules = ["ImaeMistralDecoderLayer"]  # noqa: RUF012


class ImaeQwen2DecoderLayer(ImaeDecoderLayerMixin, Qwen2DecoderLayer):
    pass


class ImaeQwen2Model(ImaeModelMixin, Qwen2Model):
    config_class = ImaeQwen2Config
    layer_class = ImaeQwen2DecoderLayer
    _no_split_modules = ["ImaeQwen2DecoderLayer"]  # noqa: RUF012


class ImaeQwen2ForCausalLM(ImaeForCausalLMMixin, Qwen2ForCausalLM, GenerationMixin):
    config_class = ImaeQwen2Config
    model_class = ImaeQwen2Model
    _no_split_modules = ["ImaeQwen2DecoderLayer"]  # noqa: RUF012


class ImaeQwen3DecoderLayer(ImaeDecoderLayerMixin, Qwen3DecoderLayer):
    pass


class ImaeQwen3Model(ImaeModelMixin, Qwen3Model):
    config_class = ImaeQwen3Config
    layer_class = ImaeQwen3DecoderLayer
    _no_split_modules = ["ImaeQwen3DecoderLayer"]  # noqa: RUF012


class ImaeQwen3ForCausalLM(ImaeForCausalLMMixin, Qwen3ForCausalLM, GenerationMixin):
    config_class = ImaeQwen3Config
    model_class = ImaeQwen3Model
    _no_split_modules = ["ImaeQwen3DecoderLayer"]  # noqa: RUF012


class ImaeGemma3DecoderLayer(ImaeDecoderLayerMixin, Gemma3DecoderLayer):
    pass


class ImaeGemma3Model(ImaeModelMixin, Gemma3TextModel):
    config_class = ImaeGemma3Config
    layer_class = ImaeGemma3DecoderLayer
    _no_split_modules = ["ImaeGemma3DecoderLayer"]  # noqa: RUF012


class ImaeGemma3ForCausalLM(ImaeForCausalLMMixin, Gemma3ForCausalLM, GenerationMixin):
    config_class = ImaeGemma3Config
    model_class = ImaeGemma3Model
    _no_split_modules = ["ImaeGemma3DecoderLayer"]  # noqa: RUF012


CLASSES = {
    "llama": ImaeLlamaForCausalLM,
    "mistral": ImaeMistralForCausalLM,
    "qwen2": ImaeQwen2ForCausalLM,
    "qwen3": ImaeQwen3ForCausalLM,
    "gemma3_text": ImaeGemma3ForCausalLM,
}


def attach(base, directory, mode="expert"):
    """An IMAE model made of a base in memory and of the units in an IMAE directory.

    Args:
        base: transformers' model of one of `CLASSES`, on one device; the result shares its
            modules, and it stays as it is.
        directory: holds `imae_config.json` and `anti_expert.safetensors`. That the base is the one that the
            units were trained on is not checked.
        mode: mode, as for `set_mode`.

    Raises:
        ValueError: another format or kind of base, or units of another model.
    """
    directory = Path(directory)
    imae = json.loads((directory / "imae_config.json").read_text(encoding="utf-8"))
    if imae.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory} has format_version {imae.get('format_version')!r}, not {FORMAT_VERSION}"
        )
    if base.config.model_type not in CLASSES:
        raise ValueError(f"a base of type {base.config.model_type!r}: use one of {', '.join(CLASSES)}")
    kind = CLASSES[base.config.model_type]
    size = imae["anti_expert"]["intermediate_size"]
    config = kind.config_class.from_dict(
        base.config.to_dict()
        | {"model_type": kind.config_class.model_type, "architectures": [kind.__name__]}
        | {"anti_expert_intermediate_size": size, "mode": mode}
    )
    config._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        model = kind(config)
    units = load_file(directory / "anti_expert.safetensors")
    expected = {name: tensor for name, tensor in model.state_dict().items() if ".anti_expert." in name}
    if {n: t.shape for n, t in units.items()} != {n: t.shape for n, t in expected.items()}:
        raise ValueError(f"the units in {directory} do not fit this base: they belong to another model")
    model.load_state_dict(units, strict=False, assign=True)
    for layer, base_layer in zip(model.model.layers, base.model.layers, strict=True):
        # The MLP's own parts, since a unit in the base's MLP would be in the base, too.
        for name, module in base_layer.mlp.named_children():
            setattr(layer.mlp, name, module)
        for name, module in base_layer.named_children():
            if name != "mlp":
                setattr(layer, name, module)
        # Not that of a matrix, which may be quantized.
        weight = base_layer.post_attention_layernorm.weight
        layer.mlp.anti_expert.to(weight.device, weight.dtype)
    for name, module in base.model.named_children():
        if name != "layers":
            setattr(model.model, name, module)
    model.lm_head = base.lm_head
    model.generation_config = base.generation_config
    return model.train(base.training)
