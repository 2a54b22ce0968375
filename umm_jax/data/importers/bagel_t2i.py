"""Pictures to draw as BAGEL reads them: a picture and several captions of it.

    parquet, a row a picture: image bytes, captions '{"short": "a cat", "long": "a tabby cat that ..."}'

One of the captions is drawn. They are a JSON object as a string.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.data.entries import Entries, parse
from umm_jax.data.importing import Draft, want
from umm_jax.data.quarantine import LeftOut
from umm_jax.errors import ConfigError

VERSION = 1
LICENSE = ""


@dataclass(frozen=True)
class Settings:
    """What the user says.

    Attributes:
        request: the words; {caption} is the caption drawn.
        caption: name of the caption to take; null draws one.
    """

    request: str = "{caption}"
    caption: str | None = None

    def __post_init__(self):
        if "{caption}" not in self.request:
            raise ConfigError(f"request must hold {{caption}}, it is {self.request!r}")


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.parquet",))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """A request and the picture."""
    captions = parse(want(entry, "captions", str).encode("utf-8", "surrogatepass"))
    names = sorted(captions) if settings.caption is None else [settings.caption]
    if not names:
        raise LeftOut("pictures without a caption")
    caption = want(captions, names[rng.integers(len(names))], str)
    if not caption.strip():
        raise LeftOut("captions that are empty")
    picture = draft.image(want(entry, "image", (str, bytes, dict)))
    request = draft.turn("user", settings.request.replace("{caption}", caption))
    draft.turn("assistant", picture, op="draw", depends_on=(request,))
