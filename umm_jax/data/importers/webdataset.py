"""Tars of captioned pictures as img2dataset writes them: LAION, COYO and their like.

    00000.tar: 000000000.jpg, 000000000.txt (the caption),
               000000000.json {"caption": ..., "status": "success"}

Members are read where they lie, nothing is unpacked. The caption is that of the text, else that of the JSON;
a sample whose status is not success is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from umm_jax.data.entries import Entries, parse
from umm_jax.data.importing import Draft, fraction, want
from umm_jax.data.quarantine import LeftOut, Rejected

VERSION = 1
LICENSE = ""
_PICTURES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Settings:
    """What is made of a sample.

    Attributes:
        form: a "document" of picture and caption; "draw": the caption is asked for, the picture the answer;
            "describe": the other way round.
        image_first: share of documents that begin with their picture.
        question: what the user asks in "describe".
    """

    form: Literal["document", "draw", "describe"] = "document"
    image_first: float = 0.5
    question: str = "describe the picture"

    def __post_init__(self):
        fraction("image_first", self.image_first)


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.tar",))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The picture and its caption."""
    sidecar = parse(want(entry, "json", bytes)) if "json" in entry else {}
    if sidecar.get("status", "success") != "success":
        raise LeftOut("samples that were not downloaded")
    data = next((entry[ending] for ending in _PICTURES if ending in entry), None)
    if data is None:
        raise Rejected("field missing", f"no picture among {', '.join(sorted(set(entry) - {'__key__'}))}")
    caption = _text(entry["txt"]) if "txt" in entry else want(sidecar, "caption", str)
    if not caption.strip():
        raise LeftOut("captions that are empty")
    picture = draft.image(data)
    caption = caption.strip()
    match settings.form:
        case "draw":
            draft.turn("assistant", picture, op="draw", depends_on=(draft.turn("user", caption),))
        case "describe":
            asked = draft.turn("user", picture, settings.question)
            draft.turn("assistant", caption, op="describe", depends_on=(asked,))
        case _:
            first = rng.random() < settings.image_first
            draft.turn("document", *([picture, caption] if first else [caption, picture]))


def _text(data: Any) -> str:
    try:
        return data.decode()
    except (UnicodeDecodeError, AttributeError) as error:
        raise Rejected("text that is no Unicode", str(error)) from None
