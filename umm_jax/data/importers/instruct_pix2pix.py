"""InstructPix2Pix: pairs of pictures before and after one written edit (arXiv 2211.09800).

    parquet, a row an edit: original_prompt "a lake", original_image {"bytes": ...},
    edit_prompt "make it winter", edited_prompt "a lake in winter", edited_image {"bytes": ...}

The captions of both pictures let an edit be told as drawing first and changing then.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, want
from umm_jax.errors import ConfigError

VERSION = 1
LICENSE = ""


@dataclass(frozen=True)
class Settings:
    """How an edit is told.

    Attributes:
        form: "upload": the user shows the first picture and asks for the change; "draw": asks for the first
            picture in words, and then for the change.
        request: those words; {caption} is the first picture's.
    """

    form: Literal["upload", "draw"] = "upload"
    request: str = "draw {caption}"

    def __post_init__(self):
        if "{caption}" not in self.request:
            raise ConfigError(f"request must hold {{caption}}, it is {self.request!r}")


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.parquet",))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """One edit."""
    asked = want(entry, "edit_prompt", str)
    before = draft.image(want(entry, "original_image", (str, bytes, dict)))
    after = draft.image(want(entry, "edited_image", (str, bytes, dict)))
    if settings.form == "draw":
        caption = want(entry, "original_prompt", str)
        draft.turn("user", settings.request.replace("{caption}", caption))
        shown = draft.turn("assistant", before, op="draw", depends_on=(0,))
        draft.turn("user", asked, depends_on=(shown,))
    else:
        shown = draft.turn("user", before, asked)
    draft.turn("assistant", after, op="edit", depends_on=(shown, len(draft) - 1))
