"""Token cross-entropy, over chunks of the vocabulary projection."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


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


def token_losses(
    hidden: jax.Array,
    head: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    *,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-log p(target), and 1 where the target is the most probable token, float32 [B, T] each.

    Args:
        hidden: [B, T, D]; head: maps [B, t, D] to float32 logits [B, t, V].
        targets: [B, T].
        chunk: positions projected at a time; logits of other chunks are recomputed in the backward pass,
            so that memory is B * chunk * V. None projects all at once; must divide T.
    """

    def part(hidden, targets):
        logits = head(hidden)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        hits = jnp.argmax(logits, axis=-1) == targets
        return jax.nn.logsumexp(logits, axis=-1) - picked, hits.astype(jnp.float32)

    b, t = targets.shape
    if chunk is None or chunk >= t:
        return part(hidden, targets)
    if t % chunk:
        raise ValueError(f"chunk {chunk} does not divide {t} tokens")

    def split(a):
        return jnp.moveaxis(a.reshape(b, t // chunk, chunk, *a.shape[2:]), 1, 0)

    step = jax.checkpoint(lambda _, inputs: (None, part(*inputs)))
    _, found = jax.lax.scan(step, None, (split(hidden), split(targets)))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(b, t) for a in found)
