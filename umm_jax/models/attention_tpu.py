"""Attention under a mask of :mod:`masks` as kernels for TPUs: ``attention_blocks.py`` in fast memory; opt-in.

The blocks of queries and keys that :func:`masks.block_table` leaves in are written down as one list of pairs,
block after block of queries (for the gradients of keys and values, of keys), and the grid walks this list for
each head: what nobody reads costs nothing. Where the list comes to another block, sums begin anew; a block
that reads nothing stands in it once, to have its zeros written.

Scores are kept keys by queries: what there is one of for each query (its maximum, its sum) lies along the
lanes, in one row, and no kernel turns a column into one.

Compiled for TPUs and compared in Pallas' interpreter, but not yet run on one, so ``attend`` takes it only
where a config asks for it. On anything but a TPU it runs in the interpreter: right, and very slow.

Letters as in ``attention.py``: q [B, K, G, T, H], k and v [B, K, S, H]; inside, heads are one axis
[B, N, T, H], and T and S are filled up to whole blocks.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from umm_jax.models.attention_kernels import by_heads, dot, filled, on_each_device, over_groups
from umm_jax.models.attention_plain import MASKED
from umm_jax.models.masks import EMPTY, MIXED, WHOLE, MaskSpec, block_table, visible

QUERIES, KEYS = 512, 512  # of a block


class _Pairs(NamedTuple):
    """int32 [P]: the row, the block that is added up, the block it is added up over, and what the mask says.

    Behind `count` pairs there is nothing; the grid ends there. The last two are 1 where the list comes to
    another block, and before it leaves it.
    """

    row: jax.Array
    own: jax.Array
    other: jax.Array
    state: jax.Array
    first: jax.Array
    last: jax.Array


def _pairs(table: jax.Array) -> tuple[_Pairs, jax.Array]:
    """The list of a table [B, own, other], and its length."""
    # What reads nothing is given the first block, under a mask that lets nothing through.
    lonely = jnp.all(table == EMPTY, axis=-1, keepdims=True) & (jnp.arange(table.shape[2]) == 0)
    table = jnp.where(lonely, MIXED, table)
    found = jnp.nonzero(table.ravel() != EMPTY, size=table.size, fill_value=0)[0].astype(jnp.int32)
    count = jnp.sum(table != EMPTY, dtype=jnp.int32)
    group, other = found // table.shape[2], found % table.shape[2]
    new = jnp.diff(group, prepend=-1) != 0
    at_end = (jnp.arange(table.size) == count - 1) | jnp.roll(new, -1)
    numbers = (group // table.shape[1], group % table.shape[1], other, table.ravel()[found], new, at_end)
    return _Pairs(*(x.astype(jnp.int32) for x in numbers)), count


# --- inside the kernels: a pair of blocks of one head -----------------------------------------------------


def _for_pair(pairs: _Pairs, begin, add, end):
    """Runs `add(masked)` for the pair the grid is at, after `begin` and before `end` where it is time."""
    p = pl.program_id(1)
    pl.when(pairs.first[p] == 1)(begin)
    pl.when(pairs.state[p] == WHOLE)(functools.partial(add, False))
    pl.when(pairs.state[p] != WHOLE)(functools.partial(add, True))
    pl.when(pairs.last[p] == 1)(end)


def _scores(q, k, of_q_ref, of_k_ref, scale, masked):
    """[s, t]."""
    scores = dot(k, q, (1, 1)) * scale
    if not masked:
        return scores
    of_q = MaskSpec(*(of_q_ref[i : i + 1, :] for i in range(4)))
    of_k = MaskSpec(*(of_k_ref[:, i : i + 1] for i in range(4)))
    return jnp.where(visible(of_q, of_k), scores, MASKED)


def _forward_kernel(*refs, scale):
    pairs, refs = _Pairs(*refs[:6]), refs[6:]
    q_ref, k_ref, v_ref, of_q_ref, of_k_ref, out_ref, total_ref, top_ref, sum_ref, sums_ref = refs

    def begin():
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        sum_ref[...], sums_ref[...] = jnp.zeros_like(sum_ref), jnp.zeros_like(sums_ref)

    def add(masked):
        v, top = v_ref[...], top_ref[...]
        scores = _scores(q_ref[...], k_ref[...], of_q_ref, of_k_ref, scale, masked)
        higher = jnp.maximum(top, jnp.max(scores, axis=0, keepdims=True))
        raised = jnp.exp(scores - higher)
        # Where nothing has been read yet, exp(MASKED - MASKED) is 1.
        raised = jnp.where(scores > MASKED / 2, raised, 0.0) if masked else raised
        shrink = jnp.exp(top - higher)
        top_ref[...] = higher
        sum_ref[...] = sum_ref[...] * shrink + jnp.sum(raised, axis=0, keepdims=True)
        sums_ref[...] = sums_ref[...] * shrink + dot(v, raised.astype(v.dtype), (0, 0))

    def end():
        total = sum_ref[...]
        read = total > 0
        total = jnp.where(read, total, 1.0)
        out_ref[...] = (sums_ref[...] / total).T.astype(out_ref.dtype)
        total_ref[...] = jnp.where(read, top_ref[...] + jnp.log(total), 0.0)

    _for_pair(pairs, begin, add, end)


def _weights(scores, total_ref, masked):
    weights = jnp.exp(scores - total_ref[...])
    return jnp.where(scores > MASKED / 2, weights, 0.0) if masked else weights


def _queries_kernel(*refs, scale):
    """The gradient of the queries of a block."""
    pairs, refs = _Pairs(*refs[:6]), refs[6:]
    q_ref, k_ref, v_ref, of_q_ref, of_k_ref, grad_ref, total_ref, given_ref, dq_ref, sums_ref = refs

    def begin():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def add(masked):
        k = k_ref[...]
        scores = _scores(q_ref[...], k, of_q_ref, of_k_ref, scale, masked)
        ds = _weights(scores, total_ref, masked) * (dot(v_ref[...], grad_ref[...], (1, 1)) - given_ref[...])
        sums_ref[...] += dot(ds.astype(k.dtype), k, (0, 0))

    def end():
        dq_ref[...] = (sums_ref[...] * scale).astype(dq_ref.dtype)

    _for_pair(pairs, begin, add, end)


def _keys_kernel(*refs, scale):
    """The gradients of the keys and values of a block, from the queries of one head."""
    pairs, refs = _Pairs(*refs[:6]), refs[6:]
    q_ref, k_ref, v_ref, of_q_ref, of_k_ref, grad_ref, total_ref, given_ref, *refs = refs
    dk_ref, dv_ref, dk_sums_ref, dv_sums_ref = refs

    def begin():
        dk_sums_ref[...], dv_sums_ref[...] = jnp.zeros_like(dk_sums_ref), jnp.zeros_like(dv_sums_ref)

    def add(masked):
        q, grad = q_ref[...], grad_ref[...]
        scores = _scores(q, k_ref[...], of_q_ref, of_k_ref, scale, masked)
        weights = _weights(scores, total_ref, masked)
        dv_sums_ref[...] += dot(weights.astype(grad.dtype), grad, (1, 0))
        ds = weights * (dot(v_ref[...], grad, (1, 1)) - given_ref[...])
        dk_sums_ref[...] += dot(ds.astype(q.dtype), q, (1, 0))

    def end():
        dk_ref[...] = (dk_sums_ref[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sums_ref[...].astype(dv_ref.dtype)

    _for_pair(pairs, begin, add, end)


# --- around the kernels ----------------------------------------------------------------------------------


class _Call:
    """One attention: its arrays, filled up, and the kernels on them.

    Attributes:
        arrays: q, k, v and the masks of queries [B, 4, T] and of keys [B, S, 4].
        table: what its blocks hold.
        t, s: queries and keys of a block.
    """

    def __init__(self, q, k, v, of_q: MaskSpec, of_k: MaskSpec, scale: float):
        self.scale, self.group = scale, q.shape[2]
        self.t, self.s = (
            min(most, -(-n // 128) * 128) for most, n in ((QUERIES, q.shape[3]), (KEYS, k.shape[2]))
        )
        of_q = MaskSpec(*(filled(a.astype(jnp.int32), 1, self.t) for a in of_q))
        of_k = MaskSpec(*(filled(a.astype(jnp.int32), 1, self.s) for a in of_k))
        self.table = block_table(of_q, of_k, self.t, self.s)
        heads = (by_heads(x, size) for x, size in ((q, self.t), (k, self.s), (v, self.s)))
        self.arrays = (*heads, jnp.stack(of_q, axis=1), jnp.stack(of_k, axis=2))
        self.b, self.n, _, self.h = self.arrays[0].shape

    def cost(self, products: int, read: int, out: Sequence[tuple[Any, Any]]) -> pl.CostEstimate:
        """What a compiler may count for a kernel: how many pairs there are is known when it runs.

        Counted are those of one causal stream where there are as many queries as keys, else all.
        """
        own, other = self.table.shape[1:]
        pairs = own * (own + 1) // 2 if own == other else own * other
        scores = self.b * self.n * pairs * self.t * self.s
        written = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in out)
        return pl.CostEstimate(
            flops=2 * products * scores * self.h, transcendentals=scores, bytes_accessed=read + written
        )

    # Where the block of a pair lies in an array. `by` is the number of pairs that counts blocks of it.

    def query(self, by: str):
        at = lambda n, p, *pairs: (pairs[0][p], n, getattr(_Pairs(*pairs), by)[p], 0)  # noqa: E731
        return pl.BlockSpec((None, None, self.t, self.h), at)

    def number(self, by: str):
        at = lambda n, p, *pairs: (pairs[0][p], n, 0, getattr(_Pairs(*pairs), by)[p])  # noqa: E731
        return pl.BlockSpec((None, None, 1, self.t), at)

    def key(self, by: str, group: int):
        at = lambda n, p, *pairs: (pairs[0][p], jax.lax.div(n, group), getattr(_Pairs(*pairs), by)[p], 0)  # noqa: E731
        return pl.BlockSpec((None, None, self.s, self.h), at)

    def masks(self, queries: str, keys: str):
        at_q = lambda n, p, *pairs: (pairs[0][p], 0, getattr(_Pairs(*pairs), queries)[p])  # noqa: E731
        at_k = lambda n, p, *pairs: (pairs[0][p], getattr(_Pairs(*pairs), keys)[p], 0)  # noqa: E731
        return [pl.BlockSpec((None, 4, self.t), at_q), pl.BlockSpec((None, self.s, 4), at_k)]

    def run(
        self,
        kernel,
        own_queries: bool,
        products: int,
        more: Sequence[tuple[Any, Any]],
        out: Sequence[tuple[Any, Any]],
        scratch: Sequence[tuple[int, int]],
    ):
        """`kernel` for all pairs of blocks, of queries and of the keys they read or the other way about.

        Args:
            products: of matrices that it makes of a pair of blocks.
            more: (array, spec) of arguments beside the pairs and `arrays`.
            out: (shape and type, spec) of the results.
            scratch: shapes of float32 arrays a kernel adds up in.
        """
        pairs, count = _pairs(self.table if own_queries else jnp.swapaxes(self.table, 1, 2))
        q, k = ("own", "other") if own_queries else ("other", "own")
        inputs = [self.query(q), *[self.key(k, self.group)] * 2, *self.masks(q, k)]

        def call(count, *arrays, interpret):
            return pl.pallas_call(
                functools.partial(kernel, scale=self.scale),
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=len(pairs),
                    grid=(self.n, count),
                    in_specs=[*inputs, *(spec for _, spec in more)],
                    out_specs=[spec for _, spec in out],
                    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
                ),
                out_shape=[jax.ShapeDtypeStruct(*shape) for shape, _ in out],
                cost_estimate=self.cost(products, _bytes(arrays), [shape for shape, _ in out]),
                compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
                interpret=interpret,
            )(*arrays)

        real, interpreted = (functools.partial(call, interpret=x) for x in (False, True))
        arrays = (count, *pairs, *self.arrays, *(array for array, _ in more))
        return jax.lax.platform_dependent(*arrays, tpu=real, default=interpreted)


def _forward(q, k, v, of_q, of_k, *, scale):
    call = _Call(q, k, v, of_q, of_k, scale)
    like_q = call.arrays[0].shape
    out, total = call.run(
        _forward_kernel,
        True,
        2,
        [],
        [
            ((like_q, v.dtype), call.query("own")),
            (((*like_q[:2], 1, like_q[2]), jnp.float32), call.number("own")),
        ],
        [(1, call.t), (1, call.t), (call.h, call.t)],
    )
    t = q.shape[3]
    return out[:, :, :t].reshape(q.shape), total[:, :, 0, :t].reshape(*q.shape[:4], 1)


def _backward(q, k, v, of_q, of_k, out, total, grad, *, scale):
    given = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    call = _Call(q, k, v, of_q, of_k, scale)
    like_q, like_k = call.arrays[0].shape, call.arrays[1].shape
    numbers = [jnp.swapaxes(by_heads(x, call.t), 2, 3) for x in (total, given)]
    by_query = [by_heads(grad, call.t), *numbers]

    def given_to(by):
        return list(zip(by_query, [call.query(by), call.number(by), call.number(by)]))

    (dq,) = call.run(
        _queries_kernel,
        True,
        3,
        given_to("own"),
        [((like_q, q.dtype), call.query("own"))],
        [(call.t, call.h)],
    )
    by_head = (call.b, call.n, *like_k[2:])
    dk, dv = call.run(
        _keys_kernel,
        False,
        4,
        given_to("other"),
        [((by_head, a.dtype), call.key("own", 1)) for a in (k, v)],
        [(call.s, call.h)] * 2,
    )

    return dq[:, :, : q.shape[3]].reshape(q.shape), over_groups(dk, k), over_groups(dv, v)


def _bytes(arrays: Sequence[jax.Array]) -> int:
    """Of all of them."""
    return sum(a.size * a.dtype.itemsize for a in arrays)


forward, backward = on_each_device(_forward, _backward)
