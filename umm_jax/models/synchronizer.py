"""The multi-image, multi-scale feature synchronizer (MMFS): look back into the maps of earlier images.

A query reads a few learned points of every visible image at every level, weighted by a softmax that also
has a "read nothing" choice. Source: MM-Interleaved (arXiv 2401.10208) section 3.2; the exact formulas are
in docs/mm_interleaved.md section 3. For query q, image n, head h, level l, point p:

    r[n]             how many visible images back: 1 for the nearest, 0 for invisible ones
    z[n]             = W_query q + b + E[r[n]]
    location         = reference + (W_offsets z + b)[h, p] * unit_l / (base * side_l)      (x, y) in [0, 1]
    a[n, h, l, p]    = (W_logits z + b)[h, l, p]
    weight           = visible[n] e^a / (1 + sum of visible e^a)
    ignored          = 1 / (1 + sum of visible e^a)
    out              = W_out (sum weight * bilinear(W_value maps + b) + ignored * ignore) + b

The "1 +" is the ignore slot: one constant per image and level whose exponentials always sum to one. A query
that sees no image returns W_out ignore + b, not zero.

:class:`Synchronizer` is that core; :class:`BackboneSync` and :class:`DecoderSync` are how a language model
and an image decoder use it. Letters: B rows, Q queries, N images, D query width, C map channels, V pixels of
all levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models import layers
from umm_jax.models.deformable import sample
from umm_jax.models.layers import LayerNorm, Linear, RMSNorm, param, part
from umm_jax.models.positions import pixel_centres, sincos_2d

glorot = jax.nn.initializers.glorot_uniform()


@dataclass(frozen=True)
class SynchronizerConfig:
    """Sizes of a synchronizer; the defaults are those of the released language model.

    Attributes:
        d_query, d_maps, d_values, d_out: widths of the queries, of the maps, inside, and of the result.
        heads, points: `heads` divides `d_values`; `points` are read per image, level and head.
        sides: side (or (h, w)) of each map, in the order they are given.
        units: sides that scale the offsets; None means `sides`. The released decoder keeps those of its
            full resolution.
        base: with `units` equal to `sides`, an offset of 1 is 1 / base of the map on every level.
        max_images: rows of the table of relative image indices; at most max_images - 1 images at a time.
        offset_init: offsets start at fixed places drawn from [-offset_init, offset_init].
        implementation: of the sampling, see ``deformable.sample``.
    """

    d_query: int = 5120
    d_maps: int = 1024
    d_values: int = 1024
    d_out: int = 5120
    heads: int = 16
    points: int = 8
    sides: tuple[int | tuple[int, int], ...] = (32, 16, 8)
    units: tuple[int, ...] | None = None
    base: float = 16.0
    max_images: int = 50
    offset_init: float = 3.0
    implementation: str = "auto"

    def __post_init__(self):
        if self.d_values % self.heads:
            raise ConfigError(f"d_values {self.d_values} does not divide into {self.heads} heads")
        if self.units is not None and len(self.units) != len(self.sides):
            raise ConfigError(f"units {self.units} must give one number per level of sides {self.sides}")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of each level."""
        return tuple((s, s) if isinstance(s, int) else tuple(s) for s in self.sides)


def relative_index(visible: jax.Array) -> jax.Array:
    """How many visible images back each one is: bool [..., N] -> int [..., N].

    For example visible 1 1 0 1 gives 3 2 0 1.
    """
    m = visible.astype(jnp.int32)
    return m * (jnp.sum(m, axis=-1, keepdims=True) + 1 - jnp.cumsum(m, axis=-1))


