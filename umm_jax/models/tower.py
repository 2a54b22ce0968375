"""Vision towers by name, behind ``tower(pixels [B, h, w, 3] in [0, 1], key=None) -> VisionOutput``."""

from dataclasses import dataclass
from typing import Literal

from flax import nnx

from umm_jax.models.pyramid import Pyramid, PyramidConfig
from umm_jax.models.vision_adapter import ClipAdapter, ClipAdapterConfig


@dataclass(frozen=True)
class TowerConfig:
    """Which tower, and its sizes.

    Attributes:
        kind: "clip_adapter" is CLIP ViT with the ViT-Adapter (the release); "pyramid" the small
            convolutional one.
    """

    kind: Literal["clip_adapter", "pyramid"] = "clip_adapter"
    clip_adapter: ClipAdapterConfig = ClipAdapterConfig()
    pyramid: PyramidConfig = PyramidConfig()

    @property
    def image_size(self) -> int:
        """Side of the input in pixels."""
        return (self.clip_adapter if self.kind == "clip_adapter" else self.pyramid).image_size


def make_tower(config: TowerConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The tower a config describes."""
    if config.kind == "clip_adapter":
        return ClipAdapter(config.clip_adapter, rngs=rngs)
    return Pyramid(config.pyramid, rngs=rngs)
