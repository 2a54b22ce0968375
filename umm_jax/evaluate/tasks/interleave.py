"""Structure of interleaved replies: are the right blocks there, text and pictures, in the right order?

    interleave.jsonl  a line each: {id, prompt, structure: ["text", "image", ...]} and perhaps
                      images: [files shown before the prompt], category
    ISG-Bench.jsonl   the release's: {id, Category, Query: [{type, content}], Golden: [{type, content}]}

This is the structural level of ISG-Bench (Interleaved Scene Graph, ICLR 2025), which needs no judge; its
other levels do. Neighbouring texts are one block, in replies and structures alike, since where a text is cut
is an accident of writing; ISG-Bench's own script does not join them. Texts of nothing but space are none.

`order`, the headline, is the share of replies whose blocks are those wanted; `order_unjoined` is that of
ISG-Bench's script; `count` the share with the right number of pictures; `distance` the mean number of blocks
to be put in, taken out or changed, over the length of the longer, in percent: 0 is best.

Replies of other programs tell their blocks in order as "parts"; a "text" with "images" is read as that text
followed by its pictures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from umm_jax.conversation import Image, Part, Text
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Response, Task, means, user
from umm_jax.evaluate.measures.edits import edit_distance
from umm_jax.evaluate.source import Source, take

KINDS = ("text", "image")


@dataclass(frozen=True)
class Settings:
    """Nothing can be chosen."""


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    names = "interleave.jsonl", "ISG-Bench.jsonl"
    name = source.path(*names).name
    for entry in source.lines(*names):
        id = str(take(entry, "id", name))
        if "Golden" in entry:
            golden = take(entry, "Golden", name, list)
            wanted = tuple(take(block, "type", name, str) for block in golden)
            asked = [
                (take(block, "type", name, str), take(block, "content", name, str))
                for block in take(entry, "Query", name, list)
            ]
            category = entry.get("Category")
        else:
            wanted = tuple(take(entry, "structure", name, list))
            asked = [("image", file) for file in take({"images": []} | entry, "images", name, list)]
            asked.append(("text", take(entry, "prompt", name, str)))
            category = entry.get("category")
        if not wanted or any(kind not in KINDS for kind in (*wanted, *(kind for kind, _ in asked))):
            raise DataError(f"{name}: id {id!r}: blocks must be text or image, they are {list(wanted)}")
        yield _doc(source, id, asked, wanted, {"category": str(category)} if category else {})


def _doc(source: Source, id: str, asked: Sequence[tuple[str, str]], wanted: tuple[str, ...], group) -> Doc:
    parts: list[Part] = []
    pictures: dict[str, Path] = {}
    for kind, content in asked:
        if kind == "text":
            parts.append(Text(content))
        else:
            ref = f"image{len(pictures) + 1}"
            pictures[ref] = source.picture(content)
            parts.append(Image(ref))
    return Doc(id, (user(*parts),), pictures, target=wanted, group=group)


def blocks(response: Response) -> tuple[str, ...]:
    """ "text" and "image" in the order of a reply; masks, boxes and calls are neither."""
    found = []
    for part in (part for turn in response.turns for part in turn.parts):
        if isinstance(part, Image) or (isinstance(part, Text) and part.text.strip()):
            found.append(part.kind)
    return tuple(found)


def joined(kinds: Sequence[str]) -> tuple[str, ...]:
    """Neighbouring texts as one; pictures stay as many as they are."""
    found: list[str] = []
    for kind, several in groupby(kinds):
        found += [kind] if kind == "text" else list(several)
    return tuple(found)


def distance(a: Sequence[str], b: Sequence[str]) -> float:
    """Levenshtein's, over the length of the longer: 0 where they are the same, 1 at most."""
    return edit_distance(a, b) / max(len(a), len(b), 1)


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    found = blocks(response)
    values = {
        "order": float(joined(found) == joined(doc.target)),
        "count": float(found.count("image") == doc.target.count("image")),
        "distance": distance(joined(found), joined(doc.target)),
        "order_unjoined": float(found == doc.target),
    }
    return Marks(values, "" if found else "empty")


TASK = Task(
    "interleave",
    docs,
    mark,
    "order",
    means("order", "count", "distance", "order_unjoined", by=("category",)),
    Settings,
    files="ISG-Bench is published as shuaishuaicdp/ISG-Bench on the Hugging Face hub; or write your own",
    reply={"mode": "auto", "max_tokens": 512, "max_images": 8},
    post="neighbouring texts joined",
)
