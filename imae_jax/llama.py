"""The decoder of Llama and its relatives: declaration (Flax NNX) and forward pass (plain JAX).

Letters in einsum strings and shapes:
B batch, T tokens of this call, S key/value slots, D hidden size, F MLP width, A anti-expert MLP width,
N query heads, K key/value heads, G query heads per key/value head, H head dim, V vocabulary, L layers.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from imae_jax import layer_stack
from imae_jax.anti_expert import declare_units, unit_forward
from imae_jax.cache import KVCache, append
from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.errors import UserError
from imae_jax.flash_attention import flash_attention
from imae_jax.layers import (
    KEPT,
    apply_rope,
    at_least_float32,
    gated,
    kept,
    matmul,
    precision,
    rms_norm,
    rope_tables,
)
from imae_jax.layers import attention as plain_attention
from imae_jax.lora import delta
from imae_jax.params import Initializer, normal, ones, weight, zeros
from imae_jax.sharding import apart, constrain

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "narrow": jax.checkpoint_policies.save_only_these_names(KEPT),
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
        base: `embed` [V, D], `norm_final` [D], `unembed` [D, V] (absent when tied) and `layers`, in one of
            the two layouts of `imae_jax.layer_stack`.
        units: the anti-expert units in the same layout as `layers`, or None.
        lora: low-rank deltas in the same layout as `layers`, `{projection: {a, b}}`, or None.
        shifts: in the same layout, [L, N, H] or L times [N, H]: what ITI adds to the heads' outputs, or None.
        vectors: in the same layout, [L, D] or L times [D]: what steering adds after each layer, or None.
        lora_scale: alpha / rank of the deltas; static.
    """

    base: dict[str, Any]
    units: Any = None
    lora: Any = None
    shifts: Any = None
    vectors: Any = None
    lora_scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        return self.base["embed"].dtype

    def in_one_dtype(self, casts: dict[int, tuple[Any, Any]]) -> "Weights":
        """The same with units and deltas in the base's dtype, for decoding: results are bit for bit equal.

        `forward` multiplies in this dtype. Of float32 units in a bfloat16 model XLA's GPU programs make it at
        every token, and move four times as many bytes.

        Args:
            casts: arrays that were cast before, with their results, by identity; what is new is added.
                Methods share streams only where they run on the very same arrays.
        """

        def cast(x):
            if x.dtype == self.dtype:
                return x
            if id(x) not in casts:
                abstract = isinstance(x, jax.ShapeDtypeStruct)
                casts[id(x)] = x, (x.update(dtype=self.dtype) if abstract else x.astype(self.dtype))
            return casts[id(x)][1]

        units, lora = jax.tree.map(cast, (self.units, self.lora))
        return dataclasses.replace(self, units=units, lora=lora)


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
        dtype: dtype of the base; the units are float32.
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

        layers = functools.partial(DecoderLayers, config, rngs=rngs, dtype=dtype)
        self.layers = layer_stack.declare(lambda n: layers(stack=n), L, stacked=stacked)
        if anti_expert is not None:
            self.units = declare_units(config, anti_expert, rngs=rngs, stacked=stacked)

    def weights(self) -> Weights:
        """The arrays of this model (not copied)."""
        base = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        base["layers"] = layer_stack.from_state(base["layers"])
        units = None if self.anti_expert_config is None else layer_stack.arrays(self.units)
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
        interventions = Interventions(strength=None if weights.units is None else strength)
        output = forward(
            weights, self.config, tokens, attention_mask=attention_mask, interventions=interventions
        )
        return project(weights, output.hidden_states)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Interventions:
    """What acts on the rows of a batch besides the base's weights; None leaves it out of the program.

    Attributes:
        strength: the units' `o`, a number or [B]: -1 expert, 0 base, +1 anti-expert. None runs the base
            alone.
        adapter: factor of the low-rank deltas, a number or [B]: 1 in adapted rows, 0 in rows of the base; or
            [B, rank], see `lora.adapter_factors`.
        shift: float32 [B, T], factor of the heads' shifts at every position.
        steer: float32 [B, T], factor of the vectors at every position.
        keep_norm: bool [B], rows whose residual stream keeps its norm where a vector is added.
        skip: bool [B, L], layers that a row passes by.
    """

    strength: float | jax.Array | None = None
    adapter: float | jax.Array | None = None
    shift: jax.Array | None = None
    steer: jax.Array | None = None
    keep_norm: jax.Array | None = None
    skip: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeLayout:
    """Where tokens stand that are no plain sequence, such as the nodes of token trees.

    Attributes:
        positions: int32 [B, T], for RoPE and windows.
        attend: bool [B, T, S], True where a token may look; S is the cache's capacity or T. Layers that slide
            look at no more than their window's part of it.
    """

    positions: jax.Array
    attend: jax.Array


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


