"""How UnifiedMLLM lays a conversation out as one stream. numpy only, no JAX.

A conversation is a causal sequence. Every image, whoever shows it, is a block of `image_tokens` slots between
two pieces; an answer's calls and places are pieces of their own, see ``umm_jax.markup``::

    <bos> <user> <im_start> [patch x n] <im_end> segment the red ring <eot>
    loss
          <bot> sure <image_seg> the red ring [SEG] </image_seg> <eot>
    loss         1       1        1   1    1    1         1        1

What a call gave, a mask or a picture, is never written: the mask is the target of the mask head at its
``[SEG]``, and a picture stands, without loss, after the call, so that what follows can be said about it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image as Pillow

from umm_jax.config import from_dict
from umm_jax.conversation import Conversation, Image, Mask, Turn
from umm_jax.errors import ConfigError, DataError
from umm_jax.markup import automaton, dialects, grammar, records
from umm_jax.stream import Feature, Stream, StreamSpec, beyond, is_piece

# CLIP's mean colour, which fills what a picture lacks to a square.
_FILL = (122, 116, 104)


@dataclass(frozen=True)
class LayoutConfig:
    """Spelling and sizes of the stream.

    Attributes:
        image_size: side in pixels of what the tower sees: pictures are padded to a square, then resized.
        image_tokens: slots of an image.
        mask_size: side in pixels of a mask's target, padded as the picture it is found in.
        large_size: side of the picture that the mask head's own encoder sees, where it has one: the longer
            side is brought to this, the picture lies in the top left corner; 0 is without.
        start, patch, end: pieces around and in an image's block.
        prefixes: what opens a turn of each role: a piece, or plain text. turn_end: the piece, or the text of
            one token, that closes it.
        dialect: how calls and places are spelt, see ``markup.dialects``; decimals: of a coordinate.
    """

    image_size: int = 336
    image_tokens: int = 576
    mask_size: int = 256
    large_size: int = 0
    start: str = "<im_start>"
    patch: str = "<im_patch>"
    end: str = "<im_end>"
    prefixes: dict[str, str] = field(
        default_factory=lambda: {"system": "", "user": "USER: ", "assistant": "ASSISTANT:"}
    )
    turn_end: str = "</s>"
    dialect: str = "umm1"
    decimals: int = 3

    def __post_init__(self):
        if min(self.image_size, self.image_tokens, self.mask_size, self.decimals) < 1:
            raise ConfigError("image_size, image_tokens, mask_size and decimals must be positive")
        dialects.get(self.dialect)


def layout_of(model: Mapping[str, Any] | Any) -> LayoutConfig:
    """The layout of a `model` section (a mapping, of which only `layout` is read) or of a ModelConfig."""
    if isinstance(model, Mapping):
        return from_dict(LayoutConfig, model.get("layout", {}), "config.model.layout")
    return model.layout


def control_pieces(model: Mapping[str, Any] | Any) -> list[str]:
    """What a tokenizer trained for this family holds beside words: pieces that are never part of a text."""
    layout = layout_of(model)
    pieces = [text for text in (*layout.prefixes.values(), layout.turn_end) if is_piece(text)]
    pieces += [layout.start, layout.patch, layout.end, *dialects.get(layout.dialect).tokens]
    return [piece for piece in dict.fromkeys(pieces) if piece not in ("<s>", "</s>")]


def spec(model: Mapping[str, Any] | Any) -> StreamSpec:
    """The features of this family's Streams for a model, or for a layout alone."""
    layout = model if isinstance(model, LayoutConfig) else layout_of(model)
    side, mask, large = layout.image_size, layout.mask_size, layout.large_size
    second = {"large": Feature((large, large, 3), "uint8"), "extent": Feature((2,))} if large else {}
    return StreamSpec(
        tokens={
            "ids": Feature(),
            "weight": Feature(dtype="float32", loss=True),
            "image": Feature(pad=-1, refers="images"),
            "slot": Feature(),
            "tasks": Feature(),
        },
        images={"pixels": Feature((side, side, 3), "uint8"), **second},
        more={
            "masks": {
                "at": Feature(refers="tokens"),
                "image": Feature(refers="images"),
                "target": Feature((mask, mask), "uint8"),
            }
        },
    )


