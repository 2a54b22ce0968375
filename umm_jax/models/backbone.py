"""Decoder-only transformer with optional synchronizer layers: the language side of every family.

A layer, for x [B, T, D] (docs/mm_interleaved.md sections 3.1 and 4; Llama without the middle line)::

    x = x + Attention(RMSNorm(x))
    x = x + tanh(gate) * MMFS(RMSNorm(x), RMSNorm(features))       every `sync_every`-th layer, from the first
    x = x + MLP(RMSNorm(x))

Layers are stacked and scanned in groups of `sync_every`, so that compile time does not grow with depth.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models import layers as L
from umm_jax.models.attention import Mask, attend, merge_heads, require_known, split_heads
from umm_jax.models.lora_moe import LoRAMoE, LoRAMoEConfig
from umm_jax.models.synchronizer import BackboneSync, SynchronizerConfig
from umm_jax.sharding import constrain, ways


@dataclass(frozen=True)
class BackboneConfig:
    """Sizes and variants. The defaults are Vicuna/Llama-13B; the options serve small models.

    Attributes:
        kv_heads: key/value heads, `heads` when None.
        attention_scale: multiplies 1/sqrt(H) of the scores.
        qk_norm: RMSNorm with learned gain on each head's queries and keys, before the rotation.
        qkv_bias: whether the projections to queries, keys and values have a bias (Qwen2).
        gated_mlp: SwiGLU-type MLP (activation(gate) * up); otherwise activation(up).
        synchronizer: None for a plain transformer.
        experts: low-rank experts beside the layers of the MLP; None is without.
        remat: rematerialisation policy of a group of layers, see ``layers.checkpoint_policy``.
        attention: its implementation, see ``attention.attend``.
        unroll: whether layers are written out instead of looped over: for a few small layers on a CPU.
    """

    vocab: int = 32002
    width: int = 5120
    layers: int = 40
    heads: int = 40
    kv_heads: int | None = None
    mlp: int = 13824
    norm_eps: float = 1e-6
    rope_base: float = 10000.0
    attention_scale: float = 1.0
    qk_norm: bool = False
    qkv_bias: bool = False
    gated_mlp: bool = True
    activation: str = "silu"
    embed_std: float = 0.02
    sync_every: int = 4
    synchronizer: SynchronizerConfig | None = None
    experts: LoRAMoEConfig | None = None
    remat: str = "none"
    attention: str = "auto"
    unroll: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} does not divide into {self.heads} heads")
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"{self.heads} heads do not divide into {self.kv_heads} key/value heads")
        require_known(self.attention)
        if self.sync_every < 1:
            raise ConfigError(f"sync_every must be at least 1, it is {self.sync_every}")

    @property
    def group(self) -> int:
        """Layers per scanned step."""
        return self.sync_every if self.synchronizer is not None else 1

    @property
    def syncs(self) -> int:
        """Synchronizer layers: one at the beginning of each group, the last of which may be a short one."""
        return -(-self.layers // self.sync_every) if self.synchronizer is not None else 0


class Cache(NamedTuple):
    """Keys and values of what has been read: [L, B, S, K, H] each, valid below each row's length."""

    k: jax.Array
    v: jax.Array

    def written(self, k: jax.Array, v: jax.Array, columns: jax.Array) -> "Cache":
        """One layer's cache [B, S, K, H] with k, v [B, T, K, H] at `columns` [B, T]; none where outside."""
        rows = jnp.arange(k.shape[0])[:, None]
        return Cache(
            self.k.at[rows, columns].set(k.astype(self.k.dtype), mode="drop"),
            self.v.at[rows, columns].set(v.astype(self.v.dtype), mode="drop"),
        )


