"""The published pre-training recipe as a run config says it: what learns, how fast, with what decay.

Source: docs/mm_interleaved.md section 7. Plain values, so that a config file can be made of them without JAX.
"""

# What was trained before stays as it is: language model, CLIP, autoencoder.
FROZEN = (
    "backbone/layers/",
    "backbone/norm/",
    "embed/",
    "head/base/",
    "tower/clip/",
    "autoencoder/",
)
# Not decayed: biases, and the gains of layer norms. Decayed, as in the release: the gains of RMS and group
# norms and of the stem's norms, level embeddings, queries, gamma.
BIASES = ("bias",)
LAYER_NORMS = (
    "query_norm/",
    "key_norm/",
    "source_norm/",
    "map_norm/",
    "mlp_norm/",
    "token_norm/",
    "out_norm/",
    "/norm/scale",
)


def optimizer_groups(decay: float = 0.05) -> list[dict]:
    """``optim.groups`` of the release for a base rate ``optim.lr``; the first that matches owns a parameter.

    The release gives gates and sampling offsets (of both synchronizers and of the adapter) no decay, offsets
    and the UNet a tenth of the rate, and everything else that is trained the full one.
    """

    def group(match, lr_scale=1.0, decayed=True, no_decay=()):
        made = {"match": list(match), "lr_scale": lr_scale, "weight_decay": decay if decayed else 0.0}
        return made | {"decay_vectors": decayed, "no_decay": list(no_decay)}

    return [
        {"match": list(FROZEN), "optimizer": "frozen"},
        group(["syncs/gate"], decayed=False),
        group(["/offsets/"], lr_scale=0.1, decayed=False),
        group(["backbone/syncs/"], no_decay=BIASES),
        # The image decoder's ignore tokens stay zero; those of the language model are learned.
        {"match": ["/ignore"], "optimizer": "frozen"},
        group(["unet/"], lr_scale=0.1, no_decay=[*BIASES, *(f"blocks/{i}/norm_" for i in range(10))]),
        group([], no_decay=[*BIASES, *LAYER_NORMS]),
    ]
