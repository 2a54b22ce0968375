"""Softmax attention behind one entry, :func:`attend`.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads (K divides N), H head width.
"""

import jax
import jax.numpy as jnp

# Large enough to vanish after the softmax in float32, small enough not to overflow in bfloat16.
MASKED = -1e30


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v with grouped-query heads; the softmax is taken in float32.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H]; head n reads key/value head n // (N / K).
        mask: True where a query may read a key; [B, T, S], or None for everything. A query that may read
            nothing returns zeros, so that padding never produces NaN.
        scale: 1 / sqrt(H) unless given.

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    b, t, n, h = q.shape
    kv = k.shape[2]
    scale = h**-0.5 if scale is None else scale
    # Heads before tokens: both products are then plain batched matmuls on every backend.
    q = jnp.moveaxis(q.reshape(b, t, kv, n // kv, h), 1, 3)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        allowed = mask[:, None, None]
        scores = jnp.where(allowed, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None:
        weights = jnp.where(jnp.any(allowed, axis=-1, keepdims=True), weights, 0.0)
    out = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, n, h)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[..., T, N*H] -> [..., T, N, H]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., T, N, H] -> [..., T, N*H]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
