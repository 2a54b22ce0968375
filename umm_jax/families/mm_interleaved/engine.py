"""The compiled parts of a reply, on ids and arrays: read, write, draw, look at what was drawn.

All rows of a batch move together. What has been read is kept in a :class:`Memory` (keys, values, hidden
states, image features), so nothing is computed twice, within a reply and from one turn to the next. Texts,
turns and conversations are not known here: see ``generate.py``. One file, as every function in it must keep
the same memory in order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax import compiler
from umm_jax.families.mm_interleaved.config import ModelConfig
from umm_jax.families.mm_interleaved.model import MMInterleaved, build
from umm_jax.models.backbone import Cache
from umm_jax.models.beam import BeamSearch
from umm_jax.models.decoding import choose_token, penalize
from umm_jax.models.layers import Keys

# Why a row stopped writing text: its budget, or the index of a stop token counted from 1.
LIMIT = 0
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
        last: hidden state of the newest token [B, D].
    """

    cache: Cache
    hidden: jax.Array
    length: jax.Array
    count: jax.Array
    soi: jax.Array
    features: tuple[jax.Array, ...]
    values: jax.Array | None
    last: jax.Array

    @property
    def capacity(self) -> tuple[int, int]:
        """Tokens and images there is room for."""
        return self.hidden.shape[1], self.soi.shape[1]


class Written(NamedTuple):
    """A run of text: ids int [B, limit], how many count [B], and why each row stopped [B]."""

    ids: np.ndarray
    count: np.ndarray
    stop: np.ndarray


class TextSettings(NamedTuple):
    """How text is chosen, see ``config.ReplySettings``; `stops` are the ids that end a run."""

    stops: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    beams: int = 1
    length_penalty: float = 1.0


