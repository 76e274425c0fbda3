"""Frozen, hashable configurations of the base LLM and of the anti-expert units."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from imae_jax.errors import UserError

MODEL_TYPES = ("llama", "qwen2")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "frequency_factors")


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
        low_freq_factor, high_freq_factor, original_max_position_embeddings: of `llama3`.
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
                f"{', '.join(ROPE_TYPES[:4])}"
            )
        if not 1.0 <= self.factor < float("inf"):
            raise UserError(f"rope factor {self.factor} is not 1 or above: check the model's config")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
        if partial != 1.0:
            raise UserError(
                f"partial_rotary_factor {partial} is not supported: only models that rotate "
                "whole heads can be loaded"
            )
        fields = {"factor", "low_freq_factor", "high_freq_factor"} & rope.keys()
        original = (
            rope.get("original_max_position_embeddings")
            or hf.get("original_max_position_embeddings")
            or cls.original_max_position_embeddings
        )
        return cls(
            type=rope_type,
            theta=float(theta),
            original_max_position_embeddings=int(original),
            **{name: float(rope[name]) for name in fields},
        )

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of a HuggingFace config."""
        if self.type == "frequency_factors":
            raise UserError(
                "the model's RoPE is stored as a table of frequency factors, which HuggingFace's "
                "config cannot express: convert from the model's HuggingFace checkpoint instead"
            )
        rope = {"rope_type": self.type, "rope_theta": self.theta}
        if self.type != "default":
            rope["factor"] = self.factor
        if self.type == "llama3":
            rope |= {
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
                "original_max_position_embeddings": self.original_max_position_embeddings,
            }
        return rope


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a Llama-architecture decoder.

    `qkv_bias` and `o_bias` are two flags because Qwen2 has the first alone, and a checkpoint with
    ITI's intervention baked in the second alone.
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                value = getattr(self, field.name)
                raise UserError(f"{field.name} is {value}: it must be at least 1")
        for name, value in (("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope.theta)):
            if not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}: it must be above 0 and finite")
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
        if model_type not in MODEL_TYPES:
            raise UserError(
                f"model_type {model_type!r} is not supported: use one of {', '.join(MODEL_TYPES)}"
            )
        if hf.get("hidden_act", "silu") != "silu":
            raise UserError(f"hidden_act {hf['hidden_act']!r} is not supported: only silu is")
        if hf.get("use_sliding_window"):
            raise UserError("use_sliding_window is not supported: only full attention is")
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        for name in required:
            if not isinstance(hf.get(name), int):
                raise UserError(f"{name} in the model's config is {hf.get(name)!r}: an integer")
        num_heads = hf["num_attention_heads"]
        attention_bias = bool(hf.get("attention_bias", False))
        try:
            return cls(
                vocab_size=hf["vocab_size"],
                hidden_size=hf["hidden_size"],
                intermediate_size=hf["intermediate_size"],
                num_layers=hf["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=int(hf.get("num_key_value_heads") or num_heads),
                head_dim=int(hf.get("head_dim") or hf["hidden_size"] // max(num_heads, 1)),
                max_position_embeddings=int(hf.get("max_position_embeddings") or 2048),
                rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
                rope=RopeConfig.from_hf(hf),
                tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
                qkv_bias=attention_bias or model_type == "qwen2",
                o_bias=attention_bias,
                mlp_bias=bool(hf.get("mlp_bias", False)),
                initializer_range=float(hf.get("initializer_range", 0.02)),
            )
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"the model's config holds a value of a wrong type: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """The model's part of a HuggingFace `config.json`, readable by transformers 4.5x and 5."""
        rope = self.rope.to_hf()
        legacy = {name: value for name, value in rope.items() if name != "rope_theta"}
        qwen2 = self.qkv_bias and not self.o_bias
        if self.o_bias and not self.qkv_bias:
            raise UserError(
                "a bias on o_proj alone has no HuggingFace config: transformers' attention_bias "
                "means q, k, v and o together"
            )
        if qwen2 and self.mlp_bias:
            raise UserError(
                "biases on q, k, v and the MLP but not on o_proj have no HuggingFace config: "
                "transformers' Qwen2 has none on the MLP, its Llama has them on all of q, k, v and o"
            )
        hf = {
            "model_type": "qwen2" if qwen2 else "llama",
            "architectures": ["Qwen2ForCausalLM" if qwen2 else "LlamaForCausalLM"],
            "hidden_act": "silu",
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
        if not qwen2:
            hf |= {"attention_bias": self.o_bias, "mlp_bias": self.mlp_bias}
        return hf


def _refuse_experts(hf: Mapping[str, Any]) -> None:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if hf.get(name):
            raise UserError(
                f"the model is a mixture of experts ({name} {hf[name]}): only models without experts can be "
                "loaded"
            )


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
