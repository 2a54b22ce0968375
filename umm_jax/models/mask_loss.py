"""Losses and measures of masks, as LISA trains and judges them (arXiv 2308.00692)."""

import jax
import jax.numpy as jnp
import optax

# Of LISA's code: sums are divided by it before the ratio is made.
_SCALE, _EPS = 1000.0, 1e-6


def mask_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Binary cross entropy, mean over pixels, and DICE, of each mask.

    Args:
        logits: [M, H, W]. targets: [M, H, W], 0 or 1.

    Returns:
        [M] and [M], float32.
    """
    logits, targets = (x.astype(jnp.float32).reshape(len(x), -1) for x in (logits, targets))
    entropy = optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1)
    p = jax.nn.sigmoid(logits)
    both = 2 * (p * targets).sum(-1) / _SCALE + _EPS
    each = (p.sum(-1) + targets.sum(-1)) / _SCALE + _EPS
    return entropy, 1 - both / each
