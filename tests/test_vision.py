"""Vision towers: the reference's numbers for CLIP with adapter, shapes and noise of the small pyramid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import clip_adapter_params, filled, fixture, linear, load, qformer_params
from remade import kept_and_gradients

from umm_jax.errors import ConfigError
from umm_jax.models.pyramid import Pyramid, PyramidConfig
from umm_jax.models.resampler import QFormer, ResamplerConfig
from umm_jax.models.vision import ClipConfig
from umm_jax.models.vision_adapter import (
    CLIP_MEAN,
    CLIP_STD,
    ClipAdapter,
    ClipAdapterConfig,
    Injector,
    flatten_maps,
    split_maps,
)


@nnx.jit
def _run(module, *args):
    return module(*args)


def _images(count, side):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(count, side, side, 3)), jnp.float32)


def test_pyramid_gives_tokens_and_maps():
    config = PyramidConfig()
    tower = filled(lambda: Pyramid(config, rngs=nnx.Rngs(0)))
    out = _run(tower, _images(2, 24))
    assert out.tokens.shape == (2, 9, 128)
    assert [m.shape[1:] for m in out.maps] == [(12, 12, 32), (6, 6, 64), (3, 3, 128)]
    assert config.sides == (12, 6, 3)
    # Equal cells differ by their positions only.
    flat = _run(tower, jnp.full((1, 24, 24, 3), 0.5))
    assert np.abs(flat.tokens[0, 4] - flat.tokens[0, 0]).max() > 0.1


def test_pyramid_noise_needs_a_key():
    tower = filled(lambda: Pyramid(PyramidConfig(map_width=16), rngs=nnx.Rngs(0)))
    images = _images(2, 24)
    still = [_run(tower, images) for _ in range(2)]
    noisy = [_run(tower, images, jax.random.key(k)) for k in (0, 1)]
    np.testing.assert_array_equal(still[0].tokens, still[1].tokens)
    assert np.abs(noisy[0].tokens - still[0].tokens).max() > 1e-3
    assert np.abs(noisy[0].tokens - noisy[1].tokens).max() > 1e-3
    assert [m.shape[-1] for m in still[0].maps] == [16, 16, 16]


def test_impossible_sizes():
    with pytest.raises(ConfigError, match="multiple of 8"):
        PyramidConfig(image_size=20)
    with pytest.raises(ConfigError, match="patch 14"):
        ClipConfig(image_size=225)
    with pytest.raises(ConfigError, match="blocks=8: each of the 4 maps"):
        ClipAdapterConfig(blocks=8)


def test_maps_and_tokens_are_inverse():
    tokens = jnp.arange(2 * 21 * 3.0).reshape(2, 21, 3)
    maps = split_maps(tokens, (4, 2, 1))
    assert [m.shape for m in maps] == [(2, 4, 4, 3), (2, 2, 2, 3), (2, 1, 1, 3)]
    np.testing.assert_array_equal(flatten_maps(maps), tokens)


TINY = ClipAdapterConfig(
    clip=ClipConfig(image_size=56, width=32, layers=8, heads=4, mlp=96), heads=4, stem_width=8
)


@pytest.mark.slow
def test_a_tower_made_again_keeps_less_and_has_the_same_gradients():
    pixels = jnp.asarray(_images(1, 56))

    def gradients(remat):
        tower = ClipAdapter(dataclasses.replace(TINY, remat=remat, extra=1), rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(tower)
        # Gates start at zero: opened, so that every block reaches the result.
        state = jax.tree.map(lambda a: jnp.where(a == 0, 0.1, a), state)

        def loss(s):
            seen = nnx.merge(graphdef, s)(pixels)
            return jnp.mean(seen.tokens**2) + sum(jnp.mean(m**2) for m in seen.maps)

        return kept_and_gradients(loss, state)

    (some, one), (few, other) = gradients("none"), gradients("full")
    assert few < 0.6 * some
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_the_adapter_starts_without_disturbing_the_transformer():
    injector = Injector(TINY, rngs=nnx.Rngs(0))
    x, c = _images(1, 32).reshape(1, -1, 32)[:, :16], _images(1, 32).reshape(1, -1, 32)[:, :84]
    np.testing.assert_array_equal(_run(injector, x, c), x)
    injector.gamma[...] = jnp.ones(32)
    assert np.abs(_run(injector, x, c) - x).max() > 1e-3
    # Four heads look left, right, up and down; points follow each other at whole pixels.
    ring = injector.attention.offsets.bias[...].reshape(4, 3, 4, 2)
    np.testing.assert_allclose(ring[:, 0, 0], [[1, 0], [0, 1], [-1, 0], [0, -1]], atol=1e-6)
    np.testing.assert_allclose(ring[1, 2], [[0, 1], [0, 2], [0, 3], [0, 4]], atol=1e-6)


def test_images_of_another_size():
    tower = nnx.eval_shape(lambda: ClipAdapter(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="reads 56 px"):
        tower(_images(1, 28))


def test_release_sizes_are_the_published_ones():
    """Abstract shapes only: 326 M parameters of the encoder and 1 M of the token head (section 10)."""
    tower = nnx.eval_shape(lambda: ClipAdapter(ClipAdapterConfig(), rngs=nnx.Rngs(0)))
    counts = {"encoder": 0, "head": 0}
    for path, v in nnx.to_flat_state(nnx.split(tower)[1]):
        counts["head" if path[0] in ("token_proj", "token_norm", "out_norm") else "encoder"] += v.size
        assert len(v.get_metadata("axes")) == v.ndim, path
    assert round(counts["encoder"] / 1e6) == 326, counts
    assert counts["head"] == 1024 * 1024 + 5 * 1024


def _nchw(x):
    return x.transpose(0, 3, 1, 2)


def test_reference_visual_tokenizer():
    t, state = fixture("d_visual_tokenizer"), fixture("model")
    params = clip_adapter_params(state, "visual_tokenizer", layers=8, blocks=4, extra=2)
    tower = load(lambda: ClipAdapter(TINY, rngs=nnx.Rngs(0)), params)
    pixels = jnp.asarray(t["image"]).transpose(0, 2, 3, 1)

    @nnx.jit
    def intermediate(tower, pixels):
        pixels = (pixels - CLIP_MEAN) / CLIP_STD
        finest, c = tower.look(pixels)
        _, patches = tower.interact(tower.clip.embed(pixels), c)
        return (
            finest,
            c - jnp.repeat(tower.level[...], np.array([64, 16, 4]), axis=0),
            patches[0],
            tower.encode(pixels)[0],
        )

    finest, c, first, last = intermediate(tower, pixels)
    np.testing.assert_allclose(_nchw(finest), t["spm_c1"], atol=1e-5)
    for part, name in zip(jnp.split(c, [64, 80], axis=1), ("spm_c2", "spm_c3", "spm_c4")):
        np.testing.assert_allclose(part, t[name], atol=1e-5)
    np.testing.assert_allclose(first, t["interaction0_x"], atol=1e-5)
    np.testing.assert_allclose(last, t["encoder_last_hidden_state"], atol=1e-5)

    out = _run(tower, pixels)
    for i, level in enumerate(out.maps):
        np.testing.assert_allclose(_nchw(level), t[f"multiscale_{i}"], atol=1e-5)

    config = ResamplerConfig(d_in=32, d_out=32, queries=8, layers=4, heads=4, mlp=96)
    resampler_params = qformer_params(
        state, "visual_tokenizer.perceiver_resampler", layers=4, cross_every=2, qk_norm=True
    )
    resampler = load(lambda: QFormer(config, rngs=nnx.Rngs(0)), resampler_params)
    project = linear(state, "visual_tokenizer.proj")
    embed = _run(resampler, out.tokens)[0] @ project["kernel"] + project["bias"]
    np.testing.assert_allclose(embed, t["vis_embed"], atol=1e-5)