class Serializer:
    """Conversation -> Stream, and reply tokens -> an answer.

    Args:
        model: the `model` section of a run config (a mapping, of which only `layout` is read), or the
            family's ModelConfig.
        tokenizer: see ``data.tokenizer.Tokenizer``.
    """

    def __init__(self, model: Mapping[str, Any] | Any, tokenizer: Any):
        layout = self.layout = layout_of(model)
        self.tokenizer, self.dialect = tokenizer, dialects.get(layout.dialect)
        self.bos = tokenizer.id("<s>")
        self.block = tuple(tokenizer.id(piece) for piece in (layout.start, layout.patch, layout.end))
        self.marks = {tokenizer.id(mark): mark for mark in self.dialect.tokens}
        self.ids = {mark: token for token, mark in self.marks.items()}
        self.end = self._one(layout.turn_end)
        self.prefix = {role: self._pieces(text) for role, text in layout.prefixes.items()}
        self.spec = spec(layout)

    def picture(self, picture: Pillow.Image) -> dict[str, np.ndarray]:
        """A picture as each feature of the axis of images has it."""
        found = {"pixels": square(picture, self.layout.image_size)}
        if side := self.layout.large_size:
            large, extent = cornered(picture, side)
            found |= {"large": large, "extent": np.array(extent, np.int32)}
        return found

    def target(self, mask: np.ndarray) -> np.ndarray:
        """A mask bool [h, w] where the mask head has it, uint8 [s, s]."""
        size = self.layout.mask_size
        return cornered(mask, size)[0] if self.layout.large_size else square(mask, size)

    def found(self, logits: np.ndarray, height: int, width: int) -> np.ndarray:
        """The mask head's logits [s, s] as a mask of the picture, bool [height, width]."""
        back = uncornered if self.layout.large_size else unsquare
        return back(logits, height, width) > 0

    def _pieces(self, text: str) -> list[int]:
        return [self.tokenizer.id(text)] if is_piece(text) else self.tokenizer.encode(text) if text else []

    def _one(self, text: str) -> int:
        ids = self._pieces(text)
        if len(ids) != 1:
            raise ConfigError(f"config.model.layout.turn_end {text!r} is {len(ids)} tokens; it must be one")
        return ids[0]

    # --- conversation to stream -------------------------------------------------------------------

    def __call__(self, conversation: Conversation, rng: np.random.Generator | None = None) -> Stream:
        """The whole conversation, with loss where its turns say so; nothing is left out at random."""
        return self._layout(conversation, reply=False)

    def prompt(self, conversation: Conversation) -> Stream:
        """What a reply continues: the conversation and the opening of an assistant turn."""
        return self._layout(conversation, reply=True)

    def _layout(self, conversation: Conversation, reply: bool) -> Stream:
        line = _Line(self, conversation)
        line.put([self.bos], False)
        for index, turn in enumerate(conversation.turns):
            if turn.role == "document":
                raise DataError(
                    f"record {conversation.id}: the unified_mllm family has turns and no documents; train "
                    "another family on this data"
                )
            line.turn(index, turn)
        if reply:
            line.put(self.prefix["assistant"], False)
        return line.stream()

    # --- reply tokens to an answer ----------------------------------------------------------------

    def answer(self, ids: Sequence[int]) -> grammar.Answer:
        """What reply tokens say; of the images' blocks between them nothing is read."""
        hidden = {self.end, *self.block}
        words = [int(i) for i in ids if int(i) not in hidden]
        return grammar.parse(
            grammar.lex_ids(words, self.marks, self.tokenizer.decode, self.dialect), self.dialect
        )

    def text_ids(self, text: str, dialect: dialects.Dialect) -> list[int]:
        """Ids of a rendered answer: its marks as pieces, the rest as words."""
        ids: list[int] = []
        for lexeme in grammar.split(text, dialect):
            mark = self.ids.get(lexeme)
            ids += self.tokenizer.encode(lexeme) if mark is None else [mark]
        return ids

    def never_written(self, vocab: int) -> np.ndarray:
        """True for the ids a reply cannot contain: bool [vocab]. They open turns, pad, or stand for nothing.

        Raises:
            ConfigError: the tokenizer has more pieces than the model's vocabulary.
        """
        never = beyond(self.tokenizer.size, vocab, "config.model.backbone.vocab")
        structure = [self.tokenizer.id(text) for text in self.layout.prefixes.values() if is_piece(text)]
        never[[0, self.bos, *self.block, *structure]] = True
        return never

    def automaton(self, vocab: int, level: automaton.Level) -> automaton.Automaton:
        """What may follow what in a reply, over the model's vocabulary."""
        never, words = self.never_written(vocab), {}
        for token in np.flatnonzero(~never):
            if int(token) not in self.marks and int(token) != self.end:
                words[int(token)] = _text_of(self.tokenizer.piece(int(token)))
        return automaton.build(
            self.dialect, words, self.marks, (self.end,), vocab, level=level, decimals=self.layout.decimals
        )


