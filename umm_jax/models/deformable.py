"""Multi-scale deformable aggregation behind one entry, :func:`sample`.

Every query reads a few points of every level of every image, bilinearly, and adds them with given weights:

    out[b, q, h] = sum over n, l, p of  weights[b, q, n, h, l, p] * bilinear(values of (b, n, l, h), location)

Pixel i of a side s has its centre at (i + 0.5) / s ("align_corners=False"); beyond the border the map is
zero. Source: Deformable DETR (arXiv 2010.04159) eq. 3; docs/mm_interleaved.md section 3.

The implementations give the same numbers and the same gradients; docs/performance.md has the figures:

    rows     the gather as it suits a CPU, see deformable_rows.
    gather   reads four corners per point, all at once. Work grows with the points only, but its backward
             pass is a scatter, and what was read is written out.
    hat      bilinear weights are the product of a triangle ("hat") over rows and one over columns. Summed
             over points they form a dense map [Q, h * w] per head, and one matmul with the values does
             the rest, forward and backward. Work grows with the number of pixels.
    pallas   the same as kernels for TPU, see deformable_pallas: compiled, but not yet run on one, so opt-in.

All keep only the arguments for the backward pass, which makes again what it needs; second derivatives are
not defined. Which one runs is decided when a program is lowered for a platform, so that compiling for a TPU
on a machine without one gives the TPU's program.

Letters: B rows, Q queries, N images, V = sum of h * w over levels, H head width.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from umm_jax.errors import ConfigError
from umm_jax.models import deformable_pallas as pallas
from umm_jax.models import deformable_rows as rows
from umm_jax.models.layers import is_plain
from umm_jax.sharding import on_each_device, rows_here, split_rows

Sides = Sequence[int | tuple[int, int]]

# Largest dense map that a device holds, all its rows together, in elements (32 MiB in bfloat16); more queries
# are taken in turns, but not fewer than LANES at a time: a matrix unit would stand idle.
HAT_BUDGET = 2**24
LANES = 128


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
        implementation: "rows", "gather", "hat", "pallas", or "auto", see :func:`choose`.

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
    if implementation not in ("auto", *_IMPLEMENTATIONS):
        known = ", ".join(("auto", *_IMPLEMENTATIONS))
        raise ConfigError(f"implementation {implementation!r} is unknown; choose one of {known}")
    values, locations, weights = split_rows(values, locations, weights)
    # Positions keep float32: bfloat16 cannot tell neighbouring pixels of a 64-pixel side apart.
    return _sample(values, locations.astype(jnp.float32), weights, tuple(shapes), implementation)


def choose(platform: str, cells: int, reads: int) -> str:
    """The implementation for a platform: "cpu", "gpu" or "tpu".

    Args:
        cells: pixels of an image's maps, all levels together.
        reads: corners that all queries of a row read of an image and head.
    """
    if platform == "tpu":
        return "hat"
    # With fewer reads than pixels (one query of a decoding loop) making the padded table costs more than
    # it saves.
    return "rows" if platform == "cpu" and reads >= cells else "gather"


def _run(step: str, shapes, implementation: str, values, locations, *others):
    """`step` is "forward" or "backward"."""
    arrays = (values, locations, *others)
    if is_plain():
        implementation = "gather"
    if implementation == "pallas":
        return _on_each_device(step, arrays, shapes)
    if implementation != "auto":
        return _IMPLEMENTATIONS[implementation][step](*arrays, shapes)
    _, queries, _, _, levels, points, _ = locations.shape
    names = {p: choose(p, values.shape[2], 4 * queries * levels * points) for p in ("cpu", "gpu", "tpu")}
    run = {p: functools.partial(_run, step, shapes, name) for p, name in names.items()}
    return jax.lax.platform_dependent(*arrays, cpu=run["cpu"], tpu=run["tpu"], default=run["gpu"])


_VALUES, _RESULT = ("batch", None, None, "heads", None), ("batch", "sequence", "heads", None)
_WEIGHTS = ("batch", "sequence", None, "heads", None, None)
_LOCATIONS = (*_WEIGHTS, None)


def _on_each_device(step: str, arrays, shapes):
    """The kernels, which the compiler does not split, on each device's rows, heads and queries."""
    run = functools.partial(_IMPLEMENTATIONS["pallas"][step], shapes=shapes)
    values, locations, weights, *grad = arrays
    axes = (_VALUES, _LOCATIONS, _WEIGHTS, *[_RESULT] * len(grad))
    if step == "backward":
        return on_each_device(run, arrays, axes, arrays[:3], axes[:3], summed=("sequence",))
    b, q, _, heads, *_ = locations.shape
    result = jax.ShapeDtypeStruct((b, q, heads, values.shape[-1]), values.dtype)
    return on_each_device(run, arrays, axes, result, _RESULT)


# The rule is around the choice, not inside: differentiating through the choice would keep what the backward
# passes of all platforms need.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sample(values, locations, weights, shapes, implementation):
    return _run("forward", shapes, implementation, values, locations, weights)


def _sample_forward(values, locations, weights, shapes, implementation):
    return _sample(values, locations, weights, shapes, implementation), (values, locations, weights)


def _sample_backward(shapes, implementation, saved, grad):
    return _run("backward", shapes, implementation, *saved, grad)


_sample.defvjp(_sample_forward, _sample_backward)


def _corners(position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lower neighbour (whole number) and the fraction beyond it of a position counted in pixel centres."""
    low = jax.lax.stop_gradient(jnp.floor(position))
    return low, position - low


# --- gather -----------------------------------------------------------------------------------------


def _gather(values, locations, weights, shapes):
    b, q, n, heads, levels, points, _ = locations.shape
    weights = weights.astype(values.dtype)
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


def _turn(queries: int, most: int) -> int:
    """How many queries to take at a time, at most `most`."""
    if queries <= most:
        return queries
    # Queries end up along the lanes of a TPU: whole ones, and no remainder if possible.
    whole = [size for size in range(LANES, most + 1, LANES) if queries % size == 0]
    return max(whole) if whole else math.ceil(queries / math.ceil(queries / most))


def _hats(values, locations, weights, shapes):
    b, q, n, heads = locations.shape[:4]
    weights = weights.astype(values.dtype)
    values = jnp.moveaxis(values, 3, 1)
    locations = jnp.transpose(locations, (0, 3, 1, 2, 4, 5, 6))
    weights = jnp.transpose(weights, (0, 3, 1, 2, 4, 5))
    per_query = rows_here(b) * heads * values.shape[2] * values.shape[3]
    size = _turn(q, max(LANES, HAT_BUDGET // per_query))
    if size == q:
        out = _dense(values, locations, weights, shapes)
    else:
        # Queries in turns; the dense maps are made again in the backward pass instead of being kept.
        turns = math.ceil(q / size)
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


def _differentiated(forward):
    """Both steps of an implementation that JAX differentiates."""

    def backward(values, locations, weights, grad, shapes):
        return jax.vjp(lambda *arrays: forward(*arrays, shapes), values, locations, weights)[1](grad)

    return {"forward": forward, "backward": backward}


_IMPLEMENTATIONS = {
    "rows": {"forward": rows.forward, "backward": rows.backward},
    "gather": _differentiated(_gather),
    "hat": _differentiated(_hats),
    "pallas": {"forward": pallas.forward, "backward": pallas.backward},
}
