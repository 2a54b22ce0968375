"""Token cross-entropy, over chunks of the vocabulary projection; losses whose gradient is taken in turns."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from umm_jax.errors import ConfigError
from umm_jax.models.layers import is_plain, part, remade
from umm_jax.sharding import constrain


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
    # A device has all tokens of its rows here: where they were shared out, the vocabulary is instead.
    hidden = constrain(hidden, "batch", None, None)
    if needed is not None and chunk is not None:
        return _needed_losses(hidden, head, targets, chunk, needed)

    def whole(hidden, targets):
        logits = constrain(head(hidden), "batch", None, "vocab")
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        hits = jnp.argmax(logits, axis=-1) == targets
        return jax.nn.logsumexp(logits, axis=-1) - picked, hits.astype(jnp.float32)

    b, t = targets.shape
    if chunk is None or chunk >= t:
        return whole(hidden, targets)
    if t % chunk:
        raise ConfigError(f"loss_chunk={chunk} does not divide rows of {t} tokens")

    def split(a):
        return jnp.moveaxis(a.reshape(b, t // chunk, chunk, *a.shape[2:]), 1, 0)

    step = remade(lambda _, inputs: (None, whole(*inputs)))
    _, found = jax.lax.scan(step, None, (split(hidden), split(targets)))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(b, t) for a in found)


def row_likelihood(hidden, head, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log p of the targets that have a weight, by row, and whether each is the most probable: [B], bool [B].

    Arguments as of :func:`token_losses`, and weights [B, T], of which only being above 0 counts.
    """
    nll, hits = token_losses(hidden, head, targets)
    counted = weights > 0
    return jnp.sum(jnp.where(counted, nll, 0.0), axis=1), jnp.all((hits > 0) | ~counted, axis=1)


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


def in_turns(loss: Callable[[Any], jax.Array], xs: Any) -> jax.Array:
    """Sum of `loss` over the leading axis of `xs`, with one turn's arrays in memory at a time.

    The gradient is taken turn by turn on the way forward, summed in float32, and only scaled on the way back:
    a loss that stands at the end of a model needs nothing kept for it, and nothing computed twice. It reaches
    what `loss` closes over, where that is differentiated. `xs` get none; there is no second derivative.

    Args:
        loss: gives a float32 scalar.
        xs: any structure of arrays; `loss` sees them without their leading axis, which all have.
    """
    if is_plain():
        return jnp.sum(jax.lax.map(loss, jax.lax.stop_gradient(xs)))
    loss, closed = jax.closure_convert(loss, jax.tree.map(lambda x: x[0], xs))

    @jax.custom_vjp
    def total(closed, xs):
        return jax.lax.scan(lambda so_far, x: (so_far + loss(x, *closed), None), jnp.float32(0), xs)[0]

    def forward(closed, xs):
        values, xs = (jax.tree.map(lambda leaf: leaf.value, tree) for tree in (closed, xs))
        wanted = {k: leaf.value for k, leaf in enumerate(closed) if leaf.perturbed}

        def turn(so_far, x):
            def of(wanted):
                return loss(x, *(wanted.get(k, value) for k, value in enumerate(values)))

            return jax.tree.map(jnp.add, so_far, jax.value_and_grad(of)(wanted)), None

        nothing = (jnp.float32(0), {k: jnp.zeros(leaf.shape) for k, leaf in wanted.items()})
        return jax.lax.scan(turn, nothing, xs)[0]

    def backward(grads, scale):
        return [
            (scale * grads[k]).astype(x.dtype) if k in grads else None for k, x in enumerate(closed)
        ], None

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(closed, xs)
