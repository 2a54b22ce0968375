"""Resamplers: turn any number of tokens into what the reader of them expects.

One interface, two kinds, made by :func:`build`:

    resampler(tokens [B, T, d_in], mask bool [B, T] | None, key=None)
        -> tokens [B, Q, d_out], mask bool [B, Q] | None

``qformer`` reads the tokens with a fixed number of learned queries (post-norm BERT blocks,
cross-attention in every few layers: docs/mm_interleaved.md 2.3). ``none`` hands the tokens on.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models.attention import attend, merge_heads, split_heads
from umm_jax.models.attention_plain import MASKED
from umm_jax.models.layers import (
    LayerNorm,
    Linear,
    Modules,
    activation,
    dropout,
    lean,
    normal,
    param,
    part,
    scan,
    stack,
)
from umm_jax.sharding import split_rows


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a resampler; the defaults are those of the released visual one.

    Attributes:
        kind: "qformer", or "none" to hand the tokens on.
        d_in: width of the tokens that come in.
        d_out: width of those that go out; also the width inside the Q-Former.
        queries, layers, heads, mlp: of the Q-Former; `mlp` is the hidden width.
        cross_every: layers 0, cross_every, 2 cross_every, ... read the tokens; must divide `layers`.
        qk_norm: LayerNorm over the head width of queries and keys.
        dropout: rate on attention weights and on every residual branch, with a key only.
        query_std: deviation of the learned queries at the start.
        from_tokens: query i starts from token i plus its learned vector, not from that vector alone, so that
            the Q-Former begins near the identity. For small models; needs d_in = d_out.
    """

    kind: Literal["qformer", "none"] = "qformer"
    d_in: int = 1024
    d_out: int = 768
    queries: int = 64
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    cross_every: int = 2
    qk_norm: bool = True
    dropout: float = 0.1
    eps: float = 1e-12
    query_std: float = 0.02
    from_tokens: bool = False

    def __post_init__(self):
        if self.kind == "qformer" and self.d_out % self.heads:
            raise ConfigError(f"d_out {self.d_out} does not divide into {self.heads} heads")
        if self.kind == "qformer" and self.layers % self.cross_every:
            raise ConfigError(f"cross_every {self.cross_every} must divide the {self.layers} layers")
        if self.from_tokens and self.d_in != self.d_out:
            raise ConfigError(f"from_tokens needs d_in = d_out, got {self.d_in} and {self.d_out}")

    def count(self, tokens: int) -> int:
        """How many tokens come out when `tokens` go in."""
        return tokens if self.kind == "none" else self.queries


