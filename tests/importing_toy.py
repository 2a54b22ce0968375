"""Small foreign data sets for the tests of importing; pictures are told apart by their grey."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from umm_jax.conversation import Conversation, Image, Text
from umm_jax.data.importing import Import
from umm_jax.data.making import Made

GREY = {name: 20 * k for k, name in enumerate("abcdefgh")}


def picture(grey: int, format: str = "PNG", size: tuple[int, int] = (8, 6)) -> bytes:
    """An encoded picture of one grey; `size` is (width, height)."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, (grey, grey, grey)).save(buffer, format)
    return buffer.getvalue()


def make_pictures(folder: Path) -> Path:
    """a.png to h.png, one grey each; sub/c.jpg is noise; cut.jpg ends in the middle; text.png is none."""
    for name, grey in GREY.items():
        (folder / f"{name}.png").write_bytes(picture(grey))
    (folder / "sub").mkdir()
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(folder / "sub" / "c.jpg")
    (folder / "cut.jpg").write_bytes((folder / "sub" / "c.jpg").read_bytes()[:2000])
    (folder / "text.png").write_text("not found")
    return folder


def write_lines(path: Path, *entries: Mapping | str) -> Path:
    """Objects as lines of JSON, strings as they are."""
    path.write_text("".join(e if isinstance(e, str) else json.dumps(e) + "\n" for e in entries))
    return path


def write_list(path: Path, entries: list) -> Path:
    path.write_text(json.dumps(entries, indent=1))
    return path


def write_parquet(path: Path, rows: list[Mapping[str, Any]], row_group: int = 2) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group)
    return path


def all_of(make: Import) -> list[Conversation | None]:
    """What every index gives."""
    return [make(index).conversation for index in range(len(make))]


def only(make: Import) -> Conversation:
    """The one record there is; everything of it was let in."""
    assert len(make) == 1
    made = make(0)
    assert made.conversation is not None and not made.tally.quarantine, made.tally.lines()
    return made.conversation


def why(made: Made) -> dict[str, dict[str, int]]:
    """The counts of what was rejected or left out."""
    kinds = ("left out", "rejected records", "rejected pictures")
    return {kind: counts for kind, counts in made.tally.plain().items() if kind in kinds}


def causes(made: Made) -> list[str]:
    return [line["cause"] for line in made.tally.quarantine]


def laid(record: Conversation, turn: int = 0) -> list[str | int]:
    """Texts of a turn, and the greys of its pictures, in their order."""
    return [_laid(part, record) for part in record.turns[turn].parts]


def dialogue(record: Conversation) -> list[tuple]:
    """(role, *laid) of every turn."""
    return [(turn.role, *(_laid(part, record) for part in turn.parts)) for turn in record.turns]


def _laid(part: Any, record: Conversation) -> Any:
    match part:
        case Text(text):
            return text
        case Image(ref):
            return int(record.images[ref].array()[0, 0, 0])
    return part
