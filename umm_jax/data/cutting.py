"""Cutting: documents end to end, cut into rows of T tokens and at most m images, as in MM-Interleaved.

Three documents from `<` to `>`, each with one image (`*` begins it, `#` are its slots) and words `.`, in rows
of T = 18; the eighteenth token lies in the second image::

    <*####....><....*####><*####......>       what is read, end to end

    <*####....><....                          whole = "image": up to the image that does not fit;
    *####><*####......                        the rest of its document follows, without a beginning

    <*####....>                               whole = "document": up to the document whose image does not
    <....*####><*####.                        fit; words after an image may still be cut off from it

Text is cut anywhere, an image never (docs/data.md). Like the rest of packing this knows
no family: where an image lies is read from the features that refer to it, where a document begins from the
Streams themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from umm_jax.conversation import Conversation
from umm_jax.errors import DataError
from umm_jax.stream import Stream, StreamSpec, stream_length

MERGED = (2, 8)  # documents that become one, at least and at most


@dataclass(frozen=True)
class Rule:
    """Where a row ends.

    Attributes:
        tokens, images: the most a row may hold.
        whole: what moves to the next row when an image does not fit: everything from that "image" on, or from
            the beginning of its "document" on.
    """

    tokens: int
    images: int
    whole: Literal["image", "document"] = "image"


@dataclass(frozen=True)
class Piece:
    """A document, or what an earlier row left of it.

    Attributes:
        n: number of the document. start: tokens of it that lie in earlier rows.
    """

    n: int
    start: int
    stream: Stream

    @property
    def length(self) -> int:
        return stream_length(self.stream)["tokens"]


# --- where rows end -------------------------------------------------------------------------------


def row_end(spans: Sequence[tuple[int, int]], documents: Sequence[int], rule: Rule) -> int:
    """The number of tokens in the next row.

    Args:
        spans: (first column, column after the last) of every image that is laid out.
        documents: columns where documents begin; what an earlier row left of one has no beginning.
    """
    end, budget = rule.tokens, rule.images
    inside = [stop for _, stop in spans if stop <= end]
    if len(inside) > budget:
        end = inside[budget - 1]
        if rule.whole == "document":
            # Text may follow the last image that fits, but not the beginning of the next one's document.
            following = spans[budget][0]
            begins = max((d for d in documents if d < following), default=-1)
            end = begins if begins > spans[budget - 1][0] else following
    for first, stop in spans:
        if first < end < stop:
            begins = max((d for d in documents if d <= first), default=0)
            # A document that already opens the row cannot be moved any further; its image can.
            end = begins if rule.whole == "document" and begins else first
    return end


class Cutter:
    """The documents read and not yet in a row. Holds at most one row and one document."""

    def __init__(self, spec: StreamSpec, rule: Rule):
        self.spec, self.rule = spec, rule
        self.pieces: list[Piece] = []

    @property
    def full(self) -> bool:
        """Whether there is enough for a row."""
        return sum(piece.length for piece in self.pieces) >= self.rule.tokens

    @property
    def place(self) -> tuple[int, int] | None:
        """(number, token) of the document where the next row begins, or None when nothing is held."""
        return (self.pieces[0].n, self.pieces[0].start) if self.pieces else None

    def add(self, n: int, stream: Stream, start: int = 0) -> None:
        """Adds document `n`, without its first `start` tokens, which an earlier row holds."""
        length = stream_length(stream)["tokens"]
        if start:
            stream = select(stream, self.spec, np.arange(start, length))
        self.pieces.append(Piece(n, start, stream))

    def row(self) -> list[Piece]:
        """Takes the next row out of what is held; there must be enough, see :attr:`full`."""
        spans, documents, offset = [], [], 0
        for piece in self.pieces:
            spans += [(a + offset, b + offset) for a, b in spans_of(piece.stream, self.spec)]
            documents += [] if piece.start else [offset]
            offset += piece.length
        room, row = row_end(spans, documents, self.rule), []
        while room:
            piece = self.pieces.pop(0)
            if piece.length > room:
                head, rest = (
                    select(piece.stream, self.spec, columns)
                    for columns in (np.arange(room), np.arange(room, piece.length))
                )
                self.pieces.insert(0, Piece(piece.n, piece.start + room, rest))
                piece = Piece(piece.n, piece.start, head)
            row.append(piece)
            room -= piece.length
        return row


# --- merging --------------------------------------------------------------------------------------


def merged(pieces: Sequence[Piece], spec: StreamSpec, size: int) -> list[Stream]:
    """Every `size` documents of a row as one: the delimiters between them are removed.

    That another picture follows is then learned as the end was before. What an earlier row left of a document
    stays by itself.
    """
    if spec.delimiters is None:
        raise ValueError("these streams have no delimiters to remove")
    feature, opening, closing = spec.delimiters
    left = [piece for piece in pieces if piece.start]
    whole = [piece for piece in pieces if not piece.start]
    result = [piece.stream for piece in left]
    for first in range(0, len(whole), size):
        group = whole[first : first + size]
        streams: list[Stream] = []
        for k, piece in enumerate(group):
            ids = piece.stream["tokens"][feature]
            begin = int(k > 0 and ids[0] == opening)
            end = len(ids) - int(k < len(group) - 1 and ids[-1] == closing)
            streams.append(select(piece.stream, spec, np.arange(begin, end)))
            for name, other in spec.tokens.items():
                if begin and other.loss:
                    ended = group[k - 1].stream["tokens"][name][-1]
                    values = streams[-1]["tokens"][name]
                    values[:1] = np.maximum(values[:1], ended)
        result.append(join(streams, spec))
    return result


# --- streams: parts, joins, weights -----------------------------------------------------------------


def spans_of(stream: Stream, spec: StreamSpec) -> list[tuple[int, int]]:
    """(first column, column after the last) of what refers to an image or is referred to by it, for each."""
    count = stream_length(stream)["images"]
    first, stop = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)

    def extend(images: np.ndarray, columns: np.ndarray) -> None:
        np.minimum.at(first, images, columns)
        np.maximum.at(stop, images, columns + 1)

    for name, feature in spec.tokens.items():
        if feature.refers == "images":
            columns = np.flatnonzero(stream["tokens"][name] >= 0)
            extend(stream["tokens"][name][columns], columns)
    for name, feature in spec.images.items():
        if feature.refers == "tokens":
            images = np.flatnonzero(stream["images"][name] >= 0)
            extend(images, stream["images"][name][images])
    if (stop == 0).any():
        raise ValueError(f"image {int(np.argmin(stop))} has no place among the tokens")
    return list(zip(first.tolist(), stop.tolist()))


def select(stream: Stream, spec: StreamSpec, columns: np.ndarray) -> Stream:
    """The tokens at the ascending `columns`, and the images that lie among them.

    Raises:
        ValueError: an image lies partly among them.
    """
    length = stream_length(stream)
    moved = {axis: np.full(length[axis] + 1, -1) for axis in spec.axes}  # and one more, which -1 finds
    moved["tokens"][columns] = np.arange(len(columns))
    kept = []
    for image, (first, stop) in enumerate(spans_of(stream, spec)):
        there = moved["tokens"][first:stop] >= 0
        if there.any() != there.all():
            raise ValueError(f"image {image} would be cut")
        if there.all():
            kept.append(image)
    moved["images"][kept] = np.arange(len(kept))
    taken = {"tokens": columns, "images": np.array(kept, np.int64)}
    result: Stream = {}
    for axis, features in spec.axes.items():
        result[axis] = {}
        for name, feature in features.items():
            values = stream[axis][name][taken[axis]]
            if feature.refers is not None:
                values = np.where(values < 0, values, moved[feature.refers][values]).astype(values.dtype)
            result[axis][name] = values
    return result


def join(streams: Sequence[Stream], spec: StreamSpec) -> Stream:
    """Streams end to end as one."""
    lengths = [stream_length(stream) for stream in streams]
    result: Stream = {}
    for axis, features in spec.axes.items():
        result[axis] = {}
        for name, feature in features.items():
            arrays, offset = [], 0
            for stream, length in zip(streams, lengths):
                values = stream[axis][name]
                if feature.refers is not None:
                    values = np.where(values < 0, values, values + offset).astype(values.dtype)
                    offset += length[feature.refers]
                arrays.append(values)
            result[axis][name] = np.concatenate(arrays)
    return result


def after_image(stream: Stream, spec: StreamSpec) -> Stream:
    """Without loss on the tokens before the first image, which nothing tells what they are about."""
    length = stream_length(stream)["tokens"]
    seen = np.arange(length) >= min((first for first, _ in spans_of(stream, spec)), default=length)
    tokens = {
        name: np.where(seen, stream["tokens"][name], 0).astype(feature.dtype)
        if feature.loss
        else stream["tokens"][name]
        for name, feature in spec.tokens.items()
    }
    return {**stream, "tokens": tokens}


def shorten(stream: Stream, spec: StreamSpec, tokens: int) -> Stream | None:
    """A document of at most `tokens`: without its end, or without text before its last image.

    As the release treats a caption that is too long. None where no such part holds its images whole.
    """
    length = stream_length(stream)["tokens"]
    if length <= tokens:
        return stream
    spans = spans_of(stream, spec)
    tail = 0 if all(stop <= tokens for _, stop in spans) else length - spans[-1][0]
    if tail > tokens:
        return None
    columns = np.concatenate([np.arange(tokens - tail), np.arange(length - tail, length)])
    try:
        return select(stream, spec, columns)
    except ValueError:
        return None


def fit_document(
    conversation: Conversation,
    serializer: Callable[[Conversation], Stream],
    spec: StreamSpec,
    rule: Rule,
    oversize: str,
) -> tuple[Stream | None, bool]:
    """As :func:`packing.fit`, where rows are cut: only documents that must stay whole can be too long."""
    stream = serializer(conversation)
    longest = max((stop - first for first, stop in spans_of(stream, spec)), default=0)
    if longest > rule.tokens:
        raise DataError(
            f"record {conversation.id}: an image takes {longest} tokens, a row holds {rule.tokens}; "
            "raise data.tokens"
        )
    length = stream_length(stream)["tokens"]
    if rule.whole == "image" or length <= rule.tokens:
        return stream, False
    if oversize == "refuse":
        raise DataError(
            f"record {conversation.id} needs {length} tokens, a row holds {rule.tokens}; raise data.tokens, "
            "set the source's cut to image, or data.oversize to drop or truncate"
        )
    short = shorten(stream, spec, rule.tokens) if oversize == "truncate" else None
    return short, short is not None
