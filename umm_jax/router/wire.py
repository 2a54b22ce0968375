"""Requests and results of experts as JSON: media in base64, in the formats everybody reads.

    request   {"task", "prompt", "boxes", "times", "objects", "seed", "inputs": [medium], "region": medium}
    result    {"status": "ok", "outputs": [medium], "meta": {"note"}}   or   {"status": "error", "error": why}
    medium    {"kind", "mime", "b64"}; boxes are {"kind": "boxes", "boxes": [[x0, y0, x1, y1], ...]}

Images, masks, videos and tracks are PNG, of several frames where they move; audio is WAV. What comes over the
wire is not trusted: sizes are bounded before anything is decoded.
"""

import base64
import io
import wave
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageSequence

from umm_jax.errors import DataError
from umm_jax.markup.tasks import TASKS
from umm_jax.router.experts import Medium, Request, Result, flaw
from umm_jax.router.saving import RATE, encoded

NUMBERS = 50_000_000  # of one medium
_BOMB = PIL.Image.DecompressionBombError
_MIME = {".png": "image/png", ".wav": "audio/wav"}


def medium_to_json(medium: Medium) -> dict[str, Any]:
    if medium.kind == "boxes":
        return {"kind": "boxes", "boxes": [list(box) for box in medium.value]}
    ending, data = encoded(medium)
    return {"kind": medium.kind, "mime": _MIME[ending], "b64": base64.b64encode(data).decode()}


def medium_from_json(found: Any) -> Medium:
    """Raises DataError for what is no medium, or too large a one."""
    if not isinstance(found, Mapping) or not isinstance(found.get("kind"), str):
        raise DataError("a medium is an object with a kind")
    kind = found["kind"]
    if kind == "boxes":
        boxes = found.get("boxes")
        if not isinstance(boxes, list) or not all(_numbers(box, 4) for box in boxes):
            raise DataError("boxes are lists of four numbers")
        medium = Medium("boxes", tuple(tuple(map(float, box)) for box in boxes))
    else:
        if not isinstance(found.get("b64"), str):
            raise DataError(f"{kind}: without b64; what lies behind an address is not fetched")
        try:
            data = base64.b64decode(found["b64"], validate=True)
            medium = Medium(kind, _decoded(kind, data))
        except (ValueError, OSError, EOFError, wave.Error, SyntaxError, _BOMB) as error:
            raise DataError(f"{kind}: cannot be decoded: {error}") from None
    if wrong := flaw(medium, NUMBERS):
        raise DataError(wrong)
    return medium


def _decoded(kind: str, data: bytes) -> np.ndarray:
    if kind == "audio":
        with wave.open(io.BytesIO(data)) as file:
            if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE):
                raise ValueError(f"audio is one channel of 16 bits at {RATE} Hz")
            if file.getnframes() > NUMBERS:
                raise ValueError(f"audio of more than {NUMBERS} numbers")
            return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32767
    with PIL.Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as picture:
        frames = getattr(picture, "n_frames", 1)
        if picture.width * picture.height * 3 * frames > NUMBERS:
            raise ValueError(f"{frames} x {picture.width} x {picture.height} pixels are too many")
        mode = "RGB" if kind in ("image", "video") else "L"
        values = [np.asarray(frame.convert(mode)) for frame in PIL.ImageSequence.Iterator(picture)]
    found = np.stack(values) if kind in ("video", "track") else values[0]
    return found > 127 if kind in ("mask", "track") else found


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(v, int | float) for v in value)


def request_to_json(request: Request) -> dict[str, Any]:
    return {
        "task": request.task,
        "prompt": request.prompt,
        "boxes": [list(box) for box in request.boxes],
        "times": [list(span) for span in request.times],
        "objects": [[phrase, [list(box) for box in boxes]] for phrase, boxes in request.objects],
        "seed": request.seed,
        "inputs": [] if request.medium is None else [medium_to_json(request.medium)],
        "region": None if request.region is None else medium_to_json(Medium("mask", request.region)),
    }


def request_from_json(found: Any) -> Request:
    """Raises DataError for what is no request."""
    if not isinstance(found, Mapping) or not isinstance(found.get("task"), str) or found["task"] not in TASKS:
        raise DataError(f"a request has a task of {', '.join(TASKS)}")
    if not isinstance(found.get("prompt", ""), str) or not isinstance(found.get("seed", 0), int):
        raise DataError("a prompt is a text, a seed a whole number")
    boxes, times = found.get("boxes", []), found.get("times", [])
    objects = found.get("objects", [])
    good = isinstance(boxes, list) and all(_numbers(box, 4) for box in boxes)
    good = good and isinstance(times, list) and all(_numbers(span, 2) for span in times)
    good = good and isinstance(objects, list) and all(_object(one) for one in objects)
    if not good:
        raise DataError("boxes are lists of four numbers, times of two, objects of a phrase and its boxes")
    inputs = found.get("inputs", [])
    if not isinstance(inputs, list) or len(inputs) > 1:
        raise DataError("inputs is a list of one medium, or of none")
    region = found.get("region")
    if region is not None and not isinstance(region, Mapping):
        raise DataError("region is a mask, or null")
    return Request(
        found["task"],
        found.get("prompt", ""),
        tuple(tuple(box) for box in boxes),
        tuple(tuple(span) for span in times),
        tuple((phrase, tuple(tuple(box) for box in places)) for phrase, places in objects),
        medium_from_json(inputs[0]) if inputs else None,
        None if region is None else medium_from_json({**region, "kind": "mask"}).value,
        found.get("seed", 0),
    )


def _object(one: Any) -> bool:
    if not isinstance(one, list) or len(one) != 2 or not isinstance(one[0], str):
        return False
    return isinstance(one[1], list) and all(_numbers(box, 4) for box in one[1])


def result_to_json(result: Result) -> dict[str, Any]:
    outputs = [medium_to_json(medium) for medium in result.media]
    return {"status": "ok", "outputs": outputs, "meta": {"note": result.note}}


def result_from_json(found: Any) -> Result:
    """Raises DataError for what is no result."""
    if not isinstance(found, Mapping) or not isinstance(found.get("outputs"), list):
        raise DataError("a result has outputs")
    meta = found.get("meta")
    note = meta.get("note", "") if isinstance(meta, Mapping) else ""
    return Result(tuple(medium_from_json(one) for one in found["outputs"]), str(note)[:500])
