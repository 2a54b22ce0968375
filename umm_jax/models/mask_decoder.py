"""Masks from a map of features and prompts: the prompt encoder and mask decoder of SAM (arXiv 2304.02643).

    boxes, points, queries  ->  prompts [B, S, D]
    map [B, h, w, D]        ->  two-way transformer with tokens [iou, mask x 4, prompts]
                            ->  map four times as large; a mask is a token's vector times every cell of it

A query is a vector of another model that stands for what is meant, as LISA's hidden state at ``[SEG]``
(arXiv 2308.00692): it is one prompt more. At the published size there are 4,058,340 and 6,220 parameters.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models import layers as L

_LAYER_EPS, _MAP_EPS = 1e-5, 1e-6


@dataclass(frozen=True)
class MaskDecoderConfig:
    """Sizes; the defaults are the published ones.

    Attributes:
        width: D, of tokens and map. reduced: width inside attention between tokens and map.
        masks: mask tokens; the first is for prompts that leave no doubt.
        iou_hidden: hidden width of the estimate of the masks' IoU.
    """

    width: int = 256
    depth: int = 2
    heads: int = 8
    mlp: int = 2048
    reduced: int = 128
    masks: int = 4
    iou_hidden: int = 256

    def __post_init__(self):
        if self.width % 8 or self.width % self.heads or self.reduced % self.heads:
            raise ConfigError(
                f"width {self.width} must be a multiple of 8 and of heads {self.heads}, and so must reduced "
                f"{self.reduced} be of heads"
            )


# --- prompts ------------------------------------------------------------------------------------------------


class PromptEncoder(nnx.Module):
    """Points, boxes and a rough mask as what the decoder reads.

    Attributes:
        frequencies: [2, D / 2], drawn once and not learned; places are sines and cosines of them.
        kinds: [4, D], added for a point outside, a point inside, and the two corners of a box.
    """

    def __init__(self, width: int = 256, mask_width: int = 16, *, rngs: nnx.Rngs):
        self.frequencies = L.fixed(jax.random.normal(rngs.params(), (2, width // 2)), (None, "embed"))
        self.kinds = L.param(rngs, (4, width), (None, "embed"), L.normal(1.0))
        self.nowhere = L.param(rngs, (width,), ("embed",), L.normal(1.0))
        self.no_mask = L.param(rngs, (width,), ("embed",), L.normal(1.0))
        few = mask_width // 4
        self.mask_in = L.Conv(1, few, 2, stride=2, padding=0, axes=(None, None), rngs=rngs)
        self.mask_in_norm = L.LayerNorm(few, eps=_MAP_EPS, axis=None, rngs=rngs)
        self.mask_mid = L.Conv(few, mask_width, 2, stride=2, padding=0, axes=(None, None), rngs=rngs)
        self.mask_mid_norm = L.LayerNorm(mask_width, eps=_MAP_EPS, axis=None, rngs=rngs)
        self.mask_out = L.Conv(mask_width, width, 1, axes=(None, "conv_out"), rngs=rngs)

    def places(self, xy: jax.Array) -> jax.Array:
        """Places [..., 2], x and y as shares of the sides, -> [..., D]."""
        angles = 2 * jnp.pi * ((2 * xy - 1) @ self.frequencies[...])
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def grid(self, height: int, width: int) -> jax.Array:
        """The places of a map's cells, [h, w, D]."""
        y, x = ((jnp.arange(n) + 0.5) / n for n in (height, width))
        return self.places(jnp.stack(jnp.meshgrid(x, y), axis=-1))

    def boxes(self, boxes: jax.Array, side: int) -> jax.Array:
        """Boxes [B, K, 4] as shares of a picture of `side` pixels -> two prompts each, [B, 2K, D].

        Corners lie in the middle of their pixels, as in the release.
        """
        corners = boxes.reshape(*boxes.shape[:-1], 2, 2) + 0.5 / side
        found = self.places(corners) + self.kinds[2:]
        return found.reshape(boxes.shape[0], -1, found.shape[-1])

    def points(self, xy: jax.Array, labels: jax.Array, side: int) -> jax.Array:
        """Points [B, K, 2] with labels 1 inside, 0 outside, -1 none, -> [B, K, D]."""
        found = self.places(xy + 0.5 / side)
        found = jnp.where((labels < 0)[..., None], 0, found)
        kind = jnp.where((labels < 0)[..., None], self.nowhere[...], self.kinds[jnp.maximum(labels, 0)])
        return found + kind

    def mask(self, logits: jax.Array) -> jax.Array:
        """A rough mask [B, 4h, 4w] -> what is added to the map, [B, h, w, D]."""
        x = jax.nn.gelu(self.mask_in_norm(self.mask_in(logits[..., None])), approximate=False)
        return self.mask_out(jax.nn.gelu(self.mask_mid_norm(self.mask_mid(x)), approximate=False))


# --- decoder ------------------------------------------------------------------------------------------------


