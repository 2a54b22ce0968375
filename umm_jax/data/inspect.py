"""Looking at conversations on disk: one as a reader would see it, many as counts, or as a page to scroll."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from umm_jax.conversation import Conversation, Image, Part, Text, spell
from umm_jax.data.files import storage_errors
from umm_jax.data.html import write_html
from umm_jax.data.records import open_source
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.errors import DataError

__all__ = ["open_any", "preview", "show", "statistics", "stats", "texts", "write_html"]


class _Shard(Sequence):
    """One shard read alone, without the manifest of its folder."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._source = ArrayRecordDataSource([str(path)])
            self._length = len(self._source)
        except (RuntimeError, ValueError) as error:
            reason = str(error).split(";")[0]
            raise DataError(f"{path}: half-written, or no ArrayRecord file ({reason})") from None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Conversation:
        try:
            conversation = Conversation.from_msgpack(self._source[index])
            conversation.validate()
        except (DataError, RuntimeError, ValueError) as error:
            raise DataError(f"{self.path}, record {index}: {error}") from None
        return conversation


class _Folder(Sequence):
    """The records of a finished folder."""

    def __init__(self, path: Path):
        self._source = open_source(path)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Conversation:
        return self._source.conversation(index)


def open_any(path: str | Path) -> Sequence[Conversation]:
    """The conversations of a finished folder, of one shard, or of a .json, .jsonl or .msgpack file.

    A .json file holds one record, a list of them, or one a line; a .msgpack file one after the other.

    Raises:
        DataError: missing, empty, half-written, or not conversations; records are validated when read.
    """
    path = Path(path)
    if not path.is_file():
        return _Folder(path)
    if path.suffix in (".json", ".jsonl"):
        named = _json_records(path)
        read = Conversation.from_json
    elif path.suffix == ".msgpack":
        named = _msgpack_records(path)
        read = Conversation.from_msgpack
    else:
        return _Shard(path)
    found = []
    for where, data in named:
        try:
            found.append(read(data))
            found[-1].validate()
        except DataError as error:
            raise DataError(f"{path}, {where}: {error}") from None
    if not found:
        raise DataError(f"{path}: holds no conversations")
    return found


def _json_records(path: Path) -> list[tuple[str, bytes | str]]:
    data = path.read_bytes()
    try:
        whole = json.loads(data)
    except ValueError:  # not one value: one a line, where a broken line is named when it is read
        lines = enumerate(data.splitlines(), start=1)
        return [(f"line {number}", line) for number, line in lines if line.strip()]
    if isinstance(whole, list):
        return [(f"record {number}", json.dumps(value)) for number, value in enumerate(whole)]
    return [("record 0", data)]


def _msgpack_records(path: Path) -> list[tuple[str, bytes]]:
    data = path.read_bytes()
    unpacker = msgpack.Unpacker(io.BytesIO(data), max_buffer_size=0)
    found = []
    while (start := unpacker.tell()) < len(data):
        try:
            unpacker.skip()
        except Exception as error:  # msgpack raises many kinds for damaged bytes
            reason = f"{type(error).__name__} after {start} of {len(data)} bytes"
            raise DataError(f"{path}, record {len(found)}: damaged or half-written ({reason})") from None
        found.append((f"record {len(found)}", data[start : unpacker.tell()]))
    return found


def show(conversation: Conversation, pictures: str | Path | None = None, *, colour: bool = False) -> str:
    """A conversation as text, one line a part.

    Args:
        pictures: folder to write its images to.
        colour: draw a small picture below every image, for terminals with 24-bit colour.
    """
    c = conversation
    facts = {"source": c.source, "license": c.license, "language": c.language, "split": c.split}
    lines = [f"record {c.id}  " + "  ".join(f"{k}={v}" for k, v in facts.items() if v)]
    if c.provenance:
        lines.append(f"  made by {' > '.join(c.provenance)}")
    for index, turn in enumerate(c.turns):
        notes = [turn.op or "", "learned" if turn.loss else ""]
        notes += [f"depends on {', '.join(map(str, turn.depends_on))}"] if turn.depends_on else []
        aside = ", ".join(note for note in notes if note)
        lines.append(f"{index:3} {turn.role}" + (f"  ({aside})" if aside else ""))
        for part in turn.parts:
            lines.append(f"      {_part(part, c)}")
            if colour and isinstance(part, Image):
                lines += [f"      {row}" for row in preview(c.images[part.ref].array()).splitlines()]
    if pictures is not None:
        lines += [f"wrote {path}" for path in _write_pictures(c, Path(pictures))]
    return "\n".join(lines)


