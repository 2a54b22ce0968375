"""Replies of MM-Interleaved: from conversations to ids, through the engine, and back (docs section 9).

What a batch of conversations has read is kept from one call to the next: a conversation that goes on reads
its new turns only, without looking at its pictures again, and one that was edited goes on from the change.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, Image, ImageData, Part, Turn
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.contract import Reply, check_drawn
from umm_jax.families.mm_interleaved.config import ModelConfig
from umm_jax.families.mm_interleaved.engine import NOWHERE, Engine, Memory, TextSettings
from umm_jax.families.mm_interleaved.stream import Serializer, fit
from umm_jax.stream import Stream, rounded_up

# Why a row stopped writing text, as the engine counts the stops it is given.
END, DRAW = 1, 2


@dataclass
class Read:
    """What one row has read: ids, and for each image the column of its soi and a digest of its pixels."""

    ids: list[int] = field(default_factory=list)
    soi: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)

    def see(self, soi: int, pixels: np.ndarray) -> None:
        """Notes an image whose soi stands at column `soi`."""
        self.soi.append(soi)
        self.digests.append(hashlib.sha256(np.ascontiguousarray(pixels)).digest())

    def shared(self, other: "Read", slots: int) -> tuple[int, int]:
        """(tokens, images) at the beginning of both that are equal; no image is cut."""
        pairs = zip(self.ids, other.ids)
        tokens = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(other.ids)))
        images = 0
        for soi, mine, theirs in zip(self.soi, self.digests, other.digests):
            if soi + 1 + slots > tokens or mine != theirs:
                return min(tokens, soi + 1), images
            images += 1
        # An image that only one of them has begins where they part, at the latest.
        rest = [s[images] + 1 for s in (self.soi, other.soi) if len(s) > images]
        return min([tokens, *rest]), images


class Replier:
    """Answers conversations with one set of parameters.

    Args:
        config: the family's ModelConfig; params: nested dict of arrays; tokenizer: the run's tokenizer.
        round_tokens, round_images: capacities are rounded up to multiples of these, so that few shapes are
            compiled.
        keep: whether to go on, in the next call, from what was read in this one. It costs the memory of one
            batch between calls.
    """

    def __init__(
        self,
        config: ModelConfig,
        params,
        tokenizer,
        *,
        round_tokens: int = 64,
        round_images: int = 4,
        keep: bool = True,
    ):
        self.config = config
        self.serializer = Serializer(config, tokenizer)
        self.engine = Engine(config, params, self.serializer.never_written(config.backbone.vocab))
        self.round_tokens, self.round_images, self.keep = round_tokens, round_images, keep
        self._kept: tuple[list[Read], Memory] | None = None

    @property
    def params(self):
        """The parameters replies are made with. Setting them forgets what was read with others."""
        return self.engine.params

    @params.setter
    def params(self, params) -> None:
        self.engine.params, self._kept = params, None

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
            DataError: a conversation is empty, ends with the assistant's turn, or holds more images than the
                model can look back at.
            ConfigError: guidance of a model that was not trained for it.
        """
        for c in conversations:
            c.check_unanswered()
        settings = settings or ReplySettings()
        steps, guidance = self._drawing(settings)
        if not conversations:
            return []
        rows, side = len(conversations), self.serializer.layout.image_size
        seeds = list(range(rows)) if seeds is None else list(seeds)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        read, memory = self._read_prompts([self.serializer.prompt(c) for c in conversations], settings)

        runs: list[list[list[int]]] = [[[]] for _ in range(rows)]
        pictures: list[list[np.ndarray]] = [[] for _ in range(rows)]
        stopped = ["tokens"] * rows
        active = np.ones(rows, bool)
        budget = np.full(rows, settings.max_tokens)
        drawn = np.zeros(rows, np.int32)
        text = self._text_settings(settings)
        seen = np.zeros((rows, self.config.vocab), bool) if settings.repetition_penalty != 1 else None
        while active.any():
            memory, written = self.engine.write(
                memory,
                text,
                limit=settings.max_tokens,
                keys=keys,
                active=active,
                budget=budget,
                forbid=(drawn >= settings.max_images) | (settings.mode == "text"),
                force=(drawn == 0) & (settings.mode == "image"),
                seen=seen,
            )
            budget -= np.where(active, written.count, 0)
            for b in np.flatnonzero(active):
                ids = written.ids[b, : written.count[b]].tolist()
                runs[b][-1] += ids
                read[b].ids += ids[:-1] if written.stop[b] == END else ids
                if seen is not None:
                    seen[b, ids] = True
                if written.stop[b] == END:
                    stopped[b] = "end"
            active &= written.stop == DRAW
            if not active.any():
                break
            draw_keys = jax.vmap(jax.random.fold_in)(keys, jnp.asarray(1_000_000 + drawn))
            pixels, finite = self.engine.draw(memory, draw_keys, guidance=guidance, steps=steps)
            check_drawn(conversations, active, finite)
            shown = np.stack([fit(p, side) for p in pixels])
            memory = self.engine.look(memory, shown, active)
            for b in np.flatnonzero(active):
                pictures[b].append(pixels[b])
                runs[b].append([])
                read[b].see(len(read[b].ids) - 1, shown[b])
                read[b].ids += [self.serializer.slot] * self.serializer.layout.image_tokens
            drawn += active
            active &= budget > 0
        self._kept = (read, memory) if self.keep else None
        return [
            self._assemble(c, r, p, s)
            for c, r, p, s in zip(conversations, runs, pictures, stopped, strict=True)
        ]

    def _drawing(self, settings: ReplySettings) -> tuple[int, float]:
        """Sampling steps and guidance scale."""
        for name in ("image_guidance", "image_size"):
            if getattr(settings, name) is not None:
                raise ConfigError(f"reply.{name}: this family has none; leave it null")
        schedule = self.config.schedule
        steps = schedule.sample_steps if settings.image_steps is None else settings.image_steps
        guidance = schedule.guidance if settings.guidance is None else settings.guidance
        if guidance != 1 and not self.config.uncond_prob:
            raise ConfigError(
                f"guidance {guidance:g}: this model never drew without its condition (uncond_prob 0); use 1"
            )
        return steps, guidance

    def _text_settings(self, settings: ReplySettings) -> TextSettings:
        return TextSettings(
            (self.serializer.end, self.serializer.soi),
            settings.temperature,
            settings.top_p,
            settings.repetition_penalty,
            settings.min_tokens,
            settings.beams,
            settings.length_penalty,
        )

    # --- reading ----------------------------------------------------------------------------------

    def _read_prompts(self, streams: Sequence[Stream], settings: ReplySettings) -> tuple[list[Read], Memory]:
        """Reads the prompts, from where the last batch already read them."""
        wanted = []
        for stream in streams:
            note = Read(stream["tokens"]["ids"].tolist())
            for soi, pixels in zip(stream["images"]["soi"].tolist(), stream["images"]["pixels"]):
                note.see(soi, pixels)
            wanted.append(note)
        tokens, images = self._capacity(wanted, settings)
        had, memory = self._shared(wanted)
        if memory is None:
            memory = self.engine.empty(len(streams), tokens, images)
        else:
            memory = self.engine.rewind(memory, *map(np.array, zip(*had)))
            memory = self.engine.reserve(memory, tokens, images)
        if any(had[b] != (len(n.ids), len(n.soi)) for b, n in enumerate(wanted)):
            memory = self.engine.read(memory, self._collate(streams, had))
        return wanted, memory

    def _capacity(self, wanted: Sequence[Read], settings: ReplySettings) -> tuple[int, int]:
        """Room for the prompts and what may be written and drawn, rounded up."""
        more = 0 if settings.mode == "text" else settings.max_images
        tokens = max(len(n.ids) for n in wanted) + settings.max_tokens
        tokens += more * (1 + self.serializer.layout.image_tokens)
        shown = max(len(n.soi) for n in wanted)
        most = self.config.most_images
        if most is not None and shown + more > most:
            raise DataError(
                f"{shown} images shown and {more} to come: this model looks back at {most} at most "
                "(max_images of its synchronizers); shorten the conversation, or ask for text alone "
                "(reply.mode=text)"
            )
        images = rounded_up(max(shown + more, 1), self.round_images)
        return rounded_up(tokens, self.round_tokens), images if most is None else min(images, most)

    def _shared(self, wanted: Sequence[Read]) -> tuple[list[tuple[int, int]], Memory | None]:
        """(tokens, images) of each row that the last batch read, and its memory where that is worth it."""
        kept, self._kept = self._kept, None
        nothing = [(0, 0)] * len(wanted)
        if kept is None or len(kept[0]) != len(wanted):
            return nothing, None
        slots = self.serializer.layout.image_tokens
        shared = [old.shared(new, slots) for old, new in zip(kept[0], wanted)]
        if any(2 * tokens < len(new.ids) for (tokens, _), new in zip(shared, wanted)):
            return nothing, None
        return shared, kept[1]

    def _collate(self, streams: Sequence[Stream], had: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """What is left to read of each stream, right-padded."""
        spec, rows = self.serializer.spec, len(streams)
        new = [
            (len(s["tokens"]["ids"]) - tokens, len(s["images"]["soi"]) - images)
            for s, (tokens, images) in zip(streams, had)
        ]
        length, count = (np.array(n, np.int32) for n in zip(*new))
        width = rounded_up(int(length.max()), self.round_tokens)
        most = self.config.most_images
        images = rounded_up(int(count.max()), self.round_images)
        images = images if most is None else min(images, most)
        batch = {
            name: np.full((rows, width), spec.tokens[name].pad, np.int32) for name in ("ids", "image", "slot")
        }
        batch |= {"length": length, "count": count, "soi": np.full((rows, images), NOWHERE)}
        batch["pixels"] = np.zeros((rows, images, *spec.images["pixels"].shape), np.uint8)
        for b, (stream, (tokens, shown)) in enumerate(zip(streams, had)):
            for name in ("ids", "image", "slot"):
                batch[name][b, : length[b]] = stream["tokens"][name][tokens:]
            own = batch["image"][b]
            own[own >= 0] -= shown
            for name in ("soi", "pixels"):
                batch[name][b, : count[b]] = stream["images"][name][shown:]
        return batch

    def _assemble(self, conversation: Conversation, runs, pictures, stopped: str) -> Reply:
        parts: list[Part] = []
        images: dict[str, ImageData] = {}
        shown = [p.ref for t in conversation.turns for p in t.parts if isinstance(p, Image)]
        last = shown[-1] if shown else None
        for i, run in enumerate(runs):
            # The soi that closes a run, and the end of the turn, are structure and not words.
            words = [t for t in run if t not in (self.serializer.soi, self.serializer.end)]
            parts += self.serializer.parts(words, last)
            if i < len(pictures):
                last = f"drawn-{len(conversation.turns)}-{i}"
                images[last] = ImageData.from_array(pictures[i])
                parts.append(Image(last))
        return Reply(Turn("assistant", tuple(parts)), images, stopped)
