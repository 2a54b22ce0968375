"""ReasonSeg: regions that a question describes without naming them (LISA, arXiv 2308.00692).

    NAME.jpg beside NAME.json: {"text": ["the part that keeps the rain off"], "is_sentence": true,
     "shapes": [{"label": "target", "points": [[x, y], ...]}, {"label": "ignore", "points": [...]}]}

The answer is the union of the target polygons. Polygons to ignore are taken out of it: no model is asked for
what the annotators would not decide.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.conversation import Mask
from umm_jax.data.entries import Entry, find_files, parse
from umm_jax.data.importing import Draft, want, want_strings
from umm_jax.data.quarantine import Rejected
from umm_jax.data.regions import mask, polygons
from umm_jax.errors import ConfigError

VERSION = 1
LICENSE = ""


@dataclass(frozen=True)
class Settings:
    """What the user says.

    Attributes:
        request: the words; {query} is one of the picture's questions, drawn.
        ending: of the picture's name, beside the annotation's.
    """

    request: str = "{query}"
    ending: str = ".jpg"

    def __post_init__(self):
        if "{query}" not in self.request:
            raise ConfigError(f"request must hold {{query}}, it is {self.request!r}")


class Annotations(Sequence):
    """One entry a file; its value has the file's name as "name"."""

    def __init__(self, path: Path):
        self._files = find_files(path, ("*.json",))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Entry:
        return _File(self._files[index], "file", index, self._files[index].read_bytes())

    def digest(self) -> str:
        facts = [[file.name, file.stat().st_size] for file in self._files]
        return f"{len(facts)} files, {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


class _File(Entry):
    def value(self, python: bool = False) -> Mapping[str, Any]:
        return {"annotation": parse(self.raw), "name": self.file.stem}


def entries(path: Path, settings: Settings) -> Annotations:
    return Annotations(path)


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """One question and the region it means."""
    found = want(entry, "annotation", dict)
    queries = [text for text in want_strings(found, "text") if text.strip()]
    if not queries:
        raise Rejected("empty turn", "'text' holds no question")
    picture = draft.image(want(entry, "name", str) + settings.ending)
    shapes: dict[str, list] = {}
    for shape in want(found, "shapes", list):
        points = want(shape, "points", list)
        if not all(isinstance(point, list) for point in points):
            raise Rejected("no polygon", "'points' must be a list of [x, y]")
        flat = [number for point in points for number in point]
        shapes.setdefault(want(shape, "label", str), []).extend(polygons(flat))
    if "target" not in shapes:
        raise Rejected("no target", f"labels {', '.join(sorted(shapes)) or 'none'}")
    size = draft.size(picture)
    region = mask(picture.ref, shapes["target"], size, None).array()
    if "ignore" in shapes:
        region = region & ~mask(picture.ref, shapes["ignore"], size, None).array()
        if not region.any():
            raise Rejected("empty mask", "all of the target is to be ignored")
    query = queries[rng.integers(len(queries))].strip()
    asked = draft.turn("user", picture, settings.request.replace("{query}", query))
    draft.turn("assistant", Mask.from_array(picture.ref, region), op="segment", depends_on=(asked,))
