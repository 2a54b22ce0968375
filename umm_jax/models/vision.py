"""The CLIP vision transformer, and what a vision tower gives, whichever it is.

Source: CLIP (arXiv 2103.00020); the released variant is described in docs/mm_interleaved.md 2.1: class token,
learned positions, a norm before the layers and none after them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models.attention import attend, merge_heads, split_heads
from umm_jax.models.layers import Conv, LayerNorm, Linear, activation, lean, normal, param, part, scan, stack
from umm_jax.sharding import split_rows

# Of the pixels CLIP was trained on, by colour.
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class VisionOutput(NamedTuple):
    """Result of ``tower(pixels, key=None)`` for pixels [B, h, w, 3] in [0, 1].

    Attributes:
        tokens: [B, P, C], what a resampler turns into the tokens of a language model.
        maps: [B, h_s, w_s, C_s] per level, fine to coarse, what the synchronizers read.
    """

    tokens: jax.Array
    maps: tuple[jax.Array, ...]


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the transformer; the defaults are ViT-L/14 at 224 px.

    Attributes:
        image_size, patch: sides in pixels; `patch` divides `image_size`.
        width, layers, heads, mlp: as usual; `mlp` is the hidden width.
        remat: what a layer keeps for its backward pass, see ``layers.scan``.
    """

    image_size: int = 224
    patch: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    eps: float = 1e-5
    remat: str = "none"

    def __post_init__(self):
        if self.image_size % self.patch:
            raise ConfigError(f"patch {self.patch} does not divide image_size {self.image_size}")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} does not divide into {self.heads} heads")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch


class VisionLayer(nnx.Module):
    """x += Attention(LN(x)); x += W act(W LN(x)); `config` has width, heads, mlp and eps.

    `implementation` is of the attention, see ``attention.attend``.
    """

    def __init__(self, config: Any, act: str, *, implementation: str = "auto", rngs: nnx.Rngs):
        c, self.heads, self.act, self.implementation = config, config.heads, act, implementation
        into = {"axes": ("embed", "heads"), "rngs": rngs}
        self.attention_norm = LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.query = Linear(c.width, c.width, **into)
        self.key = Linear(c.width, c.width, **into)
        self.value = Linear(c.width, c.width, **into)
        self.out = Linear(c.width, c.width, axes=("heads", "embed"), rngs=rngs)
        self.mlp_norm = LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.up = Linear(c.width, c.mlp, axes=("embed", "mlp"), rngs=rngs)
        self.down = Linear(c.mlp, c.width, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array, mask=None) -> jax.Array:
        """[B, P, D] -> [B, P, D]; `mask` as :func:`attend` takes it."""
        y = self.attention_norm(x)
        q, k, v = (split_heads(project(y), self.heads) for project in (self.query, self.key, self.value))
        x = x + self.out(merge_heads(attend(q, k, v, mask, implementation=self.implementation)))
        h = split_rows(self.up(self.mlp_norm(x)))[0]
        return split_rows(x + lean(lambda h: self.down(activation(self.act)(h)))(h))[0]


class Clip(nnx.Module):
    """The transformer in two steps, so that others can speak between its layers.

    ``layers`` is a stack; :func:`grouped` cuts it into equal runs.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch = Conv(3, c.width, c.patch, stride=c.patch, padding=0, bias=False, rngs=rngs)
        self.class_token = param(rngs, (c.width,), ("embed",), normal(c.width**-0.5))
        self.position = param(rngs, (1 + c.grid**2, c.width), (None, "embed"), normal(0.02))
        self.norm = LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.layers = stack(lambda r: VisionLayer(c, "quick_gelu", rngs=r), c.layers, rngs)

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, h, w, 3] -> [B, 1 + P, D], class token first."""
        x = self.patch(pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        return self.norm(jnp.concatenate([token, x], axis=1) + self.position[...].astype(x.dtype))

    def run(self, layers: nnx.Module, x: jax.Array) -> jax.Array:
        """[B, 1 + P, D] through a stack of layers."""
        return scan(layers, lambda layer, x, _: (layer(x), None), x, remat=self.config.remat)[0]


@dataclass(frozen=True)
class ClipTowerConfig:
    """CLIP by itself as a tower.

    Attributes:
        select: of the states after each layer (0 is before the first, -1 after the last) those that are
            given; the layers after are left out.
    """

    clip: ClipConfig = ClipConfig(image_size=336)
    select: int = -2

    def __post_init__(self):
        if not -self.clip.layers <= self.select < 0:
            raise ConfigError(
                f"select {self.select} counts from the last of {self.clip.layers} layers: -1, -2, ..."
            )

    @property
    def run(self) -> ClipConfig:
        """The transformer with the layers that are run."""
        return replace(self.clip, layers=self.clip.layers + 1 + self.select)

    @property
    def image_size(self) -> int:
        return self.clip.image_size

    @property
    def tokens(self) -> int:
        return self.clip.grid**2

    @property
    def width(self) -> int:
        return self.clip.width

    @property
    def sides(self) -> tuple[int, ...]:
        return (self.clip.grid,)

    @property
    def map_width(self) -> int:
        return self.clip.width


class ClipTower(nnx.Module):
    """Pixels [B, h, w, 3] in [0, 1] to the patches' states [B, P, C], and these as a map [B, g, g, C]."""

    def __init__(self, config: ClipTowerConfig, *, rngs: nnx.Rngs):
        self.clip = Clip(config.run, rngs=rngs)

    @part("tower")
    def __call__(self, pixels: jax.Array, key: jax.Array | None = None) -> VisionOutput:
        pixels = (pixels - CLIP_MEAN.astype(pixels.dtype)) / CLIP_STD.astype(pixels.dtype)
        x = self.clip.run(self.clip.layers, self.clip.embed(pixels))[:, 1:]
        grid = self.clip.config.grid
        return VisionOutput(x, (x.reshape(x.shape[0], grid, grid, x.shape[-1]),))


def grouped(stacked: nnx.Module, groups: int) -> tuple[Callable[[nnx.State], nnx.Module], nnx.State]:
    """A stack of L layers as `groups` stacks of L / groups, for a scan over groups.

    Returns:
        a function from the state of one group to its stack, and the states of all groups with a leading
        axis of groups.
    """
    graphdef, state = nnx.split(stacked)
    state = jax.tree.map(lambda a: a.reshape(groups, a.shape[0] // groups, *a.shape[1:]), state)
    return lambda one: nnx.merge(graphdef, one), state
