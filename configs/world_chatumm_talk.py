"""``world_chatumm.py`` for longer talk: a fourth picture, small talk, and going back to earlier pictures.

The same model with a larger vocabulary. What it is for is in docs/learning.md: a dialogue in which another
picture and other words lie between a picture and what is said of it.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("world_chatumm.py")))["get_config"]()
    images, cells, latents = 4, 9, 36
    config.world.overrides = ConfigDict(
        dict(
            shuffled=False,
            first_upload=0.4,
            max_images=images,
            max_words=160,
            undo_named=0.7,
            picture_ops=dict(edit=0.45, draw=0.2, upload=0.1, undo=0.25),
            talk_ops=dict(ask=0.7, refer=0.2, smalltalk=0.1),
            questions=dict(describe=1.5, where=1.5, locate=1.5),
            edits=dict(add=0.6, background=0.3),
        )
    )
    config.model.mixture.vocab = 768
    # Every picture may be drawn: noised and clean.
    config.data.update(
        dict(tokens=208, images=images, axes=dict(latents=2 * images * latents, patches=images * cells))
    )
    return config
