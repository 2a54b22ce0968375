"""Boxes that models write as text, read as the evaluators of those who trained them so read them.

    mm_interleaved   (x0,y0)(x1,y1)    in 0..999 of the picture
    qwen_vl          (x0,y0),(x1,y1)   in 0..999 of the picture
    list             [x0, y0, x1, y1]

In the first two, the first two pairs of brackets that stand so are the answer, whatever is in them: where
that is no box, the evaluators take one without area, which is wrong.

Sources: the evaluators of MM-Interleaved, Qwen-VL and, for lists, lmms-eval's `refcoco_bbox_rec`.
"""

import math
import re
from collections.abc import Sequence
from typing import Literal

GRID = 999  # steps across a picture, of the first two
_PAIRS = {
    "mm_interleaved": re.compile(r"\((.*?)\)\((.*?)\)"),
    "qwen_vl": re.compile(r"\((.*?)\),\((.*?)\)"),
}
_NUMBER = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
_LIST = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")

Form = Literal["mm_interleaved", "qwen_vl", "list"]
Box = tuple[float, float, float, float]


def read(text: str, form: Form) -> list[Box | None]:
    """The boxes of a text in order, in their own unit; None for one that cannot be read."""
    if form == "list":
        return [numbers(found) for found in _LIST.findall(text)]
    return [numbers(_two(a) + _two(b)) for a, b in _PAIRS[form].findall(text)]


def _two(text: str) -> list[str]:
    """What is on both sides of its one comma; nothing if it has not one."""
    parts = text.split(",")
    return parts if len(parts) == 2 else []


def numbers(values: Sequence[str | float]) -> Box | None:
    """Four finite numbers, or None."""
    try:
        box = tuple(float(v) for v in values)
    except ValueError:
        return None
    return box if len(box) == 4 and all(math.isfinite(v) for v in box) else None


def scaled(box: Box, across: float, down: float) -> Box:
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def on_grid(box: Box, size: tuple[int, int]) -> Box:
    """A box in pixels of a picture of `size` (h, w), its corners cut down to whole steps of 1/999."""
    height, width = size
    steps = [int(v / side * GRID) for v, side in zip(box, (width, height, width, height))]
    return scaled(tuple(steps), width / GRID, height / GRID)
