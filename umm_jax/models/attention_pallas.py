"""Attention under a mask of :mod:`masks` as kernels for GPUs: ``blockwise.py`` in fast memory.

Plain XLA writes the scores of every block to memory and reads them again, and asks the host before it passes
over a block. Here a program of the grid owns a block of queries (forward, and for their gradient) or of keys
(for the gradients of keys and values) of one head; it walks the list of blocks that :func:`masks.block_table`
leaves in, first those that are read whole, for which it makes no mask, and holds what it adds up in registers.

Pallas, through Triton. On anything but a GPU the kernels run in Pallas' interpreter: right, and very slow.

Letters as in ``attention.py``: q [B, K, G, T, H], k and v [B, K, S, H]; inside, heads are one axis
[B, N, T, H], T and S are filled up to whole blocks and H to a power of two.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from umm_jax import sharding
from umm_jax.models.masks import EMPTY, WHOLE, MaskSpec, block_table, visible
from umm_jax.models.scores import MASKED

QUERIES, KEYS = 64, 64  # of a block
WARPS, STAGES = 4, 2


# --- inside the kernels: blocks of one head --------------------------------------------------------------


def _dot(a, b, over: tuple[int, int]):
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def _walk(counts_ref, list_ref, add, sums):
    """`add(sums, block, masked)` for the blocks of the list: those that are read whole, then the others."""
    step = lambda masked: lambda i, sums: add(sums, list_ref[i], masked)  # noqa: E731
    whole, all_ = counts_ref[0], counts_ref[1]
    return jax.lax.fori_loop(whole, all_, step(True), jax.lax.fori_loop(0, whole, step(False), sums))


def _rows(mask_ref, at) -> MaskSpec:
    return MaskSpec(*(mask_ref[i, at] for i in range(len(MaskSpec._fields))))


def _scores(q, k, of_q: MaskSpec, of_k: MaskSpec | None, scale: float):
    """[t, s]; `of_k` is None where all is read."""
    scores = _dot(q, k, (1, 1)) * scale
    if of_k is None:
        return scores
    allowed = visible(MaskSpec(*(a[:, None] for a in of_q)), MaskSpec(*(a[None, :] for a in of_k)))
    return jnp.where(allowed, scores, MASKED)


def _forward_kernel(counts, blocks, q_ref, k_ref, v_ref, of_q_ref, of_k_ref, out_ref, total_ref, *, scale, size):
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
        out = out * shrink[:, None] + _dot(raised.astype(v.dtype), v, (1, 0))
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
    counts, blocks, q_ref, k_ref, v_ref, of_q_ref, of_k_ref, grad_ref, total_ref, given_ref, dq_ref, *, scale, size
):
    """The gradient of the queries of a block."""
    q, of_q, grad = q_ref[...], _rows(of_q_ref, slice(None)), grad_ref[...]
    total, given = total_ref[...], given_ref[...]

    def add(dq, block, masked):
        at = pl.ds(block * size, size)
        k = k_ref[at, :]
        scores = _scores(q, k, of_q, _rows(of_k_ref, at) if masked else None, scale)
        ds = _weights(scores, total, masked) * (_dot(grad, v_ref[at, :], (1, 1)) - given[:, None])
        return dq + _dot(ds.astype(k.dtype), k, (1, 0))

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
        dv = dv + _dot(weights.astype(grad.dtype), grad, (0, 0))
        ds = weights * (_dot(grad, v, (1, 1)) - given_ref[at][:, None])
        return dk + _dot(ds.astype(q.dtype), q, (0, 0)), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _walk(counts, blocks, add, (zeros, zeros))
    dk_ref[...], dv_ref[...] = (dk * scale).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


# --- around the kernels ----------------------------------------------------------------------------------


def _filled(x: jax.Array, axis: int, size: int) -> jax.Array:
    """`axis` up to a multiple of `size`, with zeros."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, pad)


