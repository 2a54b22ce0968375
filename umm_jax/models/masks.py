"""Who may read whom: one declarative mask over text and images, and the forms attention needs it in.

A token belongs to a sample, and in it to a split: a run of text, or one image with its brackets. Key k is
visible to query q iff (docs/chatumm.md section 3)

    sample_q = sample_k  and  ( order_q >= order_k  or  (split_q = split_k and mode_q is FULL or NOISE) )
                         and  not (mode_k is NOISE and split_q != split_k)

so text is causal, an image is read whole by its own tokens, a noised image is read by nobody else, and packed
samples are apart. A row of two words, a noised image, the same image clean, one word, and a second sample::

              w  w  n  n  c  c  w | w  w
        w     1  .  .  .  .  .  . | .  .
        w     1  1  .  .  .  .  . | .  .
        n     1  1  1  1  .  .  . | .  .
        n     1  1  1  1  .  .  . | .  .
        c     1  1  .  .  1  1  . | .  .
        c     1  1  .  .  1  1  . | .  .
        w     1  1  .  .  1  1  1 | .  .
        w     .  .  .  .  .  .  . | 1  .
        w     .  .  .  .  .  .  . | 1  1

Nothing is said about where a token lies: `order` is carried, so tokens may be grouped as it suits the model.
Three renderings: :func:`dense`; :func:`block_table`, which blocks of it are empty, whole or mixed; and the
four integer arrays themselves, which a kernel can read (``attention.attend`` takes them).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

CAUSAL, FULL, NOISE = 0, 1, 2
# Of a block: no query reads a key of it, some may, every query reads every key.
EMPTY, MIXED, WHOLE = 0, 1, 2


class MaskSpec(NamedTuple):
    """What the mask needs to know of tokens, int32 [B, T] each.

    Attributes:
        sample: 1, 2, ... of a row; 0 is padding, which reads nothing and is not read.
        split, order: numbered within the sample, or within the row; order does not fall along the stream.
        mode: CAUSAL, FULL or NOISE, the same for all tokens of a split.
    """

    sample: jax.Array
    split: jax.Array
    mode: jax.Array
    order: jax.Array


def stream(sample: jax.Array) -> MaskSpec:
    """Of words alone, in the order they stand in: `sample` [B, T] as in :class:`MaskSpec`."""
    order = jnp.broadcast_to(jnp.arange(sample.shape[1], dtype=jnp.int32), sample.shape)
    return MaskSpec(sample.astype(jnp.int32), order, jnp.zeros_like(order), order)


def everything(rows: int, tokens: int) -> MaskSpec:
    """Of tokens that all read all."""
    one = jnp.ones((rows, tokens), jnp.int32)
    return MaskSpec(one, one, one * FULL, one)


def joined(*specs: MaskSpec) -> MaskSpec:
    """Tokens of several groups as one, group after group."""
    return MaskSpec(*(jnp.concatenate(arrays, axis=1) for arrays in zip(*specs)))


def dense(q: MaskSpec, k: MaskSpec) -> jax.Array:
    """bool [B, T, S]: True where a query may read a key."""
    q = MaskSpec(*(a[:, :, None] for a in q))
    k = MaskSpec(*(a[:, None, :] for a in k))
    return visible(q, k)


def visible(q: MaskSpec, k: MaskSpec) -> jax.Array:
    """The rule, for arrays that broadcast against one another."""
    same = q.split == k.split
    reads = (q.order >= k.order) | (same & (q.mode != CAUSAL))
    hidden = (k.mode == NOISE) & ~same
    return (q.sample == k.sample) & (q.sample > 0) & reads & ~hidden


def block_table(q: MaskSpec, k: MaskSpec, q_block: int, k_block: int) -> jax.Array:
    """What each block of q_block queries and k_block keys holds: int32 [B, T / q_block, S / k_block].

    Told from the least and greatest value of each array in a block, without making the mask: EMPTY and WHOLE
    are certain; a MIXED block might turn out to be either.

    Raises:
        ValueError: blocks that do not divide the tokens.
    """
    for name, spec, size in (("queries", q, q_block), ("keys", k, k_block)):
        if spec.sample.shape[1] % size:
            raise ValueError(f"blocks of {size} do not divide {spec.sample.shape[1]} {name}")
    low_q, high_q = (MaskSpec(*(a[:, :, None] for a in side)) for side in _ranges(q, q_block))
    low_k, high_k = (MaskSpec(*(a[:, None, :] for a in side)) for side in _ranges(k, k_block))

    def apart(name):
        a, b, c, d = (getattr(side, name) for side in (low_q, high_q, low_k, high_k))
        return (b < c) | (d < a)

    def one(low, high, name):
        return getattr(low, name) == getattr(high, name)

    other_split = apart("split") | apart("sample")
    later = low_k.order > high_q.order
    # Ranges of samples begin at 1 where a block holds a real token, see _ranges.
    nothing = (high_q.sample == 0) | (high_k.sample == 0) | apart("sample")
    unread = (later & other_split) | (other_split & (low_k.mode == NOISE))
    alone = one(low_q, high_q, "sample") & one(low_k, high_k, "sample") & (low_q.sample == low_k.sample)
    alone &= _unpadded(q, q_block)[:, :, None] & _unpadded(k, k_block)[:, None, :]
    within = one(low_q, high_q, "split") & one(low_k, high_k, "split") & (low_q.split == low_k.split)
    before = (low_q.order >= high_k.order) & (high_k.mode < NOISE)
    whole = alone & (before | (within & (low_q.mode > CAUSAL)))
    return jnp.where(nothing | unread, EMPTY, jnp.where(whole, WHOLE, MIXED)).astype(jnp.int32)


def _ranges(spec: MaskSpec, size: int) -> tuple[MaskSpec, MaskSpec]:
    """Least and greatest value of each array over the real tokens of a block; big and 0 where it has none."""
    cut = [a.reshape(a.shape[0], -1, size) for a in spec]
    real = cut[0] > 0
    big = jnp.iinfo(jnp.int32).max
    low = MaskSpec(*(jnp.min(jnp.where(real, a, big), axis=-1) for a in cut))
    high = MaskSpec(*(jnp.max(jnp.where(real, a, 0), axis=-1) for a in cut))
    return low, high


def _unpadded(spec: MaskSpec, size: int) -> jax.Array:
    return jnp.all(spec.sample.reshape(spec.sample.shape[0], -1, size) > 0, axis=-1)