def _text_of(piece: str) -> str:
    """The letters of a piece of a sentencepiece or byte-pair vocabulary; a part of one is an unknown one."""
    if len(piece) == 6 and piece.startswith("<0x"):
        value = int(piece[3:5], 16)
        return chr(value) if value < 128 else "\ufffd"
    return piece.replace("\u2581", " ").replace("\u0120", " ")


class _Line:
    """A stream while it is being laid out, one list a feature."""

    def __init__(self, serializer: Serializer, conversation: Conversation):
        self.of, self.conversation = serializer, conversation
        self.ids, self.weight, self.image, self.slot = [], [], [], []
        self.pictures: list[dict[str, np.ndarray]] = []
        self.shown: dict[str, int] = {}  # the last showing of each picture
        self.masks: list[tuple[int, int, np.ndarray]] = []
        self.tasks = False

    def put(self, pieces: Sequence[int], loss: bool) -> None:
        self._add(pieces, float(loss), -1, [0] * len(pieces))

    def turn(self, index: int, turn: Turn) -> None:
        of, loss = self.of, turn.loss and turn.role == "assistant"
        self.put(of.prefix[turn.role], False)
        try:
            for segment, masks, image in records.said(turn.parts):
                if image is not None:
                    self.show(image)
                elif isinstance(segment, grammar.Text):
                    self.put(of.tokenizer.encode(segment.text), loss)
                else:
                    if not (loss or turn.role == "assistant") and isinstance(segment, grammar.Call):
                        raise DataError("calls and masks are an assistant's")
                    self.say(segment, masks, loss)
        except DataError as error:
            raise DataError(f"record {self.conversation.id}, turn {index}: {error}") from None
        self.put([of.end], loss)

    def say(self, segment, masks: Sequence[Mask], loss: bool) -> None:
        """A place or a call; its marks ask for the masks."""
        of = self.of
        if of.dialect.bare_seg and isinstance(segment, grammar.Call) and segment.task == "image_seg":
            segment = replace(segment, implicit=True)
        try:
            said = grammar.render(grammar.Answer((segment,)), of.dialect, of.layout.decimals)
        except (ConfigError, ValueError) as error:
            raise DataError(str(error)) from None
        ids, begin = of.text_ids(said, of.dialect), len(self.ids)
        seg = of.ids.get("[SEG]")
        at = [begin + k for k, token in enumerate(ids) if token == seg]
        self.put(ids, loss)
        self.tasks |= isinstance(segment, grammar.Call)
        for column, mask in zip(at, masks, strict=True):
            if mask.of not in self.shown:
                raise DataError(f"a mask of picture {mask.of!r}, which has not been shown")
            self.masks.append((column, self.shown[mask.of], of.target(mask.array())))

    def show(self, part: Image) -> None:
        start, patch, end = self.of.block
        layout = self.of.layout
        self.put([start], False)
        number = self.shown[part.ref] = len(self.pictures)
        self._add([patch] * layout.image_tokens, 0.0, number, range(layout.image_tokens))
        self.put([end], False)
        self.pictures.append(self.of.picture(self.conversation.images[part.ref].picture()))

    def _add(self, ids: Sequence[int], weight: float, image: int, slots: Sequence[int]) -> None:
        self.ids.extend(ids)
        self.weight.extend([weight] * len(ids))
        self.image.extend([image] * len(ids))
        self.slot.extend(slots)

    def stream(self) -> Stream:
        mask = self.of.layout.mask_size
        images = {
            name: np.array([p[name] for p in self.pictures], feature.dtype).reshape(-1, *feature.shape)
            for name, feature in self.of.spec.images.items()
        }
        at, image, target = zip(*self.masks) if self.masks else ((), (), ())
        return {
            "tokens": {
                "ids": np.array(self.ids, np.int32),
                "weight": np.array(self.weight, np.float32),
                "image": np.array(self.image, np.int32),
                "slot": np.array(self.slot, np.int32),
                "tasks": np.full(len(self.ids), self.tasks, np.int32),
            },
            "images": images,
            "masks": {
                "at": np.array(at, np.int32),
                "image": np.array(image, np.int32),
                "target": np.array(target, np.uint8).reshape(-1, mask, mask),
            },
        }


