"""SEED-Data-Edit: edits in single steps, and by hand in up to five rounds (arXiv 2405.04007).

    jsonl, a line an edit:    {"source_image": "a.jpg", "target_image": "b.jpg", "instruction": "..."}
    or a chain of edits:      {"images": ["a.jpg", "b.jpg", "c.jpg"], "instructions": ["...", "..."]}

Names are below --images, from archives that are put together first (cat parts > whole) and unpacked. The
names of the fields could not be checked against the files; the settings say which are read. Non-commercial.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, want, want_strings
from umm_jax.data.quarantine import Rejected

VERSION = 1
LICENSE = "CC-BY-NC-4.0"


@dataclass(frozen=True)
class Settings:
    """The fields that are read.

    Attributes:
        source, target, instruction: of a single edit.
        images, instructions: of a chain; an entry that has both is one.
    """

    source: str = "source_image"
    target: str = "target_image"
    instruction: str = "instruction"
    images: str = "images"
    instructions: str = "instructions"


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.jsonl",))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The edits of one line, each about the picture before it."""
    if settings.images in entry and settings.instructions in entry:
        names = want_strings(entry, settings.images)
        asked = want_strings(entry, settings.instructions)
    else:
        names = [want(entry, settings.source, str), want(entry, settings.target, str)]
        asked = [want(entry, settings.instruction, str)]
    if len(names) != len(asked) + 1 or not asked:
        cause = f"{len(names)} pictures and {len(asked)} instructions"
        raise Rejected("unequal pictures and instructions", cause)
    shown = [draft.image(name) for name in names]
    for k, words in enumerate(asked):
        draft.edit(shown[0] if k == 0 else None, words, shown[k + 1])
