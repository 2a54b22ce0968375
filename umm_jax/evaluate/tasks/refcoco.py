"""RefCOCO, RefCOCO+, RefCOCOg: point to what an expression means, with a box (-rec) or a mask (-res).

    refcoco_val.jsonl, refcoco+_testA.jsonl, refcocog_test.jsonl ...: lines of {"image", "width", "height",
    "bbox": [x0, y0, x1, y1] in pixels, "expression" or "sent"}; boxes alone
    refs(unc).json, instances.json, or below refcoco/, refcoco+/, refcocog/: the release's, refs as JSON; both

The release has its refs in pickles, refs(unc).p, which would run code when read: they are refused. Every
expression is a doc; its id is the entry's number, from 0, or the release's `sent_id`.

Names differ: what the suite lmms-eval calls `refcoco_bbox` is captioning of regions; its `refcoco_bbox_rec`
and `refcoco_grounding` are what is here.

Boxes. The first box of a reply is scored, and nothing is mended: corners in the wrong order are not
exchanged, and a box is not cut to the picture, as in the official evaluators. `degenerate_box` and
`out_of_range_box` say how many such there are, for a wrong unit shows there. `oracle_best_box_acc@0.5` has
the right answer choose among a reply's boxes, as `refcoco_grounding` does (which also tries two units): it is
no accuracy of a model.

Masks. `ciou`, the headline, adds up pixels; `mean_iou` and `precision@` are LAVT's, `giou_mean` is LISA's;
`giou_mean_of_images` gives every picture the same weight. A reply without a mask counts as one with an empty
mask. Polygons and run lengths become masks as with the REFER tools.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from umm_jax.conversation import Image, Text
from umm_jax.data.entries import extra
from umm_jax.data.regions import is_number
from umm_jax.errors import DataError
from umm_jax.evaluate import masks
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, mean, means, of_values, user
from umm_jax.evaluate.measures import boxes, regions, rle
from umm_jax.evaluate.source import Source, take

LOCATE = {
    "plain": "where is {expression}",
    "mm_interleaved": (
        "Provide the bounding box coordinate of the region this sentence describes. {expression}"
    ),
}
SEGMENT = {
    "plain": "segment {expression}",
    "lisa": "What is {expression} in this image? Please output segmentation mask.",
}
BOX_AT = (0.5, 0.7, 0.9)
MASK_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
UNITS = {"pixels": None, "fractions": 1, "thousandths": 1000}
# Who split the pictures, where a release holds several; these are what figures are reported on.
SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}


@dataclass(frozen=True)
class Locating:
    """What is asked, and how boxes are read.

    Attributes:
        split: val, testA, testB, or test of RefCOCOg.
        split_by: whose splits; "" is what SPLIT_BY has for the set.
        prompt: the words around an expression, see LOCATE.
        boxes: "parts" takes the reply's boxes; the others read its text, see ``measures/boxes.py``.
        unit: of a "list".
        target: "mm_interleaved" cuts the right box down to steps of 1/999 before it is compared, as that
            release does; for comparing with its figures alone.
    """

    split: str = "val"
    split_by: str = ""
    prompt: Literal["plain", "mm_interleaved"] = "plain"
    boxes: Literal["parts", "mm_interleaved", "qwen_vl", "list"] = "parts"
    unit: Literal["pixels", "fractions", "thousandths"] = "pixels"
    target: Literal["exact", "mm_interleaved"] = "exact"


@dataclass(frozen=True)
class Segmenting:
    """What is asked, and what the right mask is.

    Attributes:
        split, split_by: as for boxes. prompt: the words around an expression, see SEGMENT.
        masks: which of a reply's masks counts: its first, or all of them together.
        overlaps: pixels that lie in two polygons of one object; LAVT and LISA count them as background.
    """

    split: str = "val"
    split_by: str = ""
    prompt: Literal["plain", "lisa"] = "plain"
    masks: Literal["first", "union"] = "first"
    overlaps: Literal["background", "inside"] = "background"


# --- annotations ------------------------------------------------------------------------------------------


def _table(source: Source, name: str, asked: Callable[[str], str], settings: Locating) -> Iterator[Doc]:
    """Docs of a table of boxes."""
    file = f"{name}_{settings.split}.jsonl"
    for number, entry in enumerate(source.lines(file, f"{name}/{file}")):
        where = f"{file}, entry {number}"
        key = "expression" if isinstance(entry, dict) and "expression" in entry else "sent"
        image = take(entry, "image", where, str)
        box = take(entry, "bbox", where, list)
        size = _size(entry, where)
        if len(box) != 4 or not all(is_number(v) for v in box) or regions.degenerate(box):
            raise DataError(
                f"{where}: 'bbox' must be two corners, x0 < x1 and y0 < y1 in pixels; it is {box}"
            )
        shown = {"image": source.picture(image, f"train2014/{image.rpartition('/')[2]}")}
        turns = (user(Image("image"), Text(asked(take(entry, key, where, str)))),)
        yield Doc(str(number), turns, shown, target={"box": tuple(box), "size": size})


def _refs(source: Source, name: str, asked: Callable[[str], str], settings, masks: bool) -> Iterator[Doc]:
    """Docs of the release."""
    file = _refs_file(name, settings)
    _no_pickle(source, name, file)
    refs = source.json(file, f"{name}/{file}")
    instances = source.json("instances.json", f"{name}/instances.json")
    objects = {
        take(a, "id", "instances.json"): a for a in take(instances, "annotations", "instances.json", list)
    }
    images = {take(i, "id", "instances.json"): i for i in take(instances, "images", "instances.json", list)}
    for ref in refs:
        if not in_split(take(ref, "split", file, str), settings.split):
            continue
        where = f"{file}, ref {take(ref, 'ref_id', file)}"
        image = _known(images, take(ref, "image_id", where), where, "image")
        one = _known(objects, take(ref, "ann_id", where), where, "annotation")
        target = {"size": _size(image, where), "image": str(ref["image_id"])}
        if masks:
            target["segmentation"] = _segmentation(one, target["size"], where)
        else:
            target["box"] = _corners(take(one, "bbox", where, list), where)
        picture = take(image, "file_name", where, str)
        shown = {"image": source.picture(f"train2014/{picture}", f"images/mscoco/images/train2014/{picture}")}
        for sentence in take(ref, "sentences", where, list):
            turns = (user(Image("image"), Text(asked(take(sentence, "sent", where, str)))),)
            yield Doc(str(take(sentence, "sent_id", where)), turns, shown, target=target)


def in_split(of: str, wanted: str) -> bool:
    """Whether a ref is of a split, as the REFER tools have it: "testAB" is of testA, testB and test."""
    if wanted in ("testA", "testB", "testC"):
        return wanted[-1] in of
    return "test" in of if wanted == "test" else of == wanted


def _refs_file(name: str, settings) -> str:
    return f"refs({settings.split_by or SPLIT_BY[name]}).json"


def _there(source: Source, name: str, *files: str) -> bool:
    """Whether one of these is in the folder, or below the data set's own."""
    return any((source.root / place / file).exists() for file in files for place in ("", name))


