"""Bringing public data sets into records: their annotations, their pictures, and what goes wrong in them.

Lines of annotations are records in the order of the files' names; a record's choices are drawn from the seed
and its number, so that it is the same however and however often the import is run. A picture that is missing
or broken stops the import, or is left out and counted where the user said so: no other takes its place.
"""

import fnmatch
import hashlib
import io
import json
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image

from umm_jax.config import from_dict, to_dict
from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn
from umm_jax.data import importers
from umm_jax.data.synthesis import Noted
from umm_jax.errors import ConfigError, DataError

LOST = ("pictures missing", "pictures broken")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no format that Pillow hands to another program
_LARGEST = 8 << 30  # bytes of an unpacked annotation file; more is no annotation file


class Import:
    """Record `index` of a data set, for :func:`synthesis.synthesize`.

    Args:
        kind: name of the importer.
        annotations: an annotation file, or a folder of them.
        images: the folder their picture names start from.
        settings: what differs from the importer's Settings.
        missing: "refuse" stops at a picture that cannot be read, "drop" leaves it out and counts it.
        source, license: written into every record.

    Raises:
        ConfigError: unknown kind or setting. DataError: no such files, or none of that kind.
    """

    def __init__(
        self,
        kind: str,
        annotations: str | Path,
        images: str | Path,
        *,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        missing: str = "refuse",
        source: str = "",
        license: str = "",
        split: str = "train",
    ):
        module = importers.get(kind)
        self.kind, self.seed, self.missing = kind, seed, missing
        self.settings = from_dict(module.Settings, settings or {}, f"{kind} settings")
        self.images = Path(images)
        if not self.images.is_dir():
            raise DataError(f"{images}: no such folder of pictures")
        self.facts = {"source": source or kind, "license": license, "split": split}
        self.lines = Lines(annotations, module.PATTERNS)

    def __len__(self) -> int:
        return len(self.lines)

    def recipe(self) -> dict[str, Any]:
        """From which the same records could be made again; see the `how` of synthesize.

        `missing` is no part of it: what was made without a missing picture is the same either way, and may be
        kept when an import that was refused goes on with "drop".
        """
        facts = {"importer": self.kind, "version": importers.get(self.kind).VERSION, "seed": self.seed}
        return {**facts, **self.facts, "settings": to_dict(self.settings), "annotations": self.lines.digest()}

    def check(self, out: str | Path, left_out: Mapping[str, int]) -> None:
        """Raises DataError where `out` lacks pictures it must not lack: an earlier run said "drop"."""
        lost = {reason: count for reason, count in left_out.items() if reason in LOST}
        if lost and self.missing != "drop":
            said = ", ".join(f"{count} {reason}" for reason, count in lost.items())
            raise DataError(
                f"{out}: made with --missing=drop, which left out {said}; say so again, or make it anew"
            )

    def __call__(self, index: int) -> Noted:
        """Raises DataError that names file, line and record."""
        file, number, line = self.lines[index]
        pictures = Pictures(self.images, self.missing)
        try:
            entry = parse(line)
            rng = np.random.default_rng([self.seed, index])
            parts = importers.get(self.kind).document(entry, self.settings, rng, pictures)
        except DataError as error:
            raise DataError(f"{file}, line {number} (record {index}): {error}") from None
        made = None if parts is None else self._record(f"{file.name.partition('.')[0]}-{number}", parts)
        return Noted(made, pictures.left_out)

    def _record(self, name: str, parts: Sequence[str | ImageData]) -> Conversation:
        images, laid = {}, []
        for part in parts:
            if isinstance(part, str):
                laid += [Text(part)] if part else []
            else:
                laid.append(Image(f"i{len(images)}"))
                images[f"i{len(images)}"] = part
        return Conversation(
            f"{self.facts['source']}-{name}",
            (Turn("document", tuple(laid), loss=True),),
            images,
            provenance=(f"imported as {self.kind}",),
            **self.facts,
        )


# --- annotations ----------------------------------------------------------------------------------


