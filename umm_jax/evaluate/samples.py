"""What a model did best and worst on a benchmark, as tiles of a page."""

import io
from collections.abc import Sequence
from pathlib import Path

from umm_jax.conversation import Image, ImageData
from umm_jax.errors import DataError
from umm_jax.evaluate import benchmark, html
from umm_jax.evaluate.contract import Doc, Response
from umm_jax.evaluate.store import Folder

EACH = 4  # tiles of the best, and of the worst
SIDE = 192  # pixels of the longer side of what is shown
_LETTERS = 400


def section(folder: str | Path, title: str) -> str:
    """Markup of a scored folder's best and worst docs; empty where it was not scored, or docs have no figure.

    Raises:
        DataError: the folder, or the annotations it was asked from, cannot be read.
    """
    stored = Folder(folder)
    figures = stored.score()
    if figures is None:
        return ""
    values = figures["docs"]
    docs = {doc.id: doc for doc in benchmark.planned_docs(folder)[2]}
    found = stored.responses()
    best, worst = chosen({id: value for id, value in values.items() if id in docs and id in found})
    tiles = [_tile(docs[id], found[id], values[id], True) for id in best]
    tiles += [_tile(docs[id], found[id], values[id], False) for id in worst]
    return html.section(
        title, f"By {figures['headline']}: the best, then the worst.", html.grid(tiles, "tiles")
    )


def chosen(values: dict[str, float]) -> tuple[list[str], list[str]]:
    """(the best, the worst) ids, none in both; of equal ones the first by id."""
    ids = sorted(values, key=lambda id: (-values[id], id))
    count = min(EACH, (len(ids) + 1) // 2)
    worst = sorted(ids[count:], key=lambda id: (values[id], id))
    return ids[:count], worst[:EACH]


def _tile(doc: Doc, response: Response, value: float, good: bool) -> str:
    pictures = [("shown", image) for image in _shown(doc)[-2:]]
    pictures += [("drawn", image) for image in response.pictures[-2:]]
    said = response.text or ("" if response.pictures else "(nothing)")
    if response.scores:
        best = max(range(len(response.scores)), key=lambda i: response.scores[i])
        said = f"ranked first: {doc.options[best]}"
    return html.tile(
        _short(doc.turns[-1].spelt()),
        [(caption, small(image)) for caption, image in pictures],
        html.tag(good, html.number(value)),
        _short(f"reply: {said}") if said else "",
    )


def _shown(doc: Doc) -> Sequence[ImageData]:
    try:
        images = doc.conversation().images
    except DataError:
        return []
    return [images[p.ref] for turn in doc.turns for p in turn.parts if isinstance(p, Image)]


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def small(image: ImageData) -> bytes:
    """A PNG of at most SIDE pixels a side."""
    if max(image.width, image.height) <= SIDE and image.mime == "image/png":
        return image.data
    picture = image.picture()
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
