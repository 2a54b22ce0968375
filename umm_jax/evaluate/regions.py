"""Measures of masks, boxes and spans.

`mean_iou` is what LISA calls gIoU and `ciou` its cIoU (arXiv 2308.00692); `box_giou` is the generalised IoU
of boxes (arXiv 1902.09630), another thing.
"""

from collections.abc import Sequence

import numpy as np

IGNORED = 255
_EPS = 1e-5


def mask_counts(found: np.ndarray | None, right: np.ndarray) -> tuple[int, int]:
    """Pixels in both masks and in either.

    Args:
        found: bool [h, w]; None, where an answer has no mask, counts as an empty one.
        right: uint8 or bool [h, w]; pixels of IGNORED count nowhere.
    """
    judged = right != IGNORED if right.dtype != bool else np.ones_like(right)
    wanted = (right > 0) & judged
    got = np.zeros_like(wanted) if found is None else found & judged
    return int((got & wanted).sum()), int((got | wanted).sum())


def mean_iou(counts: Sequence[tuple[int, int]]) -> float:
    """Of (both, either) of each mask; 1 where there is nothing to find and nothing was found."""
    return float(np.mean([both / (either + _EPS) if either else 1.0 for both, either in counts]))


def ciou(counts: Sequence[tuple[int, int]]) -> float:
    """All pixels in both over all in either: large masks weigh more."""
    either = sum(e for _, e in counts)
    return sum(b for b, _ in counts) / either if either else 1.0


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Of boxes (x0, y0, x1, y1)."""
    both, either, _ = _areas(a, b)
    return both / either if either > 0 else 0.0


def box_giou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU less the share of the box around both that neither covers: from -1 to 1."""
    both, either, around = _areas(a, b)
    return both / either - (around - either) / around if either > 0 else -1.0


def _areas(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Of both boxes' common part, of what either covers, and of the box around them."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0, 0.0) * max(y1 - y0, 0.0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    around = area(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    return both, area(*a) + area(*b) - both, around


def span_iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Of spans of a clip."""
    both = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    either = (a[1] - a[0]) + (b[1] - b[0]) - both
    return both / either if either > 0 else 0.0
