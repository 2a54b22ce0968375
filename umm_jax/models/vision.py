"""What a vision tower gives, whichever it is."""

from typing import NamedTuple

import jax


class VisionOutput(NamedTuple):
    """Result of ``tower(pixels, key=None)`` for pixels [B, h, w, 3] in [0, 1].

    Attributes:
        tokens: [B, P, C], what a resampler turns into the tokens of a language model.
        maps: [B, h_s, w_s, C_s] per level, fine to coarse, what the synchronizers read.
    """

    tokens: jax.Array
    maps: tuple[jax.Array, ...]
