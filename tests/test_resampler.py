"""Resamplers: the reference's numbers, what a mask hides, dropout by key, and the bypass."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import filled, fixture, load, qformer_params

from umm_jax.errors import ConfigError
from umm_jax.models.resampler import Bypass, QFormer, ResamplerConfig, build

TINY = ResamplerConfig(d_in=6, d_out=8, queries=3, layers=2, heads=2, mlp=12, cross_every=2, dropout=0.2)


@nnx.jit
def _run(resampler, tokens, mask=None, key=None):
    return resampler(tokens, mask, key)


def _tokens(b=2, t=5, d=6):
    return jnp.asarray(np.random.default_rng(0).normal(size=(b, t, d)), jnp.float32)


def test_masked_tokens_do_not_matter():
    resampler = filled(lambda: build(TINY, rngs=nnx.Rngs(0)))
    tokens = _tokens()
    mask = jnp.arange(5) < jnp.array([[2], [5]])
    out, out_mask = _run(resampler, tokens, mask)
    assert out.shape == (2, 3, 8) and out_mask is None
    np.testing.assert_allclose(out, _run(resampler, tokens.at[0, 2:].set(9.0), mask)[0], atol=1e-6)
    np.testing.assert_allclose(out[:1], _run(resampler, tokens[:1, :2])[0], atol=1e-5)
    moved = np.abs(out - _run(resampler, tokens.at[:, 1].set(9.0), mask)[0])
    assert (moved.max((1, 2)) > 1e-4).all()


def test_queries_that_start_from_their_tokens():
    config = replace(TINY, d_in=8, queries=3, dropout=0.0, from_tokens=True)
    resampler = filled(lambda: build(config, rngs=nnx.Rngs(0)))
    plain = filled(lambda: build(replace(config, from_tokens=False), rngs=nnx.Rngs(0)))
    tokens = _tokens(d=8)
    mask = jnp.arange(5) < jnp.array([[2], [5]])
    out = _run(resampler, tokens, mask)[0]
    assert out.shape == (2, 3, 8)
    np.testing.assert_allclose(out, _run(resampler, tokens.at[0, 2:].set(9.0), mask)[0], atol=1e-6)
    # The parameters are the same; a query without a token starts from its vector alone.
    np.testing.assert_allclose(_run(resampler, jnp.zeros((2, 2, 8)))[0], _run(plain, jnp.zeros((2, 2, 8)))[0])
    fresh = build(config, rngs=nnx.Rngs(0))
    close = _run(fresh, tokens)[0]
    start = fresh.norm(tokens[:, :3] + fresh.queries[...])
    assert np.mean((close - start) ** 2) < 0.05 < np.mean((close - _run(plain, tokens)[0]) ** 2)
    with pytest.raises(ConfigError, match="from_tokens"):
        replace(TINY, from_tokens=True)


def test_dropout_needs_a_key_and_follows_it():
    resampler = filled(lambda: build(TINY, rngs=nnx.Rngs(0)))
    draw = [_run(resampler, _tokens(), None, jax.random.key(k))[0] for k in (0, 0, 1)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert np.abs(draw[0] - draw[2]).max() > 1e-2
    assert np.abs(draw[0] - _run(resampler, _tokens())[0]).max() > 1e-2


def test_bypass_keeps_tokens_and_mask():
    tokens, mask = _tokens(), jnp.ones((2, 5), bool)
    same = build(ResamplerConfig(kind="none", d_in=6, d_out=6), rngs=nnx.Rngs(0))
    out, out_mask = same(tokens, mask)
    assert isinstance(same, Bypass) and out is tokens and out_mask is mask
    wider = build(ResamplerConfig(kind="none", d_in=6, d_out=8), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(wider(tokens)[0], tokens @ wider.project.kernel[...], atol=1e-6)


def test_impossible_sizes():
    with pytest.raises(ConfigError, match="must divide the 3 layers"):
        ResamplerConfig(layers=3, cross_every=2)
    with pytest.raises(ConfigError, match="heads"):
        ResamplerConfig(d_out=10, heads=4)


@pytest.mark.parametrize("which", ["vis", "dec"])
def test_reference(which):
    t, state = fixture("c_perceiver"), fixture("model")
    if which == "vis":
        prefix = "visual_tokenizer.perceiver_resampler"
        config = ResamplerConfig(
            d_in=32, d_out=32, queries=8, layers=4, heads=4, mlp=96, cross_every=2, qk_norm=True
        )
        mask = None
    else:
        prefix = "image_decoder.perceiver_resampler"
        config = ResamplerConfig(
            d_in=64, d_out=48, queries=10, layers=1, heads=4, mlp=96, cross_every=1, qk_norm=False
        )
        mask = jnp.asarray(t["dec_encoder_attention_mask"])
    params = qformer_params(
        state, prefix, layers=config.layers, cross_every=config.cross_every, qk_norm=config.qk_norm
    )
    resampler = load(lambda: QFormer(config, rngs=nnx.Rngs(0)), params)
    out, _ = _run(resampler, jnp.asarray(t[f"{which}_encoder_hidden_states"]), mask)
    np.testing.assert_allclose(out, t[f"{which}_output"], atol=1e-5)
