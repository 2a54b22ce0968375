"""Packing: several Streams laid end to end in one row of fixed size, under a budget for each axis.

A row of T = 12 tokens and I = 3 images that holds conversations of 5 tokens, 1 image and 4 tokens, 2 images:

    tokens/segment_ids  1 1 1 1 1 2 2 2 2 0 0 0      images/segment_ids  1 2 2
    tokens/positions    0 1 2 3 4 0 1 2 3 0 0 0      images/positions    0 0 1

Nothing of one conversation may reach another: attention compares segment ids, positions start again, and
values that are indices into an axis (``Feature.refers``) move with the conversation they belong to.
"""

import bisect
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from umm_jax.conversation import Conversation, Image
from umm_jax.errors import DataError
from umm_jax.stream import Stream, StreamSpec, stream_length

Row = dict[str, dict[str, np.ndarray]]
Batch = dict[str, dict[str, np.ndarray]]
ADDED = ("segment_ids", "positions")


# --- rows and batches -----------------------------------------------------------------------------


def aligned(length: Mapping[str, int], align: Mapping[str, int]) -> dict[str, int]:
    """What a conversation takes of each axis where the next one begins at a multiple of `align`."""
    return {axis: -(-n // align.get(axis, 1)) * align.get(axis, 1) for axis, n in length.items()}


def pack_row(
    streams: Sequence[Stream], spec: StreamSpec, budget: Mapping[str, int], align: Mapping[str, int] = {}
) -> Row:
    """Lays `streams` end to end and pads each axis to its `budget`.

    Args:
        align: by axis, each stream begins at a multiple of this; what lies between is padding, of no segment.

    Raises:
        ValueError: they do not fit, or the spec itself names a feature in :data:`ADDED`.
    """
    lengths = [stream_length(stream) for stream in streams]
    taken = [aligned(length, align) for length in lengths]
    starts = {axis: np.cumsum([0] + [length[axis] for length in taken]) for axis in spec.axes}
    row: Row = {}
    for axis, features in spec.axes.items():
        room = budget[axis]
        if starts[axis][-1] > room:
            raise ValueError(f"{starts[axis][-1]} {axis} in a row of {room}")
        arrays = {name: np.zeros(room, np.int32) for name in ADDED}
        for name, feature in features.items():
            if name in ADDED:
                raise ValueError(f"{axis}/{name} is added by packing and cannot be a feature")
            array = np.full((room, *feature.shape), feature.pad, feature.dtype)
            for k, stream in enumerate(streams):
                values = stream[axis][name]
                if feature.refers is not None:
                    values = np.where(values < 0, values, values + starts[feature.refers][k])
                array[starts[axis][k] : starts[axis][k] + len(values)] = values
            arrays[name] = array
        for k, length in enumerate(lengths):
            place = slice(starts[axis][k], starts[axis][k] + length[axis])
            arrays["segment_ids"][place] = k + 1
            arrays["positions"][place] = np.arange(length[axis])
        row[axis] = arrays
    return row


def batch(rows: Sequence[Row]) -> Batch:
    """Stacks rows: [T, ...] -> [B, T, ...] and [I, ...] -> [B, I, ...]."""
    first = rows[0]
    return {
        axis: {name: np.stack([row[axis][name] for row in rows]) for name in features}
        for axis, features in first.items()
    }


# --- first fit ------------------------------------------------------------------------------------


@dataclass
class _Open:
    """A row being filled."""

    used: Counter[str] = field(default_factory=Counter)
    items: list[Any] = field(default_factory=list)


class FirstFit:
    """Puts each item into the first of at most `bins` open rows that has room on every axis of the `budget`.

    When none has, the oldest open row is closed and a new one opened. Closing the fullest would fill rows
    one per cent better at few bins, but an awkward conversation could then wait for ever; so it leaves
    after at most `bins` closings. With `bins` 0 every item is a row of its own.
    """

    def __init__(self, budget: Mapping[str, int], bins: int):
        self.budget, self.bins = budget, bins
        self._rows: list[_Open] = []

    @property
    def rows(self) -> list[list[Any]]:
        """The items of the open rows, in order."""
        return [row.items for row in self._rows]

    def add(self, item: Any, length: dict[str, int]) -> list[Any] | None:
        """Places an item; returns the items of the row that had to be closed for it, if any."""
        if not self.bins:
            return [item]
        closed = None
        row = self._choose([row for row in self._rows if self._fits(row, length)], length)
        if row is None:
            if len(self._rows) == self.bins:
                closed = self._rows.pop(0).items
            row = _Open()
            self._rows.append(row)
        row.items.append(item)
        row.used.update(length)
        return closed

    def restore(self, rows: Sequence[Sequence[tuple[Any, dict[str, int]]]]) -> None:
        """Sets the open rows from the (item, length) pairs they hold."""
        self._rows = []
        for pairs in rows:
            used: Counter[str] = Counter()
            for _, length in pairs:
                used.update(length)
            self._rows.append(_Open(used, [item for item, _ in pairs]))

    def _choose(self, rows: list[_Open], length: dict[str, int]) -> _Open | None:
        """Of the rows with room. The fullest instead of the first gains nothing (docs/data.md)."""
        return rows[0] if rows else None

    def _fits(self, row: _Open, length: dict[str, int]) -> bool:
        return all(row.used[axis] + length[axis] <= room for axis, room in self.budget.items())


# --- conversations that are too long --------------------------------------------------------------


# What is left of the area of pictures, tried one after the other, where they are to be made smaller.
SHARES = (0.5, 0.25, 0.125, 0.0625)


def fit(
    conversation: Conversation,
    serializer: Callable[..., Stream],
    budget: Mapping[str, int],
    oversize: str,
) -> tuple[Stream | None, bool]:
    """Serializes a conversation within the budget of a row.

    Args:
        serializer: of (conversation), and for "smaller" of (conversation, share of its pictures' area).
        oversize: "refuse", "drop", "truncate": remove the last turns, down to one exchange of a user and an
            assistant turn at least, always ending with an assistant turn; "oldest": remove the oldest
            exchanges that no later turn depends on, never the last; or "smaller": of all pictures alike, see
            :data:`SHARES`.

    Returns:
        (stream, whether something was taken away); the stream is None when the conversation is left out.

    Raises:
        DataError: it is too long and `oversize` is "refuse".
    """
    stream = serializer(conversation)
    length = stream_length(stream)
    if _within(length, budget):
        return stream, False
    if oversize == "refuse":
        wide = [axis for axis, room in budget.items() if length[axis] > room]
        raise DataError(
            f"record {conversation.id} needs {' and '.join(f'{length[a]} {a}' for a in wide)}, a row holds "
            f"{' and '.join(str(budget[a]) for a in wide)}; raise "
            f"{' and '.join(budget_name(a) for a in wide)}, or set data.oversize to drop, truncate, oldest "
            "or smaller"
        )
    if oversize == "drop":
        return None, False
    if oversize == "smaller":
        made = (serializer(conversation, share) for share in SHARES)
        fitting = next((stream for stream in made if _within(stream_length(stream), budget)), None)
        return fitting, fitting is not None
    if oversize == "oldest":
        shorter = without_oldest(conversation)
        while shorter is not None:
            stream = serializer(shorter)
            if _within(stream_length(stream), budget):
                return stream, True
            shorter = without_oldest(shorter)
        return None, False
    # A longer beginning is never shorter as a stream, so the longest that fits can be bisected.
    ends = [
        t + 1
        for t, turn in enumerate(conversation.turns[:-1])
        if turn.role == "assistant" and any(earlier.role == "user" for earlier in conversation.turns[:t])
    ]

    def too_long(end: int) -> bool:
        return not _within(stream_length(serializer(beginning(conversation, end))), budget)

    count = bisect.bisect_left(ends, True, key=too_long)
    if not count:
        return None, False
    return serializer(beginning(conversation, ends[count - 1])), True


def beginning(conversation: Conversation, turns: int) -> Conversation:
    """The first `turns` turns, with the images they show."""
    kept = conversation.turns[:turns]
    shown = {part.ref for turn in kept for part in turn.parts if isinstance(part, Image)}
    images = {ref: image for ref, image in conversation.images.items() if ref in shown}
    return dataclasses.replace(conversation, turns=kept, images=images)


def without_oldest(conversation: Conversation) -> Conversation | None:
    """Without its oldest exchange that no later turn depends on; None where there is none but the last.

    An exchange is a user's turn and all up to the next one.
    """
    turns = conversation.turns
    starts = [i for i, turn in enumerate(turns) if turn.role == "user"]
    for start, end in zip(starts, starts[1:]):
        if any(start <= needed < end for turn in turns[end:] for needed in turn.depends_on):
            continue
        gone = end - start
        kept = [
            dataclasses.replace(turn, depends_on=tuple(n if n < start else n - gone for n in turn.depends_on))
            for i, turn in enumerate(turns)
            if not start <= i < end
        ]
        shorter = dataclasses.replace(conversation, turns=tuple(kept))
        return beginning(shorter, len(kept))
    return None


def budget_name(axis: str) -> str:
    """The config key of an axis' budget."""
    return f"data.{axis}" if axis in ("tokens", "images") else f"data.axes.{axis}"


def _within(length: Mapping[str, int], budget: Mapping[str, int]) -> bool:
    return all(length[axis] <= room for axis, room in budget.items())


# --- statistics -----------------------------------------------------------------------------------


@dataclass
class Fill:
    """How full the rows of the batches seen so far were."""

    rows: int = 0
    conversations: int = 0
    used: Counter[str] = field(default_factory=Counter)
    room: Counter[str] = field(default_factory=Counter)

    def add(self, seen: Batch) -> None:
        segments = seen["tokens"]["segment_ids"]
        self.rows += len(segments)
        self.conversations += int(segments.max(axis=-1).sum())
        for axis, features in seen.items():
            ids = features["segment_ids"]
            self.used[axis] += int(np.count_nonzero(ids))
            self.room[axis] += ids.size

    def summary(self) -> dict[str, float]:
        """Rows, conversations per row, and the filled fraction of each axis."""
        rows = max(self.rows, 1)
        rates = {f"{axis}_filled": self.used[axis] / max(room, 1) for axis, room in self.room.items()}
        return {"rows": self.rows, "conversations_per_row": self.conversations / rows, **rates}
