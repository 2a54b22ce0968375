"""The embedded default: a 3.3M-parameter MM-Interleaved on the `tiny` visual-dialogue world.

Learns on two CPU cores in about twenty minutes to draw, edit, answer and remember. Every part is the real
one at small size, with these choices where a model this small needs another shape than the release:
a convolutional tower, no resamplers, pixels instead of latents, and a flow that predicts the clean picture.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    width, side = 128, 24
    maps = dict(d_maps=64, d_values=64)
    model = dict(
        layout=dict(
            image_size=side,
            target_size=side,
            image_tokens=9,
            soi_id=7,
            box_bins=24,
        ),
        backbone=dict(
            vocab=704,
            width=width,
            layers=4,
            heads=4,
            mlp=4 * width,
            qk_norm=True,
            attention_scale=1.5,
            gated_mlp=False,
            activation="gelu_tanh",
            embed_std=1.0,
            sync_every=2,
            unroll=True,
            # As in the release, text does not read the finest level.
            synchronizer=dict(
                **maps,
                sides=[6, 3],
                heads=4,
                points=4,
                d_query=width,
                d_out=width,
                base=3.0,
                max_images=10,
                offset_init=1.5,
            ),
        ),
        tower=dict(
            kind="pyramid",
            pyramid=dict(image_size=side, patch=2, widths=[32, 64, 128], noise=0.12, map_width=64),
        ),
        visual_resampler=dict(kind="none", d_in=128, d_out=128),
        visual_std=128**-0.5,
        context=dict(length=40, positions="learned", project=False, std=0.3),
        context_resampler=dict(kind="none", d_in=width, d_out=width),
        unet=dict(
            side=side,
            in_channels=3,
            out_channels=3,
            widths=[32, 64, 128],
            heads=[1, 2, 4],
            attention=[False, False, False],
            context_width=width,
            layers_per_block=1,
            mid_layers=2,
            mlp_multiple=3,
            qk_norm=True,
            norm="rms",
            skips="levels",
            patch=2,
            time_scale=1000.0,
            time_conditioning="scale_shift",
            upsample="depth_to_space",
            input_gate=0.5,
            grid_vectors=True,
        ),
        unet_sync=dict(
            **maps,
            sides=[12, 6, 3],
            heads=2,
            points=2,
            max_images=4,
            offset_init=0.0,
            position_grid=12,
            out_init=1.0,
        ),
        autoencoder=dict(kind="identity", scale=1.0),
        schedule=dict(kind="flow", prediction="x0", shift=3.0, sample_steps=8),
        added_tokens=0,
        uncond_prob=0.0,
        image_loss=dict(block=8, detail=4.0, change=6.0),
        # Of three images a row about two are drawn: nothing is spent on the ones that are only shown.
        max_drawn=2,
    )
    return ConfigDict(
        dict(
            family="mm_interleaved",
            model=model,
            # Each batch is seen once. More of what is learned last: uploaded pictures, which no words
            # describe, whole descriptions, and changes to objects that must first be found. Requests list
            # objects in reading order: words find their cells sooner than in random order.
            world=dict(
                preset="tiny",
                count=18000,
                overrides=dict(
                    shuffled=False,
                    first_upload=0.6,
                    picture_ops=dict(edit=0.78, draw=0.1, upload=0.12),
                    questions=dict(describe=1.5, where=1.5, locate=1.5),
                    edits=dict(add=0.6, background=0.3),
                ),
            ),
            data=dict(tokens=128, images=3, packing="none", batch_size=12),
            optim=dict(
                # Lower, and falling sooner, than drawing alone would want: to find things by their looks is
                # learned while the rate falls.
                lr=4e-3,
                schedule="trapezoid",
                warmup=100,
                decay=0.7,
                b1=0.9,
                b2=0.95,
                clip=1.0,
                groups=[
                    # What a synchronizer reads where it looks at nothing stays zero.
                    dict(match=["/ignore"], optimizer="frozen"),
                    # As in the release, a tenth of the rate where points are placed: Muon's steps have one
                    # size, and would carry them out of the picture.
                    dict(match=["offsets"], optimizer="adamw", lr_scale=0.1),
                    dict(match=["embed/", "head/", "positions"], optimizer="adamw"),
                    # What the language model reads must hold still for it to find things by their looks.
                    dict(match=["tower/"], optimizer="muon", weight_decay=0.02, lr_scale=0.25),
                    dict(match=[], optimizer="muon", weight_decay=0.02),
                ],
            ),
            train=dict(
                steps=1500,
                loss=dict(text=1.0, image=2.0),
                log_every=20,
                save_every=500,
                eval_every=750,
                eval_items=32,
            ),
            reply=dict(max_tokens=40, max_images=1),
            eval=dict(splits=["iid"], items=256, dialogues=160),
        )
    )
