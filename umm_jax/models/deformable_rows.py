"""The gather of the deformable aggregation as it suits a CPU; chosen by :func:`deformable.sample`.

XLA on a CPU is quick at a loop that adds whole rows of a table, each times one number, and slow at almost
everything else a gather and its gradient are usually made of: index arithmetic per element, copies of what
was gathered that leave the cache, scatters of single numbers. Hence

    table      every map gets a border of zeros once, so that the four corners of a point need no test: they
               lie at i, i + 1, i + pitch and i + pitch + 1. Head by head and image by image, so that the
               rows in use fit a core's cache.
    forward    sum over points of  corner weight * row  in one fused loop; nothing is kept of what was read.
    backward   a few queries at a time, whose rows stay in the cache: read again, multiplied with the
               gradient of the result for locations and weights, and overwritten in turn by what is added
               to the gradient of the values. The two corners of a row are neighbours in the table, so one
               index serves both; that makes it 1.2 to 1.7 times as fast.

Memory beyond arguments and results: the padded table, its gradient, and the rows of one chunk of queries.

Letters: B rows, Q queries, N images, C queries of a chunk, V cells of the padded maps, P points, H width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

Shapes = tuple[tuple[int, int], ...]

# Elements of the rows that a chunk of queries reads, the upper and the lower ones apart (1 MiB each): more of
# them leave the cache.
CHUNK = 2**19


def _sizes(shapes: Shapes) -> list[tuple[int, int, int, int]]:
    """Per level h, w, and where it lies in the table: cell (y, x) at start + (y + 1) * pitch + x + 1."""
    sizes, start = [], 0
    for h, w in shapes:
        sizes.append((h, w, start, w + 1))  # one zero between two rows is border for both
        start += _cells(h, w)
    return sizes


def _cells(h: int, w: int) -> int:
    # A row above, a row below, and a last zero for the corner right of the last row.
    return (h + 2) * (w + 1) + 1


def _table(values: jax.Array, shapes: Shapes) -> jax.Array:
    """[B, N, pixels, heads, H] -> [heads, N, B, V, H] with borders of zeros."""
    values = jnp.transpose(values, (3, 1, 0, 2, 4))
    parts, start = [], 0
    for h, w in shapes:
        maps = values[..., start : start + h * w, :].reshape(*values.shape[:3], h, w, -1)
        maps = jnp.pad(maps, ((0, 0),) * 3 + ((1, 1), (1, 0), (0, 0)))
        maps = maps.reshape(*values.shape[:3], -1, values.shape[-1])
        parts.append(jnp.pad(maps, ((0, 0),) * 3 + ((0, 1), (0, 0))))
        start += h * w
    return jnp.concatenate(parts, axis=3)


def _pixels(table: jax.Array, shapes: Shapes) -> jax.Array:
    """The inverse of :func:`_table`."""
    parts = []
    for h, w, start, pitch in _sizes(shapes):
        part = table[..., start : start + _cells(h, w) - 1, :]
        part = part.reshape(*table.shape[:3], h + 2, pitch, -1)[..., 1:-1, 1:, :]
        parts.append(part.reshape(*table.shape[:3], h * w, -1))
    return jnp.transpose(jnp.concatenate(parts, axis=3), (2, 1, 3, 0, 4))


def _place(locations, h, w, start, pitch):
    """[..., 2] -> cell of the upper left corner, fractions (x, y) beyond it, and whether (x, y) are inside.

    A point that is a pixel or more away from the map stands on the border instead, where all is zero.
    """
    size = jnp.stack([jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32)], axis=-1)
    position = locations * size - 0.5
    inside = (position >= -1) & (position < size)
    position = jnp.where(inside, position, -1)
    low = jnp.floor(position)
    part = position - low
    x, y = low[..., 0].astype(jnp.int32), low[..., 1].astype(jnp.int32)
    return start + (y + 1) * pitch + x + 1, (part[..., 0], part[..., 1]), (inside[..., 0], inside[..., 1])


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of [B, V, H] at [B, ...] -> [B, ..., H]."""
    return jax.vmap(lambda t, i: t.at[i].get(mode="promise_in_bounds"))(table, index)


