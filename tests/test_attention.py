"""Attention that keeps its scores and attention that makes them again are the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umm_jax.models import attention
from umm_jax.models.attention import attend


def inputs(t, s, heads=4, kv=2, width=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, t, heads, width), (2, s, kv, width), (2, s, kv, width))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def plain(q, k, v, mask):
    """The definition, in numpy float64, one head at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        own = n // (q.shape[2] // k.shape[2])
        scores = q[b, :, n] @ k[b, :, own].T / q.shape[-1] ** 0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        if mask is not None:
            weights = weights * np.broadcast_to(mask[b], weights.shape)
        total = weights.sum(-1, keepdims=True)
        out[b, :, n] = np.divide(weights, total, where=total > 0, out=np.zeros_like(weights)) @ v[b, :, own]
    return out


def masks(t, s):
    rng = np.random.default_rng(1)
    causal = np.tril(np.ones((2, t, s), bool))
    causal[1, 3] = False  # a query that may read nothing
    return {"none": None, "queries": causal, "keys": rng.random((2, 1, s)) < 0.5}


@pytest.mark.parametrize("kind", ["none", "queries", "keys"])
@pytest.mark.parametrize(
    "block, whole", [(2 * 4 * 13 * 4, 1), (2 * 4 * 13 * 7, 3), (2 * 4 * 13, 8), (2**20, 1)]
)
def test_scores_made_again_change_neither_result_nor_gradients(monkeypatch, kind, block, whole):
    """13 queries, 4 or 6 or 1 at a time, where a last block is not full; a large block holds all of them."""
    q, k, v = inputs(13, 13)
    mask = masks(13, 13)[kind]
    given = None if mask is None else jnp.asarray(mask)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=q.shape), jnp.float32)

    def run():
        def loss(q, k, v):
            out = attend(q, k, v, given)
            return jnp.sum(out * direction), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return (out, *gradients)

    kept = run()
    np.testing.assert_allclose(kept[0], plain(q, k, v, mask), atol=2e-6)
    monkeypatch.setattr(attention, "KEPT", 0)
    monkeypatch.setattr(attention, "_ON_CPU", attention._InBlocks(block, whole))
    for again, before in zip(run(), kept, strict=True):
        np.testing.assert_allclose(again, before, atol=5e-6)
    # The gradients are those of the definition, not of each other alone.
    step = 1e-3
    q_up, q_down = q + step * direction, q - step * direction
    slope = np.sum((plain(q_up, k, v, mask) - plain(q_down, k, v, mask)) * np.asarray(direction)) / (2 * step)
    np.testing.assert_allclose(np.sum(np.asarray(kept[1]) * np.asarray(direction)), slope, rtol=2e-3)


def test_many_scores_are_not_kept_for_the_backward_pass():
    """A program for 2**24 scores needs less memory than four copies of them, which keeping them takes."""
    q, k, v = (jax.ShapeDtypeStruct((1, 2048, 4, 8), jnp.float32) for _ in range(3))
    scores = 4 * 2048 * 2048 * 4
    gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v) ** 2), argnums=(0, 1, 2)))
    memory = gradient.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes
    assert memory < scores
