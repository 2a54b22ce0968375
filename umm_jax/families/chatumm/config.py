"""Every size and choice of the model. The defaults are BAGEL-7B-MoT's; presets are in ``configs/``."""

from dataclasses import dataclass
from typing import Literal

from umm_jax.errors import ConfigError
from umm_jax.families.chatumm.stream import LayoutConfig
from umm_jax.models.autoencoder import AutoencoderConfig
from umm_jax.models.guidance import GuidanceConfig
from umm_jax.models.image_loss import ImageLossConfig
from umm_jax.models.mot import MixtureConfig
from umm_jax.models.navit import NaViTConfig
from umm_jax.models.sampling import ScheduleConfig

FLUX = AutoencoderConfig(latent_channels=16, quant=False, scale=0.3611, shift=0.1159)
FLOW = ScheduleConfig(
    kind="flow",
    prediction="velocity",
    shift=4.0,
    sample_shift=3.0,
    times="logit_normal",
    sample_steps=49,
    guidance=4.0,
)


@dataclass(frozen=True)
class ModelConfig:
    """A ChatUMM model.

    Attributes:
        layout: spelling and sizes of the stream.
        mixture: the decoder, of two groups of tokens.
        vision: the encoder of patches; connector: hidden width between it and the decoder, None is the
            decoder's own.
        autoencoder, latent_patch: what latents are, and how many of them along a side make a token.
        schedule, guidance: how latents are noised, and drawn.
        time_width: of the table of times.
        positions: factor on the fixed tables of positions, which are added to latents and patches.
        head_std: deviation of the output head at the start.
        image_loss: extra weight where something is, or changed; None weighs all alike.
        loss_chunk: labelled tokens projected to the vocabulary at a time; None projects all tokens at once.
        compat: "release" takes a picture's latents from all of its canvas, so that they depend on how much of
            it is empty, as in the released training code; else a picture is by itself.
    """

    layout: LayoutConfig = LayoutConfig()
    mixture: MixtureConfig = MixtureConfig()
    vision: NaViTConfig = NaViTConfig()
    connector: int | None = None
    autoencoder: AutoencoderConfig = FLUX
    latent_patch: int = 2
    schedule: ScheduleConfig = FLOW
    guidance: GuidanceConfig = GuidanceConfig()
    time_width: int = 256
    positions: float = 1.0
    head_std: float = 0.02
    image_loss: ImageLossConfig | None = None
    loss_chunk: int | None = None
    compat: Literal["none", "release"] = "none"

    def __post_init__(self):
        c = self.layout
        stride = self.autoencoder.factor * self.latent_patch
        if c.latent.stride != stride:
            raise ConfigError(
                f"layout.latent.stride is {c.latent.stride}, a latent token covers {stride} pixels (the "
                f"autoencoder's factor {self.autoencoder.factor} times latent_patch {self.latent_patch})"
            )
        if c.vision.stride != self.vision.patch:
            raise ConfigError(
                f"layout.vision.stride is {c.vision.stride}, the vision encoder's patch {self.vision.patch}"
            )
        if c.vision_grid != self.vision.grid:
            raise ConfigError(
                f"layout.vision_grid is {c.vision_grid}, the vision encoder's table has {self.vision.grid}"
            )
        if self.schedule.kind != "flow":
            raise ConfigError("schedule.kind must be flow: this family draws by rectified flow")
        if self.mixture.width % 4:
            raise ConfigError(f"mixture.width {self.mixture.width} must be a multiple of 4")

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        return self.mixture.vocab

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h', w', c) of the latents of a canvas."""
        return self.autoencoder.latent_shape(self.layout.canvas)

    @property
    def latent_numbers(self) -> int:
        """Values of a latent token."""
        return self.latent_patch**2 * self.latent_shape[2]
