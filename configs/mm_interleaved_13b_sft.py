"""Supervised fine-tuning of MM-Interleaved 13B on interleaved conversations. This recipe is ours.

The authors published no fine-tuning code for conversations. What is kept from their pre-training: sizes,
groups, moments, loss weights. What is ours, and has been lowered and sharded but not trained at this size:
whole conversations packed side by side and apart from each other, loss on the assistant's turns, the image
decoder looking at all earlier images of the conversation, a fifth of the rate over 5000 steps, and the
language model learning too, at a twentieth of that rate. Sources are weighted by the square root of their
number of conversations, as the release's own multi-source readers do.

    umm convert from-torch mm_interleaved_pretrain --allow-pickle --tokenizer=... --out=runs/13b_pretrained
    umm train --config=configs/mm_interleaved_13b_sft.py --workdir=runs/13b_sft
"""

import math
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from umm_jax.families.mm_interleaved.recipe import FROZEN

# {folder of conversations: how many it holds}: put your own here.
SOURCES = {"data/instruct": 158_000, "data/edits": 40_000, "data/stories": 20_000}
LEARNING = ("backbone/layers/", "backbone/norm/")


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("mm_interleaved_13b.py")))["get_config"]()
    config.model.decoder_images = "visible"
    config.data = ConfigDict(
        dict(
            sources=[dict(path=path, weight=math.sqrt(count)) for path, count in SOURCES.items()],
            tokenizer="runs/13b_pretrained/tokenizer.model",
            tokens=2048,
            # The decoder's table of relative indices holds ten: a conversation with more is refused by name.
            images=20,
            packing="first_fit",
            oversize="truncate",
            batch_size=64,
            shuffle_seed=32,
            workers=8,
        )
    )
    frozen = [text for text in FROZEN if text not in LEARNING]
    slow = dict(match=list(LEARNING), lr_scale=0.05, weight_decay=0.0)
    config.optim.groups = [dict(match=frozen, optimizer="frozen"), slow, *config.optim.groups[1:]]
    config.optim.lr = 2e-5
    config.optim.warmup = 150
    config.train.steps = 5000
    config.train.init_from = "runs/13b_pretrained"
    return config
