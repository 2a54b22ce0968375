"""Regions of pictures from annotations: polygons in pixels to masks."""

import math
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw

from umm_jax.conversation import Mask
from umm_jax.data.quarantine import Rejected


def polygons(value: list) -> list[list[float]]:
    """One polygon, or several, as lists x0, y0, x1, y1, ... Raises Rejected."""
    several = value if value and isinstance(value[0], list) else [value]
    for points in several:
        sound = isinstance(points, list) and all(is_number(number) for number in points)
        if not sound or len(points) < 6 or len(points) % 2:
            raise Rejected("no polygon", f"a polygon is three points or more, got {str(points)[:100]}")
    return several


def mask(ref: str, shapes: list[list[float]], size: tuple[int, int], label: str | None) -> Mask:
    """The union of polygons in pixels of picture `ref`, `size` (width, height). Raises Rejected if empty."""
    canvas = PIL.Image.new("1", size)
    pen = PIL.ImageDraw.Draw(canvas)
    for points in shapes:
        pen.polygon(points, fill=1, outline=1)
    region = np.asarray(canvas)
    if not region.any():
        raise Rejected("empty mask", f"no pixel of {size[0]} x {size[1]} lies in it")
    return Mask.from_array(ref, region, label)


def is_number(value: Any) -> bool:
    """A finite int or float of JSON."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
