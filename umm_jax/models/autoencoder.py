"""From pixels to latents and back: the KL autoencoder of Stable Diffusion, and pixels themselves as latents.

Both have the same face, so that an image decoder does not know which one it draws for:

    latents = autoencoder.encode(pixels, noise)    # [B, h, w, 3] in [-1, 1] -> [B, h', w', c], scaled
    pixels = autoencoder.decode(latents)
    losses, parts = autoencoder.losses(pixels, key)  # [B] each

Pictures of several sizes lie on one canvas, each in the upper left corner, and `size` [B, 2] says which part
of it they take; what is made of a picture does then not depend on the canvas or on the others. Without `size`
the canvas is the picture.

Source: Rombach et al. 2022 (arXiv 2112.10752); sizes and scale in ``docs/mm_interleaved.md`` section 5.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models.layers import Conv, GroupNorm, Modules, part
from umm_jax.models.unet_blocks import Attention, ResnetBlock, Upsample, repeat_2x2

# Every norm of the autoencoder uses this epsilon, unlike the UNet's residual blocks.
EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder; the defaults are Stable Diffusion's.

    Attributes:
        kind: ``kl``, or ``identity``: latents are the pixels times `scale`, nothing is learned.
        widths: channels per level, finest first; each level but the last halves the side.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: channels of the latent.
        quant: whether 1x1 convolutions stand on both sides of the latent.
        scale, shift: latent = (posterior sample - shift) * scale, chosen so that latents have unit variance.
            A scale of None is Stable Diffusion's 0.18215 for ``kl`` and 1 for ``identity``.
        norm_groups: groups of every norm.
        kl_weight: weight of the KL term (nats per image over the number of pixel values) in :meth:`losses`.
    """

    kind: Literal["kl", "identity"] = "kl"
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    quant: bool = True
    scale: float | None = None
    shift: float = 0.0
    norm_groups: int = 32
    kl_weight: float = 1e-6

    def __post_init__(self):
        if self.kind not in ("kl", "identity"):
            raise ConfigError(f"autoencoder {self.kind!r} is unknown; choose kl or identity")
        if self.scale == 0:
            raise ConfigError("the scale of the latents must not be 0")
        if self.kind == "kl":
            for width in self.widths:
                if width % self.norm_groups:
                    raise ConfigError(f"width {width} does not divide into norm_groups={self.norm_groups}")

    @property
    def latent_scale(self) -> float:
        """`scale` with its default resolved."""
        if self.scale is not None:
            return self.scale
        return 0.18215 if self.kind == "kl" else 1.0

    @property
    def factor(self) -> int:
        """Side of the pixels over the side of the latents."""
        return 1 if self.kind == "identity" else 2 ** (len(self.widths) - 1)

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """(h', w', c) of the latents of a square image.

        Raises:
            ConfigError: `side` is no multiple of :attr:`factor`.
        """
        if side % self.factor:
            raise ConfigError(f"image side {side} does not divide by the autoencoder's factor {self.factor}")
        at = side // self.factor
        return at, at, 3 if self.kind == "identity" else self.latent_channels


class Posterior(NamedTuple):
    """Diagonal Gaussian over unscaled latents: mean and log variance, [B, h', w', c]."""

    mean: jax.Array
    log_variance: jax.Array

    def sample(self, noise: jax.Array | None) -> jax.Array:
        """The draw that standard normal `noise` [B, h', w', c] makes, or the mean when it is None."""
        if noise is None:
            return self.mean
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise.astype(self.mean.dtype)

    def kl(self, real: jax.Array | None = None) -> jax.Array:
        """KL divergence from the standard normal in nats, summed over each image: [B].

        `real` [B, h', w', 1] is 1 where there is a picture; None is everywhere.
        """
        mean, log_variance = self.mean.astype(jnp.float32), self.log_variance.astype(jnp.float32)
        terms = mean**2 + jnp.exp(log_variance) - 1 - log_variance
        return 0.5 * jnp.sum(terms if real is None else terms * real, axis=(1, 2, 3))


