"""Replies of UnifiedMLLM: words, places, calls and masks; and pictures, where somebody does what calls ask.

The model writes until its turn ends. Where a call that gives a picture closes and there is somebody to make
it (:attr:`Replier.experts`), the picture is made and read before the model goes on, so that it can say what
it shows or change it further. Without, a call is a part of the reply, and that is all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, Image, ImageData, Mask, Part, Turn
from umm_jax.errors import ConfigError
from umm_jax.families.contract import Reply
from umm_jax.families.unified_mllm.config import ModelConfig
from umm_jax.families.unified_mllm.engine import Engine, Sampling
from umm_jax.families.unified_mllm.stream import Serializer, square
from umm_jax.markup import grammar, records
from umm_jax.markup.plan import Step, plan
from umm_jax.markup.tasks import TASKS
from umm_jax.stream import Stream, rounded_up

END = 1


@dataclass(frozen=True)
class Asked:
    """A call of a reply that has just been closed, and all there is to do it with.

    Attributes:
        step: what is asked.
        source: the picture it works on; None where the task needs none, or there is none.
        masks: what the call's marks ask for.
        seed: of the reply.
    """

    step: Step
    source: ImageData | None
    masks: tuple[Mask, ...]
    seed: int


Experts = Callable[[Asked], ImageData | None]


@dataclass
class _Row:
    """One conversation while it is answered."""

    conversation: Conversation
    seed: int
    length: int  # columns read or written so far
    images: dict[str, ImageData]
    ids: list[int] = field(default_factory=list)  # of the reply, pictures left out
    columns: list[int] = field(default_factory=list)  # of each of them
    parts: list[Part] = field(default_factory=list)
    done: int = 0  # segments of the reply that are parts already
    made: dict[str, ImageData] = field(default_factory=dict)
    given: dict[int, str] = field(default_factory=dict)  # by call, the name of the picture it gave
    masks: dict[int, Mask] = field(default_factory=dict)  # by mark
    stopped: str = "tokens"


class Replier:
    """Answers conversations with one set of parameters.

    Args:
        config: the family's ModelConfig; params: nested dict of arrays; tokenizer: the run's tokenizer.
        round_tokens, round_images: capacities are rounded up to multiples of these, so that few shapes are
            compiled.

    Attributes:
        params: the parameters replies are made with.
        experts: who makes the pictures that calls ask for, or None. It returns None where it cannot.
    """

    def __init__(
        self, config: ModelConfig, params, tokenizer, *, round_tokens: int = 64, round_images: int = 4
    ):
        self.config, self.serializer = config, Serializer(config, tokenizer)
        never = self.serializer.never_written(config.vocab)
        automaton = None
        if config.constrain != "off":
            automaton = self.serializer.automaton(config.vocab, config.constrain)
        self.engine = Engine(config, params, never, automaton)
        self.round_tokens, self.round_images = round_tokens, round_images
        self.experts: Experts | None = None
        marks = self.serializer.dialect.marks
        self.closing = tuple(
            token
            for token, mark in self.serializer.marks.items()
            if marks[mark][0] == "close" and marks[mark][1] and TASKS[marks[mark][1]].gives == "image"
        )

    @property
    def params(self):
        """The parameters replies are made with."""
        return self.engine.params

    @params.setter
    def params(self, params) -> None:
        self.engine.params = params

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
            seeds: one per conversation, for sampled text and what experts draw; 0, 1, ... by default.

        Raises:
            DataError: a conversation is empty, or ends with the assistant's turn.
            ConfigError: settings the model cannot follow.
        """
        for c in conversations:
            c.check_unanswered()
        settings = settings or ReplySettings()
        self._check(settings)
        if not conversations:
            return []
        seeds = list(range(len(conversations))) if seeds is None else list(seeds)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        streams = [self.serializer.prompt(c) for c in conversations]
        rows = [
            _Row(c, seed, len(s["tokens"]["ids"]), _shown(c))
            for c, seed, s in zip(conversations, seeds, streams)
        ]
        pictures = settings.max_images if self.experts is not None else 0
        block = self.serializer.layout.image_tokens + 2
        room = max(row.length for row in rows) + settings.max_tokens + pictures * block
        memory = self.engine.empty(len(rows), rounded_up(room, self.round_tokens))
        memory = self.engine.read(memory, self._collate(streams))
        choice = map(jnp.float32, (settings.temperature, settings.top_p, settings.repetition_penalty))
        sampling = Sampling(*choice, least=jnp.int32(settings.min_tokens))
        budget, active = np.full(len(rows), settings.max_tokens), np.ones(len(rows), bool)
        stops = (self.serializer.end, *(self.closing if pictures else ()))
        while active.any():
            memory, written = self.engine.write(
                memory, sampling, keys, active, budget, limit=settings.max_tokens, stops=stops
            )
            budget -= np.where(active, written.count, 0)
            for b in np.flatnonzero(active):
                self._note(rows[b], written.ids[b, : written.count[b]].tolist(), written.stop[b])
            active &= (written.stop > END) & (budget > 0)
            self._answer_masks(memory, rows)
            for row in rows:
                self._assemble(row, settle=False)
            new = [self._picture(rows[b], pictures) if active[b] else None for b in range(len(rows))]
            if any(name is not None for name in new):
                memory = self._look(memory, rows, new)
        for row in rows:
            self._assemble(row, settle=True)
        return [Reply(Turn("assistant", tuple(r.parts)), r.made, r.stopped) for r in rows]

    def _check(self, settings: ReplySettings) -> None:
        for name in ("guidance", "image_guidance", "image_size", "image_steps"):
            if getattr(settings, name) is not None:
                raise ConfigError(f"reply.{name}: this family draws nothing itself; leave it null")
        if settings.beams > 1:
            raise ConfigError("reply.beams: this family has no beam search; use 1")
        if settings.mode == "image":
            raise ConfigError(
                "reply.mode=image: this family draws nothing itself; ask for a picture in words"
            )

    @staticmethod
    def _note(row: _Row, ids: list[int], stop: int) -> None:
        row.ids += ids
        row.columns += range(row.length, row.length + len(ids))
        row.length += len(ids)
        if stop == END:
            row.stopped = "end"
            row.length -= 1

    # --- what was written ---------------------------------------------------------------------------

    def _assemble(self, row: _Row, settle: bool) -> None:
        """Makes parts of the segments that are complete: all of them, when the reply has come to its end."""
        answer = self.serializer.answer(row.ids)
        last = max((k for k, s in enumerate(answer.segments) if isinstance(s, grammar.Call)), default=-1) + 1
        upto = len(answer.segments) if settle else last
        fresh = grammar.Answer(answer.segments[row.done : upto])
        image = next(reversed(row.images), None)
        most = max(row.masks, default=-1) + 1
        row.parts += records.parts(fresh, image, [row.masks.get(k) for k in range(most)])
        row.done = max(row.done, upto)

    def _answer_masks(self, memory, rows: Sequence[_Row]) -> None:
        """The masks of marks that have none yet."""
        head, seg = self.config.masks, self.serializer.ids.get("[SEG]")
        if head is None or seg is None:
            return
        todo: list[tuple[int, int, int, str]] = []
        for b, row in enumerate(rows):
            marks = [k for k, token in enumerate(row.ids) if token == seg]
            about = {mark.at: ref for step, ref in self._steps(row) for mark in step.call.masks}
            for number, k in enumerate(marks[: head.most]):
                ref = about.get(number)
                if number not in row.masks and ref is not None:
                    todo.append((b, number, row.columns[k], ref))
        if not todo:
            return
        width = rounded_up(len(todo), self.round_images)
        padded = [*todo, *[todo[0]] * (width - len(todo))]
        shown = [self.serializer.picture(rows[b].images[ref].picture()) for b, _, _, ref in padded]
        logits = self.engine.masks(
            memory,
            np.array([b for b, *_ in padded], np.int32),
            np.array([column for _, _, column, _ in padded], np.int32),
            {name: np.stack([one[name] for one in shown]) for name in shown[0]},
        )
        for (b, number, _, ref), one in zip(todo, logits):
            data = rows[b].images[ref]
            rows[b].masks[number] = Mask.from_array(ref, self.serializer.found(one, data.height, data.width))

    def _steps(self, row: _Row) -> list[tuple[Step, str | None]]:
        """The calls of the reply so far, and the name of the picture each works on, where it is there."""
        own = [ref for ref in row.images if ref not in row.made]
        found: list[tuple[Step, str | None]] = []
        for step in plan(self.serializer.answer(row.ids), ["image"] * len(own)):
            ref = None
            if step.takes is not None:
                ref = own[step.takes.index] if step.takes.kind == "user" else row.given.get(step.takes.index)
            found.append((step, ref))
        return found

    def _picture(self, row: _Row, most: int) -> str | None:
        """Has the call that was just closed done; the name of the picture it gave, or None."""
        steps = self._steps(row)
        if not steps or self.experts is None or len(row.made) >= most:
            return None
        step, ref = steps[-1]
        if step.missing or (step.takes is not None and ref is None):
            return None
        masks = tuple(row.masks[mark.at] for mark in step.call.masks if mark.at in row.masks)
        image = self.experts(Asked(step, None if ref is None else row.images[ref], masks, row.seed))
        if image is None:
            return None
        name = f"made-{len(row.conversation.turns)}-{len(row.made)}"
        row.made[name] = row.images[name] = image
        row.given[step.index] = name
        row.parts.append(Image(name))
        return name

    # --- reading ------------------------------------------------------------------------------------

    def _look(self, memory, rows: Sequence[_Row], new: Sequence[str | None]):
        """Reads the pictures just made, each as a block."""
        start, patch, end = self.serializer.block
        n, side = self.serializer.layout.image_tokens, self.serializer.layout.image_size
        ids = np.array([[start, *[patch] * n, end]] * len(rows), np.int32)
        image = np.full_like(ids, -1)
        image[:, 1:-1] = 0
        slot = np.zeros_like(ids)
        slot[:, 1:-1] = np.arange(n)
        pixels = np.zeros((len(rows), 1, side, side, 3), np.uint8)
        length = np.zeros(len(rows), np.int32)
        for b, name in enumerate(new):
            if name is not None:
                pixels[b, 0] = square(rows[b].images[name].picture(), side)
                length[b] = n + 2
                rows[b].length += n + 2
        return self.engine.read(
            memory, {"ids": ids, "image": image, "slot": slot, "pixels": pixels, "length": length}
        )

    def _collate(self, streams: Sequence[Stream]) -> dict[str, np.ndarray]:
        """The prompts, right-padded."""
        spec = self.serializer.spec
        width = rounded_up(max(len(s["tokens"]["ids"]) for s in streams), self.round_tokens)
        count = rounded_up(max(len(s["images"]["pixels"]) for s in streams), self.round_images)
        batch = {
            name: np.full((len(streams), width), spec.tokens[name].pad, np.int32)
            for name in ("ids", "image", "slot")
        }
        batch["pixels"] = np.zeros((len(streams), count, *spec.images["pixels"].shape), np.uint8)
        batch["length"] = np.array([len(s["tokens"]["ids"]) for s in streams], np.int32)
        for b, stream in enumerate(streams):
            for name in ("ids", "image", "slot"):
                batch[name][b, : batch["length"][b]] = stream["tokens"][name]
            batch["pixels"][b, : len(stream["images"]["pixels"])] = stream["images"]["pixels"]
        return batch


def _shown(conversation: Conversation) -> dict[str, ImageData]:
    """The pictures of a conversation by name, in the order of their last showing."""
    found: dict[str, ImageData] = {}
    for turn in conversation.turns:
        for part in turn.parts:
            if isinstance(part, Image):
                found.pop(part.ref, None)
                found[part.ref] = conversation.images[part.ref]
    return found
