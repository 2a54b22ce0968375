"""The compiled parts of a reply, on ids and arrays: read, write, see masks.

All rows of a batch move together. What has been read is kept in a :class:`Memory`, so that a reply goes on
after a picture that a call gave. Texts, turns and conversations are not known here: see ``generate.py``.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax import compiler
from umm_jax.families.unified_mllm.config import ModelConfig
from umm_jax.families.unified_mllm.model import UnifiedMLLM, build
from umm_jax.markup.automaton import Automaton
from umm_jax.models.backbone import Cache
from umm_jax.models.decoding import Constraint, Held, choose_token, penalize
from umm_jax.models.layers import Keys

# Why a row stopped writing: its budget, or the index of a stop token counted from 1.
LIMIT = 0


class Memory(NamedTuple):
    """What a batch of conversations has read: B rows, capacity for S tokens.

    Attributes:
        cache: keys and values; hidden: final hidden states [B, S, D].
        length: tokens read [B]. last: hidden state of the last of them [B, D].
        held: where in the grammar each row's reply is. said: bool [B, V], what it has written of it.
    """

    cache: Cache
    hidden: jax.Array
    length: jax.Array
    last: jax.Array
    held: Held
    said: jax.Array


class Sampling(NamedTuple):
    """How a token is chosen: scalars; see ``config.ReplySettings``."""

    temperature: jax.Array
    top_p: jax.Array
    penalty: jax.Array
    least: jax.Array


class Written(NamedTuple):
    """Tokens of each row [B, limit], how many [B], and why it stopped [B]."""

    ids: np.ndarray
    count: np.ndarray
    stop: np.ndarray


class Engine:
    """One set of parameters, and the functions compiled for it.

    Args:
        config: the family's ModelConfig; params: nested dict of arrays.
        never: bool [V], ids that are never written.
        automaton: what replies are held to; None lets them be.
    """

    def __init__(self, config: ModelConfig, params, never: np.ndarray, automaton: Automaton | None = None):
        self.config, self.params, self.never = config, params, never
        self.constraint = None if automaton is None else Constraint(*map(jnp.asarray, automaton))
        self.graphdef = nnx.split(nnx.eval_shape(lambda: build(config, Keys(0))))[0]
        jit = functools.partial(jax.jit, compiler_options=compiler.often())
        self._read = jit(self._read_tokens)
        self._write = jit(self._write_text, static_argnames=("limit", "stops"))
        self._see = jit(self._see_masks)
        self._empty = jit(self._make_empty, static_argnames=("rows", "tokens"))

    def model(self, params) -> UnifiedMLLM:
        """The module with `params` in it."""
        return nnx.merge(self.graphdef, nnx.State(params))

    # --- what a reply is made of --------------------------------------------------------------------

    def empty(self, rows: int, tokens: int) -> Memory:
        """A memory that has read nothing."""
        return self._empty(self.params, rows=rows, tokens=tokens)

    def read(self, memory: Memory, batch: dict[str, np.ndarray]) -> Memory:
        """Reads more tokens and images.

        Args:
            batch: `ids`, `image` (which of the new images, -1 for none), `slot` [B, T]; `pixels`
                [B, N, h, w, 3] of the new images; `length` [B]: how many of T are real. There must be room.
        """
        return self._read(self.params, memory, batch)

    def write(
        self,
        memory: Memory,
        sampling: Sampling,
        keys: jax.Array,
        active: np.ndarray,
        budget: np.ndarray,
        *,
        limit: int,
        stops: tuple[int, ...],
    ) -> tuple[Memory, Written]:
        """Writes tokens until every active row [B] meets a stop token or its budget [B], and reads them.

        The first of `stops` is the end of the turn, which is not read; the others are.
        """
        memory, *found = self._write(
            self.params, memory, sampling, keys, active, budget, limit=limit, stops=stops
        )
        return memory, Written(*map(np.asarray, found))

    def masks(self, memory: Memory, rows: np.ndarray, columns: np.ndarray, images: dict) -> np.ndarray:
        """Logits of masks, float32 [M, s, s].

        Args:
            rows, columns: [M], of the marks that ask. images: features [M, ...] of what each is about.
        """
        return np.asarray(self._see(self.params, memory.hidden, rows, columns, images))

    # --- compiled -----------------------------------------------------------------------------------

    def _make_empty(self, params, *, rows: int, tokens: int) -> Memory:
        model, width = self.model(params), self.config.backbone.width
        zeros = jnp.zeros(rows, jnp.int32)
        return Memory(
            cache=model.backbone.empty_cache(rows, tokens, model.dtype),
            hidden=jnp.zeros((rows, tokens, width), model.dtype),
            length=zeros,
            last=jnp.zeros((rows, width), model.dtype),
            held=Held(zeros, zeros),
            said=jnp.zeros((rows, self.config.vocab), bool),
        )

    def _read_tokens(self, params, memory: Memory, batch) -> Memory:
        model, visual = self.model(params), None
        if batch["pixels"].shape[1]:
            visual, _ = model.look({"pixels": batch["pixels"]}, masks=False)
        x = model.embed_tokens(batch["ids"], batch["image"], batch["slot"], visual)
        return self._extend(model, memory, x, batch["length"])

    @staticmethod
    def _extend(model: UnifiedMLLM, memory: Memory, x: jax.Array, new: jax.Array) -> Memory:
        """Reads `new` [B] more of the tokens embedded in x [B, T, D]."""
        steps = jnp.arange(x.shape[1])
        columns = memory.length[:, None] + steps
        capacity = memory.hidden.shape[1]
        write = jnp.where(steps < new[:, None], columns, capacity)
        mask = jnp.arange(capacity) <= columns[..., None]
        hidden, cache = model.backbone(x, columns, mask, cache=memory.cache, write=write)
        rows = jnp.arange(x.shape[0])
        stored = memory.hidden.at[rows[:, None], write].set(hidden, mode="drop")
        last = jnp.where((new > 0)[:, None], hidden[rows, jnp.maximum(new - 1, 0)], memory.last)
        return memory._replace(cache=cache, hidden=stored, length=memory.length + new, last=last)

    def _write_text(self, params, memory, sampling: Sampling, keys, active, budget, *, limit, stops):
        model, rows = self.model(params), len(memory.length)
        row, end = jnp.arange(rows), stops[0]

        def step(carry):
            memory, ids, written, stop, running, i = carry
            logits = penalize(model.head(memory.last), memory.said, sampling.penalty)
            logits = jnp.where(self.never, -jnp.inf, logits)
            logits = logits.at[:, end].add(jnp.where(written < sampling.least, -jnp.inf, 0.0))
            if self.constraint is not None:
                allowed = self.constraint.allowed(memory.held, jnp.asarray(budget) - written)
                # Where `least` tokens are asked for and nothing else may come, the end may.
                none = ~jnp.any(allowed & (logits > -jnp.inf), axis=-1, keepdims=True)
                only_end = jnp.where(jnp.arange(logits.shape[-1]) == end, 0.0, -jnp.inf)
                logits = jnp.where(none, only_end, jnp.where(allowed, logits, -jnp.inf))
            step_keys = jax.vmap(jax.random.fold_in)(keys, memory.length)
            token = choose_token(logits, step_keys, sampling.temperature, sampling.top_p)
            ids = ids.at[:, i].set(jnp.where(running, token, 0))
            memory = memory._replace(said=memory.said.at[row, token].max(running))
            written = written + running
            for number, stop_id in enumerate(stops, 1):
                stop = jnp.where(running & (token == stop_id), number, stop)
            read = running & (token != end)
            if self.constraint is not None:
                held = self.constraint.step(memory.held, token)
                held = jax.tree.map(lambda new, old: jnp.where(read, new, old), held, memory.held)
                memory = memory._replace(held=held)
            memory = self._extend(model, memory, model.embed_tokens(token[:, None]), read.astype(jnp.int32))
            running = running & (stop == LIMIT) & (written < budget)
            return memory, ids, written, stop, running, i + 1

        start = (
            memory,
            jnp.zeros((rows, limit), jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.full(rows, LIMIT),
            jnp.asarray(active) & (jnp.asarray(budget) > 0),
            0,
        )
        memory, ids, written, stop, *_ = jax.lax.while_loop(
            lambda c: jnp.any(c[4]) & (c[5] < limit), step, start
        )
        return memory, ids, written, stop

    def _see_masks(self, params, hidden, rows, columns, images):
        model = self.model(params)
        _, features = model.look({name: a[:, None] for name, a in images.items()})
        back = int(self.config.masks.state == "predicting")
        asking = hidden[rows, jnp.maximum(columns - back, 0)]
        return model.masks(asking, features[:, 0], self.config.layout.mask_size)
