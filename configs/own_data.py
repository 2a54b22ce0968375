"""A small ChatUMM on your own dialogues: the way from a folder of chats and photographs to a trained run.

Pictures of 64 pixels, 3M parameters, 300 steps: minutes on a laptop, enough to see that data, losses and
replies are what they should be, and not enough for good pictures. For those take the sizes of
``chatumm_7b.py``.

    umm data import messages chats.jsonl --images=photos --out=data/own
    umm data tokenizer --data=data/own --config=configs/own_data.py --out=data/own.model
    umm train --config=configs/own_data.py --workdir=runs/own
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

SIDE, CELL, LATENT = 64, 16, 8  # pixels of a picture, of a patch that is seen, of a token that is drawn
IMAGES = 4


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("world_chatumm.py")))["get_config"]()
    size = dict(longest=SIDE, shortest=SIDE // 2)
    layout, model = config.model.layout, config.model
    layout.latent = dict(**size, stride=LATENT)
    layout.vision = dict(**size, stride=CELL)
    layout.latent_grid, layout.vision_grid = SIDE // LATENT, SIDE // CELL
    model.mixture.vocab = 4096
    model.vision.patch, model.vision.grid = CELL, SIDE // CELL
    model.latent_patch = LATENT
    model.image_loss = dict(block=8, detail=1.0, change=1.0)
    del config.world
    config.data = ConfigDict(
        dict(
            sources=[dict(path="data/own")],
            tokenizer="data/own.model",
            tokens=512,
            images=IMAGES,
            # A drawn picture is there noised, clean and for the encoder.
            axes=dict(latents=2 * IMAGES * (SIDE // LATENT) ** 2, patches=IMAGES * (SIDE // CELL) ** 2),
            packing="first_fit",
            oversize="oldest",
            batch_size=8,
        )
    )
    config.train.update(dict(steps=300, log_every=10, save_every=100, eval_every=0))
    return config
