"""A very small ChatUMM, and conversations to feed it."""

import jax
import numpy as np
from flax import nnx

from umm_jax import families
from umm_jax.config import from_dict
from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn
from umm_jax.errors import ConfigError

CONTROL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>"]
FAMILY = families.get("chatumm")


class Words:
    """A tokenizer of whole words, without training."""

    def __init__(self):
        self.pieces = ["<pad>", "<s>", "</s>", "<unk>", *CONTROL]
        self.pieces += "draw a red blue circle square ok what color is it make one two user assistant".split()
        self.size = len(self.pieces)

    def id(self, piece):
        if piece not in self.pieces:
            raise ConfigError(f"no piece {piece!r}")
        return self.pieces.index(piece)

    def encode(self, text):
        return [self.pieces.index(w) for w in text.split()]

    def decode(self, ids):
        return " ".join(self.pieces[i] for i in ids)


def model_section(**changes) -> dict:
    """The `model` section of a config; `changes` replace top-level keys."""
    section = dict(
        layout=dict(
            latent=dict(longest=16, shortest=8, stride=4),
            vision=dict(longest=16, shortest=8, stride=8),
            latent_grid=4,
            vision_grid=2,
        ),
        mixture=dict(vocab=32, width=16, layers=2, heads=2, kv_heads=1, mlp=24, embed_std=1.0),
        vision=dict(patch=8, grid=2, width=12, layers=2, heads=2, mlp=16),
        autoencoder=dict(kind="identity"),
        latent_patch=4,
        schedule=dict(kind="flow", prediction="velocity", times="logit_normal", sample_steps=2),
        guidance=dict(image=1.0),
        time_width=8,
    )
    return {**section, **changes}


def model_config(**changes):
    return from_dict(FAMILY.config.ModelConfig, model_section(**changes), "config.model")


def model(config, seed=0):
    """The module with every parameter drawn: zeros would hide what they multiply."""
    module = FAMILY.model.build(config, nnx.Rngs(seed))
    graphdef, state = nnx.split(module)
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(state))))

    def draw(leaf):
        return leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)

    return nnx.merge(graphdef, jax.tree.map(draw, state))


def params(module):
    return nnx.to_pure_dict(nnx.split(module)[1])


def serializer(config):
    return FAMILY.stream.Serializer(config, Words())


def replier(config, module=None, **options):
    options = {"round_tokens": 64, **options}
    return FAMILY.generate.Replier(config, params(module or model(config)), Words(), **options)


def picture(rng, size=(16, 16)) -> ImageData:
    return ImageData.from_array(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def conversation(seed: int, exchanges: int = 2, upload: bool = False, size=(16, 16)) -> Conversation:
    """Draws, then edits and asks; images are noise."""
    rng = np.random.default_rng(seed)
    images, turns = {}, []

    def shown():
        images[f"i{len(images)}"] = picture(rng, size)
        return Image(f"i{len(images) - 1}")

    for i in range(exchanges):
        first = (shown(), Text("what color is it")) if upload and i == 0 else (Text("draw a red circle"),)
        turns.append(Turn("user", first))
        answer = (Text("red"),) if upload and i == 0 else (Text("ok a blue square"), shown())
        turns.append(Turn("assistant", answer, loss=True))
    return Conversation(id=f"toy-{seed}", turns=tuple(turns), images=images)


def asked(c: Conversation, *parts, images=None) -> Conversation:
    """`c` with another user turn."""
    return c.with_turn(Turn("user", tuple(Text(p) if isinstance(p, str) else p for p in parts)), images)
