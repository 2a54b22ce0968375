"""What the kernels of attention for GPUs and for TPUs share.

Letters as in ``attention.py``: q [B, K, G, T, H], k and v [B, K, S, H]; in kernels, heads are one axis N.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from umm_jax import sharding
from umm_jax.models.masks import MaskSpec


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """The product of two matrices in float32, summed over an axis of each."""
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def filled(x: jax.Array, axis: int, size: int) -> jax.Array:
    """`axis` up to a multiple of `size`, with zeros."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, pad)


def by_heads(x: jax.Array, size: int) -> jax.Array:
    """[B, K, (G,) T, H] -> [B, N, T, H], T filled up."""
    return filled(x.reshape(x.shape[0], -1, *x.shape[-2:]), 2, size)


def over_groups(parts: Sequence[jax.Array], like: jax.Array) -> jax.Array:
    """Sums arrays [B, N, S, H], and each over the heads that share keys, and cuts off what was filled up.

    A program for all heads that share a key would need no sum, and leave most of a chip idle.
    """
    x = sum(x.astype(jnp.float32) for x in parts)
    x = jnp.sum(x.reshape(*like.shape[:2], -1, *x.shape[2:]), axis=2)
    return x[:, :, : like.shape[2], : like.shape[3]].astype(like.dtype)


_Q, _K = ("batch", "heads", None, "sequence", None), ("batch", "heads", None, None)
_ARGUMENTS = (_Q, _K, _K, MaskSpec(*[("batch", "sequence")] * 4), MaskSpec(*[("batch", None)] * 4))


def on_each_device(forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """`forward` and `backward` as ``attention_blocks`` has them, run by each device on its own part.

    That is its rows and heads, and of their queries its share. The compiler does not split a kernel: without
    this, every device would get all of them.

    Args:
        forward: (q, k, v, of_q, of_k, scale=) -> out, total.
        backward: (q, k, v, of_q, of_k, out, total, grad, scale=) -> dq, dk, dv.
    """

    def forward_(q, k, v, mask: tuple[MaskSpec, MaskSpec], scale: float):
        out = (q, jax.ShapeDtypeStruct((*q.shape[:4], 1), jnp.float32))
        run = functools.partial(forward, scale=scale)
        return sharding.on_each_device(run, (q, k, v, *mask), _ARGUMENTS, out, (_Q, _Q))

    def backward_(q, k, v, mask: tuple[MaskSpec, MaskSpec], out, total, grad, scale: float):
        arrays, axes = (q, k, v, *mask, out, total, grad), (*_ARGUMENTS, _Q, _Q, _Q)
        run = functools.partial(backward, scale=scale)
        return sharding.on_each_device(run, arrays, axes, (q, k, v), (_Q, _K, _K), summed=("sequence",))

    return forward_, backward_