def _no_pickle(source: Source, name: str, file: str) -> None:
    pickled = file.replace(".json", ".p")
    if _there(source, name, pickled) and not _there(source, name, file):
        raise DataError(
            f"{source.path(pickled, f'{name}/{pickled}')}: pickles run code when they are read, so they are "
            f"not; for boxes take a table {name}_<split>.jsonl of image, width, height, bbox and expression, "
            f"for masks the same refs written as {file}"
        )


def _known(entries: dict, id: Any, where: str, what: str) -> Any:
    if id not in entries:
        raise DataError(f"{where}: instances.json has no {what} {id}: it is of another data set")
    return entries[id]


def _size(entry: Any, where: str) -> tuple[int, int]:
    """(h, w)"""
    size = take(entry, "height", where, int), take(entry, "width", where, int)
    if min(size) < 1:
        raise DataError(f"{where}: a picture of {size[1]} x {size[0]} pixels")
    return size


def _corners(box: list, where: str) -> boxes.Box:
    if len(box) != 4 or not all(is_number(v) for v in box) or min(box[2:]) <= 0:
        raise DataError(f"{where}: 'bbox' must be [x, y, width, height] in pixels; it is {box}")
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _segmentation(entry: Any, size: tuple[int, int], where: str) -> list:
    """Polygons, or run lengths of this size."""
    value = take(entry, "segmentation", where, (list, dict))
    several = [value] if isinstance(value, dict) else value
    for one in several:
        if isinstance(one, dict):
            if take(one, "size", where, list) != list(size):
                raise DataError(f"{where}: a mask of {one['size']} in a picture of {list(size)}")
            rle.decode(one, where)
        elif not isinstance(one, list) or len(one) < 4 or len(one) % 2 or not all(is_number(v) for v in one):
            raise DataError(f"{where}: a polygon must be x0, y0, x1, y1, ...; it is {str(one)[:80]}")
    return several


def right_mask(segmentation: list, size: tuple[int, int], overlaps: str = "background") -> np.ndarray:
    """bool[h, w] of polygons or run lengths, as the REFER tools decode them.

    Raises:
        ConfigError: pycocotools is not installed, and there are polygons.
        DataError: they cannot be read.
    """
    if not segmentation:
        return np.zeros(size, bool)
    if isinstance(segmentation[0], dict):
        layers = [rle.decode(one, "an annotation") for one in segmentation]
    else:
        coco = extra("pycocotools.mask", "masks of RefCOCO", "pycocotools", "eval")
        try:
            decoded = coco.decode(coco.frPyObjects(segmentation, *size))
        except Exception as error:  # it raises no kind of its own
            raise DataError(f"polygons that cannot be read ({error}): {str(segmentation)[:80]}") from None
        layers = list(np.moveaxis(decoded, 2, 0))
    covered = np.sum(layers, axis=0, dtype=np.int64)
    return covered == 1 if overlaps == "background" else covered > 0


