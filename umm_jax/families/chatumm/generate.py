"""Replies of ChatUMM: from conversations to pieces of a stream, through the engine, and back.

The model says itself what comes next: after the user's turn and after each piece of its own it writes, draws
or ends the turn. What a batch of conversations has read is kept from one call to the next, so that a
conversation that goes on reads its new pieces only, and one that was edited goes on from the change.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, Image, ImageData, Part, Turn
from umm_jax.errors import ConfigError
from umm_jax.families.chatumm import pictures
from umm_jax.families.chatumm.config import ModelConfig
from umm_jax.families.chatumm.engine import Branches, Engine, Memory, Sampling
from umm_jax.families.chatumm.segments import Segment, Shown, lay
from umm_jax.families.chatumm.stream import BLANK, Serializer
from umm_jax.families.contract import Reply, check_drawn
from umm_jax.models.guidance import GuidanceConfig
from umm_jax.stream import rounded_up

# What the model may do next, as the engine counts it.
WRITE, DRAW, END = range(3)


@dataclass(frozen=True)
class Piece:
    """A segment as it is read: `pixels` of its picture, fitted for the autoencoder, and for the encoder.

    Attributes:
        key: equal where the same is read. tokens, rope: columns it takes, and how far positions move on.
    """

    segment: Segment
    key: bytes
    tokens: int
    rope: int
    pixels: np.ndarray | None = None
    seen: np.ndarray | None = None


@dataclass
class Context:
    """What each row has read, and the memory it lies in."""

    memory: Memory | None = None
    rows: list[list[Piece]] = field(default_factory=list)

    def length(self, row: int) -> int:
        return sum(piece.tokens for piece in self.rows[row])

    def rope(self, row: int) -> int:
        return sum(piece.rope for piece in self.rows[row])


class Drawing(NamedTuple):
    """How pictures are drawn: steps, scale of text guidance, the rest of guidance."""

    steps: int
    text: float
    guidance: GuidanceConfig


class Replier:
    """Answers conversations with one set of parameters.

    Args:
        config: the family's ModelConfig; params: nested dict of arrays; tokenizer: the run's tokenizer.
        round_tokens: capacities and lengths are rounded up to multiples of it, so that few shapes are
            compiled.
        keep: whether to go on, in the next call, from what was read in this one. It costs the memory of one
            batch between calls.

    Attributes:
        prefilled: tokens each conversation of the last call read before its reply began.
    """

    def __init__(self, config: ModelConfig, params, tokenizer, *, round_tokens: int = 64, keep: bool = True):
        self.config = config
        self.serializer = Serializer(config, tokenizer)
        never = self.serializer.never_written(config.vocab)
        self.engine = Engine(config, params, self.serializer.special, never)
        self.round_tokens, self.keep = round_tokens, keep
        self.prefilled: list[int] = []
        self._kept = (Context(), Context())

    @property
    def params(self):
        """The parameters replies are made with. Setting them forgets what was read with others."""
        return self.engine.params

    @params.setter
    def params(self, params) -> None:
        self.engine.params, self._kept = params, (Context(), Context())

    # --- the loop ---------------------------------------------------------------------------------

    def reply(
        self,
        conversations: Sequence[Conversation],
        settings: ReplySettings | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:
        """One reply for each conversation; a row's result does not depend on its neighbours.

        Args:
            conversations: each ends with a user turn.
            seeds: one per conversation, for sampled text and image noise; 0, 1, ... by default.

        Raises:
            DataError: a conversation is empty, or ends with the assistant's turn.
            ConfigError: settings this family or model cannot follow.
        """
        for c in conversations:
            c.check_unanswered()
        settings = settings or ReplySettings()
        drawing = self._drawing(settings)
        self._check(settings)
        if not conversations:
            return []
        rows = len(conversations)
        seeds = list(range(rows)) if seeds is None else list(seeds)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        line = _Line(self, conversations, settings, drawing, keys)
        while line.active.any():
            chosen = line.decide()
            if (chosen == WRITE).any():
                line.write(chosen == WRITE)
            if (chosen == DRAW).any():
                line.draw(chosen == DRAW)
            line.active &= chosen != END
        self.prefilled = line.prefilled
        self._kept = (line.main, line.plain) if self.keep else (Context(), Context())
        return line.replies()

    def take_kept(self) -> tuple[Context, Context]:
        """What the last call read, of everything and of texts alone; forgets it."""
        kept, self._kept = self._kept, (Context(), Context())
        return kept

    def _check(self, settings: ReplySettings) -> None:
        if settings.beams > 1:
            raise ConfigError(f"beams={settings.beams}: this family has no beam search; use 1")
        if settings.mode == "auto" and not self.serializer.layout.control:
            raise ConfigError(
                "mode=auto: this model was not taught to say whether it writes or draws (layout.control is "
                "false, as in BAGEL's release); choose mode=text or mode=image"
            )

    def _drawing(self, settings: ReplySettings) -> Drawing:
        schedule, guidance = self.config.schedule, self.config.guidance
        if settings.image_guidance is not None:
            guidance = GuidanceConfig(**(vars(guidance) | {"image": settings.image_guidance}))
        steps = schedule.sample_steps if settings.image_steps is None else settings.image_steps
        text = schedule.guidance if settings.guidance is None else settings.guidance
        return Drawing(steps, text, guidance)

    # --- pieces -------------------------------------------------------------------------------------

    def pieces(self, segments: Sequence[Segment], images: Sequence[np.ndarray], together: int) -> list[Piece]:
        """Segments as they are read; `together` pictures of a conversation share a bound of pixels."""
        c, found, fitted = self.serializer.layout, [], {}
        for segment in segments:
            if segment.kind == "text":
                ids = np.array(segment.ids, np.int64)
                found.append(Piece(segment, b"text" + ids.tobytes(), len(ids) + 2, len(ids) + 2))
                continue
            if segment.image not in fitted:
                pixels = pictures.fitted(images[segment.image], c.latent, together)
                seen = pictures.fitted(pixels, c.vision, together)
                digest = hashlib.sha256(np.ascontiguousarray(pixels)).digest() + str(pixels.shape).encode()
                fitted[segment.image] = pixels, seen, digest
            pixels, seen, digest = fitted[segment.image]
            of, stride = (pixels, c.latent.stride) if segment.kind == "latent" else (seen, c.vision.stride)
            count = (of.shape[0] // stride) * (of.shape[1] // stride) + 2
            found.append(Piece(segment, segment.kind.encode() + digest, count, 1, pixels, seen))
        return found

    def read(self, context: Context, new: Sequence[Sequence[Piece]], capacity: int) -> None:
        """Reads the `new` pieces of each row, in one pass."""
        if context.memory is None:
            context.memory = self.engine.empty(len(new), rounded_up(capacity, self.round_tokens))
        context.memory = self.engine.reserve(context.memory, rounded_up(capacity, self.round_tokens))
        if any(new):
            laid = [self._laid(pieces, context, row) for row, pieces in enumerate(new)]
            batch = self._stacked(laid, context.memory.capacity)
            rows = range(len(new))
            for row in rows:
                context.rows[row] = [*context.rows[row], *new[row]]
            # A row that reads nothing keeps its last state.
            last = [len(one["tokens"]["ids"]) - 1 for one in laid]
            batch["rows"] = {
                "length": np.array([context.length(row) for row in rows], np.int32),
                "rope": np.array([context.rope(row) for row in rows], np.int32),
                "last": np.array(last, np.int32),
            }
            context.memory = self.engine.read(context.memory, batch)

    def _laid(self, pieces: Sequence[Piece], context: Context, row: int) -> dict[str, dict[str, np.ndarray]]:
        """Arrays of pieces that follow what a row has read."""
        c = self.serializer.layout
        segments = [Segment(p.segment.kind, p.segment.ids, image=i) for i, p in enumerate(pieces)]
        cells = lambda a, stride: (0, 0) if a is None else (a.shape[0] // stride, a.shape[1] // stride)  # noqa: E731
        shown = [Shown(cells(p.pixels, c.latent.stride), cells(p.seen, c.vision.stride)) for p in pieces]
        laid = lay(segments, shown, self.serializer.special, c.grids)
        ends = context.length(row) + np.cumsum([p.tokens for p in pieces]) - 1
        for axis in (laid.tokens, laid.latents):
            axis["rope"] += context.rope(row)
            axis["order"] += context.length(row)
            whole = ends[axis["split"]] if len(pieces) else axis["order"]
            axis["limit"] = np.where(axis["mode"] == 0, axis["order"], whole).astype(np.int32)
        numbers = 3 * c.vision.stride**2
        flat = [pictures.patches(p.seen, c.vision.stride) for p in pieces if p.segment.kind == "vision"]
        large = [p for p in pieces if p.segment.kind == "latent"]
        numbered = {i: n for n, i in enumerate(i for i, p in enumerate(pieces) if p.segment.kind == "latent")}
        laid.latents["image"] = np.array([numbered[i] for i in laid.latents["image"]], np.int32)
        return {
            "tokens": laid.tokens,
            "latents": laid.latents,
            "patches": {"pixels": np.concatenate([np.zeros((0, numbers), np.uint8), *flat]), **laid.patches},
            "images": {
                "pixels": np.array(
                    [pictures.on_canvas(p.pixels, c.canvas, BLANK) for p in large], np.uint8
                ).reshape(-1, c.canvas, c.canvas, 3),
                "size": np.array([p.pixels.shape[:2] for p in large], np.int32).reshape(-1, 2),
                "noise": np.array([self._noise(p.key) for p in large], np.float32).reshape(
                    -1, *self.config.latent_shape
                ),
            },
        }

    def _noise(self, key: bytes) -> np.ndarray:
        """Of the autoencoder's sample, from the picture itself: read again, it is read alike."""
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8])
        return np.random.default_rng(seed).standard_normal(self.config.latent_shape, np.float32)

    def _stacked(self, laid: Sequence[dict[str, dict[str, np.ndarray]]], capacity: int) -> dict:
        """Rows padded to one size; what pads takes no column."""
        # An image that is not there is a whole number of cells, so that nothing is divided by zero.
        pads = {"patch": -1, "image": -1, "order": capacity, "size": self.serializer.layout.latent.stride}
        batch: dict[str, dict[str, np.ndarray]] = {}
        for axis in ("tokens", "latents", "patches", "images"):
            most = max(len(next(iter(one[axis].values()))) for one in laid)
            width = most if axis == "images" else rounded_up(most, self.round_tokens)
            batch[axis] = {}
            for name, first in laid[0][axis].items():
                array = np.full((len(laid), width, *first.shape[1:]), pads.get(name, 0), first.dtype)
                for row, one in enumerate(laid):
                    array[row, : len(one[axis][name])] = one[axis][name]
                batch[axis][name] = array
        return batch


