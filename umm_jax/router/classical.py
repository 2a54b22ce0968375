"""Experts without a model: what can be done to pixels by rule. They stand in where no weights are."""

import re

import numpy as np
import PIL.Image
import PIL.ImageFilter

from umm_jax.router.experts import ExpertError, Medium, Request, Result, Spec

COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (250, 215, 20),
    "purple": (150, 40, 190),
    "cyan": (30, 205, 220),
    "orange": (250, 130, 10),
    "pink": (250, 140, 190),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "grey": (128, 128, 128),
    "brown": (110, 70, 40),
}


class Edit:
    """Edits of a closed vocabulary: a colour for what stands out, lighter, darker, gray, blurred, removed.

    Where the call has boxes, nothing outside them changes.
    """

    spec = Spec("classical.edit", "1", frozenset({"image_edit"}), degraded=True, priority=-10)

    def run(self, request: Request) -> Result:
        pixels = request.medium.value
        region = np.ones(pixels.shape[:2], bool) if request.region is None else request.region
        words = re.findall(r"[a-z]+", request.prompt.lower())
        changed = self._changed(words, pixels, region)
        return Result((Medium("image", np.where(region[..., None], changed, pixels)),))

    def _changed(self, said: list[str], pixels: np.ndarray, region: np.ndarray) -> np.ndarray:
        words = set(said)
        if words & {"remove", "erase", "delete"}:
            return _filled(pixels, salient(pixels, region))
        if words & {"blur", "blurred", "soften"}:
            blurred = PIL.Image.fromarray(pixels).filter(PIL.ImageFilter.GaussianBlur(pixels.shape[0] / 24))
            return np.asarray(blurred)
        if words & {"grayscale", "greyscale", "monochrome"}:
            return np.asarray(PIL.Image.fromarray(pixels).convert("L").convert("RGB"))
        if words & {"brighter", "lighter", "brighten", "lighten"}:
            return np.clip(pixels * 1.3 + 10, 0, 255).astype(np.uint8)
        if words & {"darker", "darken"}:
            return (pixels * 0.7).astype(np.uint8)
        named = [word for word in said if word in COLOURS]
        if not named:
            raise ExpertError(
                "knows colours, lighter, darker, grayscale, blur and remove: none of them is named"
            )
        # The last colour is what something becomes: "make the red circle blue".
        return np.where(salient(pixels, region)[..., None], np.uint8(COLOURS[named[-1]]), pixels)

    def close(self) -> None:
        pass


class Segment:
    """What stands out from the edge of each box: the pixels unlike those around it."""

    spec = Spec(
        "classical.segment",
        "1",
        frozenset({"image_seg"}),
        needs_box=frozenset({"image_seg"}),
        degraded=True,
        priority=-10,
    )

    def run(self, request: Request) -> Result:
        if request.region is None:
            raise ExpertError("needs a box to look into")
        return Result((Medium("mask", salient(request.medium.value, request.region)),))

    def close(self) -> None:
        pass


def salient(pixels: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Within a region, the pixels whose colour is far from the usual one around it: bool [h, w].

    Around a region that is the whole picture are the picture's own edges.
    """
    if not region.any():
        return region
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    ring = np.zeros_like(region)
    ring[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = True
    height, width = region.shape
    ring[max(y0, 1) : min(y1, height - 1), max(x0, 1) : min(x1, width - 1)] = False
    if not ring.any():
        return np.zeros_like(region)
    around = np.median(pixels[ring].reshape(-1, 3).astype(np.float64), axis=0)
    away = np.abs(pixels.astype(np.float64) - around).max(-1)
    return region & (away > max(24.0, 0.25 * away[region].max()))


def _filled(pixels: np.ndarray, hole: np.ndarray, rounds: int = 200) -> np.ndarray:
    """A hole filled from its rim inward, by averages of what lies beside (harmonic, by Jacobi's steps)."""
    if not hole.any() or hole.all():
        return pixels
    found = pixels.astype(np.float64)
    found[hole] = found[~hole].mean(0)
    for _ in range(rounds):
        near = np.pad(found, ((1, 1), (1, 1), (0, 0)), mode="edge")
        mean = (near[:-2, 1:-1] + near[2:, 1:-1] + near[1:-1, :-2] + near[1:-1, 2:]) / 4
        found[hole] = mean[hole]
    return np.clip(np.rint(found), 0, 255).astype(np.uint8)
