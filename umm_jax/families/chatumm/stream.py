"""How ChatUMM lays a conversation out as one stream of text and images (docs/chatumm.md 3). numpy only.

::

    user        <start> draw a red circle <end>
    assistant   <start> here it is <end>  [noised picture]  [clean picture]  [its patches]
    user        <start> and a blue one <end> ...

A picture a user shows is clean latents, then patches; a picture the assistant draws is noised latents, on
which the loss lies, then the same two for whatever comes later. Nothing later sees the noised one. With
`control`, the last token of each piece says what the assistant does next: <start> it writes, <vision> it
draws, and the turn's end. So it is asked at the end of a user's turn and after every piece of its own::

    user   ... <end>     assistant  ... <end>   [noised] [clean] [patches </vision>]
            -> <start>                -> <vision>                          -> <turn end>
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from umm_jax.config import from_dict
from umm_jax.conversation import Conversation, Image, Mask, Part, Turn
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.boxes import Boxes, BoxFormat, box_pieces
from umm_jax.families.chatumm import pictures
from umm_jax.families.chatumm.pictures import FitConfig
from umm_jax.families.chatumm.segments import NO_LABEL, Grids, Segment, Shown, Special, lay
from umm_jax.stream import Feature, Stream, StreamSpec, beyond

BLANK = (
    127  # a canvas around a picture: nearest to the middle of the range, which compat="release" reads there
)


@dataclass(frozen=True)
class DropConfig:
    """What training leaves out, so that the model can draw without it and be guided by the difference.

    One of the first two at most happens to a conversation, with these probabilities. A conversation of one
    exchange, as BAGEL was trained on, loses each text, each picture's patches and each picture's latents by
    itself instead, where `single` is given. What carries loss is never left out.

    Attributes:
        text: the user's words of the last turn that is answered with a picture.
        images: all pictures before the last one drawn.
        single: (text, patches, latents) of a single exchange; None treats it like any other.
        latents: the latents of pictures shown in a turn that is answered in words alone.
    """

    text: float = 0.1
    images: float = 0.1
    single: tuple[float, float, float] | None = (0.1, 0.5, 0.1)
    latents: float = 0.0

    def __post_init__(self):
        shares = (self.text, self.images, self.latents, *(self.single or ()))
        if min(shares) < 0 or max(shares) > 1 or self.text + self.images > 1:
            raise ConfigError(f"drop: shares must lie in [0, 1], and text + images too; got {shares}")


@dataclass(frozen=True)
class LayoutConfig:
    """Spelling and sizes of the stream. The defaults are the release's.

    Attributes:
        start, end, vision_start, vision_end, turn_end: control pieces of the tokenizer.
        roles: "chatml" begins each text with the name of its role, "none" leaves roles to be seen.
        control: whether the model learns what to do next; BAGEL's release did not.
        latent, vision: sizes of pictures for the autoencoder (its stride is a latent token's side in pixels)
            and for the vision encoder (its stride is a patch).
        latent_grid, vision_grid: sides of the tables of positions.
        last_image: "read" shows the last picture of a stream to the model as all others, "drawn" ends with
            its noised copy, as BAGEL's data do where nothing follows.
        reweight: words of a text of n count 1 / sqrt(n) each.
        box_format, box_bins: see ``families.boxes``.
        drop: what training leaves out.
    """

    start: str = "<|im_start|>"
    end: str = "<|im_end|>"
    vision_start: str = "<|vision_start|>"
    vision_end: str = "<|vision_end|>"
    turn_end: str = "<|endoftext|>"
    roles: Literal["none", "chatml"] = "none"
    control: bool = True
    latent: FitConfig = FitConfig(1024, 512, 16)
    vision: FitConfig = FitConfig(980, 224, 14)
    latent_grid: int = 64
    vision_grid: int = 70
    last_image: Literal["read", "drawn"] = "read"
    reweight: bool = False
    box_format: BoxFormat = "text"
    box_bins: int = 24
    drop: DropConfig = field(default_factory=DropConfig)

    def __post_init__(self):
        for name in ("latent", "vision"):
            cells, grid = getattr(self, name).most_cells, getattr(self, f"{name}_grid")
            if cells > grid:
                raise ConfigError(
                    f"layout.{name}: pictures of up to {cells} cells a side, and {name}_grid={grid}: the "
                    "table of positions is too small"
                )

    @property
    def canvas(self) -> int:
        """Side in pixels of the canvas pictures lie on for the autoencoder."""
        return self.latent.longest

    @property
    def grids(self) -> Grids:
        return Grids(self.latent_grid, self.vision_grid, self.latent.most_cells)


def layout_of(model: Mapping[str, Any] | Any) -> LayoutConfig:
    """The layout of the `model` section of a run config (a mapping), or of the family's ModelConfig."""
    if isinstance(model, Mapping):
        return from_dict(LayoutConfig, model.get("layout", {}), "config.model.layout")
    return model.layout


def control_pieces(model: Mapping[str, Any] | Any) -> list[str]:
    """What a tokenizer trained for this family holds beside words: pieces that are never part of a text."""
    c = layout_of(model)
    pieces = [c.start, c.end, c.vision_start, c.vision_end, c.turn_end]
    return [*dict.fromkeys(pieces), *box_pieces(c.box_format, c.box_bins)]


def spec(model: Mapping[str, Any] | Any) -> StreamSpec:
    """The features of this family's Streams for a model, or for a layout alone."""
    c = model if isinstance(model, LayoutConfig) else layout_of(model)
    place = {"rope": Feature(), "order": Feature(), "split": Feature(), "mode": Feature()}
    return StreamSpec(
        tokens={
            "ids": Feature(),
            "patch": Feature(pad=-1, refers="patches"),
            "label": Feature(pad=NO_LABEL),
            "weight": Feature(dtype="float32", loss=True),
            "control": Feature(),
            **place,
        },
        images={"pixels": Feature((c.canvas, c.canvas, 3), "uint8"), "size": Feature((2,))},
        more={
            "latents": {
                "image": Feature(pad=-1, refers="images"),
                "cell": Feature(),
                "place": Feature(),
                "time": Feature(pad=-1, refers="images"),
                "weight": Feature(dtype="float32", loss=True),
                **place,
            },
            "patches": {
                "pixels": Feature((3 * c.vision.stride**2,), "uint8"),
                "place": Feature(),
                "image": Feature(pad=-1, refers="images"),
            },
        },
    )


class Serializer:
    """Conversation -> Stream, and reply tokens -> parts.

    Args:
        model: the `model` section of a run config (a mapping, of which only `layout` is read), or the
            family's ModelConfig.
        tokenizer: see ``data.tokenizer.Tokenizer``.
    """

    def __init__(self, model: Mapping[str, Any] | Any, tokenizer: Any):
        c = self.layout = layout_of(model)
        self.latent, self.vision = c.latent, c.vision  # to which sizes pictures are brought
        self.tokenizer = tokenizer
        self.special = Special(*map(tokenizer.id, (c.start, c.end, c.vision_start, c.vision_end, c.turn_end)))
        self.boxes = Boxes(tokenizer, c.box_format, c.box_bins)
        self.spec = spec(c)

    def smaller(self, share: float) -> "Serializer":
        """One that gives pictures so large a share of their area; tables of positions stay."""
        other = copy.copy(self)
        other.latent, other.vision = self.latent.smaller(share), self.vision.smaller(share)
        return other

    # --- conversation to stream -------------------------------------------------------------------

    def __call__(self, conversation: Conversation, rng: np.random.Generator | None = None) -> Stream:
        """The whole conversation, with loss where its turns say so.

        What training leaves out (see :class:`DropConfig`) is drawn from `rng`; nothing is without one.
        """
        segments, images = self.segments(conversation)
        dropped = self._dropped(conversation, segments, rng) if rng is not None else set()
        return self._stream([s for s, _ in segments], images, dropped)

    def prompt(self, conversation: Conversation) -> Stream:
        """What a reply continues: the conversation, up to the token that says what comes next."""
        segments, images = self.segments(conversation, history=True)
        return self._stream([s for s, _ in segments], images, set())

    def segments(
        self, conversation: Conversation, *, history: bool = False
    ) -> tuple[list[tuple[Segment, int]], list[np.ndarray]]:
        """(segments, each with the index of its turn; the pictures they show).

        As `history` nothing is learned, and so nothing is noised.
        """
        line = _Plan(self, conversation, history)
        for index, turn in enumerate(conversation.turns):
            line.turn(index, turn)
        return line.segments, line.pictures

    def _stream(self, segments: Sequence[Segment], images: Sequence[np.ndarray], dropped: set[int]) -> Stream:
        c = self.layout
        shown, large, small = [], [], []
        for pixels in images:
            fit = pictures.fitted(pixels, self.latent, len(images))
            seen = pictures.fitted(fit, self.vision, len(images))
            large.append(fit)
            small.append(pictures.patches(seen, c.vision.stride))
            shown.append(
                Shown(
                    (fit.shape[0] // c.latent.stride, fit.shape[1] // c.latent.stride),
                    (seen.shape[0] // c.vision.stride, seen.shape[1] // c.vision.stride),
                )
            )
        laid = lay(segments, shown, self.special, c.grids, dropped=dropped, reweight=c.reweight)
        # A picture's patches lie one after another, in the order in which its vision segments do.
        read = [s.image for i, s in enumerate(segments) if s.kind == "vision" and i not in dropped]
        width = 3 * c.vision.stride**2
        pixels = np.concatenate([np.zeros((0, width), np.uint8), *(small[image] for image in read)])
        return {
            "tokens": laid.tokens,
            "images": {
                "pixels": np.array([pictures.on_canvas(p, c.canvas, BLANK) for p in large], np.uint8).reshape(
                    -1, c.canvas, c.canvas, 3
                ),
                "size": np.array([p.shape[:2] for p in large], np.int32).reshape(-1, 2),
            },
            "latents": laid.latents,
            "patches": {"pixels": pixels, **laid.patches},
        }

    def _dropped(self, conversation: Conversation, segments, rng: np.random.Generator) -> set[int]:
        """Indices of the segments that training leaves out this time."""
        drop, turns = self.layout.drop, conversation.turns
        chance = rng.random(len(segments) + 1)
        drawn = [i for i, (s, _) in enumerate(segments) if s.kind == "latent" and s.learned]
        dropped: set[int] = set()
        asked = sum(turn.role == "user" for turn in turns)
        if drop.single is not None and drawn and asked == 1:
            shares = dict(zip(("text", "vision", "latent"), drop.single))
            dropped = {i for i, (s, _) in enumerate(segments) if s.droppable and chance[i] < shares[s.kind]}
        elif drawn and chance[-1] < drop.text:
            turn = segments[drawn[-1]][1] - 1
            dropped = {i for i, (s, t) in enumerate(segments) if t == turn and s.kind == "text"}
        elif drawn and chance[-1] < drop.text + drop.images:
            dropped = {i for i in range(drawn[-1]) if segments[i][0].kind != "text"}
        draws = {t for i in drawn for t in (segments[i][1] - 1, segments[i][1])}
        dropped |= {
            i
            for i, (s, t) in enumerate(segments)
            if s.kind == "latent" and t not in draws and chance[i] < drop.latents
        }
        return {i for i in dropped if segments[i][0].droppable}

    def never_written(self, vocab: int) -> np.ndarray:
        """True for the ids that are never words: bool [vocab]. Structure, padding, and what has no piece.

        Raises:
            ConfigError: the tokenizer has more pieces than the model's vocabulary.
        """
        never = beyond(self.tokenizer.size, vocab, "config.model.mixture.vocab")
        never[list(self.special)] = True
        for piece in ("<pad>", "<s>", "</s>"):  # which not every tokenizer has
            with contextlib.suppress(ConfigError):
                never[self.tokenizer.id(piece)] = True
        return never

    # --- reply tokens to parts --------------------------------------------------------------------

    def parts(self, ids: Sequence[int], last_image: str | None) -> list[Part]:
        """Text and boxes of a run of words. A malformed box stays text.

        Args:
            last_image: reference of the newest image, which boxes are about.
        """
        return self.boxes.parts(ids, last_image)


class _Plan:
    """The segments of a conversation while they are collected."""

    def __init__(self, serializer: Serializer, conversation: Conversation, history: bool):
        self.serializer, self.conversation, self.history = serializer, conversation, history
        self.segments: list[tuple[Segment, int]] = []
        self.pictures: list[np.ndarray] = []
        self._index: dict[str, int] = {}

    def turn(self, index: int, turn: Turn) -> None:
        c, turns = self.serializer.layout, self.conversation.turns
        units = self._units(turn)
        writes = turn.role in ("assistant", "document")
        learned = turn.loss and writes and not self.history
        following = turns[index + 1] if index + 1 < len(turns) else None
        answered = following is not None and following.role == "assistant" and following.loss
        answered &= not self.history
        if not units and answered and turn.role == "user":
            raise DataError(f"record {self.conversation.id}, turn {index}: a user turn without any part")
        for number, (drawn, parts) in enumerate(units):
            last = number == len(units) - 1
            label = None
            if c.control and learned:
                label = self._next(units[number + 1 :])
            elif c.control and last and answered and turn.role == "user":
                label = self._next(self._units(following))
            free = not learned and turn.role != "system"
            if not drawn:
                ids = [] if c.roles == "none" or writes and turn.role == "document" else self._role(turn)
                for part in parts:
                    ids += self.serializer.boxes.words(self.conversation, index, part, "chatumm")
                self._add(index, Segment("text", tuple(ids), learned=learned, label=label, droppable=free))
                continue
            picture = self._picture(parts[0], learned)
            if learned:
                self._add(index, Segment("latent", image=picture, learned=True))
                if c.last_image == "drawn" and last and index == len(turns) - 1:
                    continue
            self._add(index, Segment("latent", image=picture, droppable=True))
            self._add(index, Segment("vision", image=picture, label=label, droppable=True))

    def _units(self, turn: Turn) -> list[tuple[bool, list[Part]]]:
        """(whether it is a picture, its parts): texts as they follow one another, each picture by itself."""
        units: list[tuple[bool, list[Part]]] = []
        for part in turn.parts:
            drawn = isinstance(part, (Image, Mask))
            if drawn or not units or units[-1][0]:
                units.append((drawn, []))
            units[-1][1].append(part)
        return units

    def _next(self, units: Sequence[tuple[bool, list[Part]]]) -> int:
        """The control token that says what the assistant does, with these units before it."""
        special = self.serializer.special
        if not units:
            return special.turn_end
        return special.vision_start if units[0][0] else special.start

    def _role(self, turn: Turn) -> list[int]:
        return self.serializer.tokenizer.encode(f"{turn.role}\n")

    def _picture(self, part: Image | Mask, drawn: bool) -> int:
        """Its index. One that is drawn again is another, with a time of its own."""
        if isinstance(part, Mask):
            # A mask is shown, and answered, as a picture: white where it is set. The family has no mask head.
            self.pictures.append(np.repeat(part.array().astype(np.uint8)[..., None] * 255, 3, axis=-1))
            return len(self.pictures) - 1
        if drawn or part.ref not in self._index:
            self.pictures.append(self.conversation.images[part.ref].array())
            self._index[part.ref] = len(self.pictures) - 1
        return self._index[part.ref]

    def _add(self, turn: int, segment: Segment) -> None:
        self.segments.append((segment, turn))
