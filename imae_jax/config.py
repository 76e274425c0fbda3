"""Frozen, hashable configurations of the base LLM and of the anti-expert units."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from imae_jax.errors import UserError

# What transformers takes for a field that a config leaves out, where it is not Llama's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
    },
}
MODEL_TYPES = tuple(DEFAULTS)
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
# Fields that a scaled RoPE cannot do without, and the types themselves.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "frequency_factors": (),
}
# Fields of a model's `config.json` that are numbers.
NUMBER = int | float
NUMBERS = (
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "max_sequence_length", "rms_norm_eps"),
    *("initializer_range", "sliding_window", "sliding_window_pattern", "max_window_layers"),
    *("rope_local_base_freq", "query_pre_attn_scalar"),
)
LARGEST = 2**31 - 1  # of a size
LONGEST_SHOWN = 60  # of a value in an error
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding in HuggingFace's half-split layout.

    Attributes:
        type: `default`; `linear` (positions divided by `factor`); `dynamic` (NTK: the base grows once
            a row is longer than the context the model was trained for); `llama3` (Llama 3.1's
            wavelength-dependent scaling); `frequency_factors` (a divisor per frequency, the form in
            which GGUF files store `llama3`).
        theta: base of the frequencies.
        factor: scale of `linear`, `dynamic` and `llama3`.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: parameters of `llama3`.
        frequency_factors: [head_dim / 2], of `frequency_factors`.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    frequency_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.type not in ROPE_TYPES:
            raise UserError(
                f"rope_type {self.type!r} is not supported: use a model with one of "
                f"{', '.join(list(ROPE_TYPES)[:4])}"
            )
        if not 1.0 <= self.factor < float("inf"):
            raise UserError(f"rope factor {self.factor} is not 1 or above: check the model's config")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
        check_kinds(hf, Mapping, "an object", "rope_parameters", "rope_scaling")
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        check_kinds(rope, str, "a text", "rope_type", "type")
        for values in (hf, rope):
            names = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
            check_kinds(values, NUMBER, "a number", *names)
        theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
        if partial != 1.0:
            raise UserError(
                f"partial_rotary_factor {partial} is not supported: only models that rotate "
                "whole heads can be loaded"
            )
        # Some configs have it beside the other sizes.
        length = hf.get("original_max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", length)
        fields = {name: rope.get(name) for name in ROPE_TYPES.get(rope_type, ())}
        for name, value in fields.items():
            if value is None:
                # Versions of transformers differ in what they take instead.
                raise UserError(
                    f"{name} is missing from the model's config: rope_type {rope_type!r} needs it; add the "
                    "value that the model was trained with"
                )
            check_kinds(fields, NUMBER, "a number", name)
            fields[name] = int(value) if name == "original_max_position_embeddings" else float(value)
        return cls(type=rope_type, theta=float(theta), **fields)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of a HuggingFace config."""
        if self.type == "frequency_factors":
            raise UserError(
                "the model's RoPE is stored as a table of frequency factors, which HuggingFace's "
                "config cannot express: convert from the model's HuggingFace checkpoint instead"
            )
        fields = {name: getattr(self, name) for name in ROPE_TYPES[self.type]}
        return {"rope_type": self.type, "rope_theta": self.theta} | fields


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama-like decoder: Llama, Mistral, Qwen2, Qwen3 or the text model of Gemma 3.

    Attributes:
        rope: rotary position embedding; of the layers without a window, where `local_rope` is given.
        qkv_bias, o_bias: two flags, because Qwen2 has the first alone, and a checkpoint with ITI's
            intervention baked in the second alone.
        activation: activation of the MLP's gate, by transformers' name.
        qk_norm: norms of every head's query and key, before RoPE.
        post_norms: norms of what attention and MLP (with the anti-expert unit) give to the residual stream.
        norm_plus_one: norms multiply by 1 + their weight.
        scaled_embedding: the embedding is multiplied by the square root of `hidden_size`.
        query_pre_attn_scalar: attention scores are divided by its square root; default: `head_dim`.
        sliding_window: the most tokens that a token attends to in a sliding layer, itself included.
        sliding_layers: for every layer whether it slides; empty where none does.
        local_rope: RoPE of the sliding layers; default: `rope`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    activation: str = "silu"
    qk_norm: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    scaled_embedding: bool = False
    query_pre_attn_scalar: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    local_rope: RopeConfig | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                value = getattr(self, field.name)
                raise UserError(f"{field.name} is {value}: it must be at least 1")
        positive = {
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "rope_local_base_freq": None if self.local_rope is None else self.local_rope.theta,
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "sliding_window": self.sliding_window,
        }
        for name, value in positive.items():
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}: it must be above 0 and finite")
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"hidden_act {self.activation!r} is not supported: only {' and '.join(ACTIVATIONS)} are"
            )
        if self.sliding_layers and (
            self.sliding_window is None or len(self.sliding_layers) != self.num_layers
        ):
            raise UserError(
                f"sliding_window {self.sliding_window} and {len(self.sliding_layers)} layer_types do not fit "
                f"{self.num_layers} layers: check the model's config"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}: "
                "check the model's config"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: RoPE needs an even number")
        factors = self.rope.frequency_factors
        if self.rope.type == "frequency_factors" and len(factors) != self.head_dim // 2:
            raise UserError(
                f"{len(factors)} RoPE frequency factors for head_dim {self.head_dim}: "
                f"{self.head_dim // 2} are needed"
            )

    def check_token_ids(self, tokens: Sequence[int]) -> None:
        """Raises a `UserError` for an id without an embedding: its hidden state would be NaN."""
        if max(tokens) >= self.vocab_size or min(tokens) < 0:
            raise UserError(
                f"token id {max(tokens)} is outside of the model's vocabulary of {self.vocab_size}: the "
                "tokenizer does not belong to the model"
            )

    def lowest_layers(self, num_layers: int) -> "LlamaConfig":
        """The config of the model's lowest layers alone."""
        sliding = self.sliding_layers[:num_layers]
        windows = {"sliding_layers": sliding}
        if not any(sliding):
            windows = {"sliding_layers": (), "sliding_window": None, "local_rope": None}
        return dataclasses.replace(self, num_layers=num_layers, **windows)

    def layer_slides(self, layer: int) -> bool:
        """Whether a layer attends to the last `sliding_window` tokens only."""
        return bool(self.sliding_layers) and self.sliding_layers[layer]

    @property
    def context_length(self) -> int:
        """The most tokens that a row may have: `dynamic` RoPE reaches beyond what was trained."""
        stretch = self.rope.factor if self.rope.type == "dynamic" else 1
        return int(self.max_position_embeddings * stretch)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the contents of a HuggingFace `config.json`, of transformers 4 or 5.

        Raises:
            UserError: names the field that this library does not support, or that is missing.
        """
        _refuse_experts(hf)
        model_type = hf.get("model_type")
        if isinstance(hf.get("text_config"), Mapping):
            raise UserError(
                f"model_type {model_type!r} is multimodal (its config has a text_config): only text models "
                "can be loaded"
            )
        if model_type not in MODEL_TYPES:
            raise UserError(
                f"model_type {model_type!r} is not supported: use one of {', '.join(MODEL_TYPES)}"
            )
        hf, gemma3 = DEFAULTS[model_type] | dict(hf), model_type == "gemma3_text"
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if gemma3 and hf.get(name):
                raise UserError(f"{name} is not supported: only models without it can be loaded")
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        for name in required:
            if type(hf.get(name)) is not int or hf[name] > LARGEST:
                raise UserError(f"{name} in the model's config is {hf.get(name)!r}: an integer is needed")
        check_kinds(hf, NUMBER, "a number", *NUMBERS)
        for name in ("rms_norm_eps", "initializer_range"):
            if hf.get(name, 0) is None:
                raise UserError(f"{name} in the model's config is null: a number is needed")
        check_kinds(hf, str, "a text", "hidden_act", "hidden_activation")
        check_kinds(hf, list | tuple, "a list", "layer_types")
        check_kinds(hf, Mapping, "an object", "rope_parameters", "rope_scaling")
        num_heads = hf["num_attention_heads"]
        attention_bias = bool(hf.get("attention_bias", False))
        rope, local_rope = _ropes(hf)
        sliding_layers = _sliding_layers(model_type, hf)
        length = int(hf.get("max_position_embeddings") or 2048)
        if rope.type == "linear":
            # Where `max_position_embeddings` is the length before scaling, as of Vicuna with 16k tokens.
            length = max(length, int(hf.get("max_sequence_length") or 0))
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=int(hf.get("num_key_value_heads") or num_heads),
            head_dim=int(hf.get("head_dim") or hf["hidden_size"] // max(num_heads, 1)),
            max_position_embeddings=length,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope=rope,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or model_type == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(hf.get("mlp_bias", False)),
            initializer_range=float(hf.get("initializer_range", 0.02)),
            activation=hf["hidden_activation"] if gemma3 else hf.get("hidden_act", "silu"),
            qk_norm=model_type in ("qwen3", "gemma3_text"),
            post_norms=gemma3,
            norm_plus_one=gemma3,
            scaled_embedding=gemma3,
            query_pre_attn_scalar=hf["query_pre_attn_scalar"] if gemma3 else None,
            sliding_window=int(hf["sliding_window"]) if sliding_layers else None,
            sliding_layers=sliding_layers,
            local_rope=local_rope if sliding_layers else None,
        )

    def to_hf(self) -> dict[str, Any]:
        """The model's part of a HuggingFace `config.json`, readable by transformers 4.5x and 5.

        Raises:
            UserError: no model of transformers computes what this one does.
        """
        if self.post_norms:
            model_type, name = "gemma3_text", "Gemma3"
        elif self.qk_norm:
            model_type, name = "qwen3", "Qwen3"
        elif self.qkv_bias and not self.o_bias:
            model_type, name = "qwen2", "Qwen2"
        elif self.sliding_layers:
            model_type, name = "mistral", "Mistral"
        else:
            model_type, name = "llama", "Llama"
        rope = self.rope.to_hf()
        legacy = {name: value for name, value in rope.items() if name != "rope_theta"}
        hf = {
            "model_type": model_type,
            "architectures": [f"{name}ForCausalLM"],
            "hidden_act": self.activation,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "rope_scaling": None if self.rope.type == "default" else legacy,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
        }
        if model_type in ("llama", "qwen3", "gemma3_text"):
            hf["attention_bias"] = self.o_bias
        if model_type == "llama":
            hf["mlp_bias"] = self.mlp_bias
        else:
            hf["sliding_window"] = self.sliding_window
        if model_type in ("qwen2", "qwen3", "gemma3_text"):
            sliding = self.sliding_layers or (False,) * self.num_layers
            hf["layer_types"] = [SLIDING if slides else FULL for slides in sliding]
        if model_type in ("qwen2", "qwen3"):
            hf["use_sliding_window"] = bool(self.sliding_layers)
        if model_type == "gemma3_text":
            local = self.local_rope or self.rope
            hf |= {
                "hidden_activation": self.activation,
                "query_pre_attn_scalar": self.query_pre_attn_scalar or self.head_dim,
                "rope_local_base_freq": local.theta,
                "rope_parameters": {FULL: rope, SLIDING: local.to_hf()},
            }
        read = LlamaConfig.from_hf(hf)
        for field in dataclasses.fields(self):
            value, other = getattr(self, field.name), getattr(read, field.name)
            if value != other:
                raise UserError(
                    f"a model with {field.name} {value} has no HuggingFace config: transformers' {name} has "
                    f"{other}"
                )
        return hf


def _refuse_experts(hf: Mapping[str, Any]) -> None:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if hf.get(name):
            raise UserError(
                f"the model is a mixture of experts ({name} {hf[name]}): only models without experts can be "
                "loaded"
            )


def check_kinds(
    values: Mapping[str, Any],
    kind: Any,
    what: str,
    *names: str,
    items: Any = None,
    where: str | PurePath = "the model's config",
) -> None:
    """Raises a `UserError` where a value is of another type; it may be missing or null.

    Args:
        values: as read from a file.
        kind: type of the values.
        what: names it in the error.
        names: names of the values.
        items: type of what lists hold.
        where: where the values stand.
    """
    for name in names:
        value = values.get(name)
        fits = isinstance(value, kind) and not (kind in (NUMBER, int) and isinstance(value, bool))
        if fits and items is not None and isinstance(value, list):
            fits = all(isinstance(item, items) for item in value)
        # Neither NaN nor over what arithmetic can hold; no halves of characters, which JSON can write.
        if fits and kind in (NUMBER, int):
            fits = abs(value) < 2**63
        if fits and isinstance(value, str):
            fits = value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
        if value is not None and not fits:
            raise UserError(f"{name} in {where} is {_shortened(value)}: {what} is needed")


def _shortened(value: Any) -> str:
    """A value for an error."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _ropes(hf: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """RoPE of the layers, and of the sliding ones where it is another."""
    parameters, local_theta = hf.get("rope_parameters") or {}, hf.get("rope_local_base_freq")
    if local_theta is None:
        return RopeConfig.from_hf(hf), None
    local = {"rope_parameters": parameters.get(SLIDING), "rope_theta": local_theta}
    rope = RopeConfig.from_hf({**hf, "rope_parameters": parameters.get(FULL)})
    return rope, RopeConfig.from_hf(local)


def _sliding_layers(model_type: str, hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """For every layer whether it slides, as transformers reads a config; empty where none does."""
    window, num_layers = hf.get("sliding_window"), hf["num_hidden_layers"]
    if model_type in ("qwen2", "qwen3") and not hf.get("use_sliding_window"):
        window = None
    types = hf.get("layer_types")
    if types is not None:
        for kind in types:
            if kind not in (FULL, SLIDING):
                raise UserError(f"layer type {kind!r} is not supported: only {FULL} and {SLIDING} are")
        sliding = [kind == SLIDING for kind in types]
    elif model_type == "gemma3_text":
        pattern = int(hf["sliding_window_pattern"] or 0)
        if pattern < 1:
            raise UserError(f"sliding_window_pattern is {pattern}: it must be at least 1")
        sliding = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    elif model_type in ("qwen2", "qwen3"):
        full = hf["max_window_layers"] or 0
        sliding = [window is not None and layer >= full for layer in range(num_layers)]
    else:
        sliding = [window is not None] * num_layers
    if (
        model_type in ("llama", "mistral")
        and sliding != [model_type == "mistral" and window is not None] * num_layers
    ):
        raise UserError(
            f"sliding_window {window} with these layer_types in a {model_type} config is not supported: "
            "transformers takes it for another model in its cache than in its masks; check the model's config"
        )
    if any(sliding) and window is None:
        raise UserError(
            "sliding_window is missing from a config whose layers slide: check the model's config"
        )
    return tuple(sliding) if any(sliding) else ()


@dataclasses.dataclass(frozen=True)
class AntiExpertConfig:
    """The anti-expert units: one beside the MLP of every decoder layer (IMAE, section 3.1).

    Attributes:
        intermediate_size: width A of the unit's MLP. The paper uses 4096 for Llama-2-7B, whose own
            MLP is 11008 wide: see `scaled_to`.
    """

    intermediate_size: int

    PAPER_RATIO = 4096 / 11008

    def __post_init__(self):
        if self.intermediate_size < 1:
            raise UserError(f"anti-expert intermediate_size {self.intermediate_size}: it must be at least 1")

    @classmethod
    def scaled_to(cls, config: LlamaConfig, ratio: float = PAPER_RATIO) -> "AntiExpertConfig":
        """A = `ratio` · F, rounded to a multiple of 64 so that it tiles and shards well."""
        return cls(max(64, round(ratio * config.intermediate_size / 64) * 64))


LORA_TARGETS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank deltas on the projections of every layer.

    Attributes:
        rank: inner width.
        alpha: the deltas are scaled by alpha / rank.
        targets: which projections; names of `imae_jax.llama.DecoderLayers`.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"lora.rank {self.rank}: it must be at least 1")
        unknown = [name for name in self.targets if name not in LORA_TARGETS]
        if unknown or not self.targets:
            raise UserError(f"lora targets {unknown} match nothing: use some of {', '.join(LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
