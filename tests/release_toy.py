"""A very small model of the release's layout, and random checkpoints with the release's names."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from umm_jax import families
from umm_jax.config import from_dict
from umm_jax.convert import layout as layouts
from umm_jax.convert.layout import Layout

FAMILY = families.get("mm_interleaved")
VOCAB, SOI = 302, 300


def section() -> dict:
    """The `model` section."""
    core = dict(d_maps=16, d_values=16, heads=2, points=2)
    return dict(
        layout=dict(
            image_size=28,
            target_size=8,
            image_tokens=4,
            soi_id=SOI,
            soi="<|beginofimage|>",
            image="<|image|>",
            prefixes=dict(system="", user="USER:", assistant="ASSISTANT:"),
            turn_end="</s>",
            box_format="text",
        ),
        backbone=dict(
            vocab=VOCAB,
            width=16,
            layers=4,
            heads=2,
            mlp=24,
            sync_every=2,
            synchronizer=dict(**core, d_query=16, d_out=16, sides=[4, 2, 1], base=2.0, max_images=5),
        ),
        tower=dict(
            kind="clip_adapter",
            clip_adapter=dict(
                clip=dict(image_size=28, patch=14, width=16, layers=4, heads=2, mlp=24),
                blocks=4,
                extra=1,
                heads=2,
                points=2,
                stem_width=4,
                position_grid=4,
            ),
        ),
        visual_resampler=dict(
            kind="qformer",
            d_in=16,
            d_out=8,
            queries=4,
            layers=2,
            heads=2,
            mlp=12,
            cross_every=2,
            qk_norm=True,
        ),
        context=dict(length=12),
        context_resampler=dict(
            kind="qformer", d_in=16, d_out=8, queries=3, layers=1, heads=2, mlp=12, cross_every=1
        ),
        unet=dict(
            side=4,
            widths=[4, 8],
            heads=[1, 2],
            attention=[True, False],
            context_width=8,
            layers_per_block=1,
            norm_groups=2,
        ),
        unet_sync=dict(**core, sides=[8, 4, 2, 1], max_images=4, position_grid=4),
        autoencoder=dict(widths=[4, 8], layers_per_block=1, norm_groups=2),
        added_tokens=2,
    )


def layout() -> Layout:
    model = from_dict(FAMILY.config.ModelConfig, section(), "config.model")
    return Layout("mm_interleaved", model)


def state(of: Layout, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """A checkpoint: random parameters, and the constants as they are."""
    rng = np.random.default_rng(seed)
    constants = {c.theirs: np.asarray(c.value()) for c in of.table.constants}
    shapes = of.table.theirs(of.ours)
    return {
        name: constants[name] if name in constants else rng.normal(0, 0.3, shape).astype(dtype)
        for name, shape in shapes.items()
    }


def save(tensors: dict[str, np.ndarray], path) -> None:
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, path, {"format": "pt"})


def shapes_once():
    """A fixture: describing a model takes seconds, and tests convert the same few again and again."""
    real, known = layouts.shapes_of, {}

    def once(family, model):
        key = (family, repr(model))
        known[key] = known[key] if key in known else real(family, model)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "shapes_of", once)
        yield