# --- boxes ------------------------------------------------------------------------------------------------


def _locating(name: str, source: Source, settings: Locating) -> Iterator[Doc]:
    def asked(expression: str) -> str:
        return LOCATE[settings.prompt].replace("{expression}", expression)

    refs, table = _refs_file(name, settings), f"{name}_{settings.split}.jsonl"
    if not _there(source, name, table) and _there(source, name, refs, refs.replace(".json", ".p")):
        return _refs(source, name, asked, settings, masks=False)
    return _table(source, name, asked, settings)


def read_boxes(response: Response, size: tuple[int, int], settings: Locating) -> list[boxes.Box | None]:
    """A reply's boxes in pixels of a picture of `size` (h, w), in order; None where one cannot be read."""
    if settings.boxes == "parts":
        found, steps = [boxes.numbers(box.xyxy) for box in response.boxes], 1
    else:
        found = boxes.read(response.text, settings.boxes)
        steps = UNITS[settings.unit] if settings.boxes == "list" else boxes.GRID
    if steps is None:
        return found
    height, width = size
    return [box and boxes.scaled(box, width / steps, height / steps) for box in found]


def _mark_box(doc: Doc, response: Response, settings: Locating) -> Marks:
    right, size = doc.target["box"], doc.target["size"]
    if settings.target == "mm_interleaved":
        right = boxes.on_grid(right, size)
    found = read_boxes(response, size, settings)
    first = found[0] if found else None
    overlap = regions.box_iou(first, right) if first else 0.0
    best = max((regions.box_iou(box, right) for box in found if box), default=0.0)
    values = {f"acc@{at}": hit for at, hit in regions.reaches(overlap, BOX_AT).items()}
    values |= {
        "mean_iou": overlap,
        "oracle_best_box_acc@0.5": float(best >= 0.5),
        "degenerate_box": float(first is not None and regions.degenerate(first)),
        "out_of_range_box": float(first is not None and _outside(first, size)),
    }
    return Marks(values, "" if first else "no box" if not found else "first box unreadable")


def _outside(box: boxes.Box, size: tuple[int, int]) -> bool:
    """By more than a pixel: models that count pixels may name the one after the last."""
    height, width = size
    return min(box) < -1 or max(box[0], box[2]) > width + 1 or max(box[1], box[3]) > height + 1


_BOX_FIGURES = (
    *(f"acc@{at}" for at in BOX_AT),
    *("mean_iou", "oracle_best_box_acc@0.5", "degenerate_box", "out_of_range_box"),
)


# --- masks ------------------------------------------------------------------------------------------------


def _segmenting(name: str, source: Source, settings: Segmenting) -> Iterator[Doc]:
    def asked(expression: str) -> str:
        return SEGMENT[settings.prompt].replace("{expression}", expression)

    yield from _refs(source, name, asked, settings, masks=True)


def _mark_mask(doc: Doc, response: Response, settings: Segmenting) -> Marks:
    right = right_mask(doc.target["segmentation"], doc.target["size"], settings.overlaps)
    mask, invalid = masks.found(response, right.shape, settings.masks)
    counts = regions.mask_counts(mask, right)
    overlap = regions.iou(counts)
    values = {"mean_iou": overlap, "giou_mean": 0.0 if invalid else regions.giou(counts)}
    values |= {f"precision@{at}": hit for at, hit in regions.reaches(overlap, MASK_AT).items()}
    return Marks(values, invalid, {"both": counts[0], "either": counts[1]})


def _total_masks(records: Sequence[Record], settings: Segmenting) -> dict[str, Score]:
    names = ("mean_iou", "giou_mean", *(f"precision@{at}" for at in MASK_AT))
    found = {"ciou": masks.overall(records)} | {name: mean(records, name) for name in names}
    values = [(r.doc.target["image"], r.marks.values["giou_mean"]) for r in records]
    each = of_values(regions.means_of_images(values), 100, found["ciou"].n_invalid)
    return found | {"giou_mean_of_images": replace(each, n=len(records))}


# --- tasks ------------------------------------------------------------------------------------------------

_FILES = (
    "refs and instances are published with the REFER tools (lichengunc/refer), tables of boxes with "
    "Qwen-VL's evaluation, pictures (train2014) at cocodataset.org"
)
TASKS = [
    Task(
        f"{name}-rec",
        partial(_locating, name),
        _mark_box,
        "acc@0.5",
        means(*_BOX_FIGURES),
        Locating,
        files=_FILES,
        reply={"mode": "text", "max_tokens": 64},
        prompt=str(LOCATE),
        post="the first box",
    )
    for name in SPLIT_BY
] + [
    Task(
        f"{name}-res",
        partial(_segmenting, name),
        _mark_mask,
        "ciou",
        _total_masks,
        Segmenting,
        files=_FILES,
        reply={"mode": "auto", "max_tokens": 64},
        prompt=str(SEGMENT),
        post="the reply's mask at the picture's size",
    )
    for name in SPLIT_BY
]