@dataclasses.dataclass(frozen=True)
class Options:
    """How `forward` computes; static.

    Attributes:
        taps: inner values to return.
        remat: what the backward pass keeps of a layer: `none` recomputes nothing, `full` everything,
            `dots` keeps the results of the matmuls with weights, `narrow` those but for the base's MLP, the
            widest. Attention itself, plain or flash, is recomputed by all but `none`.
        attention: `plain`, or `flash`: without the [T, T] scores, for training. `flash` needs rows that
            are padded on the right, which is not checked, and gives other hidden states at padding.

    Raises:
        UserError: an unknown kind of attention.
    """

    taps: Taps = Taps()
    remat: str = "none"
    attention: str = "plain"

    def __post_init__(self):
        if self.attention not in ATTENTION_KINDS:
            raise UserError(
                f"attention {self.attention!r} does not exist: use {' or '.join(ATTENTION_KINDS)}"
            )


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
    tree: TreeLayout | None = None,
    interventions: Interventions = Interventions(),
    cache: KVCache | None = None,
    options: Options = Options(),
) -> ForwardOutput:
    """Runs the decoder.

    Stacked weights without a cache run under `lax.scan`, everything else as a loop over layers; the
    results are the same.

    Args:
        weights: model weights.
        config: base model configuration.
        tokens: int32 [B, T].
        attention_mask: bool [B, T], True at tokens that are not padding (default: all).
        tree: positions and visibility of tokens that are no plain sequence. Default: a token's position is
            the number of real tokens before it, and it looks at these and itself.
        interventions: what acts on the rows besides the base.
        cache: the tokens before; this call's are appended to it. The caller sees to it that
            `cache.length + T` is within its capacity.
        options: what to return, and how to compute it.

    Returns:
        A `ForwardOutput`.

    Raises:
        UserError: a strength but no units; attention `flash` with a cache, with a tree, or with what its
            kernel does not take (see `flash_attention.flash_attention`).
    """
    if options.attention == "flash" and (cache is not None or tree is not None):
        raise UserError("attention=flash takes neither a cache nor a mask of its own: use attention=plain")
    if attention_mask is None:
        attention_mask = jnp.ones(tokens.shape, bool)
    call = _prepare(weights, config, attention_mask.astype(bool), tree, interventions, cache, options)

    # Gathered from a table whose rows are whole: SPMD would otherwise replicate the activations.
    x = jnp.take(constrain(weights.base["embed"], "vocab", None), tokens, axis=0)
    if config.scaled_embedding:
        x = x * jnp.float32(config.hidden_size**0.5).astype(x.dtype)
    x = constrain(x, "batch", "length", "act_embed")

    stack = LayerWeights(
        base=weights.base["layers"],
        unit=None if interventions.strength is None else weights.units,
        lora=None if interventions.adapter is None else weights.lora,
        shift=None if interventions.shift is None else weights.shifts,
        vector=None if interventions.steer is None else weights.vectors,
        skip=None if interventions.skip is None else interventions.skip.T,
    )
    if layer_stack.is_stacked(stack.base) and cache is None:
        x, after, gates, heads = _scan_layers(call, stack, x)
    else:
        x, after, gates, heads, cache = _loop_layers(call, stack, x, cache)
    return ForwardOutput(
        hidden_states=final_norm(weights, config, x),
        cache=cache,
        hidden_layers=tuple(after[n] for n in options.taps.hidden_layers),
        gates=gates,
        heads=heads,
    )


class LayerWeights(NamedTuple):
    """What `layer_forward` takes of one layer, or of all in a layout of `imae_jax.layer_stack`; None where no
    row has such an intervention."""

    base: Any
    unit: Any
    lora: Any
    shift: Any
    vector: Any
    skip: Any


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the layers of one call of `forward` share.

    Attributes:
        strength, lora_scale: float32 [B] and [B, rank or 1], or None.
        shift, steer, keep_norm: see `Interventions`.
        is_token: bool [B, T], of this call's tokens those that are not padding.
        in_use: bool [B, S], slots that hold such a token.
        start: the slot of the first new token.
        slides: whether each layer slides.
        kinds: RoPE's tables, and where tokens may look, of layers that slide and of the others.
    """

    config: LlamaConfig
    options: Options
    strength: jax.Array | None
    lora_scale: jax.Array | None
    shift: jax.Array | None
    steer: jax.Array | None
    keep_norm: jax.Array | None
    is_token: jax.Array
    in_use: jax.Array
    start: int | jax.Array
    slides: tuple[bool, ...]
    kinds: dict[bool, tuple[jax.Array, jax.Array, jax.Array | None]]

    @property
    def slides_alike(self) -> bool:
        return len(set(self.slides)) == 1

    def kind(self, slides: bool | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Tables and mask of a layer; under `lax.scan` whether it slides is a traced bool."""
        if isinstance(slides, bool):
            return self.kinds[slides]
        return jax.tree.map(functools.partial(jnp.where, slides), self.kinds[True], self.kinds[False])


