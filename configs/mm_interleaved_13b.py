"""The published pre-training of MM-Interleaved 13B: Vicuna-13B, CLIP ViT-L/14, Stable Diffusion 2.1, joined.

Sizes are the family's defaults; what stands here is the recipe (docs/mm_interleaved.md, sections 7 and 8).
Two values are not published and are ours: the mesh, and `batch_size` in rows of 2048 tokens (the release
has 2 rows of a pair source or 4 of MMC4 on each of an unstated number of devices). bfloat16 takes the
place of float16 with a dynamic loss scale.

    umm convert from-parts --config=configs/mm_interleaved_13b.py --out=runs/13b_parts \
        --llama=... --clip=... --unet=... --vae=...
    umm train --config=configs/mm_interleaved_13b.py --workdir=runs/13b

``--config.model.compat=release --config.data.compat=release`` does what the released code does where we would
not: attention across the documents of a row, an image loss that counts images without context, documents that
merging chose but left apart. ``--config.model.decoder_images=visible`` lets the image decoder look at all
earlier images, as the paper says, not at the last one.
"""

from ml_collections import ConfigDict

from umm_jax.config import preset
from umm_jax.families.mm_interleaved.recipe import optimizer_groups

# Rows of captioned pictures: a pair is not torn apart, and in a quarter of the rows pairs become documents.
PAIRS = dict(cut="document", merge=0.25)


# By chips, see docs/performance.md. Kernels attend and sample, which a TPU has not run yet; the pictures of a
# row are learned from in two halves, so that the UNet need not be run again. On v5e, with less room, they are
# in five parts and it is run again, so that a chip holds a row.
SAMPLING = dict(implementation="pallas")
KERNELS = dict(
    draw_chunk=15,
    backbone=dict(synchronizer=SAMPLING, attention="kernels"),
    tower=dict(clip_adapter=SAMPLING),
    unet=dict(remat="none", self_attention="kernels"),
    unet_sync=SAMPLING,
)
SMALL = KERNELS | dict(draw_chunk=6, unet=dict(self_attention="kernels"))
PRESETS = {
    "v5p-64": dict(model=KERNELS),
    "v6e-64": dict(model=KERNELS),
    "v5e-256": dict(model=SMALL, data=dict(batch_size=256)),
}


def get_config(chips: str | None = None) -> ConfigDict:
    config = ConfigDict(
        dict(
            family="mm_interleaved",
            model=dict(
                layout=dict(
                    soi="<|beginofimage|>",
                    image="<|image|>",
                    turn_end="</s>",
                    prefixes=dict(system="", user="USER: ", assistant="ASSISTANT: "),
                    box_format="text",
                ),
                # Made again in the backward pass: groups of four layers, blocks of the tower and their CLIP
                # layers, blocks of the UNet and of its synchronizer.
                backbone=dict(synchronizer=dict(), remat="full"),
                tower=dict(clip_adapter=dict(remat="full", clip=dict(remat="full"))),
                unet=dict(remat="full"),
                unet_sync=dict(remat="full"),
                schedule=dict(sample_steps=30, guidance=7.5),
                loss_chunk=256,
            ),
            data=dict(
                sources=[
                    dict(path="data/blip2", weight=1.0, **PAIRS),
                    dict(path="data/laion_en", weight=1.0, text_loss="after_image", **PAIRS),
                    dict(path="data/laion_coco", weight=1.0, text_loss="after_image", **PAIRS),
                    # Steps are drawn 1:1:1:2, and a step holds twice as many rows of pages as of pairs.
                    dict(path="data/mmc4", weight=4.0, cut="image", images=15),
                ],
                tokenizer="runs/13b_parts/tokenizer.model",
                tokens=2048,
                images=30,
                packing="cut",
                batch_size=64,
                shuffle_seed=32,
                workers=8,
            ),
            mesh=dict(data=1, fsdp=-1, tensor=1),
            optim=dict(
                lr=1e-4,
                schedule="cosine",
                warmup=1000,
                b1=0.9,
                b2=0.995,
                eps=1e-6,
                clip=1.0,
                groups=optimizer_groups(decay=0.05),
            ),
            train=dict(
                steps=15000,
                seed=32,
                dtype="bfloat16",
                loss=dict(text=1.0, image=10.0),
                init_from="runs/13b_parts",
                log_every=20,
                save_every=1000,
                keep=5,
            ),
        )
    )
    return preset(config, PRESETS, chips)
