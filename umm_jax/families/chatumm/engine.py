"""The compiled parts of a reply, on ids and arrays: read, decide, write, draw.

All rows of a batch move together. What a row has read lies in a :class:`Memory`, keys and values in the order
of the stream, and is only ever added to: a token is read once in a conversation. Texts, turns and
conversations are not known here: see ``generate.py``.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax import compiler
from umm_jax.families.chatumm.config import ModelConfig
from umm_jax.families.chatumm.model import ChatUMM, build
from umm_jax.families.chatumm.segments import Special
from umm_jax.models.backbone import Cache, empty_cache
from umm_jax.models.decoding import choose_token, penalize
from umm_jax.models.guidance import GuidanceConfig, guide
from umm_jax.models.layers import Keys, depth_to_space
from umm_jax.models.masks import FULL, MaskSpec


class Memory(NamedTuple):
    """What a batch of conversations has read: B rows, capacity for S tokens.

    Attributes:
        cache: keys and values. length: tokens read [B]. rope: the next rotary position [B].
        last: hidden state of the newest understanding token [B, D].
    """

    cache: Cache
    length: jax.Array
    rope: jax.Array
    last: jax.Array

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.cache.k.shape[2]


class Sampling(NamedTuple):
    """How a token is chosen, see ``config.ReplySettings``."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0


class Branches(NamedTuple):
    """What a picture is drawn away from.

    Attributes:
        length, rope: of the memory [B], where the text-free context ends and goes on.
        image_free: another memory, of the texts alone; None where images do not guide.
    """

    length: jax.Array
    rope: jax.Array
    image_free: Memory | None


