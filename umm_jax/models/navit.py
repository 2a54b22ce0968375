"""A vision transformer over packed patches: images of any size, cut into patches and laid end to end.

SigLIP2's encoder as BAGEL runs it (docs/chatumm.md section 4): pre-norm layers, learned positions taken from
a square table by the patch's row and column, full attention inside one image and none across images, a last
norm and no pooling.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models.attention import require_known
from umm_jax.models.layers import LayerNorm, Linear, normal, param, part, scan, stack
from umm_jax.models.masks import FULL, MaskSpec
from umm_jax.models.vision import VisionLayer
from umm_jax.sharding import constrain


@dataclass(frozen=True)
class NaViTConfig:
    """Sizes; the defaults are SigLIP2 so400m/14 as BAGEL runs it (26 of its 27 layers).

    Attributes:
        patch: side of a patch in pixels; grid: side of the position table, the most patches of a side.
        width, layers, heads, mlp: as usual. remat: what a layer keeps, see ``layers.scan``.
        attention: how patches attend, see ``attention.attend``.
    """

    patch: int = 14
    grid: int = 70
    width: int = 1152
    layers: int = 26
    heads: int = 16
    mlp: int = 4304
    eps: float = 1e-6
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} does not divide into {self.heads} heads")
        require_known(self.attention)

    @property
    def numbers(self) -> int:
        """Values of one patch."""
        return 3 * self.patch**2


class NaViT(nnx.Module):
    """Patches [B, P, numbers] -> [B, P, width]."""

    def __init__(self, config: NaViTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch = Linear(c.numbers, c.width, axes=(None, "embed"), rngs=rngs)
        self.position = param(rngs, (c.grid**2, c.width), (None, "embed"), normal(0.02))
        self.layers = stack(
            lambda r: VisionLayer(c, "gelu_tanh", implementation=c.attention, rngs=r), c.layers, rngs
        )
        self.norm = LayerNorm(c.width, eps=c.eps, rngs=rngs)

    @part("tower")
    def __call__(self, patches: jax.Array, place: jax.Array, image: jax.Array) -> jax.Array:
        """Encodes the images of packed rows.

        Args:
            patches: [B, P, numbers] in [-1, 1], each by row, column, channel.
            place: int [B, P], row * grid + column in its image.
            image: int [B, P], 1, 2, ... for the images of a row, 0 on padding.
        """
        mask = MaskSpec(image, image, jnp.full_like(image, FULL), jnp.zeros_like(image))
        run = lambda layer, x, _: (layer(x, (mask, mask)), None)  # noqa: E731
        x = constrain(self.embed(patches, place), "batch", "sequence", None)
        return self.norm(scan(self.layers, run, x, remat=self.config.remat)[0])

    def embed(self, patches: jax.Array, place: jax.Array) -> jax.Array:
        """What the first layer reads: [B, P, width]."""
        x = self.patch(patches)
        return x + self.position[...].astype(x.dtype)[place]
