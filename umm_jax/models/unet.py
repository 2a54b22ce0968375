"""The denoising UNet of the image decoder: Stable Diffusion 2.1 by default, a small pixel decoder by config.

    conv_in -> down levels (residual blocks, transformers, halving) -> mid -> up levels -> conv_out

Every feature kept for the up path is a *skip*. Between the mid block and the up path the caller may change
the skips and the mid map: this is where the feature synchronizer looks back at earlier images.

Source: Stable Diffusion (arXiv 2112.10752), as ``docs/mm_interleaved.md`` sections 3.2 and 5 describe it; the
options for small models are ours, and off by default.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models.attention import require_known
from umm_jax.models.layers import (
    Conv,
    Modules,
    activation,
    checkpoint_policy,
    depth_to_space,
    normal,
    param,
    part,
    remade,
    space_to_depth,
    unit_rms,
)
from umm_jax.models.unet_blocks import (
    Conditioning,
    NormKind,
    ResnetBlock,
    SpatialTransformer,
    TimeEmbedding,
    Upsample,
    Upsampling,
    make_norm,
)

Sync = Callable[[list[jax.Array], jax.Array], tuple[list[jax.Array], jax.Array]]


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet; the defaults are Stable Diffusion 2.1.

    Attributes:
        side: side of the input map; only ``grid_vectors`` is tied to it.
        in_channels, out_channels: of the input and of the prediction.
        widths: channels per level, finest first.
        heads: attention heads per level.
        attention: whether a level has transformers. The mid block has one of `mid_layers` layers (0: none).
        context_width: width of the condition the transformers attend to.
        layers_per_block: residual blocks per level on the way down.
        transformer_layers: layers of each transformer outside the mid block.
        mlp_multiple: hidden width of the transformers' MLP over their width.
        qk_norm: normalised queries and keys in the transformers, see ``unet_blocks.Attention``.
        norm, norm_groups, activation: of the residual blocks.
        skips: ``all`` keeps every feature of the way down, and a level has one more residual block on the way
            up than down (the reference); ``levels`` keeps one per level but the coarsest, for small models.
        patch: the input is folded by this factor (space to depth) and the prediction unfolded.
        time_scale: factor on t before its sin-cos table; 1 for steps 0..999, 1000 for flow times in [0, 1].
        time_conditioning, upsample: see ``unet_blocks``.
        input_gate: s of the Wiener gate: the network sees x_t (1-t) s / ((1-t)^2 s + t^2), which is the best
            linear guess of a signal of variance s, and nothing at t = 1. Needs flow times.
        grid_vectors: adds a learned vector per row and per column, to features of unit scale, before the mid
            block.
        self_attention: how a map attends to itself, see ``attention.attend``.
        remat: rematerialisation policy of each block, see ``layers.checkpoint_policy``.
    """

    side: int = 64
    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (5, 10, 20, 20)
    attention: tuple[bool, ...] = (True, True, True, False)
    context_width: int = 1024
    layers_per_block: int = 2
    transformer_layers: int = 1
    mid_layers: int = 1
    mlp_multiple: int = 4
    qk_norm: bool = False
    norm: NormKind = "group"
    norm_groups: int = 32
    activation: str = "silu"
    skips: Literal["all", "levels"] = "all"
    patch: int = 1
    time_scale: float = 1.0
    time_conditioning: Conditioning = "add"
    upsample: Upsampling = "nearest"
    input_gate: float | None = None
    grid_vectors: bool = False
    self_attention: str = "auto"
    remat: str = "none"

    def __post_init__(self):
        levels = len(self.widths)
        if levels == 0 or len(self.heads) != levels or len(self.attention) != levels:
            raise ConfigError(
                f"widths, heads and attention need one entry per level, got {levels}, {len(self.heads)} "
                f"and {len(self.attention)}"
            )
        for width, heads in zip(self.widths, self.heads):
            if width % heads:
                raise ConfigError(f"width {width} does not divide into {heads} heads")
            if self.norm == "group" and width % self.norm_groups:
                raise ConfigError(f"width {width} does not divide into norm_groups={self.norm_groups}")
        require_known(self.self_attention, "self_attention")
        if self.layers_per_block < 1 or self.mid_layers < 0 or self.patch < 1:
            raise ConfigError("layers_per_block and patch must be at least 1, mid_layers at least 0")
        if self.input_gate is not None and self.input_gate <= 0:
            raise ConfigError(f"input_gate is a variance and must be positive, got {self.input_gate}")
        if self.side % self.factor:
            raise ConfigError(
                f"side {self.side} must be a multiple of patch * 2^(levels - 1) = {self.factor}; "
                f"change side, patch or the number of levels"
            )

    @property
    def factor(self) -> int:
        """Side of the input over the side of the mid map."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def level_shapes(self, side: int | None = None) -> list[tuple[int, int]]:
        """(side, width) of each level, finest first, for an input of `side` (default: the config's)."""
        side = (self.side if side is None else side) // self.patch
        return [(side // 2**i, width) for i, width in enumerate(self.widths)]

    def mid_shape(self, side: int | None = None) -> tuple[int, int]:
        """(side, width) of the mid map."""
        return self.level_shapes(side)[-1]

    def skip_shapes(self, side: int | None = None) -> list[tuple[int, int]]:
        """(side, width) of every skip in the order in which `sync` gets them."""
        levels = self.level_shapes(side)
        if self.skips == "levels":
            return levels[:-1]
        shapes = [levels[0]]
        for i, (at, width) in enumerate(levels):
            shapes += [(at, width)] * self.layers_per_block
            if i + 1 < len(levels):
                shapes.append((at // 2, width))
        return shapes


class Level(nnx.Module):
    """Residual blocks and their transformers (none without attention), then one change of side or none."""

    def __init__(
        self, resnets: Sequence[nnx.Module], attentions: Sequence[nnx.Module], resample: nnx.Module | None
    ):
        self.resnets, self.attentions = Modules(resnets), Modules(attentions)
        self.resample = resample


class UNet(nnx.Module):
    """Predicts the denoising target of ``x`` at time ``t`` under a condition; see :meth:`__call__`."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        d_time = 4 * c.widths[0]
        last = len(c.widths) - 1

        def resnet(d_in, d_out):
            return ResnetBlock(
                d_in,
                d_out,
                d_time=d_time,
                conditioning=c.time_conditioning,
                norm=c.norm,
                groups=c.norm_groups,
                act=c.activation,
                rngs=rngs,
            )

        def transformer(i, layers):
            return SpatialTransformer(
                c.widths[i],
                c.heads[i],
                c.context_width,
                layers=layers,
                mlp_multiple=c.mlp_multiple,
                qk_norm=c.qk_norm,
                norm=c.norm,
                groups=c.norm_groups,
                implementation=c.self_attention,
                rngs=rngs,
            )

        def level(i, d_ins, resample):
            resnets = [resnet(d_in, c.widths[i]) for d_in in d_ins]
            attentions = [transformer(i, c.transformer_layers) for _ in d_ins if c.attention[i]]
            return Level(resnets, attentions, resample)

        self.time = TimeEmbedding(c.widths[0], d_time, scale=c.time_scale, rngs=rngs)
        self.conv_in = Conv(c.in_channels * c.patch**2, c.widths[0], rngs=rngs)

        down, width = [], c.widths[0]
        for i, w in enumerate(c.widths):
            halve = Conv(w, w, stride=2, rngs=rngs) if i < last else None
            down.append(level(i, [width] + [w] * (c.layers_per_block - 1), halve))
            width = w
        self.down = Modules(down)

        if c.grid_vectors:
            side = c.side // c.factor
            self.grid_rows = param(rngs, (side, width), (None, None), normal(0.7))
            self.grid_columns = param(rngs, (side, width), (None, None), normal(0.7))
        self.mid = Level(
            [resnet(width, width) for _ in range(2)],
            [transformer(last, c.mid_layers)] if c.mid_layers else [],
            None,
        )

        skip_widths = [w for _, w in c.skip_shapes()]
        up = []
        for i in reversed(range(len(c.widths))):
            d_ins = []
            for takes_skip in self._takes_skip(i):
                d_ins.append(width + (skip_widths.pop() if takes_skip else 0))
                width = c.widths[i]
            up.append(level(i, d_ins, Upsample(width, c.upsample, rngs=rngs) if i else None))
        self.up = Modules(up)

        self.norm_out = make_norm(c.norm, c.widths[0], c.norm_groups, 1e-5, rngs)
        self.conv_out = Conv(c.widths[0], c.out_channels * c.patch**2, rngs=rngs)

    def _takes_skip(self, i: int) -> list[bool]:
        """For each residual block of level i on the way up: whether it gets a skip beside its input."""
        c = self.config
        if c.skips == "all":
            return [True] * (c.layers_per_block + 1)
        if i == len(c.widths) - 1:
            return []
        return [True] + [False] * (c.layers_per_block - 1)

    @part("decoder")
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        context: jax.Array,
        context_mask: jax.Array | None = None,
        sync: Sync | None = None,
    ) -> jax.Array:
        """Prediction at every pixel.

        Args:
            x: noisy input [B, h, w, in_channels]; h and w multiples of ``config.factor``.
            t: times [B]: steps, or flow times in [0, 1] (then with ``time_scale`` 1000).
            context: condition [B, S, context_width].
            context_mask: [B, S], True where the condition may be read; None is everywhere.
            sync: called between the mid block and the up path with the skips (shapes: ``config.skip_shapes``)
                and the mid map; returns their replacements.

        Returns:
            [B, h, w, out_channels] in the dtype of `x`.

        Raises:
            ValueError: a side is no multiple of ``config.factor``.
        """
        c = self.config
        if x.shape[1] % c.factor or x.shape[2] % c.factor:
            raise ValueError(f"sides of the input {x.shape[1]}x{x.shape[2]} must be multiples of {c.factor}")
        context = context.astype(x.dtype)
        mask = None if context_mask is None else context_mask.astype(bool)
        time = self.time(t)

        def run(module, *args):
            if c.remat == "none":
                return module(*args)
            return remade(lambda *a: module(*a), policy=checkpoint_policy(c.remat))(*args)

        if c.input_gate is not None:
            at = t.astype(jnp.float32)[:, None, None, None]
            x = x * ((1 - at) * c.input_gate / ((1 - at) ** 2 * c.input_gate + at**2)).astype(x.dtype)
        x = self.conv_in(space_to_depth(x, c.patch))

        skips = [x] if c.skips == "all" else []
        for level in self.down:
            for j, resnet in enumerate(level.resnets):
                x = run(resnet, x, time)
                if len(level.attentions):
                    x = run(level.attentions[j], x, context, mask)
                if c.skips == "all":
                    skips.append(x)
            if level.resample is not None:
                if c.skips == "levels":
                    skips.append(x)
                x = level.resample(x)
                if c.skips == "all":
                    skips.append(x)

        if c.grid_vectors:
            # Nothing else bounds x here: without this it grows until no query can tell where it stands. The
            # large eps keeps a map that holds next to nothing (t near 1) from being blown up to noise.
            x = unit_rms(x, eps=1.0) + (self.grid_rows[...][:, None] + self.grid_columns[...]).astype(x.dtype)
        x = run(self.mid.resnets[0], x, time)
        for attention in self.mid.attentions:
            x = run(attention, x, context, mask)
        x = run(self.mid.resnets[1], x, time)

        if sync is not None:
            skips, x = sync(list(skips), x)
        skips = list(skips)

        for i, level in zip(reversed(range(len(c.widths))), self.up):
            for j, (resnet, takes_skip) in enumerate(zip(level.resnets, self._takes_skip(i))):
                if takes_skip:
                    x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = run(resnet, x, time)
                if len(level.attentions):
                    x = run(level.attentions[j], x, context, mask)
            if level.resample is not None:
                x = level.resample(x)

        x = self.conv_out(activation(c.activation)(self.norm_out(x)))
        return depth_to_space(x, c.patch)
