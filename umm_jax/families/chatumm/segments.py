"""The stream as a list of segments, and the arrays they make (docs/chatumm.md section 3). numpy only.

A segment is a text between its start and end token, the patches of an image for the vision encoder, or its
latent cells, clean or noised, these two between vision-start and vision-end::

    text     <start> w1 w2 w3 <end>          causal;  rotary positions p, p+1, ..., then p += n + 2
    vision   <vision> # # # # </vision>      full;    all at p, then p += 1
    latent   <vision> o o o o </vision>      full;    all at p, then p += 1
    noised   <vision> x x x x </vision>      noise;   all at p, and p stays: the clean copy takes the same

Cells `o` and `x` are generation tokens and lie on an axis of their own; all else are understanding tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from umm_jax.families.chatumm.pictures import places

# As in models/masks.py, which loads JAX and is not read by data workers.
CAUSAL, FULL, NOISE = 0, 1, 2
NO_LABEL = -1


class Special(NamedTuple):
    """Ids of the control tokens."""

    start: int
    end: int
    vision_start: int
    vision_end: int
    turn_end: int


@dataclass(frozen=True)
class Segment:
    """One run of tokens.

    Attributes:
        kind: "text", "vision" or "latent".
        ids: the words of a text; image: which image it shows, an index.
        learned: a text is predicted, word by word and its end; a latent is noised and its velocity predicted.
        label: id its last token is to predict: what comes next. None: nothing is asked there.
        droppable: may be left out where training leaves conditions out.
        continues: a latent in the split of the one before: the frames of a video, which share one time.
        delta: how far the positions move on after a frame; None is as drawn above.
    """

    kind: Literal["text", "vision", "latent"]
    ids: tuple[int, ...] = ()
    image: int = -1
    learned: bool = False
    label: int | None = None
    droppable: bool = False
    continues: bool = False
    delta: int | None = None


class Shown(NamedTuple):
    """Cells of an image: (rows, columns) of its latents and of its patches."""

    latent: tuple[int, int]
    vision: tuple[int, int]


class Grids(NamedTuple):
    """Sides of the tables of positions, and cells along the side of the canvas latents are made on."""

    latent: int
    vision: int
    canvas: int


@dataclass(frozen=True)
class Laid:
    """A stream's arrays beside its pictures.

    Attributes:
        tokens: of understanding tokens. `ids` (0 for a patch), `patch` (index into the patches, or -1),
            `label` (id to predict, or NO_LABEL), `weight` of that, `control` (1 where the label says what
            comes next), and the four below.
        latents: of generation tokens. `image` (index), `cell` (on the canvas), `place` (in the table),
            `time` (index of the image whose time it has, or -1: clean), `weight` of its error, and
            `rope` (rotary position), `order` (place in the stream), `split`, `mode` (see ``models.masks``).
        patches: `place` and `image`.
    """

    tokens: dict[str, np.ndarray]
    latents: dict[str, np.ndarray]
    patches: dict[str, np.ndarray]


def lay(
    segments: Sequence[Segment],
    shown: Sequence[Shown],
    special: Special,
    grids: Grids,
    *,
    dropped: Collection[int] = (),
    reweight: bool = False,
) -> Laid:
    """Lays segments out, without those whose index is in `dropped`.

    A dropped text takes no positions; a dropped image still takes its one.

    Args:
        shown: of each image. reweight: words of a text count 1 / sqrt(n) each in place of 1.
    """
    line = _Line(special)
    for index, segment in enumerate(segments):
        if index in dropped:
            line.rope += segment.kind != "text"
        elif segment.kind == "text":
            line.text(segment, reweight)
        elif segment.kind == "vision":
            line.vision(segment, places(*shown[segment.image].vision, grids.vision))
        else:
            rows, columns = shown[segment.image].latent
            cells = (np.arange(rows)[:, None] * grids.canvas + np.arange(columns)).reshape(-1)
            line.latent(segment, places(rows, columns, grids.latent), cells)
    return line.laid()


_TOKENS = ("ids", "patch", "label", "weight", "control", "rope", "order", "split", "mode")
_LATENTS = ("image", "cell", "place", "time", "weight", "rope", "order", "split", "mode")


class _Line:
    """A stream while it is being laid out: columns of each axis as lists of arrays."""

    def __init__(self, special: Special):
        self.special = special
        self.rope = self.order = 0
        self.split, self.mode, self.time = -1, CAUSAL, -1
        self._tokens: dict[str, list[np.ndarray]] = {name: [] for name in _TOKENS}
        self._latents: dict[str, list[np.ndarray]] = {name: [] for name in _LATENTS}
        self._patches: dict[str, list[np.ndarray]] = {"place": [], "image": []}
        self._patch_count = 0

    def text(self, segment: Segment, reweight: bool) -> None:
        self._open(CAUSAL)
        ids = np.array([self.special.start, *segment.ids, self.special.end])
        label, weight = np.full(len(ids), NO_LABEL), np.zeros(len(ids))
        if segment.learned:
            label[:-1] = ids[1:]
            weight[:-1] = (len(ids) - 1) ** -0.5 if reweight else 1.0
        self._end(label, weight, segment.label)
        self._understood(ids, np.arange(self.rope, self.rope + len(ids)), label, weight)
        self.rope += len(ids)

    def vision(self, segment: Segment, place: np.ndarray) -> None:
        self._open(FULL)
        patch = self._patch_count + np.arange(len(place))
        self._patch_count += len(place)
        self._patches["place"].append(place)
        self._patches["image"].append(np.full(len(place), segment.image))
        ids = np.array([self.special.vision_start, *[0] * len(place), self.special.vision_end])
        label, weight = np.full(len(ids), NO_LABEL), np.zeros(len(ids))
        self._end(label, weight, segment.label)
        self._understood(ids, self.rope, label, weight, np.array([-1, *patch, -1]))
        self.rope += 1

    def latent(self, segment: Segment, place: np.ndarray, cell: np.ndarray) -> None:
        if not segment.continues:
            self._open(NOISE if segment.learned and segment.delta is None else FULL)
            self.time = segment.image if segment.learned else -1
        none = np.array([NO_LABEL])
        self._understood(np.array([self.special.vision_start]), self.rope, none, np.zeros(1))
        self._add(
            self._latents,
            len(place),
            image=segment.image,
            cell=cell,
            place=place,
            time=self.time if segment.learned else -1,
            weight=float(segment.learned),
            rope=self.rope,
        )
        label, weight = none.copy(), np.zeros(1)
        self._end(label, weight, segment.label)
        self._understood(np.array([self.special.vision_end]), self.rope, label, weight)
        self.rope += segment.delta if segment.delta is not None else int(not segment.learned)

    def _open(self, mode: int) -> None:
        self.split, self.mode = self.split + 1, mode

    @staticmethod
    def _end(label: np.ndarray, weight: np.ndarray, next_id: int | None) -> None:
        if next_id is not None:
            label[-1], weight[-1] = next_id, 1.0

    def _understood(self, ids, rope, label, weight, patch=-1) -> None:
        # What a last token predicts is what comes next; an end that a text predicts is one of its words.
        control = np.zeros(len(ids), np.int32)
        control[-1] = label[-1] != NO_LABEL and ids[-1] in (self.special.end, self.special.vision_end)
        self._add(
            self._tokens,
            len(ids),
            ids=ids,
            patch=patch,
            label=label,
            weight=weight,
            control=control,
            rope=rope,
        )

    def _add(self, axis: dict[str, list[np.ndarray]], count: int, **columns) -> None:
        columns |= {"order": self.order + np.arange(count), "split": self.split, "mode": self.mode}
        for name, values in columns.items():
            axis[name].append(np.broadcast_to(np.asarray(values), count))
        self.order += count

    def laid(self) -> Laid:
        def whole(axis: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
            return {
                name: np.concatenate([np.zeros(0), *parts]).astype(
                    np.float32 if name == "weight" else np.int32
                )
                for name, parts in axis.items()
            }

        return Laid(whole(self._tokens), whole(self._latents), whole(self._patches))
