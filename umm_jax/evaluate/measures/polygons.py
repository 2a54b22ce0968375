"""Polygons in whole pixels to masks, as OpenCV fills them: annotations made with it were scored with it.

`fillPoly` does two things. It draws the outline, so that every pixel an edge runs through is inside; and on
each row it fills from the first crossing to the second, from the third to the fourth, and so on, so that
where a polygon covers itself there is a hole. An edge covers the rows from its upper end to just above its
lower one. Pillow's polygons differ from these in some pixels of nearly every outline.

Edges that leave the picture are cut to it first, in whole pixels, and the cut piece says how steep the whole
edge is: such edges end up a little off, and so they do here, pixel for pixel.
"""

import math
from collections.abc import Sequence

import numpy as np

_TINY = 1e-6  # crossings that are whole numbers may come out a little beside them

Point = tuple[int, int]


def fill(points: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """bool[h, w], True inside.

    Args:
        points: [x, y] of each corner in pixels, pixel (0, 0) at the top left; fractions are cut off.
        size: (h, w) of the picture.
    """
    height, width = size
    found = np.zeros(size, bool)
    corners = [(math.trunc(x), math.trunc(y)) for x, y in points]
    edges = []
    for a, b in zip(corners, corners[1:] + corners[:1]):
        start, end, seen = _cut(a, b, width, height)
        if seen:
            _draw(found, start, end)
        if a[1] == b[1]:
            continue
        if start[1] == end[1]:
            start, end = (start[0], a[1]), (end[0], b[1])
        slope = (end[0] - start[0]) / (end[1] - start[1])
        upper = min(a[1], b[1])
        edges.append((upper, max(a[1], b[1]), start[0] + (upper - start[1]) * slope, slope))
    if edges:
        _fill(found, np.array(edges))
    return found


def _fill(found: np.ndarray, edges: np.ndarray) -> None:
    upper, lower, x, slope = edges.T
    for row in range(max(int(upper.min()), 0), min(int(lower.max()), len(found))):
        crossed = (upper <= row) & (row < lower)
        crossings = np.sort(x[crossed] + (row - upper[crossed]) * slope[crossed])
        for left, right in zip(crossings[::2], crossings[1::2]):
            first, last = math.ceil(left - _TINY), math.floor(right + _TINY)
            found[row, max(first, 0) : max(last + 1, 0)] = True


def _draw(found: np.ndarray, a: Point, b: Point) -> None:
    """A line of pixels between two of the picture's, from left to right."""
    (x0, y0), (x1, y1) = sorted((a, b), key=lambda end: end[0])
    across, down, way = x1 - x0, abs(y1 - y0), 1 if y1 >= y0 else -1
    most, least = max(across, down), min(across, down)
    steps = np.arange(most + 1)
    # The other coordinate is steps * least / most, rounded to the nearest whole number, halves down.
    aside = -((most - 2 * steps * least) // (2 * most)) if most else steps
    if across >= down:
        found[y0 + way * aside, x0 + steps] = True
    else:
        found[y0 + way * steps, x0 + aside] = True


# --- cutting edges to the picture -------------------------------------------------------------------------


def _cut(a: Point, b: Point, width: int, height: int) -> tuple[Point, Point, bool]:
    """Both ends moved along the edge onto the picture's border; whether any of it is in the picture.

    First up and down, then sideways; each move is cut to whole pixels. An edge of which nothing is seen comes
    back as far as it was moved.
    """
    a, b, seen = _cut_along(a, b, height, 1)
    return _cut_along(a, b, width, 0) if seen else (a, b, False)


def _cut_along(a: Point, b: Point, side: int, axis: int) -> tuple[Point, Point, bool]:
    a, b = list(a), list(b)
    if _beyond(a[axis], side) == _beyond(b[axis], side) != 0:
        return tuple(a), tuple(b), False
    for end in (a, b):
        if out := _beyond(end[axis], side):
            border = 0 if out < 0 else side - 1
            along = (border - end[axis]) * (b[1 - axis] - a[1 - axis])
            end[1 - axis] += int(along / (b[axis] - a[axis]))
            end[axis] = border
    return tuple(a), tuple(b), True


def _beyond(value: int, side: int) -> int:
    return -1 if value < 0 else int(value >= side)
