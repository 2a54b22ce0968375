"""The sizes and the batches of ``train_step.py``: numpy only, so that either side reads the same.

Rows are made from the release's config by sizes alone. A batch has the family's own layout; the images a row
lacks are padding on our side (``segment_ids`` 0) and absent on the other.
"""

from dataclasses import dataclass

import numpy as np

BOS, FIRST_WORD = 1, 3


@dataclass(frozen=True)
class Row:
    """One configuration to be timed.

    Attributes:
        model: the `model` section of a run config.
        tokens: of each row of the batch.
        images: of each row of the batch; its length is the number of rows.
    """

    model: dict
    tokens: int
    images: tuple[int, ...]

    @property
    def soi(self) -> int:
        return self.model["layout"]["soi_id"]


def section(
    *,
    width: int,
    layers: int,
    heads: int,
    mlp: int,
    vocab: int,
    sync_every: int,
    sync_heads: int,
    sync_points: int,
    tower: dict,
    stem: int,
    slots: int,
    resampler: dict,
    context: dict,
    target: int,
    unet: dict,
    sync_width: int,
    vae: tuple[int, ...],
    vae_groups: int,
) -> dict:
    """A `model` section put together as the release is, at other sizes."""
    seen, grid = tower["width"], tower["image_size"] // tower["patch"]
    sides = [4 * grid, 2 * grid, grid, grid // 2]
    sync = dict(heads=sync_heads, points=sync_points, d_maps=seen)
    return dict(
        layout=dict(image_size=tower["image_size"], target_size=target, image_tokens=slots, soi_id=vocab - 2),
        backbone=dict(
            vocab=vocab,
            width=width,
            layers=layers,
            heads=heads,
            mlp=mlp,
            sync_every=sync_every,
            synchronizer=dict(**sync, sides=sides[1:], d_query=width, d_out=width, d_values=seen),
        ),
        tower=dict(clip_adapter=dict(clip=tower, stem_width=stem, heads=sync_heads, points=4)),
        visual_resampler=dict(**resampler, d_in=seen, queries=slots, cross_every=2, dropout=0.0),
        context_resampler=dict(**context, d_in=width, layers=1, cross_every=1, qk_norm=False, dropout=0.0),
        unet=dict(**unet, side=target // 8, context_width=context["d_out"]),
        unet_sync=dict(**sync, d_values=sync_width, sides=sides, position_grid=target // 8),
        autoencoder=dict(widths=list(vae), norm_groups=vae_groups),
    )


BENCH = section(
    width=512,
    layers=8,
    heads=8,
    mlp=1376,
    vocab=32002,
    sync_every=4,
    sync_heads=16,
    sync_points=8,
    tower=dict(image_size=112, patch=14, width=256, layers=8, heads=8, mlp=1024),
    stem=64,
    slots=64,
    resampler=dict(d_out=256, layers=4, heads=8, mlp=1024),
    context=dict(d_out=256, queries=77, heads=8, mlp=1024),
    target=256,
    unet=dict(widths=[64, 128, 256, 256], heads=[2, 4, 8, 8]),
    sync_width=256,
    vae=(32, 64, 64, 64),
    vae_groups=32,
)

SMALL = section(
    width=64,
    layers=4,
    heads=4,
    mlp=160,
    vocab=130,
    sync_every=2,
    sync_heads=4,
    sync_points=4,
    tower=dict(image_size=56, patch=14, width=32, layers=8, heads=4, mlp=96),
    stem=8,
    slots=8,
    resampler=dict(d_out=32, layers=4, heads=4, mlp=96),
    context=dict(d_out=48, queries=10, heads=4, mlp=96),
    target=128,
    unet=dict(widths=[16, 32, 32, 32], heads=[2, 4, 4, 4], norm_groups=8),
    sync_width=32,
    vae=(8, 16, 16, 16),
    vae_groups=4,
)


ROWS = {
    "bench": Row(BENCH, 276, (3, 2)),
    # The same sizes where no row of the batch lacks an image: what our padding costs is seen beside it.
    "even": Row(BENCH, 276, (3, 3)),
    "small": Row(SMALL, 108, (3, 2)),
}


def make_batch(row: Row, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Noise in the family's layout: images spread over each row, text between them, all of it drawn."""
    rng = np.random.default_rng(seed)
    layout, rows, most = row.model["layout"], len(row.images), max(row.images)
    slots, soi = layout["image_tokens"], row.soi
    grid = (rows, row.tokens)
    ids = rng.integers(FIRST_WORD, soi - 1, grid, dtype=np.int32)
    image, slot = np.full(grid, -1, np.int32), np.zeros(grid, np.int32)
    weight, at = np.ones(grid, np.float32), np.zeros((rows, most), np.int32)
    for b, count in enumerate(row.images):
        text = row.tokens - count * (1 + slots)
        if text <= count:
            raise ValueError(f"{row.tokens} tokens do not hold {count} images of {slots} slots and text")
        for i in range(count):
            # Three words or more before each soi, so that no image is dropped from the loss.
            at[b, i] = start = (i + 1) * text // (count + 1) + i * (1 + slots)
            here = slice(start + 1, start + 1 + slots)
            ids[b, start], ids[b, here] = soi, soi + 1
            image[b, here], slot[b, here], weight[b, here] = i, np.arange(slots), 0.0
    ids[:, 0], weight[:, 0] = BOS, 0.0
    real = np.arange(most) < np.array(row.images)[:, None]

    def pictures(side: int) -> np.ndarray:
        noise = rng.integers(0, 256, (rows, most, side, side, 3), dtype=np.uint8)
        return noise * real[..., None, None, None].astype(np.uint8)

    return {
        "tokens": {
            "ids": ids,
            "weight": weight,
            "image": image,
            "slot": slot,
            "segment_ids": np.ones(grid, np.int32),
            "positions": np.broadcast_to(np.arange(row.tokens, dtype=np.int32), grid).copy(),
        },
        "images": {
            "pixels": pictures(layout["image_size"]),
            "target": pictures(layout["target_size"]),
            "soi": at,
            "draw": real.astype(np.float32),
            "segment_ids": real.astype(np.int32),
            "positions": np.broadcast_to(np.arange(most, dtype=np.int32), real.shape).copy(),
        },
    }
