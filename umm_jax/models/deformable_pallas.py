"""The hat form of the deformable aggregation as one TPU kernel each way; opt-in, see deformable.sample.

XLA's version writes each dense map of bilinear weights to memory between the loops that make it and the
matmul that uses it, or makes it in smaller pieces than it likes. Here it lives in VMEM only:

    grid       one head, one image, 128 queries at a time. Queries lie along the lanes, so that a hat over
               columns [w, 128] times one value per query is a plain product of vectors.
    forward    maps [V, 128], row by row, as sums over points of rows' hats times columns' hats; values
               [H, V] times maps are added over the images.
    backward   the same maps give the values' gradient; values^T times gradient [V, 128] is multiplied with
               hats and with their slopes for those of weights and locations.

The maps of one image must fit VMEM: about 4 bytes * 128 * V forward and twice that backward, so V up to
some 8,000 pixels. On anything but a TPU the kernels run in Pallas' interpreter: right, and very slow.

Letters: B rows, Q queries, N images, K points of all levels, P of one, V pixels with every map's width
rounded up to 8 (zeros), H width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Shapes = tuple[tuple[int, int], ...]

LANES = 128
SUBLANES = 8


def _rounded(w: int) -> int:
    return -(-w // SUBLANES) * SUBLANES


def _starts(shapes: Shapes) -> list[int]:
    sizes = [h * _rounded(w) for h, w in shapes]
    return [sum(sizes[:i]) for i in range(len(sizes) + 1)]


# --- inside the kernels: arrays of one head, one image, and 128 queries ---------------------------------


def _hat(position, cell):
    """1 on the pixel, falling to 0 one pixel away."""
    return jnp.maximum(1 - jnp.abs(position - cell), 0)


def _slope(position, cell):
    """Its derivative; on a pixel's centre that of the right side, as in the other implementations."""
    low = jnp.floor(position)
    return jnp.where(cell == low + 1, 1.0, 0.0) - jnp.where(cell == low, 1.0, 0.0)


def _of_points(function, x, points, width):
    """`function` of every point's position [K, 128] and the pixels of a row -> one [width, 128] a point."""
    cells = jax.lax.broadcasted_iota(jnp.int32, (width, x.shape[-1]), 0).astype(jnp.float32)
    return [function(x[p : p + 1], cells) for p in points]


def _make_maps(x_ref, y_ref, weights_ref, maps_ref, shapes, per_level):
    """Writes the dense maps [V, 128] of all levels."""
    for level, ((h, w), start) in enumerate(zip(shapes, _starts(shapes))):
        width, at = _rounded(w), slice(level * per_level, (level + 1) * per_level)
        columns = _of_points(_hat, x_ref[at], range(per_level), width)
        y, weights = y_ref[at], weights_ref[at]

        def row(i, _, y=y, weights=weights, columns=columns, width=width, start=start):
            share = _hat(y, i.astype(jnp.float32)) * weights
            line = sum(share[p : p + 1] * columns[p] for p in range(per_level))
            maps_ref[pl.ds(pl.multiple_of(start + i * width, SUBLANES), width)] = line
            return 0

        jax.lax.fori_loop(0, h, row, 0)


def _dot(a, b, contract):
    # Float32 values are compared with the other implementations and must not be rounded to bfloat16.
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)


