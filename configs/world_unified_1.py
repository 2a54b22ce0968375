"""Stage 1 of UnifiedMLLM on the `tiny` world, modality perception: what pictures show, in words.

Trained are the adapter and the embeddings (the tower and the language model are not).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("world_unified_0.py")))["get_config"]()
    config.world.update(after="world_unified_0.py", count=3000)
    config.optim.update(lr=2e-3, warmup=20)
    config.optim.groups = [
        dict(match=["adapter/", "embed/", "head/"], optimizer="adamw"),
        dict(match=[], optimizer="frozen"),
    ]
    config.train.update(steps=150, save_every=150)
    return config
