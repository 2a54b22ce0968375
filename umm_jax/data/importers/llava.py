"""LLaVA-Instruct, ShareGPT4V and their like: dialogues about pictures, in JSON or JSON lines.

    [{"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat are the colors of the bus?"},
                        {"from": "gpt", "value": "The bus is white and red."}]}, ...]

BAGEL's data for understanding are the same objects, a line each. `image` is missing where there is text only,
or a list, which others call `images`. Every "<image>" of the human's text is a picture, in order; newlines
beside it are left off.
Identifiers come more than once in these sets (one picture, several dialogues), so they name no record; the
first turn keeps its own as `original_id`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from umm_jax.conversation import Image
from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, checked, want, want_strings
from umm_jax.data.quarantine import LeftOut, Rejected

VERSION = 1
LICENSE = ""  # these sets have terms of their own each
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MARK = "<image>"
_LARGEST = 2**63  # of an identifier that is a number; a greater one cannot be written as one


@dataclass(frozen=True)
class Settings:
    """What becomes of a picture that the text does not place.

    Attributes:
        placeholder: "strict" rejects such a dialogue; "first" puts its picture before the first thing the
            human says, where there is one picture and no "<image>" at all.
    """

    placeholder: Literal["strict", "first"] = "strict"


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.json", "*.jsonl"))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The dialogue, with its pictures where the human's text has "<image>"."""
    if entry.get("video") is not None:
        raise LeftOut("videos")
    said = _said(entry)
    names = _names(entry)
    marks = sum(value.count(_MARK) for _, value in said)
    if settings.placeholder == "first" and len(names) == 1 and not marks:
        first = [role for role, _ in said].index("user")
        said[first] = ("user", _MARK + said[first][1])
    elif marks != len(names):
        raise Rejected("unequal pictures and placeholders", f"{len(names)} pictures, {marks} {_MARK}")
    pictures = iter([draft.image(name) for name in names])
    meta, shown = _original(entry), []
    for at, (role, value) in enumerate(said):
        # Nothing says which of its pictures an answer is about: it may be any that were shown before.
        needs = [k for k in shown if k < at - 1] if role == "assistant" else ()
        op = "ask" if role == "assistant" and names else None
        draft.turn(role, *_laid(value, pictures), op=op, depends_on=needs, meta=meta if at == 0 else None)
        if _MARK in value:
            shown.append(at)


def _said(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of every turn."""
    said = []
    for k, turn in enumerate(want(entry, "conversations", list)):
        name, value = want(turn, "from", str), want(turn, "value", str)
        if name not in _ROLES:
            raise Rejected("unknown role", f"turn {k} is from {name[:200]!r}; known: {', '.join(_ROLES)}")
        if _ROLES[name] != "user" and _MARK in value:
            raise Rejected("placeholder outside a question", f"turn {k}, from {name!r}, has {_MARK}")
        said.append((_ROLES[name], value))
    roles = [role for role, _ in said if role != "system"]
    if not roles:
        raise Rejected("empty dialogue", f"{len(said)} turns, none from a human or an assistant")
    if roles[0] == "assistant":
        raise Rejected("begins with an answer", "the first turn is the assistant's")
    if "assistant" not in roles:
        raise Rejected("no answer", f"{len(said)} turns, none from an assistant")
    return said


def _names(entry: Mapping[str, Any]) -> list[str]:
    """The names of its pictures."""
    given = [key for key in ("image", "images") if entry.get(key) is not None]
    if not given:
        return []
    if len(given) > 1:
        raise Rejected("pictures given twice", "by 'image' and by 'images'")
    found = want(entry, given[0], (str, list))
    return [found] if isinstance(found, str) else want_strings(entry, given[0])


def _laid(value: str, pictures: Iterator[Image]) -> Iterator[str | Image]:
    """A text with the next pictures in place of its placeholders."""
    texts = value.split(_MARK)
    for k, text in enumerate(texts):
        if k > 0:
            yield next(pictures)
            text = text.lstrip("\r\n")
        if k < len(texts) - 1:
            text = text.rstrip("\r\n")
        if text.strip():
            yield text


def _original(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Its identifier in the source, if that is a text or a number."""
    match entry.get("id"):
        case str(name):
            return {"original_id": checked(name).text}
        case int(number) if not isinstance(number, bool):
            return {"original_id": number if abs(number) < _LARGEST else str(number)}
    return {}