class Synchronizer(nnx.Module):
    """The core: queries [B, Q, D] and maps to [B, Q, d_out]."""

    def __init__(self, config: SynchronizerConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        levels = len(c.sides)
        dense = layers.uniform(c.d_query**-0.5)
        self.query = Linear(c.d_query, c.d_query, init=dense, rngs=rngs)
        self.relative = param(rngs, (c.max_images, c.d_query), (None, "embed"), layers.normal(0.02))
        self.offsets = Linear(
            c.d_query,
            c.heads * c.points * 2,
            axes=("embed", "heads"),
            init=layers.zeros,
            bias_init=layers.uniform(c.offset_init),
            rngs=rngs,
        )
        # The last of points + 1 belongs to the ignore slot, whose logit is a constant: kept because released
        # weights have it, never used.
        self.logits = Linear(
            c.d_query, c.heads * levels * (c.points + 1), axes=("embed", "heads"), init=dense, rngs=rngs
        )
        self.values = Linear(c.d_maps, c.d_values, axes=("embed", "heads"), init=glorot, rngs=rngs)
        self.out = Linear(c.d_values, c.d_out, axes=("heads", "embed"), init=glorot, rngs=rngs)
        self.ignore = param(rngs, (c.d_values,), ("heads",), layers.zeros)

    def project(self, maps: Sequence[jax.Array]) -> jax.Array:
        """Maps, one [B, N, h, w, C] per level, to the values that are sampled: [B, N, V, heads, H].

        Raises:
            ValueError: maps of other sides than the config's.
        """
        c = self.config
        if tuple(m.shape[-3:-1] for m in maps) != c.shapes:
            raise ValueError(f"maps of shapes {[m.shape for m in maps]} do not have the sides {c.shapes}")
        flat = jnp.concatenate([m.reshape(*m.shape[:-3], -1, m.shape[-1]) for m in maps], axis=-2)
        values = self.values(flat)
        return values.reshape(*values.shape[:-1], c.heads, -1)

    def __call__(
        self,
        query: jax.Array,
        values: jax.Array,
        visible: jax.Array,
        reference: jax.Array | None = None,
    ) -> jax.Array:
        """Reads what `query` asks for.

        Args:
            query: [B, Q, D], normalised.
            values: from :meth:`project`; a decoding loop makes them once.
            visible: bool [B, Q, N], or [B, N] when all queries of a row see the same images. Images are in
                order of appearance.
            reference: (x, y) in [0, 1] around which points lie, [Q, 2] or [B, Q, 2]; the centre when None.

        Returns:
            [B, Q, d_out].

        Raises:
            ConfigError: more images than the table of relative indices has rows for.
        """
        c = self.config
        b, q, _ = query.shape
        n, levels = values.shape[1], len(c.sides)
        if n >= c.max_images:
            raise ConfigError(f"{n} images need synchronizer max_images >= {n + 1}, it is {c.max_images}")
        visible = visible.astype(bool) if visible.ndim == 3 else visible.astype(bool)[:, None]

        # Offsets and logits are linear in z, so the query's part and the image index's part are made apart
        # and added: N times less work than projecting every (query, image) pair.
        hidden = self.query(query)
        table = self.relative[...][: n + 1].astype(query.dtype)
        index = jax.nn.one_hot(relative_index(visible), n + 1, dtype=query.dtype)

        def per_image(kernel, bias):
            """[B, Q, N, K] in float32 of kernel [D, K] and bias [K]."""
            kernel, bias = kernel.astype(query.dtype), bias.astype(query.dtype)
            out = (hidden @ kernel + bias)[:, :, None] + index @ (table @ kernel)
            return out.astype(jnp.float32)

        # Two products, not one that is cut in two: cutting, and joining in the backward pass, copies both.
        offsets = per_image(self.offsets.kernel[...], self.offsets.bias[...])
        offsets = offsets.reshape(b, q, n, c.heads, c.points, 2)
        logits = per_image(*self._used_logits()).reshape(b, q, n, c.heads, levels, c.points)
        weights, ignored = softmax_plus_one(logits, visible[:, :, :, None, None, None])

        units = c.units or tuple((w, h) for h, w in c.shapes)
        scale = [np.broadcast_to(u, 2) / (w, h) / c.base for u, (h, w) in zip(units, c.shapes)]
        centre = jnp.full((1, 2), 0.5) if reference is None else reference
        centre = centre.astype(jnp.float32).reshape(-1, centre.shape[-2], 1, 1, 1, 2)
        # Level by level, not broadcast: the gradient is then a sum of a few slices. As a reduction over one
        # of seven axes it crashes in XLA's CPU kernels at some shapes (JAX 0.10.2).
        locations = jnp.stack([centre + offsets * s.astype(np.float32) for s in scale], axis=4)

        read = sample(values, locations, weights, c.sides, implementation=c.implementation)
        nothing = self.ignore[...].reshape(c.heads, -1)
        read = read + (ignored[..., None] * nothing).astype(read.dtype)
        return self.out(read.reshape(b, q, -1))

    def _used_logits(self) -> tuple[jax.Array, jax.Array]:
        """Kernel [D, K] and bias [K] of the logits without those of the ignore slots."""
        c = self.config
        used = (c.heads * len(c.sides), c.points + 1)
        kernel = self.logits.kernel[...].reshape(c.d_query, *used)[..., :-1].reshape(c.d_query, -1)
        return kernel, self.logits.bias[...].reshape(used)[..., :-1].reshape(-1)


@layers.lean
def softmax_plus_one(logits: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """e^a / (1 + sum e^a) over images, levels and points.

    Args:
        logits: [B, Q, N, heads, levels, points] float32.
        visible: bool, broadcastable to `logits`.

    Returns:
        weights, shaped as `logits`, and the share [B, Q, heads] of the ignore slot; together they sum to 1.
    """
    axes = (2, 4, 5)
    logits = jnp.where(visible, logits, -jnp.inf)
    top = jnp.maximum(jnp.max(logits, axis=axes, keepdims=True), 0.0)
    top = jax.lax.stop_gradient(top)
    raised = jnp.exp(logits - top)
    one = jnp.exp(-top)
    total = one + jnp.sum(raised, axis=axes, keepdims=True)
    return raised / total, jnp.squeeze(one / total, axes)


class BackboneSync(nnx.Module):
    """In a language model: x + tanh(gate) * MMFS(RMS(x), RMS(maps)) (section 3.1).

    The gate starts at 0, and the layer as the identity.
    """

    def __init__(self, config: SynchronizerConfig, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.query_norm = RMSNorm(config.d_query, eps=eps, rngs=rngs)
        self.map_norm = RMSNorm(config.d_maps, eps=eps, rngs=rngs)
        self.core = Synchronizer(config, rngs=rngs)
        self.gate = param(rngs, (1,), (None,), layers.zeros)

    @part("synchronizer")
    def project(self, maps: Sequence[jax.Array]) -> jax.Array:
        """Values to sample, see :meth:`Synchronizer.project`."""
        return layers.lean(lambda *maps: self.core.project([self.map_norm(m) for m in maps]))(*maps)

    @part("synchronizer")
    def __call__(self, x: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
        """[B, Q, D], `values` from :meth:`project` and bool [B, Q, N] -> [B, Q, D]."""
        read = self.core(self.query_norm(x), values, visible)
        return x + jnp.tanh(self.gate[...]).astype(x.dtype) * read


class DecoderSync(nnx.Module):
    """In an image decoder: x + conv1x1(MMFS(LN(x) + position, LN(maps))) (section 3.2).

    Every pixel of x is a query whose points lie around the same place of the earlier image.

    Args:
        config: d_query = d_out = channels of x.
        position_grid: side of the fixed sin-cos table, resized to the grid of x.
        out_init: 0 is the release's: the 1x1 convolution starts at zero and the injection with it. A small
            model has no time to wait: with a positive number the convolution starts alive, behind a
            learned gate per channel that starts at `out_init`.
    """

    def __init__(
        self,
        config: SynchronizerConfig,
        *,
        position_grid: int = 64,
        out_init: float = 0.0,
        eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        width = config.d_query
        self.position_grid = position_grid
        self.query_norm = LayerNorm(width, eps=eps, rngs=rngs)
        self.map_norm = LayerNorm(config.d_maps, eps=eps, rngs=rngs)
        self.core = Synchronizer(config, rngs=rngs)
        init = layers.lecun() if out_init else layers.zeros
        self.conv = Linear(config.d_out, width, axes=("conv_in", "conv_out"), init=init, rngs=rngs)
        self.gate = param(rngs, (width,), ("conv_out",), layers.constant(out_init)) if out_init else None

    @part("synchronizer")
    def project(self, maps: Sequence[jax.Array]) -> jax.Array:
        """Values to sample, see :meth:`Synchronizer.project`; the same at every sampling step."""
        return layers.lean(lambda *maps: self.core.project([self.map_norm(m) for m in maps]))(*maps)

    @part("synchronizer")
    def __call__(self, x: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
        """[B, h, w, D], `values` of the N earlier images of each and bool [B, N] -> [B, h, w, D]."""
        b, h, w, width = x.shape
        grid = (self.position_grid, self.position_grid)
        query = self.query_norm(x) + sincos_2d(grid, width, size=(h, w)).astype(x.dtype)
        read = self.core(query.reshape(b, h * w, width), values, visible, pixel_centres(h, w))
        read = self.conv(read)
        if self.gate is not None:
            read = read * self.gate[...].astype(x.dtype)
        return x + read.reshape(x.shape)
