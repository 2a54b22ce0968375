"""Every size and choice of the model. The defaults are the release; presets are in ``configs/``."""

from dataclasses import dataclass
from typing import Literal

from umm_jax.errors import ConfigError
from umm_jax.families.mm_interleaved.stream import LayoutConfig, most_images
from umm_jax.models.autoencoder import AutoencoderConfig
from umm_jax.models.backbone import BackboneConfig
from umm_jax.models.image_loss import ImageLossConfig
from umm_jax.models.resampler import ResamplerConfig
from umm_jax.models.sampling import ScheduleConfig
from umm_jax.models.synchronizer import SynchronizerConfig
from umm_jax.models.tower import TowerConfig
from umm_jax.models.unet import UNetConfig
from umm_jax.models.unet_sync import UNetSyncConfig


@dataclass(frozen=True)
class ContextConfig:
    """What the image decoder reads of the conversation: the last `length` hidden states up to the soi.

    Attributes:
        positions: "sincos" table over the distance from the soi, or "learned" vectors of deviation `std`.
        project: a linear map before the positions are added.
    """

    length: int = 2048
    positions: Literal["sincos", "learned"] = "sincos"
    project: bool = True
    std: float = 0.02


@dataclass(frozen=True)
class ModelConfig:
    """An MM-Interleaved model.

    Attributes:
        layout: spelling and sizes of the stream.
        backbone: the language model and its synchronizer.
        tower: the vision tower.
        visual_resampler: tower tokens to the `layout.image_tokens` tokens of an image.
        context, context_resampler: hidden states to the condition of the image decoder.
        unet, unet_sync: the image decoder and its synchronizer (None: it sees no earlier image).
        autoencoder, schedule: what the decoder's latents are, and how they are noised.
        added_tokens: ids at the end of the vocabulary with a trainable head of their own (docs section 4).
        decoder_images: what the image decoder's synchronizer looks at: the "previous" image, as the release
            does, or all "visible" earlier ones of the conversation, as the paper says.
        compat: "release" reproduces what the released code does and we would not: attention and positions run
            over a whole packed row, across conversations, and the image loss is a mean over all images of the
            batch, those without context (bos and soi alone) as zeros.
        uncond_prob: share of images trained without their condition, for guidance.
        image_loss: weights of the image loss; None is uniform.
        max_drawn: the decoder is trained on at most this many images of a row, the last ones drawn; None runs
            it on all, the shown ones too, whose loss is then thrown away.
        noise_draws: times and noises each drawn image is learned from in a step. Their mean is a steadier
            gradient, at the cost of the decoder alone.
        visual_std, head_std: initial scale of the projection to visual tokens, and of the output head.
        loss_chunk: positions whose logits are held at a time; None holds all.
        draw_chunk: images of a row that the decoder is run on at a time, there and back, so that what its
            gradient needs is kept of these alone; None is all. Divides the images it is trained on.
    """

    layout: LayoutConfig = LayoutConfig()
    backbone: BackboneConfig = BackboneConfig(synchronizer=SynchronizerConfig())
    tower: TowerConfig = TowerConfig()
    visual_resampler: ResamplerConfig = ResamplerConfig()
    context: ContextConfig = ContextConfig()
    context_resampler: ResamplerConfig = ResamplerConfig(
        d_in=5120, d_out=1024, queries=77, layers=1, heads=16, cross_every=1, qk_norm=False, dropout=0.0
    )
    unet: UNetConfig = UNetConfig()
    unet_sync: UNetSyncConfig | None = UNetSyncConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    added_tokens: int = 2
    decoder_images: Literal["previous", "visible"] = "previous"
    compat: Literal["none", "release"] = "none"
    uncond_prob: float = 0.1
    image_loss: ImageLossConfig | None = None
    max_drawn: int | None = None
    noise_draws: int = 1
    visual_std: float = 1e-3
    head_std: float = 0.02
    loss_chunk: int | None = None
    draw_chunk: int | None = None

    def __post_init__(self):
        tower, layout = self.tower.chosen, self.layout
        self._same("unet.side", self.unet.side, "the side of the latents", self.latent_side)
        for name in ("in_channels", "out_channels"):
            self._same(
                f"unet.{name}", getattr(self.unet, name), "channels of the latents", self.latent_shape[2]
            )
        self._same("layout.image_size", layout.image_size, "what the tower reads", tower.image_size)
        # A slot without a token of its own would read the next image's.
        slots = self.visual_resampler.count(tower.tokens)
        self._same("layout.image_tokens", layout.image_tokens, "tokens of an image", slots)
        self._same("visual_resampler.d_in", self.visual_resampler.d_in, "the tower's width", tower.width)
        width = self.backbone.width
        self._same("context_resampler.d_in", self.context_resampler.d_in, "backbone.width", width)
        d_out = self.context_resampler.d_out
        self._same("unet.context_width", self.unet.context_width, "context_resampler.d_out", d_out)
        sync, decoder = self.backbone.synchronizer, self.unet_sync
        if sync is not None:
            self._same("backbone.synchronizer.d_query", sync.d_query, "backbone.width", width)
            self._same("backbone.synchronizer.d_out", sync.d_out, "backbone.width", width)
            self._same(
                "backbone.synchronizer.d_maps", sync.d_maps, "width of the tower's maps", tower.map_width
            )
            if not set(sync.sides) <= set(tower.sides):
                raise ConfigError(f"backbone.synchronizer.sides {sync.sides}: the maps have {tower.sides}")
        if decoder is not None:
            self._same("unet_sync.d_maps", decoder.d_maps, "width of the tower's maps", tower.map_width)
            self._same(
                "unet_sync.sides", tuple(decoder.sides), "sides of the tower's maps", tuple(tower.sides)
            )
        if self.image_loss is not None and layout.target_size % self.image_loss.block:
            raise ConfigError(
                f"image_loss.block {self.image_loss.block} must divide target_size {layout.target_size}"
            )
        if self.schedule.guidance != 1 and not self.uncond_prob:
            raise ConfigError("schedule.guidance needs images trained without condition: set uncond_prob > 0")
        if self.max_drawn is not None and self.max_drawn < 1:
            raise ConfigError(f"max_drawn must be positive, or null for all, it is {self.max_drawn}")
        if self.draw_chunk is not None and self.draw_chunk < 1:
            raise ConfigError(f"draw_chunk must be positive, or null for all, it is {self.draw_chunk}")
        if self.noise_draws < 1:
            raise ConfigError(f"noise_draws must be at least 1, it is {self.noise_draws}")
        if self.compat == "release" and (self.max_drawn is not None or self.image_loss is not None):
            raise ConfigError(
                'compat="release" takes the mean over all images: leave out max_drawn and image_loss'
            )

    @staticmethod
    def _same(name: str, value, what: str, other) -> None:
        if value != other:
            raise ConfigError(f"config.model: {name} is {value}, but {what}: {other}; they must be equal")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of what the image decoder draws."""
        return self.autoencoder.latent_shape(self.layout.target_size)

    @property
    def latent_side(self) -> int:
        return self.latent_shape[0]

    @property
    def vocab(self) -> int:
        """Rows of the embedding: the most pieces a tokenizer may have."""
        return self.backbone.vocab

    @property
    def soi_id(self) -> int:
        return self.layout.soi_id

    @property
    def most_images(self) -> int | None:
        """The most images a conversation may hold, as the synchronizers' tables have it; None is no bound."""
        sync, decoder = self.backbone.synchronizer, self.unet_sync
        looks = self.decoder_images == "visible" and decoder is not None
        return most_images(sync and sync.max_images, decoder.max_images if looks else None)

    @property
    def context_tokens(self) -> int:
        """Tokens of the image decoder's condition."""
        resampler = self.context_resampler
        return self.context.length if resampler.kind == "none" else resampler.queries