class _Line:
    """The replies of a batch while they are made."""

    def __init__(self, replier: Replier, conversations, settings: ReplySettings, drawing: Drawing, keys):
        self.replier, self.conversations = replier, conversations
        self.settings, self.drawing, self.keys = settings, drawing, keys
        rows = len(conversations)
        self.active, self.stopped = np.ones(rows, bool), ["tokens"] * rows
        self.budget, self.drawn = np.full(rows, settings.max_tokens), np.zeros(rows, int)
        self.made: list[list[list[int] | np.ndarray]] = [[] for _ in range(rows)]
        self.seen = None
        if settings.repetition_penalty != 1:
            self.seen = np.zeros((rows, replier.config.vocab), bool)
        self.sampling = Sampling(
            settings.temperature, settings.top_p, settings.repetition_penalty, settings.min_tokens
        )
        self.guides_images = drawing.text > 1 and drawing.guidance.image > 1 and settings.mode != "text"
        self._read_prompts()

    # --- prompts ------------------------------------------------------------------------------------

    def _read_prompts(self) -> None:
        serializer = self.replier.serializer
        self.together, wanted, self.free, self.size = [], [], [], []
        for conversation in self.conversations:
            segments, images = serializer.segments(conversation, history=True)
            pieces = self.replier.pieces([s for s, _ in segments], images, len(images))
            self.together.append(len(images))
            wanted.append(pieces)
            asked = [
                i
                for i, (s, turn) in enumerate(segments)
                if s.kind == "text" and conversation.turns[turn].role == "user"
            ]
            # The text-free context is all that stands before the user's last words.
            before = pieces[: asked[-1]] if asked else pieces
            self.free.append((sum(p.tokens for p in before), sum(p.rope for p in before)))
            last = next((p.pixels for p in reversed(pieces) if p.pixels is not None), None)
            self.size.append(self._size(last))
        # Taken, not shared: a reply that is broken off leaves nothing half read behind.
        self.main, self.plain = self.replier.take_kept()
        self.prefilled = self._go_on(self.main, wanted)
        if self.guides_images:
            self._go_on(self.plain, [[p for p in row if p.segment.kind == "text"] for row in wanted])

    def _size(self, last: np.ndarray | None) -> tuple[int, int]:
        """(h, w) in pixels of the picture a row would draw: as asked, as the last one shown, or a square."""
        layout = self.replier.serializer.layout
        if self.settings.image_size is not None:
            h, w = self.settings.image_size
            if any(side % layout.latent.stride or not 0 < side <= layout.canvas for side in (h, w)):
                raise ConfigError(
                    f"image_size={h} x {w}: sides are multiples of {layout.latent.stride}, at most "
                    f"{layout.canvas}"
                )
            return h, w
        return (layout.canvas, layout.canvas) if last is None else last.shape[:2]

    def _go_on(self, context: Context, wanted: list[list[Piece]]) -> list[int]:
        """Reads what is wanted beyond what was read before; how many tokens that were, for each row."""
        had = [0] * len(wanted)
        if len(context.rows) == len(wanted):
            for row, (old, new) in enumerate(zip(context.rows, wanted)):
                pairs = zip(old, new)
                same = next((i for i, (a, b) in enumerate(pairs) if a.key != b.key), min(len(old), len(new)))
                # The last piece is read in any case: its last token says what comes next.
                had[row] = min(same, max(len(new) - 1, 0))
        else:
            context.memory = None
        context.rows = [new[:n] for n, new in zip(had, wanted)]
        if context.memory is not None:
            lengths = [context.length(row) for row in range(len(wanted))]
            context.memory = self.replier.engine.rewind(context.memory, np.array(lengths))
        rest = [new[n:] for n, new in zip(had, wanted)]
        self.replier.read(context, rest, self._capacity(wanted))
        return [sum(piece.tokens for piece in pieces) for pieces in rest]

    def _capacity(self, wanted: Sequence[Sequence[Piece]]) -> int:
        """Room for the prompts and what may be written and drawn."""
        layout, s = self.replier.serializer.layout, self.settings
        pictures_ = 0 if s.mode == "text" else s.max_images
        each = layout.latent.most_cells**2 + layout.vision.most_cells**2 + 4
        prompt = max(sum(piece.tokens for piece in row) for row in wanted)
        # Every text takes two tokens beside its words, and there are no more texts than words and pictures.
        more = 3 * s.max_tokens if s.max_tokens < 8 else s.max_tokens + 16
        return prompt + more + pictures_ * (each + 2) + layout.latent.most_cells**2 + 2

    # --- what a row does ------------------------------------------------------------------------------

    def decide(self) -> np.ndarray:
        """What each row does next; END where it is not active."""
        s, rows = self.settings, len(self.active)
        begun = np.array([bool(made) for made in self.made])
        allowed = np.ones((rows, 3), bool)
        allowed[:, WRITE] = self.budget > 0
        allowed[:, DRAW] = (self.drawn < s.max_images) & (s.mode != "text")
        allowed[:, END] = begun
        if not self.replier.serializer.layout.control:
            allowed[:, :] = begun[:, None] & np.array([False, False, True])
            allowed[~begun, DRAW if s.mode == "image" else WRITE] = True
        elif s.mode == "image":
            allowed[~begun] = [False, True, False]
        spent = ~allowed.any(axis=1) | ~self.active
        allowed[spent, END] = True
        only = np.where(allowed.sum(axis=1) == 1, allowed.argmax(axis=1), -1)
        chosen = only
        if (only < 0).any():
            memory = self._of(self.main)
            chosen = self.replier.engine.decide(memory, allowed, self.keys, self.sampling)
            chosen = np.where(only < 0, chosen, only)
        for row in np.flatnonzero(self.active & (chosen == END)):
            # A row that could only end did not choose to, unless its family has nothing else to say.
            free = allowed[row].sum() > 1 or not self.replier.serializer.layout.control
            self.stopped[row] = "end" if free and self.budget[row] > 0 else "tokens"
        return chosen

    def write(self, rows: np.ndarray) -> None:
        """A text in each of `rows`."""
        self.main.memory, ids, count = self.replier.engine.write(
            self._of(self.main),
            self.sampling,
            limit=self.settings.max_tokens,
            keys=self.keys,
            active=rows,
            budget=np.maximum(self.budget, 0),
            seen=self.seen,
        )
        new: list[list[Piece]] = [[] for _ in rows]
        for row in np.flatnonzero(rows):
            words = ids[row, : count[row]].tolist()
            self.made[row].append(words)
            # An empty text costs something too, or a model could write such for ever.
            self.budget[row] -= max(count[row], 1)
            if self.seen is not None:
                self.seen[row, words] = True
            new[row] = self.replier.pieces([Segment("text", tuple(words))], [], 0)
            self.main.rows[row] = [*self.main.rows[row], *new[row]]
        if self.guides_images:
            self.replier.read(self.plain, new, self._capacity(self.main.rows))

    def draw(self, rows: np.ndarray) -> None:
        """A picture in each of `rows`, which is then read like any other."""
        layout, engine = self.replier.serializer.layout, self.replier.engine
        stride = layout.latent.stride
        keys = jax.vmap(jax.random.fold_in)(self.keys, jnp.asarray(1_000_000 + self.drawn))
        room = self._capacity(self.main.rows)
        self.replier.read(self.main, [[] for _ in rows], room)
        branches = Branches(
            *(jnp.asarray(values, jnp.int32) for values in zip(*self.free)),
            self.plain.memory if self.guides_images else None,
        )
        new: list[list[Piece]] = [[] for _ in rows]
        for size in {self.size[row] for row in np.flatnonzero(rows)}:
            pixels, finite = engine.draw(
                self._of(self.main),
                branches,
                keys,
                cells=(size[0] // stride, size[1] // stride),
                steps=self.drawing.steps,
                text=self.drawing.text,
                guidance=self.drawing.guidance,
            )
            check_drawn(self.conversations, rows & np.array([s == size for s in self.size]), finite)
            for row in np.flatnonzero(rows):
                if self.size[row] == size:
                    self.made[row].append(pixels[row])
                    self.together[row] += 1
                    pair = [Segment("latent", image=0), Segment("vision", image=0)]
                    new[row] = self.replier.pieces(pair, [pixels[row]], self.together[row])
        self.drawn += rows
        self.replier.read(self.main, new, room)

    @staticmethod
    def _of(context: Context) -> Memory:
        assert context.memory is not None
        return context.memory

    # --- and back -------------------------------------------------------------------------------------

    def replies(self) -> list[Reply]:
        return [self._reply(row, c) for row, c in enumerate(self.conversations)]

    def _reply(self, row: int, conversation: Conversation) -> Reply:
        parts: list[Part] = []
        images: dict[str, ImageData] = {}
        shown = [p.ref for t in conversation.turns for p in t.parts if isinstance(p, Image)]
        last = shown[-1] if shown else None
        for made in self.made[row]:
            if isinstance(made, list):
                parts += self.replier.serializer.parts(made, last)
                continue
            last = f"drawn-{len(conversation.turns)}-{len(images)}"
            images[last] = ImageData.from_array(made)
            parts.append(Image(last))
        return Reply(Turn("assistant", tuple(parts)), images, self.stopped[row])
