"""Positions of tokens and pixels: fixed sin-cos tables (computed, never parameters) and learned vectors.

Layout of the fixed tables (docs/mm_interleaved.md 2.2 and 5): one axis of width W is [sin(p w_k), cos(p w_k)]
with w_k = base^(-k / (W/2)), k = 0 .. W/2 - 1; two axes give the first half of the channels to the row and
the second half to the column.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax.models.layers import normal, param
from umm_jax.models.resize import resize_matrix


def sincos_1d(count: int, width: int, *, base: float = 10000.0) -> np.ndarray:
    """Table [count, width] (float32) of positions 0 .. count - 1; `width` must be even."""
    if width % 2:
        raise ValueError(f"a sin-cos table needs an even width, got {width}")
    angles = np.arange(count)[:, None] * base ** (-np.arange(width // 2) / (width / 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_2d(
    grid: tuple[int, int], width: int, *, size: tuple[int, int] | None = None, base: float = 10000.0
) -> jax.Array:
    """Table [h, w, width] (float32) of a `grid` of rows and columns; `width` must be a multiple of 4.

    With `size`, the table of `grid` is resized to it bicubically. The row half is constant along columns
    and the other way round, and resizing weights sum to 1, so each axis is resized by itself: the program
    holds two small tables, not the full map.
    """
    if width % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width divisible by 4, got {width}")

    def axis(source: int, target: int) -> np.ndarray:
        table = resize_matrix(source, target, "bicubic") @ sincos_1d(source, width // 2, base=base)
        return table.astype(np.float32)

    h, w = size or grid
    rows, columns = axis(grid[0], h), axis(grid[1], w)
    return jnp.concatenate(
        [
            jnp.broadcast_to(rows[:, None], (h, w, width // 2)),
            jnp.broadcast_to(columns[None], (h, w, width // 2)),
        ],
        axis=-1,
    )


def pixel_centres(h: int, w: int) -> jax.Array:
    """(x, y) in [0, 1] of every pixel of a map, row by row: [h * w, 2]."""
    y, x = jnp.meshgrid((jnp.arange(h) + 0.5) / h, (jnp.arange(w) + 0.5) / w, indexing="ij")
    return jnp.stack([x, y], axis=-1).reshape(-1, 2)


class GridVectors(nnx.Module):
    """One learned vector per row and one per column, added: () -> [h, w, width]."""

    def __init__(self, grid: tuple[int, int], width: int, *, std: float = 0.02, rngs: nnx.Rngs):
        self.rows = param(rngs, (grid[0], width), (None, "embed"), normal(std))
        self.columns = param(rngs, (grid[1], width), (None, "embed"), normal(std))

    def __call__(self) -> jax.Array:
        return self.rows[...][:, None] + self.columns[...][None]
