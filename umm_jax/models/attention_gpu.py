"""Attention under a mask of :mod:`masks` as kernels for GPUs: ``attention_blocks.py`` in fast memory.

Plain XLA writes the scores of every block to memory and reads them again, and asks the host before it passes
over a block. Here a program of the grid owns a block of queries (forward, and for their gradient) or of keys
(for the gradients of keys and values) of one head; it walks the list of blocks that :func:`masks.block_table`
leaves in, first those that are read whole, for which it makes no mask, and keeps its sums in registers.

Pallas, through Triton. On anything but a GPU the kernels run in Pallas' interpreter: right, and very slow.

Letters as in ``attention.py``: q [B, K, G, T, H], k and v [B, K, S, H]; inside, heads are one axis
[B, N, T, H], T and S are filled up to whole blocks and H to a power of two.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from umm_jax.models.attention_kernels import by_heads, dot, filled, on_each_device, over_groups
from umm_jax.models.attention_plain import MASKED
from umm_jax.models.masks import EMPTY, WHOLE, MaskSpec, block_table, visible


class Blocks(NamedTuple):
    """Queries and keys of a block, and what Triton is told: warps of a program, loads under way."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


# By bytes of a number.
FORWARD = {4: Blocks(32, 64), 2: Blocks(64, 64)}
BACKWARD = {4: Blocks(64, 32), 2: Blocks(64, 64)}


# --- inside the kernels: blocks of one head --------------------------------------------------------------


def _walk(counts_ref, list_ref, add, sums):
    """`add(sums, block, masked)` for the blocks of the list: those that are read whole, then the others."""
    step = lambda masked: lambda i, sums: add(sums, list_ref[i], masked)  # noqa: E731
    whole, all_ = counts_ref[0], counts_ref[1]
    return jax.lax.fori_loop(whole, all_, step(True), jax.lax.fori_loop(0, whole, step(False), sums))


def _rows(mask_ref, at) -> MaskSpec:
    return MaskSpec(*(mask_ref[i, at] for i in range(len(MaskSpec._fields))))


def _scores(q, k, of_q: MaskSpec, of_k: MaskSpec | None, scale: float):
    """[t, s]; `of_k` is None where all is read."""
    scores = dot(q, k, (1, 1)) * scale
    if of_k is None:
        return scores
    allowed = visible(MaskSpec(*(a[:, None] for a in of_q)), MaskSpec(*(a[None, :] for a in of_k)))
    return jnp.where(allowed, scores, MASKED)


def _forward_kernel(
    counts, blocks, q_ref, k_ref, v_ref, of_q_ref, of_k_ref, out_ref, total_ref, *, scale, size
):
    q, of_q = q_ref[...], _rows(of_q_ref, slice(None))

    def add(sums, block, masked):
        top, total, out = sums
        at = pl.ds(block * size, size)
        scores = _scores(q, k_ref[at, :], of_q, _rows(of_k_ref, at) if masked else None, scale)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        raised = jnp.exp(scores - higher[:, None])
        # Where nothing has been read yet, exp(MASKED - MASKED) is 1.
        raised = jnp.where(scores > MASKED / 2, raised, 0.0) if masked else raised
        shrink = jnp.exp(top - higher)
        v = v_ref[at, :]
        out = out * shrink[:, None] + dot(raised.astype(v.dtype), v, (1, 0))
        return higher, total * shrink + jnp.sum(raised, axis=1), out

    start = (jnp.full(q.shape[:1], MASKED, jnp.float32), jnp.zeros(q.shape[:1], jnp.float32))
    top, total, out = _walk(counts, blocks, add, (*start, jnp.zeros(q.shape, jnp.float32)))
    read = total > 0
    total = jnp.where(read, total, 1.0)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    total_ref[...] = jnp.where(read, top + jnp.log(total), 0.0)


def _weights(scores, total, masked):
    weights = jnp.exp(scores - total[:, None])
    return jnp.where(scores > MASKED / 2, weights, 0.0) if masked else weights