def preview(pixels: np.ndarray, columns: int = 24) -> str:
    """uint8[h, w, 3] as half blocks: a character shows two pixels, the upper one in its foreground.

    At most `columns` characters wide. Pixels are repeated or left out, never mixed, so that small drawings
    stay sharp.
    """
    h, w = pixels.shape[:2]
    wide = w * (columns // w) if w <= columns else columns
    high = max(2, 2 * round(h * wide / w / 2))
    rows = pixels[np.arange(high) * h // high][:, np.arange(wide) * w // wide].tolist()
    lines = []
    for above, below in zip(rows[::2], rows[1::2]):
        pairs = zip(above, below)
        cells = (f"\x1b[38;2;{a};{b};{c};48;2;{d};{e};{f}m\u2580" for (a, b, c), (d, e, f) in pairs)
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def _part(part: Part, conversation: Conversation) -> str:
    if not isinstance(part, Image):
        return spell(part)
    image = conversation.images[part.ref]
    return f"[image {part.ref}: {image.width} x {image.height} {image.mime}, {len(image.data)} bytes]"


def _write_pictures(conversation: Conversation, folder: Path) -> list[Path]:
    paths = []
    safe = "".join(ch if ch.isalnum() or ch in "-_" else "-" for ch in conversation.id)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(conversation.images.values()):
            ending = image.mime.partition("/")[2] or "img"
            paths.append(folder / f"{safe}-{number}.{ending}")
            paths[-1].write_bytes(image.data)
    return paths


def texts(path: str | Path, limit: int) -> Iterator[str]:
    """The texts of at most `limit` conversations of whatever :func:`open_any` opens, spread over them all."""
    source = open_any(path)
    for index in range(0, len(source), max(1, -(-len(source) // limit))):
        yield from (p.text for t in source[index].turns for p in t.parts if isinstance(p, Text))


def stats(path: str | Path, tokenizer: Tokenizer | None = None, limit: int = 2000) -> dict[str, Any]:
    """:func:`statistics` of whatever :func:`open_any` opens."""
    return statistics(open_any(path), limit, tokenizer)


def statistics(
    source: Sequence[Conversation], limit: int, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """Counts over at most `limit` conversations, spread evenly over all of them.

    Returns:
        plain values: records (all of them), read, and of those read the mean and largest number of turns,
        images, words, bytes and (with a `tokenizer`) text tokens of a record, and how often each role,
        part, operation, split, source and licence occurs.
    """
    stride = max(1, -(-len(source) // limit))
    sizes: dict[str, list[int]] = {"turns": [], "images": [], "words": [], "bytes": []}
    if tokenizer is not None:
        sizes["tokens"] = []
    counts: dict[str, Counter] = {
        name: Counter() for name in ("role", "part", "op", "split", "source", "license", "image size")
    }
    for index in range(0, len(source), stride):
        c = source[index]
        texts = [p.text for t in c.turns for p in t.parts if isinstance(p, Text)]
        sizes["turns"].append(len(c.turns))
        sizes["images"].append(len(c.images))
        sizes["words"].append(sum(len(text.split()) for text in texts))
        sizes["bytes"].append(len(c.to_msgpack()))
        if tokenizer is not None:
            sizes["tokens"].append(sum(len(tokenizer.encode(text)) for text in texts))
        counts["role"].update(t.role for t in c.turns)
        counts["part"].update(p.kind for t in c.turns for p in t.parts)
        counts["op"].update(t.op for t in c.turns if t.op)
        counts["split"].update([c.split])
        counts["source"].update([c.source or "(not said)"])
        counts["license"].update([c.license or "(not said)"])
        counts["image size"].update(f"{i.width} x {i.height}" for i in c.images.values())
    return {
        "records": len(source),
        "read": len(sizes["turns"]),
        **{f"{k} per record": {"mean": round(sum(v) / len(v), 2), "max": max(v)} for k, v in sizes.items()},
        **{k: dict(v.most_common()) for k, v in counts.items() if v},
    }
