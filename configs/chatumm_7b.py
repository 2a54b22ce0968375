"""ChatUMM at BAGEL-7B-MoT's size, in three stages: what a dialogue is, what it depends on, mixed answers.

Sizes, optimizer, loss weights and time shift are BAGEL's fine-tuning stage; the stages, their mixture and
their lengths are ours: the paper names three stages of data and gives no numbers (docs/chatumm.md).

    umm convert from-torch BAGEL-7B-MoT --out=runs/bagel
    umm train --config=configs/chatumm_7b.py --workdir=runs/chatumm_a
    umm train --config=configs/chatumm_7b_b.py --workdir=runs/chatumm_b       # begins from runs/chatumm_a
    umm train --config=configs/chatumm_7b_c.py --workdir=runs/chatumm_c

``stage("A")`` of this file is what each of the three gives. ``configs/chatumm_7b.py:v5p-64`` is the same for
64 chips of v5p, as ``umm plan`` found it to fit and go; see PRESETS and docs/performance.md.
"""

from ml_collections import ConfigDict

from umm_jax.config import preset

# Shares of dialogues by the stage of synthesis they come from; the rest is single exchanges played again, so
# that what the base can do is not forgotten.
STAGES = {
    "A": dict(steps=6000, begins="runs/bagel", dialogues={1: 0.40}),
    "B": dict(steps=6000, begins="runs/chatumm_a", dialogues={1: 0.20, 2: 0.35}),
    "C": dict(steps=3000, begins="runs/chatumm_b", dialogues={1: 0.10, 2: 0.30, 3: 0.25}),
}
REPLAY = {"text_to_image": 0.30, "editing": 0.30, "image_questions": 0.30, "text": 0.10}


# By chips. Kernels attend, which a TPU has not run yet (docs/performance.md); what they give is kept for the
# backward pass where there is room. On v5e two chips share a row.
KERNELS = dict(mixture=dict(attention="kernels"), vision=dict(attention="kernels"))
PRESETS = {
    "v5p-64": dict(model=KERNELS | dict(mixture=dict(attention="kernels", remat="attention"))),
    "v6e-64": dict(model=KERNELS),
    "v5e-256": dict(model=KERNELS, mesh=dict(sequence=2), data=dict(batch_size=128)),
}


def sources(dialogues: dict[int, float]) -> list[dict]:
    """Folders of records and their weights, which add up to 1."""
    found = [dict(path=f"data/dialogues_{stage}", weight=share) for stage, share in dialogues.items()]
    rest = 1 - sum(dialogues.values())
    return found + [dict(path=f"data/{name}", weight=round(rest * w, 6)) for name, w in REPLAY.items()]


def stage(name: str, chips: str | None = None) -> ConfigDict:
    """The config of one stage, for some chips of PRESETS."""
    chosen = STAGES[name]
    config = ConfigDict(
        dict(
            family="chatumm",
            model=dict(
                layout=dict(drop=dict(latents=0.5)),
                # Layers are made again in the backward pass; only labelled tokens are projected to words.
                mixture=dict(remat="full"),
                vision=dict(remat="full"),
                loss_chunk=1024,
            ),
            data=dict(
                sources=sources(chosen["dialogues"]),
                tokenizer=f"{chosen['begins']}/tokenizer.model",
                # A pack of 40k tokens: what is read, patches among it, and what is drawn, clean copies too.
                tokens=20480,
                images=12,
                axes=dict(latents=20480, patches=16384),
                packing="first_fit",
                oversize="drop",
                batch_size=64,
                workers=16,
            ),
            mesh=dict(data=1, fsdp=-1, tensor=1),
            optim=dict(
                lr=2.5e-5,
                schedule="constant",
                warmup=500,
                b1=0.9,
                b2=0.95,
                eps=1e-15,
                clip=1.0,
                groups=[dict(match=["autoencoder/"], optimizer="frozen"), dict(match=[])],
            ),
            train=dict(
                steps=chosen["steps"],
                dtype="bfloat16",
                loss=dict(text=0.25, image=1.0),
                ema=0.995,
                init_from=chosen["begins"],
                log_every=20,
                save_every=500,
            ),
            eval=dict(weights="ema"),
        )
    )
    return preset(config, PRESETS, chips)


def get_config(chips: str | None = None) -> ConfigDict:
    return stage("A", chips)
