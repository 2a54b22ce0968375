"""The Conversation: the one record that importers, synthesis, training, replies and evaluation speak.

    Conversation ── turns ── parts (Text, Image, Mask, Box, TaskCall)
                 └─ images by name; parts refer to them, so an image shown twice is stored once

A record is an immutable value. It is read and written as JSON (images in base64, for people and tools) and
as msgpack (images as bytes, for shards); both round trip exactly. :meth:`Conversation.validate` is the one
place that says what a usable record is. Turns, parts and runs are counted from 0 in every message.
"""

import base64
import binascii
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgpack
import numpy as np
import PIL.Image

from umm_jax.errors import DataError

_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
SCHEMA = 1  # raised whenever a record of an earlier release could no longer be read
ROLES = ("system", "user", "assistant", "document")
LEARNED = ("assistant", "document")  # the roles whose turns may have `loss`


class RecordError(DataError):
    """A conversation that cannot be used; the message names the record, turn and part."""


# --- parts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Image:
    """Shows the image stored in ``Conversation.images`` under `ref`."""

    kind: ClassVar[str] = "image"
    ref: str


@dataclass(frozen=True)
class Mask:
    """A region of image `of`: `size` (h, w) and row-major run lengths `rle`, zeros first."""

    kind: ClassVar[str] = "mask"
    of: str
    size: tuple[int, int]
    rle: tuple[int, ...]
    label: str | None = None

    @classmethod
    def from_array(cls, of: str, array: np.ndarray, label: str | None = None) -> "Mask":
        """From bool[h, w]."""
        array = np.asarray(array, bool)
        flat = array.ravel()
        edges = np.flatnonzero(np.diff(flat, prepend=False))
        runs = np.diff(edges, prepend=0, append=flat.size)
        return cls(of, tuple(array.shape), tuple(runs.tolist()), label)

    def array(self) -> np.ndarray:
        """bool[h, w]."""
        values = np.arange(len(self.rle)) % 2 == 1
        return np.repeat(values, self.rle).reshape(self.size)


@dataclass(frozen=True)
class Box:
    """A rectangle (x0, y0, x1, y1) of image `of`, in fractions of its width and height."""

    kind: ClassVar[str] = "box"
    of: str
    xyxy: tuple[float, float, float, float]
    label: str | None = None


@dataclass(frozen=True)
class TaskCall:
    """A call of an expert by the router's name for it."""

    kind: ClassVar[str] = "task"
    name: str
    args: Mapping[str, str | int | float | bool]


Part = Text | Image | Mask | Box | TaskCall
PARTS = {cls.kind: cls for cls in (Text, Image, Mask, Box, TaskCall)}


def spell(part: Part) -> str:
    """A part in words, for people: text as it is, anything else in square brackets."""
    name = f" {part.label}" if isinstance(part, (Mask, Box)) and part.label else ""
    match part:
        case Text(text):
            return text
        case Image(ref):
            return f"[image {ref}]"
        case Mask(of, size):
            return f"[mask{name} of {of}: {int(part.array().sum())} of {size[0] * size[1]} pixels]"
        case Box(of, xyxy):
            return f"[box{name} of {of}: {', '.join(f'{v:.3f}' for v in xyxy)}]"
        case TaskCall(name, args):
            return f"[task {name}({', '.join(f'{k}={v!r}' for k, v in args.items())})]"