class _Attention(nnx.Module):
    """Attention of [B, Q, D] to [B, K, D] in a width of its own."""

    def __init__(self, width: int, inner: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        into = {"axes": ("embed", "heads"), "rngs": rngs}
        self.q, self.k, self.v = (L.Linear(width, inner, **into) for _ in range(3))
        self.out = L.Linear(inner, width, axes=("heads", "embed"), rngs=rngs)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (
            layer(x).reshape(*x.shape[:2], self.heads, -1)
            for layer, x in ((self.q, q), (self.k, k), (self.v, v))
        )
        return self.out(jax.nn.dot_product_attention(q, k, v).reshape(*q.shape[:2], -1))


class _Block(nnx.Module):
    """Tokens look at one another and at the map, and the map at the tokens; norms come after."""

    def __init__(self, c: MaskDecoderConfig, *, rngs: nnx.Rngs):
        self.own = _Attention(c.width, c.width, c.heads, rngs=rngs)
        self.to_map = _Attention(c.width, c.reduced, c.heads, rngs=rngs)
        self.from_map = _Attention(c.width, c.reduced, c.heads, rngs=rngs)
        self.norms = L.Modules([L.LayerNorm(c.width, eps=_LAYER_EPS, rngs=rngs) for _ in range(4)])
        self.up = L.Linear(c.width, c.mlp, rngs=rngs)
        self.down = L.Linear(c.mlp, c.width, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, tokens, cells, token_places, cell_places, first: bool):
        if first:  # the tokens are their own places still
            tokens = self.own(tokens, tokens, tokens)
        else:
            placed = tokens + token_places
            tokens = tokens + self.own(placed, placed, tokens)
        tokens = self.norms[0](tokens)
        placed = cells + cell_places
        tokens = self.norms[1](tokens + self.to_map(tokens + token_places, placed, cells))
        tokens = self.norms[2](tokens + self.down(jax.nn.relu(self.up(tokens))))
        cells = self.norms[3](cells + self.from_map(placed, tokens + token_places, tokens))
        return tokens, cells


class _Head(nnx.Module):
    """Three layers with ReLU between."""

    def __init__(self, d_in: int, hidden: int, d_out: int, *, rngs: nnx.Rngs):
        sizes = (d_in, hidden, hidden, d_out)
        self.layers = L.Modules([L.Linear(a, b, rngs=rngs) for a, b in zip(sizes, sizes[1:])])

    def __call__(self, x: jax.Array) -> jax.Array:
        first, second, last = self.layers
        return last(jax.nn.relu(second(jax.nn.relu(first(x)))))


class MaskDecoder(nnx.Module):
    """Logits of masks from a map and prompts."""

    def __init__(self, config: MaskDecoderConfig, *, rngs: nnx.Rngs):
        c, d = config, config.width
        self.config = config
        self.iou_token = L.param(rngs, (1, d), (None, "embed"), L.normal(1.0))
        self.mask_tokens = L.param(rngs, (c.masks, d), (None, "embed"), L.normal(1.0))
        self.blocks = L.Modules([_Block(c, rngs=rngs) for _ in range(c.depth)])
        self.last = _Attention(d, c.reduced, c.heads, rngs=rngs)
        self.last_norm = L.LayerNorm(d, eps=_LAYER_EPS, rngs=rngs)
        # A transposed convolution of side and stride 2 is a product for each cell, its result laid out 2 x 2.
        self.larger = L.param(rngs, (d, 2, 2, d // 4), ("conv_in", None, None, None), L.normal(d**-0.5))
        self.larger_bias = L.param(rngs, (d // 4,), (None,), L.zeros)
        self.larger_norm = L.LayerNorm(d // 4, eps=_MAP_EPS, axis=None, rngs=rngs)
        few = d // 4
        self.largest = L.param(rngs, (few, 2, 2, d // 8), (None,) * 4, L.normal(few**-0.5))
        self.largest_bias = L.param(rngs, (d // 8,), (None,), L.zeros)
        self.vectors = L.Modules([_Head(d, d, d // 8, rngs=rngs) for _ in range(c.masks)])
        self.iou = _Head(d, c.iou_hidden, c.masks, rngs=rngs)

    def __call__(
        self, features: jax.Array, places: jax.Array, prompts: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """All masks of each prompt set.

        Args:
            features: [B, h, w, D], with what a rough mask or its absence adds.
            places: [h, w, D], of its cells.
            prompts: [B, S, D].

        Returns:
            logits [B, masks, 4h, 4w] and estimates of their IoU [B, masks].
        """
        b, h, w, d = features.shape
        own = jnp.concatenate([self.iou_token[...], self.mask_tokens[...]]).astype(prompts.dtype)
        tokens = given = jnp.concatenate([jnp.broadcast_to(own, (b, *own.shape)), prompts], axis=1)
        cells = features.reshape(b, h * w, d)
        at = jnp.broadcast_to(places.reshape(1, h * w, d).astype(cells.dtype), cells.shape)
        for k, block in enumerate(self.blocks):
            tokens, cells = block(tokens, cells, given, at, first=k == 0)
        tokens = self.last_norm(tokens + self.last(tokens + given, cells + at, cells))
        x = _doubled(cells.reshape(b, h, w, d), self.larger[...], self.larger_bias[...])
        x = jax.nn.gelu(self.larger_norm(x), approximate=False)
        x = jax.nn.gelu(_doubled(x, self.largest[...], self.largest_bias[...]), approximate=False)
        vectors = jnp.stack([head(tokens[:, 1 + k]) for k, head in enumerate(self.vectors)], axis=1)
        return jnp.einsum("bmc,bhwc->bmhw", vectors, x), self.iou(tokens[:, 0])


def _doubled(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, 2h, 2w, C'] by a kernel [C, 2, 2, C']."""
    b, h, w, _ = x.shape
    y = jnp.einsum("bhwc,cijd->bhiwjd", x, kernel.astype(x.dtype))
    return y.reshape(b, 2 * h, 2 * w, -1) + bias.astype(x.dtype)
