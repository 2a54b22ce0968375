"""Words and boxes: how families that write boxes in words spell them, and how they are found again.

``loc`` writes a box as four location pieces of the tokenizer between two tags, ``text`` as "(x1,y1)(x2,y2)"
in thousandths between the same tags, which are spelt in letters where the tokenizer has no pieces for them.
numpy and the standard library only.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from umm_jax.conversation import Box, Conversation, Part, TaskCall, Text
from umm_jax.errors import ConfigError, DataError

BoxFormat = Literal["loc", "text"]
SPELT_BOX = re.compile(r"<box>\s*\((\d{3}),(\d{3})\)\((\d{3}),(\d{3})\)\s*</box>")


def box_pieces(kind: BoxFormat, bins: int) -> list[str]:
    """The control pieces a tokenizer must hold."""
    return ["<box>", "</box>", *(f"<loc{i}>" for i in range(bins + 1))] if kind == "loc" else []


def in_letters(xyxy: Sequence[float]) -> str:
    """Corners in thousandths, as ``(012,000)(999,500)``."""
    x1, y1, x2, y2 = (min(int(v * 1000), 999) for v in xyxy)
    return f"({x1:03d},{y1:03d})({x2:03d},{y2:03d})"


class Boxes:
    """Parts of a text to ids and back.

    Args:
        tokenizer: see ``data.tokenizer.Tokenizer``.
        kind, bins: the spelling, and the number of steps of a side in ``loc``.
    """

    def __init__(self, tokenizer: Any, kind: BoxFormat, bins: int):
        self.tokenizer, self.kind, self.bins = tokenizer, kind, bins
        try:
            self.tags: tuple[int, int] | None = tokenizer.id("<box>"), tokenizer.id("</box>")
        except ConfigError:
            if kind == "loc":
                raise
            self.tags = None
        self.locs = [tokenizer.id(f"<loc{i}>") for i in range(bins + 1)] if kind == "loc" else []

    def encode(self, box: Box) -> list[int]:
        """Ids of a box."""
        if self.kind == "text":
            corners = in_letters(box.xyxy)
            if self.tags is None:
                return self.tokenizer.encode(f"<box>{corners}</box>")
            return [self.tags[0], *self.tokenizer.encode(corners), self.tags[1]]
        bins = [self.locs[round(v * self.bins)] for v in box.xyxy]
        return [self.tags[0], *bins, self.tags[1]]

    def words(self, conversation: Conversation, turn: int, part: Part, family: str) -> list[int]:
        """Ids of a part that is no picture.

        Raises:
            DataError: neither a text nor a box; names the record, the turn and the `family`.
        """
        if isinstance(part, Text):
            return self.tokenizer.encode(part.text)
        if isinstance(part, Box):
            return self.encode(part)
        kind = "task calls" if isinstance(part, TaskCall) else type(part).__name__
        raise DataError(
            f"record {conversation.id}, turn {turn}: the {family} family cannot express {kind}; "
            "train another family on this data, or remove these parts"
        )

    def parts(self, ids: Sequence[int], last_image: str | None) -> list[Part]:
        """Text and boxes of a run of ids. A malformed box stays text.

        Args:
            last_image: reference of the newest image, which boxes are about.
        """
        parts, run, i, ids = [], [], 0, [int(t) for t in ids]
        if self.kind == "text":
            return self._spelt_parts(self._decode(ids), last_image)

        def flush():
            text = self.tokenizer.decode(run).strip()
            if text:
                parts.append(Text(text))
            run.clear()

        while i < len(ids):
            box = self._box(ids[i : i + 6]) if last_image is not None else None
            if box is None:
                run.append(ids[i])
                i += 1
            else:
                flush()
                parts.append(Box(last_image, box))
                i += 6
        flush()
        return parts

    def _decode(self, ids: list[int]) -> str:
        """Text of `ids` with the box tags in letters, which as control pieces would decode to nothing."""
        if self.tags is None:
            return self.tokenizer.decode(ids)
        tags, text, start = dict(zip(self.tags, ("<box>", "</box>"))), "", 0
        for i, piece in enumerate(ids):
            if piece in tags:
                text += self.tokenizer.decode(ids[start:i]) + tags[piece]
                start = i + 1
        return text + self.tokenizer.decode(ids[start:])

    def _spelt_parts(self, text: str, last_image: str | None) -> list[Part]:
        parts, start = [], 0
        for found in SPELT_BOX.finditer(text) if last_image is not None else ():
            # The middle of what a number stands for: written again, it gives the same number.
            x1, y1, x2, y2 = ((int(v) + 0.5) / 1000 for v in found.groups())
            if x1 < x2 and y1 < y2:
                parts += [Text(text[start : found.start()].strip()), Box(last_image, (x1, y1, x2, y2))]
                start = found.end()
        parts.append(Text(text[start:].strip()))
        return [part for part in parts if part != Text("")]

    def _box(self, ids: list[int]) -> tuple[float, float, float, float] | None:
        if len(ids) < 6 or (ids[0], ids[5]) != self.tags:
            return None
        if any(t not in self.locs for t in ids[1:5]):
            return None
        x1, y1, x2, y2 = (self.locs.index(t) / self.bins for t in ids[1:5])
        return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
