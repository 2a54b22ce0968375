"""A very small UnifiedMLLM of all its parts, its tokenizer, and conversations to feed it."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax import families
from umm_jax.config import from_dict
from umm_jax.conversation import Box, Conversation, Image, ImageData, Mask, TaskCall, Text, Turn
from umm_jax.data import packing
from umm_jax.data.packing import pack_row
from umm_jax.data.tokenizer import Tokenizer

FAMILY = families.get("unified_mllm")
SIDE, SLOTS = 16, 4
SAID = [
    "segment the red ring",
    "make it blue",
    "how many are left",
    "one two sure there is a",
    "0 1 2 3 4 5 6 7 8 9 . ,",
]


def section(**changes) -> dict:
    """The `model` section of a config; `changes` replace top-level keys."""
    prefixes = {"system": "<user>", "user": "<user>", "assistant": "<bot>"}
    found = dict(
        layout=dict(
            image_size=SIDE,
            image_tokens=SLOTS,
            mask_size=SIDE,
            prefixes=prefixes,
            turn_end="<eot>",
            decimals=2,
        ),
        backbone=dict(vocab=480, width=32, layers=2, heads=2, mlp=48, qk_norm=True, embed_std=1.0),
        tower=dict(
            kind="pyramid", pyramid=dict(image_size=SIDE, patch=4, widths=[16, 16], residuals=[[], [1]])
        ),
        adapter=[],
        masks=dict(
            decoder=dict(width=16, depth=1, heads=2, mlp=32, reduced=8, iou_hidden=8),
            level=0,
            state="predicting",
        ),
        constrain="full",
        visual_std=0.25,
    )
    found.update(changes)
    return found


def config(**changes):
    return from_dict(FAMILY.config.ModelConfig, section(**changes), "config.model")


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        return Tokenizer.train(SAID, path, FAMILY.stream.control_pieces(section()), 480)


def serializer(**changes):
    return FAMILY.stream.Serializer(section(**changes), tokenizer())


def model(config, seed: int = 0):
    return FAMILY.model.build(config, nnx.Rngs(seed))


def picture(seed: int = 0, size=(SIDE, SIDE)) -> ImageData:
    return ImageData.from_array(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def region(of: str = "a", rows=slice(4, 10), columns=slice(8, 16), size=(SIDE, SIDE)) -> Mask:
    array = np.zeros(size, bool)
    array[rows, columns] = True
    return Mask.from_array(of, array)


def user(*parts) -> Turn:
    return Turn("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def bot(*parts, loss: bool = True) -> Turn:
    return Turn("assistant", tuple(Text(p) if isinstance(p, str) else p for p in parts), loss)


def call(task: str, payload: str) -> TaskCall:
    return TaskCall(task, {"payload": payload})


def chain() -> Conversation:
    """All there is: a mask, an edit with its box and what it gave, words about that, and a place."""
    edit = call("image_edit", "make it blue <box>[0.5, 0.25, 1.0, 0.62]</box>")
    turns = (
        user(Image("a"), "segment the red ring"),
        bot("sure", call("image_seg", "the red ring"), region(), edit, Image("b"), "one"),
        user("how many are left"),
        bot("there is", Box("b", (0.25, 0.5, 0.75, 1.0), "a ring")),
    )
    return Conversation("chain", turns, {"a": picture(1), "b": picture(2)})


def batch(groups, lay, tokens: int = 200, images: int = 4, masks: int = 3) -> dict:
    """Each group of conversations packed into a row."""
    budget = {"tokens": tokens, "images": images, "masks": masks}
    rows = [pack_row([lay(c) for c in group], lay.spec, budget) for group in groups]
    return jax.tree.map(jnp.asarray, packing.batch(rows))
