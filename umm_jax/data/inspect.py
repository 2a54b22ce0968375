"""Looking at conversations on disk: one as a reader would see it, many as counts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from umm_jax.conversation import Box, Conversation, Image, Mask, Part, TaskCall, Text
from umm_jax.data.files import storage_errors
from umm_jax.data.records import open_source
from umm_jax.errors import DataError


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
    """The conversations of a finished folder, of one shard, or of a .json file (one record a line).

    Raises:
        DataError: missing, empty, half-written, or not conversations; records are validated when read.
    """
    path = Path(path)
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
        found = []
        for number, line in enumerate(lines):
            try:
                found.append(Conversation.from_json(line))
                found[-1].validate()
            except DataError as error:
                raise DataError(f"{path}, line {number + 1}: {error}") from None
        if not found:
            raise DataError(f"{path}: holds no conversations")
        return found
    return _Shard(path) if path.is_file() else _Folder(path)


def show(conversation: Conversation, pictures: str | Path | None = None) -> str:
    """A conversation as text, one line a part; its images are written to the folder `pictures` if given."""
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
        lines += [f"      {_part(part, c)}" for part in turn.parts]
    if pictures is not None:
        lines += [f"wrote {path}" for path in _write_pictures(c, Path(pictures))]
    return "\n".join(lines)


def _part(part: Part, conversation: Conversation) -> str:
    match part:
        case Text(text):
            return text
        case Image(ref):
            image = conversation.images[ref]
            return f"[image {ref}: {image.width} x {image.height} {image.mime}, {len(image.data)} bytes]"
        case Mask(of, size, _, label):
            name = f" {label}" if label else ""
            return f"[mask{name} of {of}: {int(part.array().sum())} of {size[0] * size[1]} pixels]"
        case Box(of, xyxy, label):
            name = f" {label}" if label else ""
            return f"[box{name} of {of}: {', '.join(f'{v:.3f}' for v in xyxy)}]"
        case TaskCall(name, args):
            return f"[task {name}({', '.join(f'{k}={v!r}' for k, v in args.items())})]"


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


def statistics(source: Sequence[Conversation], limit: int) -> dict[str, Any]:
    """Counts over at most `limit` conversations, spread evenly over all of them.

    Returns:
        plain values: records (all of them), read, and of those read the mean and largest number of turns,
        images, words and bytes of a record, and how often each role, part, operation, split, source and
        licence occurs.
    """
    stride = max(1, -(-len(source) // limit))
    sizes: dict[str, list[int]] = {"turns": [], "images": [], "words": [], "bytes": []}
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
