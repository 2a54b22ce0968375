"""Where an image loss should look: more weight on blocks that hold something, and on blocks that changed.

On flat pictures most pixels are background, and after an edit most blocks are copies; a plain mean error then
rewards everything but the content. Weights per block of pixels restore the balance.
Source: ours. The worlds in ``configs/`` use 1 + 4 on detail + 6 on change, a block for each cell.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class ImageLossConfig:
    """Extra weight on blocks of `block` pixels with detail, and on those changed since the image before."""

    block: int = 8
    detail: float = 4.0
    change: float = 6.0


def _spread(blocks: jax.Array, block: int) -> jax.Array:
    """One value per block -> one per pixel: [B, h/b, w/b] -> [B, h, w, 1]."""
    return jnp.repeat(jnp.repeat(blocks, block, axis=1), block, axis=2)[..., None]


def _tiles(images: jax.Array, block: int) -> jax.Array:
    """[B, h, w, C] -> [B, h/b, b, w/b, b, C]."""
    b, h, w, c = images.shape
    if h % block or w % block:
        raise ValueError(f"blocks of {block} px do not tile images of {h}x{w}")
    return images.reshape(b, h // block, block, w // block, block, c)


def block_weights(
    target: jax.Array,
    previous: jax.Array | None = None,
    has_previous: jax.Array | None = None,
    *,
    block: int,
    detail: float = 0.0,
    change: float = 0.0,
    eps: float = 0.02,
) -> jax.Array:
    """1 + detail * [block is not constant] + change * [block differs from the previous image], per pixel.

    Args:
        target: [B, h, w, C], any value range.
        previous: the image before each target, same shape; None when no image has one.
        has_previous: [B], True where `previous` is real; None means everywhere.
        block: side of a block in pixels; divides h and w.
        detail, change: the extra weights.
        eps: differences up to this size count as none, in the units of `target`.

    Returns:
        [B, h, w, 1] float32.

    Raises:
        ValueError: blocks do not tile the image.
    """
    target = target.astype(jnp.float32)
    tiles = _tiles(target, block)
    spread = jnp.max(tiles, axis=(2, 4)) - jnp.min(tiles, axis=(2, 4))
    weights = 1.0 + detail * _spread(jnp.any(spread > eps, axis=-1), block)
    if previous is not None and change:
        difference = jnp.abs(_tiles(previous.astype(jnp.float32), block) - tiles)
        changed = _spread(jnp.any(difference > eps, axis=(2, 4, 5)), block)
        if has_previous is not None:
            changed = changed & has_previous.astype(bool)[:, None, None, None]
        weights = weights + change * changed
    return weights


def pool_weights(weights: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Weight map [B, h, w, 1] averaged down to the (h', w') of the latents: [B, h', w', 1]."""
    b, h, w, _ = weights.shape
    if h % shape[0] or w % shape[1]:
        raise ValueError(f"a weight map of {h}x{w} cannot be averaged to {shape[0]}x{shape[1]}")
    return jnp.mean(weights.reshape(b, shape[0], h // shape[0], shape[1], w // shape[1], 1), axis=(2, 4))


def weighted_mse(
    prediction: jax.Array,
    target: jax.Array,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted squared error of each image as numerator and denominator.

    Args:
        prediction, target: [B, h, w, C].
        weights: [B, h, w, 1] of :func:`block_weights`; None is 1 everywhere.

    Returns:
        (sum, weight), both [B] float32: sum of weight times the mean over channels of the squared error, and
        the sum of weights. sum(sum) / sum(weight) over images is the mean error.
    """
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    error = jnp.mean(difference**2, axis=-1, keepdims=True)
    weights = jnp.ones(error.shape, jnp.float32) if weights is None else weights
    return jnp.sum(error * weights, axis=(1, 2, 3)), jnp.sum(weights, axis=(1, 2, 3))
