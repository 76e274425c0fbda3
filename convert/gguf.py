"""GGUF files of Llama-like models: config, tensors and tokenizer.

llama.cpp's converter reorders the rows of q and k from HuggingFace's half-split RoPE layout to
interleaved pairs (for the `llama` architecture alone), and adds 1 to the weights of Gemma's norms, in
float32; reading undoes both. A norm's bfloat16 weight of magnitude 2⁻¹⁶ or more comes back bit for bit, any
other to 2⁻²⁴.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from imae_jax.batching import round_up
from imae_jax.config import NUMBER, LlamaConfig, RopeConfig, check_kinds
from imae_jax.convert import gguf_tokenizer
from imae_jax.convert.gguf_file import read_gguf
from imae_jax.convert.identity import BLOCK_ROWS, TensorFiles
from imae_jax.convert.table import base_rows, expand
from imae_jax.errors import UserError
from imae_jax.tokenizer import Tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
# What files of Gemma 3 leave to llama.cpp.
GEMMA3_WINDOW_PATTERN, GEMMA3_LOCAL_THETA, LAYERS_OF_GEMMA3_27B = 6, 10000.0, 62
ROPE_FACTORS = "rope_freqs.weight"
# Metadata that are numbers, after the architecture's name.
NUMBERS = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.layer_norm_rms_epsilon", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa"),
    *("rope.scaling.factor", "rope.scale_linear"),
)


class GGUFSource(TensorFiles):
    """The tensors of a GGUF file, whole or in parts, as a `TensorSource`, dequantized to float32 when read.

    Args:
        path: path of the file, or of any of the parts that lie in one directory.

    Raises:
        UserError: the file is damaged, or is not of a Llama-architecture model.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, path: Path):
        super().__init__()
        self.location = str(path)
        self.metadata, tensors = read_gguf(path)
        self._architecture = self._get("general.architecture")
        self._refuse_experts(tensors)
        if self._architecture not in ARCHITECTURES:
            raise UserError(
                f"{path} is of architecture {self._architecture!r}: only "
                f"{' and '.join(ARCHITECTURES)} can be loaded"
            )
        self.config = self._read_config(tensors)
        names = {
            row.gguf.format(layer=layer): row.hf_name(layer)
            for row, layer in expand(base_rows(self.config), self.config.num_layers)
        }
        self._tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
        self.shapes = {name: tensor.shape[::-1] for name, tensor in self._tensors.items()}
        self.dtypes = dict.fromkeys(self.shapes, self.dtype)

    def _blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        tensor, num_rows, head_dim = self._tensors[name], BLOCK_ROWS, None
        if self._architecture == "llama" and re.search(r"\.self_attn\.[qk]_proj\.", name):
            head_dim = self.config.head_dim
            num_rows = round_up(BLOCK_ROWS, head_dim)
            if self.shapes[name][0] % head_dim:
                raise UserError(
                    f"{name} in {self.location} has {self.shapes[name][0]} rows, which heads of {head_dim} "
                    "do not fill: download it again"
                )
        for stored, block in tensor.blocks(num_rows):
            block = block[0] if len(tensor.shape) == 1 else block
            if self._architecture == "gemma3" and name.endswith("norm.weight"):
                block = block - np.float32(1)
            yield stored, block if head_dim is None else _half_split(block, head_dim)

    def _stored_dtype(self, name: str) -> str:
        return self._tensors[name].type.name

    def _get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(key, default)

    def _read_config(self, tensors: dict[str, Any]) -> LlamaConfig:
        prefix = self._architecture
        numbers = (f"{prefix}.{name}" for name in NUMBERS)
        check_kinds(self.metadata, NUMBER, "a number", *numbers, where=self.location)
        check_kinds(self.metadata, str, "a text", f"{prefix}.rope.scaling.type", where=self.location)

        def required(key):
            value = self._get(f"{prefix}.{key}")
            if value is None:
                raise UserError(f"{self.location} has no number {prefix}.{key}: download it again")
            return value

        num_heads = int(required("attention.head_count"))
        hidden_size = int(required("embedding_length"))
        head_dim = int(self._get(f"{prefix}.attention.key_length") or hidden_size // max(num_heads, 1))
        rope = self._read_rope(tensors, head_dim)
        embedding = tensors.get("token_embd.weight")
        if embedding is None:
            raise UserError(f"{self.location} has no token_embd.weight: download it again")

        num_layers = int(required("block_count"))
        if num_layers > len(tensors):
            raise UserError(f"{self.location} has fewer tensors than layers: download it again")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if self._get(f"{prefix}.{name}"):
                raise UserError(f"{name} of {self.location} is not supported: only models without it are")
        gemma3, sliding_layers = prefix == "gemma3", self._sliding_layers(num_layers)
        local_rope = query_pre_attn_scalar = None
        if gemma3:
            theta = self._get(f"{prefix}.rope.freq_base_swa", GEMMA3_LOCAL_THETA)
            local_rope = RopeConfig(theta=float(theta)) if sliding_layers else None
            is_27b = num_layers == LAYERS_OF_GEMMA3_27B
            query_pre_attn_scalar = hidden_size // max(num_heads, 1) if is_27b else head_dim

        def has(suffix):
            return any(name.endswith(suffix) for name in tensors)

        return LlamaConfig(
            vocab_size=int(embedding.shape[-1]),
            hidden_size=hidden_size,
            intermediate_size=int(required("feed_forward_length")),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(self._get(f"{prefix}.attention.head_count_kv") or num_heads),
            head_dim=head_dim,
            max_position_embeddings=int(required("context_length")),
            rms_norm_eps=float(required("attention.layer_norm_rms_epsilon")),
            rope=rope,
            tie_word_embeddings="output.weight" not in tensors,
            qkv_bias=has("attn_q.bias"),
            o_bias=has("attn_output.bias"),
            mlp_bias=has("ffn_gate.bias"),
            activation="gelu_pytorch_tanh" if gemma3 else "silu",
            qk_norm=prefix in ("qwen3", "gemma3"),
            post_norms=gemma3,
            norm_plus_one=gemma3,
            scaled_embedding=gemma3,
            query_pre_attn_scalar=query_pre_attn_scalar,
            sliding_window=int(required("attention.sliding_window")) if sliding_layers else None,
            sliding_layers=sliding_layers,
            local_rope=local_rope,
        )

    def _read_rope(self, tensors: dict[str, Any], head_dim: int) -> RopeConfig:
        """Names and defaults as in GGUF's specification and llama.cpp's loader: scaling without a type is
        linear, and converters wrote `scale_linear` before November 2023.
        """

        def get(key, default=None):
            return self._get(f"{self._architecture}.rope.{key}", default)

        rotated = get("dimension_count", head_dim)
        if rotated != head_dim:
            raise UserError(
                f"RoPE of {self.location} rotates {rotated} of a head's {head_dim} dimensions: only models "
                "that rotate whole heads can be loaded"
            )
        scaling = get("scaling.type", "linear")
        if scaling not in ("none", "linear"):
            raise UserError(
                f"RoPE scaling {scaling!r} of {self.location} is not supported: use the model's "
                "HuggingFace checkpoint, or one with none or linear scaling"
            )
        theta = float(get("freq_base", 10000.0))
        if ROPE_FACTORS in tensors:
            factors = tensors[ROPE_FACTORS].read().ravel().tolist()
            return RopeConfig("frequency_factors", theta, frequency_factors=tuple(factors))
        factor = float(get("scaling.factor", get("scale_linear", 0.0))) or 1.0
        if scaling == "none" or factor == 1.0:
            return RopeConfig(theta=theta)
        return RopeConfig("linear", theta, factor=factor)

    def _refuse_experts(self, tensors: dict[str, Any]) -> None:
        has_experts = bool(self._get(f"{self._architecture}.expert_count"))
        if has_experts or any("_exps." in name for name in tensors):
            raise UserError(
                f"{self.location} is a mixture of experts (architecture {self._architecture!r}): only models "
                "without experts can be loaded"
            )

    def _sliding_layers(self, num_layers: int) -> tuple[bool, ...]:
        """For every layer whether it slides: of `llama` all (Mistral) or none, of `gemma3` by a pattern."""
        prefix = self._architecture
        pattern = self._get(f"{prefix}.attention.sliding_window_pattern")
        if prefix == "gemma3":
            pattern = GEMMA3_WINDOW_PATTERN if pattern is None else pattern
            if isinstance(pattern, list):
                return tuple(map(bool, pattern)) if any(pattern) else ()
            if type(pattern) is not int or pattern < 1:
                raise UserError(
                    f"attention.sliding_window_pattern of {self.location} is {pattern!r}: an integer of at "
                    "least 1, or a list, is needed"
                )
            return tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
        if not self._get(f"{prefix}.attention.sliding_window"):
            return ()
        if prefix != "llama" or pattern is not None:
            raise UserError(
                f"attention.sliding_window of {self.location} is not supported, since the file does not say "
                f"in which layers of {prefix} it holds: use the model's HuggingFace checkpoint"
            )
        return (True,) * num_layers

    def end_token_ids(self, tokenizer: Tokenizer) -> set[int]:
        """Tokens that end a text, a turn or a message."""
        return gguf_tokenizer.end_token_ids(self.metadata, tokenizer)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the file's metadata describe; see `gguf_tokenizer.read_tokenizer`."""
        length = self.config.max_position_embeddings
        return gguf_tokenizer.read_tokenizer(self.metadata, self.location, self._architecture, length)


def _half_split(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows [heads·H, …] of q or k."""
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