class Downsample(nnx.Module):
    """3x3 convolution of stride 2, its zero border on the right and the bottom only, as in the reference."""

    def __init__(self, d: int, *, rngs: nnx.Rngs):
        self.conv = Conv(d, d, stride=2, padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Mid(nnx.Module):
    """Residual block, single-head attention over all pixels, residual block: [B, h, w, d] -> same."""

    def __init__(self, d: int, groups: int, *, rngs: nnx.Rngs):
        self.resnet_1 = ResnetBlock(d, d, groups=groups, eps=EPS, rngs=rngs)
        self.norm = GroupNorm(d, groups, eps=EPS, rngs=rngs)
        self.attention = Attention(d, 1, bias=True, rngs=rngs)
        self.resnet_2 = ResnetBlock(d, d, groups=groups, eps=EPS, rngs=rngs)

    def __call__(self, x: jax.Array, real: jax.Array | None = None) -> jax.Array:
        x = self.resnet_1(x, None, real)
        tokens = self.norm(x, real).reshape(x.shape[0], -1, x.shape[-1])
        mask = None if real is None else real.reshape(x.shape[0], -1) > 0
        x = x + self.attention(tokens, mask=mask).reshape(x.shape)
        return self.resnet_2(x, None, real)


class Level(nnx.Module):
    """Residual blocks, then one change of side (or none)."""

    def __init__(self, widths: list[int], groups: int, resample: nnx.Module | None, *, rngs: nnx.Rngs):
        self.resnets = Modules(
            [ResnetBlock(a, b, groups=groups, eps=EPS, rngs=rngs) for a, b in zip(widths, widths[1:])]
        )
        self.resample = resample

    def __call__(self, x: jax.Array, real: jax.Array | None = None) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x, None, real)
        if self.resample is None:
            return x
        return self.resample(x if real is None else x * real)


class Encoder(nnx.Module):
    """Pixels [B, h, w, 3] -> moments before the quant convolution [B, h', w', 2c]."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        c, levels, width = config, [], config.widths[0]
        self.conv_in = Conv(3, width, rngs=rngs)
        for i, w in enumerate(c.widths):
            halve = Downsample(w, rngs=rngs) if i + 1 < len(c.widths) else None
            levels.append(Level([width] + [w] * c.layers_per_block, c.norm_groups, halve, rngs=rngs))
            width = w
        self.down = Modules(levels)
        self.mid = Mid(width, c.norm_groups, rngs=rngs)
        self.norm_out = GroupNorm(width, c.norm_groups, eps=EPS, rngs=rngs)
        self.conv_out = Conv(width, 2 * c.latent_channels, rngs=rngs)

    def __call__(self, x: jax.Array, real: jax.Array | None = None) -> jax.Array:
        x = self.conv_in(x if real is None else x * real)
        for level in self.down:
            x = level(x, real)
            if real is not None and level.resample is not None:
                real = real[:, ::2, ::2]
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x, real), real)))


class Decoder(nnx.Module):
    """Latents [B, h', w', c] -> pixels [B, h, w, 3]."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        c, levels, width = config, [], config.widths[-1]
        self.conv_in = Conv(c.latent_channels, width, rngs=rngs)
        self.mid = Mid(width, c.norm_groups, rngs=rngs)
        for i, w in reversed(list(enumerate(c.widths))):
            double = Upsample(w, rngs=rngs) if i else None
            levels.append(Level([width] + [w] * (c.layers_per_block + 1), c.norm_groups, double, rngs=rngs))
            width = w
        self.up = Modules(levels)
        self.norm_out = GroupNorm(width, c.norm_groups, eps=EPS, rngs=rngs)
        self.conv_out = Conv(width, 3, rngs=rngs)

    def __call__(self, x: jax.Array, real: jax.Array | None = None) -> jax.Array:
        x = self.mid(self.conv_in(x if real is None else x * real), real)
        for level in self.up:
            x = level(x, real)
            if real is not None and level.resample is not None:
                real = repeat_2x2(real)
        return self.conv_out(jax.nn.silu(self.norm_out(x, real)))


