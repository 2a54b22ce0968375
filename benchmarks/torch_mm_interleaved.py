"""The PyTorch baseline of ``train_step.py``: an MM-Interleaved of stock parts, at the sizes of a row.

Stock: ``transformers`` LlamaModel, CLIPVisionModel and Blip2QFormerModel, ``diffusers`` UNet2DConditionModel
and AutoencoderKL, ``torch.optim.AdamW`` (the fused one); attention is PyTorch's
``scaled_dot_product_attention`` where the parts allow it. What they lack is written here: deformable
attention through ``grid_sample``, the synchronizers, the vision adapter, the glue. One thing is left out, the
norm of queries and keys in the visual Q-Former, which the stock one lacks.

The work is that of our step: the same frozen parts (no weight gradients; the language model's activations
have gradients, as trained parts lie below it) and the same tokens. Only images that exist are computed, as a
PyTorch user would do it; our batch has them padded.

Letters: B rows, T tokens, I images of the batch, Q queries, V pixels of all levels, C channels.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FROZEN = ("llm.", "clip.", "vae.", "head.", "ignore", "table")
SCALE = 0.18215


def read(values, locations, weights, sides):
    """The weighted sum of bilinear samples [I, Q, heads * c].

    values [I, V, heads, c], locations [I, Q, heads, levels, points, 2] in [0, 1], weights without the 2.
    """
    images, queries, heads, _, points, _ = locations.shape
    total, start = 0, 0
    for level, side in enumerate(sides):
        part = values[:, start : start + side * side]
        start += side * side
        part = part.permute(0, 2, 3, 1).reshape(images * heads, -1, side, side)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(images * heads, queries, points, 2)
        picked = F.grid_sample(part, grid, align_corners=False)  # [I * heads, c, Q, points]
        share = weights[:, :, :, level].transpose(1, 2).reshape(images * heads, 1, queries, points)
        total = total + (picked * share).sum(-1)
    return total.reshape(images, -1, queries).transpose(1, 2)


def centres(side):
    """(x, y) of each pixel: [side^2, 2]."""
    y, x = torch.meshgrid(*(((torch.arange(side) + 0.5) / side),) * 2, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def sincos(count, width):
    """[count, width]."""
    angles = np.arange(count)[:, None] * 10000 ** (-np.arange(width // 2) / (width / 2))
    return torch.tensor(np.concatenate([np.sin(angles), np.cos(angles)], 1), dtype=torch.float32)


def sincos_2d(side, width):
    """[side, side, width]."""
    axis = sincos(side, width // 2)
    wide = (side, side, width // 2)
    return torch.cat([axis[:, None].expand(wide), axis[None].expand(wide)], -1)


class Synchronizer(nn.Module):
    """The multi-image feature synchronizer: each query reads points of every visible image, or nothing."""

    def __init__(self, d, maps, width, heads, points, sides, base, most, spread):
        super().__init__()
        self.heads, self.points, self.sides, self.base = heads, points, sides, base
        self.query, self.relative = nn.Linear(d, d), nn.Embedding(most, d)
        self.offsets = nn.Linear(d, heads * points * 2)
        self.logits = nn.Linear(d, heads * len(sides) * (points + 1))
        self.values, self.out = nn.Linear(maps, width), nn.Linear(width, d)
        self.ignore = nn.Parameter(torch.zeros(width))
        nn.init.zeros_(self.offsets.weight)
        nn.init.uniform_(self.offsets.bias, -spread, spread)

    def forward(self, x, maps, visible, reference):
        """x [B, Q, d], maps [B, N, V, C], visible [B, Q, N], reference [Q or 1, 2] -> [B, Q, d]."""
        b, n = maps.shape[:2]
        q, heads, levels = x.shape[1], self.heads, len(self.sides)
        seen = visible.long()
        index = seen * (seen.sum(-1, keepdim=True) + 1 - seen.cumsum(-1))
        h = self.query(x)[:, :, None] + self.relative(index)
        shift = self.offsets(h).view(b, q, n, heads, 1, self.points, 2) / self.base
        a = self.logits(h).view(b, q, n, heads, levels, self.points + 1)[..., :-1]
        a = (
            a.masked_fill(~visible[..., None, None, None], -1e4)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(b, q, heads, -1)
        )
        # The ignore slots sum to exp(0) = 1: one more logit of zero.
        a = F.softmax(torch.cat([a, a.new_zeros(b, q, heads, 1)], -1), -1)
        weights, ignored = a[..., :-1].view(b, q, heads, n, levels, self.points), a[..., -1:]
        where = (reference[:, None, None, None, None] + shift).expand(-1, -1, -1, -1, levels, -1, -1)
        values = self.values(maps).view(b * n, -1, heads, self.out.in_features // heads)
        out = read(
            values,
            where.transpose(1, 2).flatten(0, 1),
            weights.permute(0, 3, 1, 2, 4, 5).flatten(0, 1),
            self.sides,
        )
        out = out.view(b, n, q, -1).sum(1)
        return self.out(out + (ignored * self.ignore.view(heads, -1)).flatten(2))


class BackboneSync(nn.Module):
    def __init__(self, d, maps, **sizes):
        super().__init__()
        self.query_norm, self.map_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(maps, eps=1e-6)
        self.core = Synchronizer(d, maps, maps, **sizes, most=50, spread=3.0)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, maps, visible):
        centre = torch.full((1, 2), 0.5, device=x.device)
        return x + torch.tanh(self.gate) * self.core(self.query_norm(x), self.map_norm(maps), visible, centre)


class DecoderSync(nn.Module):
    def __init__(self, d, maps, width, side, **sizes):
        super().__init__()
        self.query_norm, self.map_norm = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(maps, eps=1e-6)
        self.core = Synchronizer(d, maps, width, **sizes, base=side, most=10, spread=1.0)
        self.conv = nn.Conv2d(d, d, 1)
        self.register_buffer("table", sincos_2d(side, d).flatten(0, 1))
        self.register_buffer("centres", centres(side))

    def forward(self, x, maps, visible):
        """x [I, d, h, w], maps [I, 1, V, C], visible [I, 1]."""
        q = self.query_norm(x.flatten(2).transpose(1, 2)) + self.table
        out = self.core(q, self.map_norm(maps), visible[:, None].expand(-1, q.shape[1], -1), self.centres)
        return x + self.conv(out.transpose(1, 2).reshape(x.shape))


class Deformable(nn.Module):
    """LN, then deformable attention, as the vision adapter has it."""

    def __init__(self, d, heads, points, levels):
        super().__init__()
        self.shape = (heads, levels, points)
        count = math.prod(self.shape)
        self.query_norm, self.source_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.offsets, self.weights = nn.Linear(d, 2 * count), nn.Linear(d, count)
        self.values, self.out = nn.Linear(d, d // 2), nn.Linear(d // 2, d)

    def forward(self, x, reference, source, sides):
        b, q, _ = x.shape
        query = self.query_norm(x)
        offsets = self.offsets(query).view(b, q, *self.shape, 2)
        where = reference[:, None, None, None] + offsets / torch.tensor(sides, device=x.device)[:, None, None]
        weights = F.softmax(self.weights(query).view(b, q, self.shape[0], -1), -1).view(b, q, *self.shape)
        values = self.values(self.source_norm(source))
        return self.out(
            read(values.view(b, -1, self.shape[0], values.shape[-1] // self.shape[0]), where, weights, sides)
        )


class Extractor(nn.Module):
    def __init__(self, d, heads, points, sides):
        super().__init__()
        self.sides, hidden = sides, d // 4
        self.attention, self.norm = Deformable(d, heads, points, 1), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, c, x, reference):
        c = c + self.attention(c, reference, x, self.sides[1:2])
        h = self.up(self.norm(c)).transpose(1, 2)
        parts = h.split([s * s for s in self.sides], -1)
        parts = [self.conv(p.unflatten(-1, (s, s))).flatten(2) for p, s in zip(parts, self.sides)]
        return c + self.down(F.gelu(torch.cat(parts, -1).transpose(1, 2)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of NCHW."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Tower(nn.Module):
    """The vision adapter around the layers of a CLIP, which is handed in: it is frozen, this is trained."""

    def __init__(self, c, blocks=4, extra=2):
        super().__init__()
        d, self.grid, w = c["clip"]["width"], c["clip"]["image_size"] // c["clip"]["patch"], c["stem_width"]
        g = self.grid
        self.sides, heads, points = (2 * g, g, g // 2), c["heads"], c["points"]

        def conv(d_in, d_out, stride):
            return nn.Sequential(
                nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False), ChannelNorm(d_out, eps=1e-6), nn.ReLU()
            )

        pool = nn.MaxPool2d(3, 2, 1)
        first = nn.Sequential(conv(3, w, 2), conv(w, w, 1), conv(w, w, 1), pool)
        self.stem = nn.ModuleList([first, conv(w, 2 * w, 2), conv(2 * w, 4 * w, 2), conv(4 * w, 4 * w, 2)])
        self.to_maps = nn.ModuleList([nn.Conv2d(k * w, d, 1) for k in (1, 2, 4, 4)])
        self.level = nn.Parameter(torch.randn(3, d))
        self.injectors = nn.ModuleList([Deformable(d, heads, points, 3) for _ in range(blocks)])
        self.gammas = nn.ParameterList([torch.zeros(d) for _ in range(blocks)])
        self.extractors = nn.ModuleList(
            [Extractor(d, heads, points, self.sides) for _ in range(blocks + extra)]
        )
        self.up = nn.ConvTranspose2d(d, d, 2, 2)
        self.proj, self.token_norm, self.out_norm = nn.Linear(d, d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.register_buffer("table_x", F.pad(sincos_2d(g, d).flatten(0, 1), (0, 0, 1, 0)))
        for i, s in enumerate((4 * g, *self.sides)):
            self.register_buffer(f"table_{i}", sincos_2d(s, d).permute(2, 0, 1))
        self.register_buffer("centres", torch.cat([centres(s) for s in self.sides]))
        self.register_buffer("patches", centres(g))

    def forward(self, clip, pixels):
        """Normalised pixels [I, 3, h, w] -> tokens [I, 1 + P, C] and four maps [I, C, h, w]."""
        g, blocks = self.grid, len(self.injectors)
        y, maps = F.interpolate(pixels, size=(16 * g, 16 * g), mode="bilinear"), []
        for part, to_map in zip(self.stem, self.to_maps):
            y = part(y)
            maps.append(to_map(y))
        c = torch.cat([m.flatten(2).transpose(1, 2) + self.level[i] for i, m in enumerate(maps[1:])], 1)
        with torch.no_grad():
            x = clip.pre_layrnorm(clip.embeddings(pixels))
        seen, run = [], len(clip.encoder.layers) // blocks
        for i, (injector, gamma) in enumerate(zip(self.injectors, self.gammas)):
            patches = x[:, 1:] + gamma * injector(x[:, 1:], self.patches, c, self.sides)
            x = torch.cat([x[:, :1], patches], 1)
            for layer in clip.encoder.layers[i * run : (i + 1) * run]:
                x = layer(x, None)
            c = self.extractors[i](c, x[:, 1:], self.centres)
            seen.append(x[:, 1:].transpose(1, 2).unflatten(-1, (g, g)))
        for extractor in self.extractors[blocks:]:
            c = extractor(c, x[:, 1:], self.centres)
        parts = c.transpose(1, 2).split([s * s for s in self.sides], -1)
        c2, c3, c4 = (p.unflatten(-1, (s, s)) for p, s in zip(parts, self.sides))
        maps = [maps[0] + self.up(c2), c2, c3, c4]
        maps = [m + F.interpolate(s, size=m.shape[2:], mode="bilinear") for m, s in zip(maps, seen)]
        tokens = self.out_norm(self.token_norm(self.proj(x)) + self.table_x)
        return tokens, [m + getattr(self, f"table_{i}") for i, m in enumerate(maps)]


class Resampler(nn.Module):
    """Learned queries and the stock Q-Former."""

    def __init__(self, c):
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, c["queries"], c["d_out"]) * 0.02)
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=c["d_out"],
                num_hidden_layers=c["layers"],
                num_attention_heads=c["heads"],
                intermediate_size=c["mlp"],
                cross_attention_frequency=c["cross_every"],
                encoder_hidden_size=c["d_in"],
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )

    def forward(self, tokens, mask=None):
        queries = self.queries.expand(len(tokens), -1, -1)
        return self.qformer(
            query_embeds=queries, encoder_hidden_states=tokens, encoder_attention_mask=mask
        ).last_hidden_state


class Model(nn.Module):
    """The whole of it, from the `model` section of a row."""

    def __init__(self, c):
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

        super().__init__()
        b, clip, unet, vae = c["backbone"], c["tower"]["clip_adapter"]["clip"], c["unet"], c["autoencoder"]
        d, maps, sync, wide = b["width"], clip["width"], c["unet_sync"], unet["context_width"]
        self.config, self.soi, levels = c, c["layout"]["soi_id"], len(unet["widths"])
        self.llm = LlamaModel(
            LlamaConfig(
                vocab_size=b["vocab"],
                hidden_size=d,
                intermediate_size=b["mlp"],
                num_hidden_layers=b["layers"],
                num_attention_heads=b["heads"],
                rms_norm_eps=1e-6,
                use_cache=False,
            )
        )
        self.clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=maps,
                intermediate_size=clip["mlp"],
                num_hidden_layers=clip["layers"],
                num_attention_heads=clip["heads"],
                image_size=clip["image_size"],
                patch_size=clip["patch"],
            )
        )
        # What is not read gets no parameters: CLIP's last norm.
        self.clip.post_layernorm = nn.Identity()
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(vae["widths"]),
            up_block_types=("UpDecoderBlock2D",) * len(vae["widths"]),
            block_out_channels=tuple(vae["widths"]),
            layers_per_block=2,
            norm_num_groups=vae["norm_groups"],
            latent_channels=4,
        )
        self.head = nn.Linear(d, b["vocab"])
        s = b["synchronizer"]
        own = dict(heads=s["heads"], points=s["points"])
        self.syncs = nn.ModuleList(
            [
                BackboneSync(d, maps, **own, sides=s["sides"], base=16)
                for _ in range(b["layers"] // b["sync_every"])
            ]
        )
        self.new, self.soi_token = nn.Linear(d, 2), nn.Parameter(torch.zeros(d))
        self.tower = Tower(c["tower"]["clip_adapter"])
        self.visual, self.visual_proj = (
            Resampler(c["visual_resampler"]),
            nn.Linear(c["visual_resampler"]["d_out"], d),
        )
        self.context_proj, self.context = nn.Linear(d, d), Resampler(c["context_resampler"])
        self.null = nn.Parameter(torch.randn(c["context_resampler"]["queries"], wide) * 0.02)
        self.unet = UNet2DConditionModel(
            sample_size=unet["side"],
            block_out_channels=tuple(unet["widths"]),
            attention_head_dim=tuple(unet["heads"]),
            cross_attention_dim=wide,
            norm_num_groups=unet.get("norm_groups", 32),
            use_linear_projection=True,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        )
        side, skips = unet["side"], [(unet["side"], unet["widths"][0])]
        for i, w in enumerate(unet["widths"]):
            last = i + 1 == levels
            skips += [(side, w)] * 2 + ([] if last else [(side // 2, w)])
            side = side if last else side // 2
        own = dict(heads=sync["heads"], points=sync["points"], sides=sync["sides"], width=sync["d_values"])
        shapes = [*skips, (side, unet["widths"][-1])]
        self.unet_syncs = nn.ModuleList([DecoderSync(w, maps, side=at, **own) for at, w in shapes])
        self.register_buffer("table", sincos(2048, d))
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        self.register_buffer("alphas", torch.cumprod(1 - betas, 0))
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        for name, p in self.named_parameters():
            p.requires_grad_(not name.startswith(FROZEN) and not name.endswith("ignore"))

    def forward(self, batch):
        """The loss of a batch of :func:`prepare`."""
        ids, rows, at = batch["ids"], batch["row"], batch["soi"]
        tokens, maps = self.tower(self.clip, (batch["pixels"] - self.mean) / self.std)
        visual = self.visual_proj(self.visual(tokens))
        flat = [m.flatten(2).transpose(1, 2) for m in maps]

        x = self.llm.embed_tokens(ids) + (ids == self.soi)[..., None] * self.soi_token
        x = x.masked_scatter((ids == self.soi + 1)[..., None], visual)
        hidden = self.hidden(x, batch, [f for f, m in zip(flat, maps) if m.shape[-1] in self.sync_sides])

        logits = self.head(hidden)
        logits[..., -2:] += self.new(hidden)
        text = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
        )
        image = self.image_loss(batch, hidden, torch.cat(flat, 1), rows, at)
        return text + 10 * image

    @property
    def sync_sides(self):
        return self.config["backbone"]["synchronizer"]["sides"]

    def hidden(self, x, batch, maps):
        """Final states [B, T, D], the synchronizers reading the row's images in every few layers."""
        maps = torch.cat(maps, 1)
        padded = maps.new_zeros(len(x), batch["most"], *maps.shape[1:])
        padded = padded.index_put((batch["row"], batch["index"]), maps)
        places = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.llm.rotary_emb(x, position_ids=places)
        for i, layer in enumerate(self.llm.layers):
            x = (
                x
                + layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None)[
                    0
                ]
            )
            every = self.config["backbone"]["sync_every"]
            if i % every == 0:
                x = self.syncs[i // every](x, padded, batch["visible"])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.llm.norm(x)

    def image_loss(self, batch, hidden, maps, rows, at):
        with torch.no_grad():
            latents = self.vae.encode(batch["target"]).latent_dist.sample() * SCALE
        states = [hidden[r, : s + 1].flip(0) for r, s in zip(rows.tolist(), at.tolist())]
        lengths = torch.tensor([len(s) for s in states], device=hidden.device)
        states = nn.utils.rnn.pad_sequence(states, batch_first=True)
        states = self.context_proj(states) + self.table[: states.shape[1]]
        mask = torch.arange(states.shape[1], device=hidden.device) < lengths[:, None]
        condition = self.context(states, mask.long())
        drop = torch.rand(len(condition), 1, 1, device=hidden.device) < 0.1
        condition = torch.where(drop, self.null, condition)

        t = torch.randint(0, 1000, (len(latents),), device=hidden.device)
        noise, alpha = torch.randn_like(latents), self.alphas[t].view(-1, 1, 1, 1)
        out = self.draw(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, condition, batch, maps)
        return F.mse_loss(out, noise)

    def draw(self, x, t, condition, batch, maps):
        """The UNet's blocks with the synchronizers between the mid block and the way up."""
        unet = self.unet
        time = unet.time_embedding(unet.time_proj(t))
        x = unet.conv_in(x)
        skips = [x]
        for block in unet.down_blocks:
            more = {"encoder_hidden_states": condition} if hasattr(block, "attentions") else {}
            x, kept = block(x, time, **more)
            skips += kept
        x = unet.mid_block(x, time, encoder_hidden_states=condition)
        before = (batch["index"] > 0)[:, None]
        maps = torch.roll(maps, 1, 0)[:, None]
        *skips, x = [sync(s, maps, before) for sync, s in zip(self.unet_syncs, [*skips, x])]
        for block in unet.up_blocks:
            more = {"encoder_hidden_states": condition} if hasattr(block, "attentions") else {}
            count = len(block.resnets)
            x = block(x, res_hidden_states_tuple=tuple(skips[-count:]), temb=time, **more)
            skips = skips[:-count]
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def prepare(batch, device):
    """A batch of ``train_step_rows.make_batch`` as tensors, without its padding."""
    tokens, images = batch["tokens"], batch["images"]
    real = images["segment_ids"] > 0
    row, index = np.nonzero(real)
    at = images["soi"][real]
    seen = (images["soi"][:, None] < np.arange(tokens["ids"].shape[1])[:, None]) & real[:, None]
    as_map = lambda x: torch.tensor(x[real]).permute(0, 3, 1, 2).float()  # noqa: E731
    given = {
        "ids": torch.tensor(tokens["ids"]).long(),
        "labels": torch.tensor(np.where(tokens["weight"] > 0, tokens["ids"], -100)).long(),
        "visible": torch.tensor(seen),
        "pixels": as_map(images["pixels"]) / 255,
        "target": as_map(images["target"]) / 127.5 - 1,
        "row": torch.tensor(row),
        "index": torch.tensor(index),
        "soi": torch.tensor(at),
    }
    return {name: value.to(device) for name, value in given.items()} | {"most": real.shape[1]}


class Trainer:
    """One step: forward, backward, clip, AdamW."""

    def __init__(self, row, batch, device):
        torch.manual_seed(0)
        self.model, self.batch = Model(row.model).to(device).train(), prepare(batch, device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=1e-4, betas=(0.9, 0.995), eps=1e-6, weight_decay=0.05, fused=True
        )
        everything = sum(p.numel() for p in self.model.parameters())
        self.parameters = {"total": everything, "trained": sum(p.numel() for p in self.trained)}

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.detach()
