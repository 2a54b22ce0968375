"""Reading pictures back into scenes, exactly, and comparing scenes. No weights: nearest rendered template.

For every cell and every background, the nearest among all contents, each rendered sharp and blurred to
several widths; the background is chosen for all cells together. Without the blurred templates a slightly
soft but right picture would be misread. A picture is valid when its worst cell
lies within the gate of its template: a half-transparent object must not count as an empty cell.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from umm_jax.conversation import ImageData
from umm_jax.errors import DataError
from umm_jax.world.render import Renderer
from umm_jax.world.scene import BACKGROUNDS, Scene, WorldConfig

CHUNK = 64  # images compared at a time: bounds the memory of the distance table


class Parsed(NamedTuple):
    """A picture as read.

    Attributes:
        scene: the nearest scene, also when the picture is not valid.
        valid: whether every cell lies within the gate of its template.
        residual: root mean square difference of the worst cell, in [0, 1].
        cell_residual: the same for each cell.
        margin: by how much the second nearest content is farther in the least certain cell.
    """

    scene: Scene
    valid: bool
    residual: float
    cell_residual: tuple[float, ...]
    margin: float


def blur(image: np.ndarray, sigma: float, edge: np.ndarray | None = None) -> np.ndarray:
    """Gaussian blur of float[h, w, c]; outside lies `edge` (a colour), or the nearest pixel."""
    if sigma <= 0:
        return image
    radius = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        wide = np.pad(image, pad, mode="edge")
        if edge is not None:
            index = [slice(None)] * 3
            for side in (slice(None, radius), slice(-radius, None)):
                index[axis] = side
                wide[tuple(index)] = edge
        length = image.shape[axis]
        image = sum(t * np.take(wide, range(k, k + length), axis) for k, t in enumerate(taps))
    return image


class Judge:
    """Reads pictures of one world."""

    def __init__(self, config: WorldConfig):
        self.config = config
        self.contents = [None, *config.objects]
        patches = Renderer(config).patches
        bank = [
            blur(patches[background, thing] / 255.0, sigma, np.array(BACKGROUNDS[background]) / 255.0)
            for background in config.backgrounds
            for thing in self.contents
            for sigma in config.blurs
        ]
        self._bank = np.stack(bank).reshape(len(bank), -1).astype(np.float32)
        self._norm = (self._bank**2).sum(-1)

    def parse(self, images: np.ndarray) -> list[Parsed]:
        """Reads uint8[n, px, px, 3].

        Raises:
            DataError: another shape or dtype; pictures are never resized here.
        """
        px = self.config.px
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != (px, px, 3) or images.dtype != np.uint8:
            raise DataError(
                f"the judge reads uint8[n, {px}, {px}, 3], got {images.dtype}{list(images.shape)}; "
                "use the world preset the pictures were made for"
            )
        chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
        return [parsed for chunk in chunks for parsed in self._parse(chunk)]

    def _parse(self, images: np.ndarray) -> list[Parsed]:
        config, n = self.config, len(images)
        grid, side = config.grid, config.cell_px
        cells = images.astype(np.float32).reshape(n, grid, side, grid, side, 3) / 255
        cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(n * grid * grid, -1)
        # |x - t|^2 = |x|^2 - 2 x.t + |t|^2, and one matrix product for all pairs.
        squares = (cells**2).sum(-1, keepdims=True) - 2 * cells @ self._bank.T + self._norm
        shape = (n, config.cells, len(config.backgrounds), len(self.contents), len(config.blurs))
        by_content = np.maximum(squares, 0).reshape(shape).min(-1) / cells.shape[-1]
        nearest = np.partition(by_content, 1, axis=-1)[..., :2]
        background = nearest[..., 0].sum(1).argmin(-1)  # [n]
        chosen = np.take_along_axis(by_content, background[:, None, None, None], 2)[:, :, 0]
        two = np.sqrt(np.take_along_axis(nearest, background[:, None, None, None], 2)[:, :, 0])
        contents, residual = chosen.argmin(-1), two[..., 0]
        return [
            Parsed(
                Scene(config.backgrounds[background[i]], tuple(self.contents[k] for k in contents[i])),
                bool(residual[i].max() <= config.gate),
                float(residual[i].max()),
                tuple(residual[i].tolist()),
                float((two[i, :, 1] - two[i, :, 0]).min()),
            )
            for i in range(n)
        ]

    def read(self, image: ImageData) -> Parsed | None:
        """One encoded picture; None when it has another size than this world's pictures."""
        array = image.array()
        return self.parse(array[None])[0] if array.shape[:2] == (self.config.px, self.config.px) else None


# --- comparing ------------------------------------------------------------------------------------


def scene_exact(parsed: Parsed | None, target: Scene) -> bool:
    """Whether the picture is valid and shows exactly this scene."""
    return parsed is not None and parsed.valid and parsed.scene == target


def scene_f1(parsed: Parsed | None, target: Scene) -> float:
    """F1 of (cell, object) pairs, all attributes right; 0 for an invalid picture, 1 when both are empty."""
    if parsed is None or not parsed.valid:
        return 0.0
    found, wanted = parsed.scene.cells, target.cells
    hits = sum(a is not None and a == b for a, b in zip(found, wanted, strict=True))
    total = len(parsed.scene.occupied) + len(target.occupied)
    return 2 * hits / total if total else 1.0


def edit_scores(parsed: Parsed | None, before: Scene, target: Scene) -> dict[str, float]:
    """What became of an edit.

    Returns:
        exact: the whole scene is right. success: what had to change did. preservation: everything else,
        the background included unless it had to change, is as before. no_op: the picture is valid and
        shows the scene before the edit. All are 0 for an invalid picture.
    """
    if parsed is None or not parsed.valid:
        return {"exact": 0.0, "success": 0.0, "preservation": 0.0, "no_op": 0.0}
    changed = before.differing(target)
    found, recoloured = parsed.scene, before.background != target.background
    ground = found.background == target.background
    right = [a == b for a, b in zip(found.cells, target.cells, strict=True)]
    success = all(right[c] for c in changed) and (ground or not recoloured)
    kept = all(right[c] for c in range(len(right)) if c not in changed) and (ground or recoloured)
    return {
        "exact": float(found == target),
        "success": float(success),
        "preservation": float(kept),
        "no_op": float(found == before),
    }


def attributes_right(parsed: Parsed | None, target: Scene) -> dict[str, float]:
    """Share of the target's objects whose cell holds something (presence), of the right colour, shape, ..."""
    names = ("colour", "shape", "size", "texture")
    cells: Sequence[int] = target.occupied
    if parsed is None or not parsed.valid or not cells:
        return dict.fromkeys(("presence", *names), 0.0)
    found = [parsed.scene.cells[c] for c in cells]
    scores = {"presence": sum(o is not None for o in found) / len(cells)}
    for name in names:
        wanted = [getattr(target.cells[c], name) for c in cells]
        hits = [o is not None and getattr(o, name) == w for o, w in zip(found, wanted, strict=True)]
        scores[name] = sum(hits) / len(cells)
    return scores