class KLAutoencoder(nnx.Module):
    """Convolutional autoencoder with a Gaussian latent; methods as in the module docstring."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        c = config.latent_channels
        self.quant = Conv(2 * c, 2 * c, 1, rngs=rngs) if config.quant else None
        self.post_quant = Conv(c, c, 1, rngs=rngs) if config.quant else None

    def posterior(self, pixels: jax.Array, size: jax.Array | None = None) -> Posterior:
        """Pixels [B, h, w, 3] -> Gaussian over unscaled latents, its log variance within [-30, 20].

        `size` [B, 2] in pixels, multiples of the factor, see the module.
        """
        moments = self.encoder(pixels, None if size is None else _real(pixels, size))
        if self.quant is not None:
            moments = self.quant(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))

    @part("autoencoder")
    def encode(
        self, pixels: jax.Array, noise: jax.Array | None = None, size: jax.Array | None = None
    ) -> jax.Array:
        """Pixels [B, h, w, 3] in [-1, 1] -> scaled latents [B, h', w', c].

        They are the sample of the posterior that `noise` makes, or its mean when it is None. `size` [B, 2] in
        pixels, multiples of the factor.
        """
        return (self.posterior(pixels, size).sample(noise) - self.config.shift) * self.config.latent_scale

    @part("autoencoder")
    def decode(self, latents: jax.Array, size: jax.Array | None = None) -> jax.Array:
        """Scaled latents [B, h', w', c] -> pixels [B, h, w, 3], about in [-1, 1], not clipped.

        `size` [B, 2] in pixels, multiples of the factor.
        """
        real = None if size is None else _real(latents, size // self.config.factor)
        return self._decode(latents / self.config.latent_scale + self.config.shift, real)

    def _decode(self, latents: jax.Array, real: jax.Array | None = None) -> jax.Array:
        return self.decoder(latents if self.post_quant is None else self.post_quant(latents), real)

    @part("autoencoder")
    def losses(
        self, pixels: jax.Array, key: jax.Array | None, size: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean absolute error plus ``kl_weight`` times KL per pixel value, of each image.

        Args:
            pixels: [B, h, w, 3] in [-1, 1].
            key: for the posterior sample; None uses the mean.
            size: [B, 2] in pixels, multiples of the factor: what lies beyond it on its canvas is no part.

        Returns:
            the losses, and their parts ``l1`` and ``kl`` (nats per pixel value), float32 [B] each.
        """
        posterior = self.posterior(pixels, size)
        noise = None if key is None else jax.random.normal(key, posterior.mean.shape, posterior.mean.dtype)
        latents = posterior.sample(noise)
        within = None if size is None else _real(latents, size // self.config.factor)
        error = jnp.abs(self._decode(latents, within) - pixels).astype(jnp.float32)
        if size is None:
            l1 = jnp.mean(error, axis=(1, 2, 3))
            kl = posterior.kl() / pixels[0].size
        else:
            values = jnp.maximum(jnp.prod(size, axis=-1), 1) * pixels.shape[-1]
            l1 = jnp.sum(error * _real(pixels, size), axis=(1, 2, 3)) / values
            kl = posterior.kl(within) / values
        return l1 + self.config.kl_weight * kl, {"l1": l1, "kl": kl}


class IdentityAutoencoder(nnx.Module):
    """Pixels as latents: encode is multiplication by ``scale``, decode division. It has no parameters."""

    def __init__(self, config: AutoencoderConfig):
        self.config = config

    def encode(
        self, pixels: jax.Array, noise: jax.Array | None = None, size: jax.Array | None = None
    ) -> jax.Array:
        """Pixels [B, h, w, 3] in [-1, 1] -> latents of the same shape; there is nothing to draw."""
        return (pixels - self.config.shift) * self.config.latent_scale

    def decode(self, latents: jax.Array, size: jax.Array | None = None) -> jax.Array:
        """Latents [B, h, w, 3] -> pixels."""
        return latents / self.config.latent_scale + self.config.shift

    def losses(self, pixels: jax.Array, key: jax.Array | None, size: jax.Array | None = None):
        """Raises ConfigError: there is nothing to train."""
        raise ConfigError(
            "the identity autoencoder has nothing to train; choose kind='kl' or train the model"
        )


def _real(canvas: jax.Array, size: jax.Array) -> jax.Array:
    """1 where a picture of `size` [B, 2] is on its canvas [B, h, w, C], 0 elsewhere: [B, h, w, 1]."""
    rows, columns = (jnp.arange(n) < size[:, i, None] for i, n in enumerate(canvas.shape[1:3]))
    return (rows[:, :, None] & columns[:, None])[..., None].astype(canvas.dtype)


def make_autoencoder(config: AutoencoderConfig, *, rngs: nnx.Rngs) -> KLAutoencoder | IdentityAutoencoder:
    """The autoencoder a config describes."""
    return KLAutoencoder(config, rngs=rngs) if config.kind == "kl" else IdentityAutoencoder(config)
