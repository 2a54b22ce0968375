"""BAGEL's forward pass in PyTorch, written from the formulas of docs/chatumm.md, and a fixture folder of it.

It makes folders of the layout ``umm convert verify`` reads, of any dimensions, whose numbers owe nothing to
our JAX code: only the latents of the autoencoder are ours, which the recorded set compares.
"""

import json
from pathlib import Path

import numpy as np
import torch
from flax import nnx
from safetensors.numpy import save_file
from torch.nn import functional as F

from umm_jax.convert.fixtures import chatumm as fixtures
from umm_jax.families.chatumm import weights
from umm_jax.families.chatumm.model import build
from umm_jax.families.chatumm.segments import Grids, Segment, Shown, Special, lay
from umm_jax.models.layers import Keys

SPECIAL = {"bos_token_id": 101, "eos_token_id": 102, "start_of_image": 103, "end_of_image": 104}
IDS = Special(101, 102, 103, 104, 102)
SIZES = {  # nothing as in the recorded set
    "llm": dict(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=5e4,
    ),
    "vit": dict(
        hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3, patch_size=6,
        layer_norm_eps=1e-5,
    ),
    "vae": dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, z_channels=3, scale_factor=0.3, shift_factor=0.2),
    "latent_patch_size": 3,
    "timestep_shift_training": 2.5,
    "special_tokens": SPECIAL,
}  # fmt: skip
GRIDS = Grids(latent=4, vision=5, canvas=4)


def state(rng) -> tuple[dict, dict]:
    """A random state dict of SIZES and the shapes it has."""
    llm, vit = SIZES["llm"], SIZES["vit"]
    told = {
        "language_model.model.embed_tokens.weight": (120, llm["hidden_size"]),
        "vit_pos_embed.pos_embed": (GRIDS.vision**2, llm["hidden_size"]),
        "latent_pos_embed.pos_embed": (GRIDS.latent**2, llm["hidden_size"]),
        "time_embedder.mlp.0.weight": (llm["hidden_size"], 20),
    }
    told |= {f"vit_model.vision_model.encoder.layers.{i}.x": () for i in range(vit["num_hidden_layers"])}
    config = weights.config_of(SIZES, told)
    abstract = nnx.split(nnx.eval_shape(lambda: build(config, Keys(0))))[1]
    ours = {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    table = weights.table(config)
    found = {}
    for name, shape in table.theirs(ours).items():
        value = rng.normal(size=shape) / max(np.prod(shape[1:]), 1) ** 0.5
        found[name] = (1 + 0.1 * value if len(shape) == 1 and "bias" not in name else value).astype(
            np.float32
        )
    for constant in table.constants:
        found[constant.theirs] = constant.value().astype(np.float32)
    return found, SIZES


def rms(x, gain, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


def linear(s, name, x):
    return F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))


def vision(s, patches, place, lengths):
    """Tokens of each image, one image after another, as the decoder reads them."""
    c = SIZES["vit"]
    top, heads = "vit_model.vision_model.", c["num_attention_heads"]

    def norm(name, x):
        weight, bias = s[f"{name}.weight"], s[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, c["layer_norm_eps"])

    x = linear(s, f"{top}embeddings.patch_embedding", patches)
    x = x + s[f"{top}embeddings.position_embedding.weight"][place]
    for i in range(c["num_hidden_layers"]):
        layer = f"{top}encoder.layers.{i}"
        outs = []
        for part in x.split(lengths):
            y = norm(f"{layer}.layer_norm1", part)
            q, k, v = (
                linear(s, f"{layer}.self_attn.{n}_proj", y).view(len(y), heads, -1).transpose(0, 1)
                for n in "qkv"
            )
            out = (
                F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
                .transpose(0, 1)
                .reshape(len(y), -1)
            )
            outs.append(linear(s, f"{layer}.self_attn.out_proj", out))
        x = x + torch.cat(outs)
        y = F.gelu(linear(s, f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x)), approximate="tanh")
        x = x + linear(s, f"{layer}.mlp.fc2", y)
    out = norm(f"{top}post_layernorm", x)
    connected = linear(s, "connector.fc2", F.gelu(linear(s, "connector.fc1", out), approximate="tanh"))
    return connected + s["vit_pos_embed.pos_embed"][place]


