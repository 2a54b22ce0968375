"""What two sets of records have in common: the same pictures, nearly the same ones, the same words.

A picture's hash here is of 64 comparisons of neighbouring greys at 9 x 8 (dHash); pictures whose hashes
differ in at most six are nearly the same. Four bands of 16 bits find such pairs without comparing all with
all: six differences leave a band in which at most one differs, and the neighbours of a band are looked up
too. Words are compared by runs of thirteen, the usual length for telling whether a test set was trained on.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np
import PIL.Image

from umm_jax.conversation import Conversation, ImageData, Text

NEAR, RUN = 6, 13
_BANDS = (0, 16, 32, 48)


def dhash(image: ImageData) -> int:
    """64 bits. Raises DataError if the picture cannot be decoded."""
    grey = PIL.Image.fromarray(image.array()).convert("L").resize((9, 8), PIL.Image.Resampling.BOX)
    pixels = np.asarray(grey).astype(int)
    bits = (pixels[:, 1:] > pixels[:, :-1]).ravel()
    return int(np.packbits(bits).tobytes().hex(), 16)


class Pictures:
    """Hashes of pictures, and where the first of each is."""

    def __init__(self):
        self._exact: dict[str, str] = {}
        self._bands: dict[tuple[int, int], list[tuple[int, str]]] = {}

    def add(self, image: ImageData, where: str) -> None:
        if image.sha256 in self._exact:
            return
        self._exact[image.sha256] = where
        value = dhash(image)
        for band in _BANDS:
            self._bands.setdefault((band, value >> band & 0xFFFF), []).append((value, where))

    def same(self, image: ImageData) -> str | None:
        """Where the very same bytes are."""
        return self._exact.get(image.sha256)

    def near(self, image: ImageData) -> str | None:
        """Where a picture is that looks nearly the same, the same bytes included."""
        value = dhash(image)
        for band in _BANDS:
            part = value >> band & 0xFFFF
            for key in (part, *(part ^ 1 << bit for bit in range(16))):
                for other, where in self._bands.get((band, key), ()):
                    if (value ^ other).bit_count() <= NEAR:
                        return where
        return None


def runs(record: Conversation) -> Iterator[str]:
    """Every thirteen words that follow one another in a text of the record."""
    for turn in record.turns:
        for part in turn.parts:
            if isinstance(part, Text):
                words = re.findall(r"\w+", part.text.lower())
                yield from (" ".join(words[k : k + RUN]) for k in range(len(words) - RUN + 1))


def overlap(
    records: Iterable[Conversation], others: Iterable[Conversation]
) -> dict[str, list[tuple[str, str]]]:
    """(record, other) of the records that share something with the others, by what they share.

    "same picture" and "near picture" exclude one another; small drawings of one kind are often near.
    """
    pictures, words = Pictures(), {}
    for other in others:
        for image in other.images.values():
            pictures.add(image, other.id)
        for run in runs(other):
            words.setdefault(run, other.id)
    found: dict[str, list[tuple[str, str]]] = {"same picture": [], "near picture": [], "same words": []}
    for record in records:
        images = record.images.values()
        same = next((where for image in images if (where := pictures.same(image))), None)
        if same is not None:
            found["same picture"].append((record.id, same))
        else:
            near = next((where for image in images if (where := pictures.near(image))), None)
            if near is not None:
                found["near picture"].append((record.id, near))
        run = next((words[run] for run in runs(record) if run in words), None)
        if run is not None:
            found["same words"].append((record.id, run))
    return found
