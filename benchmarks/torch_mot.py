"""The PyTorch side of ``mot_step.py``: a mixture of transformers of the same sizes, written plainly.

Tokens lie in packed order; each set of weights is applied to its own tokens, found by index, and attention is
``scaled_dot_product_attention`` under a boolean mask.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    """RMS norm with a gain."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Expert(nn.Module):
    """One set of weights of a layer."""

    def __init__(self, c):
        super().__init__()
        head = c.WIDTH // c.HEADS
        self.norm_1, self.norm_2 = Norm(c.WIDTH), Norm(c.WIDTH)
        self.q = nn.Linear(c.WIDTH, c.WIDTH)
        self.k, self.v = (nn.Linear(c.WIDTH, c.KV * head) for _ in range(2))
        self.o = nn.Linear(c.WIDTH, c.WIDTH, bias=False)
        self.q_norm, self.k_norm = Norm(head), Norm(head)
        self.gate, self.up = (nn.Linear(c.WIDTH, c.MLP, bias=False) for _ in range(2))
        self.down = nn.Linear(c.MLP, c.WIDTH, bias=False)

    def mlp(self, x):
        x = self.norm_2(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Layer(nn.Module):
    """Two experts around one attention; `groups` are the indices of their tokens."""

    def __init__(self, c):
        super().__init__()
        self.experts, self.c = nn.ModuleList([Expert(c), Expert(c)]), c

    def forward(self, x, groups, cos, sin, mask):
        c, head = self.c, self.c.WIDTH // self.c.HEADS
        q = x.new_empty(len(x), c.HEADS, head)
        k, v = (x.new_empty(len(x), c.KV, head) for _ in range(2))
        for expert, at in zip(self.experts, groups):
            y = expert.norm_1(x[at])
            q = q.index_copy(0, at, expert.q_norm(expert.q(y).view(-1, c.HEADS, head)))
            k = k.index_copy(0, at, expert.k_norm(expert.k(y).view(-1, c.KV, head)))
            v = v.index_copy(0, at, expert.v(y).view(-1, c.KV, head))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        q, k, v = (a.transpose(0, 1)[None] for a in (q, k, v))
        if x.is_cuda:  # enable_gqa would take the way that writes all scores to memory
            k, v = (a.repeat_interleave(c.HEADS // c.KV, dim=1) for a in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=not x.is_cuda)
        out = out[0].transpose(0, 1).reshape(len(x), -1)
        attended = torch.empty_like(x)
        for expert, at in zip(self.experts, groups):
            attended = attended.index_copy(0, at, expert.o(out[at]))
        x = x + attended
        changed = torch.empty_like(x)
        for expert, at in zip(self.experts, groups):
            changed = changed.index_copy(0, at, expert.mlp(x[at]))
        return x + changed


class VisionLayer(nn.Module):
    """A pre-norm layer over the patches of images of one size, a batch of them."""

    def __init__(self, c):
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(c.VIT, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(c.VIT, 3 * c.VIT), nn.Linear(c.VIT, c.VIT)
        self.up, self.down = nn.Linear(c.VIT, c.VIT_MLP), nn.Linear(c.VIT_MLP, c.VIT)
        self.heads = c.VIT_HEADS

    def forward(self, x):
        b, p, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, p, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, p, d)
        x = x + self.out(out)
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Model(nn.Module):
    """`c` is the module with the sizes."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.VOCAB, c.WIDTH)
        self.patch, self.position = (
            nn.Linear(3 * c.PATCH**2, c.VIT),
            nn.Parameter(torch.randn(c.CELLS**2, c.VIT)),
        )
        self.vision = nn.ModuleList([VisionLayer(c) for _ in range(c.VIT_LAYERS)])
        self.vision_norm = nn.LayerNorm(c.VIT, eps=1e-6)
        self.connector = nn.Sequential(
            nn.Linear(c.VIT, c.WIDTH), nn.GELU(approximate="tanh"), nn.Linear(c.WIDTH, c.WIDTH)
        )
        self.time = nn.Sequential(nn.Linear(256, c.WIDTH), nn.SiLU(), nn.Linear(c.WIDTH, c.WIDTH))
        self.latent_in, self.latent_out = nn.Linear(48, c.WIDTH), nn.Linear(c.WIDTH, 48)
        self.layers = nn.ModuleList([Layer(c) for _ in range(c.LAYERS)])
        self.norms = nn.ModuleList([Norm(c.WIDTH), Norm(c.WIDTH)])
        self.head = nn.Linear(c.WIDTH, c.VOCAB, bias=False)

    def prepare(self, batch: dict, where: str) -> dict:
        """A batch of ours as arguments of :meth:`forward`, in packed order."""
        c = self.c
        tokens, latents = ({k: v[0] for k, v in batch[name].items()} for name in ("tokens", "latents"))
        key = lambda part: part["segment_ids"].astype(np.int64) * 10**6 + part["order"]  # noqa: E731
        rank = np.argsort(np.argsort(np.concatenate([key(tokens), key(latents)])))
        und, gen = rank[: len(tokens["ids"])], rank[len(tokens["ids"]) :]
        both = {n: np.zeros(len(rank), np.int64) for n in ("segment_ids", "split", "mode", "order", "rope")}
        for name, values in both.items():
            values[und], values[gen] = tokens[name], latents[name]
        s, split, mode, order = (both[n] for n in ("segment_ids", "split", "mode", "order"))
        same = split[:, None] == split[None]
        allowed = (order[:, None] >= order[None]) | (same & (mode[:, None] > 0))
        allowed &= ~((mode[None] == 2) & ~same) & (s[:, None] == s[None])
        head = c.WIDTH // c.HEADS // 2
        angles = both["rope"][:, None] * 1e6 ** (-np.arange(head) / head)
        words = tokens["patch"] < 0
        noised = latents["time"] >= 0
        labelled = tokens["weight"] > 0
        make = lambda a, dtype=torch.long: torch.as_tensor(np.asarray(a), dtype=dtype, device=where)  # noqa: E731
        pixels = batch["patches"]["pixels"][0].reshape(-1, c.CELLS**2, 3 * c.PATCH**2) / 127.5 - 1
        t = torch.sigmoid(torch.randn(len(latents["time"]), device=where)) * make(noised, torch.float32)
        return {
            "ids": make(tokens["ids"][words]),
            "at": {
                "words": make(und[words]),
                "patches": make(und[~words]),
                "und": make(und),
                "gen": make(gen),
                "labelled": make(und[labelled]),
                "noised": make(gen[noised]),
            },
            "labels": make(tokens["label"][labelled]),
            "pixels": make(pixels, torch.float32),
            "latents": torch.randn(len(gen), 48, device=where),
            "t": t,
            "drawn": make(np.flatnonzero(noised)),
            "rotary": tuple(make(f(angles), torch.float32)[:, None] for f in (np.cos, np.sin)),
            "mask": make(allowed, torch.bool)[None, None],
        }

    def forward(self, ids, at, labels, pixels, latents, t, drawn, rotary, mask):
        c = self.c
        x = torch.zeros(len(at["und"]) + len(at["gen"]), c.WIDTH, device=latents.device)
        x = x.index_copy(0, at["words"], self.embed(ids))
        y = self.patch(pixels) + self.position
        for layer in self.vision:
            y = layer(y)
        x = x.index_copy(0, at["patches"], self.connector(self.vision_norm(y)).flatten(0, 1))
        noise = torch.randn_like(latents)
        rates = torch.exp(-np.log(1e4) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None] * rates
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        noisy = (1 - t[:, None]) * latents + t[:, None] * noise
        x = x.index_copy(0, at["gen"], self.latent_in(noisy) + time)
        for layer in self.layers:
            x = layer(x, (at["und"], at["gen"]), *rotary, mask)
        said = self.head(self.norms[0](x[at["labelled"]]))
        velocity = self.latent_out(self.norms[1](x[at["noised"]]))
        text = F.cross_entropy(said, labels)
        return 0.25 * text + F.mse_loss(velocity, (noise - latents)[drawn])
