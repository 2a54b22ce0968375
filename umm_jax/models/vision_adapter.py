"""The released vision tower: CLIP with a ViT-Adapter, giving tokens and maps of four resolutions.

A convolutional stem looks at the image beside the transformer. In each interaction block the transformer's
patches first read the stem's maps, then run through some layers, and the stem's maps read them in turn; both
reads are deformable attention. Source: ViT-Adapter (arXiv 2205.08534); docs/mm_interleaved.md 2.1, 2.2.

Letters: B images, g patches along a side, D width. Stem maps have sides 4g, 2g, g, g/2 (c1 to c4); c2, c3
and c4 as one list have 21 g^2 / 4 tokens.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models import layers as L
from umm_jax.models.deformable import sample
from umm_jax.models.layers import Conv, LayerNorm, Linear, Modules, param
from umm_jax.models.positions import pixel_centres, sincos_2d
from umm_jax.models.resize import resize
from umm_jax.models.vision import CLIP_MEAN, CLIP_STD, Clip, ClipConfig, VisionOutput, grouped
from umm_jax.sharding import split_rows

glorot = jax.nn.initializers.glorot_uniform()


@dataclass(frozen=True)
class ClipAdapterConfig:
    """Sizes of the tower; the defaults are the release's.

    Attributes:
        clip: the transformer.
        blocks: interaction blocks, one for each of the four maps; divides ``clip.layers``.
        extra: extractors after the last block.
        heads, points: of the deformable attention.
        value_ratio: its value width, relative to the transformer's.
        stem_width: channels of the stem's finest convolutions.
        position_grid: side of the fixed position table, resized to the tokens and to each map.
        mlp_ratio: hidden width of the convolutional MLP, relative to the transformer's width.
        eps, stem_eps, head_eps: of the norms of the adapter, of its stem, and of the tokens' head.
        remat: rematerialisation policy of a block with its CLIP layers, and of an extractor after them, see
            ``layers.checkpoint_policy``.
    """

    clip: ClipConfig = ClipConfig()
    blocks: int = 4
    extra: int = 2
    heads: int = 16
    points: int = 4
    value_ratio: float = 0.5
    stem_width: int = 64
    position_grid: int = 16
    mlp_ratio: float = 0.25
    eps: float = 1e-5
    stem_eps: float = 1e-6
    head_eps: float = 1e-6
    implementation: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        if self.blocks != len(self.sides):
            raise ConfigError(
                f"blocks={self.blocks}: each of the {len(self.sides)} maps takes the patches of one block, "
                f"so there are {len(self.sides)}"
            )
        if self.clip.layers % self.blocks:
            raise ConfigError(f"{self.clip.layers} CLIP layers do not divide into {self.blocks} blocks")
        if self.clip.grid % 2:
            raise ConfigError(f"the adapter needs an even number of patches a side, got {self.clip.grid}")
        if self.value_width % self.heads:
            raise ConfigError(f"value width {self.value_width} does not divide into {self.heads} heads")

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return self.clip.image_size

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """Side of each map, fine to coarse."""
        g = self.clip.grid
        return 4 * g, 2 * g, g, g // 2

    @property
    def tokens(self) -> int:
        """Tokens of an image: the class token and the patches."""
        return 1 + self.clip.grid**2

    @property
    def width(self) -> int:
        """Channels of the tokens."""
        return self.clip.width

    @property
    def map_width(self) -> int:
        """Channels of every map."""
        return self.clip.width

    @property
    def value_width(self) -> int:
        return round(self.clip.width * self.value_ratio)


class DeformableAttention(nnx.Module):
    """Every query reads `points` places per head and level around its own (Deformable DETR, eq. 3)."""

    def __init__(self, config: ClipAdapterConfig, levels: int, *, rngs: nnx.Rngs):
        self.config, self.levels = config, levels
        width, count = config.width, config.heads * levels * config.points
        heads = {"axes": ("embed", "heads"), "rngs": rngs}
        self.offsets = Linear(width, 2 * count, init=L.zeros, bias_init=self._ring, **heads)
        self.weights = Linear(width, count, init=L.zeros, **heads)
        self.values = Linear(width, config.value_width, init=glorot, **heads)
        self.out = Linear(config.value_width, width, axes=("heads", "embed"), init=glorot, rngs=rngs)

    def _ring(self, key, shape, dtype):
        """Points start on a square ring: head h looks in its own direction, point p at p + 1 pixels."""
        c = self.config
        angle = 2 * np.pi * np.arange(c.heads) / c.heads
        direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        direction /= np.abs(direction).max(axis=-1, keepdims=True)
        steps = np.arange(1, c.points + 1)[:, None]
        ring = np.broadcast_to(direction[:, None, None] * steps, (c.heads, self.levels, c.points, 2))
        return jnp.asarray(ring.reshape(shape), dtype)

    def __call__(self, query: jax.Array, reference, source: jax.Array, sides) -> jax.Array:
        """Queries [B, Q, D] at `reference` [Q, 2] read `source` [B, V, D], maps of `sides` -> [B, Q, D]."""
        c = self.config
        b, q, _ = query.shape
        shape = (b, q, 1, c.heads, self.levels, c.points)
        offsets = self.offsets(query).astype(jnp.float32).reshape(*shape, 2)
        locations = reference[:, None, None, None, None] + offsets / np.array(sides)[:, None, None]
        weights = self.weights(query).astype(jnp.float32).reshape(*shape[:4], -1)
        weights = jax.nn.softmax(weights, axis=-1).reshape(shape)
        values = self.values(source).reshape(b, 1, -1, c.heads, c.value_width // c.heads)
        read = sample(values, locations, weights, sides, implementation=c.implementation)
        return self.out(read.reshape(b, q, -1))


class Injector(nnx.Module):
    """Patches read the maps: x + gamma * attention(LN(x), LN(c)); gamma starts at zero."""

    def __init__(self, config: ClipAdapterConfig, *, rngs: nnx.Rngs):
        self.grid = config.clip.grid
        self.query_norm = LayerNorm(config.width, eps=config.eps, rngs=rngs)
        self.source_norm = LayerNorm(config.width, eps=config.eps, rngs=rngs)
        self.attention = DeformableAttention(config, levels=3, rngs=rngs)
        self.gamma = param(rngs, (config.width,), ("embed",), L.zeros)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        g = self.grid
        sides = (2 * g, g, g // 2)
        read = self.attention(self.query_norm(x), pixel_centres(g, g), self.source_norm(c), sides)
        return x + self.gamma[...].astype(x.dtype) * read


class Extractor(nnx.Module):
    """The maps read the patches: c += attention(LN(c), LN(x)); c += MLP(LN(c)).

    The MLP has a depth-wise 3x3 convolution between its layers, run over each of the three maps.
    """

    def __init__(self, config: ClipAdapterConfig, *, rngs: nnx.Rngs):
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        self.grid = config.clip.grid
        self.query_norm = LayerNorm(width, eps=config.eps, rngs=rngs)
        self.source_norm = LayerNorm(width, eps=config.eps, rngs=rngs)
        self.attention = DeformableAttention(config, levels=1, rngs=rngs)
        self.mlp_norm = LayerNorm(width, eps=config.eps, rngs=rngs)
        self.up = Linear(width, hidden, axes=("embed", "mlp"), rngs=rngs)
        self.conv = Conv(hidden, hidden, 3, groups=hidden, axes=(None, "mlp"), rngs=rngs)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, c: jax.Array, x: jax.Array) -> jax.Array:
        g = self.grid
        centres = jnp.concatenate([pixel_centres(s, s) for s in (2 * g, g, g // 2)])
        c = c + self.attention(self.query_norm(c), centres, self.source_norm(x), (g,))
        hidden = self.up(self.mlp_norm(c))
        hidden = flatten_maps([self.conv(m) for m in split_maps(hidden, (2 * g, g, g // 2))])
        return c + L.lean(lambda h: self.down(L.activation("gelu")(h)))(hidden)


class Interaction(nnx.Module):
    """What a block adds to its run of transformer layers."""

    def __init__(self, config: ClipAdapterConfig, *, rngs: nnx.Rngs):
        self.injector = Injector(config, rngs=rngs)
        self.extractor = Extractor(config, rngs=rngs)


class Stem(nnx.Module):
    """Pixels [B, s, s, 3] to maps of sides s/4, s/8, s/16, s/32, all of the transformer's width."""

    def __init__(self, config: ClipAdapterConfig, *, rngs: nnx.Rngs):
        w = config.stem_width
        widths = (3, w, w, w, 2 * w, 4 * w, 4 * w)
        strides = (2, 1, 1, 2, 2, 2)
        self.convs = Modules(
            [
                Conv(widths[i], widths[i + 1], 3, stride=s, bias=False, rngs=rngs)
                for i, s in enumerate(strides)
            ]
        )
        norms = [LayerNorm(out, eps=config.stem_eps, axis="conv_out", rngs=rngs) for out in widths[1:]]
        self.norms = Modules(norms)
        self.to_maps = Modules(
            [Linear(d, config.width, axes=("conv_in", "embed"), rngs=rngs) for d in (w, *widths[4:])]
        )

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        maps = []
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = L.lean(lambda y, norm=norm: jax.nn.relu(norm(y)))(conv(x))
            if i == 2:
                # 3x3 maximum with stride 2; the border never wins, as everything is positive.
                x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
            if i >= 2:
                maps.append(self.to_maps[i - 2](x))
        return maps


