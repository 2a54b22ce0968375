"""The blocks a convolutional image decoder is made of: residual, transformer, down- and up-sampling.

Shared by the latent UNet (``unet.py``) and the autoencoder (``autoencoder.py``). Maps are NHWC: [B, h, w, C].
Source: Stable Diffusion 2.1, see ``docs/mm_interleaved.md`` section 5; sub-modules
follow the roles of the released checkpoints, so that a conversion table stays a list of renamings.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.models.attention import attend, merge_heads, split_heads
from umm_jax.models.layers import (
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    Modules,
    RMSNorm,
    activation,
    depth_to_space,
    lean,
    zeros,
)

NormKind = Literal["group", "rms"]
Conditioning = Literal["add", "scale_shift"]
Upsampling = Literal["nearest", "depth_to_space"]


def make_norm(kind: NormKind, width: int, groups: int, eps: float, rngs: nnx.Rngs) -> nnx.Module:
    """``group``: over space and groups of channels. ``rms``: over the channels of each pixel, cheaper."""
    if kind == "group":
        return GroupNorm(width, groups, eps=eps, rngs=rngs)
    return RMSNorm(width, eps=eps, axis="conv_out", rngs=rngs)


def timestep_embedding(t: jax.Array, width: int, max_period: float = 10000.0) -> jax.Array:
    """Sin-cos table of times, cosines first: [B] -> [B, width] float32, w_k = max_period^(-k / (width/2))."""
    half = width // 2
    rates = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Times [B] -> conditioning vectors [B, d_out]: sin-cos table, then linear, SiLU, linear."""

    def __init__(self, width: int, d_out: int, *, scale: float = 1.0, rngs: nnx.Rngs):
        self.width, self.scale = width, scale
        self.linear_1 = Linear(width, d_out, axes=(None, "mlp"), rngs=rngs)
        self.linear_2 = Linear(d_out, d_out, axes=("mlp", None), rngs=rngs)

    def __call__(self, t: jax.Array) -> jax.Array:
        table = timestep_embedding(t.astype(jnp.float32) * self.scale, self.width)
        return self.linear_2(jax.nn.silu(self.linear_1(table)))


