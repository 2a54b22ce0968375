"""SAM's image encoder (arXiv 2304.02643): a ViT whose layers look within windows, and now and then at all.

    pixels [B, S, S, 3] -> patches + places -> (window layers, a global one) x groups -> neck -> [B, g, g, C]

Attention knows how far rows and columns lie apart: a query's product with a table is added to its scores, by
rows and by columns. Both sums are products themselves, of what the query says of each row and column with
which row and column a key is in, so they are made as further channels of queries and keys, and no matrix of
biases exists.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models import layers as L
from umm_jax.models.attention import attend, merge_heads, split_heads


@dataclass(frozen=True)
class SamEncoderConfig:
    """Sizes; the defaults are ViT-H's. ViT-L has width 1024, 24 layers, mlp 4096; ViT-B 768, 12, 3072.

    Attributes:
        groups: the layers are divided into so many runs, the last of each is global.
        window: side of a window in patches.
        out: channels of the map.
    """

    image_size: int = 1024
    patch: int = 16
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp: int = 5120
    groups: int = 4
    window: int = 14
    out: int = 256
    eps: float = 1e-6
    remat: str = "none"

    def __post_init__(self):
        if self.image_size % self.patch or self.width % self.heads or self.layers % self.groups:
            raise ConfigError(
                f"patch {self.patch} must divide image_size {self.image_size}, heads {self.heads} width "
                f"{self.width}, and groups {self.groups} layers {self.layers}"
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch


class SamLayer(nnx.Module):
    """x += Attention(LN(x)); x += MLP(LN(x)); in windows of `window`, or over everything where it is None."""

    def __init__(self, config: SamEncoderConfig, window: int | None, *, rngs: nnx.Rngs):
        c, self.heads, self.window = config, config.heads, window
        side, h = window or c.grid, c.width // c.heads
        self.attention_norm = L.LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.qkv = L.Linear(c.width, 3 * c.width, axes=("embed", "heads"), rngs=rngs)
        self.out = L.Linear(c.width, c.width, axes=("heads", "embed"), rngs=rngs)
        self.rows = L.param(rngs, (2 * side - 1, h), (None, None), L.zeros)
        self.columns = L.param(rngs, (2 * side - 1, h), (None, None), L.zeros)
        self.mlp_norm = L.LayerNorm(c.width, eps=c.eps, rngs=rngs)
        self.up = L.Linear(c.width, c.mlp, axes=("embed", "mlp"), rngs=rngs)
        self.down = L.Linear(c.mlp, c.width, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, g, g, D] -> [B, g, g, D]."""
        y, grid = self.attention_norm(x), x.shape[1]
        if self.window is None:
            y = self._attended(y)
        else:
            y = _joined(self._attended(_cut(y, self.window)), self.window, grid, x.shape[0])
        x = x + y
        hidden = self.up(self.mlp_norm(x))
        return x + L.lean(lambda h: self.down(jax.nn.gelu(h, approximate=False)))(hidden)

    def _attended(self, x: jax.Array) -> jax.Array:
        b, side, _, d = x.shape
        q, k, v = (split_heads(a, self.heads) for a in jnp.split(self.qkv(x.reshape(b, side**2, d)), 3, -1))
        steps = jnp.arange(side)
        apart = (
            steps[:, None] - steps[None] + side - 1
        )  # of a query's row from a key's, as a row of the table
        placed = q.reshape(b, side, side, *q.shape[2:])
        rows = jnp.einsum("byxnh,ykh->byxnk", placed, self.rows[...][apart].astype(q.dtype))
        columns = jnp.einsum("byxnh,xkh->byxnk", placed, self.columns[...][apart].astype(q.dtype))
        said = jnp.concatenate([rows, columns], axis=-1).reshape(*q.shape[:3], 2 * side)
        one = jnp.eye(side, dtype=q.dtype)
        where = jnp.concatenate([jnp.repeat(one, side, 0), jnp.tile(one, (side, 1))], axis=-1)
        where = jnp.broadcast_to(where[None, :, None], said.shape)
        scale = q.shape[-1] ** -0.5
        more = [(0, 0)] * 3 + [(0, 2 * side)]
        q, k = jnp.concatenate([q * scale, said], -1), jnp.concatenate([k, where], -1)
        found = attend(q, k, jnp.pad(v, more), scale=1.0)[..., : v.shape[-1]]
        return self.out(merge_heads(found)).reshape(b, side, side, d)


def _cut(x: jax.Array, window: int) -> jax.Array:
    """[B, g, g, D] -> [B * w * w, window, window, D]; zeros fill the grid up, and are looked at, too."""
    b, grid, _, d = x.shape
    fill = -grid % window
    x = jnp.pad(x, ((0, 0), (0, fill), (0, fill), (0, 0)))
    count = x.shape[1] // window
    x = x.reshape(b, count, window, count, window, d).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window, window, d)


def _joined(x: jax.Array, window: int, grid: int, b: int) -> jax.Array:
    """The inverse of :func:`_cut`."""
    count = -(-grid // window)
    x = x.reshape(b, count, count, window, window, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, count * window, count * window, -1)[:, :grid, :grid]


class Neck(nnx.Module):
    """After SAM's encoder: to the decoder's width, and a look at the neighbours."""

    def __init__(self, d_in: int, width: int, *, rngs: nnx.Rngs):
        self.neck_in = L.Conv(d_in, width, 1, bias=False, rngs=rngs)
        self.neck_in_norm = L.LayerNorm(width, eps=1e-6, axis=None, rngs=rngs)
        self.neck_out = L.Conv(width, width, 3, bias=False, rngs=rngs)
        self.neck_out_norm = L.LayerNorm(width, eps=1e-6, axis=None, rngs=rngs)

    def __call__(self, maps: jax.Array) -> jax.Array:
        """[N, h, w, C] -> [N, h, w, D']."""
        return self.neck_out_norm(self.neck_out(self.neck_in_norm(self.neck_in(maps))))


class SamEncoder(nnx.Module):
    """Normalised pixels, zero where there is no picture, to the map the mask decoder looks at."""

    def __init__(self, config: SamEncoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch = L.Conv(3, c.width, c.patch, stride=c.patch, padding=0, rngs=rngs)
        self.position = L.param(rngs, (c.grid, c.grid, c.width), (None, None, "embed"), L.normal(0.02))
        within = c.layers // c.groups - 1
        make = lambda r: SamLayer(c, c.window, rngs=r)  # noqa: E731
        self.windowed = L.stack(make, c.groups * within, rngs) if within else None
        self.whole = L.stack(lambda r: SamLayer(c, None, rngs=r), c.groups, rngs)
        self.neck = Neck(c.width, c.out, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, S, S, 3] -> [B, g, g, C]."""
        c = self.config
        x = self.patch(pixels) + self.position[...].astype(pixels.dtype)
        run = lambda layer, x, _: (layer(x), None)  # noqa: E731
        within = c.layers // c.groups - 1
        graphdef, state = nnx.split(self.windowed) if within else (None, None)
        whole, states = nnx.split(self.whole)
        for g in range(c.groups):
            if within:
                own = jax.tree.map(lambda a, g=g: a[g * within : (g + 1) * within], state)
                x, _ = L.scan(nnx.merge(graphdef, own), run, x, remat=c.remat)
            own = jax.tree.map(lambda a, g=g: a[g : g + 1], states)
            x, _ = L.scan(nnx.merge(whole, own), run, x, remat=c.remat)
        return self.neck(x)
