"""Replies of MM-Interleaved: cached text decoding, image sampling, and the loop of both (docs section 9).

All rows of a batch move together through four compiled functions: read the prompt, write text until a
stop, draw, read the drawn picture back. Nothing is recomputed: keys, values, hidden states and image
features of what has been read are kept in a :class:`Memory`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, Image, ImageData, Part, Turn
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.contract import Reply
from umm_jax.families.mm_interleaved.config import ModelConfig
from umm_jax.families.mm_interleaved.model import MMInterleaved, build
from umm_jax.families.mm_interleaved.stream import Serializer, fit
from umm_jax.models.backbone import Cache
from umm_jax.models.decoding import choose_token
from umm_jax.models.layers import Keys
from umm_jax.stream import Feature, Stream

# Why a row stopped writing text.
LIMIT, END, DRAW = 0, 1, 2
# An image slot that holds nothing yet begins beyond every token.
NOWHERE = np.int32(2**30)


class Memory(NamedTuple):
    """What a batch of conversations has read: B rows, capacity for S tokens and I images.

    Attributes:
        cache: keys and values; hidden: final hidden states [B, S, D].
        length: tokens read [B]; count: images read [B].
        soi: column of each image's soi [B, I], NOWHERE where there is none.
        features: multi-scale maps, [B, I, h, w, C] a level.
        values: what the backbone's synchronizer layers sample of them, [G, B, I, V, heads, H], or None.
    """

    cache: Cache
    hidden: jax.Array
    length: jax.Array
    count: jax.Array
    soi: jax.Array
    features: tuple[jax.Array, ...]
    values: jax.Array | None


class Replier:
    """Answers conversations with one set of parameters.

    Args:
        config: the family's ModelConfig; params: nested dict of arrays; tokenizer: the run's tokenizer.
        round_tokens, round_images: capacities are rounded up to multiples of these, so that few shapes are
            compiled.
    """

    def __init__(
        self, config: ModelConfig, params, tokenizer, *, round_tokens: int = 64, round_images: int = 4
    ):
        self.config, self.params = config, params
        self.serializer = Serializer(config, tokenizer)
        self.round_tokens, self.round_images = round_tokens, round_images
        self.never = self.serializer.never_written(config.backbone.vocab)
        self.graphdef = nnx.split(nnx.eval_shape(lambda: build(config, Keys(0))))[0]
        self.most_images = config.most_images
        self._read = jax.jit(self._read_prompt, static_argnames="capacity")
        self._write = jax.jit(self._write_text, static_argnames="limit")
        self._draw = jax.jit(self._draw_image, static_argnames=("steps", "guided"))
        self._look = jax.jit(self._look_back)

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
            if not c.turns or c.turns[-1].role == "assistant":
                raise DataError(f"record {c.id}: a reply needs a conversation that ends with a user turn")
        settings = settings or ReplySettings()
        schedule = self.config.schedule
        steps = schedule.sample_steps if settings.image_steps is None else settings.image_steps
        guidance = schedule.guidance if settings.guidance is None else settings.guidance
        if guidance != 1 and not self.config.uncond_prob:
            raise ConfigError(
                f"guidance {guidance:g}: this model never drew without its condition (uncond_prob 0); use 1"
            )
        seeds = list(range(len(conversations))) if seeds is None else list(seeds)
        if not conversations:
            return []
        rows = len(conversations)
        streams = [self.serializer.prompt(c) for c in conversations]
        batch = self._collate(streams, settings)
        capacity = self._capacity(batch["ids"].shape[1], settings)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        memory, last = self._read(self.params, batch, capacity=capacity)

        runs: list[list[list[int]]] = [[[]] for _ in range(rows)]
        pictures: list[list[np.ndarray]] = [[] for _ in range(rows)]
        stopped = ["tokens"] * rows
        active = np.ones(rows, bool)
        budget = np.full(rows, settings.max_tokens)
        drawn = np.zeros(rows, np.int32)
        sampling = (jnp.float32(settings.temperature), jnp.float32(settings.top_p))
        while active.any():
            forbid = (drawn >= settings.max_images) | (settings.mode == "text")
            force = (drawn == 0) & (settings.mode == "image")
            memory, last, ids, written, stop = self._write(
                self.params,
                memory,
                last,
                keys,
                active,
                budget,
                forbid,
                force,
                sampling,
                limit=settings.max_tokens,
            )
            ids, written, stop = np.asarray(ids), np.asarray(written), np.asarray(stop)
            budget -= np.where(active, written, 0)
            for b in np.flatnonzero(active):
                runs[b][-1] += ids[b, : written[b]].tolist()
                if stop[b] == END:
                    stopped[b] = "end"
            active &= stop == DRAW
            if not active.any():
                break
            pixels = np.asarray(
                self._draw(
                    self.params,
                    memory,
                    jax.vmap(jax.random.fold_in)(keys, jnp.asarray(1_000_000 + drawn)),
                    jnp.float32(guidance),
                    steps=steps,
                    guided=guidance != 1,
                )
            )
            side = self.serializer.layout.image_size
            seen = np.stack([fit(p, side) for p in pixels])
            memory, last = self._look(self.params, memory, seen, active, last)
            for b in np.flatnonzero(active):
                pictures[b].append(pixels[b])
                runs[b].append([])
            drawn += active
            finished = active & (budget <= 0)
            active &= ~finished
        return [
            self._assemble(c, r, p, s)
            for c, r, p, s in zip(conversations, runs, pictures, stopped, strict=True)
        ]

    def _capacity(self, prompt: int, settings: ReplySettings) -> int:
        images = 0 if settings.mode == "text" else settings.max_images
        need = prompt + settings.max_tokens + images * (1 + self.serializer.layout.image_tokens)
        return -(-need // self.round_tokens) * self.round_tokens

    def _collate(self, streams: Sequence[Stream], settings: ReplySettings) -> dict[str, np.ndarray]:
        """Right-padded prompts, with room for the images to come."""
        most_tokens = max(len(s["tokens"]["ids"]) for s in streams)
        tokens = -(-most_tokens // self.round_tokens) * self.round_tokens
        shown = max(len(s["images"]["soi"]) for s in streams)
        most_images = shown + (0 if settings.mode == "text" else settings.max_images)
        images = -(-max(most_images, 1) // self.round_images) * self.round_images
        if self.most_images is not None:
            if most_images > self.most_images:
                raise DataError(
                    f"{shown} images shown and {most_images - shown} to come: this model looks back at "
                    f"{self.most_images} at most (max_images of its synchronizers); shorten the "
                    "conversation, or ask for text alone (reply.mode=text)"
                )
            images = min(images, self.most_images)
        spec = self.serializer.spec

        def pad(arrays, length, feature: Feature):
            out = np.full((len(arrays), length, *feature.shape), feature.pad, feature.dtype)
            for row, array in zip(out, arrays, strict=True):
                row[: len(array)] = array
            return out

        batch = {
            k: pad([s["tokens"][k] for s in streams], tokens, spec.tokens[k])
            for k in ("ids", "image", "slot")
        }
        batch["pixels"] = pad([s["images"]["pixels"] for s in streams], images, spec.images["pixels"])
        batch["soi"] = pad([s["images"]["soi"] for s in streams], images, Feature(pad=NOWHERE))
        batch["length"] = np.array([len(s["tokens"]["ids"]) for s in streams], np.int32)
        batch["count"] = np.array([len(s["images"]["soi"]) for s in streams], np.int32)
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

    # --- the compiled parts -----------------------------------------------------------------------

    def _model(self, params) -> MMInterleaved:
        return nnx.merge(self.graphdef, nnx.State(params))

    def _read_prompt(self, params, batch, *, capacity: int):
        model = self._model(params)
        rows, images = batch["soi"].shape
        visual, features = model.look(batch["pixels"])
        x = model.embed_tokens(batch["ids"], batch["image"], batch["slot"], visual)
        memory = Memory(
            cache=model.backbone.empty_cache(rows, capacity, x.dtype),
            hidden=jnp.zeros((rows, capacity, x.shape[-1]), x.dtype),
            length=jnp.zeros(rows, jnp.int32),
            count=batch["count"],
            soi=batch["soi"],
            features=features,
            values=model.backbone.project(model.backbone_maps(features)),
        )
        return self._extend(model, memory, x, batch["length"])

    def _extend(self, model: MMInterleaved, memory: Memory, x: jax.Array, new: jax.Array):
        """Reads `new` [B] more of the tokens embedded in x [B, T, D]; memory and last hidden state."""
        steps = jnp.arange(x.shape[1])
        columns = memory.length[:, None] + steps
        capacity = memory.hidden.shape[1]
        write = jnp.where(steps < new[:, None], columns, capacity)
        mask = jnp.arange(capacity) <= columns[..., None]
        visible = memory.soi[:, None] + 1 <= columns[..., None]
        hidden, cache = model.backbone(
            x, columns, mask, values=memory.values, visible=visible, cache=memory.cache, write=write
        )
        rows = jnp.arange(x.shape[0])
        stored = memory.hidden.at[rows[:, None], write].set(hidden, mode="drop")
        last = hidden[rows, jnp.maximum(new - 1, 0)]
        return memory._replace(cache=cache, hidden=stored, length=memory.length + new), last

    def _write_text(self, params, memory, last, keys, active, budget, forbid, force, sampling, *, limit: int):
        """Writes tokens until every active row meets the end of the turn, a soi, or its budget."""
        model, rows = self._model(params), last.shape[0]
        soi, end = self.serializer.soi, self.serializer.end

        def step(carry):
            memory, last, ids, written, stop, running, i = carry
            logits = model.head(last)
            logits = logits.at[:, soi].add(jnp.where(forbid, -jnp.inf, 0.0))
            logits = jnp.where(self.never, -jnp.inf, logits)
            only = jnp.arange(logits.shape[-1]) == soi
            logits = jnp.where((force & (i == 0))[:, None] & ~only, -jnp.inf, logits)
            step_keys = jax.vmap(jax.random.fold_in)(keys, memory.length)
            token = choose_token(logits, step_keys, *sampling)
            ids = ids.at[:, i].set(jnp.where(running, token, 0))
            written = written + running
            stop = jnp.where(running & (token == end), END, stop)
            stop = jnp.where(running & (token == soi), DRAW, stop)
            read = running & (token != end)
            x = model.embed_tokens(token[:, None])
            memory, hidden = self._extend(model, memory, x, read.astype(jnp.int32))
            last = jnp.where(read[:, None], hidden, last)
            running = running & (stop == LIMIT) & (written < budget)
            return memory, last, ids, written, stop, running, i + 1

        start = (
            memory,
            last,
            jnp.zeros((rows, limit), jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.full(rows, LIMIT),
            jnp.asarray(active) & (jnp.asarray(budget) > 0),
            0,
        )
        memory, last, ids, written, stop, _, _ = jax.lax.while_loop(
            lambda c: jnp.any(c[5]) & (c[6] < limit), step, start
        )
        return memory, last, ids, written, stop

    def _draw_image(self, params, memory, keys, guidance, *, steps: int, guided: bool):
        """Samples the image each row's newest token asks for: uint8 [B, side, side, 3]."""
        model = self._model(params)
        rows = jnp.arange(memory.length.shape[0])
        soi = jnp.maximum(memory.length - 1, 0)[:, None]
        condition, mask = model.condition(memory.hidden, soi, jnp.zeros_like(soi))
        back = jnp.arange(model.looks_back(memory.soi.shape[1] + 1), 0, -1)
        earlier = memory.count[:, None] - back
        features = tuple(f[rows[:, None], jnp.maximum(earlier, 0)] for f in memory.features)
        visible = earlier >= 0
        return model.sample(
            condition, mask, features, visible, keys, guidance if guided else None, steps=steps
        )

    def _look_back(self, params, memory, pixels, active, last):
        """Reads the pictures just drawn [B, side, side, 3] into their slots, for the active rows."""
        model = self._model(params)
        visual, features = model.look(pixels[:, None])
        rows = jnp.arange(pixels.shape[0])
        where = jnp.where(active, memory.count, memory.soi.shape[1])
        values = model.backbone.project(model.backbone_maps(features))
        if values is not None:
            values = memory.values.at[:, rows, where].set(values[:, :, 0], mode="drop")
        memory = memory._replace(
            features=tuple(
                old.at[rows, where].set(new[:, 0], mode="drop") for old, new in zip(memory.features, features)
            ),
            soi=memory.soi.at[rows, where].set(memory.length - 1, mode="drop"),
            count=memory.count + active,
            values=values,
        )
        new = jnp.where(active, visual.shape[2], 0)
        memory, hidden = self._extend(model, memory, visual[:, 0], new)
        return memory, jnp.where(active[:, None], hidden, last)
