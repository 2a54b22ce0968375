"""The release's own way at small size: the `tiny` world drawn through a latent diffusion.

What ``world_tiny.py`` does with pixels and a flow that predicts the clean picture, this does as the released
MM-Interleaved: a KL autoencoder, trained first and then frozen; a Q-Former between the language model and the
image decoder; a UNet that predicts the noise of the latents, with the feature synchronizer; the DDPM sampler
with classifier-free guidance. Everything not named here is as there.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

LATENT = 6


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("world_tiny.py")))["get_config"]()
    model = config.model
    model.autoencoder = ConfigDict(
        dict(
            kind="kl",
            widths=[16, 32, 64],
            layers_per_block=1,
            latent_channels=4,
            norm_groups=2,
            kl_weight=1e-3,
            scale=0.5,
        )
    )
    model.context_resampler = ConfigDict(
        dict(
            kind="qformer",
            d_in=128,
            d_out=128,
            queries=40,
            layers=1,
            heads=4,
            mlp=256,
            cross_every=1,
            dropout=0.0,
            # A model this small has no time to find out which query is which token.
            from_tokens=True,
        )
    )
    model.unet = ConfigDict(
        dict(
            side=LATENT,
            in_channels=4,
            out_channels=4,
            widths=[64, 128],
            heads=[2, 4],
            attention=[False, False],
            context_width=128,
            layers_per_block=1,
            mid_layers=2,
            mlp_multiple=3,
            qk_norm=True,
            norm="rms",
            skips="levels",
            time_conditioning="scale_shift",
            upsample="depth_to_space",
            grid_vectors=True,
        )
    )
    model.unet_sync.position_grid = LATENT
    model.schedule = ConfigDict(dict(kind="ddpm", prediction="epsilon", sample_steps=20, guidance=1.5))
    model.uncond_prob = 0.1
    # The error of the noise says little about the words, and at most times nothing: average it.
    model.noise_draws = 3
    config.optim.groups = [dict(match=["autoencoder/"], optimizer="frozen"), *config.optim.groups]
    config.world.count = 24000
    config.world.autoencoder = ConfigDict(
        dict(
            data=dict(batch_size=4),
            train=dict(steps=2500, save_every=500, eval_every=0),
            optim=dict(lr=6e-3, warmup=40, decay=0.85, groups=[dict(match=[], optimizer="muon")]),
        )
    )
    config.train.steps = 2000
    return config
