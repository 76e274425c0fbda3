"""Names and layouts of all weights: one row per weight, valid in both directions.

A row's transform only reorders axes, so that a round trip returns every bit. RoPE stays in
HuggingFace's half-split layout.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from imae_jax.config import AntiExpertConfig, LlamaConfig, LoraConfig
from imae_jax.lora import projections


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight (of every layer, where `hf` holds `{layer}`).

    Attributes:
        path: dotted path in `imae_jax.llama.Weights`.
        hf: name in a HuggingFace checkpoint.
        gguf: name in a GGUF file, None where that format has none.
        shape: shape in this library, without a `layers` axis.
        outputs: number of leading axes of the HuggingFace matrix's *output* dimension `shape` ends
            with; 0 for what is stored alike on both sides.
    """

    path: str
    hf: str
    gguf: str | None
    shape: tuple[int, ...]
    outputs: int = 0

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.hf

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if not self.outputs:
            return (int(np.prod(self.shape)),) if self.hf.endswith("bias") else self.shape
        inputs = self.shape[: -self.outputs]
        return (int(np.prod(self.shape[-self.outputs :])), int(np.prod(inputs)))

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """A HuggingFace array `hf_shape` of one in this library's `shape`."""
        if not self.outputs:
            return array.reshape(self.hf_shape)
        return array.reshape(self.hf_shape[::-1]).T

    def hf_name(self, layer: int | None) -> str:
        return self.hf.format(layer=layer)


def base_rows(config: LlamaConfig) -> list[Row]:
    """The rows of a model without units."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim

    def layer(path, hf, gguf, shape, outputs=0):
        return Row(
            f"layers.{path}",
            f"model.layers.{{layer}}.{hf}",
            f"blk.{{layer}}.{gguf}",
            shape,
            outputs,
        )

    # In Llama the norm after attention is the one before the MLP.
    norm_mlp = f"{'pre_feedforward' if config.post_norms else 'post_attention'}_layernorm.weight"
    rows = [
        Row("embed", "model.embed_tokens.weight", "token_embd.weight", (V, D)),
        Row("norm_final", "model.norm.weight", "output_norm.weight", (D,)),
        layer("norm_attn", "input_layernorm.weight", "attn_norm.weight", (D,)),
        layer("wq", "self_attn.q_proj.weight", "attn_q.weight", (D, N, H), 2),
        layer("wk", "self_attn.k_proj.weight", "attn_k.weight", (D, K, H), 2),
        layer("wv", "self_attn.v_proj.weight", "attn_v.weight", (D, K, H), 2),
        layer("wo", "self_attn.o_proj.weight", "attn_output.weight", (N, H, D), 1),
        layer("norm_mlp", norm_mlp, "ffn_norm.weight", (D,)),
        layer("w_gate", "mlp.gate_proj.weight", "ffn_gate.weight", (D, F), 1),
        layer("w_up", "mlp.up_proj.weight", "ffn_up.weight", (D, F), 1),
        layer("w_down", "mlp.down_proj.weight", "ffn_down.weight", (F, D), 1),
    ]
    if config.qk_norm:
        rows += [
            layer("norm_q", "self_attn.q_norm.weight", "attn_q_norm.weight", (H,)),
            layer("norm_k", "self_attn.k_norm.weight", "attn_k_norm.weight", (H,)),
        ]
    if config.post_norms:
        rows += [
            layer("norm_attn_out", "post_attention_layernorm.weight", "post_attention_norm.weight", (D,)),
            layer("norm_mlp_out", "post_feedforward_layernorm.weight", "post_ffw_norm.weight", (D,)),
        ]
    if not config.tie_word_embeddings:
        rows.append(Row("unembed", "lm_head.weight", "output.weight", (D, V), 1))
    if config.qkv_bias:
        rows += [
            layer("bq", "self_attn.q_proj.bias", "attn_q.bias", (N, H)),
            layer("bk", "self_attn.k_proj.bias", "attn_k.bias", (K, H)),
            layer("bv", "self_attn.v_proj.bias", "attn_v.bias", (K, H)),
        ]
    if config.o_bias:
        rows.append(layer("bo", "self_attn.o_proj.bias", "attn_output.bias", (D,)))
    if config.mlp_bias:
        rows += [
            layer("b_gate", "mlp.gate_proj.bias", "ffn_gate.bias", (F,)),
            layer("b_up", "mlp.up_proj.bias", "ffn_up.bias", (F,)),
            layer("b_down", "mlp.down_proj.bias", "ffn_down.bias", (D,)),
        ]
    return rows


def unit_rows(config: LlamaConfig, anti_expert: AntiExpertConfig) -> list[Row]:
    """The rows of the anti-expert units, as stored in `anti_expert.safetensors`."""
    D, A = config.hidden_size, anti_expert.intermediate_size

    def unit(path, hf, shape, outputs=0):
        return Row(f"units.{path}", f"model.layers.{{layer}}.mlp.anti_expert.{hf}", None, shape, outputs)

    return [
        unit("gate", "gate.weight", (D, 2), 1),
        unit("gate_bias", "gate.bias", (2,)),
        unit("w_gate", "gate_proj.weight", (D, A), 1),
        unit("w_up", "up_proj.weight", (D, A), 1),
        unit("w_down", "down_proj.weight", (A, D), 1),
    ]


def lora_rows(config: LlamaConfig, lora: LoraConfig) -> list[Row]:
    """The rows of low-rank deltas, as PEFT stores them in `adapter_model.safetensors`."""
    names = {row.path.removeprefix("layers."): row.hf for row in base_rows(config)}
    rows = []
    for target in lora.targets:
        shape, _, num_inputs = projections(config)[target]
        inputs, outputs = shape[:num_inputs], shape[num_inputs:]
        prefix = "base_model.model." + names[target].removesuffix(".weight")
        rows += [
            Row(f"lora.{target}.a", f"{prefix}.lora_A.weight", None, (*inputs, lora.rank), 1),
            Row(f"lora.{target}.b", f"{prefix}.lora_B.weight", None, (lora.rank, *outputs), len(outputs)),
        ]
    return rows


def expand(rows: list[Row], num_layers: int) -> Iterator[tuple[Row, int | None]]:
    """Every (row, layer) pair; layer is None for weights outside of the layers."""
    for row in rows:
        for layer in range(num_layers) if row.per_layer else (None,):
            yield row, layer
