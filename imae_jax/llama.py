"""The decoder of Llama and its relatives: declaration (Flax NNX) and forward pass (plain JAX).

Letters in einsum strings and shapes:
B batch, T tokens of this call, S key/value slots, D hidden size, F MLP width, A anti-expert MLP width,
N query heads, K key/value heads, G query heads per key/value head, H head dim, V vocabulary, L layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from imae_jax.anti_expert import AntiExpertUnits, unit_forward
from imae_jax.attention import flash_attention
from imae_jax.cache import KVCache, append
from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.errors import UserError
from imae_jax.layers import apply_rope, at_least_float32, gated, matmul, precision, rms_norm, rope_tables
from imae_jax.layers import attention as plain_attention
from imae_jax.lora import delta
from imae_jax.params import AntiExpertParam, Initializer, normal, ones, weight, zeros
from imae_jax.sharding import constrain

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

ATTENTION_KINDS = ("plain", "flash")


def norm_init(config: LlamaConfig) -> Initializer:
    """Of a norm that multiplies by one."""
    return zeros if config.norm_plus_one else ones


class DecoderLayers(nnx.Module):
    """The weights of all layers, stacked along a leading axis, or of one layer (`stack=None`)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, stack: int | None, dtype: jnp.dtype):
        D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
        N, K = config.num_heads, config.num_kv_heads
        init, one = normal(config.initializer_range), norm_init(config)

        def declare(shape, axes, init=init):
            return weight(rngs, shape, axes, init, stack=stack, dtype=dtype)

        self.norm_attn = declare((D,), ("norm",), one)
        self.wq = declare((D, N, H), ("embed", "heads", "head_dim"))
        self.wk = declare((D, K, H), ("embed", "kv_heads", "head_dim"))
        self.wv = declare((D, K, H), ("embed", "kv_heads", "head_dim"))
        self.wo = declare((N, H, D), ("heads", "head_dim", "embed"))
        self.norm_mlp = declare((D,), ("norm",), one)
        self.w_gate = declare((D, F), ("embed", "mlp"))
        self.w_up = declare((D, F), ("embed", "mlp"))
        self.w_down = declare((F, D), ("mlp", "embed"))
        if config.qk_norm:
            self.norm_q = declare((H,), ("head_dim",), one)
            self.norm_k = declare((H,), ("head_dim",), one)
        if config.post_norms:
            self.norm_attn_out = declare((D,), ("norm",), one)
            self.norm_mlp_out = declare((D,), ("norm",), one)
        if config.qkv_bias:
            self.bq = declare((N, H), ("heads", "head_dim"), zeros)
            self.bk = declare((K, H), ("kv_heads", "head_dim"), zeros)
            self.bv = declare((K, H), ("kv_heads", "head_dim"), zeros)
        if config.o_bias:
            self.bo = declare((D,), ("norm",), zeros)
        if config.mlp_bias:
            self.b_gate = declare((F,), ("mlp",), zeros)
            self.b_up = declare((F,), ("mlp",), zeros)
            self.b_down = declare((D,), ("norm",), zeros)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's arrays as plain trees: what `forward` and every compiled function take.

    Attributes:
        base: `embed` [V, D], `norm_final` [D], `unembed` [D, V] (absent when tied) and `layers`: one
            dict of stacked [L, …] arrays, or a tuple with one dict a layer.
        units: the anti-expert units in the same form as `layers`, or None.
        lora: low-rank deltas in the same form as `layers`, `{projection: {a, b}}`, or None.
        shifts: [L, N, H] or a tuple with one [N, H] a layer: what ITI adds to the heads' outputs, or None.
        lora_scale: alpha / rank of the deltas; static.
    """

    base: dict[str, Any]
    units: Any = None
    lora: Any = None
    shifts: Any = None
    lora_scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        return self.base["embed"].dtype


class Llama(nnx.Module):
    """A language model like Llama (see `LlamaConfig`), optionally with an anti-expert unit in every layer.

    The module declares parameters, their names, types and sharding axes; the computation is `forward`
    on `model.weights()`. Base weights are `nnx.Param`, units `AntiExpertParam`, so that
    `nnx.split(model, AntiExpertParam, nnx.Param)` separates what is trained from what is frozen.

    Args:
        config: sizes of the base.
        anti_expert: sizes of the units; None for a plain Llama.
        rngs: for the initializers.
        stacked: layer weights as [L, …] stacks, for training under `lax.scan`; False keeps an array
            per layer and weight, for decoding: a loop that slices a stack copies each layer's weights
            at every token.
        dtype: of the base; the units are float32.
    """

    def __init__(
        self,
        config: LlamaConfig,
        anti_expert: AntiExpertConfig | None = None,
        *,
        rngs: nnx.Rngs,
        stacked: bool = True,
        dtype: jnp.dtype = jnp.float32,
    ):
        self.config = config
        self.anti_expert_config = anti_expert
        self.stacked = stacked
        D, V, L = config.hidden_size, config.vocab_size, config.num_layers
        init = normal(config.initializer_range)
        self.embed = weight(rngs, (V, D), ("vocab", "embed"), init, dtype=dtype)
        self.norm_final = weight(rngs, (D,), ("norm",), norm_init(config), dtype=dtype)
        if not config.tie_word_embeddings:
            self.unembed = weight(rngs, (D, V), ("embed", "vocab"), init, dtype=dtype)

        def per_layer(declare):
            return declare(L) if stacked else nnx.List([declare(None) for _ in range(L)])

        self.layers = per_layer(lambda n: DecoderLayers(config, rngs=rngs, stack=n, dtype=dtype))
        if anti_expert is not None:
            self.units = per_layer(lambda n: AntiExpertUnits(config, anti_expert, rngs=rngs, stack=n))

    def weights(self) -> Weights:
        """The arrays of this model (not copied)."""
        base = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        units = nnx.to_pure_dict(nnx.state(self, AntiExpertParam)).get("units")
        if not self.stacked:
            layer_range = range(self.config.num_layers)
            base["layers"] = tuple(base["layers"][i] for i in layer_range)
            units = None if units is None else tuple(units[i] for i in layer_range)
        return Weights(base, units)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        strength: float | jax.Array = 0.0,
    ) -> jax.Array:
        """Next-token logits, float32 [B, T, V], of tokens [B, T]; see `forward`."""
        weights = self.weights()
        if weights.units is None:
            strength = None
        output = forward(weights, self.config, tokens, attention_mask=attention_mask, strength=strength)
        return project(weights, output.hidden_states)


@dataclasses.dataclass(frozen=True)
class Taps:
    """Which inner values `forward` returns besides its result; off means not computed.

    Attributes:
        hidden_layers: numbers of layers n, 0 ≤ n ≤ L, after which to return the residual stream,
            without the final norm; 0 is the embedding output.
        gates: the gate of every unit.
        heads: the output of every attention head, before `o_proj`.
    """

    hidden_layers: tuple[int, ...] = ()
    gates: bool = False
    heads: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """What `forward` returns.

    Attributes:
        hidden_states: [B, T, D] after the final norm: what `project` turns into logits.
        cache: the updated cache, or None where none was given.
        hidden_layers: one [B, T, D] for each of `Taps.hidden_layers`.
        gates: float32 [L, B, T] with `Taps.gates`, else None.
        heads: [L, B, T, N, H] with `Taps.heads`, else None.
    """

    hidden_states: jax.Array
    cache: KVCache | None
    hidden_layers: tuple[jax.Array, ...]
    gates: jax.Array | None
    heads: jax.Array | None


def forward(
    weights: Weights,
    config: LlamaConfig,
    tokens: jax.Array,
    *,
    attention_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    attend: jax.Array | None = None,
    strength: float | jax.Array | None = None,
    gate_threshold: float | jax.Array | None = None,
    adapter: float | jax.Array | None = None,
    shift: jax.Array | None = None,
    cache: KVCache | None = None,
    taps: Taps = Taps(),
    remat: str = "none",
    attention: str = "plain",
) -> ForwardOutput:
    """Runs the decoder.

    Stacked weights without a cache run under `lax.scan`, everything else as a loop over layers; the
    results are the same.

    Args:
        weights: of the model.
        config: of the base.
        tokens: int32 [B, T].
        attention_mask: bool [B, T], True at tokens that are not padding (default: all).
        positions: int32 [B, T] for RoPE and windows (default: the number of real tokens before each).
        attend: bool [B, T, S], True where a token may look; S is the cache's capacity or T. Default:
            causal, padding excluded. Layers that slide look at no more than their window's part of it.
        strength: the units' `o`, a number or [B]: -1 expert, 0 base, +1 anti-expert. None, or no
            units, runs the base alone and costs nothing extra.
        gate_threshold: gates below it count as closed, a number or [B]. None leaves all as they are.
        adapter: factor of the low-rank deltas, a number or [B]: 1 in adapted rows, 0 in rows of the base;
            or [B, rank], see `lora.adapter_factors`. None, or no deltas, leaves them out.
        shift: float32 [B, T], factor of the heads' shifts at every position. None, or no shifts, leaves them
            out.
        cache: the tokens before; this call's are appended to it. The caller sees to it that
            `cache.length + T` is within its capacity.
        taps: inner values to return.
        remat: what the backward pass keeps of a layer: `none` recomputes nothing, `full` everything,
            `dots` keeps the results of the matmuls with weights. Attention itself, plain or flash, is
            recomputed by `full` and `dots`.
        attention: `plain`, or `flash`: without the [T, T] scores, for training. `flash` needs rows that
            are padded on the right, which is not checked, and gives other hidden states at padding.

    Returns:
        A `ForwardOutput`.

    Raises:
        UserError: a strength but no units; an unknown kind of attention; `flash` with a cache, with
            `attend`, or with what its kernel does not take (see `attention.flash_attention`).
    """
    B, T = tokens.shape
    if attention not in ATTENTION_KINDS:
        raise UserError(f"attention {attention!r} does not exist: use {' or '.join(ATTENTION_KINDS)}")
    if attention == "flash" and (cache is not None or attend is not None):
        raise UserError("attention=flash takes neither a cache nor a mask of its own: use attention=plain")
    units = weights.units
    if strength is None:
        units = None
    elif units is None:
        raise UserError("the model has no anti-expert units: give an IMAE model, or mode base")
    else:
        strength = per_row(strength, B)
        gate_threshold = None if gate_threshold is None else per_row(gate_threshold, B)
    lora = None if adapter is None else weights.lora
    if lora is not None:
        if jnp.ndim(adapter) < 2:
            adapter = per_row(adapter, B)[:, None]
        lora_scale = weights.lora_scale * adapter

    shifts = None if shift is None else weights.shifts

    if attention_mask is None:
        attention_mask = jnp.ones((B, T), bool)
    attention_mask = attention_mask.astype(bool)
    if positions is None:
        positions = jnp.cumsum(attention_mask, axis=-1, dtype=jnp.int32) - 1
        if cache is not None:
            positions = positions + jnp.sum(cache.real, axis=-1, keepdims=True, dtype=jnp.int32)
        positions = jnp.maximum(positions, 0)

    real, start = attention_mask, 0
    if cache is not None:
        start = cache.length
        real = jax.lax.dynamic_update_slice(cache.real, attention_mask, (0, start))
    if attention == "plain" and attend is None:
        slots = jnp.arange(real.shape[1])
        attend = (slots[None, :] <= start + jnp.arange(T)[:, None]) & real[:, None, :]

    # Gathered from a table whose rows are whole: SPMD would otherwise replicate the activations.
    x = jnp.take(constrain(weights.base["embed"], "vocab", None), tokens, axis=0)
    if config.scaled_embedding:
        x = x * jnp.float32(config.hidden_size**0.5).astype(x.dtype)
    x = constrain(x, "batch", "length", "act_embed")

    sliding = tuple(config.layer_slides(i) for i in range(config.num_layers))
    are_alike = len(set(sliding)) == 1
    kinds = {
        slides: _tables_and_mask(config, slides, positions, real, start, attend, x.dtype)
        for slides in set(sliding)
    }

    def attend_to(q, k, v, mask, slides):
        if attention == "plain":
            return plain_attention(q, k, v, mask)
        in_window = functools.partial(flash_attention, window=config.sliding_window)
        if isinstance(slides, bool):
            return (in_window if slides else flash_attention)(q, k, v)
        return jax.lax.cond(slides, in_window, flash_attention, q, k, v)

    def block(x, slides, layer, unit, deltas, head_shift, kv):
        slides = sliding[0] if are_alike else slides
        if isinstance(slides, bool):
            cos, sin, mask = kinds[slides]
        else:
            cos, sin, mask = jax.tree.map(functools.partial(jnp.where, slides), kinds[True], kinds[False])

        def linear(x, name):
            y = matmul(x, layer[name], num_inputs=x.ndim - 2)
            if deltas is not None and name in deltas:
                y = y + delta(deltas[name], x, lora_scale)
            return y

        with jax.named_scope("attention"):
            h = norm(config, x, layer["norm_attn"])
            q, k, v = _queries_keys_values(linear, config, layer, h, cos, sin)
            # An overflow at padding would pass through a weight of 0.
            v = jnp.where(attention_mask[:, None, :, None], v, 0)
            if kv is not None:
                (keys, k), (values, v) = append(kv[0], k, start), append(kv[1], v, start)
                kv = (keys, values)
            heads = attend_to(q, k, v, mask, slides)
            if head_shift is not None:
                heads = heads + (shift[..., None, None] * head_shift).astype(heads.dtype)
            h = linear(heads, "wo")
            if "bo" in layer:
                h = h + layer["bo"]
            if config.post_norms:
                h = norm(config, h, layer["norm_attn_out"])
            x = constrain(x + h, "batch", "length", "act_embed")
        with jax.named_scope("mlp"):
            h = norm(config, x, layer["norm_mlp"])
            out, gate = _mlp(linear, config, layer, h), None
        if unit is not None:
            with jax.named_scope("anti_expert"):
                y, gate = unit_forward(unit, h, strength, gate_threshold, config.activation)
                out = out + y
        if config.post_norms:
            out = norm(config, out, layer["norm_mlp_out"])
        taken = (gate if taps.gates else None, heads if taps.heads else None)
        return constrain(x + out, "batch", "length", "act_embed"), kv, taken

    layers = weights.base["layers"]
    hidden_layers, taken, keys, values = {0: x}, [], [], []
    if isinstance(layers, dict) and cache is None:
        stacks = (None if are_alike else jnp.asarray(sliding), layers, units, lora, shifts)
        x, (hidden_stack, (gates, heads)) = _scan_layers(block, x, stacks, taps, remat)
        if taps.hidden_layers:
            hidden_layers |= {i + 1: hidden_stack[i] for i in range(config.num_layers)}
    else:
        for i in range(config.num_layers):
            kv = None if cache is None else (cache.keys[i], cache.values[i])
            with jax.named_scope(f"layer_{i}"):
                of_layer = (_layer(stack, i) for stack in (layers, units, lora, shifts))
                x, kv, taken_here = block(x, sliding[i], *of_layer, kv)
            hidden_layers[i + 1] = x
            taken.append(taken_here)
            if kv is not None:
                keys.append(kv[0])
                values.append(kv[1])
        gates, heads = (None if parts[0] is None else jnp.stack(parts) for parts in zip(*taken, strict=True))
    if cache is not None:
        cache = KVCache(tuple(keys), tuple(values), real, start + T)
    return ForwardOutput(
        hidden_states=final_norm(weights, config, x),
        cache=cache,
        hidden_layers=tuple(hidden_layers[n] for n in taps.hidden_layers),
        gates=gates,
        heads=heads,
    )


def final_norm(weights: Weights, config: LlamaConfig, x: jax.Array) -> jax.Array:
    """The norm in front of the vocabulary projection. x [..., D]."""
    return norm(config, x, weights.base["norm_final"])


def norm(config: LlamaConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    """A norm of this model's kind. x [..., D], scale [D]."""
    return rms_norm(x, scale, config.rms_norm_eps, plus_one=config.norm_plus_one)


