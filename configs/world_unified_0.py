"""UnifiedMLLM on the `tiny` world, before its three stages: what stands in for released weights.

The published recipe begins with a language model and a vision tower that others trained. Here both are small
and trained at once, on pictures and questions about them, without a single call. Stages 1 to 3 are in
``world_unified_1.py`` to ``world_unified_3.py``; ``umm demo --config=configs/world_unified_3.py`` runs all.
"""

from ml_collections import ConfigDict

SIDE, WIDTH = 24, 128
# What a world of this family has throughout.
WORLD = dict(
    calls=True,
    shuffled=False,
    questions=dict(describe=1.0, where=1.5, locate=2.0, count=2.0, exists=1.5),
    edits=dict(add=0.8, background=0.3),
)


def get_config() -> ConfigDict:
    prefixes = dict(system="<user>", user="<user>", assistant="<bot>")
    model = dict(
        layout=dict(
            image_size=SIDE,
            image_tokens=9,
            mask_size=SIDE,
            prefixes=prefixes,
            turn_end="<eot>",
            dialect="umm1",
        ),
        backbone=dict(
            vocab=832,
            width=WIDTH,
            layers=4,
            heads=4,
            mlp=3 * WIDTH,
            qk_norm=True,
            attention_scale=1.5,
            embed_std=1.0,
            unroll=True,
        ),
        tower=dict(kind="pyramid", pyramid=dict(image_size=SIDE, patch=2, widths=[32, 64, 128], noise=0.12)),
        adapter=[WIDTH],
        visual_std=WIDTH**-0.5,
        masks=dict(
            decoder=dict(width=64, depth=2, heads=4, mlp=128, reduced=32, iou_hidden=32),
            level=1,
        ),
        constrain="full",
    )
    return ConfigDict(
        dict(
            family="unified_mllm",
            model=model,
            world=dict(
                preset="tiny",
                count=20000,
                # One picture of the user's, and questions about it.
                overrides=dict(**WORLD, first_upload=1.0, max_images=1, talk=[3, 6], talk_ops=dict(ask=1.0)),
            ),
            data=dict(tokens=128, images=1, axes=dict(masks=1), packing="none", batch_size=16),
            optim=dict(
                lr=4e-3,
                schedule="trapezoid",
                warmup=100,
                decay=0.7,
                b1=0.9,
                b2=0.95,
                clip=1.0,
                groups=[
                    dict(match=["masks/"], optimizer="frozen"),
                    dict(match=["embed/", "head/"], optimizer="adamw"),
                    dict(match=["tower/"], optimizer="muon", weight_decay=0.02, lr_scale=0.25),
                    dict(match=[], optimizer="muon", weight_decay=0.02),
                ],
            ),
            train=dict(
                steps=1200,
                loss=dict(text=1.0, mask=0.0, dice=0.0),
                log_every=20,
                save_every=600,
            ),
            reply=dict(max_tokens=96, max_images=4),
            eval=dict(splits=["iid"], items=256, dialogues=128),
        )
    )