def times(s, t):
    half = s["time_embedder.mlp.0.weight"].shape[1] // 2
    angles = t[:, None] * torch.exp(-np.log(1e4) * torch.arange(half) / half)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return table, linear(s, "time_embedder.mlp.2", F.silu(linear(s, "time_embedder.mlp.0", table)))


def decoder_layer(s, i, x, und, gen, rope, allowed):
    """(attention's output, the layer's, its keys and values [T, KV, H])."""
    c = SIZES["llm"]
    heads, kv, eps = c["num_attention_heads"], c["num_key_value_heads"], c["rms_norm_eps"]
    head, layer = x.shape[1] // heads, f"language_model.model.layers.{i}"
    groups = ((und, ""), (gen, "_moe_gen"))

    def routed(width, f):
        out = x.new_zeros(len(x), width)
        for at, mark in groups:
            out = out.index_copy(0, at, f(at, mark))
        return out

    def projected(name, count):
        def f(at, mark):
            y = rms(x[at], s[f"{layer}.input_layernorm{mark}.weight"], eps)
            y = linear(s, f"{layer}.self_attn.{name}_proj{mark}", y).view(len(at), count, head)
            if name != "v":
                y = rms(y, s[f"{layer}.self_attn.{name}_norm{mark}.weight"], eps)
            return y.reshape(len(at), count * head)

        return routed(count * head, f).view(len(x), count, head)

    q, k, v = projected("q", heads), projected("k", kv), projected("v", kv)
    angles = rope[:, None] * c["rope_theta"] ** (-torch.arange(head // 2) / (head // 2))
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    turn = lambda y: torch.cat([-y[..., head // 2 :], y[..., : head // 2]], dim=-1)  # noqa: E731
    q, k = (y * angles.cos() + turn(y) * angles.sin() for y in (q, k))
    kept = k, v
    k, v = (y.repeat_interleave(heads // kv, dim=1) for y in (k, v))
    scores = torch.einsum("qnh,knh->nqk", q, k) / head**0.5
    mixed = torch.softmax(scores.masked_fill(~allowed, -1e30), dim=-1)
    mixed = torch.einsum("nqk,knh->qnh", mixed, v).reshape(len(x), -1)
    attended = routed(x.shape[1], lambda at, mark: linear(s, f"{layer}.self_attn.o_proj{mark}", mixed[at]))
    x = x + attended

    def mlp(at, mark):
        y = rms(x[at], s[f"{layer}.post_attention_layernorm{mark}.weight"], eps)
        gate, up = (linear(s, f"{layer}.mlp{mark}.{n}_proj", y) for n in ("gate", "up"))
        return linear(s, f"{layer}.mlp{mark}.down_proj", F.silu(gate) * up)

    return attended, x + routed(x.shape[1], mlp), kept


def last_norm(s, x, und, gen):
    final, eps = torch.zeros_like(x), SIZES["llm"]["rms_norm_eps"]
    for at, mark in ((und, ""), (gen, "_moe_gen")):
        final = final.index_copy(0, at, rms(x[at], s[f"language_model.model.norm{mark}.weight"], eps))
    return final


def plans(rng):
    words = lambda n: tuple(rng.integers(0, 100, n).tolist())  # noqa: E731
    dialogue = [
        Segment("text", words(4)),
        Segment("latent", image=0),
        Segment("vision", image=0),
        Segment("text", words(6), learned=True, label=IDS.vision_start),
        Segment("latent", image=1, learned=True),
        Segment("latent", image=1),
        Segment("vision", image=1, label=IDS.end),
        Segment("text", words(3)),
    ]
    drawing = [Segment("text", words(5)), Segment("latent", image=0, learned=True)]
    return [
        (dialogue, [Shown((2, 3), (3, 2)), Shown((4, 1), (2, 5))]),
        (drawing, [Shown((3, 3), (1, 1))]),
    ]


class Stream:
    """What a reply has read. Every pass computes all of it again: there is no cache to go wrong."""

    def __init__(self, s):
        self.s, self.pieces, self.rope = s, [], 0

    def copy(self) -> "Stream":
        other = Stream(self.s)
        other.pieces, other.rope = list(self.pieces), self.rope
        return other

    def embedded(self, ids) -> torch.Tensor:
        return self.s["language_model.model.embed_tokens.weight"][torch.as_tensor(ids).long()]

    def text(self, ids, end: bool = True) -> None:
        ids = [IDS.start, *ids, *([IDS.end] if end else [])]
        rope = self.rope + torch.arange(len(ids))
        self.pieces.append((self.embedded(ids), torch.zeros(len(ids), dtype=torch.bool), rope, False))
        self.rope += len(ids)

    def image(self, x, drawn: bool) -> None:
        """Tokens x between their brackets; `drawn` ones are latents."""
        x = torch.cat([self.embedded([IDS.vision_start]), x, self.embedded([IDS.vision_end])])
        group = torch.zeros(len(x), dtype=torch.bool)
        group[1:-1] = drawn
        self.pieces.append((x, group, torch.full((len(x),), self.rope), True))
        self.rope += 1

    def latents(self, z, cells, t: float) -> None:
        place = torch.tensor([row * GRIDS.latent + c for row in range(cells[0]) for c in range(cells[1])])
        time = times(self.s, torch.full((1,), t))[1]
        x = linear(self.s, "vae2llm", z) + time + self.s["latent_pos_embed.pos_embed"][place]
        self.image(x, drawn=True)

    def seen(self, picture) -> None:
        """A picture [3, h, w] for the encoder."""
        p = SIZES["vit"]["patch_size"]
        rows, columns = picture.shape[1] // p, picture.shape[2] // p
        patches = picture.reshape(3, rows, p, columns, p).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
        place = torch.tensor([row * GRIDS.vision + c for row in range(rows) for c in range(columns)])
        self.image(vision(self.s, patches, place, [len(patches)]), drawn=False)

    def run(self):
        """(hidden states after the last norm [T, D], keys and values by layer)."""
        x, group, rope = (torch.cat([piece[i] for piece in self.pieces]) for i in range(3))
        split = torch.cat([torch.full((len(piece[0]),), i) for i, piece in enumerate(self.pieces)])
        full = torch.tensor([piece[3] for piece in self.pieces])[split]
        order = torch.arange(len(x))
        allowed = (order[:, None] >= order) | ((split[:, None] == split) & full[:, None])
        und, gen = torch.where(~group)[0], torch.where(group)[0]
        kept = []
        for i in range(SIZES["llm"]["num_hidden_layers"]):
            _, x, pair = decoder_layer(self.s, i, x, und, gen, rope.float(), allowed)
            kept.append(pair)
        return last_norm(self.s, x, und, gen), kept

    def velocity(self, z, cells, t: float) -> torch.Tensor:
        there = self.copy()
        there.latents(z, cells, t)
        return linear(self.s, "llm2vae", there.run()[0][-len(z) - 1 : -1])


COMMON = dict(
    num_timesteps=5, timestep_shift=2.0, cfg_renorm_min=0.0, cfg_renorm_type="global", cfg_interval=[0.0, 1.0]
)
CASES = {
    name: COMMON | dict(cfg_text_scale=text, cfg_img_scale=image) | more
    for name, text, image, more in (
        ("no_cfg", 1.0, 1.0, {}),
        ("text_global", 3.0, 1.0, {}),
        ("text_img_global_interval", 3.0, 1.7, dict(cfg_interval=[0.5, 1.0], num_timesteps=7)),
        ("text_img_channel", 3.0, 1.7, dict(cfg_renorm_type="channel")),
        ("text_img_text_channel", 5.0, 1.4, dict(cfg_renorm_type="text_channel", timestep_shift=4.0)),
        ("text_img_global_min", 4.0, 1.7, dict(cfg_renorm_min=0.6)),
        ("img_only_scale_is_ignored", 1.0, 2.5, {}),
    )
}


def guided(case, v, text_free, image_free):
    """The velocity that is followed, and what of the branches went into it."""
    a, b = case["cfg_text_scale"], case["cfg_img_scale"]
    if a <= 1:
        return v
    length = lambda x, by_token: x.norm(dim=-1, keepdim=True) if by_token else x.norm()  # noqa: E731

    def held(x, by_token):
        ratio = length(v, by_token) / (length(x, by_token) + 1e-8)
        return x * ratio.clamp(case["cfg_renorm_min"], 1.0)

    kind = case["cfg_renorm_type"]
    by_text = text_free + a * (v - text_free)
    if kind == "text_channel":
        by_text = held(by_text, True)
    found = image_free + b * (by_text - image_free) if b > 1 else by_text
    return found if kind == "text_channel" else held(found, kind == "channel")


def sampled(case, streams, noise, cells) -> dict[str, torch.Tensor]:
    """All that a fixture records of one setting."""
    t = torch.linspace(1, 0, case["num_timesteps"])
    t = case["timestep_shift"] * t / (1 + (case["timestep_shift"] - 1) * t)
    low, high = case["cfg_interval"]
    names = ("v_cond", "v_text_uncond", "v_img_uncond")
    noted: dict[str, list] = {name: [] for name in (*names, "x_t", "v_t")}
    x = noise
    for now, then in zip(t[:-1], t[1:]):
        parts = [stream.velocity(x, cells, float(now)) for stream in streams]
        v = guided(case, *parts) if low < now <= high else parts[0]
        for name, value in zip((*names, "x_t", "v_t"), (*parts, x, v)):
            noted[name].append(value)
        x = x - v * (now - then)
    return {name: torch.stack(values) for name, values in noted.items()} | {"t": t[:-1], "final": x}


def sampling(s, model, rng) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of sampling.safetensors and what fixture.json says of them; `model` is ours, for latents."""
    draw = lambda *shape: torch.tensor(rng.normal(size=shape), dtype=torch.float32)  # noqa: E731
    words = lambda n: torch.tensor(rng.integers(0, 100, n))  # noqa: E731
    p, z_size = SIZES["latent_patch_size"], SIZES["vae"]["z_channels"]
    cells = (2, 4)
    t = {"text0": words(5), "text1": words(7), "text2": words(4), "init_noise": draw(cells[0] * cells[1], 27)}
    for name, (h, w), seen in (("image", (18, 12), (12, 18)), ("turn2_image", (12, 24), (24, 12))):
        t |= {f"{name}_vae": draw(3, h, w).tanh(), f"{name}_vae_eps": draw(1, z_size, h // 2, w // 2)}
        t[f"{name}_vit"] = draw(3, *seen).tanh()

    def show(stream, name):
        picture, noise = t[f"{name}_vae"].numpy(), t[f"{name}_vae_eps"].numpy()
        size = np.array([[picture.shape[1:]]])
        z = model.latents(fixtures.nhwc(picture)[None, None], size, fixtures.nhwc(noise)[None])
        z = torch.tensor(fixtures.nchw(z[0, 0]))
        rows, columns = z.shape[1] // p, z.shape[2] // p
        tokens = z.reshape(z_size, rows, p, columns, p).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
        stream.latents(tokens, (rows, columns), 0.0)
        stream.seen(t[f"{name}_vit"])

    main, no_image = Stream(s), Stream(s)
    main.text(t["text0"].tolist())
    show(main, "image")
    no_text = main.copy()
    main.text(t["text1"].tolist())
    for name in ("text0", "text1"):
        no_image.text(t[name].tolist())
    streams = {"main": main, "cfg_text": no_text, "cfg_img": no_image}
    for name, case in CASES.items():
        found = sampled(case, list(streams.values()), t["init_noise"], cells)
        t |= {f"{name}.{key}": value for key, value in found.items()}
    z = t["text_img_global_interval.final"].reshape(*cells, p, p, z_size).permute(4, 0, 2, 1, 3)
    t["decoded_latent"] = z.reshape(1, z_size, cells[0] * p, cells[1] * p)
    raw = fixtures.nchw(model.autoencoder.decode(fixtures.nhwc(t["decoded_latent"].numpy())))
    t["decoded_image_raw"] = torch.tensor(np.array(raw))
    levels = (t["decoded_image_raw"][0].permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1) * 255
    t["decoded_image_uint8"] = levels.to(torch.uint8)
    t["latent_position_ids"] = torch.tensor(
        [r * GRIDS.latent + c for r in range(cells[0]) for c in range(cells[1])]
    )

    second = streams["turn2"] = main.copy()
    show(second, "turn2_image")
    second.text(t["text2"].tolist())
    contexts = {}
    for name, stream in streams.items():
        _, kept = stream.run()
        contexts[name] = {"kv_len": [len(kept[0][0])], "next_rope": [stream.rope]}
        t |= {f"kv.{name}.{part}.{i}": a for i, pair in enumerate(kept) for part, a in zip("kv", pair)}
    ids, logits = [], []
    for _ in range(6):
        said = second.copy()
        said.text(ids, end=False)
        logits.append(linear(s, "language_model.lm_head", said.run()[0][-1]))
        ids.append(int(logits[-1].argmax()))
    t |= {"turn2_text_ids": torch.tensor([IDS.start, *ids[:-1]]), "turn2_text_logits": torch.stack(logits)}
    hw = [n * SIZES["latent_patch_size"] * 2 for n in cells]
    return t, {"contexts": contexts, "image_hw": hw, "cases": CASES}


def write(folder: Path, seed: int = 0) -> None:
    """The folder: state dicts, fixture.json, mot_layer, train_forward, grads and sampling."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    arrays, config = state(rng)
    parts = {"model": {}, "vae_model": {}}
    for name, value in arrays.items():
        part = "vae_model" if name.startswith(weights.AUTOENCODER) else "model"
        parts[part][name.removeprefix(weights.AUTOENCODER)] = value
    s = {name: torch.tensor(value, requires_grad=True) for name, value in parts["model"].items()}
    frozen = ("vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed")
    samples = [lay(*plan, IDS, GRIDS) for plan in plans(rng)]
    t = fixtures._packed(samples)
    shapes = [shown.latent for _, many in plans(np.random.default_rng(0)) for shown in many]
    # Each copy of an image counts as an image of its own, as in the reference.
    copies = [(0, 0), (0, 1), (0, 1), (1, 0)]
    starts = [0, 2]
    which = [starts[sample] + image for sample, image in copies]
    t["patchified_vae_latent_shapes"] = np.array([shapes[i] for i in which])
    noised = np.array([False, True, False, True])
    counts = t["patchified_vae_latent_shapes"].prod(axis=1)
    raw = np.where(noised, rng.normal(size=4), -np.inf)
    t["packed_timesteps_raw"] = np.repeat(raw, counts).astype(np.float32)
    side = 2 * config["latent_patch_size"]
    h, w = t["patchified_vae_latent_shapes"].max(axis=0) * side
    pictures = rng.normal(size=(4, 3, h, w)).astype(np.float32)
    pictures[2] = pictures[1]
    for i, (rows, columns) in enumerate(t["patchified_vae_latent_shapes"] * side):
        pictures[i, :, rows:], pictures[i, :, :, columns:] = 0, 0
    t["padded_images"] = pictures
    t["vae_eps"] = rng.normal(size=(4, 3, h // 2, w // 2)).astype(np.float32)
    t["packed_vit_tokens"] = rng.normal(size=(len(t["packed_vit_position_ids"]), 108)).astype(np.float32)
    t["noise"] = rng.normal(size=(counts.sum(), 27)).astype(np.float32)

    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        save_file(part, folder / f"{name}.safetensors")
    modes = {0: "causal", 1: "full", 2: "noise"}
    split_modes = []
    for one in samples:
        both = {n: np.concatenate([one.tokens[n], one.latents[n]]) for n in ("split", "mode")}
        split_modes += [
            modes[int(both["mode"][both["split"] == i][0])] for i in range(both["split"].max() + 1)
        ]
    described = {"config": config, "train_split_modes": split_modes, "packing_cases": {}}
    (folder / "fixture.json").write_text(json.dumps(described))

    # The autoencoder's latents are our own code's; all that follows is not.
    reference = fixtures.Reference(folder, described)
    model = reference.merged(reference.params)
    ours = model.latents(
        fixtures.nhwc(pictures)[None], np.zeros((1, 4, 2), int), fixtures.nhwc(t["vae_eps"])[None]
    )
    t["padded_latent"] = fixtures.nchw(ours[0])
    latent = torch.tensor(t["padded_latent"])
    p = config["latent_patch_size"]
    cells = []
    for z, (rows, columns) in zip(latent, t["patchified_vae_latent_shapes"]):
        z = z[:, : rows * p, : columns * p].reshape(3, rows, p, columns, p)
        cells.append(z.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1))
    clean, noise = torch.cat(cells), torch.tensor(t["noise"])
    u = torch.sigmoid(torch.tensor(t["packed_timesteps_raw"]))
    shift = config["timestep_shift_training"]
    time = shift * u / (1 + (shift - 1) * u)
    noisy = (1 - time[:, None]) * clean + time[:, None] * noise
    lengths = t["vit_token_seqlens"].tolist()
    place = torch.tensor(t["packed_vit_position_ids"]).long()
    looked = vision(s, torch.tensor(t["packed_vit_tokens"]), place, lengths)
    _, embedded = times(s, time)
    index = {k: torch.tensor(t[k]).long() for k in t if k.endswith(("indexes", "ids")) and t[k].ndim == 1}
    x = torch.zeros(len(t["packed_position_ids"]), config["llm"]["hidden_size"])
    words = s["language_model.model.embed_tokens.weight"][index["packed_text_ids"]]
    x = x.index_copy(0, index["packed_text_indexes"], words)
    x = x.index_copy(0, index["packed_vit_token_indexes"], looked)
    drawn = linear(s, "vae2llm", noisy) + embedded
    drawn = drawn + s["latent_pos_embed.pos_embed"][index["packed_latent_position_ids"]]
    gen = index["packed_vae_token_indexes"]
    x = x.index_copy(0, gen, drawn)
    und = torch.tensor(np.setdiff1d(np.arange(len(x)), gen.numpy()))
    allowed, rope = torch.tensor(t["attention_allowed"]) > 0, torch.tensor(t["packed_position_ids"]).float()
    t |= {
        "llm_input": x,
        "packed_latent_clean": clean,
        "t": time,
        "t_embed": embedded,
        "noised_latent": noisy,
    }
    for i in range(config["llm"]["num_hidden_layers"]):
        attended, y, _ = decoder_layer(s, i, x, und, gen, rope, allowed)
        if i == 0:
            first = {"x": x, "y": y, "attn_out": attended, "und_indexes": und, "gen_indexes": gen}
        x = t[f"layer_out.{i}"] = y
    final = t["final_hidden"] = last_norm(s, x, und, gen)
    t["logits"] = linear(s, "language_model.lm_head", final[index["ce_loss_indexes"]])
    t["velocity"] = linear(s, "llm2vae", final[index["mse_loss_indexes"]])
    t["ce"] = F.cross_entropy(t["logits"], index["packed_label_ids"], reduction="none")
    t["mse"] = (t["velocity"] - (noise - clean)[time > 0]) ** 2
    t["ce_loss_weights"] = np.linspace(0.5, 1.5, len(t["ce"])).astype(np.float32)
    each = torch.tensor(t["ce_loss_weights"])
    t |= {"ce_mean": t["ce"].mean()[None], "mse_mean": t["mse"].mean()[None]}
    t["ce_mean_reweighted"] = ((t["ce"] * each).sum() / each.sum())[None]
    loss = 0.25 * t["ce"].mean() + t["mse"].mean()
    t["loss"] = loss[None]
    loss.backward()
    grads = {name: value.grad for name, value in s.items() if name not in frozen}
    layer = first | {
        "packed_position_ids": t["packed_position_ids"],
        "attention_allowed": t["attention_allowed"],
    }
    with torch.no_grad():
        drawn, described["sampling"] = sampling(s, model, rng)
    for name, part in (
        ("train_forward", t),
        ("grads", grads),
        ("mot_layer", layer),
        ("sampling", drawn),
    ):
        plain = {k: v.detach().numpy() if torch.is_tensor(v) else np.asarray(v) for k, v in part.items()}
        save_file({k: np.ascontiguousarray(v) for k, v in plain.items()}, folder / f"{name}.safetensors")
    norms: dict = {}
    for name, grad in grads.items():
        key = name.partition(".")[0]
        if key == "language_model":
            key = "embed_tokens" if "embed_tokens" in name else "lm_head" if "lm_head" in name else ""
            key = "llm." + (key or ("gen_expert" if "_moe_gen" in name else "und_expert"))
        square = float((grad.double() ** 2).sum())
        norms[key] = norms.get(key, 0) + square
        norms["total"] = norms.get("total", 0) + square
    described["grad_norms"] = {key: value**0.5 for key, value in norms.items()}
    described["grad_norms_when_understanding_expert_frozen"] = {}
    (folder / "fixture.json").write_text(json.dumps(described))
