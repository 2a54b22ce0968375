"""Pictures with captions, a line or row each, as MM-Interleaved read LAION and others.

    {"image": "00098/1887973000500.jpg", "caption": "Sunset Gondola Ride"}

`caption` may be a list, whose strings are joined by a blank. In parquet `image` may be the picture itself. A
line may be a Python dict in single quotes, as in the sample of the release.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, fraction, want, want_strings
from umm_jax.data.quarantine import LeftOut

VERSION = 2
LICENSE = ""
PYTHON_LITERALS = True  # the sample file of MM-Interleaved is of such lines


@dataclass(frozen=True)
class Settings:
    """Defaults are the release's.

    Attributes:
        image_first: share of documents that begin with their picture.
        lower_case: whether captions lose their capitals.
    """

    image_first: float = 0.5
    lower_case: bool = True

    def __post_init__(self):
        fraction("image_first", self.image_first)


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.txt", "*.jsonl", "*.parquet"))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The picture and its caption, in either order."""
    caption = want(entry, "caption", (str, list))
    if not isinstance(caption, str):
        caption = " ".join(want_strings(entry, "caption"))
    if not caption.strip():
        raise LeftOut("captions that are empty")
    picture = draft.image(want(entry, "image", (str, bytes, dict)))
    caption = caption.lower() if settings.lower_case else caption
    draft.turn(
        "document", *([picture, caption] if rng.random() < settings.image_first else [caption, picture])
    )