class Engine:
    """One set of parameters, and the functions compiled for it.

    Args:
        config: the family's ModelConfig; params: nested dict of arrays; special: ids of the control tokens.
        never: bool [V], ids that are never words.
    """

    def __init__(self, config: ModelConfig, params, special: Special, never: np.ndarray):
        self.config, self.params, self.special, self.never = config, params, special, never
        self.graphdef = nnx.split(nnx.eval_shape(lambda: build(config, Keys(0))))[0]
        jit = functools.partial(jax.jit, compiler_options=compiler.often())
        self._read = jit(self._read_tokens)
        self._decide = jit(self._choose_next)
        self._write = jit(self._write_text, static_argnames=("limit", "penalized"))
        self._draw = jit(self._draw_image, static_argnames=("cells", "steps", "guidance", "shift"))
        self._room = jit(self._make_room, static_argnames=("tokens",))
        self._empty = jit(self._make_empty, static_argnames=("rows", "tokens"))

    def model(self, params) -> ChatUMM:
        """The module with `params` in it."""
        return nnx.merge(self.graphdef, nnx.State(params))

    # --- what a reply is made of --------------------------------------------------------------------

    def empty(self, rows: int, tokens: int) -> Memory:
        """A memory that has read nothing."""
        return self._empty(self.params, rows=rows, tokens=tokens)

    def reserve(self, memory: Memory, tokens: int) -> Memory:
        """The same memory with room for at least so many tokens."""
        return memory if tokens <= memory.capacity else self._room(memory, tokens=tokens)

    @staticmethod
    def rewind(memory: Memory, length: np.ndarray) -> Memory:
        """The memory as it was when each row had read its first `length` [B] tokens; read more next."""
        return memory._replace(length=jnp.asarray(length, jnp.int32))

    def read(self, memory: Memory, batch: dict[str, dict[str, np.ndarray]]) -> Memory:
        """Reads more tokens. There must be room.

        Args:
            batch: "tokens" {ids, patch, rope, order, limit} [B, U], "latents" {image, cell, place, rope,
                order, limit} [B, G], "images" {pixels, size, noise}, "patches" {pixels, place, image};
                `order` is the column a token takes (beyond the capacity: none), `limit` the last one it
                reads, `noise` that of the autoencoder's sample. "rows" {length, rope, last} [B]: as they are
                after it; `last`: which of the U is the newest, -1 where none is read.
        """
        return self._read(self.params, memory, batch)

    def decide(self, memory: Memory, allowed: np.ndarray, keys: jax.Array, sampling: Sampling) -> np.ndarray:
        """What each row does next, one of `start`, `vision_start`, `turn_end`: their index 0, 1, 2, [B].

        Args:
            allowed: bool [B, 3].
        """
        chosen = self._decide(
            self.params, memory, allowed, keys, jnp.float32(sampling.temperature), jnp.float32(sampling.top_p)
        )
        return np.asarray(chosen)

    def write(
        self,
        memory: Memory,
        sampling: Sampling,
        *,
        limit: int,
        keys: jax.Array,
        active: np.ndarray,
        budget: np.ndarray,
        seen: np.ndarray | None = None,
    ) -> tuple[Memory, np.ndarray, np.ndarray]:
        """Writes a text in each active row, from its start token to its end token, and reads both.

        A row whose `budget` [B] of words is spent is closed with an end token it did not choose.

        Args:
            limit: most words of a row. seen: bool [B, V], for the repetition penalty.

        Returns:
            the memory, words [B, limit], and how many there are [B].
        """
        penalized = sampling.repetition_penalty != 1.0
        if penalized and seen is None:
            seen = np.zeros((len(active), self.config.vocab), bool)
        memory, ids, count = self._write(
            self.params,
            memory,
            keys,
            active,
            budget,
            seen if penalized else None,
            tuple(jnp.asarray(value) for value in sampling),
            limit=limit,
            penalized=penalized,
        )
        return memory, np.asarray(ids), np.asarray(count)

    def draw(
        self,
        memory: Memory,
        branches: Branches,
        keys: jax.Array,
        *,
        cells: tuple[int, int],
        steps: int,
        text: float,
        guidance: GuidanceConfig,
        shift: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws the picture that would come next in each row: uint8 [B, h, w, 3], h and w from `cells`.

        And whether all of it is numbers, bool [B].

        Args:
            steps: evaluations of the velocity; text: scale of text guidance, 1 is none; shift: of the times
                of sampling, the schedule's unless given. There must be room for the picture beyond what is
                read.
        """
        if text <= 1:
            guidance = GuidanceConfig(image=1.0)  # images guide only beside text, so nothing else is computed
        if guidance.image > 1 and branches.image_free is None:
            raise ValueError("image guidance needs a memory without images")
        made = self._draw(
            self.params,
            memory,
            branches,
            keys,
            jnp.float32(text) if text > 1 else None,
            cells=cells,
            steps=steps,
            guidance=guidance,
            shift=shift,
        )
        return tuple(map(np.asarray, made))

    # --- memories -----------------------------------------------------------------------------------

    def _make_empty(self, params, *, rows: int, tokens: int) -> Memory:
        dtype, width = self.model(params).dtype, self.config.mixture.width
        zeros = jnp.zeros(rows, jnp.int32)
        cache = empty_cache(self.config.mixture, rows, tokens, dtype)
        return Memory(cache, zeros, zeros, jnp.zeros((rows, width), dtype))

    @staticmethod
    def _make_room(memory: Memory, *, tokens: int) -> Memory:
        def grow(a):
            return jnp.pad(a, [(0, tokens - a.shape[2] if i == 2 else 0) for i in range(a.ndim)])

        return memory._replace(cache=jax.tree.map(grow, memory.cache))

    @staticmethod
    def _extend(model: ChatUMM, cache: Cache, xs, ropes, columns, limit, readable=None):
        """Runs tokens of both groups, understanding first: `columns` they take and `limit` they read up to.

        `readable`: bool [B, S], in place of all columns up to the limit.
        """
        rows, capacity = columns.shape[0], cache.k.shape[2]
        one = jnp.ones_like(limit)
        at = jnp.broadcast_to(jnp.arange(capacity), (rows, capacity))
        there = jnp.ones((rows, capacity), jnp.int32) if readable is None else readable.astype(jnp.int32)
        zeros = jnp.zeros_like(at)
        of_k = MaskSpec(there, zeros, zeros + FULL, at)
        # A split of its own for the queries: what they may read is said by the order alone.
        of_q = MaskSpec(one, one, one * FULL, limit)
        return model.mixture(xs, ropes, (of_q, of_k), cache=cache, write=columns)

    # --- reading ------------------------------------------------------------------------------------

    def _read_tokens(self, params, memory: Memory, batch) -> Memory:
        model = self.model(params)
        tokens, latents, patches, rows = (batch[name] for name in ("tokens", "latents", "patches", "rows"))
        looked = None
        if patches["place"].shape[1]:
            looked = model.look(patches["pixels"], patches["place"], patches["image"] + 1)
        generation = jnp.zeros((len(tokens["ids"]), 0, self.config.mixture.width), model.dtype)
        if latents["cell"].shape[1]:
            images = batch["images"]
            made = model.latents(images["pixels"], images["size"], images["noise"])
            clean = model.cells(made, latents["image"], latents["cell"])
            now = model.times(jnp.zeros((len(clean), 1)))
            generation = model.generation(clean, latents["place"], now)
        xs = (model.understanding(tokens["ids"], tokens["patch"], looked), generation)
        both = lambda name: jnp.concatenate([tokens[name], latents[name]], axis=1)  # noqa: E731
        hidden, cache = self._extend(
            model, memory.cache, xs, (tokens["rope"], latents["rope"]), both("order"), both("limit")
        )
        newest = hidden[0][jnp.arange(len(rows["last"])), jnp.maximum(rows["last"], 0)]
        last = jnp.where((rows["last"] >= 0)[:, None], newest, memory.last)
        return Memory(cache, rows["length"], rows["rope"], last)

    def _feed(self, model: ChatUMM, memory: Memory, ids: jax.Array, real: jax.Array) -> Memory:
        """Reads one word `ids` [B] in the rows that are `real`."""
        columns = jnp.where(real, memory.length, memory.capacity)[:, None]
        empty = jnp.zeros((len(ids), 0, memory.last.shape[1]), model.dtype)
        none = jnp.zeros((len(ids), 0), jnp.int32)
        xs = (model.understanding(ids[:, None], None, None), empty)
        hidden, cache = self._extend(
            model, memory.cache, xs, (memory.rope[:, None], none), columns, memory.length[:, None]
        )
        more = real.astype(jnp.int32)
        last = jnp.where(real[:, None], hidden[0][:, 0], memory.last)
        return Memory(cache, memory.length + more, memory.rope + more, last)

    # --- deciding and writing -------------------------------------------------------------------------

    def _choose_next(self, params, memory: Memory, allowed, keys, temperature, top_p) -> jax.Array:
        ids = jnp.array([self.special.start, self.special.vision_start, self.special.turn_end])
        logits = self.model(params).head(memory.last)[:, ids]
        keys = jax.vmap(jax.random.fold_in)(keys, memory.length)
        return choose_token(jnp.where(allowed, logits, -jnp.inf), keys, temperature, top_p)

    def _write_text(self, params, memory, keys, active, budget, seen, sampling, *, limit, penalized):
        model, rows = self.model(params), len(memory.length)
        temperature, top_p, penalty, least = sampling
        start, end = self.special.start, self.special.end
        never = jnp.asarray(self.never).at[end].set(False)
        row, active = jnp.arange(rows), jnp.asarray(active)
        memory = self._feed(model, memory, jnp.full(rows, start), active)

        def step(carry):
            memory, ids, count, running, seen, i = carry
            logits = model.head(memory.last)
            if penalized:
                logits = penalize(logits, seen, penalty)
            logits = jnp.where(never, -jnp.inf, logits)
            logits = logits.at[:, end].add(jnp.where(i < least, -jnp.inf, 0.0))
            chosen = choose_token(
                logits, jax.vmap(jax.random.fold_in)(keys, memory.length), temperature, top_p
            )
            token = jnp.where(count < budget, chosen, end)
            wrote = running & (token != end)
            ids = ids.at[:, i].set(jnp.where(wrote, token, 0), mode="drop")
            if penalized:
                seen = seen.at[row, token].set(seen[row, token] | wrote)
            memory = self._feed(model, memory, token, running)
            return memory, ids, count + wrote, wrote, seen, i + 1

        first = (memory, jnp.zeros((rows, limit), jnp.int32), jnp.zeros(rows, jnp.int32), active, seen, 0)
        memory, ids, count, *_ = jax.lax.while_loop(lambda carry: jnp.any(carry[3]), step, first)
        return memory, ids, count

    # --- drawing ------------------------------------------------------------------------------------

    def _draw_image(
        self, params, memory: Memory, branches: Branches, keys, text, *, cells, steps, guidance, shift
    ) -> tuple[jax.Array, jax.Array]:
        final = self.denoise(
            self.model(params), memory, branches, keys, text, cells, steps, guidance, shift=shift
        )
        return self.pixels(self.model(params), final, cells), jnp.all(jnp.isfinite(final), axis=(1, 2))

    def denoise(
        self,
        model: ChatUMM,
        memory: Memory,
        branches: Branches,
        keys,
        text,
        cells: tuple[int, int],
        steps: int,
        guidance: GuidanceConfig,
        *,
        shift: float | None = None,
        initial: jax.Array | None = None,
        told: bool = False,
    ):
        """Latent tokens [B, h * w, d] of the picture; with `told`, also what was computed at each step.

        The picture takes the columns behind what was read, in each branch anew: nothing of it is kept.

        Args:
            text: scale of text guidance, or None for none.
            initial: the noise, drawn from `keys` unless given.
        """
        c, flow = self.config, model.flow
        h, w = cells
        place = (jnp.arange(h)[:, None] * c.layout.latent_grid + jnp.arange(w)).reshape(1, -1)
        shape = (len(memory.length), h * w, c.latent_numbers)
        if initial is None:
            initial = jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)
        brackets = jnp.broadcast_to(
            jnp.array([self.special.vision_start, self.special.vision_end]), (shape[0], 2)
        )
        frame = model.understanding(brackets, None, None)

        def velocity(x, t, cache, length, rope, begin):
            """One branch: what it reads ends before `length`, the picture lies from `begin` on."""
            generation = model.generation(x, place, model.times(jnp.full((1, 1), t)))
            cell = begin[:, None] + 1 + jnp.arange(h * w)
            frames = begin[:, None] + jnp.array([0, h * w + 1])
            columns = jnp.concatenate([frames, cell], axis=1)
            at = jnp.arange(cache.k.shape[2])
            own = (at >= begin[:, None]) & (at <= begin[:, None] + h * w + 1)
            ropes = tuple(jnp.broadcast_to(rope[:, None], (shape[0], n)) for n in (2, h * w))
            limit = jnp.full_like(columns, cache.k.shape[2])
            readable = (at < length[:, None]) | own
            hidden, cache = self._extend(model, cache, (frame, generation), ropes, columns, limit, readable)
            return model.velocity(hidden[1]), cache

        def step(carry, times):
            x, caches = carry
            t, after = times
            v, main = velocity(x, t, caches[0], memory.length, memory.rope, memory.length)
            caches = (main, *caches[1:])
            noted = {"x_t": x, "v_cond": v}

            def with_guidance(caches):
                free, main = velocity(x, t, caches[0], branches.length, branches.rope, memory.length)
                caches, other = (main, *caches[1:]), None
                if len(caches) > 1:
                    m = branches.image_free
                    other, changed = velocity(x, t, caches[1], m.length, m.rope, m.length)
                    caches = (main, changed)
                found = guide(v, free, other, text, guidance)
                return found, free, free if other is None else other, caches

            if text is not None:
                low, high = guidance.interval
                v, free, other, caches = jax.lax.cond(
                    (t > low) & (t <= high), with_guidance, lambda caches: (v, v, v, caches), caches
                )
                noted |= {"v_text_uncond": free, "v_img_uncond": other}
            noted["v_t"] = v
            return (flow.advance(x, v, t, after), caches), noted if told else None

        caches = (memory.cache,)
        if text is not None and guidance.image > 1:
            caches += (branches.image_free.cache,)
        grid = jnp.asarray(flow.timesteps(steps, shift))
        (final, _), noted = jax.lax.scan(step, (initial, caches), (grid[:-1], grid[1:]))
        return (final, noted) if told else final

    def pixels(self, model: ChatUMM, tokens: jax.Array, cells: tuple[int, int]) -> jax.Array:
        """Latent tokens [B, h * w, d] as a picture uint8 [B, ., ., 3]."""
        decoded = model.autoencoder.decode(self.unfolded(tokens, cells).astype(model.dtype))
        return (jnp.clip(decoded.astype(jnp.float32) * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    def unfolded(self, tokens: jax.Array, cells: tuple[int, int]) -> jax.Array:
        """Latent tokens [B, h * w, d] as latents [B, h', w', c]."""
        h, w = cells
        return depth_to_space(tokens.reshape(len(tokens), h, w, -1), self.config.latent_patch)