def square(pixels: np.ndarray | Pillow.Image, side: int) -> np.ndarray:
    """A picture padded to a square and resized: uint8 [side, side, 3]; of a mask bool [h, w], [side, side].

    The picture lies in the middle, between CLIP's mean colour; of a mask nothing is set there.
    """
    mask = isinstance(pixels, np.ndarray) and pixels.ndim == 2
    picture = pixels if isinstance(pixels, Pillow.Image) else Pillow.fromarray(pixels.astype(np.uint8))
    size = max(picture.size)
    if picture.size != (size, size):
        canvas = Pillow.new(picture.mode, (size, size), 0 if mask else _FILL)
        canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        picture = canvas
    if size != side:
        picture = picture.resize(
            (side, side), Pillow.Resampling.NEAREST if mask else Pillow.Resampling.BICUBIC
        )
    return np.asarray(picture).astype(np.uint8)


def unsquare(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Logits of a padded square, float [s, s], as logits of the picture [height, width]."""
    size = max(height, width)
    whole = Pillow.fromarray(mask.astype(np.float32)).resize((size, size), Pillow.Resampling.BILINEAR)
    top, left = (size - height) // 2, (size - width) // 2
    return np.asarray(whole)[top : top + height, left : left + width]


def cornered(pixels: np.ndarray | Pillow.Image, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture brought to `side` along its longer side, in the top left corner of a square, as SAM has it.

    Returns:
        uint8 [side, side, 3], of a mask bool [h, w] uint8 [side, side]; and its height and width there.
    """
    mask = isinstance(pixels, np.ndarray) and pixels.ndim == 2
    picture = pixels if isinstance(pixels, Pillow.Image) else Pillow.fromarray(pixels.astype(np.uint8))
    scale = side / max(picture.size)
    width, height = (max(1, int(v * scale + 0.5)) for v in picture.size)
    if picture.size != (width, height):
        how = Pillow.Resampling.NEAREST if mask else Pillow.Resampling.BILINEAR
        picture = picture.resize((width, height), how)
    found = np.zeros((side, side) if mask else (side, side, 3), np.uint8)
    found[:height, :width] = np.asarray(picture)
    return found, (height, width)


def uncornered(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The inverse of :func:`cornered` for logits, float [s, s] -> [height, width]."""
    scale = mask.shape[0] / max(height, width)
    rows, columns = (max(1, int(v * scale + 0.5)) for v in (height, width))
    cut = Pillow.fromarray(mask[:rows, :columns].astype(np.float32))
    return np.asarray(cut.resize((width, height), Pillow.Resampling.BILINEAR))
