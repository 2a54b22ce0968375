"""Kernels of attention, in Pallas' interpreter: what they give, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mask_toy import random_spec

from umm_jax.errors import ConfigError
from umm_jax.models import attention, attention_gpu, attention_plain, attention_tpu
from umm_jax.models.attention import attend
from umm_jax.models.layers import checkpoint_policy
from umm_jax.models.masks import EMPTY, MIXED, WHOLE, MaskSpec, dense, stream
from umm_jax.models.mot import MixtureConfig


@pytest.fixture(params=["gpu", "tpu"])
def kernels(request, monkeypatch):
    """The kernels of one kind of chip, in blocks so small that there are many."""
    if request.param == "gpu":
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(
                attention_gpu, name, {2: attention_gpu.Blocks(16, 16), 4: attention_gpu.Blocks(32, 16)}
            )
        return attention_gpu
    monkeypatch.setattr(attention_tpu, "QUERIES", 128)
    monkeypatch.setattr(attention_tpu, "KEYS", 256)
    monkeypatch.setattr(attention_tpu, "MORE_KEYS", 384)
    monkeypatch.setattr(attention_tpu, "MANY", 350)
    monkeypatch.setattr(attention_tpu, "ROOM", 16_000)
    return attention_tpu


def arrays(tokens: int, width: int, dtype=jnp.float32, rows: int = 2, kv_heads: int = 2, group: int = 2):
    """q, k, v, a mask and a gradient of the result."""
    rng = np.random.default_rng(tokens)
    q, grad = (jnp.asarray(rng.normal(size=(rows, kv_heads, group, tokens, width)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(rows, kv_heads, tokens, width)), dtype) for _ in range(2))
    return q, k, v, random_spec(3, tokens, rows), grad


def both(way, q, k, v, mask, grad):
    """Result, logarithm of sums, and gradients."""
    out, total = way.forward(q, k, v, mask, 0.3)
    return out, total, *way.backward(q, k, v, mask, out, total, grad, 0.3)


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 3e-6), (jnp.bfloat16, 1e-2)])
def test_kernels_attend_as_one_product_does(kernels, dtype, bound):
    # A width that is no power of two, and tokens that are no multiple of any block.
    *arguments, mask, grad = arrays(390, 24, dtype)
    found = both(kernels, *arguments, (mask, mask), grad)
    exact = [x.astype(jnp.float32) for x in arguments]
    expected = both(attention_plain, *exact, dense(mask, mask), grad.astype(jnp.float32))
    for ours, theirs in zip(found, expected):
        assert ours.shape == theirs.shape
        ours = ours.astype(jnp.float32)
        assert jnp.linalg.norm(ours - theirs) <= bound * jnp.linalg.norm(theirs)
    assert found[0].dtype == dtype and found[2].dtype == dtype
    assert (np.asarray(found[0], np.float32)[:, :, :, -12:] == 0).all()  # padding reads nothing


def test_queries_may_be_fewer_than_keys(kernels):
    """As where a turn is read after others."""
    q, k, v, mask, grad = arrays(300, 16)
    last = MaskSpec(*(a[:, 250:290] for a in mask))
    part = (q[:, :, :, 250:290], k, v), grad[:, :, :, 250:290]
    found = both(kernels, *part[0], (last, mask), part[1])
    for ours, theirs in zip(found, both(attention_plain, *part[0], dense(last, mask), part[1])):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=5e-6)


def test_another_sample_changes_no_bit(kernels):
    q, k, v, mask, grad = arrays(300, 16)
    # Both rows have several samples; what belongs to sample 1 is held, the rest is drawn anew.
    held = mask.sample == 1
    assert held.any() and not held.all()
    other = lambda x: jnp.where(held[:, None, :, None], x, x + 1)  # noqa: E731
    first = both(kernels, q, k, v, (mask, mask), grad)
    q, grad = (jnp.where(held[:, None, None, :, None], x, x + 1) for x in (q, grad))
    second = both(kernels, q, other(k), other(v), (mask, mask), grad)
    for a, b in zip(first, second):
        at = np.broadcast_to(held[:, None, None, :, None] if a.ndim == 5 else held[:, None, :, None], a.shape)
        np.testing.assert_array_equal(np.asarray(a)[at], np.asarray(b)[at])


def test_pairs_are_the_blocks_that_are_read_and_one_of_those_that_read_nothing():
    table = jnp.array([[[WHOLE, EMPTY, MIXED], [EMPTY] * 3], [[EMPTY, WHOLE, EMPTY], [EMPTY, EMPTY, MIXED]]])
    pairs, count = attention_tpu._pairs(table)
    assert np.array(pairs).T[: int(count)].tolist() == [
        [0, 0, 0, WHOLE, 1, 0],
        [0, 0, 2, MIXED, 0, 1],
        [0, 1, 0, MIXED, 1, 1],
        [1, 0, 1, WHOLE, 1, 1],
        [1, 1, 2, MIXED, 1, 1],
    ]


def lowered(platform: str, implementation: str, queries: int = 1024) -> str:
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), jnp.float32) for n in (queries, 2**20 // queries))
    of_q, of_k = (MaskSpec(*[jax.ShapeDtypeStruct(a.shape[:2], jnp.int32)] * 4) for a in (q, k))

    def f(q, k, v, *mask):
        return jnp.sum(attend(q, k, v, mask, implementation=implementation))

    traced = jax.jit(jax.grad(f, argnums=(0, 1, 2))).trace(q, k, k, of_q, of_k)
    try:
        return traced.lower(lowering_platforms=(platform,)).as_text()
    except RuntimeError as error:
        if "No supported GPU" in str(error):
            pytest.skip(f"JAX {jax.__version__} lowers Triton kernels only where it sees a GPU")
        raise


@pytest.mark.parametrize(
    "platform, implementation, kernels",
    [
        ("cuda", "auto", 3),
        ("cuda", "blocks", 0),
        ("tpu", "auto", 0),
        ("tpu", "kernels", 2),
        ("cpu", "kernels", 0),
    ],
)
def test_which_platforms_run_kernels(platform, implementation, kernels):
    text = lowered(platform, implementation)
    assert text.count("triton") + text.count("@tpu_custom_call") == kernels
    with attention.noted(platform) as lines:
        lowered(platform, implementation)
    assert len(lines) == 1 and ("Pallas" in next(iter(lines))) == (kernels > 0)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_token_that_is_being_written_runs_no_kernel(platform):
    text = lowered(platform, "kernels", queries=1)
    assert "triton" not in text and "tpu_custom_call" not in text and "while" not in text


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ConfigError, match="choose one of auto, blocks, kernels"):
        MixtureConfig(attention="flash")
    q = jnp.zeros((1, 2, 1, 8))
    with pytest.raises(ConfigError, match="choose one of auto, blocks, kernels"):
        attend(q, q, q, implementation="flash")


@pytest.mark.parametrize(
    "policy, forwards", [("full", 2), ("dots_no_batch", 2), ("dots_attention", 1), ("attention", 1)]
)
def test_a_policy_may_keep_what_attention_gives(policy, forwards):
    """Then a rematerialised layer does not run it again, and the gradients are the same."""
    q = jax.random.normal(jax.random.key(0), (2, 512, 2, 8))
    mask = stream(jnp.ones((2, 512), jnp.int32))

    def layer(q):
        return jnp.sum(jnp.sin(attend(jnp.cos(q), q, q, (mask, mask))) ** 2)

    made = jax.value_and_grad(jax.checkpoint(layer, policy=checkpoint_policy(policy)))
    np.testing.assert_allclose(made(q)[1], jax.grad(layer)(q), rtol=1e-5, atol=1e-5)
    # Weights are made once by each run of the forward pass, and once by the backward pass.
    assert jax.jit(made).lower(q).as_text().count("stablehlo.exponential") == forwards + 1
