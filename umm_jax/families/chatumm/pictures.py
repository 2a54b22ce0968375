"""Pictures as the family reads them: fitted to a size the model knows, on a canvas, as patches. numpy only.

A picture is first fitted for the autoencoder; the vision encoder sees that, fitted again for itself
(docs/chatumm.md section 6).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image as Pillow

from umm_jax.errors import ConfigError


@dataclass(frozen=True)
class FitConfig:
    """To which sizes pictures are brought.

    Attributes:
        longest, shortest: bounds of the sides in pixels; the first wins where both cannot be kept.
        stride: sides become multiples of it.
        pixels: most pixels of all pictures of a conversation together.
    """

    longest: int = 1024
    shortest: int = 512
    stride: int = 16
    pixels: int = 14 * 14 * 9 * 1024

    def __post_init__(self):
        if self.stride < 1 or self.longest % self.stride or self.longest < self.shortest:
            raise ConfigError(
                f"pictures of sides {self.shortest} to {self.longest}: the longest must be a multiple of the "
                f"stride {self.stride} and not below the shortest"
            )

    def smaller(self, share: float) -> "FitConfig":
        """Sides and pixels for that share of the area."""
        steps = max(1, int(self.longest * share**0.5) // self.stride)
        return FitConfig(
            steps * self.stride,
            min(max(1, int(self.shortest * share**0.5)), steps * self.stride),
            self.stride,
            max(1, int(self.pixels * share)),
        )

    @property
    def most_cells(self) -> int:
        """Multiples of the stride along the longest side."""
        return self.longest // self.stride


def fitted_size(width: int, height: int, config: FitConfig, pictures: int = 1) -> tuple[int, int]:
    """(width, height) a picture of that size is brought to, where it is one of so many (spec 2.10).

    The area is brought under its bound by the ratio of areas, not its root, as in the reference.
    """
    c = config

    def scaled(w: int, h: int, scale: float) -> tuple[int, int]:
        sides = (round(w * scale), round(h * scale))
        return tuple(max(c.stride, round(side / c.stride) * c.stride) for side in sides)

    scale = max(min(c.longest / max(width, height), 1.0), c.shortest / min(width, height))
    w, h = scaled(width, height, scale)
    if w * h > c.pixels / pictures:
        w, h = scaled(w, h, c.pixels / pictures / (w * h))
    if max(w, h) > c.longest:
        w, h = scaled(w, h, c.longest / max(w, h))
    return w, h


def fitted(pixels: np.ndarray, config: FitConfig, pictures: int = 1) -> np.ndarray:
    """uint8 [h, w, 3] brought to its :func:`fitted_size`, bicubic with antialiasing."""
    size = fitted_size(pixels.shape[1], pixels.shape[0], config, pictures)
    if size == (pixels.shape[1], pixels.shape[0]):
        return pixels
    return np.asarray(Pillow.fromarray(pixels).resize(size, Pillow.Resampling.BICUBIC))


def on_canvas(pixels: np.ndarray, side: int, fill: int = 0) -> np.ndarray:
    """uint8 [h, w, 3] in the upper left corner of [side, side, 3]."""
    canvas = np.full((side, side, 3), fill, np.uint8)
    canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
    return canvas


def patches(pixels: np.ndarray, side: int) -> np.ndarray:
    """[h, w, 3] -> its square patches [h / side * w / side, side * side * 3], row by row.

    The numbers of a patch go by row, column, channel.
    """
    h, w, c = pixels.shape
    if h % side or w % side:
        raise ValueError(f"patches of {side} px do not tile an image of {h} x {w}")
    tiles = pixels.reshape(h // side, side, w // side, side, c)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(-1, side * side * c)


def places(rows: int, columns: int, grid: int, rule: Literal["corner", "spread"] = "corner") -> np.ndarray:
    """Which entries of a `grid` x `grid` table the cells of a picture take: int32 [rows * columns].

    ``corner`` counts from the table's upper left corner; ``spread`` lays the picture over the whole table.

    Raises:
        ValueError: more cells than the table has along a side.
    """
    if rule == "spread":
        edges = np.arange(1 / grid, 1.0, 1 / grid, dtype=np.float64).astype(np.float32)
        row, column = (
            np.searchsorted(edges, np.arange(0, 1 - 1e-6, 1 / n).astype(np.float32), side="right")
            for n in (rows, columns)
        )
    else:
        if max(rows, columns) > grid:
            raise ValueError(f"{rows} x {columns} cells, the table of positions has {grid} along a side")
        row, column = np.arange(rows), np.arange(columns)
    return (row[:, None] * grid + column).reshape(-1).astype(np.int32)
