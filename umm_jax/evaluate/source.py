"""The user's folder of published annotations: read, never downloaded; what is missing is named.

Annotations are small; pictures are only pointed at. Every file that was read goes into `digest`, so that
figures of two versions of a benchmark are never set side by side.
"""

import base64
import binascii
import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from umm_jax.data.entries import extra
from umm_jax.errors import DataError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Embedded:
    """A picture inside an annotation file, decoded when it is asked for.

    Attributes:
        where: names it, e.g. "dev.tsv, row 17". read: gives its bytes, or raises OSError.
    """

    where: str
    read: Callable[[], bytes]

    @classmethod
    def in_base64(cls, where: str, text: str) -> "Embedded":
        """One that is written in base64."""

        def read() -> bytes:
            try:
                return base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError) as error:
                raise OSError(f"no base64: {error}") from None

        return cls(where, read)

    def read_bytes(self) -> bytes:
        """The encoded picture. Raises OSError."""
        return self.read()

    def __str__(self) -> str:
        return self.where


def inside(folder: Path, name: str) -> Path:
    """The path of a name that others chose, below a folder.

    Links are followed: who has the folder has put them there.

    Raises:
        DataError: the name leads out of it.
    """
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{folder}: the picture name {name!r} leads out of the folder")
    return folder / name


class Source:
    """A benchmark's folder.

    Args:
        root: where the published files lie. name: of the benchmark, for complaints.
        where: where its authors publish the files, in words.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: str | Path, name: str = "", where: str = ""):
        self.root, self.name, self.where = Path(root), name, where
        self._read: dict[str, str] = {}
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder; --data-root is the one with the files of {name}")

    @property
    def digest(self) -> str:
        """sha256 over the names and contents of all files read so far."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self._read.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def path(self, *names: str) -> Path:
        """The first of these that is there, below the folder.

        Raises:
            DataError: none is; says what to put where.
        """
        for name in names:
            if (self.root / name).exists():
                return self.root / name
        wanted = " or ".join(str(self.root / name) for name in names)
        where = f"; {self.where}" if self.where else ""
        raise DataError(f"{self.name or 'this benchmark'} needs {wanted}, which is not there{where}")

    def bytes(self, *names: str) -> bytes:
        """The content of the first of these that is there. Raises DataError."""
        path = self.path(*names)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        self._read[str(path.relative_to(self.root))] = hashlib.sha256(data).hexdigest()
        return data

    def text(self, *names: str, encoding: str = "utf-8-sig") -> str:
        """Raises DataError, also where the file is no text."""
        try:
            return self.bytes(*names).decode(encoding)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path(*names)}: is not {encoding}: {error.reason}") from None

    def json(self, *names: str) -> Any:
        """Raises DataError: not there, or no JSON."""
        text = self.text(*names)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{self.path(*names)}: damaged: {error}") from None

    def lines(self, *names: str) -> list[Any]:
        """The values of a file of JSON lines; empty ones are left out. Raises DataError."""
        found = []
        # Not splitlines(), which breaks lines at marks that JSON texts may hold.
        for number, line in enumerate(self.text(*names).split("\n"), 1):
            if line.strip():
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{self.path(*names)}, line {number}: damaged: {error}") from None
        return found

    def table(self, *names: str, delimiter: str = "\t") -> list[dict[str, str]]:
        """The rows of a table whose first line names its columns. Raises DataError."""
        csv.field_size_limit(sys.maxsize)  # pictures in base64 are long
        rows = list(csv.DictReader(io.StringIO(self.text(*names), newline=""), delimiter=delimiter))
        if not rows:
            raise DataError(f"{self.path(*names)}: no rows; a table whose first line names its columns")
        return rows

    def parquet(
        self, path: Path, pictures: Sequence[str] = (), fields: Sequence[str] | None = None
    ) -> Iterator[tuple[dict[str, Any], "PictureOf"]]:
        """Rows of a parquet file of the folder without its pictures, and what gives those by their columns.

        Args:
            path: below the folder. pictures: columns of {"bytes"}, which are read when one is asked for.
            fields: columns of a row; all others but those unless given.

        Raises:
            DataError: damaged. ConfigError: no pyarrow.
        """
        reader = extra("pyarrow.parquet", "parquet files", "pyarrow")
        data = self.bytes(path.relative_to(self.root).as_posix())
        try:
            file = reader.ParquetFile(io.BytesIO(data))
            columns = fields or [name for name in file.schema_arrow.names if name not in pictures]
            groups = [
                file.read_row_group(g, columns=list(columns)).to_pylist() for g in range(file.num_row_groups)
            ]
        except Exception as error:  # pyarrow raises many kinds, all of which mean the same here
            raise DataError(f"{path}: damaged: {error}") from None
        for group, rows in enumerate(groups):
            for number, row in enumerate(rows):
                yield row, partial(_in_parquet, path, group, number)

    def picture(self, *names: str) -> Path:
        """Where a picture lies: the first of these that is there, else the first; it is opened when asked.

        Raises:
            DataError: the name leads out of the folder.
        """
        paths = [inside(self.root, name) for name in names]
        # With one name there is nothing to choose, and looking costs time where there are many.
        return paths[0] if len(paths) == 1 else next((p for p in paths if p.exists()), paths[0])


PictureOf = Callable[[str], Embedded]  # of a column's name


def _in_parquet(path: Path, group: int, row: int, column: str) -> Embedded:
    where = f"{path}, row {row} of group {group}, {column}"
    return Embedded(where, partial(_bytes_in_parquet, path, group, row, column))


def _bytes_in_parquet(path: Path, group: int, row: int, column: str) -> bytes:
    """A picture of a parquet file. Raises OSError: it has none there."""
    pictures = _column(path, group, column)
    if pictures is None or not (pictures[row] or {}).get("bytes"):
        raise OSError(f"the row has no {column}")
    return pictures[row]["bytes"]


@lru_cache(maxsize=8)  # docs are planned in the order of the files, but asked in another
def _column(path: Path, group: int, column: str) -> list[dict | None] | None:
    file = extra("pyarrow.parquet", "parquet files", "pyarrow").ParquetFile(path)
    if column not in file.schema_arrow.names:
        return None
    return file.read_row_group(group, columns=[column])[column].to_pylist()


def take(entry: Any, key: str, of: Path | str, kinds: type | tuple[type, ...] = object) -> Any:
    """A value of an annotation. Raises DataError, naming the file, where it is missing or of another type."""
    try:
        value = entry[key]
    except (KeyError, TypeError, IndexError):
        raise DataError(f"{of}: an entry has no {key!r}: {str(entry)[:120]}") from None
    if not isinstance(value, kinds):
        raise DataError(f"{of}: {key!r} is of another type than the release's: {str(value)[:120]}")
    return value