def _two_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of [V, H] at [C, K] and after them -> [C, K, 2, H]."""
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(2, 3), collapsed_slice_dims=(), start_index_map=(0,)
    )
    return jax.lax.gather(table, index[..., None], numbers, (2, table.shape[1]), mode="promise_in_bounds")


def _add_two(table: jax.Array, index: jax.Array, added: jax.Array) -> jax.Array:
    """[V, H] with [C, K, 2, H] added to the rows at [C, K] and those after them."""
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )
    return jax.lax.scatter_add(table, index[..., None], added, numbers, mode="promise_in_bounds")


def _pick(a: jax.Array, *places) -> jax.Array:
    """a[:, :, places] with traced places: the axes of image, head and, if given, level are gone."""
    start = (0, 0, *places) + (0,) * (a.ndim - 2 - len(places))
    size = a.shape[:2] + (1,) * len(places) + a.shape[2 + len(places) :]
    return jax.lax.dynamic_slice(a, start, size).reshape(*a.shape[:2], *a.shape[2 + len(places) :])


def forward(values, locations, weights, shapes: Shapes):
    """See :func:`deformable.sample`; computes in float32 or wider."""
    b, q, n, heads, levels, points, _ = locations.shape
    wide = jnp.promote_types(values.dtype, jnp.float32)
    table, weights = _table(values.astype(wide), shapes), weights.astype(wide)
    sizes = jnp.asarray(np.array(_sizes(shapes), np.int32))

    def one_head(head):
        def one_level(out, i):
            image, level = i // levels, i % levels
            h, w, start, pitch = sizes[level]
            places = (image, head, level)
            index, (x, y), _ = _place(_pick(locations, *places), h, w, start, pitch)
            share, source = _pick(weights, *places), table[head, image]
            for p in range(points):
                right, below, at = x[..., p, None], y[..., p, None], index[..., p]
                upper = (1 - right) * _rows(source, at) + right * _rows(source, at + 1)
                lower = (1 - right) * _rows(source, at + pitch) + right * _rows(source, at + pitch + 1)
                out = out + share[..., p, None] * (1 - below) * upper + share[..., p, None] * below * lower
            return out, None

        nothing = jnp.zeros((b, q, values.shape[-1]), wide)
        return jax.lax.scan(one_level, nothing, jnp.arange(n * levels))[0]

    out = jax.lax.map(one_head, jnp.arange(heads))
    return jnp.transpose(out, (1, 2, 0, 3)).astype(values.dtype)


def backward(values, locations, weights, grad, shapes: Shapes):
    """Gradients of values, locations and weights, given that of the result."""
    b, q, n, heads, levels, points, _ = locations.shape
    width = values.shape[-1]
    wide = jnp.promote_types(values.dtype, jnp.float32)
    table = _table(values.astype(wide), shapes)
    turns = min(q, math.ceil(b * q * levels * points * 4 * width / CHUNK))
    size = math.ceil(q / turns)
    turns = math.ceil(q / size)

    def whole_turns(a):
        return jnp.pad(a, [(0, 0), (0, turns * size - q)] + [(0, 0)] * (a.ndim - 2))

    padded = whole_turns(locations), whole_turns(weights.astype(wide))
    grad = jnp.transpose(whole_turns(grad.astype(wide)), (2, 0, 1, 3))  # [heads, B, Q, H]

    def pair(i):
        head, image = i // n, i % n
        source = table[head, image]
        near = *(_pick(a, image, head) for a in padded), grad[head]

        def turn(to_values, start):
            where, share, g = (jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in near)
            to_values, *rest = _add_gradients(to_values, source, where, share, g, shapes)
            return to_values, rest

        return jax.lax.scan(turn, jnp.zeros_like(source), size * jnp.arange(turns))

    to_values, rest = jax.lax.map(pair, jnp.arange(heads * n))
    to_values = _pixels(to_values.reshape(heads, n, *to_values.shape[1:]), shapes)

    def gather_turns(a):  # [heads * N, turns, B, C, levels, P, ...] -> [B, Q, N, heads, levels, P, ...]
        a = jnp.moveaxis(a.reshape(heads, n, *a.shape[1:]), (0, 1, 2, 3, 4), (4, 3, 1, 0, 2))
        return a.reshape(b, turns * size, *a.shape[3:])[:, :q]

    to_locations, to_weights = map(gather_turns, rest)
    return (
        to_values.astype(values.dtype),
        to_locations.astype(locations.dtype),
        to_weights.astype(weights.dtype),
    )


def _add_gradients(to_values, source, where, share, g, shapes):
    """One chunk of queries, one head and image.

    Args:
        to_values, source: [B, V, H], the gradient of the values so far, and the values.
        where, share: [B, C, levels, P, 2] and [B, C, levels, P].
        g: [B, C, H].

    Returns:
        `to_values` and the gradients of `where` and `share`.
    """
    h, w, start, pitch = (np.array(column, np.int32)[:, None] for column in zip(*_sizes(shapes)))
    index, (x, y), (inside_x, inside_y) = _place(where, h, w, start, pitch)
    flat = (*share.shape[:2], -1)
    left_right = jnp.stack([1 - x, x], axis=-1)
    dots = []
    for row, part in ((0 * pitch, 1 - y), (pitch, y)):
        at = (index + row).reshape(flat)
        corners = ((part * share)[..., None] * left_right).reshape(*at.shape, 2)
        # Without this, all of the above is done again for every number that is added.
        at, corners = jax.lax.optimization_barrier((at, corners))
        to_values = jax.vmap(_add_two)(to_values, at, corners[..., None] * g[:, :, None, None])
        near = jnp.einsum("bckid,bcd->bcki", jax.vmap(_two_rows)(source, at), g)
        dots += [near[..., i].reshape(share.shape) for i in range(2)]
    upper_left, upper_right, lower_left, lower_right = dots
    upper = upper_left * (1 - x) + upper_right * x
    lower = lower_left * (1 - x) + lower_right * x
    slope_x = (upper_right - upper_left) * (1 - y) + (lower_right - lower_left) * y
    slope_x = jnp.where(inside_x, slope_x * share * w, 0)
    slope_y = jnp.where(inside_y, (lower - upper) * share * h, 0)
    return to_values, jnp.stack([slope_x, slope_y], axis=-1), upper * (1 - y) + lower * y
