"""What experts gave, as files beside a manifest that names them."""

import io
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.router.execute import Done
from umm_jax.router.experts import Medium

RATE = 16_000  # of audio
_FRAMES_PER_SECOND = 8


def save(done: Sequence[Done], out: str | Path) -> list[dict[str, Any]]:
    """Writes every medium to `out`; the steps' facts with the names of their files, or boxes as they are.

    Raises:
        StorageError: the disk is full, or `out` cannot be written to.
    """
    out = Path(out)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    found = []
    for k, step in enumerate(done):
        outputs = []
        for n, medium in enumerate(step.media):
            if medium.kind == "boxes":
                outputs.append({"kind": "boxes", "boxes": [list(box) for box in medium.value]})
                continue
            ending, data = encoded(medium)
            name = f"step{k}-{n}{ending}"
            write_atomic(out / name, data)
            outputs.append({"kind": medium.kind, "file": name})
        found.append({**step.plain, "outputs": outputs})
    return found


def encoded(medium: Medium) -> tuple[str, bytes]:
    """(ending, bytes) of a file: PNG, for videos and tracks with several frames, or WAV."""
    buffer = io.BytesIO()
    if medium.kind == "audio":
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((np.clip(medium.value, -1, 1) * 32767).astype("<i2").tobytes())
        return ".wav", buffer.getvalue()
    value = medium.value if medium.kind in ("image", "video") else medium.value.astype(np.uint8) * 255
    frames = [PIL.Image.fromarray(f) for f in (value if medium.kind in ("video", "track") else [value])]
    duration = 1000 // _FRAMES_PER_SECOND
    frames[0].save(buffer, "PNG", save_all=len(frames) > 1, append_images=frames[1:], duration=duration)
    return ".png", buffer.getvalue()