def _prepare(weights, config, is_token, tree, interventions, cache, options) -> _Call:
    B, T = is_token.shape
    strength, adapter = interventions.strength, interventions.adapter
    if strength is not None:
        if weights.units is None:
            raise UserError("the model has no anti-expert units: give an IMAE model, or mode base")
        strength = per_row(strength, B)
    lora_scale = None
    if adapter is not None and weights.lora is not None:
        factors = adapter if jnp.ndim(adapter) == 2 else per_row(adapter, B)[:, None]
        lora_scale = weights.lora_scale * factors

    in_use, start = is_token, 0
    if cache is not None:
        start = cache.length
        in_use = jax.lax.dynamic_update_slice(cache.real, is_token, (0, start))
    if tree is not None:
        positions, attend = tree.positions, tree.attend
    else:
        positions, attend = jnp.cumsum(is_token, axis=-1, dtype=jnp.int32) - 1, None
        if cache is not None:
            positions = positions + jnp.sum(cache.real, axis=-1, keepdims=True, dtype=jnp.int32)
        positions = jnp.maximum(positions, 0)
        if options.attention == "plain":
            slots = jnp.arange(in_use.shape[1])
            attend = (slots[None, :] <= start + jnp.arange(T)[:, None]) & in_use[:, None, :]

    slides, dtype = tuple(config.layer_slides(i) for i in range(config.num_layers)), weights.dtype
    kinds = {
        kind: _tables_and_mask(config, kind, positions, in_use, start, attend, dtype) for kind in set(slides)
    }
    return _Call(
        config,
        options,
        strength,
        lora_scale,
        interventions.shift,
        interventions.steer,
        interventions.keep_norm,
        is_token,
        in_use,
        start,
        slides,
        kinds,
    )


def _scan_layers(call: _Call, stack: LayerWeights, x: jax.Array):
    taps, num_layers = call.options.taps, call.config.num_layers
    slides = None if call.slides_alike else jnp.asarray(call.slides)

    def body(x, layer):
        slides, weights = layer
        x, _, tapped = layer_forward(call, call.slides[0] if slides is None else slides, weights, x, None)
        return x, (x if taps.hidden_layers else None, tapped)

    policy, first = REMAT_POLICIES[call.options.remat], x
    if policy is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    x, (hidden, (gates, heads)) = jax.lax.scan(body, x, (slides, stack))
    after = {0: first}
    if taps.hidden_layers:
        after |= {i + 1: hidden[i] for i in range(num_layers)}
    return x, after, gates, heads


def _loop_layers(call: _Call, stack: LayerWeights, x: jax.Array, cache: KVCache | None):
    after, tapped, caches = {0: x}, [], []
    for i, slides in enumerate(call.slides):
        weights = LayerWeights(*(layer_stack.layer(each, i) for each in stack))
        kv = None if cache is None else (cache.keys[i], cache.values[i])
        with jax.named_scope(f"layer_{i}"):
            x, kv, tapped_here = layer_forward(call, slides, weights, x, kv)
        after[i + 1] = x
        tapped.append(tapped_here)
        caches.append(kv)
    gates, heads = (None if each[0] is None else jnp.stack(each) for each in zip(*tapped, strict=True))
    if cache is not None:
        keys, values = zip(*caches, strict=True)
        cache = KVCache(keys, values, call.in_use, call.start + call.is_token.shape[1])
    return x, after, gates, heads, cache


