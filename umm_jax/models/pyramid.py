"""A small convolutional vision tower, trained from scratch: the sibling of the CLIP tower.

Space-to-depth, then one level per width, each half the side of the one before: a 3x3 convolution with SiLU,
followed by residual 1x1 or 3x3 ones. Learned row and column vectors are added to the coarsest level, which,
normalised and flattened, gives the tokens. Source: ours.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models.layers import Conv, Modules, RMSNorm, part, space_to_depth, unit_rms
from umm_jax.models.positions import GridVectors
from umm_jax.models.vision import VisionOutput


@dataclass(frozen=True)
class PyramidConfig:
    """Sizes of a :class:`Pyramid`.

    Attributes:
        image_size: side of the input in pixels.
        patch: factor of the space-to-depth at the entrance.
        widths: channels per level, fine to coarse.
        map_width: when given, a 1x1 convolution brings every map (not the tokens) to this width, as a
            synchronizer reads maps of one width.
        residuals: kernel sides of the residual convolutions of each level, one tuple per level.
        noise: input noise in training has a standard deviation drawn from U(0, noise), pixels in [-1, 1].
        position_std: scale at which row and column vectors start.
    """

    image_size: int = 24
    patch: int = 2
    widths: tuple[int, ...] = (32, 64, 128)
    map_width: int | None = None
    residuals: tuple[tuple[int, ...], ...] = ((), (), (1,))
    noise: float = 0.12
    position_std: float = 0.7

    def __post_init__(self):
        coarsest = self.patch * 2 ** (len(self.widths) - 1)
        if self.image_size % coarsest:
            raise ConfigError(f"image_size {self.image_size} must be a multiple of {coarsest}")
        if len(self.residuals) != len(self.widths):
            raise ConfigError(f"residuals {self.residuals} must have one entry per width {self.widths}")

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of each map, fine to coarse."""
        return tuple(self.image_size // self.patch // 2**level for level in range(len(self.widths)))

    @property
    def tokens(self) -> int:
        """Tokens of an image: the pixels of the coarsest map."""
        return self.sides[-1] ** 2

    @property
    def width(self) -> int:
        """Channels of the tokens."""
        return self.widths[-1]


class _Level(nnx.Module):
    def __init__(self, d_in: int, width: int, stride: int, kernels: tuple[int, ...], *, rngs: nnx.Rngs):
        self.conv = Conv(d_in, width, 3, stride=stride, rngs=rngs)
        self.residuals = Modules([Conv(width, width, k, rngs=rngs) for k in kernels])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.silu(self.conv(x))
        for conv in self.residuals:
            x = x + jax.nn.silu(conv(x))
        return x


class Pyramid(nnx.Module):
    """Pixels [B, h, w, 3] in [0, 1] to tokens [B, P, C] of the coarsest level and one map per level."""

    def __init__(self, config: PyramidConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = (3 * config.patch**2, *config.widths)
        self.levels = Modules(
            [
                _Level(widths[i], widths[i + 1], 2 if i else 1, kernels, rngs=rngs)
                for i, kernels in enumerate(config.residuals)
            ]
        )
        out = config.map_width
        self.to_maps = Modules([Conv(w, out, 1, rngs=rngs) for w in config.widths]) if out else None
        side = config.sides[-1]
        self.position = GridVectors((side, side), widths[-1], std=config.position_std, rngs=rngs)
        self.norm = RMSNorm(widths[-1], rngs=rngs)

    @part("tower")
    def __call__(self, pixels: jax.Array, key: jax.Array | None = None) -> VisionOutput:
        """With a `key`, noise is added to the input, of another strength for each image."""
        x = 2 * pixels - 1
        if key is not None and self.config.noise:
            strength, draw = jax.random.split(key)
            std = jax.random.uniform(strength, (x.shape[0], 1, 1, 1), x.dtype, 0, self.config.noise)
            x = x + std * jax.random.normal(draw, x.shape, x.dtype)
        x = space_to_depth(x, self.config.patch)
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        if self.to_maps is not None:
            maps = [conv(m) for conv, m in zip(self.to_maps, maps)]
        # At unit scale first: features grow in training and would drown the positions.
        tokens = self.norm(unit_rms(x) + self.position().astype(x.dtype))
        return VisionOutput(jnp.reshape(tokens, (x.shape[0], -1, x.shape[-1])), tuple(maps))
