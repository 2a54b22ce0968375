"""Multi-scale deformable aggregation behind one entry, :func:`sample`.

Every query reads a few points of every level of every image, bilinearly, and adds them with given weights:

    out[b, q, h] = sum over n, l, p of  weights[b, q, n, h, l, p] * bilinear(values of (b, n, l, h), location)

Pixel i of a side s has its centre at (i + 0.5) / s ("align_corners=False"); beyond the border the map is
zero. Source: Deformable DETR (arXiv 2010.04159) eq. 3; docs/mm_interleaved.md section 3.

Two implementations give the same numbers and the same gradients:

    gather   reads four corners per point. Work grows with the points only, but its backward pass is a
             scatter, which is slow on CPU and hardly vectorised on TPU.
    hat      bilinear weights are the product of a triangle ("hat") over rows and one over columns. Summed
             over points they form a dense map [Q, h * w] per head, and one matmul with the values does
             the rest, forward and backward. Work grows with the number of pixels.

Letters: B rows, Q queries, N images, V = sum of h * w over levels, H head width.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Sides = Sequence[int | tuple[int, int]]

# Largest dense map of one row, in elements (64 MiB in float32); more queries are taken in turns.
HAT_BUDGET = 2**24


def sample(
    values: jax.Array,
    locations: jax.Array,
    weights: jax.Array,
    sides: Sides,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Weighted sum of bilinear samples.

    Args:
        values: [B, N, V, heads, H], the levels of an image one after the other, each row by row.
        locations: [B, Q, N, heads, levels, points, 2], (x, y) in [0, 1] over the map; may lie outside.
        weights: [B, Q, N, heads, levels, points].
        sides: per level (h, w), or one number for a square map.
        implementation: "gather", "hat", or "auto", see :func:`choose`.

    Returns:
        [B, Q, heads, H] in the dtype of `values`.

    Raises:
        ValueError: shapes that do not fit `sides`, or an unknown implementation.
    """
    shapes = [(s, s) if isinstance(s, int) else tuple(s) for s in sides]
    cells = sum(h * w for h, w in shapes)
    if values.shape[2] != cells or locations.shape[4] != len(shapes):
        raise ValueError(
            f"maps of sides {shapes} hold {cells} cells in {len(shapes)} levels; values have "
            f"{values.shape[2]} cells and locations {locations.shape[4]} levels"
        )
    if implementation == "auto":
        implementation = choose(cells, jax.default_backend())
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown; choose auto, gather or hat")
    # Positions keep float32: bfloat16 cannot tell neighbouring pixels of a 64-pixel side apart.
    locations = locations.astype(jnp.float32)
    return _IMPLEMENTATIONS[implementation](values, locations, weights.astype(values.dtype), shapes)


def choose(cells: int, backend: str) -> str:
    """The faster implementation for maps of `cells` pixels (all levels together) on a JAX backend.

    On TPU a matmul over all pixels beats gathers at any size. Elsewhere it does so while the maps are
    small; beyond about a thousand pixels the dense map costs more memory traffic than it saves.
    """
    return "hat" if backend == "tpu" or cells <= 1024 else "gather"


