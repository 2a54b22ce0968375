"""Every size and choice of the model. The defaults are GroundingGPT's and LISA's, of whose kind it is.

The authors of UnifiedMLLM (arXiv 2408.02503) released nothing: what the paper leaves open is a value here.
"""

from dataclasses import dataclass, field
from typing import Literal

from umm_jax.errors import ConfigError
from umm_jax.families.unified_mllm.stream import LayoutConfig
from umm_jax.models.backbone import BackboneConfig
from umm_jax.models.mask_decoder import MaskDecoderConfig
from umm_jax.models.sam_encoder import SamEncoderConfig
from umm_jax.models.tower import TowerConfig


@dataclass(frozen=True)
class MaskConfig:
    """The mask head: a state of the language model asks, a map is looked at.

    Attributes:
        decoder: sizes of the mask decoder.
        encoder: SAM's image encoder, whose map it looks at, as LISA's does; None is the tower's map.
        level: which of the tower's maps it looks at, 0 the finest.
        state: whose hidden state asks: of the token "predicting" the mark, as in LISA, or of the "token".
        most: marks of one reply that are answered.
    """

    decoder: MaskDecoderConfig = MaskDecoderConfig()
    encoder: SamEncoderConfig | None = None
    level: int = 0
    state: Literal["predicting", "token"] = "predicting"
    most: int = 8


@dataclass(frozen=True)
class ModelConfig:
    """A UnifiedMLLM model.

    Attributes:
        layout: spelling and sizes of the stream.
        backbone: the language model, with the experts of the third stage where it has `experts`.
        tower: the vision tower.
        adapter: hidden widths of the layers between the tower and the language model; (): one layer.
        masks: the mask head; None is without, and a mark then asks for nothing.
        balance_delta: how much more the experts meant for a kind of conversation are to be used by it.
        constrain: what a reply is held to: "off", balanced "tags", or "full", places too.
        visual_std: initial scale of the adapter's last layer.
        loss_chunk: positions whose logits are held at a time; None holds all.
    """

    layout: LayoutConfig = LayoutConfig()
    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(
            vocab=32064, width=4096, layers=32, heads=32, mlp=11008, norm_eps=1e-5
        )
    )
    tower: TowerConfig = TowerConfig(kind="clip")
    adapter: tuple[int, ...] = (4096,)
    masks: MaskConfig | None = MaskConfig()
    balance_delta: float = 0.0
    constrain: Literal["off", "tags", "full"] = "tags"
    visual_std: float = 0.02
    loss_chunk: int | None = None

    def __post_init__(self):
        tower, layout = self.tower.chosen, self.layout
        if self.backbone.synchronizer is not None:
            raise ConfigError("backbone.synchronizer: this family has none, only mm_interleaved does")
        for name, value, other in (
            ("image_size", layout.image_size, tower.image_size),
            ("image_tokens", layout.image_tokens, tower.tokens),
        ):
            if value != other:
                raise ConfigError(f"layout.{name} is {value}, but the tower has {other}; they must be equal")
        if self.masks is not None and not 0 <= self.masks.level < len(tower.sides):
            raise ConfigError(f"masks.level {self.masks.level}: the tower has {len(tower.sides)} maps")
        encoder = self.masks and self.masks.encoder
        if layout.large_size != (encoder.image_size if encoder else 0):
            raise ConfigError(
                f"layout.large_size is {layout.large_size}, but masks.encoder sees "
                f"{encoder.image_size if encoder else 'nothing, there is none: 0'}"
            )
        if encoder and encoder.out != self.masks.decoder.width:
            raise ConfigError(
                f"masks.encoder.out {encoder.out} must be decoder.width {self.masks.decoder.width}"
            )
        if not 0 <= self.balance_delta <= 1:
            raise ConfigError(f"balance_delta is a share from 0 to 1, it is {self.balance_delta}")

    @property
    def vocab(self) -> int:
        """Rows of the embedding: the most pieces a tokenizer may have."""
        return self.backbone.vocab

    @property
    def map_width(self) -> int:
        """Channels of the map the mask head looks at."""
        tower = self.tower.chosen
        if tower.map_width is not None:
            return tower.map_width
        return tower.widths[self.masks.level]
