"""Experts without a model for what is laid out, moves or sounds: so that every task can be run end to end.

What they know is a closed set of words: colours and shapes, directions, kinds of sound. They stand in for
models; nobody should take their results for one's.
"""

import re

import numpy as np

from umm_jax.router.classical import COLOURS, Edit, salient
from umm_jax.router.execute import box_mask
from umm_jax.router.experts import ExpertError, Medium, Request, Result, Spec

SIDE, FRAMES, RATE = 256, 8, 16_000
_DIRECTIONS = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
    "falls": (1, 0),
    "rises": (-1, 0),
}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether a place of the square from -1 to 1 belongs to a shape."""
    match shape:
        case "circle" | "ball" | "sun" | "moon":
            return y**2 + x**2 <= 1
        case "ring":
            return (y**2 + x**2 <= 1) & (y**2 + x**2 >= 0.35)
        case "triangle":
            return np.abs(x) <= (y + 1) / 2
        case "diamond":
            return np.abs(x) + np.abs(y) <= 1
        case "cross":
            return (np.abs(x) <= 0.35) | (np.abs(y) <= 0.35)
    return np.ones(np.broadcast(y, x).shape, bool)


_SHAPES = (
    "circle",
    "ball",
    "sun",
    "moon",
    "ring",
    "triangle",
    "diamond",
    "cross",
    "square",
    "box",
    "rectangle",
)


def laid_out(prompt: str, objects) -> np.ndarray:
    """Coloured shapes on a ground: uint8 [256, 256, 3]. Raises ExpertError where none is named."""
    ground = re.search(r"\bon (?:an? |the )?([a-z]+)", prompt.lower())
    picture = np.full((SIDE, SIDE, 3), COLOURS.get(ground[1] if ground else "", COLOURS["white"]), np.uint8)
    if not objects:
        said = re.sub(r"\bon (an? |the )?[a-z]+", "", prompt.lower())
        objects = [(phrase, ()) for phrase in re.split(r",| and ", said) if phrase.strip()]
    known = [(p, b) for p, b in objects if set(_words(p)) & {*COLOURS, *_SHAPES} or b]
    if not known:
        raise ExpertError(f"knows {', '.join(_SHAPES)} and colours: none of them is named")
    steps = (np.arange(SIDE) + 0.5) / SIDE
    for k, (phrase, boxes) in enumerate(known):
        words = _words(phrase)
        colour = next((COLOURS[w] for w in words if w in COLOURS), COLOURS["gray"])
        shape = next((w for w in words if w in _SHAPES), "square")
        own = ((k + 0.15) / len(known), 0.3, (k + 0.85) / len(known), 0.7)
        for x0, y0, x1, y1 in boxes or (own,):
            y, x = (2 * steps - y0 - y1) / (y1 - y0), (2 * steps - x0 - x1) / (x1 - x0)
            y, x = y[:, None], x[None]
            picture[_inside(shape, y, x) & (np.abs(y) <= 1) & (np.abs(x) <= 1)] = colour
    return picture


def moved(picture: np.ndarray, prompt: str) -> np.ndarray:
    """A picture that moves as a whole in the direction named: uint8 [8, h, w, 3]."""
    dy, dx = next((_DIRECTIONS[w] for w in _words(prompt) if w in _DIRECTIONS), (0, 1))
    step = max(1, min(picture.shape[:2]) // (4 * FRAMES))
    return np.stack([np.roll(picture, (k * step * dy, k * step * dx), (0, 1)) for k in range(FRAMES)])


class _Classical:
    def close(self) -> None:
        """Holds nothing."""


def _spec(name: str, *tasks: str, needs_box: tuple[str, ...] = ()) -> Spec:
    return Spec(f"classical.{name}", "1", frozenset(tasks), frozenset(needs_box), degraded=True, priority=-10)


class Shapes(_Classical):
    """Pictures of coloured shapes, in their boxes or side by side."""

    spec = _spec("shapes", "image_gen", "layout_gen")

    def run(self, request: Request) -> Result:
        return Result((Medium("image", laid_out(request.prompt, request.objects)),))


class Motion(_Classical):
    """Videos in which all moves one way."""

    spec = _spec("motion", "video_gen", "image_to_video")

    def run(self, request: Request) -> Result:
        picture = laid_out(request.prompt, ()) if request.medium is None else request.medium.value
        return Result((Medium("video", moved(picture, request.prompt)),))


class Film(_Classical):
    """An edit of every frame of a span, or what stands out in a box of every frame."""

    spec = _spec("film", "video_edit", "video_seg", needs_box=("video_seg",))

    def run(self, request: Request) -> Result:
        frames = request.medium.value
        region = box_mask(request.boxes, *frames.shape[1:3]) if request.boxes else None
        if request.task == "video_seg":
            if region is None:
                raise ExpertError("needs a box to look into")
            return Result((Medium("track", np.stack([salient(frame, region) for frame in frames])),))
        # A frame is of a span when its middle is.
        middles = (np.arange(len(frames)) + 0.5) / len(frames)
        chosen = np.zeros(len(frames), bool)
        for begin, end in request.times or ((0.0, 1.0),):
            chosen |= (middles >= begin) & (middles <= end)
        found = [self._frame(frame, one, request, region) for frame, one in zip(frames, chosen)]
        return Result((Medium("video", np.stack(found)),))

    @staticmethod
    def _frame(frame: np.ndarray, chosen: bool, request: Request, region) -> np.ndarray:
        if not chosen:
            return frame
        asked = Request("image_edit", request.prompt, medium=Medium("image", frame), region=region)
        return Edit().run(asked).media[0].value


class Sound(_Classical):
    """Tones, sweeps and noise of one second; a sound made louder, quieter, faster, slower or reversed."""

    spec = _spec("sound", "audio_gen", "audio_edit")

    def run(self, request: Request) -> Result:
        words = set(_words(request.prompt))
        if request.task == "audio_edit":
            return Result((Medium("audio", self._edited(request.medium.value, words)),))
        time = np.arange(RATE) / RATE
        if words & {"rain", "noise", "wind", "water", "waves", "traffic", "static"}:
            noise = np.random.default_rng(request.seed).normal(size=RATE + 8)
            wave = np.convolve(noise, np.ones(9) / 9, "valid") * 0.5
        elif words & {"rising", "chirp", "siren", "falling"}:
            low, high = (880, 220) if "falling" in words else (220, 880)
            wave = np.sin(2 * np.pi * (low * time + (high - low) * time**2 / 2))
        elif words & {"tone", "beep", "note", "low", "high", "hum", "whistle"}:
            pitch = 220 if words & {"low", "hum"} else 880 if words & {"high", "whistle"} else 440
            wave = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in (1, 2, 3)) / 2
        else:
            raise ExpertError("knows tones, sweeps and noise: none of them is named")
        return Result((Medium("audio", np.clip(0.5 * wave, -1, 1).astype(np.float32)),))

    @staticmethod
    def _edited(wave: np.ndarray, words: set[str]) -> np.ndarray:
        if words & {"louder", "loud"}:
            return np.clip(2 * wave, -1, 1).astype(np.float32)
        if words & {"quieter", "quiet", "softer"}:
            return (0.5 * wave).astype(np.float32)
        if words & {"faster", "slower"}:
            count = max(1, len(wave) // 2 if "faster" in words else 2 * len(wave))
            return np.interp(np.linspace(0, len(wave) - 1, count), np.arange(len(wave)), wave).astype(
                np.float32
            )
        if words & {"reverse", "reversed", "backwards"}:
            return wave[::-1].copy()
        raise ExpertError("knows louder, quieter, faster, slower and reversed: none of them is named")
