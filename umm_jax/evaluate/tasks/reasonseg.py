"""ReasonSeg: segment what an expression implies rather than names.

    val/, test/, train/: for each picture x.jpg a file x.json of {"text": [...], "is_sentence": true,
    "shapes": [{"label": "target", "points": [[x, y], ...]}, ...]}, in UTF-8 or else in cp1252

A mask is drawn from the shapes, the largest first, so that small ones lie on top: what is labelled "ignore"
is judged nowhere, "flag" is left out (an annotation given up), all else is wanted. Shapes are filled as
OpenCV fills them (``measures/polygons.py``). Of several expressions the first is asked, as LISA's evaluator
does; a doc's id is the name of its file.

`giou_mean`, the headline, is LISA's gIoU. A reply without a mask counts as one with an empty mask, and as
wrong even where nothing was to be found. Figures are also split into `query=sentence` and `query=phrase`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image

from umm_jax.conversation import Image, Text
from umm_jax.data.regions import is_number
from umm_jax.errors import DataError
from umm_jax.evaluate import masks
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, mean, user
from umm_jax.evaluate.measures import polygons, regions
from umm_jax.evaluate.source import Source, take

PROMPTS = {
    "plain": {"sentence": "{text} Segment it.", "phrase": "segment {text}"},
    "lisa": {
        "sentence": "{text} Please output segmentation mask.",
        "phrase": "What is {text} in this image? Please output segmentation mask.",
    },
}
_SIDEWAYS = (5, 6, 7, 8)  # EXIF's orientations that exchange width and height


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        split: folder of the release. prompt: the words around an expression, see PROMPTS.
        masks: which of a reply's masks counts: its first, or all of them together.
    """

    split: str = "val"
    prompt: Literal["plain", "lisa"] = "plain"
    masks: Literal["first", "union"] = "first"


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    folder = source.path(settings.split)
    names = sorted(path.stem for path in folder.glob("*.json"))
    if not names:
        raise DataError(f"{folder}: holds no .json; each picture's annotation lies beside it")
    for stem in names:
        name = f"{settings.split}/{stem}.json"
        entry = _read(source, name)
        texts = take(entry, "text", name, list)
        if not texts or not isinstance(texts[0], str):
            raise DataError(f"{name}: 'text' must be a list of expressions, it is {str(texts)[:80]}")
        query = "sentence" if take(entry, "is_sentence", name, (bool, int)) else "phrase"
        words = PROMPTS[settings.prompt][query].replace("{text}", texts[0].strip())
        yield Doc(
            stem,
            (user(Image("image"), Text(words)),),
            {"image": source.path(f"{settings.split}/{stem}.jpg")},
            target=_shapes(entry, name),
            group={"query": query},
        )


def _read(source: Source, name: str) -> Any:
    data = source.bytes(name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError as error:
            raise DataError(f"{source.path(name)}: neither UTF-8 nor cp1252: {error.reason}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{source.path(name)}: damaged: {error}") from None


def _shapes(entry: Any, name: str) -> list[tuple[str, list]]:
    found = []
    for shape in take(entry, "shapes", name, list):
        label, points = take(shape, "label", name, str), take(shape, "points", name, list)
        if label.lower() == "flag":
            continue
        if not points or not all(_point(point) for point in points):
            raise DataError(f"{name}: 'points' must be pairs of numbers, they are {str(points)[:80]}")
        found.append((label, points))
    return found


def _point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_number(v) for v in value)


def drawn(shapes: Sequence[tuple[str, list]], size: tuple[int, int]) -> np.ndarray:
    """uint8[h, w] of (label, points): 1 where wanted, ``regions.IGNORED`` where not judged, else 0."""
    masks = [polygons.fill(points, size) for _, points in shapes]
    found = np.zeros(size, np.uint8)
    # Of shapes of one size the later is drawn first; LISA's script leaves that to an unstable sort.
    for k in sorted(range(len(masks)), key=lambda k: masks[k].sum())[::-1]:
        found[masks[k]] = regions.IGNORED if "ignore" in shapes[k][0].lower() else 1
    return found


def _size(path: Path) -> tuple[int, int]:
    """(h, w) of a picture as it is shown: its orientation counts."""
    try:
        with PIL.Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(0x0112, 1) in _SIDEWAYS
    except OSError as error:
        raise DataError(f"{path}: the size of the picture cannot be read: {error}") from None
    return (width, height) if sideways else (height, width)


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    right = drawn(doc.target, _size(doc.images["image"]))
    mask, invalid = masks.found(response, right.shape, settings.masks)
    counts = regions.mask_counts(mask, right)
    return Marks(
        {"giou_mean": 0.0 if invalid else regions.giou(counts)},
        invalid,
        {"both": counts[0], "either": counts[1]},
    )


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    found = {"giou_mean": mean(records, "giou_mean"), "ciou": masks.overall(records)}
    for query in ("sentence", "phrase"):
        if of := [r for r in records if r.doc.group["query"] == query]:
            found[f"giou_mean/query={query}"] = mean(of, "giou_mean")
            found[f"ciou/query={query}"] = masks.overall(of)
    return found


TASK = Task(
    "reasonseg",
    docs,
    mark,
    "giou_mean",
    total,
    Settings,
    files="published with LISA (dvlab-research/LISA), pictures and annotations side by side",
    reply={"mode": "auto", "max_tokens": 64},
    prompt=str(PROMPTS),
    post="the reply's mask at the picture's size",
)
