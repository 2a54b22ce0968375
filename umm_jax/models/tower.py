"""Vision towers by name, behind ``tower(pixels [B, h, w, 3] in [0, 1], key=None) -> VisionOutput``."""

from dataclasses import dataclass
from typing import Literal

from flax import nnx

from umm_jax.models.pyramid import Pyramid, PyramidConfig
from umm_jax.models.vision import ClipTower, ClipTowerConfig
from umm_jax.models.vision_adapter import ClipAdapter, ClipAdapterConfig


@dataclass(frozen=True)
class TowerConfig:
    """Which tower, and its sizes.

    Attributes:
        kind: "clip_adapter" is CLIP ViT with the ViT-Adapter (MM-Interleaved's release); "clip" is CLIP
            alone; "pyramid" the small convolutional one.
    """

    kind: Literal["clip_adapter", "clip", "pyramid"] = "clip_adapter"
    clip: ClipTowerConfig = ClipTowerConfig()
    clip_adapter: ClipAdapterConfig = ClipAdapterConfig()
    pyramid: PyramidConfig = PyramidConfig()

    @property
    def chosen(self) -> ClipAdapterConfig | ClipTowerConfig | PyramidConfig:
        """The sizes that count. All kinds tell what goes in and out: `image_size` (side in pixels), `tokens`
        and their `width`, `sides` of the maps and their `map_width` (None: each level has its own)."""
        return getattr(self, self.kind)


_TOWERS = {"clip_adapter": ClipAdapter, "clip": ClipTower, "pyramid": Pyramid}


def make_tower(config: TowerConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The tower a config describes."""
    return _TOWERS[config.kind](config.chosen, rngs=rngs)