def _corners(position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lower neighbour (whole number) and the fraction beyond it of a position counted in pixel centres."""
    low = jax.lax.stop_gradient(jnp.floor(position))
    return low, position - low


# --- gather -----------------------------------------------------------------------------------------


def _gather(values, locations, weights, shapes):
    b, q, n, heads, levels, points, _ = locations.shape
    heights = jnp.array([h for h, _ in shapes], jnp.int32)[:, None]
    widths = jnp.array([w for _, w in shapes], jnp.int32)[:, None]
    starts = jnp.array([sum(h * w for h, w in shapes[:i]) for i in range(levels)], jnp.int32)[:, None]
    # [B, N, heads, Q, levels, points]: the axes of the values first.
    locations = jnp.moveaxis(locations, 1, 3)
    weights = jnp.moveaxis(weights, 1, 3)
    x_low, x_part = _corners(locations[..., 0] * widths - 0.5)
    y_low, y_part = _corners(locations[..., 1] * heights - 0.5)
    x_low, y_low = x_low.astype(jnp.int32), y_low.astype(jnp.int32)
    table = jnp.moveaxis(values, 3, 2)  # [B, N, heads, V, H]
    total = 0
    for dy, y_weight in ((0, 1 - y_part), (1, y_part)):
        for dx, x_weight in ((0, 1 - x_part), (1, x_part)):
            x, y = x_low + dx, y_low + dy
            inside = (x >= 0) & (x < widths) & (y >= 0) & (y < heights)
            index = starts + jnp.clip(y, 0, heights - 1) * widths + jnp.clip(x, 0, widths - 1)
            picked = jnp.take_along_axis(table, index.reshape(b, n, heads, -1, 1), axis=3, mode="clip")
            share = weights * jnp.where(inside, y_weight * x_weight, 0).astype(weights.dtype)
            total += jnp.einsum(
                "bnhqp,bnhqpd->bqhd",
                share.reshape(b, n, heads, q, -1),
                picked.reshape(b, n, heads, q, levels * points, -1),
            )
    return total


# --- hat --------------------------------------------------------------------------------------------


def _hat(position: jax.Array, size: int) -> jax.Array:
    """[...] -> [..., size]: 1 at the pixel under `position`, falling to 0 one pixel away."""
    # Written with floor, not with |distance|, so that the slope on a pixel centre is that of the gather.
    low, part = _corners(position[..., None])
    cells = jnp.arange(size, dtype=position.dtype)
    return jnp.where(cells == low, 1 - part, 0) + jnp.where(cells == low + 1, part, 0)


@jax.custom_vjp
def _outer(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Sum over points of outer products: [..., P, h], [..., P, w] -> [..., h, w]."""
    # Forward as a loop over the few points, which fuses; backward as matmuls, since the sums over a side
    # that differentiation would write are several times slower on CPU (measured: 20 times in the worst case).
    points = range(rows.shape[-2])
    return sum(rows[..., p, :, None] * columns[..., p, None, :] for p in points)


def _outer_forward(rows, columns):
    return _outer(rows, columns), (rows, columns)


def _outer_backward(saved, grad):
    rows, columns = saved
    return jnp.einsum("...ij,...pj->...pi", grad, columns), jnp.einsum("...ij,...pi->...pj", grad, rows)


_outer.defvjp(_outer_forward, _outer_backward)


def _dense(values, locations, weights, shapes):
    """`values` [B, heads, N, V, H], the others [B, heads, Q, N, levels, points, ...] -> [B, heads, Q, H]."""
    total, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        x, y = locations[..., level, :, 0], locations[..., level, :, 1]
        rows = _hat(y * h - 0.5, h).astype(values.dtype) * weights[..., level, :, None]
        columns = _hat(x * w - 0.5, w).astype(values.dtype)
        maps = _outer(rows, columns)
        maps = maps.reshape(*maps.shape[:3], -1)  # [B, heads, Q, N * h * w]
        level_values = values[:, :, :, start : start + h * w]
        total += maps @ level_values.reshape(*values.shape[:2], -1, values.shape[-1])
        start += h * w
    return total


def _hats(values, locations, weights, shapes):
    b, q, n, heads = locations.shape[:4]
    values = jnp.moveaxis(values, 3, 1)
    locations = jnp.transpose(locations, (0, 3, 1, 2, 4, 5, 6))
    weights = jnp.transpose(weights, (0, 3, 1, 2, 4, 5))
    per_query = heads * values.shape[2] * values.shape[3]
    turns = math.ceil(q * per_query / HAT_BUDGET)
    if turns == 1:
        out = _dense(values, locations, weights, shapes)
    else:
        # Queries in turns; the dense maps are made again in the backward pass instead of being kept.
        size = math.ceil(q / turns)
        extra = turns * size - q

        def chunks(a):
            a = jnp.pad(a, [(0, 0), (0, 0), (0, extra)] + [(0, 0)] * (a.ndim - 3))
            return jnp.moveaxis(a.reshape(*a.shape[:2], turns, size, *a.shape[3:]), 2, 0)

        @jax.checkpoint
        def turn(chunk):
            return _dense(values, *chunk, shapes)

        out = jax.lax.map(turn, (chunks(locations), chunks(weights)))
        out = jnp.moveaxis(out, 0, 2).reshape(b, heads, turns * size, -1)[:, :, :q]
    return jnp.moveaxis(out, 1, 2)


_IMPLEMENTATIONS = {"gather": _gather, "hat": _hats}
