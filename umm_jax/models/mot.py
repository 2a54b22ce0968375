"""Mixture of transformers: every layer twice, for what is read and for what is drawn, with one attention.

A token is of one of two groups by its kind alone: text, brackets and vision tokens are *understanding*,
latent tokens *generation*. Each group has its own norms, projections and MLP; attention joins them (BAGEL,
arXiv 2505.14683; docs/chatumm.md section 2). For groups g with tokens x_g [B, T_g, D], a layer is::

    q_g, k_g, v_g = project_g(norm_g(x_g))                 rotary positions, norms of heads
    a             = attention(all q, all k, all v, mask)
    x_g           = x_g + out_g(a_g)
    x_g           = x_g + MLP_g(norm_g(x_g))

The groups are kept apart from end to end, so that no token is multiplied with weights it does not use and
shapes stay fixed: each group has its own budget in a row. Where a token stands in the stream is said by its
position and by the mask, not by where it lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models import layers as L
from umm_jax.models.attention import Mask, attend, merge_heads
from umm_jax.models.backbone import BackboneConfig, Cache, Layer
from umm_jax.sharding import constrain

Groups = tuple[jax.Array, jax.Array]  # understanding, generation


@dataclass(frozen=True)
class MixtureConfig(BackboneConfig):
    """Sizes; the defaults are BAGEL-7B-MoT's, of Qwen2.5-7B. For the fields see :class:`BackboneConfig`.

    Attributes:
        freeze_understanding: cut every gradient through understanding tokens, see :class:`MixtureLayer`.
    """

    vocab: int = 152064
    width: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int | None = 4
    mlp: int = 18944
    rope_base: float = 1e6
    qk_norm: bool = True
    qkv_bias: bool = True
    freeze_understanding: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.experts is not None or self.synchronizer is not None:
            raise ConfigError("mixture: a mixture of transformers has no experts and no synchronizer")


class MixtureLayer(nnx.Module):
    """Two transformer layers that share one attention.

    With `freeze_understanding`, what understanding tokens contribute (queries, keys, values, attention
    output, MLP output) is a constant: nothing is learned through them, about them, or about what they were
    made of.
    """

    def __init__(self, config: MixtureConfig, rngs: nnx.Rngs):
        self.understanding = Layer(config, rngs)
        self.generation = Layer(config, rngs)
        self.frozen, self.implementation = config.freeze_understanding, config.attention

    def __call__(
        self,
        xs: Groups,
        positions: Groups,
        mask: Mask,
        cache: Cache | None = None,
        write: jax.Array | None = None,
    ) -> tuple[Groups, Cache | None]:
        """xs [B, T_g, D] and positions [B, T_g] by group -> xs, and this layer's cache.

        Args:
            mask: as :func:`attend` takes it, over the tokens of both groups, understanding first.
            cache, write: this layer's pair [B, S, K, H], and the columns [B, T] new keys go to.
        """
        layers, hold = (self.understanding, self.generation), (self._held, lambda x: x)
        present = [g for g in range(2) if xs[g].shape[1]]
        projected = [
            [hold[g](y) for y in layers[g].attention.project(layers[g].attention_norm(xs[g]), positions[g])]
            for g in present
        ]
        q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*projected))
        if cache is not None:
            cache = cache.written(k, v, write)
            k, v = cache
        attended = attend(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            mask,
            scale=layers[0].attention.scale,
            implementation=self.implementation,
        )
        attended = merge_heads(attended)
        result, start = list(xs), 0
        for g in present:
            x, count = xs[g], xs[g].shape[1]
            x = x + hold[g](layers[g].attention.o(attended[:, start : start + count]))
            x = x + hold[g](layers[g].mlp(layers[g].mlp_norm(x)))
            result[g] = constrain(x, "batch", "sequence", None)
            start += count
        return tuple(result), cache

    def _held(self, x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(x) if self.frozen else x


class MixtureOfTransformers(nnx.Module):
    """Embeddings of both groups in, hidden states after each group's last norm out."""

    def __init__(self, config: MixtureConfig, rngs: nnx.Rngs):
        self.config = config
        self.layers = L.stack(lambda r: MixtureLayer(config, r), config.layers, rngs)
        self.understanding_norm = L.RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)
        self.generation_norm = L.RMSNorm(config.width, eps=config.norm_eps, rngs=rngs)

    @L.part("backbone")
    def __call__(
        self,
        xs: Groups,
        positions: Groups,
        mask: Mask,
        *,
        cache: Cache | None = None,
        write: jax.Array | None = None,
    ) -> tuple[Groups, Cache | None]:
        """Runs all layers.

        Args:
            xs: [B, T_g, D] by group; a group may have no tokens. positions: [B, T_g].
            mask: bool [B, T, S], or the (queries, keys) of a mask, over T tokens: understanding, then
                generation. S is T, or the cache's length.
            cache: of all layers; write: columns [B, T] the tokens take in it (outside it: none).

        Returns:
            hidden states [B, T_g, D] by group, and the extended cache.
        """
        frozen = self.config.freeze_understanding
        if frozen:
            xs = (jax.lax.stop_gradient(xs[0]), xs[1])

        def step(layer, xs, layer_cache):
            return layer(xs, positions, mask, layer_cache, write)

        xs, cache = L.scan(
            self.layers, step, tuple(xs), cache, remat=self.config.remat, unroll=self.config.unroll
        )
        understanding = self.understanding_norm(xs[0])
        if frozen:
            understanding = jax.lax.stop_gradient(understanding)
        return (understanding, self.generation_norm(xs[1])), cache


def begun_from(params: Sequence[str]) -> dict[str, str]:
    """{path of the generation group: path it begins as a copy of}, among the parameter paths `params`.

    The published start of a mixture from a language model: both groups have its weights.
    """
    pairs = {path: path.replace("generation", "understanding") for path in params if "generation" in path}
    return {path: origin for path, origin in pairs.items() if origin in set(params)}
