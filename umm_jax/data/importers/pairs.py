"""Pictures with captions: text files of one JSON object a line, as MM-Interleaved read LAION and others.

    {"image": "00098/1887973000500.jpg", "caption": "Sunset Gondola Ride"}

`caption` may be a list, whose strings are joined by a blank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from umm_jax.conversation import ImageData
from umm_jax.data.importing import Pictures, fraction, want
from umm_jax.errors import DataError

PATTERNS = ("*.txt", "*.jsonl")
VERSION = 1


@dataclass(frozen=True)
class Settings:
    """Defaults are the release's (specification, section 8).

    Attributes:
        image_first: share of documents that begin with their picture.
        lower_case: whether captions lose their capitals.
    """

    image_first: float = 0.5
    lower_case: bool = True

    def __post_init__(self):
        fraction("image_first", self.image_first)


def document(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, pictures: Pictures
) -> list[str | ImageData] | None:
    """The picture and its caption, in either order."""
    caption = want(entry, "caption", (str, list))
    if not isinstance(caption, str):
        if not all(isinstance(text, str) for text in caption):
            raise DataError(f"'caption' must be a string or a list of strings, got {caption!r}")
        caption = " ".join(caption)
    picture = pictures.see(want(entry, "image", str))
    if picture is None:
        return None
    if not caption.strip():
        pictures.left_out["captions that are empty"] += 1
        return None
    caption = caption.lower() if settings.lower_case else caption
    return [picture, caption] if rng.random() < settings.image_first else [caption, picture]
