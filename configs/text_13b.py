"""A language model of 13 billion parameters and nothing else worth the name: to plan with.

Other trainers' published steps are of text. This is the same work in our code (Llama-2 13B's sizes, four rows
of 2048 tokens on each of 64 chips), so that ``umm plan`` can be held against them:

    umm plan --config=configs/text_13b.py --topology=v5p:4x4x4

The family's tower is as small as it goes, and looks at one tiny picture a row.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    prefixes = dict(system="<user>", user="<user>", assistant="<bot>")
    return ConfigDict(
        dict(
            family="unified_mllm",
            model=dict(
                layout=dict(image_size=8, image_tokens=4, mask_size=8, prefixes=prefixes, turn_end="<eot>"),
                backbone=dict(vocab=32000, norm_eps=1e-5, remat="dots_no_batch"),
                tower=dict(
                    kind="pyramid", pyramid=dict(image_size=8, patch=2, widths=[8, 8], residuals=[[], [1]])
                ),
                adapter=[],
                masks=None,
            ),
            data=dict(
                sources=[dict(path="data/text")],
                tokenizer="data/tokenizer.model",
                tokens=2048,
                images=1,
                axes=dict(masks=1),
                batch_size=256,
            ),
            mesh=dict(data=1, fsdp=-1, tensor=1),
            optim=dict(lr=3e-4, b1=0.9, b2=0.95, clip=1.0),
            train=dict(steps=1000, dtype="bfloat16", loss=dict(text=1.0)),
        )
    )
