"""ADE20K, label map to image: draw what a label map shows, and have a fixed segmenter compare.

    ADEChallengeData2016/, or its content: annotations/validation/*.png, 0 for no class and 1 to 150;
    annotations_with_color/validation/*.png, what the model is shown; made where it is not there, see
    :func:`coloured`;
    validation.json, a list of {"image_id", "caption"}, for MM-Interleaved's prompt alone

Needs label maps of the pictures that were drawn, from a segmenter that never changes (MM-Interleaved has
OneFormer, DiNAT-L, trained on ADE20K): either in a folder `predictions`, "<id>.png" each with classes 0 to
149 as segmenters count them, or from a function `segmenter` of yours. A picture is to be brought to the size
of its label map (bicubic) before it is segmented. Without either, figures are null.

`miou`, the headline, is MM-Interleaved's: classes that are nowhere, in labels or predictions, count as 0.
`miou_present` leaves them out, `classes_present` says how many are left. A reply without a picture counts as
one in which nothing was found. Pixels without a class are judged nowhere.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image

from umm_jax.conversation import Image, ImageData, Text
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import verdicts
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, user
from umm_jax.evaluate.measures import regions
from umm_jax.evaluate.source import Embedded, Source, take

CLASSES = 150
PROMPTS = {"plain": "draw the photograph this is the label map of", "mm_interleaved": "{caption}."}
_LEVELS, _STEP = 6, 42  # of each colour channel: 6 ** 3 colours are enough for 150 classes, 256 // 6 apart
_NONE = (
    "no label maps: set `predictions`, a folder of a segmenter's <id>.png, or `segmenter`, module:function"
)


@dataclass(frozen=True)
class Settings:
    """What is asked, and who looks at the pictures.

    Attributes:
        prompt: what is said after the label map, see PROMPTS; "mm_interleaved" needs validation.json.
        predictions: a folder of label maps; a relative one is below the folder of the annotations.
        segmenter: "module:function", called as f(picture uint8[h, w, 3]) -> int[h, w] of 0 to 149.
        judge: names the segmenter of `predictions`: figures of two are not compared.
    """

    prompt: Literal["plain", "mm_interleaved"] = "plain"
    predictions: str = ""
    segmenter: str = ""
    judge: str = "oneformer-dinat-l"

    def __post_init__(self):
        if self.predictions and self.segmenter:
            raise ConfigError("predictions and segmenter: one of the two")
        if self.segmenter and not all(self.segmenter.partition(":")):
            raise ConfigError(f"segmenter must be module:function, it is {self.segmenter!r}")


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    base = "ADEChallengeData2016/" if (source.root / "ADEChallengeData2016").is_dir() else ""
    for id, words in _asked(source, base, settings):
        labels = f"{base}annotations/validation/{id}.png"
        source.bytes(labels)  # so that its content is in the digest; it is read again when marked
        yield Doc(
            id,
            (user(Image("labels"), Text(words)),),
            {"labels": _shown(source, f"{base}annotations_with_color/validation/{id}.png", labels)},
            target={
                "labels": source.root / labels,
                "predicted": source.root / settings.predictions / f"{id}.png"
                if settings.predictions
                else None,
            },
        )


def _asked(source: Source, base: str, settings: Settings) -> Iterator[tuple[str, str]]:
    words = PROMPTS[settings.prompt]
    if settings.prompt == "mm_interleaved":
        name = f"{base}validation.json"
        for entry in source.json(name):
            caption = take(entry, "caption", name, str)
            yield str(take(entry, "image_id", name)), words.replace("{caption}", caption)
        return
    folder = source.path(f"{base}annotations/validation")
    found = sorted(path.stem for path in folder.glob("*.png"))
    if not found:
        raise DataError(f"{folder}: holds no .png")
    yield from ((id, words) for id in found)


def coloured(labels: np.ndarray) -> np.ndarray:
    """The label map that a model is shown, uint8[h, w, 3] of int[h, w] from 0 to 150.

    Black where there is no class. Of class c, red, green and blue are 255 less 42 times the digits of c - 1
    in base 6. It is the palette of Painter, which MM-Interleaved took over.
    """
    k = np.arange(CLASSES)
    digits = np.stack([k // _LEVELS**2, k // _LEVELS % _LEVELS, k % _LEVELS], axis=1)
    palette = np.concatenate([np.zeros((1, 3), int), 255 - _STEP * digits]).astype(np.uint8)
    return palette[labels]


def _shown(source: Source, name: str, labels: str) -> Path | Embedded:
    """The coloured map, of the release or made of its labels."""
    if (source.root / name).exists():
        return source.picture(name)

    def read() -> bytes:
        try:
            return ImageData.from_array(coloured(_map(source.root / labels))).data
        except (DataError, IndexError) as error:
            raise OSError(str(error)) from None

    return Embedded(f"{labels}, coloured", read)


def _map(path: Path) -> np.ndarray:
    try:
        with PIL.Image.open(path) as image:
            if image.mode not in ("L", "P", "I", "I;16"):
                raise DataError(f"{path}: a label map has one channel of classes, this is {image.mode}")
            return np.array(image).astype(np.int64)
    except OSError as error:
        raise DataError(f"{path}: the label map cannot be read: {error}") from None


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    if not settings.predictions and not settings.segmenter:
        return Marks({}, "" if response.pictures else "no picture")
    labels = _map(doc.target["labels"])
    if labels.max(initial=0) > CLASSES:
        raise DataError(f"{doc.target['labels']}: holds {labels.max()}; classes go from 1 to {CLASSES}")
    invalid, predicted = "no picture", np.zeros_like(labels)
    if pictures := response.pictures:
        invalid, predicted = "", _predicted(doc, pictures[0], labels.shape, settings) + 1
    counts = regions.class_counts(predicted, labels, CLASSES)
    return Marks({}, invalid, {"classes": counts, "judge": settings.segmenter or settings.judge})


def _predicted(doc: Doc, picture: ImageData, size: tuple[int, int], settings: Settings) -> np.ndarray:
    if path := doc.target["predicted"]:
        found, where = _map(path), str(path)
    else:
        shown = picture.picture().resize(size[::-1])
        found, where = np.asarray(_function(settings.segmenter)(np.array(shown))), settings.segmenter
    if found.shape != size or not np.issubdtype(found.dtype, np.integer):
        raise DataError(
            f"{where}: {found.dtype}{list(found.shape)} for doc {doc.id}, whose label map is {list(size)}: "
            "bring pictures to the size of their label maps before they are segmented"
        )
    return found.astype(np.int64)


@cache
def _function(name: str) -> Callable[[np.ndarray], np.ndarray]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"segmenter {name}: {error}") from None


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    n, invalid = len(records), sum(bool(r.marks.invalid) for r in records)
    counts = [r.marks.parts["classes"] for r in records if "classes" in r.marks.parts]
    names = ("miou", "miou_present", "classes_present")
    if not counts:
        return {name: Score(None, None, n, invalid, _NONE if records else "no doc") for name in names}
    found = regions.class_iou(counts, CLASSES)
    some = found.mean_present
    return {
        "miou": Score(100 * found.mean, None, n, invalid),
        "miou_present": Score(
            None if some is None else 100 * some, None, n, invalid, "" if found.present else "no class"
        ),
        "classes_present": Score(float(found.present), None, n, invalid),
    }


TASK = Task(
    "ade20k",
    docs,
    mark,
    "miou",
    total,
    Settings,
    files="label maps are published as ADEChallengeData2016 at groups.csail.mit.edu/vision/datasets/ADE20K",
    reply={"mode": "image"},
    prompt=str(PROMPTS),
    post="the first picture at the label map's size",
    cost="B",
    judging=("predictions", "segmenter", "judge"),
    export=verdicts.export,
)
