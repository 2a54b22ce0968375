"""How MM-Interleaved lays a conversation out as one stream (docs/mm_interleaved.md 1). numpy only, no JAX.

Each conversation is a causal sequence; every image, whoever shows it, takes one start-of-image token
(soi) and `image_tokens` slots::

    <bos> <user> draw a red circle <eot> <bot> ok <soi> [slot x n] <eot> <user> what ... <eot> <bot> red <eot>
    loss                                       1    1   0            1                              1    1

The soi of an image the assistant draws is a text target (the model decides to draw by predicting it), slots
never are. A slot holds the visual token of its image, so everything after an image can read it; the
picture itself is a target of the image decoder where `draw` is 1.

A document has no turns: its text and images run on, without blanks between the two, as the release was
trained. Everything is learned but what cannot be known, bos and a soi directly after it::

    <bos> a red circle <soi> [slot x n] next to it <eos>        <bos> <soi> [slot x n] a red circle <eos>
    loss  1 1   1      1                1    1  1  1                   0                1 1   1      1
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image as Pillow

from umm_jax.config import from_dict
from umm_jax.conversation import Conversation, Image, Mask, Part, Text, Turn
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.boxes import Boxes, BoxFormat, box_pieces
from umm_jax.stream import Feature, Stream, StreamSpec, beyond, is_piece

# Rows of the tables of relative image indices where a config does not say: the release's.
BACKBONE_IMAGES, DECODER_IMAGES = 50, 10


@dataclass(frozen=True)
class LayoutConfig:
    """Spelling and sizes of the stream. Defaults are the release's, except for the turn prefixes.

    Attributes:
        image_size, target_size: sides in pixels seen by the vision tower and drawn by the decoder.
        image_tokens: slots an image takes after its soi.
        soi, image: control pieces of the tokenizer for start of image and slot.
        soi_id: id of `soi`; the model adds a trained vector to its embedding, so it must know.
        prefixes: what opens a turn of each role: a control piece, or plain text.
        turn_end: control piece that closes a turn; the assistant learns to predict it.
        document_end: control piece that closes a document, which has no turns.
        scaled_decode: decode large JPEGs at a half, a quarter or an eighth where that is large enough: up to
            twice as many pictures a second, and pixels that differ a little from the release's.
        box_format: "loc" writes a box as four location pieces `<locK>` of `box_bins` + 1 bins between
            <box> and </box>; "text" as the release does, "(x1,y1)(x2,y2)" in thousandths between the same
            tags, which are spelt in letters where the tokenizer has no pieces for them.
    """

    image_size: int = 224
    target_size: int = 512
    image_tokens: int = 64
    soi: str = "<soi>"
    image: str = "<image>"
    soi_id: int = 32000
    prefixes: dict[str, str] = field(
        default_factory=lambda: {"system": "<user>", "user": "<user>", "assistant": "<bot>"}
    )
    turn_end: str = "<eot>"
    document_end: str = "</s>"
    scaled_decode: bool = False
    box_format: BoxFormat = "loc"
    box_bins: int = 24

    def __post_init__(self):
        if min(self.image_size, self.target_size, self.image_tokens, self.box_bins) < 1:
            raise ConfigError("image_size, target_size, image_tokens and box_bins must be positive")


def layout_of(model: Mapping[str, Any] | Any) -> LayoutConfig:
    """The layout of a `model` section (a mapping, of which only `layout` is read) or of a ModelConfig."""
    if isinstance(model, Mapping):
        return from_dict(LayoutConfig, model.get("layout", {}), "config.model.layout")
    return model.layout


def control_pieces(model: Mapping[str, Any] | Any) -> list[str]:
    """What a tokenizer trained for this family holds beside words: pieces that are never part of a text."""
    layout = layout_of(model)
    pieces = [text for text in layout.prefixes.values() if is_piece(text)]
    pieces += [layout.turn_end, layout.soi, layout.image]
    pieces += box_pieces(layout.box_format, layout.box_bins)
    return list(dict.fromkeys(pieces))


def spec(model: Mapping[str, Any] | Any) -> StreamSpec:
    """The features of this family's Streams for a model, or for a layout alone; no delimiters."""
    layout = model if isinstance(model, LayoutConfig) else layout_of(model)
    side = layout.image_size
    images = {
        "pixels": Feature((side, side, 3), "uint8"),
        "soi": Feature(refers="tokens"),
        "draw": Feature(dtype="float32"),
    }
    if layout.target_size != side:
        images["target"] = Feature((layout.target_size, layout.target_size, 3), "uint8")
    return StreamSpec(
        tokens={
            "ids": Feature(),
            "weight": Feature(dtype="float32", loss=True),
            "image": Feature(pad=-1, refers="images"),
            "slot": Feature(),
        },
        images=images,
    )


