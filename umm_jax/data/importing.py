"""Bringing foreign data sets into records: their annotations, their pictures, and what goes wrong in them.

An importer (``data/importers``) says what an entry means; everything else is here: drawing from a seed,
letting pictures in, checking texts, naming records, counting what is not let in. A record's choices come from
the seed and its number, so that it is the same however and however often the import is run.
"""

import base64
import binascii
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.config import from_dict, to_dict
from umm_jax.conversation import LEARNED, Conversation, Image, ImageData, Part, RecordError, Text, Turn
from umm_jax.data import importers
from umm_jax.data.entries import Entry
from umm_jax.data.gate import Gate, Limits
from umm_jax.data.making import Made
from umm_jax.data.quarantine import LeftOut, Rejected, Tally
from umm_jax.errors import ConfigError, DataError

LONGEST_TEXT = 50_000  # letters of one part; whole books are no turns
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
_DATA_URL = re.compile(r"data:[\w/+.-]*;base64,", re.ASCII)


class Import:
    """Record `index` of a data set, for :func:`making.make_records`.

    Args:
        kind: name of the importer.
        path: its annotation file, or a folder of them.
        images: the folder their picture names start from; without it no picture is looked for by name.
        settings: what differs from the importer's Settings.
        source, license: written into every record; the importer's own unless given.

    Raises:
        ConfigError: unknown kind or setting. DataError: no such files, or none of that kind.
    """

    def __init__(
        self,
        kind: str,
        path: str | Path,
        images: str | Path | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        source: str = "",
        license: str = "",
        split: str = "train",
    ):
        module = importers.get(kind)
        self.kind, self.seed = kind, seed
        self.settings = from_dict(module.Settings, settings or {}, f"{kind} settings")
        self.images = None if images is None else Path(os.path.realpath(images))
        if self.images is not None and not self.images.is_dir():
            raise DataError(f"{images}: no such folder of pictures")
        self.facts = {"source": source or kind, "license": license or module.LICENSE, "split": split}
        self.entries = module.entries(Path(path), self.settings)
        self.gate = Gate(limits or Limits())

    def __len__(self) -> int:
        return len(self.entries)

    def recipe(self) -> dict[str, Any]:
        """From which the same records could be made again; see the `how` of make_records."""
        facts = {"importer": self.kind, "version": importers.get(self.kind).VERSION, "seed": self.seed}
        limits = to_dict(self.gate.limits)
        del limits["seconds"]  # how patient one is says nothing about the data
        settings = {"settings": to_dict(self.settings), "limits": limits}
        return {**facts, **self.facts, **settings, "annotations": self.entries.digest()}

    def __call__(self, index: int) -> Made:
        """Raises DataError where the file cannot be read; what is wrong with an entry is in the tally."""
        entry, module = self.entries[index], importers.get(self.kind)
        draft = Draft(self, index, entry)
        rng = np.random.default_rng([self.seed, index])
        try:
            value = entry.value(python=getattr(module, "PYTHON_LITERALS", False))
            module.conversation(value, self.settings, rng, draft)
            return Made(draft.finish(), draft.tally)
        except LeftOut as error:
            draft.tally.count("left out", str(error))
        except (Rejected, RecordError) as error:
            rejected = error if isinstance(error, Rejected) else Rejected("unusable record", str(error))
            draft.tally.reject("record", rejected, index, entry.where, entry.raw)
        return Made(None, draft.tally)


