"""RefCOCO, RefCOCO+, RefCOCOg: objects of COCO's pictures that an expression singles out.

    parquet or jsonl, a row an object: image {"bytes": ...} or a name, answer ["the left zebra", ...],
    bbox [x, y, width, height] in pixels, segmentation [x0, y0, x1, y1, ...] or a list of such polygons

The release itself is in pickles (refs(unc).p), which would run code when read: they are refused by design,
and one of the published tables is to be taken. A mask is the union of its polygons.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from umm_jax.conversation import Box
from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, want, want_strings
from umm_jax.data.quarantine import LeftOut, Rejected
from umm_jax.data.regions import is_number, mask, polygons
from umm_jax.errors import ConfigError, DataError

VERSION = 1
LICENSE = ""
_PICKLES = (".p", ".pkl", ".pickle")


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        form: "locate" answers with a box, "segment" with a mask, "both" asks for one after the other.
        locate, segment: what the user says; {expression} is one of the object's, drawn.
    """

    form: Literal["locate", "segment", "both"] = "locate"
    locate: str = "where is {expression}"
    segment: str = "segment {expression}"

    def __post_init__(self):
        for name in ("locate", "segment"):
            if "{expression}" not in getattr(self, name):
                raise ConfigError(f"{name} must hold {{expression}}, it is {getattr(self, name)!r}")


def entries(path: Path, settings: Settings) -> Entries:
    files = [path] if path.is_file() else list(path.iterdir()) if path.is_dir() else []
    if files and all(file.suffix in _PICKLES for file in files):
        raise DataError(
            f"{path}: pickles run code when they are read, so they are not; take a table of RefCOCO in "
            "parquet"
        )
    return Entries(path, ("*.parquet", "*.jsonl"))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """One object, called by one of its expressions."""
    expressions = [text for text in want_strings(entry, "answer") if text.strip()]
    if not expressions:
        raise LeftOut("objects without an expression")
    expression = expressions[rng.integers(len(expressions))].strip()
    picture = draft.image(want(entry, "image", (str, bytes, dict)))
    size = draft.size(picture)
    answers = []
    if settings.form != "segment":
        box = Box(picture.ref, _fractions(want(entry, "bbox", list), size), expression)
        answers.append(("locate", settings.locate, box))
    if settings.form != "locate":
        region = mask(picture.ref, polygons(want(entry, "segmentation", list)), size, expression)
        answers.append(("segment", settings.segment, region))
    for k, (op, words, answer) in enumerate(answers):
        asked = words.replace("{expression}", expression)
        shown = () if k == 0 else (0,)
        request = draft.turn("user", *([picture] if k == 0 else []), asked, depends_on=shown)
        draft.turn("assistant", answer, op=op, depends_on=(*shown, request))


def _fractions(box: list, size: tuple[int, int]) -> tuple[float, float, float, float]:
    if len(box) != 4 or not all(is_number(value) for value in box):
        raise Rejected("field of another type", f"'bbox' must be four numbers, got {box}")
    x, y, width, height = box
    edges = (x, y, x + width, y + height)
    sides = (*size, *size)
    # Annotated edges may lie on the far side of the last pixel, not further.
    if not all(-1 <= edge <= side + 1 for edge, side in zip(edges, sides)) or width <= 0 or height <= 0:
        raise Rejected("box outside the picture", f"{box} in a picture of {size[0]} x {size[1]}")
    return tuple(min(max(edge / side, 0.0), 1.0) for edge, side in zip(edges, sides))
