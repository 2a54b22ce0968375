"""Folders of conversations: ArrayRecord shards of msgpack, and the manifest that says they are whole.

    FOLDER/NAME-00000-of-00008.array_record    written under another name, synced, then renamed
    FOLDER/manifest.json                       written last: a folder without it is not finished

The manifest holds the schema version, how the data were made, and for each shard its number of records, its
size in bytes and its sha256. Every record is compressed alone (group size 1), so that reading one in random
order costs one small read.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from umm_jax.conversation import SCHEMA, Conversation
from umm_jax.data.files import finish, storage_errors, write_atomic
from umm_jax.errors import DataError, StorageError

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # the recipe of a folder still being written; see making
_PART = ".part"


@dataclass(frozen=True)
class Shard:
    """One finished shard file."""

    file: str
    records: int
    bytes: int
    sha256: str


def shard_name(name: str, index: int, shards: int) -> str:
    return f"{name}-{index:05d}-of-{shards:05d}.array_record"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes one shard: ``with ShardWriter(path) as writer: writer.write(conversation)``.

    The file gets its name when the block ends without an exception; otherwise nothing is left behind. The
    same conversations always give the same bytes. Raises RecordError on an invalid conversation and
    StorageError when the disk is full or not writable.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.records = 0
        self.shard: Shard | None = None
        self._part = self.path.with_name(self.path.name + _PART)

    def __enter__(self) -> "ShardWriter":
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._writing():
            self._writer = ArrayRecordWriter(str(self._part), "group_size:1")
        return self

    def write(self, conversation: Conversation) -> None:
        conversation.validate()
        data = conversation.to_msgpack()
        with self._writing():
            self._writer.write(data)
        self.records += 1

    def __exit__(self, kind, value, traceback) -> None:
        try:
            # Closed in any case, or the file stays open until the writer happens to be collected.
            with self._writing():
                self._writer.close()
            if kind is None:
                with storage_errors(self.path):
                    size, digest = self._part.stat().st_size, file_sha256(self._part)
                    finish(self._part, self.path)
                self.shard = Shard(self.path.name, self.records, size, digest)
        except StorageError:
            if kind is None:  # else the exception that ended the block is the one to report
                raise
        finally:
            with contextlib.suppress(OSError):
                self._part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """The library reports everything as RuntimeError; only its text tells a full disk."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).split(";")[0]
            if "No space left" in reason or "quota" in reason or "too large" in reason:
                reason += "; free some space and run again"
            raise StorageError(f"{self.path}: cannot be written: {reason}") from None


def write_manifest(
    folder: str | Path,
    name: str,
    shards: Sequence[Shard],
    how: Mapping[str, Any],
    counts: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Declares the folder finished.

    Args:
        how: says in plain JSON values how the records were made.
        counts: of licences, and of what was rejected or left out, by kind and reason; see ``quarantine``.
    """
    manifest = {
        "schema": SCHEMA,
        "name": name,
        "records": sum(shard.records for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "how": dict(how),
        "counts": dict(counts or {}),
        "shards": [asdict(shard) for shard in shards],
    }
    write_atomic(Path(folder) / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished folder of this release's schema. Raises DataError with what to do."""
    folder = Path(folder)
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "no such data folder"
        raise DataError(f"{folder}: {reason}; make one with `umm data synthesize --count=N --out={folder}`")
    if not any(folder.iterdir()):
        raise DataError(
            f"{folder}: the data folder is empty; fill it with `umm data synthesize --count=N --out={folder}`"
        )
    if not (folder / MANIFEST).exists():
        if (folder / UNFINISHED).exists():
            raise DataError(
                f"{folder}: the data are not finished (no {MANIFEST}); run the same command again that began "
                "them, finished shards are kept"
            )
        raise DataError(f"{folder}: no {MANIFEST}, so not a data folder of ours, or not completely copied")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        schema, shards = manifest["schema"], [Shard(**shard) for shard in manifest["shards"]]
        damaged = sum(shard.records for shard in shards) != manifest["records"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{folder / MANIFEST}: damaged ({error}); copy or make the data again") from None
    if schema != SCHEMA:
        raise DataError(
            f"{folder}: written with schema {schema}, this release reads schema {SCHEMA}; "
            "make the data again with this release, or use the release that wrote them"
        )
    if damaged:
        raise DataError(f"{folder / MANIFEST}: damaged (counts disagree); copy or make the data again")
    return manifest


class RecordSource:
    """Random access to the records of a finished folder, in the order in which they were written.

    ``source[i]`` is the msgpack of record i, :meth:`conversation` the decoded and validated record. Can be
    pickled; files are opened when first read.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False):
        """Checks names, sizes and counts; with `verify` also the sha256 of every shard.

        Raises:
            DataError: the folder, its manifest or a shard cannot be used; the message names the culprit.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self._shards = [Shard(**shard) for shard in self.manifest["shards"]]
        for shard in self._shards:
            self._check(shard, verify)
        if not self.manifest["records"]:
            raise DataError(f"{self.folder}: holds no records")
        # With the counts in the path no file is opened before it is read.
        parts = [f"{self.folder / s.file}[0:{s.records}]" for s in self._shards if s.records]
        self._source = ArrayRecordDataSource(parts)

    def _check(self, shard: Shard, verify: bool) -> None:
        path = self.folder / shard.file
        again = "copy it again, or delete the folder and make the data again"
        if not path.is_file():
            raise DataError(f"{path}: the shard is missing; {again}")
        size = path.stat().st_size
        if size != shard.bytes:
            raise DataError(f"{path}: half-written or damaged: {size} bytes, expected {shard.bytes}; {again}")
        if verify and file_sha256(path) != shard.sha256:
            raise DataError(f"{path}: damaged: its sha256 is not that of the manifest; {again}")

    def __len__(self) -> int:
        return self.manifest["records"]

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            return self._source[index]
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(
                f"{self.where(index)}: cannot be read: {str(error).split(';')[0]}; "
                "copy the shard again, or delete the folder and make the data again"
            ) from None

    def where(self, index: int) -> str:
        """File and place of a record, for messages."""
        position = index
        for shard in self._shards:
            if position < shard.records:
                return f"{self.folder / shard.file}, record {position}"
            position -= shard.records
        raise IndexError(f"record {index} of {len(self)}")

    def conversation(self, index: int) -> Conversation:
        """Record `index`, validated. Raises DataError that names shard and record."""
        data = self[index]
        try:
            conversation = Conversation.from_msgpack(data)
            conversation.validate()
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}") from None
        return conversation

    def __iter__(self) -> Iterator[Conversation]:
        return (self.conversation(index) for index in range(len(self)))


def open_source(path: str | Path, *, verify: bool = False) -> RecordSource:
    """Opens a finished folder; see :class:`RecordSource`."""
    return RecordSource(os.fspath(path), verify=verify)