class Lines(Sequence):
    """The lines of annotation files that are not blank, plain or in a .zip; one file is held at a time."""

    def __init__(self, path: str | Path, patterns: Sequence[str]):
        self.files = _find(Path(path), patterns)
        self.counts = [len(self._read(file)) for file in self.files]
        self._held: tuple[int, list] | None = None

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> tuple[Path, int, bytes]:
        """(file, number of the line counted from 1, the line)."""
        position = index
        for k, count in enumerate(self.counts):
            if 0 <= position < count:
                if self._held is None or self._held[0] != k:
                    self._held = (k, self._read(self.files[k]))
                return (self.files[k], *self._held[1][position])
            position -= count
        raise IndexError(f"record {index} of {len(self)}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # worker processes read what they need

    def digest(self) -> str:
        """Tells these files from others, by names, sizes and numbers of lines."""
        facts = [[file.name, file.stat().st_size, count] for file, count in zip(self.files, self.counts)]
        return f"{len(facts)} files, {hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"

    @staticmethod
    def _read(file: Path) -> list[tuple[int, bytes]]:
        try:
            data = _unpacked(file) if file.suffix == ".zip" else file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
        return [(n, line) for n, line in enumerate(data.split(b"\n"), start=1) if line.strip()]


def _find(path: Path, patterns: Sequence[str]) -> list[Path]:
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


def _unpacked(file: Path) -> bytes:
    try:
        with zipfile.ZipFile(file) as packed:
            names = packed.namelist()
            name = file.name.removesuffix(".zip")
            if name not in names and len(names) != 1:
                raise DataError(f"{file}: holds {len(names)} files and none called {name}")
            member = packed.getinfo(name if name in names else names[0])
            if member.file_size > _LARGEST:
                raise DataError(f"{file}: {member.file_size} bytes unpacked are no annotation file")
            return packed.read(member)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{file}: damaged, or no zip file ({error})") from None


def parse(line: bytes) -> dict[str, Any]:
    """One line as a JSON object. Raises DataError that says what it is instead."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        if line.lstrip().startswith(b"{'"):
            raise DataError("a Python dict in single quotes, not JSON; write it with json.dumps") from None
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise DataError(f"expected a JSON object, got {type(entry).__name__}")
    return entry


def want(entry: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """The value called `name`, of one of the types `kind`. Raises DataError."""
    if not isinstance(entry, Mapping) or name not in entry:
        raise DataError(f"{name!r} is missing")
    value = entry[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{name!r} must be {kinds}, got {value!r}")
    return value


def fraction(name: str, value: float) -> None:
    """Raises ConfigError unless `value` is a share."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is a share from 0 to 1, it is {value}")


# --- pictures -------------------------------------------------------------------------------------


class Pictures:
    """Reads the pictures of one record, and counts what of it is left out."""

    def __init__(self, folder: Path, missing: str):
        self.folder, self.missing = folder, missing
        self.left_out: Counter[str] = Counter()

    def see(self, name: str) -> ImageData | None:
        """The picture `name` of the folder, decoded once to be sure of it; None where it is to be left out.

        Raises:
            DataError: it cannot be read and must not be left out; or the name leads out of the folder.
        """
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts:
            raise DataError(f"picture {name!r} leads out of {self.folder}")
        try:
            data = (self.folder / pure).read_bytes()
        except OSError as error:
            return self._lost(LOST[0], f"picture {self.folder / pure}: {error.strerror or error}")
        try:
            with warnings.catch_warnings():
                # A small file may unpack to gigabytes; Pillow only warns at first.
                warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
                with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                    mime, (width, height) = picture.get_format_mimetype(), picture.size
                    picture.convert("RGB")
        except Exception as error:  # Pillow raises many kinds, all of which mean the same here
            what = "no picture of a known format" if isinstance(error, PIL.UnidentifiedImageError) else error
            return self._lost(LOST[1], f"picture {self.folder / pure}: {what}")
        return ImageData(data, mime, width, height)

    def _lost(self, reason: str, message: str) -> None:
        if self.missing != "drop":
            raise DataError(f"{message}; mend it, or leave such pictures out with --missing=drop")
        self.left_out[reason] += 1
