"""OBELICS: web pages in which texts and pictures follow one another (arXiv 2306.16527).

    parquet, a row a page: images ["https://...", null, ...], texts [null, "A lake.", ...],
    metadata '[{...}, null, ...]', general_metadata '{"url": ...}'

Both lists are equally long, and exactly one of the two holds something at each place. Pictures come as URLs;
nothing is fetched, so they are looked for below --images under the sha256 of the URL, and an ending. A page
goes on without a picture that is not there.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, want
from umm_jax.data.quarantine import LeftOut, Rejected
from umm_jax.errors import ConfigError

VERSION = 1
LICENSE = ""  # its lists have one, the pictures many


@dataclass(frozen=True)
class Settings:
    """Which pictures, and where they are.

    Attributes:
        ending: of the names that are made of URLs.
        min_images, max_images: pictures of a page; with fewer it is left out, after the last it is cut.
    """

    ending: str = ".jpg"
    min_images: int = 1
    max_images: int = 30

    def __post_init__(self):
        if not 0 <= self.min_images <= self.max_images or not self.max_images:
            raise ConfigError(f"min_images {self.min_images} and max_images {self.max_images} do not agree")


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.parquet",))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The page as a document."""
    images, texts = want(entry, "images", list), want(entry, "texts", list)
    if len(images) != len(texts):
        raise Rejected("unequal pictures and texts", f"{len(images)} images and {len(texts)} texts")
    parts: list[Any] = []
    shown = 0
    for k, (image, text) in enumerate(zip(images, texts)):
        if (image is None) == (text is None):
            what = "neither an image nor a text" if image is None else "an image and a text"
            raise Rejected("unequal pictures and texts", f"place {k} holds {what}")
        if text is not None:
            parts.append(want({"text": text}, "text", str))
            continue
        if shown == settings.max_images:
            break
        found = draft.image_if_good(_source(image, settings))
        if found is not None:
            parts.append(found)
            shown += 1
    if shown < settings.min_images:
        raise LeftOut("pages without a picture" if not shown else "pages with too few pictures")
    draft.turn("document", *parts)


def _source(image: Any, settings: Settings) -> Any:
    if isinstance(image, str) and "://" in image:
        return hashlib.sha256(image.encode("utf-8", "surrogatepass")).hexdigest() + settings.ending
    return image