class Draft:
    """A conversation in the making: an importer adds turns to it, and pictures by whatever it has of them."""

    def __init__(self, of: Import, index: int, entry: Entry):
        self.tally = Tally()
        self._of, self._index, self._entry = of, index, entry
        self._turns: list[Turn] = []
        self._images: dict[str, ImageData] = {}
        self._refs: dict[str, str] = {}

    def __len__(self) -> int:
        """Turns so far."""
        return len(self._turns)

    # --- pictures ---

    def image(self, source: Any) -> Image:
        """A picture that the record cannot do without; the same one twice is stored once.

        Args:
            source: encoded bytes; a name below the folder of pictures; a data: URL; or what the datasets
                library makes of a picture, {"bytes": ..., "path": ...}.

        Raises:
            Rejected: it is not let in, and so the record is not either.
        """
        self.tally.count("pictures", "looked at")
        try:
            image, changes = self._of.gate.admit(self._bytes(source))
        except Rejected as error:
            named = Rejected(error.reason, f"{_named(source)}: {error}")
            self.tally.reject("picture", named, self._index, self._entry.where, self._entry.raw)
            raise named from None
        for change in changes:
            self.tally.count("changed pictures", change)
        ref = self._refs.setdefault(image.sha256, f"i{len(self._refs)}")
        self._images[ref] = image
        return Image(ref)

    def image_if_good(self, source: Any) -> Image | None:
        """A picture that the record can do without: None where it is not let in, which is counted."""
        try:
            return self.image(source)
        except Rejected:
            return None

    def size(self, image: Image) -> tuple[int, int]:
        """(width, height) of a picture of this draft."""
        return self._images[image.ref].width, self._images[image.ref].height

    def _bytes(self, source: Any) -> bytes:
        match source:
            case bytes() | bytearray() | memoryview():
                return bytes(source)
            case {"bytes": bytes(data)}:
                return data
            case {"path": str(name)} | str(name):
                return _from_url(name) if _DATA_URL.match(name) else self._from_folder(name)
        raise Rejected("no picture", f"expected a name or bytes, got {type(source).__name__}")

    def _from_folder(self, name: str) -> bytes:
        root = self._of.images
        if _URL.match(name):
            raise Rejected("picture by URL", "nothing is fetched; download pictures first")
        if root is None:
            raise Rejected("missing picture", "a name, but no folder of pictures was given (--images)")
        try:
            path = Path(os.path.realpath(root / name))
        except ValueError as error:
            raise Rejected("picture outside", f"no name of a file: {error}") from None
        if not name or os.path.isabs(name) or not path.is_relative_to(root) or path == root:
            raise Rejected("picture outside", f"leads out of {root}")
        try:
            if not path.is_file():
                raise Rejected("missing picture", f"no such file in {root}")
            if (size := path.stat().st_size) > self._of.gate.limits.bytes:
                limit = self._of.gate.limits.bytes
                raise Rejected("too many bytes", f"{size} bytes, {limit} are allowed")
            return path.read_bytes()
        except OSError as error:
            raise Rejected("missing picture", error.strerror or str(error)) from None

    # --- turns ---

    def turn(
        self,
        role: str,
        *parts: str | Part,
        op: str | None = None,
        depends_on: Iterable[int] = (),
        loss: bool | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> int:
        """Adds a turn and gives its index. Texts may be plain strings; empty ones are no parts.

        `loss` is that of the role unless said: assistants and documents are learned.

        Raises:
            Rejected: an empty turn, or a text that is too long or no Unicode.
        """
        laid = [checked(part) if isinstance(part, str) else part for part in parts]
        kept = tuple(part for part in laid if not isinstance(part, Text) or part.text)
        if not any(not isinstance(part, Text) or part.text.strip() for part in kept):
            raise Rejected("empty turn", f"turn {len(self)} ({role}) says nothing")
        learned = role in LEARNED if loss is None else loss
        self._turns.append(Turn(role, kept, learned, tuple(sorted(set(depends_on))), op, dict(meta or {})))
        return len(self) - 1

    def edit(self, source: Image | None, asked: str, target: Image) -> None:
        """Two turns: a request about a new picture, or None for the last turn's, and the changed picture."""
        shown = () if source is not None else (len(self) - 1,)
        request = self.turn("user", *([] if source is None else [source]), asked, depends_on=shown)
        self.turn("assistant", target, op="edit", depends_on=(*shown, request))

    def finish(self) -> Conversation:
        """The conversation. Raises Rejected if it has no turns, RecordError if it is no valid record."""
        if not self._turns:
            raise Rejected("empty dialogue", "no turns")
        shown = {part.ref for turn in self._turns for part in turn.parts if isinstance(part, Image)}
        made = Conversation(
            f"{self._of.facts['source']}-{self._entry.name}",
            tuple(self._turns),
            {ref: image for ref, image in self._images.items() if ref in shown},
            provenance=(f"imported as {self._of.kind}",),
            **self._of.facts,
        )
        made.validate()
        return made


def _named(source: Any) -> str:
    """What to call a picture in a message."""
    if not isinstance(source, str):
        return "a picture"
    return "a data URL" if source.startswith("data:") else source[:200]


def _from_url(url: str) -> bytes:
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("damaged picture", f"not base64: {error}") from None


# --- what importers check -------------------------------------------------------------------------


def checked(text: str) -> Text:
    """A part of `text`. Raises Rejected where it is too long, or could not be written."""
    if len(text) > LONGEST_TEXT:
        raise Rejected("text too long", f"{len(text)} letters, {LONGEST_TEXT} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("text that is no Unicode", f"half a surrogate pair at letter {error.start}") from None
    if "\0" in text:
        raise Rejected("text with NUL", f"a NUL at letter {text.index(chr(0))}")
    return Text(text)


def want(entry: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """The value called `name`, of one of the types `kind`. Raises Rejected."""
    if not isinstance(entry, Mapping) or name not in entry:
        raise Rejected("field missing", f"{name!r} is missing")
    value = entry[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise Rejected("field of another type", f"{name!r} must be {_names(kinds)}, got {str(value)[:200]!r}")
    return value


def want_strings(entry: Any, name: str) -> list[str]:
    """The list of strings called `name`. Raises Rejected."""
    found = want(entry, name, list)
    if not all(isinstance(text, str) for text in found):
        raise Rejected("field of another type", f"{name!r} must be a list of strings")
    return found


def _names(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def fraction(name: str, value: float) -> None:
    """Raises ConfigError unless `value` is a share."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is a share from 0 to 1, it is {value}")
