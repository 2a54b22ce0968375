"""Stage 3 of UnifiedMLLM on the `tiny` world: several tasks in one turn, by LoRA-MoE.

Trained are the experts beside the language model's MLPs and their gates, and nothing else. A part of the
dialogues has one task a turn, as before.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("world_unified_2.py")))["get_config"]()
    config.world.update(after="world_unified_2.py", count=60000)
    # A picture of the user's and up to three changes of it; what is asked comes in runs that may be joined.
    config.world.overrides.update(
        first_upload=0.8,
        max_images=4,
        talk=[0, 2],
        talk_ops=dict(ask=1.6, segment=1.0),
        picture_ops=dict(edit=1.0, draw=0.1, upload=0.05),
        chain=[2, 3],
    )
    config.data.update(tokens=224, images=4)
    config.model.backbone.experts = ConfigDict(dict(experts=8, rank=16, alpha=32.0, dropout=0.0))
    config.optim.update(lr=3e-3, warmup=50)
    config.optim.groups = [
        dict(match=["experts/"], optimizer="adamw"),
        dict(match=[], optimizer="frozen"),
    ]
    config.train.update(steps=5000, save_every=1000)
    config.train.loss = ConfigDict(dict(text=1.0, mask=2.0, dice=0.5, balance=0.01))
    return config
