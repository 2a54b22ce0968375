"""Classifier-free guidance by text and by images, as BAGEL combines them (docs/chatumm.md section 7)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from umm_jax.errors import ConfigError
from umm_jax.models.sampling import guided

Renorm = Literal["global", "channel", "text_channel"]


@dataclass(frozen=True)
class GuidanceConfig:
    """How a picture is guided beyond the scale away from the text-free branch.

    Attributes:
        image: scale away from the branch without images; 1 is none.
        interval: guidance acts at times in (low, high].
        renorm: what keeps the guided velocity from growing: its norm is brought down to the conditional
            one's, "global" over the picture, "channel" for each token, "text_channel" for each token and
            before images guide.
        renorm_least: the least factor that is allowed.
    """

    image: float = 1.5
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: Renorm = "global"
    renorm_least: float = 0.0

    def __post_init__(self):
        if not 0 <= self.renorm_least <= 1:
            raise ConfigError(f"guidance.renorm_least lies in [0, 1], it is {self.renorm_least}")


def guide(
    v: jax.Array,
    text_free: jax.Array,
    image_free: jax.Array | None,
    text: float | jax.Array,
    config: GuidanceConfig,
) -> jax.Array:
    """The velocity a step follows, float32 [B, G, d].

    Args:
        v, text_free, image_free: velocities of the branches; the last is needed where config.image > 1.
        text: scale of text guidance, at least 1. Images guide only where it is above 1, as in the release.
    """

    def renormed(found: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        factor = _norm(v, axes) / (_norm(found, axes) + 1e-8)
        return found * jnp.clip(factor, config.renorm_least, 1.0)

    by_text = guided(v, text_free, text)
    if config.renorm == "text_channel":
        by_text = renormed(by_text, (-1,))
    found = by_text if config.image <= 1 else guided(by_text, image_free, config.image)
    if config.renorm != "text_channel":
        found = renormed(found, (-2, -1) if config.renorm == "global" else (-1,))
    return jnp.where(jnp.asarray(text) > 1, found, v)


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
