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
    """(attention's output, the layer's)."""
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
            return y.reshape(len(at), -1)

        return routed(count * head, f).view(len(x), count, head)

    q, k, v = projected("q", heads), projected("k", kv), projected("v", kv)
    angles = rope[:, None] * c["rope_theta"] ** (-torch.arange(head // 2) / (head // 2))
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    turn = lambda y: torch.cat([-y[..., head // 2 :], y[..., : head // 2]], dim=-1)  # noqa: E731
    q, k = (y * angles.cos() + turn(y) * angles.sin() for y in (q, k))
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

    return attended, x + routed(x.shape[1], mlp)


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


def write(folder: Path, seed: int = 0) -> None:
    """The folder: state dicts, fixture.json, mot_layer, train_forward and grads."""
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
    ours = reference.merged(reference.params).latents(
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
        attended, y = decoder_layer(s, i, x, und, gen, rope, allowed)
        if i == 0:
            first = {"x": x, "y": y, "attn_out": attended, "und_indexes": und, "gen_indexes": gen}
        x = t[f"layer_out.{i}"] = y
    eps = config["llm"]["rms_norm_eps"]
    final = torch.zeros_like(x)
    for at, mark in ((und, ""), (gen, "_moe_gen")):
        final = final.index_copy(0, at, rms(x[at], s[f"language_model.model.norm{mark}.weight"], eps))
    t["final_hidden"] = final
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
    for name, part in (("train_forward", t), ("grads", grads), ("mot_layer", layer)):
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
