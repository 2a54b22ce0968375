"""What benchmarks of segmentation have in common: the mask of a reply, and the IoU of all of them at once."""

from collections.abc import Sequence

import numpy as np

from umm_jax.evaluate.contract import Record, Response, Score
from umm_jax.evaluate.measures import regions


def found(response: Response, size: tuple[int, int], which: str) -> tuple[np.ndarray | None, str]:
    """bool[h, w] of a reply, its "first" mask or the "union" of all; else None and why there is none."""
    masks = response.masks[:1] if which == "first" else response.masks
    if not masks:
        return None, "no mask"
    if any(tuple(mask.size) != tuple(size) for mask in masks):
        return None, "mask of another size"
    return np.logical_or.reduce([mask.array() for mask in masks]), ""


def overall(records: Sequence[Record]) -> Score:
    """cIoU of records with the parts `both` and `either`."""
    value = regions.ciou((r.marks.parts["both"], r.marks.parts["either"]) for r in records)
    invalid = sum(bool(r.marks.invalid) for r in records)
    if value is None:
        return Score(None, None, len(records), invalid, "no pixel is wanted or was found")
    return Score(100 * value, None, len(records), invalid)
