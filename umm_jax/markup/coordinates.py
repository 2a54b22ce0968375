"""Boxes of a picture and of the square it is padded to, and how they are read from text.

A box is (x0, y0, x1, y1), the origin at the top left, as shares of the picture's width and height.
"""

from collections.abc import Sequence

Box = tuple[float, float, float, float]
SLACK = 0.05  # how far outside a coordinate may lie and still be brought to the edge
LEAST = 0.001  # of a side


def _margins(width: int, height: int) -> tuple[int, float, float]:
    side = max(width, height)
    return side, (side - width) / 2, (side - height) / 2


def to_square(box: Sequence[float], width: int, height: int, whole: bool = False) -> Box:
    """As shares of the square of side max(width, height) in whose middle the picture lies.

    `whole` rounds to pixels first, with whole margins, as GroundingGPT's public code does.
    """
    side, left, top = _margins(width, height)
    if whole:
        left, top = int(left), int(top)
    sizes, margins = (width, height, width, height), (left, top, left, top)
    found = [v * size for v, size in zip(box, sizes)]
    found = [(int(v) if whole else v) + margin for v, margin in zip(found, margins)]
    return tuple(v / side for v in found)


def from_square(box: Sequence[float], width: int, height: int) -> Box:
    """The inverse of :func:`to_square`, cut at the edges of the picture."""
    side, left, top = _margins(width, height)
    sizes, margins = (width, height, width, height), (left, top, left, top)
    found = [(v * side - margin) / size for v, margin, size in zip(box, margins, sizes)]
    return tuple(min(max(v, 0.0), 1.0) for v in found)


def checked(numbers: Sequence[float], scale: float = 1.0) -> tuple[Box | None, str]:
    """A box of four finite numbers, mended where that is safe, and what was done: "" or a diagnostic's code.

    BOX_CLIP and BOX_SWAP give a box; BOX_RANGE and BOX_EMPTY none.
    """
    values, code = [v / scale for v in numbers], ""
    if min(values) < -SLACK or max(values) > 1 + SLACK:
        return None, "BOX_RANGE"
    if min(values) < 0 or max(values) > 1:
        values, code = [min(max(v, 0.0), 1.0) for v in values], "BOX_CLIP"
    x0, y0, x1, y1 = values
    if x0 > x1 or y0 > y1:
        x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
        code = code or "BOX_SWAP"
    if x1 - x0 < LEAST or y1 - y0 < LEAST:
        return None, "BOX_EMPTY"
    return (x0, y0, x1, y1), code