# --- turns, images, conversations -----------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: "system", "user" or "assistant"; or "document", for a text with pictures that is nobody's
            message: a web page, a picture and its caption. A document is the only turn of its record.
        loss: whether training learns to produce this turn (assistant turns and documents only).
        depends_on: indices of the earlier turns one must have seen to answer this one.
        op: the operation the turn performs, e.g. "edit"; free, for statistics and evaluation.
        meta: anything further, as plain JSON values.
    """

    role: str
    parts: tuple[Part, ...]
    loss: bool = False
    depends_on: tuple[int, ...] = ()
    op: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Its text parts alone."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text)).strip()

    def spelt(self) -> str:
        """Its parts in words, see :func:`spell`, pictures left out."""
        return " ".join(spell(part) for part in self.parts if not isinstance(part, Image))


@dataclass(frozen=True)
class ImageData:
    """An encoded image (PNG, JPEG, ...) with its size in pixels."""

    data: bytes
    mime: str
    width: int
    height: int

    @classmethod
    def from_array(cls, array: np.ndarray) -> "ImageData":
        """PNG of uint8[h, w, 3]."""
        array = np.asarray(array)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise ValueError(f"expected uint8[h, w, 3], got {array.dtype}{list(array.shape)}")
        buffer = io.BytesIO()
        # Level 1: nearly as small as the default on flat drawings, and several times quicker to write.
        PIL.Image.fromarray(array).save(buffer, "PNG", compress_level=1)
        return cls(buffer.getvalue(), "image/png", array.shape[1], array.shape[0])

    def picture(self, least: int | None = None) -> PIL.Image.Image:
        """Decodes to a Pillow image in RGB.

        With `least`, a JPEG may come at a half, a quarter or an eighth of its size, as long as no side falls
        below: its decoder gets there from fewer coefficients, and nearly as a box filter would.

        Raises:
            DataError: the bytes are damaged.
        """
        try:
            with PIL.Image.open(io.BytesIO(self.data)) as image:
                if least is not None:
                    image.draft("RGB", (least, least))
                image.load()
                return image if image.mode == "RGB" else image.convert("RGB")
        except Exception as error:  # Pillow raises many kinds, all of which mean the same here
            raise DataError(f"image of {len(self.data)} bytes cannot be decoded: {error}") from None

    def array(self) -> np.ndarray:
        """Decodes to uint8[h, w, 3]. Raises DataError if the bytes are damaged."""
        return np.array(self.picture())

    @property
    def sha256(self) -> str:
        """Hash of the encoded bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Conversation:
    """Turns, the images they show, and where the record comes from.

    Attributes:
        source, license: where it comes from and under which terms it may be used.
        language: BCP 47 tag. split: "train", or the name of a held-out set.
        provenance: what was done to it, oldest first.
        meta: anything further, as plain JSON values.
    """

    id: str
    turns: tuple[Turn, ...]
    images: Mapping[str, ImageData] = field(default_factory=dict)
    source: str = ""
    license: str = ""
    language: str = "en"
    split: str = "train"
    provenance: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def with_turn(self, turn: Turn, images: Mapping[str, ImageData] | None = None) -> "Conversation":
        """This conversation continued by `turn`, with the images it brings."""
        images = images or {}
        for ref, image in images.items():
            if self.images.get(ref, image) != image:
                raise RecordError(f"record {self.id}: another image named {ref!r} is already there")
        return dataclasses.replace(self, turns=(*self.turns, turn), images={**self.images, **images})

    def check_unanswered(self) -> None:
        """Raises DataError unless it ends with a turn to be answered: what a reply needs."""
        if not self.turns or self.turns[-1].role == "assistant" or not self.turns[-1].parts:
            raise DataError(f"record {self.id}: a reply needs a conversation that ends with a user turn")

    def validate(self) -> None:
        """Raises RecordError, naming record, turn and part, unless the record can be used as it stands."""
        for where, problem in _problems(self):
            raise RecordError(f"record {self.id}{where}: {problem}")

    # --- reading and writing ---

    def to_json(self) -> str:
        """One line of JSON, images in base64."""
        plain = self._to_plain()
        for image in plain["images"].values():
            image["data"] = base64.b64encode(image["data"]).decode()
        try:
            return json.dumps(plain, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RecordError(f"record {self.id}: cannot be written as JSON: {error}") from None

    @classmethod
    def from_json(cls, text: str | bytes) -> "Conversation":
        """Raises RecordError when it is no conversation of this schema. Does not validate."""
        try:
            plain = json.loads(text, object_pairs_hook=_unique)
        except ValueError as error:
            raise RecordError(f"not a JSON conversation: {error}") from None
        return cls._from_plain(plain, _decode_base64)

    def to_msgpack(self) -> bytes:
        try:
            return msgpack.packb(self._to_plain())
        except (TypeError, ValueError, OverflowError) as error:
            raise RecordError(f"record {self.id}: cannot be written as msgpack: {error}") from None

    @classmethod
    def from_msgpack(cls, data: bytes) -> "Conversation":
        """Raises RecordError when it is no conversation of this schema. Does not validate."""
        try:
            plain = msgpack.unpackb(data)
        except Exception as error:  # msgpack raises many kinds for damaged bytes
            raise RecordError(f"not a msgpack conversation: {error or type(error).__name__}") from None
        return cls._from_plain(plain, lambda data: data)

    def _to_plain(self) -> dict[str, Any]:
        turns = []
        for turn in self.turns:
            parts = [{"kind": part.kind, **vars(part)} for part in turn.parts]
            turns.append({**vars(turn), "parts": parts})
        images = {ref: dict(vars(image)) for ref, image in self.images.items()}
        return {"schema": SCHEMA, **vars(self), "turns": turns, "images": images}

    @classmethod
    def _from_plain(cls, plain: Any, decode) -> "Conversation":
        if not isinstance(plain, Mapping) or "schema" not in plain:
            raise RecordError("not a conversation: no schema version")
        name = f"record {plain.get('id', '?')}"
        if plain["schema"] != SCHEMA:
            raise RecordError(
                f"{name}: written with schema {plain['schema']}, this release reads schema {SCHEMA}; "
                "write it again with this release, or read it with the release that wrote it"
            )
        where = ""
        try:
            turns = []
            for t, turn in enumerate(plain["turns"]):
                where = f", turn {t}"
                parts = []
                for p, part in enumerate(turn["parts"]):
                    where = f", turn {t}, part {p}"
                    parts.append(_part(part))
                where = f", turn {t}"
                turns.append(Turn(**{**turn, "parts": tuple(parts), "depends_on": tuple(turn["depends_on"])}))
            images = {}
            for ref, image in plain["images"].items():
                where = f", image {ref!r}"
                images[ref] = ImageData(**{**image, "data": decode(image["data"])})
            where = ""
            rest = {key: value for key, value in plain.items() if key != "schema"}
            rest |= {"turns": tuple(turns), "images": images, "provenance": tuple(plain["provenance"])}
            return cls(**rest)
        except KeyError as error:
            raise RecordError(f"{name}{where}: {error.args[0]!r} is missing") from None
        except (TypeError, ValueError, AttributeError) as error:
            message = str(error).replace("__init__() got an ", "")
            raise RecordError(f"{name}{where}: {message}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON would silently keep the last of two equal names: two images, say, of which one is lost."""
    built = dict(pairs)
    if len(built) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate name {next(n for n in names if names.count(n) > 1)!r}")
    return built


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"data is not base64: {error}") from None


def _part(plain: Mapping[str, Any]) -> Part:
    fields = dict(plain)
    kind = fields.pop("kind")
    if kind not in PARTS:
        raise ValueError(f"unknown part kind {kind!r}; known: {', '.join(PARTS)}")
    for name in ("size", "rle", "xyxy"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return PARTS[kind](**fields)


# --- validation -----------------------------------------------------------------------------------


def _problems(record: Conversation) -> Iterator[tuple[str, str]]:
    """(where, what) of everything wrong with the record, in reading order; lazy, so the first is cheap."""
    if not isinstance(record.id, str) or not record.id:
        yield "", f"id must be a non-empty string, got {record.id!r}"
    for name in ("source", "license", "language", "split"):
        if not isinstance(getattr(record, name), str):
            yield "", f"{name} must be a string, got {getattr(record, name)!r}"
    if not all(isinstance(step, str) for step in record.provenance):
        yield "", f"provenance must be strings, got {record.provenance!r}"
    yield from (("", problem) for problem in _not_plain(record.meta, "meta"))
    if not record.turns:
        yield "", "has no turns"
    if len(record.turns) > 1 and any(turn.role == "document" for turn in record.turns):
        yield "", "a document stands alone: it must be the only turn of its record"
    shown: set[str] = set()
    for t, turn in enumerate(record.turns):
        where = f", turn {t} ({turn.role})"
        yield from ((where, problem) for problem in _turn_problems(t, turn))
        for p, part in enumerate(turn.parts):
            here = f"{where}, part {p} ({getattr(part, 'kind', type(part).__name__)})"
            yield from ((here, problem) for problem in _part_problems(part, record.images, shown))
    for ref, image in record.images.items():
        where = f", image {ref!r}"
        yield from ((where, problem) for problem in _image_problems(image))
        if ref not in shown:
            yield where, "is stored but shown by no turn; remove it or add an image part"


def _turn_problems(t: int, turn: Turn) -> Iterator[str]:
    if turn.role not in ROLES:
        yield f"unknown role {turn.role!r}; known: {', '.join(ROLES)}"
    if all(isinstance(part, Text) and part.text == "" for part in turn.parts):
        yield "empty turn: it needs at least one part that is not empty text"
    if not isinstance(turn.loss, bool):
        yield f"loss must be true or false, got {turn.loss!r}"
    if turn.loss and turn.role not in LEARNED:
        yield f"loss on a {turn.role} turn; only {' and '.join(LEARNED)} turns are learned"
    if turn.op is not None and not isinstance(turn.op, str):
        yield f"op must be a string, got {turn.op!r}"
    for index in turn.depends_on:
        if not _is_int(index) or not 0 <= index < t:
            yield (
                f"depends_on {index!r} is no earlier turn; possible: 0 to {t - 1}"
                if t
                else (f"depends_on {index!r}: the first turn can depend on nothing")
            )
    if len(set(turn.depends_on)) < len(turn.depends_on):
        yield f"duplicate turns in depends_on {list(turn.depends_on)}"
    yield from _not_plain(turn.meta, "meta")


def _part_problems(part: Part, images: Mapping[str, ImageData], shown: set[str]) -> Iterator[str]:
    """`shown` gathers the images seen so far: a mask or box may not speak of one that comes later."""
    match part:
        case Text(text):
            if not isinstance(text, str):
                yield f"text must be a string, got {text!r}"
        case Image(ref):
            if not isinstance(ref, str) or ref not in images:
                yield f"unknown image {ref!r}; the record has {', '.join(map(repr, images)) or 'none'}"
            else:
                shown.add(ref)
        case Mask(of, size, rle):
            yield from _target_problems(of, part.label, images, shown)
            if len(size) != 2 or not all(_is_int(side) and side > 0 for side in size):
                yield f"size must be (height, width) in pixels, got {size}"
            elif not all(_is_int(run) and run >= 0 for run in rle) or 0 in rle[1:]:
                yield "run lengths must be positive integers (the first may be 0)"
            elif sum(rle) != size[0] * size[1]:
                pixels = size[0] * size[1]
                yield f"run lengths sum to {sum(rle)}, but {size[0]} x {size[1]} is {pixels} pixels"
        case Box(of, xyxy):
            yield from _target_problems(of, part.label, images, shown)
            if len(xyxy) != 4 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in xyxy):
                yield f"a box is four numbers x0, y0, x1, y1; got {xyxy}"
            elif not all(0 <= v <= 1 for v in xyxy):
                yield f"box {xyxy} leaves the image; coordinates are fractions from 0 to 1"
            elif xyxy[0] > xyxy[2] or xyxy[1] > xyxy[3]:
                yield f"box {xyxy} is reversed; the order is x0, y0, x1, y1 with x0 <= x1 and y0 <= y1"
        case TaskCall(name, args):
            if not isinstance(name, str) or not name:
                yield f"a task needs a name, got {name!r}"
            if not isinstance(args, Mapping):
                yield f"arguments must be given by name, got {args!r}"
            else:
                for key, value in args.items():
                    if not isinstance(key, str) or not isinstance(value, (str, int, float, bool)):
                        yield f"argument {key!r} must be a string, number or boolean, got {value!r}"
        case _:
            yield f"is no part; known: {', '.join(PARTS)}"


def _target_problems(of: str, label: Any, images: Mapping, shown: set[str]) -> Iterator[str]:
    if not isinstance(of, str) or of not in images:
        yield f"of unknown image {of!r}; the record has {', '.join(map(repr, images)) or 'none'}"
    elif of not in shown:
        yield f"of image {of!r}, which no part has shown before"
    if label is not None and not isinstance(label, str):
        yield f"label must be a string, got {label!r}"


def _image_problems(image: ImageData) -> Iterator[str]:
    """Reads the header only: a record is checked often, and pixels are decoded where they are used."""
    if image.mime == "image/png" and bytes(image.data[:16]) == _PNG_START:
        # The common case without Pillow, twenty times quicker: width and height come next.
        if (int.from_bytes(image.data[16:20]), int.from_bytes(image.data[20:24])) == (
            image.width,
            image.height,
        ):
            return
    try:
        with PIL.Image.open(io.BytesIO(image.data)) as opened:
            size, mime = opened.size, opened.get_format_mimetype()
    except Exception as error:  # Pillow raises many kinds, all of which mean the same here
        kind = "not a known image format" if isinstance(error, PIL.UnidentifiedImageError) else error
        yield f"{len(image.data)} bytes cannot be decoded: {kind}"
        return
    if size != (image.width, image.height):
        yield f"size is given as {image.width} x {image.height}, its bytes say {size[0]} x {size[1]}"
    if mime != image.mime:
        yield f"type is given as {image.mime!r}, its bytes say {mime!r}"


def _not_plain(value: Any, name: str) -> Iterator[str]:
    """What would not survive JSON: other types, tuples (they come back as lists), NaN, names not strings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"{name}: names must be strings, got {key!r}"
            yield from _not_plain(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _not_plain(inner, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name}: {value} cannot be written as JSON"
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        yield f"{name}: {type(value).__name__} is no plain JSON value (use str, int, float, bool, list, dict)"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
