"""Drawing scenes: anti-aliased sprites, made once by supersampling, laid into cells."""

import numpy as np

from umm_jax.world.scene import BACKGROUNDS, COLOURS, Object, Scene, WorldConfig

SUPERSAMPLING = 8
STRIPES = 0.45  # brightness of the dark stripes of a striped object


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points of [-1, 1]^2 (v downwards) belong to the shape. Every shape touches all four sides."""
    if shape == "circle":
        return u**2 + v**2 < 1
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 1
    if shape == "triangle":
        return (abs(u) < (v + 1) / 2) & (v < 1)
    if shape == "cross":
        return (np.maximum(abs(u), abs(v)) < 1) & (np.minimum(abs(u), abs(v)) < 1 / 3)
    if shape == "diamond":
        return abs(u) + abs(v) < 1
    if shape == "ring":
        return (u**2 + v**2 < 1) & (u**2 + v**2 > 0.25)
    raise ValueError(f"no such shape: {shape}")


class Renderer:
    """Draws scenes of one world; also knows where in the image an object lies."""

    def __init__(self, config: WorldConfig):
        self.config = config
        side = config.cell_px
        # The margin keeps neighbours apart, also when a soft image smears them by a pixel.
        width = side - 2 * max(1, side // 8)
        widths = {"large": width, "small": 2 * round(0.3 * width)}
        self._margin = {size: (side - widths[size]) // 2 for size in config.sizes}
        points = (np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - side / 2
        self._alpha = {}
        for shape in config.shapes:
            for size in config.sizes:
                u, v = points[None] / (widths[size] / 2), points[:, None] / (widths[size] / 2)
                fine = _inside(shape, u, v).reshape(side, SUPERSAMPLING, side, SUPERSAMPLING)
                self._alpha[shape, size] = fine.mean((1, 3))
        stripes = np.where(np.arange(side) // 2 % 2, STRIPES, 1.0)[:, None, None]
        self._texture = {"plain": np.ones((side, 1, 1)), "striped": stripes}
        self.patches = {
            (background, thing): self._patch(background, thing)
            for background in config.backgrounds
            for thing in (None, *config.objects)
        }

    def _patch(self, background: str, thing: Object | None) -> np.ndarray:
        side = self.config.cell_px
        ground = np.broadcast_to(np.array(BACKGROUNDS[background], float), (side, side, 3))
        if thing is not None:
            alpha = self._alpha[thing.shape, thing.size][..., None]
            colour = np.array(COLOURS[thing.colour], float) * self._texture[thing.texture]
            ground = (1 - alpha) * ground + alpha * colour
        return np.round(ground).astype(np.uint8)

    def render(self, scene: Scene) -> np.ndarray:
        """uint8[px, px, 3]."""
        grid, side = self.config.grid, self.config.cell_px
        image = np.empty((grid, side, grid, side, 3), np.uint8)
        for cell, thing in enumerate(scene.cells):
            image[cell // grid, :, cell % grid] = self.patches[scene.background, thing]
        return image.reshape(grid * side, grid * side, 3)

    def mask(self, scene: Scene, cell: int) -> np.ndarray:
        """bool[px, px]: the pixels at least half covered by the object in `cell`."""
        thing = scene.cells[cell]
        if thing is None:
            raise ValueError(f"cell {cell} is empty")
        grid, side = self.config.grid, self.config.cell_px
        mask = np.zeros((grid, side, grid, side), bool)
        mask[cell // grid, :, cell % grid] = self._alpha[thing.shape, thing.size] >= 0.5
        return mask.reshape(grid * side, grid * side)

    def box(self, scene: Scene, cell: int) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) in pixels of the object in `cell`; x1 and y1 lie just behind its last pixel."""
        thing = scene.cells[cell]
        if thing is None:
            raise ValueError(f"cell {cell} is empty")
        side, margin = self.config.cell_px, self._margin[thing.size]
        y, x = cell // self.config.grid * side, cell % self.config.grid * side
        return x + margin, y + margin, x + side - margin, y + side - margin
