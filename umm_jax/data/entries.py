"""Annotations of foreign data sets as a sequence of entries, whatever files they lie in.

    .jsonl .txt .jsonl.zip    a line is an entry
    .json                     an element of the list is an entry; an object is the one entry
    .parquet .arrow           a row
    .tar                      a sample of webdataset: its files by ending, and its key under "__key__"

Files follow one another by name. Of a file only the places of its entries are kept, so that a set may be
larger than memory; readers pickle as file names, for worker processes.
"""

import ast
import dataclasses
import fnmatch
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.data.quarantine import Rejected
from umm_jax.errors import ConfigError, DataError

# Bytes of one entry of text; more is no annotation.
LARGEST_ENTRY = 64 << 20
# Of an annotation file in a zip: bytes unpacked, and how many times those packed.
_LARGEST, _RATIO = 8 << 30, 200
# Bytes of a Python literal: its parser is recursive and in C.
_LARGEST_LITERAL = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One annotation.

    Attributes:
        file: where it lies. unit, number: "line" 3; lines are counted from 1, all else from 0.
        raw: JSON as bytes, or values by name, or the entries that were grouped to this one.
    """

    file: Path
    unit: str
    number: int
    raw: bytes | Mapping[str, Any] | tuple["Entry", ...]

    @property
    def name(self) -> str:
        """Tells it from the others of its set."""
        return f"{self.file.name.partition('.')[0]}-{self.number}"

    @property
    def where(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"

    def value(self, python: bool = False) -> Mapping[str, Any]:
        """Its values by name; {"rows": [values, ...]} of a group. Raises Rejected where it is no JSON object.

        `python` lets a dict in single quotes pass, read as a literal: nothing is run.
        """
        match self.raw:
            case bytes():
                return parse(self.raw, python)
            case tuple():
                return {"rows": [entry.value(python) for entry in self.raw]}
        return self.raw


def parse(text: bytes, python: bool = False) -> dict[str, Any]:
    """One JSON object, see :meth:`Entry.value`."""
    if len(text) > LARGEST_ENTRY:
        raise Rejected("entry too long", f"{len(text)} bytes, {LARGEST_ENTRY} are allowed")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise Rejected("not JSON", "nested too deeply") from None
    except ValueError as error:
        if not text.lstrip().startswith(b"{'"):
            raise Rejected("not JSON", f"not JSON: {error}") from None
        if not python:
            message = "a Python dict in single quotes, not JSON; write it with json.dumps"
            raise Rejected("not JSON", message) from None
        value = _literal(text)
    if not isinstance(value, dict):
        raise Rejected("not an object", f"expected a JSON object, got {type(value).__name__}")
    return value


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def _literal(text: bytes) -> Any:
    if len(text) > _LARGEST_LITERAL:
        raise Rejected("entry too long", f"{len(text)} bytes, {_LARGEST_LITERAL} are allowed")
    try:
        return ast.literal_eval(text.decode().strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise Rejected("not JSON", f"neither JSON nor a Python literal: {error}") from None


class Entries(Sequence):
    """The entries of annotation files.

    Args:
        path: one file, or a folder of them.
        patterns: the names that count in a folder.
        group: entries that follow one another and have the same value under this name become one.

    Raises:
        DataError: no such files, or one that cannot be read.
    """

    def __init__(self, path: str | Path, patterns: Sequence[str], group: str | None = None):
        self.files = find_files(Path(path), patterns)
        self._held: tuple[int, Any] | None = None
        self._places, self._group = [], group
        for k in range(len(self.files)):
            count = len(self._reader(k))
            # [first, last + 1] of the entries that make one.
            if group is None:
                places = np.arange(count)
            else:
                keys = self._reader(k).column(group)
                places = np.flatnonzero([i == 0 or keys[i] != keys[i - 1] for i in range(count)])
            self._places.append(np.append(places, count))
        self._held = None

    def __len__(self) -> int:
        return sum(len(places) - 1 for places in self._places)

    def __getitem__(self, index: int) -> Entry:
        position = index
        for k, places in enumerate(self._places):
            if 0 <= position < len(places) - 1:
                first, end = int(places[position]), int(places[position + 1])
                reader = self._reader(k)
                rows = tuple(Entry(self.files[k], reader.unit, *reader[i]) for i in range(first, end))
                return rows[0] if self._group is None else dataclasses.replace(rows[0], raw=rows)
            position -= len(places) - 1
        raise IndexError(f"entry {index} of {len(self)}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # worker processes open what they need

    def digest(self) -> str:
        """Tells these files from others, by names, sizes and numbers of entries."""
        counts = [len(places) - 1 for places in self._places]
        facts = [[file.name, file.stat().st_size, count] for file, count in zip(self.files, counts)]
        return f"{len(facts)} files, {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"

    def _reader(self, k: int):
        if self._held is None or self._held[0] != k:
            file = self.files[k]
            try:
                self._held = (k, _READERS[_ending(file)](file))
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
        return self._held[1]


def _ending(file: Path) -> str:
    """The reader's name; what has none of the known endings is read by lines."""
    ending = file.suffix
    return ending if ending in _READERS else ".jsonl"


