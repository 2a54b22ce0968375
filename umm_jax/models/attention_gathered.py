"""Attention under a mask of :mod:`masks` for CPUs: each block of queries takes only the keys it may read.

A CPU is fastest with few large products, so a block of queries attends at once, as in ``attention_plain.py``,
to blocks of keys brought side by side: those that :func:`masks.block_table` leaves in. How many these are is
known when the program runs, and shapes are fixed before, so a block takes the least of a few widths that
holds them all. Neither mask nor scores are ever made for more than a block of queries.

Letters as in ``attention.py``: q [B, K, G, T, H], k and v [B, K, S, H].
"""

import functools
import math

import jax
import jax.numpy as jnp

from umm_jax.models import attention_plain
from umm_jax.models.attention_plain import cut, joined
from umm_jax.models.masks import EMPTY, MaskSpec, block_table, dense

# Of a block: keys, and queries at least. Fewer keys are passed over more exactly and gathered more slowly.
KEYS, QUERIES = 32, 64

# Scores of a block, where that leaves it enough queries: fewer queries pass over more keys.
SCORES = 2**19

# Widths that are compiled, of all keys.
WIDTHS = (0.03, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)


class _Keys:
    """The keys in blocks, and which of them each block of queries takes."""

    def __init__(self, of_q: MaskSpec, of_k: MaskSpec, queries: int):
        self.size = min(KEYS, of_k.sample.shape[1])
        self.masks_q = MaskSpec(*(cut(a, queries, 1) for a in of_q))
        self.masks_k = MaskSpec(*(cut(a, self.size, 1) for a in of_k))
        whole = [MaskSpec(*(jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1) for a in m)) for m in self._masks]
        # One choice for all rows: what any of them may read.
        needed = jnp.any(block_table(*whole, queries, self.size) != EMPTY, axis=0)
        self.count = needed.shape[1]
        self.order = jnp.argsort(~needed, axis=1, stable=True)
        self.widths = sorted({math.ceil(share * self.count) for share in WIDTHS})
        self.width = jnp.searchsorted(jnp.array(self.widths), jnp.sum(needed, axis=1))

    @property
    def _masks(self):
        return self.masks_q, self.masks_k

    def cut(self, x: jax.Array) -> jax.Array:
        """[B, K, S, H] -> [m, B, K, s, H]."""
        return cut(x, self.size, 2)

    def taken(self, order: jax.Array, of_q: MaskSpec, *blocks: jax.Array):
        """The blocks `order` side by side, [B, K, w, H] each, and their mask [B, t, w]."""
        of_k = MaskSpec(*(joined(a[order], 1, len(order) * self.size) for a in self.masks_k))
        return [joined(x[order], 2, len(order) * self.size) for x in blocks], dense(of_q, of_k)


def _queries(q: jax.Array, s: int) -> int:
    return min(q.shape[3], max(QUERIES, SCORES // (math.prod(q.shape[:3]) * s)))


def forward(q, k, v, mask: tuple[MaskSpec, MaskSpec], scale: float):
    """As ``attention_plain.forward``, under a mask of (queries, keys)."""
    t = _queries(q, k.shape[2])
    keys = _Keys(*mask, t)
    k, v = keys.cut(k), keys.cut(v)

    def branch(width, q, of_q, order):
        (some_k, some_v), mask = keys.taken(order[:width], of_q, k, v)
        return attention_plain.forward(q, some_k, some_v, mask, scale)

    def one(x):
        choice, *rest = x
        return jax.lax.switch(choice, [functools.partial(branch, w) for w in keys.widths], *rest)

    out, total = jax.lax.map(one, (keys.width, cut(q, t, 3), keys.masks_q, keys.order))
    return joined(out, 3, q.shape[3]), joined(total, 3, q.shape[3])


def backward(q, k, v, mask: tuple[MaskSpec, MaskSpec], out, total, grad, scale: float):
    """As ``attention_plain.backward``, in the blocks of :func:`forward`."""
    t, n, s = _queries(q, k.shape[2]), q.shape[3], k.shape[2]
    keys = _Keys(*mask, t)
    k, v = keys.cut(k), keys.cut(v)

    def branch(width, sums, q, of_q, order, out, total, grad):
        (some_k, some_v), mask = keys.taken(order[:width], of_q, k, v)
        dq, *new = attention_plain.backward(q, some_k, some_v, mask, out, total, grad, scale)
        new = [cut(x, keys.size, 2) for x in new]
        return tuple(a.at[order[:width]].add(x) for a, x in zip(sums, new)), dq

    def step(sums, x):
        choice, *rest = x
        branches = [functools.partial(branch, w) for w in keys.widths]
        return jax.lax.switch(choice, branches, sums, *rest)

    blocks = (keys.width, cut(q, t, 3), keys.masks_q, keys.order, *(cut(x, t, 3) for x in (out, total, grad)))
    (dk, dv), dq = jax.lax.scan(step, (jnp.zeros_like(k), jnp.zeros_like(v)), blocks)
    return joined(dq, 3, n), joined(dk, 2, s), joined(dv, 2, s)
