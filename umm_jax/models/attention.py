"""Softmax attention behind one entry, :func:`attend`, which chooses among

    attention_plain      all scores of some queries at once
    attention_gathered   for CPUs: some queries at a time, with the keys they may read
    attention_blocks     for accelerators: blocks of queries and keys, in plain XLA
    attention_gpu, _tpu  the same as Pallas kernels; attention_kernels is what they share

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads (K divides N), G = N / K,
H head width.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from umm_jax.errors import ConfigError
from umm_jax.models import (
    attention_blocks,
    attention_gathered,
    attention_gpu,
    attention_kernels,
    attention_plain,
    attention_tpu,
)
from umm_jax.models.attention_plain import cut, joined
from umm_jax.models.layers import ATTENDED, is_plain
from umm_jax.models.masks import MaskSpec, dense, everything
from umm_jax.sharding import rows_here, split_rows, ways

# Up to so many scores [B, N, T, S] are simply made and kept for the backward pass (2 MiB, in four versions).
KEPT = 2**19

# Keys from which a CPU passes over what a block of queries may not read, where the mask is given by what is
# to be known of tokens. With fewer, that costs more than it saves: at 500 keys and 12 rows, 30 % of a step.
LONG = 1024

# The name of its products within ``layers.plainly``.
SCOPE = "attention"

IMPLEMENTATIONS = ("auto", "blocks", "kernels")


def require_known(implementation: str, name: str = "attention") -> None:
    """Raises ConfigError where a config's field `name` is none of :data:`IMPLEMENTATIONS`."""
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"{name} {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")