def _forward_kernel(x_ref, y_ref, weights_ref, values_ref, out_ref, maps_ref, *, shapes, per_level):
    @pl.when(pl.program_id(3) == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    _make_maps(x_ref, y_ref, weights_ref, maps_ref, shapes, per_level)
    values = values_ref[...]
    out_ref[...] += _dot(values, maps_ref[...].astype(values.dtype), (1, 0))


def _backward_kernel(x_ref, y_ref, weights_ref, values_ref, grad_ref, *refs, shapes: Shapes, per_level: int):
    to_x_ref, to_y_ref, to_weights_ref, to_values_ref, maps_ref = refs

    @pl.when(pl.program_id(3) == 0)
    def _():
        to_values_ref[...] = jnp.zeros_like(to_values_ref)

    values, grad = values_ref[...], grad_ref[...]
    _make_maps(x_ref, y_ref, weights_ref, maps_ref, shapes, per_level)
    to_values_ref[...] += _dot(grad, maps_ref[...].astype(grad.dtype), (1, 1))
    maps_ref[...] = _dot(values, grad, (0, 0))  # from here on the gradient of the maps

    for level, ((h, w), start) in enumerate(zip(shapes, _starts(shapes))):
        width, at = _rounded(w), slice(level * per_level, (level + 1) * per_level)
        x, y, weights = x_ref[at], y_ref[at], weights_ref[at]
        columns = _of_points(_hat, x, range(per_level), width)
        slopes = _of_points(_slope, x, range(per_level), width)

        def row(i, sums, y=y, columns=columns, slopes=slopes, width=width, start=start):
            line = maps_ref[pl.ds(pl.multiple_of(start + i * width, SUBLANES), width)]
            along = jnp.concatenate([jnp.sum(line * c, axis=0, keepdims=True) for c in columns])
            across = jnp.concatenate([jnp.sum(line * s, axis=0, keepdims=True) for s in slopes])
            cell = i.astype(jnp.float32)
            share, slope = _hat(y, cell), _slope(y, cell)
            return sums[0] + share * across, sums[1] + slope * along, sums[2] + share * along

        to_x, to_y, to_weights = jax.lax.fori_loop(0, h, row, (jnp.zeros_like(x),) * 3)
        to_x_ref[at], to_y_ref[at], to_weights_ref[at] = to_x * weights, to_y * weights, to_weights


# --- around the kernels ---------------------------------------------------------------------------------


def _columns(values, shapes):
    """[B, N, pixels, heads, H] -> [B, heads, N, H, V]."""
    values = jnp.transpose(values, (0, 3, 1, 4, 2))
    parts, start = [], 0
    for h, w in shapes:
        part = values[..., start : start + h * w].reshape(*values.shape[:-1], h, w)
        part = jnp.pad(part, [(0, 0)] * 5 + [(0, _rounded(w) - w)])
        parts.append(part.reshape(*values.shape[:-1], -1))
        start += h * w
    return jnp.concatenate(parts, axis=-1)


def _pixels(columns, shapes):
    """The inverse of :func:`_columns`."""
    parts = []
    for (h, w), start in zip(shapes, _starts(shapes)):
        part = columns[..., start : start + h * _rounded(w)]
        part = part.reshape(*columns.shape[:-1], h, _rounded(w))[..., :w]
        parts.append(part.reshape(*columns.shape[:-1], h * w))
    return jnp.transpose(jnp.concatenate(parts, axis=-1), (0, 2, 4, 1, 3))


def _scale(shapes, axis):
    """Sides along x (axis 0) or y (axis 1), one per level, to multiply [..., levels, P] with."""
    return jnp.array([(w, h)[axis] for h, w in shapes], jnp.float32)[:, None]


def _lanes(a, q):
    """[B, Q, N, heads, levels, P] -> [B, heads, N, K, Q rounded up to whole blocks]."""
    a = jnp.transpose(a.reshape(*a.shape[:4], -1), (0, 3, 2, 4, 1))
    return jnp.pad(a, [(0, 0)] * 4 + [(0, q - a.shape[-1])])


def _call(kernel, grid, specs, out, scratch, arrays, times: int, points: int):
    """Calls the kernel; in the interpreter where the program is not for a TPU.

    Args:
        times, points: what a compiler may count: products with the maps, and those of a map with a hat or a
            slope, which are the vector work and stand where transcendentals are told.
    """
    b, heads, n, width, cells = arrays[3].shape
    maps = b * heads * n * cells * arrays[0].shape[-1]
    cost = pl.CostEstimate(
        flops=2 * times * maps * width,
        transcendentals=2 * points * maps,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*arrays, *out)),
    )

    def call(*arrays, interpret):
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=specs[: len(arrays)],
            out_specs=specs[len(arrays) :],
            out_shape=out,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
            ),
            cost_estimate=cost,
            interpret=interpret,
        )(*arrays)

    return jax.lax.platform_dependent(
        *arrays,
        tpu=functools.partial(call, interpret=False),
        default=functools.partial(call, interpret=True),
    )