class Attention(nnx.Module):
    """LN(x + W_o attention(x, source)): self-attention when `source` is x."""

    def __init__(self, config: ResamplerConfig, d_source: int, *, rngs: nnx.Rngs):
        width, self.config = config.d_out, config
        heads = {"axes": ("embed", "heads"), "init": normal(0.02), "rngs": rngs}
        self.query = Linear(width, width, **heads)
        self.key = Linear(d_source, width, **heads)
        self.value = Linear(d_source, width, **heads)
        self.out = Linear(width, width, axes=("heads", "embed"), init=normal(0.02), rngs=rngs)
        self.norm = LayerNorm(width, eps=config.eps, rngs=rngs)
        head_norm = {"eps": config.eps, "axis": None, "rngs": rngs}
        self.query_norm = LayerNorm(width // config.heads, **head_norm) if config.qk_norm else None
        self.key_norm = LayerNorm(width // config.heads, **head_norm) if config.qk_norm else None

    def __call__(
        self, x: jax.Array, source: jax.Array, mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        c = self.config
        weight_key, branch_key = (None, None) if key is None else tuple(jax.random.split(key))
        q, k, v = (
            split_heads(project(a), c.heads)
            for project, a in ((self.query, x), (self.key, source), (self.value, source))
        )
        if c.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if weight_key is None or c.dropout == 0.0:
            read = attend(q, k, v, mask)
        else:
            read = _attend_with_dropout(q, k, v, mask, c.dropout, weight_key)
        return self.norm(x + dropout(self.out(merge_heads(read)), c.dropout, branch_key))


def _attend_with_dropout(q, k, v, mask, rate, key):
    """:func:`attend` for equal head counts, with dropout on the weights."""
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, MASKED)
    weights = dropout(jax.nn.softmax(scores, axis=-1), rate, key)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


class Layer(nnx.Module):
    """Self-attention, cross-attention when `cross`, MLP; a norm after each."""

    def __init__(self, config: ResamplerConfig, *, cross: bool, rngs: nnx.Rngs):
        width, self.config = config.d_out, config
        self.attention = Attention(config, width, rngs=rngs)
        self.cross = Attention(config, config.d_in, rngs=rngs) if cross else None
        self.up = Linear(width, config.mlp, axes=("embed", "mlp"), init=normal(0.02), rngs=rngs)
        self.down = Linear(config.mlp, width, axes=("mlp", "embed"), init=normal(0.02), rngs=rngs)
        self.norm = LayerNorm(width, eps=config.eps, rngs=rngs)

    def __call__(self, x, tokens, mask, key) -> jax.Array:
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self.attention(x, x, None, keys[0])
        if self.cross is not None:
            x = self.cross(x, tokens, mask, keys[1])
        h = split_rows(self.up(x))[0]
        branch = lean(lambda h: self.down(activation("gelu")(h)))(h)
        return split_rows(self.norm(x + dropout(branch, self.config.dropout, keys[2])))[0]


class Period(nnx.Module):
    """`cross_every` layers, the first of which reads the tokens: what is repeated."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        self.layers = Modules([Layer(config, cross=i == 0, rngs=rngs) for i in range(config.cross_every)])

    def __call__(self, x, tokens, mask, key) -> jax.Array:
        for i, layer in enumerate(self.layers):
            x = layer(x, tokens, mask, None if key is None else jax.random.fold_in(key, i))
        return x


class QFormer(nnx.Module):
    """A fixed number of learned queries reads the tokens: Q = `queries`, all of them valid."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.queries = param(rngs, (c.queries, c.d_out), (None, "embed"), normal(c.query_std))
        self.norm = LayerNorm(c.d_out, eps=c.eps, rngs=rngs)
        self.periods = stack(lambda r: Period(c, rngs=r), c.layers // c.cross_every, rngs)

    @part("connector")
    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """Tokens [B, T, d_in], True in `mask` [B, T] where they count; dropout with a `key` only."""
        c = self.config
        first = None
        x = jnp.broadcast_to(self.queries[...].astype(tokens.dtype), (len(tokens), c.queries, c.d_out))
        if c.from_tokens:
            start = tokens[:, : c.queries]
            if mask is not None:
                start = jnp.where(mask[:, : c.queries, None], start, 0)
            x = x + jnp.pad(start, ((0, 0), (0, c.queries - start.shape[1]), (0, 0)))
        if key is not None:
            key, first = jax.random.split(key)
        x = dropout(self.norm(x), c.dropout, first)
        if mask is not None:
            mask = jnp.broadcast_to(mask.astype(bool)[:, None], (*x.shape[:2], tokens.shape[1]))
        keys = None if key is None else jax.random.split(key, c.layers // c.cross_every)
        x, _ = scan(self.periods, lambda period, x, k: (period(x, tokens, mask, k), None), x, keys)
        return x, None


class Bypass(nnx.Module):
    """Hands the tokens on, through one linear layer when the widths differ: Q = T."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        same = config.d_in == config.d_out
        self.project = None if same else Linear(config.d_in, config.d_out, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Tokens [B, T, d_in] and their mask -> tokens [B, T, d_out] and the same mask."""
        return (tokens if self.project is None else self.project(tokens)), mask


def build(config: ResamplerConfig, *, rngs: nnx.Rngs) -> QFormer | Bypass:
    """The resampler of `config.kind`."""
    return {"qformer": QFormer, "none": Bypass}[config.kind](config, rngs=rngs)
