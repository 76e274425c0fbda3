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
    if isinstance(mode, numbers.Real) and not isinstance(mode, bool) and math.isfinite(mode):
        return float(mode)
    raise ValueError(f"mode {mode!r} does not exist: use {', '.join(MODES)} or a number (the strength)")


def strength(mode, hidden_states):
    """The strength `o` of a mode: a float, or [B, 1, 1] of a tensor with numbers for rows of h [B, T, D]."""
    if not isinstance(mode, torch.Tensor):
        return parse_mode(mode)
    rows = hidden_states.shape[0]
    if mode.dim() > 1 or mode.numel() not in (1, rows):
        raise ValueError(f"mode of shape {list(mode.shape)}: one number, or one for each of {rows} rows")
    return mode.to(hidden_states).expand(rows)[:, None, None]


def copy_weight(parameter, weight):
    """The loader of a parameter that vLLM has not replaced."""
    parameter.data.copy_(weight)


class Gate(nn.Module):
    """Scores [B, T, 2] of h. No `nn.Linear`: vLLM does not see that weights of those are missing."""

    def __init__(self, hidden_size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, hidden_size))
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, hidden_states):
        return nn.functional.linear(hidden_states, self.weight, self.bias)


class AntiExpertUnit(nn.Module):
    """A gate and an MLP of the base's form."""

    def __init__(self, config):
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.anti_expert_intermediate_size
        self.gate = Gate(hidden_size)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[getattr(config, "hidden_activation", None) or config.hidden_act]
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        self.num_loaded = 0

    def forward(self, hidden_states):
        """`MLP_anti(a · h)` of h [B, T, D]."""
        a = self.gate(hidden_states).float().softmax(-1)[..., :1]
        gated = a.to(hidden_states.dtype) * hidden_states
        return self.down_proj(self.act_fn(self.gate_proj(gated)) * self.up_proj(gated))

    def load_weights(self, weights):
        """vLLM calls this: its own way cuts a unit to the config's width and lets tensors be missing.

        Args:
            weights: names, for gate and up projection that of the matrix vLLM makes of both, and tensors
                as stored.

        Returns:
            All names, when all tensors are loaded; vLLM refuses a model without them.

        Raises:
            ValueError: a tensor of another shape than the config's.
        """
        for name, weight in weights:
            shape = self.shapes.get(name, self.shapes["gate_proj.weight"])
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"a unit's {name} has shape {list(weight.shape)}, not {list(shape)} as config.json says: "
                    "export the model again"
                )
            child, _, own_name = name.partition(".")
            module = self.get_submodule(child)
            if hasattr(module, "load_weights"):
                list(module.load_weights([(own_name, weight)]))
            else:
                parameter = module.get_parameter(own_name)
                getattr(parameter, "weight_loader", copy_weight)(parameter, weight)
            self.num_loaded += 1
        if self.num_loaded < len(self.shapes):
            return []
        return [name for name, _ in self.named_parameters()]


class ImaeDecoderLayerMixin:
    """A decoder layer with a unit beside its MLP: what follows the MLP, follows their sum."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.config, self.mode = config, None
        self.mlp.anti_expert = AntiExpertUnit(config)
        self.mlp.register_forward_hook(self._add_unit)

    def forward(self, *args, mode=None, **kwargs):
        """As `forward` of the base; the mode is a call's, or the config's where it names none."""
        self.mode = mode
        return super().forward(*args, **kwargs)

    def _add_unit(self, mlp, args, out):
        o = strength(self.config.mode if self.mode is None else self.mode, out)
        if isinstance(o, float):
            return out if o == 0 else out + o * mlp.anti_expert(*args)
        return out + torch.where(o == 0, 0.0, o * mlp.anti_expert(*args))


class ImaePreTrainedMixin:
    """Loads all weights or none."""

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """As transformers' `from_pretrained`, which would make up weights that are missing or do not fit."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ValueError(f"weights are missing or do not fit the config: {wrong[0]}{more}")
        return (model, info) if output_loading_info else model


class ImaeModelMixin(ImaePreTrainedMixin):
    """A decoder whose layers have units, in the mode of its config."""

    def __init__(self, config):
        super().__init__(config)
        parse_mode(config.mode)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([self.layer_class(config, layer) for layer in layers])
        self.post_init()


class ImaeForCausalLMMixin(ImaePreTrainedMixin):
    """A language model that runs in a mode."""

    def __init__(self, config):
        super().__init__(config)
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
            kwargs: the cache among them, whose name depends on transformers' version.
        """
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            mode=mode,
            **kwargs,
        )

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
