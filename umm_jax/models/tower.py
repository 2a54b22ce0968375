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
    def chosen(self) -> ClipAdapterConfig | PyramidConfig:
        """The sizes that count. Both kinds tell what goes in and out: `image_size` (side in pixels), `tokens`
        and their `width`, `sides` of the maps and their `map_width` (None: each level has its own)."""
        return self.clip_adapter if self.kind == "clip_adapter" else self.pyramid


def make_tower(config: TowerConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The tower a config describes."""
    if config.kind == "clip_adapter":
        return ClipAdapter(config.clip_adapter, rngs=rngs)
    return Pyramid(config.pyramid, rngs=rngs)