def project(weights: Weights, hidden_states: jax.Array) -> jax.Array:
    """Vocabulary projection: [..., D] to float32 logits [..., V] (float64 in that dtype)."""
    with jax.named_scope("unembed"):
        if "unembed" in weights.base:
            matrix, subscripts = weights.base["unembed"], "...D,DV->...V"
        else:
            matrix, subscripts = weights.base["embed"], "...D,VD->...V"
        dtype = hidden_states.dtype
        return jnp.einsum(
            subscripts,
            hidden_states,
            matrix,
            precision=precision(dtype),
            preferred_element_type=at_least_float32(dtype),
        )


def per_row(value: float | jax.Array, batch_size: int) -> jax.Array:
    """One number, or one per row, as float32 [B]."""
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), (batch_size,))


def _layer(stack: Any, i: int) -> Any:
    if isinstance(stack, dict):
        return jax.tree.map(lambda array: array[i], stack)
    return None if stack is None else stack[i]


def _scan_layers(block, x, stacks, taps, remat):
    def body(x, of_layer):
        x, _, taken = block(x, *of_layer, None)
        return x, (x if taps.hidden_layers else None, taken)

    policy = REMAT_POLICIES[remat]
    if policy is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, x, stacks)


def _tables_and_mask(config, slides, positions, real, start, attend, dtype):
    """RoPE's tables, and where tokens may look (None: flash), of layers that slide or of the others."""
    rope = config.local_rope if slides and config.local_rope is not None else config.rope
    cos, sin = rope_tables(config, rope, positions, dtype)
    if slides and attend is not None:
        # Slots hold padding, and nodes of token trees: a window counts positions.
        of_slots = jnp.cumsum(real, axis=-1, dtype=jnp.int32) - 1
        of_slots = jax.lax.dynamic_update_slice(of_slots, positions, (0, start))
        attend = attend & (positions[:, :, None] - of_slots[:, None, :] < config.sliding_window)
    return cos, sin, attend


def _queries_keys_values(linear, config, layer, h, cos, sin):
    """Queries [B, T, N, H], keys and values [B, K, T, H] of one layer."""
    q = linear(h, "wq")
    k = linear(h, "wk")
    v = linear(h, "wv")
    if "bq" in layer:
        q, k, v = q + layer["bq"], k + layer["bk"], v + layer["bv"]
    if config.qk_norm:
        q, k = norm(config, q, layer["norm_q"]), norm(config, k, layer["norm_k"])
    if config.query_pre_attn_scalar not in (None, config.head_dim):
        # Attention divides by the root of the head dim.
        q = q * (config.head_dim / config.query_pre_attn_scalar) ** 0.5
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    q = constrain(q, "batch", "length", "act_heads", None)
    return q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)


def _mlp(linear, config, layer, h):
    gate = linear(h, "w_gate")
    up = linear(h, "w_up")
    if "b_gate" in layer:
        gate, up = gate + layer["b_gate"], up + layer["b_up"]
    inner = constrain(gated(gate, up, config.activation), "batch", "length", "act_mlp")
    out = linear(inner, "w_down")
    return out + layer["b_down"] if "b_down" in layer else out
