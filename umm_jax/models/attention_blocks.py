"""Attention under a mask of :mod:`masks` in blocks, so that neither scores nor mask are ever made whole.

For each block of queries the blocks of keys are walked once, with a running maximum and sum (FlashAttention,
arXiv 2205.14135): memory grows with the number of tokens, not with its square. Blocks that nobody reads are
passed over, which for a causal stream is half of them, and for packed samples most. The backward pass makes
the scores again from queries, keys and one number per query. Plain XLA, for accelerators; for
a CPU see ``attention_gathered.py``.

Letters as in ``attention.py``: q [B, K, G, T, H], k and v [B, K, S, H]. :func:`forward` and :func:`backward`
are the two sides of ``attention.attend``, which is where they are put together.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from umm_jax.models.attention_plain import MASKED, cut, joined
from umm_jax.models.masks import EMPTY, MIXED, WHOLE, MaskSpec, block_table, visible

QUERIES, KEYS = 512, 1024  # of a block, at most


class _Blocks(NamedTuple):
    """All in blocks: q [n, B, K, G, t, H], k and v [m, B, K, s, H], masks the same way, table [n, m]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    of_q: MaskSpec
    of_k: MaskSpec
    table: jax.Array


def _size(most: int, count: int) -> int:
    """Side of a block: no more than there are tokens."""
    return min(most, -(-count // 8) * 8)


def _blocks(q, k, v, of_q: MaskSpec, of_k: MaskSpec) -> _Blocks:
    t, s = _size(QUERIES, q.shape[3]), _size(KEYS, k.shape[2])
    masks_q, masks_k = MaskSpec(*(cut(a, t, 1) for a in of_q)), MaskSpec(*(cut(a, s, 1) for a in of_k))
    flat = lambda spec: MaskSpec(*(jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1) for a in spec))  # noqa: E731
    table = block_table(flat(masks_q), flat(masks_k), t, s)
    # One decision for all rows: nothing to do if no row has anything, no mask if no row needs one.
    every = jnp.where(jnp.all(table == WHOLE, 0), WHOLE, MIXED)
    return _Blocks(
        cut(q, t, 3),
        cut(k, s, 2),
        cut(v, s, 2),
        masks_q,
        masks_k,
        jnp.where(jnp.all(table == EMPTY, 0), EMPTY, every),
    )


def _float32(letters: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def _scores(q, k, of_q, of_k, scale, masked: bool):
    scores = _float32("bkgth,bksh->bkgts", q, k) * scale
    if not masked:
        return scores
    allowed = visible(MaskSpec(*(a[:, :, None] for a in of_q)), MaskSpec(*(a[:, None, :] for a in of_k)))
    return jnp.where(allowed[:, None, None], scores, MASKED)


def forward(q, k, v, mask: tuple[MaskSpec, MaskSpec], scale: float):
    """Attends under a mask of (queries, keys).

    Returns:
        the result [B, K, G, T, H], zeros where a query reads nothing, and the logarithm of the sum of
        exponentials [B, K, G, T, 1], 0 there.
    """
    blocks = _blocks(q, k, v, *mask)

    def one(x):
        q, of_q, row = x

        def add(carry, x, masked):
            top, total, out = carry
            k, v, of_k = x
            scores = _scores(q, k, of_q, of_k, scale, masked)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            raised = jnp.exp(scores - higher)
            # Where nothing has been read yet, exp(MASKED - MASKED) is 1.
            raised = jnp.where(scores > MASKED / 2, raised, 0.0) if masked else raised
            shrink = jnp.exp(top - higher)
            new = _float32("bkgts,bksh->bkgth", raised.astype(v.dtype), v)
            return higher, total * shrink + jnp.sum(raised, axis=-1, keepdims=True), out * shrink + new

        def step(carry, x):
            state, *block = x
            branches = [
                lambda carry, block: carry,
                functools.partial(add, masked=True),
                functools.partial(add, masked=False),
            ]
            return jax.lax.switch(state, branches, carry, block), None

        sums = jnp.full(q.shape[:-1] + (1,), MASKED, jnp.float32)
        start = (sums, jnp.zeros_like(sums), jnp.zeros(q.shape, jnp.float32))
        (top, total, out), _ = jax.lax.scan(step, start, (row, blocks.k, blocks.v, blocks.of_k))
        read = total > 0
        out = (out / jnp.where(read, total, 1.0)).astype(v.dtype)
        return out, jnp.where(read, top + jnp.log(jnp.where(read, total, 1.0)), 0.0)

    out, total = jax.lax.map(one, (blocks.q, blocks.of_q, blocks.table))
    n = q.shape[3]
    return joined(out, 3, n), joined(total, 3, n)


def backward(q, k, v, mask: tuple[MaskSpec, MaskSpec], out, total, grad, scale: float):
    """Gradients of q, k and v: for each block of keys, the blocks of queries are walked."""
    blocks = _blocks(q, k, v, *mask)
    t = blocks.q.shape[-2]
    given = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    by_query = (blocks.q, blocks.of_q, cut(grad, t, 3), cut(total, t, 3), cut(given, t, 3))

    def add(sums, number, of_queries, of_keys, masked):
        dq_all, dk, dv = sums
        q, of_q, grad, total, given = of_queries
        k, v, of_k = of_keys
        scores = _scores(q, k, of_q, of_k, scale, masked)
        weights = jnp.exp(scores - total)
        weights = jnp.where(scores > MASKED / 2, weights, 0.0) if masked else weights
        dw = _float32("bkgth,bksh->bkgts", grad, v)
        ds = (weights * (dw - given) * scale).astype(q.dtype)
        dq_all = dq_all.at[number].add(_float32("bkgts,bksh->bkgth", ds, k))
        dk = dk + _float32("bkgts,bkgth->bksh", ds, q)
        return dq_all, dk, dv + _float32("bkgts,bkgth->bksh", weights.astype(grad.dtype), grad)

    def walk(dq_all, x):
        column, *of_keys = x

        def step(sums, x):
            number, state, of_queries = x
            branches = [
                lambda sums, *_: sums,
                functools.partial(add, masked=True),
                functools.partial(add, masked=False),
            ]
            return jax.lax.switch(state, branches, sums, number, of_queries, of_keys), None

        zeros = (jnp.zeros(a.shape, jnp.float32) for a in of_keys[:2])
        numbers = jnp.arange(len(blocks.q))
        (dq_all, dk, dv), _ = jax.lax.scan(step, (dq_all, *zeros), (numbers, column, by_query))
        return dq_all, (dk, dv)

    start = jnp.zeros(blocks.q.shape, jnp.float32)
    dq, (dk, dv) = jax.lax.scan(walk, start, (blocks.table.T, blocks.k, blocks.v, blocks.of_k))
    dq = joined(dq, 3, q.shape[3]).astype(q.dtype)
    return dq, joined(dk, 2, k.shape[2]).astype(k.dtype), joined(dv, 2, v.shape[2]).astype(v.dtype)
