"""Softmax attention behind one entry, :func:`attend`.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads (K divides N), G = N / K,
H head width.
"""

import functools
import math

import jax
import jax.numpy as jnp

from umm_jax.models import blockwise
from umm_jax.models.masks import MaskSpec, dense

# Large enough to vanish after the softmax in float32, small enough not to overflow in bfloat16.
MASKED = -1e30

# Up to so many scores [B, N, T, S] are simply made and kept for the backward pass (2 MiB, in four versions).
KEPT = 2**19

# Scores a CPU makes at a time: what its caches hold beside the rest (2**19 to 2**21 are alike).
BLOCK = 2**20

# Entries of a mask [B, T, S] up to which a CPU makes it whole and takes all keys at once, where the mask is
# given by what is to be known of tokens: passing over blocks pays only where there are many.
DENSE = 2**24


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | tuple[MaskSpec, MaskSpec] | None = None,
    *,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v with grouped-query heads; the softmax is taken in float32.

    Above :data:`KEPT` scores, none are kept: the backward pass makes them again from queries, keys and one
    number per query (FlashAttention, arXiv 2205.14135), and a CPU makes them in blocks of queries. Second
    derivatives are then not defined.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H]; head n reads key/value head n // (N / K).
        mask: True where a query may read a key; [B, T, S] or [B, 1, S], or None for everything; or what is
            to be known of the queries and of the keys, see ``masks``: then an accelerator makes no mask above
            KEPT scores. A query that may read nothing returns zeros, so that padding never produces NaN.
        scale: 1 / sqrt(H) unless given.

    Returns:
        [B, T, N, H] in the dtype of `q`.
    """
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    scale = h**-0.5 if scale is None else scale
    # Heads before tokens: both products are then plain batched matmuls on every backend.
    q = jnp.moveaxis(q.reshape(b, t, kv, n // kv, h), 1, 3)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if b * n * t * s <= KEPT:
        out = _kept(q, k, v, dense(*mask) if isinstance(mask, tuple) else mask, scale)
    else:
        out = _remade(q, k, v, mask, scale)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, n, h)


def _scores(q, k, mask, scale):
    """[B, K, G, T, S] in float32, MASKED where nothing may be read, and the mask in that shape or None."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if mask is None:
        return scores, None
    allowed = mask[:, None, None]
    return jnp.where(allowed, scores, MASKED), allowed


def _kept(q, k, v, mask, scale):
    """q [B, K, G, T, H], k and v [B, K, S, H], mask [B, T or 1, S] or None -> [B, K, G, T, H]."""
    scores, allowed = _scores(q, k, mask, scale)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None:
        weights = jnp.where(jnp.any(allowed, axis=-1, keepdims=True), weights, 0.0)
    return jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v)


# --- scores that are made again -----------------------------------------------------------------------


def _weights(q, k, mask, scale, total):
    """exp(scores - total): the weights, when `total` [B, K, G, T, 1] is the logarithm of their sum."""
    scores, allowed = _scores(q, k, mask, scale)
    weights = jnp.exp(scores - total)
    return weights if allowed is None else jnp.where(allowed, weights, 0.0)


