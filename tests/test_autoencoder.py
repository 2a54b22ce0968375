"""Autoencoders: parity of the KL one with the reference, its posterior and loss, and the identity sibling."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import fixture
from test_unet import load_released, nhwc, random_weights, worst

from umm_jax.errors import ConfigError
from umm_jax.models.autoencoder import AutoencoderConfig, KLAutoencoder, Posterior, make_autoencoder

SMALL = AutoencoderConfig(widths=(4, 8), layers_per_block=1, latent_channels=2, norm_groups=2, kl_weight=0.5)


# --- released names -----------------------------------------------------------------------------------


def source_name(path: str) -> str:
    """Released name, below ``image_decoder.decoder.vae.``, of our parameter at a dotted path."""
    rules = [
        (r"^quant\.", "quant_conv."),
        (r"^post_quant\.", "post_quant_conv."),
        (r"\.(down|up)\.", r".\1_blocks."),
        (r"(down_blocks\.\d+)\.resample\.", r"\1.downsamplers.0."),
        (r"(up_blocks\.\d+)\.resample\.", r"\1.upsamplers.0."),
        (r"\.mid\.resnet_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.resnet_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attention\.out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.mid\.attention\.(q|k|v)\.", r".mid_block.attentions.0.to_\1."),
        (r"\.shortcut\.", ".conv_shortcut."),
        (r"\.(norm|conv)_(\d)\.", r".\1\2."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"\.(kernel|scale)$", ".weight"),
    ]
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path


def reference_autoencoder() -> KLAutoencoder:
    config = AutoencoderConfig(widths=(8, 16, 16, 16), norm_groups=4)
    prefix = "image_decoder.decoder.vae."
    return load_released(
        lambda: KLAutoencoder(config, rngs=nnx.Rngs(0)), fixture("model"), prefix, source_name
    )


def test_encoding_and_decoding_match_the_reference():
    model, data = reference_autoencoder(), fixture("f_unet_vae")
    posterior = jax.jit(model.posterior)(nhwc(data["vae_input"]))
    mean, log_variance = np.split(nhwc(data["vae_moments"]), 2, axis=-1)
    assert worst(posterior.mean, mean) < 1e-5
    assert worst(posterior.log_variance, np.clip(log_variance, -30, 20)) < 1e-5
    pixels = jax.jit(model.decode)(nhwc(data["vae_latent"]) * 0.18215)
    assert worst(pixels, nhwc(data["vae_decoded"])) < 1e-5


def test_release_size_is_that_of_stable_diffusion():
    _, state = nnx.split(nnx.eval_shape(lambda: KLAutoencoder(AutoencoderConfig(), rngs=nnx.Rngs(0))))
    assert sum(v.size for v in jax.tree.leaves(state)) == 83_653_863


def small() -> KLAutoencoder:
    return random_weights(lambda: KLAutoencoder(SMALL, rngs=nnx.Rngs(0)))


def test_shapes_scale_and_randomness():
    model = small()
    pixels = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
    encode = jax.jit(model.encode)
    noise = jax.random.normal(jax.random.key(1), (2, 4, 4, 2))
    mean, drawn = encode(pixels, None), encode(pixels, noise)
    assert mean.shape == (2, *SMALL.latent_shape(8)) == (2, 4, 4, 2)
    assert jax.eval_shape(model.decode, mean).shape == pixels.shape
    spread = jnp.exp(jax.jit(model.posterior)(pixels).log_variance / 2)
    np.testing.assert_allclose(drawn - mean, spread * noise * 0.18215, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(mean, jax.jit(model.posterior)(pixels).mean * 0.18215, rtol=1e-5, atol=1e-7)


def test_kl_is_that_of_gaussians():
    posterior = Posterior(jnp.full((1, 1, 1, 2), 3.0), jnp.log(jnp.full((1, 1, 1, 2), 4.0)))
    one = np.log(1 / 2.0) + (4 + 9) / 2 - 0.5  # log(s2/s1) + (s1^2 + d^2) / (2 s2^2) - 1/2
    np.testing.assert_allclose(posterior.kl(), [2 * one], rtol=1e-6)


def test_a_picture_on_a_canvas_teaches_what_it_would_alone():
    """Whatever lies around it; and where it fills the canvas, its size changes nothing."""
    model = small()
    picture = jax.random.uniform(jax.random.key(0), (1, 4, 8, 3), minval=-1)
    alone, parts = jax.jit(model.losses)(picture, None)
    for around in (0.0, 0.7):
        canvas = jnp.full((1, 8, 8, 3), around).at[:, :4].set(picture)
        found, seen = jax.jit(model.losses)(canvas, None, jnp.array([[4, 8]]))
        np.testing.assert_allclose(found, alone, rtol=1e-4)
        np.testing.assert_allclose(seen["l1"], parts["l1"], rtol=1e-4)
    np.testing.assert_allclose(model.losses(picture, None, jnp.array([[4, 8]]))[0], alone, rtol=1e-4)
    assert not np.allclose(model.losses(canvas, None)[0], alone, rtol=1e-2)


def test_loss_is_l1_plus_weighted_kl_of_each_image():
    model = small()
    pixels = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
    losses, parts = jax.jit(model.losses)(pixels, None)
    decoded, posterior = jax.jit(lambda x: (model.decode(model.encode(x, None)), model.posterior(x)))(pixels)
    l1, kl = jnp.mean(jnp.abs(decoded - pixels), axis=(1, 2, 3)), posterior.kl() / (8 * 8 * 3)
    np.testing.assert_allclose(losses, l1 + 0.5 * kl, rtol=1e-4)
    np.testing.assert_allclose(parts["l1"], l1, rtol=1e-4)
    np.testing.assert_allclose(parts["kl"], kl, rtol=1e-4)


def test_identity_returns_the_pixels_and_has_no_parameters():
    config = AutoencoderConfig(kind="identity")
    model = make_autoencoder(config, rngs=nnx.Rngs(0))
    pixels = jax.random.uniform(jax.random.key(0), (1, 4, 4, 3), minval=-1)
    np.testing.assert_array_equal(model.encode(pixels, jnp.ones_like(pixels)), pixels)
    np.testing.assert_array_equal(model.decode(model.encode(pixels)), pixels)
    assert config.latent_shape(24) == (24, 24, 3) and config.factor == 1
    assert not jax.tree.leaves(nnx.split(model)[1])
    half = make_autoencoder(AutoencoderConfig(kind="identity", scale=0.5), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(half.encode(pixels), pixels / 2)
    with pytest.raises(ConfigError, match="nothing to train"):
        model.losses(pixels, None)


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigError, match="norm_groups"):
        AutoencoderConfig(widths=(10,), norm_groups=4)
    with pytest.raises(ConfigError, match="does not divide by"):
        SMALL.latent_shape(9)
    with pytest.raises(ConfigError, match="scale"):
        AutoencoderConfig(scale=0.0)
