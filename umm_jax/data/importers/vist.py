"""VIST: stories in five photographs, a sentence each (arXiv 1604.03968).

    {"annotations": {"30355": [{"image_id": "693397887", "caption": "Our landlord ...",
                                "sequence_index": 0}, ...]}}
    {"images": [...], "annotations": [[{"story_id": "30355", "photo_flickr_id": "693397887",
                                        "worker_arranged_photo_order": 0, "text": "our landlord ..."}], ...]}

The first form is that of MM-Interleaved's conversion, the second the original, in which every annotation is a
list of one. Photographs are PHOTO.jpg below --images; many are gone from where they were.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from umm_jax.data.entries import Entry, find_files
from umm_jax.data.importing import Draft, want
from umm_jax.data.quarantine import LeftOut, Rejected
from umm_jax.errors import ConfigError, DataError

VERSION = 1
LICENSE = ""


@dataclass(frozen=True)
class Settings:
    """How a story is told.

    Attributes:
        form: "story": the user asks for one and the assistant tells and shows it; or a "document".
        request: what the user says.
        ending: of the photographs' names.
        missing: a story that lacks a photograph: "reject", or "leave_out" that step, its sentence too.
        min_steps: what must be left of a story then.
    """

    form: Literal["story", "document"] = "story"
    request: str = "tell a story in pictures"
    ending: str = ".jpg"
    missing: Literal["reject", "leave_out"] = "reject"
    min_steps: int = 2

    def __post_init__(self):
        if self.min_steps < 1:
            raise ConfigError(f"min_steps must be positive, it is {self.min_steps}")


class Stories(Sequence):
    """One entry a story, in the order of the file."""

    def __init__(self, path: Path):
        self._files = find_files(path, ("*.json",))
        self._stories: list[tuple[Path, int, Any]] | None = None
        self._facts = [[file.name, file.stat().st_size] for file in self._files]
        self._count = len(self._read())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Entry:
        file, number, steps = self._read()[index]
        return Entry(file, "story", number, {"steps": steps})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stories": None}

    def digest(self) -> str:
        facts = json.dumps([self._facts, len(self)]).encode()
        return f"{len(self._files)} files, {hashlib.sha256(facts).hexdigest()[:16]}"

    def _read(self) -> list[tuple[Path, int, Any]]:
        if self._stories is None:
            self._stories = []
            for file in self._files:
                try:
                    found = json.loads(file.read_bytes())["annotations"]
                    stories = list(found.values()) if isinstance(found, dict) else _grouped(found)
                except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
                    raise DataError(
                        f"{file}: no annotations of VIST ({error or type(error).__name__})"
                    ) from None
                self._stories += [(file, number, steps) for number, steps in enumerate(stories)]
        return self._stories


def _grouped(found: list) -> list[list]:
    """The original form by story, in the order in which stories first appear."""
    stories: dict[str, list] = {}
    for inner in found:
        for step in inner if isinstance(inner, list) else [inner]:
            stories.setdefault(str(step["story_id"]), []).append(step)
    return list(stories.values())


def entries(path: Path, settings: Settings) -> Stories:
    return Stories(path)


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """Sentences and photographs in the order of the story."""
    steps = sorted((_step(step) for step in want(entry, "steps", list)), key=lambda step: step[0])
    if not steps:
        raise Rejected("empty dialogue", "a story without steps")
    if len({number for number, *_ in steps}) < len(steps):
        raise Rejected("turns out of order", f"places {[number for number, *_ in steps]} in one story")
    see = draft.image if settings.missing == "reject" else draft.image_if_good
    parts: list[Any] = []
    for _, name, sentence in steps:
        picture = see(name + settings.ending)
        if picture is not None:
            parts += [sentence, picture]
    if len(parts) < 2 * min(settings.min_steps, len(steps)):
        raise LeftOut("stories with too few pictures")
    if settings.form == "document":
        draft.turn("document", *parts)
    else:
        asked = draft.turn("user", settings.request)
        draft.turn("assistant", *parts, op="story", depends_on=(asked,))


def _step(step: Any) -> tuple[int, str, str]:
    """(place, photograph, sentence) of either form."""
    if isinstance(step, Mapping) and "photo_flickr_id" in step:
        place, name, said = "worker_arranged_photo_order", "photo_flickr_id", "text"
    else:
        place, name, said = "sequence_index", "image_id", "caption"
    return want(step, place, int), str(want(step, name, (str, int))), want(step, said, str)
