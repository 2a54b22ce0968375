"""Measures of masks, boxes, spans and label maps.

Masks. LISA (arXiv 2308.00692) calls the mean of :func:`giou` over masks gIoU; that figure is giou_mean here,
since the generalised IoU of boxes, another thing, has that name too. LISA's evaluator takes the mean over the
masks of an image first, and then weighs every image by its number of masks: that is the mean over all masks.
cIoU, or overall IoU, adds up all pixels first.

Boxes are (x0, y0, x1, y1), edges and not pixels: a box is x1 - x0 wide, nothing is added for a last pixel. So
COCO's [x, y, width, height] has x1 = x + width.

Label maps. `class_iou` is the mean over classes of pixels in both over pixels in either, of a whole data set.

Sources: the evaluators of LISA and LAVT for masks, of MM-Interleaved and Qwen-VL (torchvision's areas) for
boxes, of MM-Interleaved for label maps.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from umm_jax.evaluate.measures import groups

IGNORED = 255  # in masks: pixels that nobody judges
_EPS = 1e-5  # in each mask's IoU, as LISA has it
_EPS_CLASS = 1e-10  # in each class's

Counts = tuple[int, int]  # pixels in both masks, and in either


# --- masks --------------------------------------------------------------------------------------------


def mask_counts(found: np.ndarray | None, right: np.ndarray) -> Counts:
    """Pixels in both masks and in either.

    Args:
        found: bool[h, w]; None, where a reply has no mask, counts as an empty one.
        right: bool[h, w], or uint8[h, w]: pixels of IGNORED count nowhere, all others but 0 are in.
    """
    judged = right != IGNORED if right.dtype != bool else np.ones_like(right)
    wanted = (right != 0) & judged
    got = np.zeros_like(wanted) if found is None else found & judged
    return int((got & wanted).sum()), int((got | wanted).sum())


def iou(counts: Counts) -> float:
    """Both over either; 0 where both masks are empty, as LAVT has it."""
    both, either = counts
    return both / either if either else 0.0


def giou(counts: Counts) -> float:
    """One mask's IoU as LISA has it: both / (either + 1e-5), and 1 where both masks are empty."""
    both, either = counts
    return both / (either + _EPS) if either else 1.0


def means_of_images(values: Iterable[tuple[Hashable, float]]) -> list[float]:
    """The mean over each image's masks, of (image, value) of each mask."""
    return [math.fsum(masks) / len(masks) for masks in groups.together(values).values()]


def ciou(counts: Iterable[Counts]) -> float | None:
    """All pixels in both over all in either: large masks weigh more. None where there are no pixels."""
    counts = list(counts)
    either = sum(e for _, e in counts)
    return sum(b for b, _ in counts) / either if either else None


def reaches(overlap: float, thresholds: Sequence[float]) -> dict[float, float]:
    """{threshold: 1 where the IoU is at least that, else 0}; means of these are precisions at thresholds."""
    return {threshold: float(overlap >= threshold) for threshold in thresholds}


# --- boxes --------------------------------------------------------------------------------------------


def degenerate(box: Sequence[float]) -> bool:
    """Whether a box has no area, or its corners the wrong way round."""
    return not (box[0] < box[2] and box[1] < box[3])


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of boxes (x0, y0, x1, y1), 0..1.

    Boxes are taken as they are: corners in the wrong order are not exchanged, such a box overlaps nothing;
    and none is cut to its picture, so that what lies outside counts as too much.
    """
    if degenerate(a) or degenerate(b):
        return 0.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def box_giou(a: Sequence[float], b: Sequence[float]) -> float:
    """Generalised IoU (arXiv 1902.09630): IoU less the share of the box around both that neither covers.

    From -1 to 1; -1 where there is nothing around both.
    """
    width, height = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    around, overlap = max(width, 0.0) * max(height, 0.0), box_iou(a, b)
    if not around:
        return -1.0
    areas = [0.0 if degenerate(c) else (c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    # Of areas A and B with IoU v, either is (A + B) / (1 + v).
    return overlap - 1 + sum(areas) / (1 + overlap) / around


def span_iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Of spans of a clip."""
    both = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    either = (a[1] - a[0]) + (b[1] - b[0]) - both
    return both / either if either > 0 else 0.0


# --- label maps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassIou:
    """Of a whole data set.

    Attributes:
        mean: over all classes, those that are nowhere counting as 0, as the official evaluator has it.
        mean_present: over classes that are somewhere, in labels or predictions; None where there is none.
        present: how many those are.
    """

    mean: float
    mean_present: float | None
    present: int


def class_counts(found: np.ndarray, right: np.ndarray, classes: int) -> dict[int, Counts]:
    """{class: pixels in both, in either} of the classes that are there.

    Args:
        found, right: int[h, w] of 1 to `classes`. Pixels that are 0 in `right` are judged nowhere; other
            values of `found` are in no class.
    """
    judged = right > 0
    found, right = found[judged].astype(np.int64), right[judged].astype(np.int64)
    found = np.where((found > 0) & (found <= classes), found, 0)

    def pixels(labels: np.ndarray) -> np.ndarray:
        return np.bincount(labels, minlength=classes + 1)

    both = pixels(right[found == right])
    either = pixels(found) + pixels(right) - both
    return {c: (int(both[c]), int(either[c])) for c in range(1, classes + 1) if either[c]}


def class_iou(counts: Iterable[Mapping[int, Counts]], classes: int) -> ClassIou:
    """Mean IoU over classes, of the counts of each label map: mean over c of both_c / (either_c + 1e-10)."""
    both, either = np.zeros(classes + 1, np.int64), np.zeros(classes + 1, np.int64)
    for one in counts:
        for label, (b, e) in one.items():
            both[label] += b
            either[label] += e
    each = (both / (either + _EPS_CLASS))[1:]
    present = either[1:] > 0
    some = float(each[present].mean()) if present.any() else None
    return ClassIou(float(each.mean()), some, int(present.sum()))
