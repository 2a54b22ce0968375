"""The mask: as drawn, in all its renderings, and attention under it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mask_toy import random_spec

from umm_jax.models import attention, attention_blocks, attention_gathered
from umm_jax.models.attention import attend
from umm_jax.models.masks import (
    CAUSAL,
    EMPTY,
    FULL,
    MIXED,
    NOISE,
    WHOLE,
    MaskSpec,
    block_table,
    dense,
    joined,
)


def spec(sample, split, mode, order):
    return MaskSpec(*(jnp.asarray(a, jnp.int32)[None] for a in (sample, split, mode, order)))


def test_the_mask_is_as_drawn():
    one = spec(
        [1] * 7 + [2, 2],
        [0, 0, 1, 1, 2, 2, 3, 0, 0],
        [CAUSAL, CAUSAL, NOISE, NOISE, FULL, FULL, CAUSAL, CAUSAL, CAUSAL],
        [0, 1, 2, 3, 4, 5, 6, 0, 1],
    )
    drawn = """
        1 . . . . . . . .
        1 1 . . . . . . .
        1 1 1 1 . . . . .
        1 1 1 1 . . . . .
        1 1 . . 1 1 . . .
        1 1 . . 1 1 . . .
        1 1 . . 1 1 1 . .
        . . . . . . . 1 .
        . . . . . . . 1 1
    """
    expected = [[c == "1" for c in line.split()] for line in drawn.strip().splitlines()]
    assert np.asarray(dense(one, one))[0].tolist() == expected


def test_where_tokens_lie_changes_nothing():
    one = random_spec(0, 60)
    new = np.random.default_rng(1).permutation(60)
    moved = MaskSpec(*(a[:, new] for a in one))
    np.testing.assert_array_equal(dense(moved, moved), np.asarray(dense(one, one))[:, new][:, :, new])
    halves = [MaskSpec(*(a[:, part] for a in one)) for part in (slice(0, 25), slice(25, 60))]
    np.testing.assert_array_equal(dense(joined(*halves), one), dense(one, one))


@pytest.mark.parametrize("seed", range(4))
def test_the_table_of_blocks_is_certain_where_it_says_so(seed):
    one = random_spec(seed, 120)
    table = np.asarray(block_table(one, one, 12, 20))
    blocks = np.asarray(dense(one, one)).reshape(2, 10, 12, 6, 20).transpose(0, 1, 3, 2, 4)
    some, every = blocks.any((3, 4)), blocks.all((3, 4))
    assert not some[table == EMPTY].any() and every[table == WHOLE].all()
    # It must also be of use: most of what is empty is found, which a table of MIXED alone would not.
    assert (table == EMPTY).sum() > 0.6 * (~some).sum() > 0
    assert (table == MIXED).sum() < table.size


def test_blocks_that_do_not_divide_are_refused():
    one = random_spec(0, 60)
    with pytest.raises(ValueError, match="blocks of 7 do not divide 60 queries"):
        block_table(one, one, 7, 20)


@pytest.fixture(params=["gathered", "blocks"])
def schedule(request, monkeypatch):
    """Either way to attend under a mask that is never made whole, whatever the platform."""
    monkeypatch.setattr(attention, "KEPT", 0)
    monkeypatch.setattr(attention, "LONG", 0)
    if request.param == "blocks":
        for name in ("forward", "backward"):
            monkeypatch.setattr(attention_gathered, name, getattr(attention_blocks, name))
    return request.param


@pytest.fixture
def small_blocks(schedule, monkeypatch):
    """Several blocks along both sides."""
    for module in (attention_blocks, attention_gathered):
        monkeypatch.setattr(module, "QUERIES", 16)
        monkeypatch.setattr(module, "KEYS", 24 if module is attention_blocks else 8)
    monkeypatch.setattr(attention_gathered, "SCORES", 1)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2)])
def test_attention_in_blocks_is_attention(small_blocks, heads, kv_heads):
    tokens, one, rng = 70, random_spec(3, 70), np.random.default_rng(0)
    q, g = (jnp.asarray(rng.normal(size=(2, tokens, heads, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, tokens, kv_heads, 8)), jnp.float32) for _ in range(2))

    def run(mask):
        def f(q, k, v):
            out = attend(q, k, v, mask)
            return jnp.sum(out * g), out

        return jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    allowed = dense(one, one)[:, None]
    reads = jnp.any(allowed, -1, keepdims=True)

    def plain(q, k, v):
        k, v = (jnp.repeat(a, heads // kv_heads, axis=2) for a in (k, v))
        # A softmax over nothing has no gradient: what reads nothing reads all here, and is then zeroed.
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * 8**-0.5 + jnp.where(allowed | ~reads, 0.0, -1e30)
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1) * reads, v)
        return jnp.sum(out * g), out

    grads, out = run((one, one))
    expected, plain_out = jax.grad(plain, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    np.testing.assert_allclose(out, plain_out, rtol=2e-5, atol=2e-6)
    assert (np.asarray(out)[np.asarray(one.sample) == 0] == 0).all()
    for ours, theirs in zip(grads, expected):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=5e-6)


def test_memory_of_attention_grows_with_the_tokens_not_their_square(schedule):
    def temporaries(tokens: int) -> int:
        arrays = [jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)] * 3
        one = MaskSpec(*[jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 4)

        def f(q, k, v, m):
            # Two layers, for a scan keeps what does not change from one to the next.
            return jnp.sum(jax.lax.scan(lambda x, _: (attend(x, k, v, (m, m)), None), q, length=2)[0])

        compiled = jax.jit(jax.grad(f, argnums=(0, 1, 2))).lower(*arrays, one).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(16384)
    assert large < 6 * small, (small, large)
