"""Attention whose scores are made whole: what :mod:`attention` and :mod:`attention_gathered` do with a block.

Letters as in ``attention.py``: q [B, K, G, T, H], k and v [B, K, S, H], mask bool [B, T or 1, S] or None for
everything.
"""

import jax
import jax.numpy as jnp

# Large enough to vanish after the softmax in float32, small enough not to overflow in bfloat16.
MASKED = -1e30


def _scores(q, k, mask, scale):
    """[B, K, G, T, S] in float32, MASKED where nothing may be read, and the mask in that shape or None."""
    scores = _by_query("bkqh,bksh->bkqs", q, k, jnp.float32) * scale
    if mask is None:
        return scores, None
    allowed = mask[:, None, None]
    return jnp.where(allowed, scores, MASKED), allowed


def attended(q, k, v, mask, scale):
    """The result [B, K, G, T, H]; JAX makes its derivative."""
    scores, allowed = _scores(q, k, mask, scale)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None:
        weights = jnp.where(jnp.any(allowed, axis=-1, keepdims=True), weights, 0.0)
    return _by_query("bkqs,bksh->bkqh", weights.astype(v.dtype), v)


def _by_query(letters, a, b, dtype=None):
    """`a` [B, K, G, T, x] times `b` [B, K, S, x]; q are the queries of all heads that share keys."""
    out = jnp.einsum(letters, a.reshape(*a.shape[:2], -1, a.shape[-1]), b, preferred_element_type=dtype)
    return out.reshape(*a.shape[:-1], out.shape[-1])


def _over_queries(a, b):
    """Sum over the queries of all heads that share keys: [B, K, G, T, S] and [B, K, G, T, H] -> [B, K, S, H].

    One axis is summed over: over two, XLA's CPU backend takes three times as long.
    """
    a, b = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (a, b))
    return jnp.einsum("bkqs,bkqh->bksh", a, b)


def forward(q, k, v, mask, scale):
    """The result, and the logarithm of the sum of exponentials [B, K, G, T, 1]; 0 where nothing is read."""
    scores = _scores(q, k, mask, scale)[0]
    top = jnp.max(scores, axis=-1, keepdims=True)
    raised = jnp.exp(scores - top)
    total = jnp.sum(raised, axis=-1, keepdims=True)
    # Divided after the product, where there are H numbers a query and not S.
    out = _by_query("bkqs,bksh->bkqh", raised.astype(v.dtype), v, jnp.float32) / total
    total = top + jnp.log(total)
    if mask is not None:
        read = top > MASKED / 2
        out, total = jnp.where(read, out, 0.0), jnp.where(read, total, 0.0)
    return out.astype(v.dtype), total


def backward(q, k, v, mask, out, total, grad, scale):
    """Gradients of q, k and v from the two results of :func:`forward` and the gradient of the first."""
    # Where nothing is read, total is 0 and every weight exp(MASKED).
    weights = jnp.exp(_scores(q, k, mask, scale)[0] - total)
    given = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    dw = _by_query("bkqh,bksh->bkqs", grad, v, jnp.float32)
    ds = (weights * (dw - given) * scale).astype(q.dtype)
    dv = _over_queries(weights.astype(grad.dtype), grad)
    return _by_query("bkqs,bksh->bkqh", ds, k), _over_queries(ds, q), dv


def cut(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Pads `axis` to a multiple of `size` and brings blocks of it to the front."""
    n = x.shape[axis]
    count = -(-n // size)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * size - n)
    x = jnp.pad(x, pad)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def joined(x: jax.Array, axis: int, n: int) -> jax.Array:
    """The inverse of :func:`cut`, back to `n`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, n, axis=axis)
