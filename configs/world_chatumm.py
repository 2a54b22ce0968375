"""ChatUMM on the `tiny` visual-dialogue world: the same records as ``world_tiny.py``, another family.

Every part is the real one at small size, with these choices where a model this small needs another shape
than the release: pixels in place of latents, a flow that predicts the clean picture, and more weight where
something is or has changed.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

SIDE, CELL, LATENT = (
    24,
    8,
    4,
)  # pixels of a picture, of a patch the encoder sees, of a token the decoder draws


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("world_tiny.py")))["get_config"]()
    width = 128
    size = dict(longest=SIDE, shortest=SIDE)
    config.family = "chatumm"
    config.model = ConfigDict(
        dict(
            layout=dict(
                latent=dict(**size, stride=LATENT),
                vision=dict(**size, stride=CELL),
                latent_grid=SIDE // LATENT,
                vision_grid=SIDE // CELL,
                box_format="loc",
                box_bins=24,
                # Nothing is guided here, so nothing need be learned without its condition.
                drop=dict(text=0.0, images=0.0, single=None),
            ),
            mixture=dict(
                vocab=704,
                width=width,
                layers=4,
                heads=4,
                kv_heads=4,
                mlp=3 * width,
                rope_base=10000.0,
                qk_norm=True,
                qkv_bias=False,
                attention_scale=1.5,
                embed_std=1.0,
                unroll=True,
            ),
            vision=dict(patch=CELL, grid=SIDE // CELL, width=96, layers=2, heads=3, mlp=192),
            autoencoder=dict(kind="identity", scale=1.0),
            latent_patch=LATENT,
            schedule=dict(kind="flow", prediction="x0", shift=3.0, sample_steps=8, guidance=1.0),
            guidance=dict(image=1.0),
            time_width=64,
            image_loss=dict(block=8, detail=4.0, change=6.0),
        )
    )
    config.data = ConfigDict(
        dict(tokens=144, images=3, axes=dict(latents=216, patches=27), packing="none", batch_size=12)
    )
    config.optim.groups = [
        dict(match=["embed/", "head/", "position", "latent_out"], optimizer="adamw"),
        dict(match=[], optimizer="muon", weight_decay=0.02),
    ]
    return config