def _prepare(values, locations, weights, shapes):
    q = -(-locations.shape[1] // LANES) * LANES
    x = _lanes(locations[..., 0] * _scale(shapes, 0) - 0.5, q)
    y = _lanes(locations[..., 1] * _scale(shapes, 1) - 0.5, q)
    return x, y, _lanes(weights.astype(jnp.float32), q), _columns(values, shapes)


def forward(values, locations, weights, shapes: Shapes):
    """See :func:`deformable.sample`."""
    b, q, n, heads, levels, points, _ = locations.shape
    arrays = _prepare(values, locations, weights, shapes)
    width, cells, padded = values.shape[-1], arrays[3].shape[-1], arrays[0].shape[-1]
    near = pl.BlockSpec((None, None, None, levels * points, LANES), lambda b, h, q, n: (b, h, n, 0, q))
    image = pl.BlockSpec((None, None, None, width, cells), lambda b, h, q, n: (b, h, n, 0, 0))
    result = pl.BlockSpec((None, None, width, LANES), lambda b, h, q, n: (b, h, 0, q))
    (out,) = _call(
        functools.partial(_forward_kernel, shapes=shapes, per_level=points),
        (b, heads, padded // LANES, n),
        [near, near, near, image, result],
        [jax.ShapeDtypeStruct((b, heads, width, padded), jnp.float32)],
        [pltpu.VMEM((cells, LANES), jnp.float32)],
        arrays,
        times=1,
        points=points,
    )
    return jnp.transpose(out, (0, 3, 1, 2))[:, :q].astype(values.dtype)


def backward(values, locations, weights, grad, shapes: Shapes):
    """Gradients of values, locations and weights, given that of the result."""
    b, q, n, heads, levels, points, _ = locations.shape
    arrays = _prepare(values, locations, weights, shapes)
    width, cells, padded = values.shape[-1], arrays[3].shape[-1], arrays[0].shape[-1]
    grad = jnp.pad(jnp.transpose(grad, (0, 2, 3, 1)), [(0, 0)] * 3 + [(0, padded - q)])
    near = pl.BlockSpec((None, None, None, levels * points, LANES), lambda b, h, n, q: (b, h, n, 0, q))
    image = pl.BlockSpec((None, None, None, width, cells), lambda b, h, n, q: (b, h, n, 0, 0))
    result = pl.BlockSpec((None, None, width, LANES), lambda b, h, n, q: (b, h, 0, q))
    like_near = jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)
    to_x, to_y, to_weights, to_values = _call(
        functools.partial(_backward_kernel, shapes=shapes, per_level=points),
        (b, heads, n, padded // LANES),
        [near, near, near, image, result, near, near, near, image],
        [like_near] * 3 + [jax.ShapeDtypeStruct(arrays[3].shape, jnp.float32)],
        [pltpu.VMEM((cells, LANES), jnp.float32)],
        (*arrays, grad),
        times=2,
        points=3 * points,
    )

    def points_first(a):  # the inverse of _lanes
        return jnp.transpose(a[..., :q], (0, 4, 2, 1, 3)).reshape(b, q, n, heads, levels, points)

    to_x = points_first(to_x) * _scale(shapes, 0)
    to_y = points_first(to_y) * _scale(shapes, 1)
    return (
        _pixels(to_values, shapes).astype(values.dtype),
        jnp.stack([to_x, to_y], axis=-1).astype(locations.dtype),
        points_first(to_weights).astype(weights.dtype),
    )
