"""The feature synchronizer of the image decoder: one block per skip and one for the mid map.

Between the mid block and the way up, every kept feature looks into the maps of earlier images (of the one
before, or of all that are visible): ``x <- x + conv(MMFS(LN(x) + position, LN(maps)))``. Source:
docs/mm_interleaved.md 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from flax import nnx

from umm_jax.models.layers import Modules, checkpoint_policy, remade
from umm_jax.models.synchronizer import DecoderSync, SynchronizerConfig


@dataclass(frozen=True)
class UNetSyncConfig:
    """Sizes shared by all places; the defaults are the release's.

    Attributes:
        d_maps, d_values, heads, points, max_images, offset_init, implementation: see SynchronizerConfig.
        sides: side of each map of the vision tower, fine to coarse.
        units: sides that scale the offsets, `sides` when None.
        position_grid: side of the fixed position table.
        out_init: see DecoderSync; 0 starts without any injection.
        remat: rematerialisation policy of each place, see ``layers.checkpoint_policy``.
    """

    d_maps: int = 1024
    d_values: int = 1024
    heads: int = 16
    points: int = 8
    sides: tuple[int, ...] = (64, 32, 16, 8)
    units: tuple[int, ...] | None = None
    max_images: int = 10
    offset_init: float = 1.0
    position_grid: int = 64
    out_init: float = 0.0
    implementation: str = "auto"
    remat: str = "none"


class UNetSync(nnx.Module):
    """Looks back from every skip and from the mid map.

    Args:
        skips, mid: (side, width) of each, see ``UNetConfig.skip_shapes`` and ``mid_shape``. The side is the
            base of the offsets: an offset of 1 is one pixel of that map.
    """

    def __init__(
        self,
        config: UNetSyncConfig,
        skips: Sequence[tuple[int, int]],
        mid: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        self.config = c = config

        def make(side: int, width: int) -> DecoderSync:
            core = SynchronizerConfig(
                d_query=width,
                d_maps=c.d_maps,
                d_values=c.d_values,
                d_out=width,
                heads=c.heads,
                points=c.points,
                sides=c.sides,
                units=c.units,
                base=float(side),
                max_images=c.max_images,
                offset_init=c.offset_init,
                implementation=c.implementation,
            )
            return DecoderSync(core, position_grid=c.position_grid, out_init=c.out_init, rngs=rngs)

        self.down = Modules([make(*shape) for shape in skips])
        self.mid = make(*mid)

    def project(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Maps, [B, N, h, w, C] a level, to what each place samples; the same at every sampling step."""
        return [sync.project(maps) for sync in (*self.down, self.mid)]

    def __call__(
        self, skips: Sequence[jax.Array], mid: jax.Array, values: Sequence[jax.Array], visible: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        """Skips [B, h, w, C], mid map, values from :meth:`project`, visible bool [B, N] -> skips and mid."""
        places = zip((*self.down, self.mid), (*skips, mid), values, strict=True)
        if self.config.remat == "none":
            *synced, middle = [sync(x, v, visible) for sync, x, v in places]
            return synced, middle
        policy, synced = checkpoint_policy(self.config.remat), []
        for sync, x, v in places:
            if synced:
                # One after another, there and back: else what all of them sample with may be alive at once.
                x, synced[-1] = jax.lax.optimization_barrier((x, synced[-1]))
            synced.append(remade(lambda *a, sync=sync: sync(*a), policy=policy)(x, v, visible))
        return synced[:-1], synced[-1]