class ClipAdapter(nnx.Module):
    """Pixels [B, h, w, 3] in [0, 1] to tokens [B, 1 + P, D] and four maps of width D.

    Normalisation, transformer, adapter, and the fixed position table that tokens and maps carry.
    """

    def __init__(self, config: ClipAdapterConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.clip = Clip(c.clip, rngs=rngs)
        self.stem = Stem(c, rngs=rngs)
        self.level = param(rngs, (3, c.width), (None, "embed"), L.normal(1.0))
        self.interactions = L.stack(lambda r: Interaction(c, rngs=r), c.blocks, rngs)
        self.extra = Modules([Extractor(c, rngs=rngs) for _ in range(c.extra)])
        # A 2x2 transposed convolution of stride 2: a dense layer to four pixels, with one bias for all.
        self.up = Linear(c.width, 4 * c.width, axes=("conv_in", "conv_out"), bias=False, rngs=rngs)
        self.up_bias = param(rngs, (c.width,), ("conv_out",), L.zeros)
        self.token_proj = Linear(c.width, c.width, rngs=rngs)
        self.token_norm = LayerNorm(c.width, eps=c.head_eps, rngs=rngs)
        self.out_norm = LayerNorm(c.width, eps=c.head_eps, rngs=rngs)

    @L.part("tower")
    def __call__(self, pixels: jax.Array, key: jax.Array | None = None) -> VisionOutput:
        """`key` is not used: this tower has no randomness.

        Raises:
            ValueError: images of another size than the config's.
        """
        c, g = self.config, self.config.clip.grid
        if pixels.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"images of shape {pixels.shape[1:]}; this tower reads {c.image_size} px, RGB")
        x, maps = self.encode((pixels - CLIP_MEAN.astype(pixels.dtype)) / CLIP_STD.astype(pixels.dtype))
        grid = (c.position_grid, c.position_grid)
        placed = [m + sincos_2d(grid, c.width, size=m.shape[1:3]).astype(m.dtype) for m in maps]
        # The class token's position is zero, but takes part in the norm.
        table = sincos_2d(grid, c.width, size=(g, g)).astype(x.dtype)
        position = jnp.pad(table.reshape(-1, c.width), ((1, 0), (0, 0)))
        tokens = self.out_norm(self.token_norm(self.token_proj(x)) + position)
        return VisionOutput(tokens, tuple(placed))

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Normalised pixels -> last states [B, 1 + P, D] and the four maps, without position table."""
        g = self.config.clip.grid
        finest, c = self.look(pixels)
        x = self.clip.embed(pixels)
        (x, c), patches = self.interact(x, c)
        for extractor in self.extra:
            run = lambda *a, extractor=extractor: extractor(*a)  # noqa: E731
            if self.config.remat != "none":
                run = L.remade(run, policy=L.checkpoint_policy(self.config.remat))
            c = run(c, x[:, 1:])

        c2, c3, c4 = split_maps(c, (2 * g, g, g // 2))
        up = L.depth_to_space(self.up(c2), 2) + self.up_bias[...].astype(c2.dtype)
        # The patches after each block join the map of their depth, resized to it.
        maps = [finest + up, c2, c3, c4]
        seen = [p.reshape(p.shape[0], g, g, -1) for p in patches]
        return x, [m + resize(p, m.shape[1:3]) for m, p in zip(maps, seen, strict=True)]

    def look(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalised pixels -> the stem's finest map [B, 4g, 4g, D] and the other three as tokens."""
        side = 16 * self.config.clip.grid
        finest, *rest = self.stem(resize(pixels, (side, side)))
        level = self.level[...].astype(finest.dtype)
        return finest, flatten_maps([m + level[i] for i, m in enumerate(rest)])

    def interact(self, x: jax.Array, c: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """States and map tokens through all blocks -> both, and the patches after each [blocks, B, P, D]."""
        make_layers, states = grouped(self.clip.layers, self.config.blocks)

        def step(block: Interaction, carry, state):
            x, c = split_rows(*self.block(block, make_layers(state), *carry))
            return (x, c), x[:, 1:]

        return L.scan(self.interactions, step, (x, c), states, remat=self.config.remat)

    def block(self, block: Interaction, layers: nnx.Module, x, c) -> tuple[jax.Array, jax.Array]:
        """One interaction block: patches read the maps, run through `layers`, and are read by the maps."""
        x = jnp.concatenate([x[:, :1], block.injector(x[:, 1:], c)], axis=1)
        x = self.clip.run(layers, x)
        return x, block.extractor(c, x[:, 1:])


def split_maps(tokens: jax.Array, sides: tuple[int, ...]) -> list[jax.Array]:
    """[B, sum of sides^2, D] -> one [B, s, s, D] per side."""
    cuts = np.cumsum([s * s for s in sides])[:-1].tolist()
    parts = jnp.split(tokens, cuts, axis=1)
    return [p.reshape(p.shape[0], s, s, -1) for p, s in zip(parts, sides)]


def flatten_maps(maps: list[jax.Array]) -> jax.Array:
    """The inverse of :func:`split_maps`."""
    return jnp.concatenate([m.reshape(m.shape[0], -1, m.shape[-1]) for m in maps], axis=1)
