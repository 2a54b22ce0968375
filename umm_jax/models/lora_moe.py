"""LoRA-MoE: a frozen linear layer beside low-rank experts whose shares a gate sets (arXiv 2312.09979).

    y = W x + (alpha / r) * sum_i g_i(x) B_i A_i x,      g(x) = softmax(x W_r)

Every expert is computed for every token: at rank 4 the experts together are a narrow layer, and sending
tokens to devices would cost more than it saves. B starts at zero, so that the layer starts as W, to the bit.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models import layers as L


@dataclass(frozen=True)
class LoRAMoEConfig:
    """Experts of one layer. Defaults are those of the LoRAMoE code's script.

    Attributes:
        alpha: the experts' sum is scaled by alpha / rank.
        dropout: of what the experts read, in training.
    """

    experts: int = 8
    rank: int = 4
    alpha: float = 32.0
    dropout: float = 0.05

    def __post_init__(self):
        if self.experts < 1 or self.rank < 1:
            raise ConfigError(f"experts and rank must be positive, got {self.experts} and {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is a share from 0 to below 1, it is {self.dropout}")


class LoRAMoE(nnx.Module):
    """Experts beside a layer D -> F: N experts of rank R.

    Attributes:
        route: [D, N], the gate. a: [D, N, R]; b: [N, R, F], which starts at zero.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        config: LoRAMoEConfig,
        *,
        axes: L.Axes = ("embed", "mlp"),
        rngs: nnx.Rngs,
    ):
        n, r, bound = config.experts, config.rank, d_in**-0.5
        self.config = config
        self.route = L.param(rngs, (d_in, n), (axes[0], None), L.uniform(bound))
        self.a = L.param(rngs, (d_in, n, r), (axes[0], None, None), L.uniform(bound))
        self.b = L.param(rngs, (n, r, d_out), (None, None, axes[1]), L.zeros)

    def __call__(
        self, x: jax.Array, base: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """What the frozen layer gave with the experts' part added, and the shares of the experts.

        Args:
            x: [..., D], what the layer read. base: [..., F], what it gave.
            key: of dropout; None is without.

        Returns:
            [..., F], and float32 [..., N].
        """
        c = self.config
        shares = jax.nn.softmax(x.astype(jnp.float32) @ self.route[...], axis=-1)
        if key is not None and c.dropout:
            kept = jax.random.bernoulli(key, 1 - c.dropout, x.shape)
            x = jnp.where(kept, x / (1 - c.dropout), 0)
        low = jnp.einsum("...d,dnr->...nr", x, self.a[...].astype(x.dtype))
        low = low * shares[..., None].astype(x.dtype)
        added = jnp.einsum("...nr,nrf->...f", low, self.b[...].astype(x.dtype))
        return base + (c.alpha / c.rank) * added, shares


def balance_loss(shares: jax.Array, kinds: jax.Array, delta: float = 0.0) -> jax.Array:
    """How unevenly the experts are used: the squared coefficient of variation of their shares.

    The first half of the experts is meant for samples of kind 1, the second for those of kind 0: with
    `delta` their shares count 1 + delta there and 1 - delta elsewhere.

    Args:
        shares: [B, N], of each sample the sum over its tokens.
        kinds: [B], 0 or 1.
    """
    first = jnp.arange(shares.shape[1]) < shares.shape[1] // 2
    meant = first[None, :] == (kinds[:, None] == 1)
    weighted = jnp.where(meant, 1 + delta, 1 - delta) * shares.astype(jnp.float32)
    return jnp.var(weighted, ddof=1) / (jnp.mean(weighted) ** 2 + 1e-10)
