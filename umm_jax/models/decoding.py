"""Choosing the next token: greedy, temperature and nucleus, row by row with its own key, or among few."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def choose_token(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """One token per row.

    Args:
        logits: [B, V], -inf where a token is forbidden.
        keys: [B] random keys.
        temperature: 0 takes the most probable token.
        top_p: samples among the most probable tokens that together hold this mass (at least one).

    Returns:
        int32 [B].
    """
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # The token that crosses the threshold is kept: what counts is the mass before it.
    kept = jnp.pad(mass[:, :-1], ((0, 0), (1, 0))) < top_p
    cutoff = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    nucleus = jnp.where(scaled >= cutoff, scaled, -jnp.inf)
    sampled = jax.vmap(jax.random.categorical)(keys, nucleus)
    return jnp.where(temperature > 0, sampled, greedy).astype(jnp.int32)


def penalize(scores: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Repetition penalty: scores [B, V] of tokens `seen` before are divided by `penalty` where positive, and
    multiplied by it elsewhere (Keskar et al. 2019, arXiv 1909.05858, section 4.1)."""
    return jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


class Held(NamedTuple):
    """Where each row of a text is that is held to a grammar: [B] each, zeros at the beginning."""

    context: jax.Array
    mode: jax.Array


class Constraint(NamedTuple):
    """The tables of ``markup.automaton.Automaton``: which tokens keep a text well formed."""

    follow: jax.Array
    within: jax.Array
    after: jax.Array
    ends: jax.Array
    least: jax.Array

    def allowed(self, held: Held, left: jax.Array) -> jax.Array:
        """What may come next: bool [B, V].

        `left` [B] tokens may still be written, this one among them. What is open can then always be closed
        and the text be ended; with none left nothing is allowed.
        """
        mode = self.follow[held.mode].astype(jnp.int32)
        context = jnp.where(self.after < 0, held.context[:, None], self.after)
        cost = jnp.where(self.ends, 0, self.least[mode] + (context != 0) + 1)
        return (mode >= 0) & self.within[held.context] & (cost < left[:, None])

    def step(self, held: Held, token: jax.Array) -> Held:
        """After `token` [B]."""
        after = self.after[token]
        context = jnp.where(after < 0, held.context, after)
        return Held(context.astype(jnp.int32), self.follow[held.mode, token].astype(jnp.int32))