class Serializer:
    """Conversation -> Stream, and reply tokens -> parts.

    Args:
        model: the `model` section of a run config (a mapping, of which only `layout` is read), or the
            family's ModelConfig.
        tokenizer: see ``data.tokenizer.Tokenizer``.
    """

    def __init__(self, model: Mapping[str, Any] | Any, tokenizer: Any):
        layout = self.layout = layout_of(model)
        self.most_images = _most_images_of(model) if isinstance(model, Mapping) else model.most_images
        self.tokenizer = tokenizer
        self.bos = tokenizer.id("<s>")
        self.soi, self.slot = tokenizer.id(layout.soi), tokenizer.id(layout.image)
        self.end, self.document_end = tokenizer.id(layout.turn_end), tokenizer.id(layout.document_end)
        if self.soi != layout.soi_id:
            raise ConfigError(
                f"the tokenizer gives {layout.soi} the id {self.soi}, config.model.layout.soi_id says "
                f"{layout.soi_id}; set it to {self.soi}"
            )
        self.prefix = {role: self._prefix(text) for role, text in layout.prefixes.items()}
        self.boxes = Boxes(tokenizer, layout.box_format, layout.box_bins)
        delimiters = ("ids", self.bos, self.document_end)
        self.spec = replace(spec(layout), delimiters=delimiters)

    def _prefix(self, text: str) -> list[int]:
        if is_piece(text):
            return [self.tokenizer.id(text)]
        return self.tokenizer.encode(text)

    # --- conversation to stream -------------------------------------------------------------------

    def __call__(self, conversation: Conversation, rng: np.random.Generator | None = None) -> Stream:
        """The whole conversation, with loss where its turns say so; nothing is left out at random."""
        return self._layout(conversation, reply=False)

    def prompt(self, conversation: Conversation) -> Stream:
        """What a reply continues: the conversation and the opening of an assistant turn; an open document."""
        return self._layout(conversation, reply=True)

    def _layout(self, conversation: Conversation, reply: bool) -> Stream:
        line = _Line(self.soi, self.slot, self.layout.image_tokens)
        line.put([self.bos], False)
        for index, turn in enumerate(conversation.turns):
            if turn.role == "document":
                self._document(line, conversation, turn)
                if not reply:
                    line.put([self.document_end], turn.loss)
                return self._stream(line, conversation)
            loss = turn.loss and turn.role == "assistant"
            line.put(self.prefix[turn.role], False)
            for part in turn.parts:
                if isinstance(part, (Image, Mask)):
                    line.show(self._picture(conversation, part), loss, soi_loss=loss)
                else:
                    line.put(self.boxes.words(conversation, index, part, "mm_interleaved"), loss)
            line.put([self.end], loss)
        if reply:
            line.put(self.prefix["assistant"], False)
        return self._stream(line, conversation)

    def _document(self, line: "_Line", conversation: Conversation, turn: Turn) -> None:
        """Its parts, without blanks where text touches an image."""
        groups = [(kind, list(parts)) for kind, parts in itertools.groupby(turn.parts, type)]
        pictures = [issubclass(kind, (Image, Mask)) for kind, _ in groups]
        before, after = [False, *pictures[:-1]], [*pictures[1:], False]
        for (kind, parts), image_before, image_after in zip(groups, before, after):
            if issubclass(kind, (Image, Mask)):
                for part in parts:
                    # Whether a document begins with a picture is nothing a model could know.
                    line.show(self._picture(conversation, part), turn.loss, turn.loss and len(line.ids) > 1)
            elif kind is Text:
                text = "".join(part.text for part in parts)
                text = text.lstrip() if image_before else text
                line.put(self.tokenizer.encode(text.rstrip() if image_after else text), turn.loss)
            else:
                for part in parts:
                    line.put(self.boxes.words(conversation, 0, part, "mm_interleaved"), turn.loss)

    def _stream(self, line: "_Line", conversation: Conversation) -> Stream:
        if self.most_images is not None and len(line.pictures) > self.most_images:
            raise DataError(
                f"record {conversation.id}: {len(line.pictures)} images, and this model looks back at "
                f"{self.most_images} at most (max_images of its synchronizers); shorten the conversation, or "
                "train a model with larger tables"
            )
        side = self.layout.image_size
        images = {
            "pixels": np.array([fit(p, side) for p in line.pictures], np.uint8).reshape(-1, side, side, 3),
            "soi": np.array(line.soi_at, np.int32),
            "draw": np.array(line.draw, np.float32),
        }
        if "target" in self.spec.images:
            large = self.layout.target_size
            targets = [fit(p, large) for p in line.pictures]
            images["target"] = np.array(targets, np.uint8).reshape(-1, large, large, 3)
        tokens = {
            "ids": np.array(line.ids, np.int32),
            "weight": np.array(line.weight, np.float32),
            "image": np.array(line.image, np.int32),
            "slot": np.array(line.slot, np.int32),
        }
        return {"tokens": tokens, "images": images}

    def _picture(self, conversation: Conversation, part: Image | Mask) -> Pillow.Image | np.ndarray:
        if isinstance(part, Image):
            sides = (self.layout.image_size, self.layout.target_size)
            return conversation.images[part.ref].picture(max(sides) if self.layout.scaled_decode else None)
        # A mask is shown, and answered, as a picture: white where it is set. The family has no mask head.
        return np.repeat(part.array().astype(np.uint8)[..., None] * 255, 3, axis=-1)

    def never_written(self, vocab: int) -> np.ndarray:
        """True for the ids a reply cannot contain: bool [vocab]. They open turns, pad, or stand for nothing.

        Raises:
            ConfigError: the tokenizer has more pieces than the model's vocabulary.
        """
        never = beyond(self.tokenizer.size, vocab, "config.model.backbone.vocab")
        structure = [self.tokenizer.id(text) for text in self.layout.prefixes.values() if is_piece(text)]
        never[[0, self.bos, self.slot, *structure]] = True
        return never

    # --- reply tokens to parts --------------------------------------------------------------------

    def parts(self, ids: Sequence[int], last_image: str | None) -> list[Part]:
        """Text and boxes of a run of reply tokens without images. A malformed box stays text.

        Args:
            last_image: reference of the newest image, which boxes are about.
        """
        return self.boxes.parts(ids, last_image)


