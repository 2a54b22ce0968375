"""Resamplers: turn any number of tokens into what the reader of them expects.

One interface, two kinds, made by :func:`build`:

    resampler(tokens [B, T, d_in], mask [B, T] or None, key=None) -> (tokens [B, Q, d_out], mask [B, Q] or None)
"""

from dataclasses import dataclass
from typing import Literal

import jax
from flax import nnx

from umm_jax.models.layers import Linear


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a resampler.

    Attributes:
        kind: "none" hands the tokens on.
        d_in, d_out: widths of the tokens that come in and go out.
    """

    kind: Literal["none"] = "none"
    d_in: int = 1024
    d_out: int = 5120


class Bypass(nnx.Module):
    """Hands the tokens on, through one linear layer when the widths differ: Q = T."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        same = config.d_in == config.d_out
        self.project = None if same else Linear(config.d_in, config.d_out, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        return (tokens if self.project is None else self.project(tokens)), mask


def build(config: ResamplerConfig, *, rngs: nnx.Rngs) -> Bypass:
    """The resampler of `config.kind`."""
    return Bypass(config, rngs=rngs)
