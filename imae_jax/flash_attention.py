"""Causal attention that does not build the [T, T] scores, for training. Letters: see `imae_jax.llama`.

The kernels are those of cuDNN and of JAX (the algorithm: Dao et al., arXiv 2205.14135).
"""

import jax
import jax.numpy as jnp

from imae_jax import layers, sharding
from imae_jax.errors import UserError, first_line

TPU_LANES = 128


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    platform: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal grouped-query attention whose memory grows with T, not with T².

    It takes no mask: rows may be padded on the right only, where causality alone keeps real tokens from
    seeing padding. What comes out at padding is finite and means nothing.

    GPUs run cuDNN's kernel and TPUs JAX's splash attention, each device on its own rows and heads under
    the ambient mesh. Other devices run plain attention, which does build the scores.

    Args:
        q: [B, T, N, H]; bfloat16 or float16 on GPUs, bfloat16 on TPUs.
        k, v: [B, K, T, H] in the dtype of `q`, where K divides N.
        window: the most tokens that a token attends to, itself included; None for all before it.
        platform: `gpu`, `tpu` or another; the default is `sharding.platform`'s.
        interpret: runs the TPU's kernel as plain operations on any device, in any dtype.

    Returns:
        [B, T, N, H] in the dtype of `q`.

    Raises:
        UserError: the kernel does not take this dtype or head dimension, or cuDNN is missing or too old.
    """

    # Chosen while tracing. `jax.lax.platform_dependent` traces every platform's code: cuDNN's raises where
    # there is no cuDNN, and the gradient would keep every branch's residuals, the plain one's scores too.
    platform = platform or sharding.platform()

    def attention(q, k, v):
        if platform == "tpu":
            return _splash(q, k, v, window, interpret)
        return _cudnn(q, k, v, window) if platform == "gpu" else _plain(q, k, v, window)

    # "length" is not among the names: each device needs all tokens of its rows, whatever that rule says.
    query_axes, key_axes = ("batch", None, "act_heads", None), ("batch", "act_heads", None, None)
    return sharding.on_shards(attention, (query_axes, key_axes, key_axes), query_axes)(q, k, v)


def _plain(q, k, v, window):
    T = q.shape[1]
    attend = jnp.tri(T, dtype=bool)
    if window is not None:
        attend &= ~jnp.tri(T, k=-window, dtype=bool)
    return layers.attention(q, k, v, attend[None])


def _cudnn(q, k, v, window):
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention=flash on a GPU takes bfloat16 or float16, not {q.dtype}: set dtype=bfloat16 or "
            "attention=plain"
        )
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"attention=flash does not run on this GPU with this model ({reason}): set attention=plain"
        ) from error


def _splash(q, k, v, window, interpret):
    # Here and not above: an experimental module, of which only TPUs have need.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (T, N, H), dtype = q.shape[1:], q.dtype
    # Its products take no precision, and would multiply float32 in fewer bits there.
    if dtype != jnp.bfloat16 and not interpret:
        raise UserError(
            f"attention=flash on a TPU takes bfloat16, not {dtype}: set dtype=bfloat16 or attention=plain"
        )
    tiles = -(-T // TPU_LANES)
    block = TPU_LANES * max(n for n in (1, 2, 3, 4) if tiles % n == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    shape = (tiles * TPU_LANES,) * 2
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), offset=0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    padding = (0, tiles * TPU_LANES - T)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), padding, (0, 0))) for x in (jnp.swapaxes(q, 1, 2), k, v))
    q = (q * H**-0.5).astype(dtype)
    out = jax.vmap(kernel)(q, k, v)
    return jnp.swapaxes(out[:, :, :T], 1, 2)