def _forward(q, k, v, mask, scale):
    """The result, and the logarithm of the sum of exponentials [B, K, G, T, 1]."""
    scores, allowed = _scores(q, k, mask, scale)
    top = jnp.max(scores, axis=-1, keepdims=True)
    raised = jnp.exp(scores - top)
    if allowed is not None:
        raised = jnp.where(allowed, raised, 0.0)
    total = jnp.sum(raised, axis=-1, keepdims=True)
    # Divided after the product, where there are H numbers a query and not S.
    out = jnp.einsum("bkgts,bksh->bkgth", raised.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / jnp.where(total > 0, total, 1.0)
    return out.astype(v.dtype), top + jnp.log(jnp.where(total > 0, total, 1.0))


def _backward(q, k, v, mask, out, total, grad, scale):
    """Gradients of q, k and v."""
    weights = _weights(q, k, mask, scale, total)
    given = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    dw = jnp.einsum("bkgth,bksh->bkgts", grad, v, preferred_element_type=jnp.float32)
    ds = (weights * (dw - given) * scale).astype(q.dtype)
    dv = jnp.einsum("bkgts,bkgth->bksh", weights.astype(grad.dtype), grad)
    dk = jnp.einsum("bkgts,bkgth->bksh", ds, q)
    return jnp.einsum("bkgts,bksh->bkgth", ds, k), dk, dv


def _cut(t: int, per_query: int):
    """How to cut [B, K, G, T, ..] (or another `axis` of T) into blocks of queries, and how to join results.

    None where one block holds all.
    """
    count = math.ceil(t / max(BLOCK // per_query, 1))
    size = math.ceil(t / count)
    if count == 1:
        return None

    def cut(x, axis=3):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * size - t)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, x.shape[-1])[:, :, :, :t]

    return cut, join


def _forward_in_blocks(q, k, v, mask, scale):
    b, kv, g, t, _ = q.shape
    blocks = _cut(t, b * kv * g * k.shape[2])
    if blocks is None:
        return _forward(q, k, v, mask, scale)
    cut, join = blocks
    by_query = mask is not None and mask.shape[1] > 1
    masks = cut(mask, 1) if by_query else None
    found = jax.lax.map(lambda x: _forward(x[0], k, v, x[1] if by_query else mask, scale), (cut(q), masks))
    return tuple(join(x) for x in found)


def _backward_in_blocks(q, k, v, mask, out, total, grad, scale):
    b, kv, g, t, _ = q.shape
    blocks = _cut(t, b * kv * g * k.shape[2])
    if blocks is None:
        return _backward(q, k, v, mask, out, total, grad, scale)
    cut, join = blocks
    by_query = mask is not None and mask.shape[1] > 1
    masks = cut(mask, 1) if by_query else None

    def step(sums, x):
        q, out, total, grad, own = x
        dq, dk, dv = _backward(q, k, v, own if by_query else mask, out, total, grad, scale)
        return (sums[0] + dk, sums[1] + dv), dq

    start = (jnp.zeros_like(k), jnp.zeros_like(v))
    (dk, dv), dq = jax.lax.scan(step, start, (cut(q), cut(out), cut(total), cut(grad), masks))
    return join(dq), dk, dv


# The rule stands around the choice by platform, which is made when a program is lowered: differentiating
# through it would keep what the backward passes of all platforms need.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _remade(q, k, v, mask, scale):
    return _remade_forward(q, k, v, mask, scale)[0]


def _remade_forward(q, k, v, mask, scale):
    cpu, default = (
        functools.partial(_forward_in_blocks, scale=scale),
        functools.partial(_forward, scale=scale),
    )
    if isinstance(mask, tuple):
        default = lambda q, k, v, mask: blockwise.forward(q, k, v, *mask, scale)  # noqa: E731
        if _small(mask):
            cpu = lambda q, k, v, mask: _forward_in_blocks(q, k, v, dense(*mask), scale)  # noqa: E731
        else:
            cpu = lambda q, k, v, mask: blockwise.forward(q, k, v, *mask, scale, BLOCK)  # noqa: E731
    out, total = jax.lax.platform_dependent(q, k, v, mask, cpu=cpu, default=default)
    return out, (q, k, v, mask, out, total)


def _small(mask: tuple[MaskSpec, MaskSpec]) -> bool:
    of_q, of_k = mask
    return of_q.sample.size * of_k.sample.shape[1] <= DENSE


def _remade_backward(scale, saved, grad):
    cpu, default = (
        functools.partial(_backward_in_blocks, scale=scale),
        functools.partial(_backward, scale=scale),
    )
    mask = saved[3]
    if isinstance(mask, tuple):
        in_blocks = blockwise.backward
        default = lambda q, k, v, mask, *rest: in_blocks(q, k, v, *mask, *rest, scale)  # noqa: E731
        if _small(mask):
            cpu = lambda q, k, v, mask, *rest: _backward_in_blocks(q, k, v, dense(*mask), *rest, scale)  # noqa: E731
        else:
            cpu = lambda q, k, v, mask, *rest: in_blocks(q, k, v, *mask, *rest, scale, BLOCK)  # noqa: E731
    return *jax.lax.platform_dependent(*saved, grad, cpu=cpu, default=default), None


_remade.defvjp(_remade_forward, _remade_backward)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[..., T, N*H] -> [..., T, N, H]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., T, N, H] -> [..., T, N*H]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
