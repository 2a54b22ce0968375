"""Stage 3 of UnifiedMLLM on the `tiny` world: several tasks in one turn, by LoRA-MoE.

Trained are the experts beside the language model's MLPs and their gates, and nothing else. A part of the
dialogues has one task a turn, as before.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("world_unified_2.py")))["get_config"]()
    config.world.update(after="world_unified_2.py", count=25000)
    config.world.overrides.chain = [1, 3]
    config.model.backbone.experts = ConfigDict(dict(experts=8, rank=4, alpha=32.0, dropout=0.0))
    config.optim.update(lr=2e-3, warmup=50)
    config.optim.groups = [
        dict(match=["experts/"], optimizer="adamw"),
        dict(match=[], optimizer="frozen"),
    ]
    config.train.update(steps=2000, save_every=1000)
    config.train.loss = ConfigDict(dict(text=1.0, mask=2.0, dice=0.5, balance=0.01))
    return config