class ResnetBlock(nnx.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), the time vector mixed in before or after the second norm.

    Args:
        d_in, d_out: channels; a 1x1 convolution carries the residual when they differ.
        d_time: width of the time vector; None for a block without one.
        conditioning: ``add`` adds a projection of the time to every pixel between the convolutions;
            ``scale_shift`` (FiLM) scales and shifts the output of the second norm, starting at identity.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        d_time: int | None = None,
        conditioning: Conditioning = "add",
        norm: NormKind = "group",
        groups: int = 32,
        eps: float = 1e-5,
        act: str = "silu",
        rngs: nnx.Rngs,
    ):
        self.norm_1 = make_norm(norm, d_in, groups, eps, rngs)
        self.conv_1 = Conv(d_in, d_out, rngs=rngs)
        if d_time is None:
            self.time = None
        elif conditioning == "scale_shift":
            self.time = Linear(d_time, 2 * d_out, axes=(None, "conv_out"), init=zeros, rngs=rngs)
        else:
            self.time = Linear(d_time, d_out, axes=(None, "conv_out"), rngs=rngs)
        self.norm_2 = make_norm(norm, d_out, groups, eps, rngs)
        self.conv_2 = Conv(d_out, d_out, rngs=rngs)
        self.shortcut = Conv(d_in, d_out, 1, rngs=rngs) if d_in != d_out else None
        self.conditioning, self.act = conditioning, act

    def __call__(
        self, x: jax.Array, time: jax.Array | None = None, real: jax.Array | None = None
    ) -> jax.Array:
        """x [B, h, w, d_in], time [B, d_time] -> [B, h, w, d_out].

        `real` [B, h, w, 1] says where a picture is on its canvas, see :class:`GroupNorm`: what a block
        without time makes of the picture is then what it makes of it alone. Around it, the result means
        nothing.
        """
        act = activation(self.act)
        around = () if real is None else (real,)
        y = lean(lambda x: self.conv_1(act(self.norm_1(x, *around))))(x)
        mixed = None if self.time is None else self.time(jax.nn.silu(time)).astype(x.dtype)[:, None, None]

        @lean
        def second(y, mixed):
            if mixed is None:
                y = self.norm_2(y, *around)
            elif self.conditioning == "add":
                y = self.norm_2(y + mixed)
            else:
                scale, shift = jnp.split(mixed, 2, axis=-1)
                y = self.norm_2(y) * (1 + scale) + shift
            return self.conv_2(act(y))

        y = second(y, mixed)
        return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Multi-head attention of [B, T, d] to itself or to a context [B, S, d_context].

    The output projection has a bias; q, k and v have one on request. With `qk_norm`, queries and keys of
    each head are normalised (RMS, learned gain) and scores multiplied by 1.5, so that the attention of a
    small model sharpens early.
    """

    def __init__(
        self,
        d: int,
        heads: int,
        *,
        d_context: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        d_context = d if d_context is None else d_context
        self.q = Linear(d, d, axes=("embed", "heads"), bias=bias, rngs=rngs)
        self.k = Linear(d_context, d, axes=("embed", "heads"), bias=bias, rngs=rngs)
        self.v = Linear(d_context, d, axes=("embed", "heads"), bias=bias, rngs=rngs)
        self.out = Linear(d, d, axes=("heads", "embed"), rngs=rngs)
        self.q_norm = RMSNorm(d // heads, axis=None, rngs=rngs) if qk_norm else None
        self.k_norm = RMSNorm(d // heads, axis=None, rngs=rngs) if qk_norm else None
        self.scale = (1.5 if qk_norm else 1.0) * (d // heads) ** -0.5
        self.heads, self.implementation = heads, implementation

    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """`mask` [B, S] is True where the context may be read; None is everywhere."""
        context = x if context is None else context
        q, k, v = (split_heads(y, self.heads) for y in (self.q(x), self.k(context), self.v(context)))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mask = None if mask is None else mask[:, None]
        found = attend(q, k, v, mask, scale=self.scale, implementation=self.implementation)
        return self.out(merge_heads(found))


class GatedMLP(nnx.Module):
    """GEGLU: out(h * gelu(g)) where [h, g] = proj(x); hidden width ``multiple * d``."""

    def __init__(self, d: int, multiple: int, *, rngs: nnx.Rngs):
        self.proj = Linear(d, 2 * multiple * d, axes=("embed", "mlp"), rngs=rngs)
        self.out = Linear(multiple * d, d, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h, gate = jnp.split(self.proj(x), 2, axis=-1)
        return lean(lambda h, gate: self.out(h * jax.nn.gelu(gate, approximate=False)))(h, gate)


class TransformerBlock(nnx.Module):
    """Pre-LN self-attention, cross-attention to the context and GEGLU MLP, each with a residual."""

    def __init__(
        self,
        d: int,
        heads: int,
        d_context: int,
        *,
        mlp_multiple: int = 4,
        qk_norm: bool = False,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        self.norm_1, self.norm_2, self.norm_3 = (LayerNorm(d, rngs=rngs) for _ in range(3))
        self.self_attention = Attention(d, heads, qk_norm=qk_norm, implementation=implementation, rngs=rngs)
        self.cross_attention = Attention(d, heads, d_context=d_context, qk_norm=qk_norm, rngs=rngs)
        self.mlp = GatedMLP(d, mlp_multiple, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = x + self.self_attention(self.norm_1(x))
        x = x + self.cross_attention(self.norm_2(x), context, mask)
        return x + self.mlp(self.norm_3(x))


class SpatialTransformer(nnx.Module):
    """Transformer blocks over the pixels of a map, between linear projections and inside one residual."""

    def __init__(
        self,
        d: int,
        heads: int,
        d_context: int,
        *,
        layers: int = 1,
        mlp_multiple: int = 4,
        qk_norm: bool = False,
        norm: NormKind = "group",
        groups: int = 32,
        implementation: str = "auto",
        rngs: nnx.Rngs,
    ):
        self.norm = make_norm(norm, d, groups, 1e-6, rngs)
        self.proj_in = Linear(d, d, axes=(None, "embed"), rngs=rngs)
        self.blocks = Modules(
            [
                TransformerBlock(
                    d,
                    heads,
                    d_context,
                    mlp_multiple=mlp_multiple,
                    qk_norm=qk_norm,
                    implementation=implementation,
                    rngs=rngs,
                )
                for _ in range(layers)
            ]
        )
        self.proj_out = Linear(d, d, axes=("embed", None), rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [B, h, w, d], context [B, S, d_context], mask [B, S] or None -> [B, h, w, d]."""
        tokens = self.proj_in(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        return x + self.proj_out(tokens).reshape(x.shape)


class Upsample(nnx.Module):
    """[B, h, w, d] -> [B, 2h, 2w, d].

    ``nearest`` repeats pixels and applies a 3x3 convolution. ``depth_to_space`` is a 1x1 convolution to 4d
    channels laid out as 2x2 pixels: unlike repetition it tells the four sub-pixels apart at once, which a
    small model has no time to learn.
    """

    def __init__(self, d: int, kind: Upsampling = "nearest", *, rngs: nnx.Rngs):
        self.kind = kind
        self.conv = Conv(d, d, rngs=rngs) if kind == "nearest" else Conv(d, 4 * d, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "depth_to_space":
            return depth_to_space(self.conv(x), 2)
        return self.conv(repeat_2x2(x))


def repeat_2x2(x: jax.Array) -> jax.Array:
    """Every pixel four times: [B, h, w, d] -> [B, 2h, 2w, d]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