def _queries_kernel(
    counts,
    blocks,
    q_ref,
    k_ref,
    v_ref,
    of_q_ref,
    of_k_ref,
    grad_ref,
    total_ref,
    given_ref,
    dq_ref,
    *,
    scale,
    size,
):
    """The gradient of the queries of a block."""
    q, of_q, grad = q_ref[...], _rows(of_q_ref, slice(None)), grad_ref[...]
    total, given = total_ref[...], given_ref[...]

    def add(dq, block, masked):
        at = pl.ds(block * size, size)
        k = k_ref[at, :]
        scores = _scores(q, k, of_q, _rows(of_k_ref, at) if masked else None, scale)
        ds = _weights(scores, total, masked) * (dot(grad, v_ref[at, :], (1, 1)) - given[:, None])
        return dq + dot(ds.astype(k.dtype), k, (1, 0))

    dq = _walk(counts, blocks, add, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _keys_kernel(
    counts,
    blocks,
    q_ref,
    k_ref,
    v_ref,
    of_q_ref,
    of_k_ref,
    grad_ref,
    total_ref,
    given_ref,
    dk_ref,
    dv_ref,
    *,
    scale,
    size,
):
    """The gradients of the keys and values of a block, from the queries of one head."""
    k, v, of_k = k_ref[...], v_ref[...], _rows(of_k_ref, slice(None))

    def add(sums, block, masked):
        dk, dv = sums
        at = pl.ds(block * size, size)
        q, grad = q_ref[at, :], grad_ref[at, :]
        scores = _scores(q, k, _rows(of_q_ref, at) if masked else None, of_k if masked else None, scale)
        weights = _weights(scores, total_ref[at], masked)
        dv = dv + dot(weights.astype(grad.dtype), grad, (0, 0))
        ds = weights * (dot(grad, v, (1, 1)) - given_ref[at][:, None])
        return dk + dot(ds.astype(q.dtype), q, (0, 0)), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _walk(counts, blocks, add, (zeros, zeros))
    dk_ref[...], dv_ref[...] = (dk * scale).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


# --- around the kernels ----------------------------------------------------------------------------------


def _heads(x: jax.Array, size: int) -> jax.Array:
    """As ``by_heads``, and H filled up."""
    return filled(by_heads(x, size), 3, max(16, pl.next_power_of_2(x.shape[-1])))


def _lists(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, n, m] -> how many of m are read whole, and how many at all [B, n, 2]; these first [B, n, m]."""
    rank = jnp.where(table == WHOLE, 0, jnp.where(table == EMPTY, 2, 1))
    counts = jnp.stack([jnp.sum(rank < 1, -1), jnp.sum(rank < 2, -1)], axis=-1)
    return counts.astype(jnp.int32), jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)


class _Call:
    """One attention: its arrays, filled up, and the kernels on them.

    Attributes:
        arrays: q, k, v and the masks of queries and of keys, [B, 4, T] and [B, 4, S].
        table: what its blocks hold.
    """

    def __init__(self, q, k, v, of_q: MaskSpec, of_k: MaskSpec, blocks: Blocks, scale: float):
        self.blocks, self.scale = blocks, scale
        of_q = MaskSpec(*(filled(a, 1, blocks.queries) for a in of_q))
        of_k = MaskSpec(*(filled(a, 1, blocks.keys) for a in of_k))
        self.table = block_table(of_q, of_k, blocks.queries, blocks.keys)
        heads = _heads(q, blocks.queries), _heads(k, blocks.keys), _heads(v, blocks.keys)
        self.arrays = (*heads, *(jnp.stack(m, axis=1).astype(jnp.int32) for m in (of_q, of_k)))
        self.b, self.n, self.t, self.h = heads[0].shape
        self.s, self.group = k.shape[2] + -k.shape[2] % blocks.keys, q.shape[2]

    # How a program of the grid (block, head, row) sees an array: its own block of it, or all of its head.

    def _tokens(self, own: bool, size: int, of: int):
        return (size, lambda i: i) if own else (of, lambda i: 0)

    def query(self, own: bool):
        size, at = self._tokens(own, self.blocks.queries, self.t)
        return pl.BlockSpec((None, None, size, self.h), lambda i, n, b: (b, n, at(i), 0))

    def number(self, own: bool):
        size, at = self._tokens(own, self.blocks.queries, self.t)
        return pl.BlockSpec((None, None, size), lambda i, n, b: (b, n, at(i)))

    def key(self, own: bool, group: int):
        size, at = self._tokens(own, self.blocks.keys, self.s)
        return pl.BlockSpec((None, None, size, self.h), lambda i, n, b: (b, n // group, at(i), 0))

    def masks(self, own_queries: bool):
        q = self._tokens(own_queries, self.blocks.queries, self.t)
        k = self._tokens(not own_queries, self.blocks.keys, self.s)
        one = lambda size, at: pl.BlockSpec((None, 4, size), lambda i, n, b: (b, 0, at(i)))  # noqa: E731
        return [one(*q), one(*k)]

    def run(self, kernel, own_queries: bool, more: Sequence[tuple[Any, Any]], out: Sequence[tuple[Any, Any]]):
        """`kernel` for each block of queries, or of keys, and each head.

        Args:
            more: (array, spec) of arguments beside the lists of blocks and `arrays`.
            out: (shape and type, spec) of the results.
        """
        counts, listed = _lists(self.table if own_queries else jnp.swapaxes(self.table, 1, 2))
        lists = [pl.BlockSpec((None, None, x.shape[2]), lambda i, n, b: (b, i, 0)) for x in (counts, listed)]
        inputs = [
            self.query(own_queries),
            *[self.key(not own_queries, self.group)] * 2,
            *self.masks(own_queries),
        ]
        walked = self.blocks.keys if own_queries else self.blocks.queries

        def call(*arrays, interpret):
            return pl.pallas_call(
                functools.partial(kernel, scale=self.scale, size=walked),
                grid=(listed.shape[1], self.n, self.b),
                in_specs=[*lists, *inputs, *(spec for _, spec in more)],
                out_specs=[spec for _, spec in out],
                out_shape=[jax.ShapeDtypeStruct(*shape) for shape, _ in out],
                compiler_params=triton.CompilerParams(
                    num_warps=self.blocks.warps, num_stages=self.blocks.stages
                ),
                interpret=interpret,
            )(*arrays)

        real, interpreted = (functools.partial(call, interpret=x) for x in (False, True))
        arrays = (counts, listed, *self.arrays, *(array for array, _ in more))
        return jax.lax.platform_dependent(*arrays, cuda=real, default=interpreted)


def _forward(q, k, v, of_q, of_k, *, scale):
    call = _Call(q, k, v, of_q, of_k, FORWARD[min(q.dtype.itemsize, 4)], scale)
    out, total = call.run(
        _forward_kernel,
        True,
        [],
        [
            (((call.b, call.n, call.t, call.h), v.dtype), call.query(True)),
            (((call.b, call.n, call.t), jnp.float32), call.number(True)),
        ],
    )
    t, h = q.shape[3:]
    return out[:, :, :t, :h].reshape(q.shape), total[:, :, :t].reshape(*q.shape[:4], 1)


def _backward(q, k, v, of_q, of_k, out, total, grad, *, scale):
    given = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    blocks = BACKWARD[min(q.dtype.itemsize, 4)]
    call = _Call(q, k, v, of_q, of_k, blocks, scale)
    by_query = [_heads(grad, blocks.queries), *(by_heads(x, blocks.queries)[..., 0] for x in (total, given))]

    def given_to(own):
        return list(zip(by_query, [call.query(own), call.number(own), call.number(own)]))

    like_q, by_head = (call.b, call.n, call.t, call.h), (call.b, call.n, call.s, call.h)
    (dq,) = call.run(_queries_kernel, True, given_to(True), [((like_q, q.dtype), call.query(True))])
    dk, dv = call.run(
        _keys_kernel, False, given_to(False), [((by_head, a.dtype), call.key(True, 1)) for a in (k, v)]
    )
    t, h = q.shape[3:]
    return dq[:, :, :t, :h].reshape(q.shape), over_groups([dk], k), over_groups([dv], v)


forward, backward = on_each_device(_forward, _backward)
