"""MMC4: web pages as lists of sentences, with pictures matched to them (arXiv 2304.06939).

    docs_shard_7_v2.jsonl.zip, or the .jsonl in it; one page a line:
    {"text_list": ["...", ...], "similarity_matrix": [[...], ...],
     "image_info": [{"image_name": "a.jpg", "matched_text_index": 3, "matched_sim": 0.27}, ...]}

The pictures are files of their own, downloaded by whoever uses the data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.conversation import Image
from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, fraction, want, want_strings
from umm_jax.data.quarantine import LeftOut, Rejected
from umm_jax.errors import ConfigError

VERSION = 2
LICENSE = ""  # its lists have one, the pictures many


@dataclass(frozen=True)
class Settings:
    """Defaults are the release's.

    Attributes:
        min_similarity: pictures that match their sentence less are left out.
        max_images: pictures kept of a page, chosen at random.
        image_first: share of pictures that stand before their sentence.
        keep_single: share kept of the pages with one picture.
    """

    min_similarity: float = 0.24
    max_images: int = 6
    image_first: float = 0.5
    keep_single: float = 0.5

    def __post_init__(self):
        fraction("image_first", self.image_first)
        fraction("keep_single", self.keep_single)
        if self.max_images < 1:
            raise ConfigError(f"max_images must be at least 1, it is {self.max_images}")


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("docs_*.jsonl", "docs_*.jsonl.zip"))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The sentences joined by blanks, each picture before or after the sentence it matches."""
    sentences = want_strings(entry, "text_list")
    found = _matched(entry, len(sentences), settings, draft)
    if not found:
        raise LeftOut("pages without a picture")
    chosen = [found[k] for k in rng.permutation(len(found))[: settings.max_images]]
    if len(chosen) == 1 and rng.random() >= settings.keep_single:
        raise LeftOut("pages with one picture")
    chosen.sort(key=lambda pair: pair[0])  # of the same sentence, in the order in which they were drawn
    parts: list[str | Image] = []
    for k, sentence in enumerate(sentences):
        here = [picture for at, picture in chosen if at == k]
        before = int(np.count_nonzero(rng.random(len(here)) < settings.image_first))
        parts += here[:before]
        if parts and isinstance(parts[-1], str):
            parts[-1] += " " + sentence
        else:
            parts.append(sentence)
        parts += here[before:]
    draft.turn("document", *parts)


def _matched(
    entry: Mapping[str, Any], sentences: int, settings: Settings, draft: Draft
) -> list[tuple[int, Image]]:
    """(sentence, picture) of the pictures that match well enough and can be read."""
    found = []
    # A row of the matrix for every picture; where there are fewer, the rest was never matched.
    for info, _ in zip(want(entry, "image_info", list), want(entry, "similarity_matrix", list)):
        at, similarity = want(info, "matched_text_index", int), want(info, "matched_sim", (int, float))
        if not 0 <= at < sentences:
            cause = f"'matched_text_index' is {at}, the page has {sentences} sentences"
            raise Rejected("index out of range", cause)
        if similarity < settings.min_similarity:
            continue
        picture = draft.image_if_good(want(info, "image_name", str))
        if picture is not None:
            found.append((at, picture))
    return found
