"""Stage 2 of UnifiedMLLM on the `tiny` world, task adaptation: every task by itself.

Trained are the adapter, the language model, its embeddings, and the mask head; the tower is not.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    file = runpy.run_path(str(Path(__file__).with_name("world_unified_0.py")))
    config = file["get_config"]()
    overrides = dict(
        **file["WORLD"],
        first_upload=0.6,
        max_images=3,
        talk=[1, 3],
        talk_ops=dict(ask=1.0, segment=0.6),
        picture_ops=dict(edit=0.7, draw=0.25, upload=0.05),
    )
    config.world.update(after="world_unified_1.py", count=44000)
    config.world.overrides = ConfigDict(overrides)
    config.data.update(tokens=208, images=3, batch_size=12)
    config.data.axes.masks = 6
    config.optim.groups = [
        dict(match=["tower/"], optimizer="frozen"),
        dict(match=["embed/", "head/", "prompts/", "token"], optimizer="adamw"),
        dict(match=[], optimizer="muon", weight_decay=0.02),
    ]
    config.train.update(steps=3600, save_every=1200)
    config.train.loss = ConfigDict(dict(text=1.0, mask=2.0, dice=0.5))
    return config