def empty_cache(config: BackboneConfig, batch: int, length: int, dtype=jnp.float32) -> Cache:
    """Zeros for all layers and `batch` rows of at most `length` tokens."""
    kv = config.kv_heads or config.heads
    shape = (config.layers, batch, length, kv, config.width // config.heads)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary embedding in the half-rotation layout: [B, T, N, H], positions [B, T]; angles in float32."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Causal (by the mask given) multi-head attention with rotary positions and an optional cache."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs):
        d, kv = config.width, config.kv_heads or config.heads
        h = d // config.heads
        # Output projections shrink with depth, so that the residual stream keeps its scale at the start.
        init, out = L.normal(d**-0.5), L.normal(d**-0.5 / (2 * config.layers) ** 0.5)
        into = {"axes": ("embed", "heads"), "bias": config.qkv_bias, "init": init, "rngs": rngs}
        self.q = L.Linear(d, d, **into)
        self.k = L.Linear(d, kv * h, **into)
        self.v = L.Linear(d, kv * h, **into)
        self.o = L.Linear(d, d, axes=("heads", "embed"), bias=False, init=out, rngs=rngs)
        self.q_norm = L.RMSNorm(h, eps=config.norm_eps, axis=None, rngs=rngs) if config.qk_norm else None
        self.k_norm = L.RMSNorm(h, eps=config.norm_eps, axis=None, rngs=rngs) if config.qk_norm else None
        self.heads, self.kv_heads, self.base = config.heads, kv, config.rope_base
        self.scale, self.implementation = config.attention_scale * h**-0.5, config.attention

    def __call__(self, x, positions, mask, cache: Cache | None = None, write: jax.Array | None = None):
        """x [B, T, D], positions [B, T], a mask as ``attend`` takes it -> ([B, T, D], cache of this layer).

        With a cache (this layer's [B, S, K, H] pair), new keys go to columns `write` [B, T] first.
        """
        q, k, v = self.project(x, positions)
        if cache is not None:
            cache = cache.written(k, v, write)
            k, v = cache
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        out = attend(q, k, v, mask, scale=self.scale, implementation=self.implementation)
        return self.o(merge_heads(out)), cache

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], normalised and rotated as they are read."""
        q, k, v = split_heads(self.q(x), self.heads), self.k(x), self.v(x)
        k, v = split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, positions, self.base), rope(k, positions, self.base)
        q = constrain(q, "batch", "sequence", "heads", None)
        if ways("sequence") > 1:
            # What all tokens of a row read is gathered here, once.
            k, v = (constrain(x, "batch", None, "heads", None) for x in (k, v))
        return q, k, v


class MLP(nnx.Module):
    """act(x W_gate) * (x W_up) W_down, or act(x W_up) W_down; beside each product its experts, if any."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs):
        d, f = config.width, config.mlp
        axes = ("embed", "mlp")
        init, out = L.normal(d**-0.5), L.normal(f**-0.5 / (2 * config.layers) ** 0.5)
        gated = config.gated_mlp
        self.gate = L.Linear(d, f, axes=axes, bias=False, init=init, rngs=rngs) if gated else None
        self.up = L.Linear(d, f, axes=axes, bias=False, init=init, rngs=rngs)
        self.down = L.Linear(f, d, axes=axes[::-1], bias=False, init=out, rngs=rngs)
        self.activation = config.activation
        self.experts = None if config.experts is None else Experts(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D], without experts."""
        act = L.activation(self.activation)

        @L.lean
        def out(up, gate=None):
            h = act(up) if gate is None else act(gate) * up
            return self.down(constrain(h, "batch", "sequence", "mlp"))

        return out(self.up(x)) if self.gate is None else out(self.up(x), self.gate(x))

    def routed(self, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """With the experts there are, and their shares for each layer of the MLP: [M, B, T, N], or None.

        With a `key`, their dropout acts.
        """
        if self.experts is None:
            return self(x), None
        e, act, keys = self.experts, L.activation(self.activation), [None] * 3
        if key is not None:
            keys = list(jax.random.split(key, 3))
        h, *shares = e.up(x, self.up(x), keys[0])
        if self.gate is None:
            h = act(h)
        else:
            gate, share = e.gate(x, self.gate(x), keys[1])
            h, shares = act(gate) * h, [*shares, share]
        h = constrain(h, "batch", "sequence", "mlp")
        y, share = e.down(h, self.down(h), keys[2])
        return y, jnp.stack([*shares, share])


class Experts(nnx.Module):
    """The experts of one MLP."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs):
        d, f, c = config.width, config.mlp, config.experts
        into = {"axes": ("embed", "mlp"), "rngs": rngs}
        self.gate = LoRAMoE(d, f, c, **into) if config.gated_mlp else None
        self.up = LoRAMoE(d, f, c, **into)
        self.down = LoRAMoE(f, d, c, axes=("mlp", "embed"), rngs=rngs)


