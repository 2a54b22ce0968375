"""Token cross-entropy, over chunks of the vocabulary projection."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from umm_jax.models.layers import part, remade


def next_token_targets(tokens: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Targets and weights of each position: the token after it, if it belongs to the same conversation.

    Args:
        tokens: "ids", "weight" (of predicting that token) and "segment_ids", each [B, T].

    Returns:
        ids [B, T] and weights [B, T]; the last column has weight 0.
    """
    ids = jnp.pad(tokens["ids"][:, 1:], ((0, 0), (0, 1)))
    weight = jnp.pad(tokens["weight"][:, 1:], ((0, 0), (0, 1)))
    segments = tokens["segment_ids"]
    same = segments == jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return ids, jnp.where(same, weight, 0.0)


def cross_entropy(
    hidden: jax.Array,
    head: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of weighted -log p(target), and of weighted hits of the most probable token.

    Args:
        weights: [B, T]; the rest as in :func:`token_losses`.
    """
    nll, hits = token_losses(hidden, head, targets, chunk=chunk)
    return jnp.sum(nll * weights), jnp.sum(hits * weights)


@part("head")
def token_losses(
    hidden: jax.Array,
    head: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    *,
    chunk: int | None = None,
    needed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-log p(target), and 1 where the target is the most probable token, float32 [B, T] each.

    Args:
        hidden: [B, T, D]; head: maps [B, t, D] to float32 logits [B, t, V].
        targets: [B, T].
        chunk: positions projected at a time; logits of other chunks are recomputed in the backward pass,
            so that memory is B * chunk * V. None projects all at once. Divides T, unless `needed` is given.
        needed: bool [B, T], where the result matters; elsewhere it is 0, and with a `chunk` no more positions
            are projected than the row with most of them needs, rounded up to chunks.
    """
    if needed is not None and chunk is not None:
        return _needed_losses(hidden, head, targets, chunk, needed)

    def whole(hidden, targets):
        logits = head(hidden)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        hits = jnp.argmax(logits, axis=-1) == targets
        return jax.nn.logsumexp(logits, axis=-1) - picked, hits.astype(jnp.float32)

    b, t = targets.shape
    if chunk is None or chunk >= t:
        return whole(hidden, targets)
    if t % chunk:
        raise ValueError(f"chunk {chunk} does not divide {t} tokens")

    def split(a):
        return jnp.moveaxis(a.reshape(b, t // chunk, chunk, *a.shape[2:]), 1, 0)

    step = remade(lambda _, inputs: (None, whole(*inputs)))
    _, found = jax.lax.scan(step, None, (split(hidden), split(targets)))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(b, t) for a in found)


def _needed_losses(hidden, head, targets, chunk: int, needed):
    """:func:`token_losses` of the needed positions, brought to the front of their row."""
    b, t = targets.shape
    order = jnp.argsort(~needed, axis=1, stable=True)
    fill = -t % chunk

    def cut(a):
        a = jnp.take_along_axis(a, order.reshape(*order.shape, *[1] * (a.ndim - 2)), axis=1)
        a = jnp.pad(a, [(0, 0), (0, fill)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(b, -1, chunk, *a.shape[2:]), 1, 0)

    def real(inputs):
        hidden, targets, needed = inputs
        nll, hits = token_losses(hidden, head, targets)
        return jnp.where(needed, nll, 0.0), jnp.where(needed, hits, 0.0)

    def step(_, inputs):
        nothing = (jnp.zeros((b, chunk)), jnp.zeros((b, chunk)))
        return None, jax.lax.cond(jnp.any(inputs[2]), real, lambda _: nothing, inputs)

    _, found = jax.lax.scan(remade(step), None, (cut(hidden), cut(targets), cut(needed)))
    back = jnp.argsort(order, axis=1)
    found = (jnp.moveaxis(a, 0, 1).reshape(b, -1)[:, :t] for a in found)
    return tuple(jnp.take_along_axis(a, back, axis=1) for a in found)
