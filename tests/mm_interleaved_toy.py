"""A very small MM-Interleaved of the same parts as the embedded default, and conversations to feed it."""

import jax
import numpy as np
from flax import nnx

from umm_jax import families
from umm_jax.config import from_dict
from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn

SIDE, SLOTS = 8, 4
CONTROL = [
    "<user>",
    "<bot>",
    "<eot>",
    "<soi>",
    "<image>",
    "<box>",
    "</box>",
    *(f"<loc{i}>" for i in range(9)),
]


class Words:
    """A tokenizer of whole words, without training."""

    def __init__(self):
        self.pieces = ["<pad>", "<s>", "</s>", "<unk>", *CONTROL]
        self.pieces += "draw a red blue circle square ok what color is it make one two".split()
        self.size = len(self.pieces)

    def id(self, piece):
        return self.pieces.index(piece)

    def encode(self, text):
        return [self.pieces.index(w) for w in text.split()]

    def decode(self, ids):
        words = range(4 + len(CONTROL), self.size)
        return " ".join(self.pieces[i] if i in words else "?" for i in ids)


def model_section(**changes) -> dict:
    """The `model` section of a config; `changes` replace top-level keys."""
    width = 16
    maps = dict(d_maps=8, d_values=8, sides=[4, 2], heads=2, points=2)
    section = dict(
        layout=dict(image_size=SIDE, target_size=SIDE, image_tokens=SLOTS, soi_id=7, box_bins=8),
        backbone=dict(
            vocab=40,
            width=width,
            layers=4,
            heads=2,
            mlp=32,
            qk_norm=True,
            embed_std=1.0,
            sync_every=2,
            synchronizer=dict(**maps, d_query=width, d_out=width, base=2.0, max_images=8),
        ),
        tower=dict(
            kind="pyramid",
            pyramid=dict(
                image_size=SIDE, patch=2, widths=[8, 8], residuals=[[], [1]], noise=0.1, map_width=8
            ),
        ),
        visual_resampler=dict(kind="none", d_in=8, d_out=8),
        visual_std=0.5,
        context=dict(length=12, positions="learned", project=True),
        context_resampler=dict(kind="none", d_in=width, d_out=width),
        unet=dict(
            side=SIDE,
            in_channels=3,
            out_channels=3,
            widths=[8, 16],
            heads=[1, 2],
            attention=[False, True],
            context_width=width,
            layers_per_block=1,
            norm_groups=4,
            patch=2,
            time_scale=1000.0,
        ),
        unet_sync=dict(**maps, max_images=4, position_grid=4, out_init=0.3),
        autoencoder=dict(kind="identity", scale=1.0),
        schedule=dict(kind="flow", prediction="x0", shift=3.0),
        added_tokens=0,
        uncond_prob=0.0,
        image_loss=dict(block=4, detail=4.0, change=6.0),
    )
    return section | changes


def latent_section() -> dict:
    """The toy as the release is put together: autoencoder, Q-Former, noise prediction, dropped conditions."""
    section = model_section(
        context_resampler=dict(
            kind="qformer",
            d_in=16,
            d_out=16,
            queries=5,
            layers=1,
            heads=2,
            mlp=16,
            cross_every=1,
            dropout=0.0,
        ),
        autoencoder=dict(kind="kl", widths=[4, 8], layers_per_block=1, norm_groups=2, scale=0.5),
        schedule=dict(kind="ddpm", prediction="epsilon", sample_steps=4),
        uncond_prob=0.3,
    )
    section["unet"] |= dict(side=SIDE // 2, in_channels=4, out_channels=4, patch=1, time_scale=1.0)
    return section


def model_config(**changes):
    return from_dict(
        families.get("mm_interleaved").config.ModelConfig, model_section(**changes), "config.model"
    )


def model(config, seed=0):
    """The toy with every path open: no gate or bias is zero. Drawn by numpy, which compiles nothing."""
    build = families.get("mm_interleaved").model.build
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build(config, nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.3
        return rng.normal(0, scale, leaf.shape).astype(leaf.dtype)

    return nnx.merge(graphdef, nnx.State(jax.tree.map(draw, nnx.to_pure_dict(abstract))))


def serializer(config):
    return families.get("mm_interleaved").stream.Serializer(config, Words())


def conversation(seed: int, exchanges: int = 2, upload: bool = False) -> Conversation:
    """Draws, then edits and asks; images are noise."""
    rng = np.random.default_rng(seed)
    images, turns = {}, []

    def picture():
        ref = f"i{len(images)}"
        images[ref] = ImageData.from_array(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        return Image(ref)

    for i in range(exchanges):
        first = (picture(), Text("what color is it")) if upload and i == 0 else (Text("draw a red circle"),)
        turns.append(Turn("user", first))
        answer = (Text("red"),) if upload and i == 0 else (Text("ok a blue square"), picture())
        turns.append(Turn("assistant", answer, loss=True))
    return Conversation(id=f"toy-{seed}", turns=tuple(turns), images=images)