def _heads(x: jax.Array, tokens: int) -> jax.Array:
    """[B, K, (G,) T, H] -> [B, N, T, H], filled up."""
    x = x.reshape(x.shape[0], -1, *x.shape[-2:])
    return _filled(_filled(x, 2, tokens), 3, max(16, pl.next_power_of_2(x.shape[-1])))


def _numbers(x: jax.Array) -> jax.Array:
    """One number a query, [B, K, G, T, 1] -> [B, N, T], filled up."""
    return _filled(x.reshape(x.shape[0], -1, x.shape[3]), 2, QUERIES)


def _lists(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, n, m] -> how many of m are read whole, and how many at all [B, n, 2]; these first [B, n, m]."""
    rank = jnp.where(table == WHOLE, 0, jnp.where(table == EMPTY, 2, 1))
    counts = jnp.stack([jnp.sum(rank < 1, -1), jnp.sum(rank < 2, -1)], axis=-1)
    return counts.astype(jnp.int32), jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)


class _Sizes:
    """What the specs of blocks are made of."""

    def __init__(self, q: jax.Array, k: jax.Array):
        self.b, self.n, self.t, self.h = q.shape
        self.group, self.s = q.shape[1] // k.shape[1], k.shape[2]

    def query(self, whole: bool = False):
        size = self.t if whole else QUERIES
        return pl.BlockSpec((None, None, size, self.h), lambda i, n, b: (b, n, 0 if whole else i, 0))

    def number(self, whole: bool = False):
        size = self.t if whole else QUERIES
        return pl.BlockSpec((None, None, size), lambda i, n, b: (b, n, 0 if whole else i))

    def key(self, whole: bool = False, shared: bool = True):
        size, group = self.s if whole else KEYS, self.group if shared else 1
        return pl.BlockSpec((None, None, size, self.h), lambda i, n, b: (b, n // group, 0 if whole else i, 0))

    @staticmethod
    def mask(size: int, whole: bool):
        return pl.BlockSpec((None, len(MaskSpec._fields), size), lambda i, n, b: (b, 0, 0 if whole else i))

    @staticmethod
    def lists(counts: jax.Array, blocks: jax.Array):
        return [pl.BlockSpec((None, None, x.shape[2]), lambda i, n, b: (b, i, 0)) for x in (counts, blocks)]


def _call(kernel, grid, specs, out, arrays, **sizes):
    def call(*arrays, interpret):
        return pl.pallas_call(
            functools.partial(kernel, **sizes),
            grid=grid,
            in_specs=specs[: len(arrays)],
            out_specs=specs[len(arrays) :],
            out_shape=out,
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
            interpret=interpret,
        )(*arrays)

    run = functools.partial(call, interpret=False)
    return jax.lax.platform_dependent(
        *arrays, cuda=run, rocm=run, default=functools.partial(call, interpret=True)
    )


def _prepared(q, k, v, of_q: MaskSpec, of_k: MaskSpec):
    """q, k, v, masks [B, 4, T] and [B, 4, S], all filled up, and the table of blocks."""
    of_q = MaskSpec(*(_filled(a, 1, QUERIES) for a in of_q))
    of_k = MaskSpec(*(_filled(a, 1, KEYS) for a in of_k))
    table = block_table(of_q, of_k, QUERIES, KEYS)
    masks = (jnp.stack(m, axis=1).astype(jnp.int32) for m in (of_q, of_k))
    return (_heads(q, QUERIES), _heads(k, KEYS), _heads(v, KEYS), *masks), table


def _forward(q, k, v, of_q, of_k, *, scale):
    arrays, table = _prepared(q, k, v, of_q, of_k)
    sizes, lists = _Sizes(*arrays[:2]), _lists(table)
    out, total = _call(
        _forward_kernel,
        (sizes.t // QUERIES, sizes.n, sizes.b),
        [
            *sizes.lists(*lists),
            sizes.query(),
            *[sizes.key(whole=True)] * 2,
            sizes.mask(QUERIES, False),
            sizes.mask(sizes.s, True),
            sizes.query(),
            sizes.number(),
        ],
        [
            jax.ShapeDtypeStruct(arrays[0].shape, v.dtype),
            jax.ShapeDtypeStruct(arrays[0].shape[:3], jnp.float32),
        ],
        (*lists, *arrays),
        scale=scale,
        size=KEYS,
    )
    t, h = q.shape[3:]
    return out[:, :, :t, :h].reshape(q.shape), total[:, :, :t].reshape(*q.shape[:4], 1)


def _backward(q, k, v, of_q, of_k, out, total, grad, *, scale):
    given = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    arrays, table = _prepared(q, k, v, of_q, of_k)
    sizes, lists = _Sizes(*arrays[:2]), _lists(table)
    arrays = (*arrays, _heads(grad, QUERIES), _numbers(total), _numbers(given))
    (dq,) = _call(
        _queries_kernel,
        (sizes.t // QUERIES, sizes.n, sizes.b),
        [
            *sizes.lists(*lists),
            sizes.query(),
            *[sizes.key(whole=True)] * 2,
            sizes.mask(QUERIES, False),
            sizes.mask(sizes.s, True),
            sizes.query(),
            *[sizes.number()] * 2,
            sizes.query(),
        ],
        [jax.ShapeDtypeStruct(arrays[0].shape, q.dtype)],
        (*lists, *arrays),
        scale=scale,
        size=KEYS,
    )
    lists = _lists(jnp.swapaxes(table, 1, 2))
    by_head = (sizes.b, sizes.n, sizes.s, sizes.h)
    dk, dv = _call(
        _keys_kernel,
        (sizes.s // KEYS, sizes.n, sizes.b),
        [
            *sizes.lists(*lists),
            sizes.query(whole=True),
            *[sizes.key()] * 2,
            sizes.mask(sizes.t, True),
            sizes.mask(KEYS, False),
            sizes.query(whole=True),
            *[sizes.number(whole=True)] * 2,
            *[sizes.key(shared=False)] * 2,
        ],
        [jax.ShapeDtypeStruct(by_head, a.dtype) for a in (k, v)],
        (*lists, *arrays),
        scale=scale,
        size=QUERIES,
    )

    def summed(x, like):  # over the heads that share keys
        x = x.reshape(*like.shape[:2], sizes.group, *x.shape[2:]).astype(jnp.float32).sum(2)
        return x[:, :, : like.shape[2], : like.shape[3]].astype(like.dtype)

    t, h = q.shape[3:]
    return dq[:, :, :t, :h].reshape(q.shape), summed(dk, k), summed(dv, v)


# A kernel is not split by the compiler: rows and heads go to the devices that have them.
_Q, _K, _MASK = ("batch", "heads", None, None, None), ("batch", "heads", None, None), ("batch", None)
_ARGUMENTS = (_Q, _K, _K, MaskSpec(*[_MASK] * 4), MaskSpec(*[_MASK] * 4))


def forward(q, k, v, mask: tuple[MaskSpec, MaskSpec], scale: float):
    """As ``blockwise.forward``."""
    run = functools.partial(_forward, scale=scale)
    out = (q, jax.ShapeDtypeStruct((*q.shape[:4], 1), jnp.float32))
    return sharding.on_each_device(run, (q, k, v, *mask), _ARGUMENTS, out, (_Q, _Q))


def backward(q, k, v, mask: tuple[MaskSpec, MaskSpec], out, total, grad, scale: float):
    """As ``blockwise.backward``."""
    run = functools.partial(_backward, scale=scale)
    arrays, axes = (q, k, v, *mask, out, total, grad), (*_ARGUMENTS, _Q, _Q, _Q)
    return sharding.on_each_device(run, arrays, axes, (q, k, v), (_Q, _K, _K))
