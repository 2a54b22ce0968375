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
# Of a block of keys in the forward pass where there are many: a kernel's turn has work of its own beside its
# pair's, and pays it half as often.
MORE_KEYS, MANY = 1024, 8192
ROOM = 10 * 2**20  # bytes of fast memory for the gradients of queries; no chip has less than 16 MiB of it
LOG2_E = math.log2(math.e)


def block_of_keys(keys: int) -> int:
    """Keys of a block in the forward pass."""
    return KEYS if keys < MANY else MORE_KEYS


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
    """[s, t], for powers of two: chips have no other, and the factor between goes with the scale."""
    scores = dot(k, q, (1, 1)) * (scale * LOG2_E)
    if not masked:
        return scores
    of_q = MaskSpec(*(of_q_ref[i : i + 1, :] for i in range(4)))
    of_k = MaskSpec(*(of_k_ref[:, i : i + 1] for i in range(4)))
    return jnp.where(visible(of_q, of_k), scores, MASKED)


def _attend_forward(*refs, scale):
    pairs, refs = _Pairs(*refs[:6]), refs[6:]
    q_ref, k_ref, v_ref, of_q_ref, of_k_ref, out_ref, total_ref, top_ref, sum_ref, sums_ref = refs

    def begin():
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        sum_ref[...], sums_ref[...] = jnp.zeros_like(sum_ref), jnp.zeros_like(sums_ref)

    def add(masked):
        v, top = v_ref[...], top_ref[...]
        scores = _scores(q_ref[...], k_ref[...], of_q_ref, of_k_ref, scale, masked)
        higher = jnp.maximum(top, jnp.max(scores, axis=0, keepdims=True))
        raised = jnp.exp2(scores - higher)
        # Where nothing has been read yet, 2 ** (MASKED - MASKED) is 1.
        raised = jnp.where(scores > MASKED / 2, raised, 0.0) if masked else raised
        shrink = jnp.exp2(top - higher)
        top_ref[...] = higher
        sum_ref[...] = sum_ref[...] * shrink + jnp.sum(raised, axis=0, keepdims=True)
        sums_ref[...] = sums_ref[...] * shrink + dot(v, raised.astype(v.dtype), (0, 0))

    def end():
        total = sum_ref[...]
        read = total > 0
        total = jnp.where(read, total, 1.0)
        out_ref[...] = (sums_ref[...] / total).T.astype(out_ref.dtype)
        total_ref[...] = jnp.where(read, top_ref[...] / LOG2_E + jnp.log(total), 0.0)

    _for_pair(pairs, begin, add, end)