def layer_forward(
    call: _Call,
    slides: bool | jax.Array,
    weights: LayerWeights,
    x: jax.Array,
    kv: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None, tuple[jax.Array | None, jax.Array | None]]:
    """One decoder layer.

    Args:
        call: what it shares with the others.
        slides: whether it looks at a window only.
        weights: this layer's.
        x: the residual stream [B, T, D].
        kv: its slots of the cache, or None.

    Returns:
        The residual stream after it, its slots with this call's keys and values, and what `Taps` ask for: the
        gate, float32 [B, T], and the heads' outputs [B, T, N, H].
    """
    config, layer, taps, before = call.config, weights.base, call.options.taps, x

    def linear(x, name):
        y = matmul(x, layer[name], num_inputs=x.ndim - 2)
        if weights.lora is not None and name in weights.lora:
            y = y + delta(weights.lora[name], x, call.lora_scale)
        return y if name in ("w_gate", "w_up") else kept(y)

    with jax.named_scope("attention"):
        h = norm(config, x, layer["norm_attn"])
        heads, kv = _attention(call, slides, linear, layer, h, kv)
        if weights.shift is not None:
            heads = heads + (call.shift[..., None, None] * weights.shift).astype(heads.dtype)
        h = linear(heads, "wo")
        if "bo" in layer:
            h = h + layer["bo"]
        if config.post_norms:
            h = norm(config, h, layer["norm_attn_out"])
        x = constrain(x + h, "batch", "length", "act_embed")
    with jax.named_scope("mlp"):
        h = norm(config, x, layer["norm_mlp"])
        out, gate = _mlp(linear, config, layer, h), None
    if weights.unit is not None:
        with jax.named_scope("anti_expert"):
            y, gate = unit_forward(weights.unit, h, call.strength, config.activation)
            out = out + y
    if config.post_norms:
        out = norm(config, out, layer["norm_mlp_out"])
    x = constrain(x + out, "batch", "length", "act_embed")
    if weights.vector is not None:
        with jax.named_scope("steer"):
            x = steered(x, weights.vector, call.steer, call.keep_norm)
    tapped = (gate if taps.gates else None, heads if taps.heads else None)
    if weights.skip is not None:
        x = jnp.where(weights.skip[:, None, None], before, x)
    return x, kv, tapped


def steered(x: jax.Array, vector: jax.Array, factor: jax.Array, keep_norm: jax.Array | None) -> jax.Array:
    """The residual stream x [B, T, D] plus a vector [D] times `factor`, float32 [B, T]; in rows of
    `keep_norm`, bool [B], at its old norm where something was added."""
    moved = x + (factor[..., None] * vector).astype(x.dtype)
    if keep_norm is None:
        return moved
    old, new = (jnp.linalg.norm(h.astype(at_least_float32(h.dtype)), axis=-1) for h in (x, moved))
    # A stream that the vector cancels has no direction left to keep a norm in.
    scale = jnp.where(keep_norm[:, None] & (factor != 0) & (new > 0), old / new, 1)
    return (scale[..., None] * moved).astype(x.dtype)


def _attention(call, slides, linear, layer, h, kv):
    """The heads' outputs [B, T, N, H], and the layer's slots with the new keys and values."""
    cos, sin, mask = call.kind(slides)
    q, k, v = _queries_keys_values(linear, call.config, layer, h, cos, sin)
    # An overflow at padding would pass through a weight of 0.
    v = jnp.where(call.is_token[:, None, :, None], v, 0)
    if kv is not None:
        (keys, k), (values, v) = append(kv[0], k, call.start), append(kv[1], v, call.start)
        kv = (keys, values)
    if call.options.attention == "plain":
        return plain_attention(q, k, v, mask), kv
    in_window = functools.partial(flash_attention, window=call.config.sliding_window)
    if isinstance(slides, bool):
        return (in_window if slides else flash_attention)(q, k, v), kv
    return jax.lax.cond(slides, in_window, flash_attention, q, k, v), kv


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


def _tables_and_mask(config, slides, positions, in_use, start, attend, dtype):
    """RoPE's tables, and where tokens may look (None: flash), of layers that slide or of the others."""
    rope = config.local_rope if slides and config.local_rope is not None else config.rope
    cos, sin = rope_tables(config, rope, positions, dtype)
    if slides and attend is not None:
        # Slots hold padding, and nodes of token trees: a window counts positions.
        slot_positions = jnp.cumsum(in_use, axis=-1, dtype=jnp.int32) - 1
        slot_positions = jax.lax.dynamic_update_slice(slot_positions, positions, (0, start))
        attend = attend & (positions[:, :, None] - slot_positions[:, None, :] < config.sliding_window)
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
    up = linear(apart(h), "w_up")
    if "b_gate" in layer:
        gate, up = gate + layer["b_gate"], up + layer["b_up"]
    inner = constrain(gated(gate, up, config.activation), "batch", "length", "act_mlp")
    out = linear(inner, "w_down")
    return out + layer["b_down"] if "b_down" in layer else out