class Layer(nnx.Module):
    """One transformer layer; the synchronizer, where there is one, is given by the caller."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs):
        self.attention_norm = L.RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)
        self.attention = SelfAttention(config, rngs)
        self.mlp_norm = L.RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x, positions, mask, cache, write, sync=None, key=None):
        """x, the cache of this layer, and the shares of its experts, see :meth:`MLP.routed`."""
        attended, cache = self.attention(self.attention_norm(x), positions, mask, cache, write)
        x = x + attended
        if sync is not None:
            x = sync(x)
        added, shares = self.mlp.routed(self.mlp_norm(x), key)
        return constrain(x + added, "batch", "sequence", None), cache, shares


class Run(NamedTuple):
    """What a backbone gives.

    Attributes:
        hidden: states after the final norm [B, T, D].
        cache: extended, or None.
        shares: of the experts, of each layer and of each of the M layers of its MLP, float32
            [L, M, B, T, N]; None where there are no experts.
    """

    hidden: jax.Array
    cache: Cache | None
    shares: jax.Array | None


class Backbone(nnx.Module):
    """Embeddings in, normalised hidden states out: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs):
        self.config = config
        self.layers = L.stack(lambda r: Layer(config, r), config.layers, rngs)
        syncs = None
        if config.synchronizer is not None:
            make = lambda r: BackboneSync(config.synchronizer, eps=config.norm_eps, rngs=r)  # noqa: E731
            syncs = L.stack(make, config.syncs, rngs)
        self.syncs = syncs
        self.norm = L.RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, mask: Mask, **more):
        """Hidden states and cache of :meth:`run`."""
        return self.run(x, positions, mask, **more)[:2]

    @L.part("backbone")
    def run(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: Mask,
        *,
        features: tuple[jax.Array, ...] = (),
        values: jax.Array | None = None,
        visible: jax.Array | None = None,
        cache: Cache | None = None,
        write: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Run:
        """Runs all layers.

        Args:
            x: [B, T, D]; positions: [B, T], counted within each conversation.
            mask: [B, T, S], True where a token may read a key; S is T, or the cache's length. Or what is to
                be known of queries and keys, see ``masks``.
            features: multi-scale maps of the row's images, [B, I, h, w, C] a level.
            values: what :meth:`project` made of them, in place of `features`.
            visible: [B, T, I], True where a token may look into an image.
            cache, write: what has been read before, and the columns [B, T] the new tokens take in it
                (columns outside the cache are not written).
            key: of the experts' dropout; None is without.
        """
        config = self.config
        sync_graph, sync_state = (None, None) if self.syncs is None else nnx.split(self.syncs)

        def step(layers, x, inputs):
            sync_params, layer_values, caches, keys = inputs
            layers, new, shares = (layers if isinstance(layers, list) else [layers]), [], []
            for i, layer in enumerate(layers):
                sync = None
                if i == 0 and sync_params is not None:
                    module = nnx.merge(sync_graph, sync_params)
                    read = module.project(features) if layer_values is None else layer_values
                    sync = lambda y, module=module, read=read: module(y, read, visible)  # noqa: E731
                layer_cache = None if caches is None else jax.tree.map(lambda a, i=i: a[i], caches)
                layer_key = None if keys is None else keys[i]
                x, layer_cache, share = layer(x, positions, mask, layer_cache, write, sync, layer_key)
                new.append(layer_cache)
                shares.append(share)
            return x, jax.tree.map(lambda *a: jnp.stack(a), *zip(new, shares))

        keys = None if key is None or config.experts is None else jax.random.split(key, config.layers)
        grown = []
        for layers, group, first, end in self._runs():
            start, count = first * config.group, end - first

            def grouped(a, start=start, count=count, group=group):
                return a[start : start + count * group].reshape(count, group, *a.shape[1:])

            caches, layer_keys = jax.tree.map(grouped, (cache, keys))
            syncs = jax.tree.map(lambda a, first=first, end=end: a[first:end], (sync_state, values))
            inputs = (*syncs, caches, layer_keys)
            x, found = L.scan(layers, step, x, inputs, remat=config.remat, group=group, unroll=config.unroll)
            grown.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found))
        cache, shares = grown[0] if len(grown) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *grown)
        return Run(self.norm(x), cache, shares)

    def _runs(self):
        """(stacked layers, layers of a group, first group, end group): the whole groups, then a short one."""
        config = self.config
        whole, rest = divmod(config.layers, config.group)
        if not rest:
            return [(self.layers, config.group, 0, whole)]
        graphdef, state = nnx.split(self.layers)
        part = lambda a, b: nnx.merge(graphdef, jax.tree.map(lambda x: x[a:b], state))  # noqa: E731
        at = whole * config.group
        runs = [(part(0, at), config.group, 0, whole)] if whole else []
        return [*runs, (part(at, config.layers), rest, whole, whole + 1)]

    def project(self, features: tuple[jax.Array, ...]) -> jax.Array | None:
        """What the synchronizer layers sample, [G, B, I, V, heads, H]: made once per image when decoding."""
        if self.syncs is None:
            return None
        return L.scan(self.syncs, lambda sync, _, __: (None, sync.project(features)), None)[1]

    def empty_cache(self, batch: int, length: int, dtype=jnp.float32) -> Cache:
        """Zeros for `batch` rows of at most `length` tokens."""
        return empty_cache(self.config, batch, length, dtype)


class Head(nnx.Module):
    """Hidden states to logits, [.., D] -> [.., V], with a separate trainable head for added tokens.

    MM-Interleaved keeps the language model's head frozen (its rows for the `new` added tokens are silent:
    weight 0, bias -100) and adds a small head on top of them (weight 0, bias +95): docs section 4.
    ``new=0`` is an ordinary head, with or without a `bias`.
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        new: int = 0,
        std: float = 0.02,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        d, v = config.width, config.vocab

        def weights(key, shape, dtype=jnp.float32):
            kernel = L.normal(std)(key, shape, dtype)
            return kernel.at[:, v - new :].set(0.0) if new else kernel

        def biases(key, shape, dtype=jnp.float32):
            bias = jnp.zeros(shape, dtype)
            return bias.at[v - new :].set(-100.0) if new else bias

        self.base = L.Linear(
            d, v, axes=("embed", "vocab"), bias=bias, init=weights, bias_init=biases, rngs=rngs
        )
        added = None
        if new:
            added = L.Linear(
                d, new, axes=("embed", None), init=L.zeros, bias_init=L.constant(95.0), rngs=rngs
            )
        self.added, self.new = added, new

    def __call__(self, x: jax.Array) -> jax.Array:
        logits = self.base(x).astype(jnp.float32)
        if self.added is None:
            return logits
        return logits.at[..., -self.new :].add(self.added(x).astype(jnp.float32))