def _attend_backward(*refs, scale):
    """All gradients: of the keys and values of a block, from the queries of one head, and of those queries.

    The blocks of queries come round again with every block of keys, so their gradients are added up in fast
    memory, those of a whole row [blocks, H, t], and leave it with the row's last pair.
    """
    pairs, refs = _Pairs(*refs[:6]), refs[6:]
    q_ref, k_ref, v_ref, of_q_ref, of_k_ref, grad_ref, total_ref, given_ref, *refs = refs
    dk_ref, dv_ref, dq_ref, dk_sums_ref, dv_sums_ref, dq_sums_ref, turned_ref = refs
    n, p, count = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    row, before, after = (pairs.row[jnp.clip(p + i, 0, count - 1)] for i in (0, -1, 1))

    @pl.when((p == 0) | (row != before))
    def _():
        def clear(i, _):
            dq_sums_ref[i] = jnp.zeros(dq_sums_ref.shape[1:], jnp.float32)

        jax.lax.fori_loop(0, dq_sums_ref.shape[0], clear, None)

    def begin():
        dk_sums_ref[...], dv_sums_ref[...] = jnp.zeros_like(dk_sums_ref), jnp.zeros_like(dv_sums_ref)
        turned_ref[...] = k_ref[...].T

    def add(masked):
        q, grad = q_ref[...], grad_ref[...]
        scores = _scores(q, k_ref[...], of_q_ref, of_k_ref, scale, masked)
        weights = jnp.exp2(scores - total_ref[...] * LOG2_E)
        weights = jnp.where(scores > MASKED / 2, weights, 0.0) if masked else weights
        dv_sums_ref[...] += dot(weights.astype(grad.dtype), grad, (1, 0))
        ds = (weights * (dot(v_ref[...], grad, (1, 1)) - given_ref[...])).astype(q.dtype)
        dk_sums_ref[...] += dot(ds, q, (1, 0))
        dq_sums_ref[pairs.other[p]] += dot(turned_ref[...], ds, (1, 0))

    def end():
        dk_ref[...] = (dk_sums_ref[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sums_ref[...].astype(dv_ref.dtype)

    _for_pair(pairs, begin, add, end)

    @pl.when((p == count - 1) | (row != after))
    def _():
        pltpu.sync_copy(dq_sums_ref, dq_ref.at[row, n])


# --- around the kernels ----------------------------------------------------------------------------------


class _Call:
    """One attention: its arrays, filled up, and the kernels on them.

    Attributes:
        arrays: q, k, v and the masks of queries [B, 4, T] and of keys [B, S, 4].
        table: what its blocks hold.
        t, s: queries and keys of a block.
        start: keys before the first query, were the mask causal; None is not known.
    """

    def __init__(self, q, k, v, of_q: MaskSpec, of_k: MaskSpec, scale: float, start: int | None, keys: int):
        self.scale, self.group, self.start = scale, q.shape[2], start
        self.t, self.s = (
            min(most, -(-n // 128) * 128) for most, n in ((QUERIES, q.shape[3]), (keys, k.shape[2]))
        )
        of_q = MaskSpec(*(filled(a.astype(jnp.int32), 1, self.t) for a in of_q))
        of_k = MaskSpec(*(filled(a.astype(jnp.int32), 1, self.s) for a in of_k))
        self.table = block_table(of_q, of_k, self.t, self.s)
        heads = (by_heads(x, size) for x, size in ((q, self.t), (k, self.s), (v, self.s)))
        self.arrays = (*heads, jnp.stack(of_q, axis=1), jnp.stack(of_k, axis=2))
        self.b, self.n, _, self.h = self.arrays[0].shape

    def cost(self, products: int, read: int, out: Sequence[tuple[Any, Any]]) -> pl.CostEstimate:
        """What a compiler may count for a kernel: how many pairs there are is known when it runs.

        A head is counted as wide as a matrix unit, which takes as long over a narrower one; and pairs, as
        those of one causal stream where it is known what stands before the queries, else all.
        """
        queries, keys = (x.shape[2] for x in self.arrays[:2])
        if self.start is not None:
            keys = min(keys, self.start + (queries + self.s) // 2)
        scores = self.b * self.n * queries * keys
        written = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in out)
        return pl.CostEstimate(
            flops=2 * products * scores * -(-self.h // 128) * 128,
            transcendentals=scores,
            bytes_accessed=read + written,
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
        scratch: Sequence[tuple[Any, Any]],
    ):
        """`kernel` for all pairs of blocks, of queries and of the keys they read or the other way about.

        Args:
            products: of matrices that it makes of a pair of blocks.
            more: (array, spec) of arguments beside the pairs and `arrays`.
            out: (shape and type, spec) of the results.
            scratch: (shape, type) of arrays in fast memory that a kernel keeps from pair to pair.
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
                    scratch_shapes=[pltpu.VMEM(*array) for array in scratch],
                ),
                out_shape=[jax.ShapeDtypeStruct(*shape) for shape, _ in out],
                cost_estimate=self.cost(products, _bytes(arrays), [shape for shape, _ in out]),
                compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
                interpret=interpret,
                name=kernel.__name__.strip("_"),
            )(*arrays)

        real, interpreted = (functools.partial(call, interpret=x) for x in (False, True))
        arrays = (count, *pairs, *self.arrays, *(array for array, _ in more))
        return jax.lax.platform_dependent(*arrays, tpu=real, default=interpreted)


class _Span(NamedTuple):
    """Queries of a row that are in a kernel together: [first, end), and the keys before, see ``_Call``."""

    first: int
    end: int
    start: int | None

    def of(self, x: jax.Array, axis: int = 3) -> jax.Array:
        return jax.lax.slice_in_dim(x, self.first, self.end, axis=axis)


def _spans(q, k) -> list[_Span]:
    """As few as there is room for."""
    t, h = q.shape[3:]
    size = -(-t // -(-4 * t * h // ROOM))  # of as many spans as ROOM goes into the gradients, rounded up
    size = -(-size // QUERIES) * QUERIES
    causal = t == k.shape[2]
    return [_Span(i, min(i + size, t), i if causal else None) for i in range(0, t, size)]


def _forward(q, k, v, of_q, of_k, *, scale):
    found = []
    for span in _spans(q, k):
        part, of_part = span.of(q), MaskSpec(*(span.of(a, axis=1) for a in of_q))
        call = _Call(part, k, v, of_part, of_k, scale, span.start, block_of_keys(k.shape[2]))
        like_q = call.arrays[0].shape
        out, total = call.run(
            _attend_forward,
            True,
            2,
            [],
            [
                ((like_q, v.dtype), call.query("own")),
                (((*like_q[:2], 1, like_q[2]), jnp.float32), call.number("own")),
            ],
            [((1, call.t), jnp.float32)] * 2 + [((call.h, call.t), jnp.float32)],
        )
        t = part.shape[3]
        found.append((out[:, :, :t].reshape(part.shape), total[:, :, 0, :t].reshape(*part.shape[:4], 1)))
    out, total = zip(*found)
    return jnp.concatenate(out, axis=3), jnp.concatenate(total, axis=3)


def _backward(q, k, v, of_q, of_k, out, total, grad, *, scale):
    given = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    found = []
    for span in _spans(q, k):
        part, of_part = span.of(q), MaskSpec(*(span.of(a, axis=1) for a in of_q))
        call = _Call(part, k, v, of_part, of_k, scale, span.start, KEYS)
        like_q, like_k = call.arrays[0].shape, call.arrays[1].shape
        numbers = [jnp.swapaxes(by_heads(span.of(x), call.t), 2, 3) for x in (total, given)]
        by_head, blocks = (call.b, call.n, *like_k[2:]), call.table.shape[1]
        by_block = (blocks, call.h, call.t)
        dk, dv, dq = call.run(
            _attend_backward,
            False,
            5,
            [
                (by_heads(span.of(grad), call.t), call.query("other")),
                *((x, call.number("other")) for x in numbers),
            ],
            [
                *(((by_head, a.dtype), call.key("own", 1)) for a in (k, v)),
                (((*by_head[:2], *by_block), jnp.float32), pl.BlockSpec(memory_space=pl.ANY)),
            ],
            [
                *[((call.s, call.h), jnp.float32)] * 2,
                (by_block, jnp.float32),
                ((call.h, call.s), k.dtype),
            ],
        )
        dq = (jnp.swapaxes(dq, 3, 4).reshape(like_q) * scale).astype(q.dtype)
        found.append((dq[:, :, : part.shape[3]].reshape(part.shape), dk, dv))
    dq, dk, dv = zip(*found)
    return jnp.concatenate(dq, axis=3), over_groups(dk, k), over_groups(dv, v)


def _bytes(arrays: Sequence[jax.Array]) -> int:
    """Of all of them."""
    return sum(a.size * a.dtype.itemsize for a in arrays)


forward, backward = on_each_device(_forward, _backward)