# See :func:`attend`.
Mask = jax.Array | tuple[MaskSpec, MaskSpec] | None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask = None,
    *,
    scale: float | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(scale q k^T) v with grouped-query heads; the softmax is taken in float32.

    Above :data:`KEPT` scores, none are kept: the backward pass makes them again from queries, keys and one
    number per query (FlashAttention, arXiv 2205.14135), in blocks of queries where there are many. Second
    derivatives are then not defined.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H]; head n reads key/value head n // (N / K).
        mask: True where a query may read a key; [B, T, S] or [B, 1, S], or None for everything; or what is
            to be known of the queries and of the keys, see ``masks``: then an accelerator makes no mask above
            KEPT scores. A query that may read nothing returns zeros, so that padding never produces NaN.
        scale: 1 / sqrt(H) unless given.
        implementation: of a large attention under what is to be known of tokens. "blocks" is plain XLA,
            "kernels" are Pallas kernels on GPUs and TPUs; "auto" is kernels on a GPU, where they have been
            measured, and blocks on a TPU, where they have been compiled and not run. A CPU has ways of its
            own. Without a mask "kernels" are taken where they are asked for.

    Returns:
        [B, T, N, H] in the dtype of `q`.

    Raises:
        ConfigError: an unknown implementation.
    """
    require_known(implementation)
    q, k, v = split_rows(q, k, v)
    b, t, n, h = q.shape
    s, kv = k.shape[1:3]
    if mask is None and implementation == "kernels" and not is_plain():
        mask = everything(b, t), everything(b, s)
    scale = h**-0.5 if scale is None else scale
    # Heads before tokens: both products are then plain batched matmuls on every backend.
    q = jnp.moveaxis(q.reshape(b, t, kv, n // kv, h), 1, 3)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if is_plain():
        with jax.named_scope(SCOPE):
            dense_mask = dense(*mask) if isinstance(mask, tuple) else mask
            out = attention_plain.attended(q, k, v, dense_mask, scale)
    elif b * n * t * s <= KEPT:
        out = attention_plain.attended(q, k, v, dense(*mask) if isinstance(mask, tuple) else mask, scale)
    else:
        out = _remade(q, k, v, mask, scale, implementation)
    return jnp.moveaxis(out, 3, 1).reshape(b, t, n, h)


@dataclasses.dataclass(frozen=True)
class _InBlocks:
    """As ``attention_plain.py``, for so many queries at a time that a device makes at most `most` scores.

    Attributes:
        whole: a block's queries are a multiple of it where there is room for that many.
    """

    most: int
    whole: int

    def _size(self, q, k) -> int:
        b, kv, g, t, _ = q.shape
        fit = max(self.most // (rows_here(b) * kv * g * k.shape[2]), 1)
        if fit >= t:
            return t
        if fit >= self.whole:
            return fit // self.whole * self.whole
        return math.ceil(t / math.ceil(t / fit))

    def forward(self, q, k, v, mask, scale):
        mask = dense(*mask) if isinstance(mask, tuple) else mask
        t, size = q.shape[3], self._size(q, k)
        if size == t:
            return attention_plain.forward(q, k, v, mask, scale)
        by_query = mask is not None and mask.shape[1] > 1
        one = lambda x: attention_plain.forward(x[0], k, v, x[1] if by_query else mask, scale)  # noqa: E731
        found = jax.lax.map(one, (cut(q, size, 3), cut(mask, size, 1) if by_query else None))
        return tuple(joined(x, 3, t) for x in found)

    def backward(self, q, k, v, mask, out, total, grad, scale):
        mask = dense(*mask) if isinstance(mask, tuple) else mask
        t, size = q.shape[3], self._size(q, k)
        if size == t:
            return attention_plain.backward(q, k, v, mask, out, total, grad, scale)
        by_query = mask is not None and mask.shape[1] > 1

        def step(sums, x):
            q, out, total, grad, own = x
            dq, dk, dv = attention_plain.backward(q, k, v, own if by_query else mask, out, total, grad, scale)
            return (sums[0] + dk, sums[1] + dv), dq

        start = (jnp.zeros_like(k), jnp.zeros_like(v))
        blocks = [cut(x, size, 3) for x in (q, out, total, grad)]
        (dk, dv), dq = jax.lax.scan(step, start, (*blocks, cut(mask, size, 1) if by_query else None))
        return joined(dq, 3, t), dk, dv


# What a CPU's caches hold beside the rest (2**19 to 2**21 are alike).
_ON_CPU = _InBlocks(2**20, 1)

# 512 MiB in float32, of which a few are alive at once; queries end up along the 128 lanes of a TPU.
_ELSEWHERE = _InBlocks(2**27, 128)


# The rule stands around the choice by platform, which is made when a program is lowered: differentiating
# through it would keep what the backward passes of all platforms need.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _remade(q, k, v, mask, scale, implementation):
    return _remade_forward(q, k, v, mask, scale, implementation)[0]


def _remade_forward(q, k, v, mask, scale, implementation):
    by_platform = _ways(q, k, mask, implementation)
    _note(q, k, by_platform)
    run = {name: functools.partial(_shared(way, mask)[0], scale=scale) for name, way in by_platform.items()}
    # Tied to the queries: a scan over layers that is differentiated takes out of its loop whatever is the
    # same in all of them, and would make and keep the masks of all blocks.
    tied, _ = jax.lax.optimization_barrier((mask, q))
    out, total = (checkpoint_name(x, ATTENDED) for x in jax.lax.platform_dependent(q, k, v, tied, **run))
    return out, (q, k, v, mask, out, total)


def _remade_backward(scale, implementation, saved, grad):
    q, k, _, mask, *_ = saved
    by_platform = _ways(q, k, mask, implementation)
    run = {name: functools.partial(_shared(way, mask)[1], scale=scale) for name, way in by_platform.items()}
    return *jax.lax.platform_dependent(*saved, grad, **run), None


def _ways(q, k, mask, implementation) -> dict[str, Any]:
    """What has a `forward` and a `backward`, by platform."""
    if not isinstance(mask, tuple):
        found = {"cpu": _ON_CPU, "default": _ELSEWHERE}
    else:
        cpu = attention_gathered if k.shape[2] >= LONG else _ON_CPU
        if q.shape[3] == 1:
            # A token that is being written: one program a head would walk all the keys, one block at a time.
            return {"cpu": cpu, "default": _ELSEWHERE}
        found = {"cpu": cpu, "default": attention_blocks}
        if implementation != "blocks":
            found["cuda"] = attention_gpu
        if implementation == "kernels":
            found["tpu"] = attention_tpu
    return found


_remade.defvjp(_remade_forward, _remade_backward)


def _shared(way, mask) -> tuple[Callable, Callable]:
    """Forward and backward of a `way`; each device does its own where the queries of a row are shared out.

    The compiler would gather them all for a loop over blocks of them. Kernels have been split already.
    """
    if way in (attention_gpu, attention_tpu) or not isinstance(mask, tuple) or ways("sequence") == 1:
        return way.forward, way.backward

    def forward(q, k, v, of_q, of_k, scale):
        return way.forward(q, k, v, (of_q, of_k), scale)

    def backward(q, k, v, of_q, of_k, out, total, grad, scale):
        return way.backward(q, k, v, (of_q, of_k), out, total, grad, scale)

    return attention_kernels.on_each_device(forward, backward)


# --- what is said of it -----------------------------------------------------------------------------------

_WORDS = {
    _ON_CPU: "scores of some queries at a time",
    _ELSEWHERE: "scores of some queries at a time, all where they are few, made again for the backward pass",
    attention_gathered: "some queries at a time, with the keys they may read",
    attention_blocks: "blocks that are read, in plain XLA",
    attention_gpu: "blocks that are read, as Pallas kernels (Triton)",
    attention_tpu: "blocks that are read, as Pallas kernels (opt-in: not yet run on a TPU)",
}
_NOTES: contextvars.ContextVar[tuple[str, dict] | None] = contextvars.ContextVar("attention", default=None)


@contextlib.contextmanager
def noted(platform: str) -> Iterator[dict[str, None]]:
    """Collects, from what is traced inside, how `platform` ("cpu", "gpu", "tpu") does each large attention.

    Small ones, whose scores are kept, are not told of.
    """
    found: dict[str, None] = {}
    token = _NOTES.set(({"gpu": "cuda"}.get(platform, platform), found))
    try:
        yield found
    finally:
        _NOTES.reset(token)


def _note(q, k, ways: dict[str, Any]) -> None:
    if (notes := _NOTES.get()) is not None:
        platform, found = notes
        way = _WORDS[ways.get(platform, ways["default"])]
        found[f"{q.shape[3]} queries, {k.shape[2]} keys: {way}"] = None


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[..., T, N*H] -> [..., T, N, H]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """[..., T, N, H] -> [..., T, N*H]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