def find_files(path: Path, patterns: Sequence[str]) -> list[Path]:
    """`path` itself, or the matching files of a folder, sorted. Raises DataError if there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such annotation file or folder")
    found = sorted(p for p in path.iterdir() if any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns))
    if not found:
        raise DataError(f"{path}: holds no annotation files ({', '.join(patterns)})")
    twice = [p for p in found if p.with_name(p.name + ".zip") in found]
    if twice:
        raise DataError(f"{twice[0]}: is there packed and unpacked; remove one of the two")
    return found


# --- readers: a sequence of (number, raw), and what they count -------------------------------------------


class _Lines:
    """Lines that are not blank."""

    unit = "line"

    def __init__(self, file: Path):
        self._file = _unpacked(file) if file.suffix == ".zip" else open(file, "rb")  # noqa: SIM115
        starts, numbers, position = [], [], 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                starts.append((position, position + len(line)))
                numbers.append(number)
            position += len(line)
        self._starts = np.array(starts, np.int64).reshape(-1, 2)
        self._numbers = np.array(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        start, end = self._starts[i].tolist()
        self._file.seek(start)
        return int(self._numbers[i]), self._file.read(end - start)

    def column(self, name: str) -> list:
        return [_value_of(self[i][1], name) for i in range(len(self))]


def _value_of(raw: bytes, name: str) -> Any:
    try:
        return parse(raw).get(name)
    except Rejected:
        return object()  # equal to nothing: it will be an entry of its own, and rejected there


def _unpacked(file: Path) -> io.BytesIO:
    try:
        with zipfile.ZipFile(file) as packed:
            names = packed.namelist()
            name = file.name.removesuffix(".zip")
            if name not in names and len(names) != 1:
                raise DataError(f"{file}: holds {len(names)} files and none called {name}")
            member = packed.getinfo(name if name in names else names[0])
            size, ratio = member.file_size, member.file_size / max(member.compress_size, 1)
            if size > _LARGEST or (size > LARGEST_ENTRY and ratio > _RATIO):
                raise DataError(
                    f"{file}: {size} bytes unpacked, {ratio:.0f} times those packed: no annotations"
                )
            return io.BytesIO(packed.read(member))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{file}: damaged, or no zip file ({error})") from None


class _List:
    """Elements of one JSON list, found without holding it: a list of a million dialogues is one file."""

    unit = "element"

    def __init__(self, file: Path):
        self._file = open(file, "rb")  # noqa: SIM115
        self._spans = np.array(_elements(self._file, file), np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i: int) -> tuple[int, bytes]:
        start, end = self._spans[i].tolist()
        self._file.seek(start)
        return i, self._file.read(end - start)

    column = _Lines.column


_BLANK = re.compile(r"[ \t\n\r]*")
_CHUNK = 1 << 20


def _elements(file, path: Path) -> list[tuple[int, int]]:
    """Bytes [start, end) of the elements of a JSON list, or of the object that stands in its place.

    The decoder of the standard library says where a value ends. It is given Latin-1, in which every byte is a
    letter, so that its letters count bytes; outside strings JSON is ASCII anyway.
    """
    decoder = json.JSONDecoder()
    text, base, at, ended = "", 0, 0, False

    def fill() -> None:
        nonlocal text, base, at, ended
        chunk = file.read(max(_CHUNK, len(text) - at))
        ended = not chunk
        text, base, at = text[at:] + chunk.decode("latin-1"), base + at, 0

    def skip(letters: str) -> str:
        """Passes over blanks and then over the next letter, if it is one of these; gives that letter."""
        nonlocal at
        while True:
            at = _BLANK.match(text, at).end()
            if at < len(text) or ended:
                break
            fill()
        letter = text[at : at + 1]
        at += letter != "" and letter in letters
        return letter

    def broken(what: str) -> DataError:
        return DataError(f"{path}: damaged at byte {base + at}, after {len(found)} whole elements: {what}")

    found: list[tuple[int, int]] = []
    fill()
    if text.startswith("\u00ef\u00bb\u00bf"):
        at = 3  # a byte-order mark
    listed = skip("[") == "["
    while True:
        if listed and skip("]") == "]":
            break
        if not listed and skip("") == "" and found:
            break
        while True:
            try:
                _, end = decoder.raw_decode(text, at)
                if end < len(text) or ended:  # else a number may go on
                    break
            except RecursionError:
                raise broken("nested too deeply") from None
            except ValueError as error:
                if ended or len(text) - at > LARGEST_ENTRY:
                    raise broken(getattr(error, "msg", str(error))) from None
            fill()
        found.append((base + at, base + end))
        at = end
        if not listed:
            if skip("") != "":
                raise broken("more than one value; lines of JSON are to be called .jsonl")
            break
        if skip(",]") == "]":
            break
        if text[at - 1 : at] != ",":
            raise broken("a comma or ] is missing")
    return found


class _Parquet:
    """Rows; one row group is held at a time."""

    unit = "row"

    def __init__(self, file: Path):
        parquet = extra("pyarrow.parquet", "parquet files", "pyarrow")
        import pyarrow

        try:
            self._file = parquet.ParquetFile(file)
        except pyarrow.ArrowException as error:
            raise DataError(f"{file}: damaged, or no parquet file ({error})") from None
        groups = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._edges = np.cumsum([0, *groups])
        self._path, self._held, self._error = file, (-1, None), pyarrow.ArrowException

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, i: int) -> tuple[int, Mapping[str, Any]]:
        group = int(np.searchsorted(self._edges, i, side="right")) - 1
        try:
            if self._held[0] != group:
                self._held = (group, self._file.read_row_group(group))
            row = self._held[1].slice(i - int(self._edges[group]), 1).to_pylist()[0]
        except (self._error, OSError) as error:
            raise DataError(f"{self._path}: row {i} cannot be read: {error}") from None
        return i, row

    def column(self, name: str) -> list:
        if name not in self._file.schema_arrow.names:
            raise DataError(
                f"{self._path}: has no column {name!r}; {', '.join(self._file.schema_arrow.names)}"
            )
        return self._file.read(columns=[name]).column(0).to_pylist()


class _Arrow:
    """Rows of a file that the datasets library saved: they stay on disk."""

    unit = "row"

    def __init__(self, file: Path):
        pyarrow = extra("pyarrow", "arrow files", "pyarrow")
        try:
            source = pyarrow.memory_map(str(file))
            try:
                self._table = pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                self._table = pyarrow.ipc.open_file(source).read_all()
        except pyarrow.ArrowException as error:
            raise DataError(f"{file}: damaged, or no arrow file ({error})") from None
        self._path = file

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, i: int) -> tuple[int, Mapping[str, Any]]:
        return i, self._table.slice(i, 1).to_pylist()[0]

    def column(self, name: str) -> list:
        if name not in self._table.column_names:
            raise DataError(f"{self._path}: has no column {name!r}; {', '.join(self._table.column_names)}")
        return self._table.column(name).to_pylist()


class _Tar:
    """Samples of webdataset: regular files whose path is the same up to the first dot of its last part.

    Members are read where they lie. Nothing is unpacked, so a name that leads elsewhere leads nowhere.
    """

    unit = "sample"

    def __init__(self, file: Path):
        self._path = file
        self._file = open(file, "rb")  # noqa: SIM115
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                for member in tar:
                    if not member.isreg():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    place = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    place.setdefault(ending.lower(), (member.offset_data, member.size))
        except tarfile.TarError as error:
            packed = file.name.endswith((".gz", ".tgz", ".xz", ".bz2"))
            what = "packed; unpack it to a plain .tar" if packed else f"damaged, or no tar file ({error})"
            raise DataError(f"{file}: {what}") from None
        self._samples = list(samples.items())

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> tuple[int, Mapping[str, Any]]:
        key, files = self._samples[i]
        found: dict[str, Any] = {"__key__": key}
        for ending, (offset, size) in files.items():
            self._file.seek(offset)
            found[ending] = self._file.read(size)
        return i, found

    def column(self, name: str) -> list:
        return [self[i][1].get(name) for i in range(len(self))]


_READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": _Lines,
    ".zip": _Lines,
    ".json": _List,
    ".parquet": _Parquet,
    ".arrow": _Arrow,
    ".tar": _Tar,
}


def extra(module: str, purpose: str, package: str, name: str = "data") -> Any:
    """An optional library. Raises ConfigError that says how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"{purpose} need {package}: pip install {package}, or install umm_jax with its extra [{name}]"
        ) from None