class Engine:
    """One set of parameters, and the functions compiled for it.

    Args:
        config: the family's ModelConfig; params: nested dict of arrays.
        never: bool [V], ids that are never written; None allows all.
    """

    def __init__(self, config: ModelConfig, params, never: np.ndarray | None = None):
        self.config, self.params = config, params
        self.never = np.zeros(config.vocab, bool) if never is None else never
        self.graphdef = nnx.split(nnx.eval_shape(lambda: build(config, Keys(0))))[0]
        jit = functools.partial(jax.jit, compiler_options=compiler.often())
        self._read = jit(self._read_tokens)
        self._room = jit(self._make_room, static_argnames=("tokens", "images"))
        self._write = jit(self._write_text, static_argnames=("limit", "stops", "penalized"))
        self._widen = jit(self._repeat, static_argnames="times")
        self._beam = jit(self._beam_step, static_argnames=("stops", "penalized", "keep"))
        self._draw = jit(self._draw_image, static_argnames=("steps", "guided"))
        self._look = jit(self._look_back)
        self._rewind = jit(self._forget)
        self._empty = jit(self._make_empty, static_argnames=("rows", "tokens", "images"))

    def model(self, params) -> MMInterleaved:
        """The module with `params` in it."""
        return nnx.merge(self.graphdef, nnx.State(params))

    # --- what a reply is made of --------------------------------------------------------------------

    def empty(self, rows: int, tokens: int, images: int) -> Memory:
        """A memory that has read nothing."""
        return self._empty(self.params, rows=rows, tokens=tokens, images=images)

    def reserve(self, memory: Memory, tokens: int, images: int) -> Memory:
        """The same memory with room for at least so many tokens and images."""
        have = memory.capacity
        if tokens <= have[0] and images <= have[1]:
            return memory
        return self._room(memory, tokens=max(tokens, have[0]), images=max(images, have[1]))

    def rewind(self, memory: Memory, tokens: np.ndarray, images: np.ndarray) -> Memory:
        """The memory as it was when each row had read its first `tokens` [B] and `images` [B]."""
        return self._rewind(memory, tokens, images)

    def read(self, memory: Memory, batch: dict[str, np.ndarray]) -> Memory:
        """Reads more tokens and images.

        Args:
            batch: `ids`, `image` (which of the new images, -1 for none), `slot` [B, T]; `pixels`
                [B, N, h, w, 3] of the new images; `soi` [B, N], their columns counted from the first token of
                all; `length`, `count` [B]: how many of T and N are real. There must be room.
        """
        return self._read(self.params, memory, batch)

    def write(
        self,
        memory: Memory,
        settings: TextSettings,
        *,
        limit: int,
        keys: jax.Array,
        active: np.ndarray | None = None,
        budget: np.ndarray | None = None,
        forbid: np.ndarray | None = None,
        force: np.ndarray | None = None,
        seen: np.ndarray | None = None,
    ) -> tuple[Memory, Written]:
        """Writes tokens until every active row meets a stop token or its budget, and reads them.

        The first of ``settings.stops`` is the end of the turn, which is not read; the others are.

        Args:
            limit: most tokens of a row; budget: of each row [B], `limit` unless given.
            keys: [B] random keys; active: bool [B].
            forbid: bool [B], rows that must not write any stop token but the first.
            force: bool [B], rows whose first token is the second stop token.
            seen: bool [B, V], tokens counted as written before, for the repetition penalty.
        """
        rows = len(memory.length)
        active = np.ones(rows, bool) if active is None else np.asarray(active)
        budget = np.full(rows, limit) if budget is None else np.asarray(budget)
        no = np.zeros(rows, bool)
        forbid, force = no if forbid is None else forbid, no if force is None else force
        if settings.beams > 1 and not force.any():
            return self._write_beams(memory, settings, limit, active, budget, forbid, seen)
        penalized = settings.repetition_penalty != 1.0
        if penalized and seen is None:
            seen = np.zeros((rows, self.config.vocab), bool)
        memory, ids, count, stop = self._write(
            self.params,
            memory,
            keys,
            active,
            budget,
            forbid,
            force,
            seen if penalized else None,
            (
                jnp.float32(settings.temperature),
                jnp.float32(settings.top_p),
                jnp.float32(settings.repetition_penalty),
                jnp.int32(settings.min_tokens),
            ),
            limit=limit,
            stops=settings.stops,
            penalized=penalized,
        )
        return memory, Written(*map(np.asarray, (ids, count, stop)))

    def draw(self, memory: Memory, keys: jax.Array, *, guidance: float, steps: int):
        """Samples the image each row's newest token asks for: uint8 [B, side, side, 3].

        And whether all of it is numbers, bool [B].
        """
        guided = guidance != 1
        made = self._draw(self.params, memory, keys, jnp.float32(guidance), steps=steps, guided=guided)
        return tuple(map(np.asarray, made))

    def look(self, memory: Memory, pixels: np.ndarray, active: np.ndarray) -> Memory:
        """Reads the pictures just drawn [B, side, side, 3] into their slots, for the active rows."""
        return self._look(self.params, memory, pixels, active)

    # --- reading ------------------------------------------------------------------------------------

    def _make_empty(self, params, *, rows: int, tokens: int, images: int) -> Memory:
        model = self.model(params)
        side = self.config.layout.image_size
        pixels = jax.ShapeDtypeStruct((rows, images, side, side, 3), jnp.uint8)

        def shapes(pixels):
            _, features = model.look(pixels)
            return features, model.backbone.project(model.backbone_maps(features))

        features, values = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(shapes, pixels))
        width = self.config.backbone.width
        return Memory(
            cache=model.backbone.empty_cache(rows, tokens, model.dtype),
            hidden=jnp.zeros((rows, tokens, width), model.dtype),
            length=jnp.zeros(rows, jnp.int32),
            count=jnp.zeros(rows, jnp.int32),
            soi=jnp.full((rows, images), NOWHERE),
            features=features,
            values=values,
            last=jnp.zeros((rows, width), model.dtype),
        )

    @staticmethod
    def _forget(memory: Memory, tokens, images) -> Memory:
        # What lies beyond is never read: masks end at a token's own column, and it is written over.
        kept = jnp.arange(memory.soi.shape[1]) < images[:, None]
        return memory._replace(
            length=jnp.asarray(tokens, jnp.int32),
            count=jnp.asarray(images, jnp.int32),
            soi=jnp.where(kept, memory.soi, NOWHERE),
            last=memory.hidden[jnp.arange(len(tokens)), jnp.maximum(tokens - 1, 0)],
        )

    @staticmethod
    def _make_room(memory: Memory, *, tokens: int, images: int) -> Memory:
        def grow(a, axis, size, value=0):
            return jnp.pad(
                a,
                [(0, size - a.shape[i] if i == axis else 0) for i in range(a.ndim)],
                constant_values=value,
            )

        return memory._replace(
            cache=jax.tree.map(lambda a: grow(a, 2, tokens), memory.cache),
            hidden=grow(memory.hidden, 1, tokens),
            soi=grow(memory.soi, 1, images, NOWHERE),
            features=tuple(grow(f, 1, images) for f in memory.features),
            values=None if memory.values is None else grow(memory.values, 2, images),
        )

    def _read_tokens(self, params, memory: Memory, batch) -> Memory:
        model = self.model(params)
        visual = None
        if batch["pixels"].shape[1]:
            visual, features = model.look(batch["pixels"])
            memory = self._remember(model, memory, features, batch["soi"], batch["count"])
        x = model.embed_tokens(batch["ids"], batch["image"], batch["slot"], visual)
        return self._extend(model, memory, x, batch["length"])

    @staticmethod
    def _remember(model: MMInterleaved, memory: Memory, features, soi, new) -> Memory:
        """Keeps the first `new` [B] of N images: their `features` [B, N, ...] and soi columns [B, N]."""
        rows, steps = jnp.arange(len(soi))[:, None], jnp.arange(soi.shape[1])
        where = jnp.where(steps < new[:, None], memory.count[:, None] + steps, memory.soi.shape[1])
        values = model.backbone.project(model.backbone_maps(features))
        if values is not None:
            values = memory.values.at[:, rows, where].set(values, mode="drop")
        return memory._replace(
            features=tuple(
                old.at[rows, where].set(new, mode="drop") for old, new in zip(memory.features, features)
            ),
            soi=memory.soi.at[rows, where].set(soi, mode="drop"),
            count=memory.count + new,
            values=values,
        )

    @staticmethod
    def _extend(model: MMInterleaved, memory: Memory, x: jax.Array, new: jax.Array) -> Memory:
        """Reads `new` [B] more of the tokens embedded in x [B, T, D]."""
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
        last = jnp.where((new > 0)[:, None], hidden[rows, jnp.maximum(new - 1, 0)], memory.last)
        return memory._replace(cache=cache, hidden=stored, length=memory.length + new, last=last)

    # --- writing ------------------------------------------------------------------------------------

    def _write_text(
        self, params, memory, keys, active, budget, forbid, force, seen, sampling, *, limit, stops, penalized
    ):
        model, rows = self.model(params), len(memory.length)
        temperature, top_p, penalty, least = sampling
        row, stop_ids = jnp.arange(rows), jnp.array(stops)

        def step(carry):
            memory, ids, written, stop, running, seen, i = carry
            logits = model.head(memory.last)
            if penalized:
                logits = penalize(logits, seen, penalty)
            logits = jnp.where(self.never, -jnp.inf, logits)
            closed = jnp.where(jnp.arange(len(stops)) > 0, forbid[:, None], False) | (i < least)
            logits = logits.at[:, stop_ids].add(jnp.where(closed, -jnp.inf, 0.0))
            if len(stops) > 1:
                only = jnp.arange(logits.shape[-1]) == stops[1]
                forced = (force & (i == 0))[:, None]
                logits = jnp.where(forced, jnp.where(only, 0.0, -jnp.inf), logits)
            step_keys = jax.vmap(jax.random.fold_in)(keys, memory.length)
            token = choose_token(logits, step_keys, temperature, top_p)
            ids = ids.at[:, i].set(jnp.where(running, token, 0))
            if penalized:
                seen = seen.at[row, token].set(True)
            written = written + running
            for number, stop_id in enumerate(stops, 1):
                stop = jnp.where(running & (token == stop_id), number, stop)
            read = running & (token != stops[0])
            memory = self._extend(model, memory, model.embed_tokens(token[:, None]), read.astype(jnp.int32))
            running = running & (stop == LIMIT) & (written < budget)
            return memory, ids, written, stop, running, seen, i + 1

        start = (
            memory,
            jnp.zeros((rows, limit), jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.full(rows, LIMIT),
            jnp.asarray(active) & (jnp.asarray(budget) > 0),
            seen,
            0,
        )
        memory, ids, written, stop, *_ = jax.lax.while_loop(
            lambda c: jnp.any(c[4]) & (c[6] < limit), step, start
        )
        return memory, ids, written, stop

    def _write_beams(self, memory, settings: TextSettings, limit, active, budget, forbid, seen):
        """Beam search on the host's books; the best hypothesis is then read once more, in one piece."""
        rows, beams = len(memory.length), settings.beams
        search = BeamSearch(
            beams, settings.stops, np.where(active, np.minimum(budget, limit), 0), settings.length_penalty
        )
        wide = self._widen(memory, times=beams)
        penalized = settings.repetition_penalty != 1.0
        seen = np.zeros((rows, self.config.vocab), bool) if seen is None else seen
        written = np.repeat(seen, beams, axis=0) if penalized else None
        closed = np.stack([np.zeros(rows, bool)] + [forbid] * (len(settings.stops) - 1), axis=1)
        tokens, sources = None, None
        for i in range(limit):
            if search.done:
                break
            wide, written, scores, chosen = self._beam(
                self.params,
                wide,
                tokens,
                sources,
                search.scores,
                closed | (i < settings.min_tokens),
                written,
                jnp.float32(settings.repetition_penalty),
                stops=settings.stops,
                penalized=penalized,
                keep=search.candidates,
            )
            tokens, sources = search.advance(np.asarray(scores), np.asarray(chosen), self.config.vocab)
        best = search.best()
        ids, count = np.zeros((rows, limit), np.int32), np.zeros(rows, np.int32)
        stop, read = np.full(rows, LIMIT), np.zeros(rows, np.int32)
        for row, hypothesis in enumerate(best):
            if not active[row]:
                continue
            whole = list(hypothesis.ids)
            if hypothesis.stop is not None:
                whole.append(hypothesis.stop)
                stop[row] = 1 + settings.stops.index(hypothesis.stop)
            ids[row, : len(whole)], count[row] = whole, len(whole)
            read[row] = len(whole) - (stop[row] == 1)
        nothing = np.zeros_like(ids)
        batch = {"ids": ids, "image": nothing - 1, "slot": nothing, "length": read}
        side = self.config.layout.image_size
        batch |= {"pixels": np.zeros((rows, 0, side, side, 3), np.uint8)}
        return self.read(memory, batch), Written(ids, count, stop)

    @staticmethod
    def _repeat(memory: Memory, *, times: int) -> Memory:
        """Every row `times` times, one after another."""
        again = functools.partial(jnp.repeat, repeats=times)
        return Memory(
            cache=jax.tree.map(lambda a: again(a, axis=1), memory.cache),
            hidden=again(memory.hidden, axis=0),
            length=again(memory.length, axis=0),
            count=again(memory.count, axis=0),
            soi=again(memory.soi, axis=0),
            features=tuple(again(f, axis=0) for f in memory.features),
            values=None if memory.values is None else again(memory.values, axis=1),
            last=again(memory.last, axis=0),
        )

    def _beam_step(
        self, params, memory, tokens, sources, scores, closed, seen, penalty, *, stops, penalized, keep
    ):
        """Feeds the chosen tokens (none at first) and scores what may follow.

        Args:
            memory: of B * n rows; tokens, sources: [B * n], what each beam reads and which row it continues.
            scores: [B, n]; closed: bool [B, stops], which of the stop tokens may not come yet.

        Returns:
            memory; `seen` with the tokens; the best `keep` sums of log-probabilities of each row
            [B, keep], and which beam and token they are, as beam * V + token.
        """
        model = self.model(params)
        if tokens is not None:
            # What a beam has read after the branching differs; images and prompts are equal for all.
            memory = memory._replace(
                cache=jax.tree.map(lambda a: a[:, sources], memory.cache),
                hidden=memory.hidden[sources],
                last=memory.last[sources],
            )
            new = jnp.ones(len(tokens), jnp.int32)
            memory = self._extend(model, memory, model.embed_tokens(tokens[:, None]), new)
            if penalized:
                seen = seen[sources].at[jnp.arange(len(tokens)), tokens].set(True)
        logits = jnp.where(self.never, -jnp.inf, model.head(memory.last))
        follow = jax.nn.log_softmax(logits, axis=-1)
        if penalized:
            follow = penalize(follow, seen, penalty)
        rows, beams = scores.shape
        follow = follow.reshape(rows, beams, -1)
        follow = follow.at[:, :, jnp.array(stops)].add(jnp.where(closed, -jnp.inf, 0.0)[:, None])
        total = (follow + scores[..., None]).reshape(rows, -1)
        return memory, seen, *jax.lax.top_k(total, keep)

    # --- drawing ------------------------------------------------------------------------------------

    def _draw_image(self, params, memory: Memory, keys, guidance, *, steps: int, guided: bool):
        model = self.model(params)
        rows = jnp.arange(len(memory.length))
        soi = jnp.maximum(memory.length - 1, 0)[:, None]
        condition, mask = model.condition(memory.hidden, soi, jnp.zeros_like(soi))
        back = jnp.arange(model.looks_back(memory.soi.shape[1] + 1), 0, -1)
        earlier = memory.count[:, None] - back
        features = tuple(f[rows[:, None], jnp.maximum(earlier, 0)] for f in memory.features)
        return model.sample(
            condition, mask, features, earlier >= 0, keys, guidance if guided else None, steps=steps
        )

    def _look_back(self, params, memory: Memory, pixels, active) -> Memory:
        model = self.model(params)
        visual, features = model.look(pixels[:, None])
        new = jnp.asarray(active).astype(jnp.int32)
        memory = self._remember(model, memory, features, memory.length[:, None] - 1, new)
        return self._extend(model, memory, visual[:, 0], new * visual.shape[2])