def most_images(backbone: int | None, decoder: int | None) -> int | None:
    """The most images of a conversation for tables of so many relative indices; None: there is no bound.

    In a language model the newest image sees itself, and index 0 stands for none; a decoder looks at the
    earlier images only.
    """
    bounds = [] if backbone is None else [backbone - 1]
    bounds += [] if decoder is None else [decoder]
    return min(bounds, default=None)


def _most_images_of(model: Mapping[str, Any]) -> int | None:
    """:func:`most_images` of a raw `model` section, whose defaults are the release's."""
    backbone, decoder = model.get("backbone", {}).get("synchronizer", {}), model.get("unet_sync", {})
    looks = model.get("decoder_images") == "visible" and decoder is not None
    return most_images(
        None if backbone is None else backbone.get("max_images", BACKBONE_IMAGES),
        decoder.get("max_images", DECODER_IMAGES) if looks else None,
    )


class _Line:
    """A stream while it is being laid out, one list a feature."""

    def __init__(self, soi: int, slot: int, image_tokens: int):
        self.control, self.n = (soi, slot), image_tokens
        self.ids, self.weight, self.image, self.slot = [], [], [], []
        self.pictures, self.soi_at, self.draw = [], [], []

    def put(self, pieces: Sequence[int], loss: bool) -> None:
        """Text or control pieces."""
        self._add(pieces, float(loss), -1, [0] * len(pieces))

    def show(self, picture: np.ndarray, draw: bool, soi_loss: bool) -> None:
        """A soi and the slots of an image."""
        soi, slot = self.control
        self.soi_at.append(len(self.ids))
        self.put([soi], soi_loss)
        self._add([slot] * self.n, 0.0, len(self.pictures), range(self.n))
        self.pictures.append(picture)
        self.draw.append(float(draw))

    def _add(self, ids: Sequence[int], weight: float, image: int, slots: Sequence[int]) -> None:
        self.ids.extend(ids)
        self.weight.extend([weight] * len(ids))
        self.image.extend([image] * len(ids))
        self.slot.extend(slots)


def fit(pixels: np.ndarray | Pillow.Image, side: int) -> np.ndarray:
    """Resizes the short side to `side` and crops the centre: uint8 [h, w, 3], or in RGB -> [side, side, 3].

    Halves by box filter while the short side is at least twice too long, then bicubic (docs section 8; the
    release's "dual_numpy").
    """
    picture = pixels if isinstance(pixels, Pillow.Image) else Pillow.fromarray(pixels)
    if picture.size == (side, side):
        return np.asarray(pixels)
    while min(picture.size) >= 2 * side:
        picture = _halved(picture)
    scale = side / min(picture.size)
    size = (max(side, round(picture.width * scale)), max(side, round(picture.height * scale)))
    picture = picture.resize(size, Pillow.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side)))


def _halved(picture: Pillow.Image) -> Pillow.Image:
    """Both sides halved by a box filter, odd ones rounded down."""
    if picture.width % 2 or picture.height % 2:
        return picture.resize((picture.width // 2, picture.height // 2), Pillow.Resampling.BOX)
    # The same numbers in half the time. In one step reduce would round once where resize rounds twice.
    return picture.reduce((2, 1)).reduce((1, 2))
