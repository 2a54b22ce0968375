"""Our models in other people's evaluation suites: lmms-eval by an entry point, VLMEvalKit by a class.

Both hand over messages, settings of generation, and pictures; both want a string. A reply with pictures
becomes lmms-eval's convention, JSON {"text": ..., "images": [paths]}, with the files in a folder of the
caller's.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, Image, ImageData, Part, Text, Turn
from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.contract import Reply

MODEL = "umm_jax"


def manifest():
    """The entry point that lmms-eval looks for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL, chat_class_path="umm_jax.evaluate.plugs.lmms.UmmJax")


def conversation(id: str, messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Of messages [{"role", "content"}], a content a str or a list of {"type": "text", "text"} and
    {"type": "image", "url" or "image"}; a picture is a PIL image, a path, or bytes.

    Raises:
        DataError: a content of another type (video, audio), or a picture that cannot be read.
    """
    turns, images = [], {}
    for message in messages:
        content = message["content"]
        parts: list[Part] = []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item["type"] == "text":
                parts.append(Text(item["text"]))
            elif item["type"] == "image":
                name = f"image{len(images)}"
                images[name] = picture(item.get("url", item.get("image")), id)
                parts.append(Image(name))
            else:
                raise DataError(f"{id}: a message holds {item['type']}, these models read text and pictures")
        turns.append(Turn(message["role"], tuple(parts)))
    return Conversation(id, tuple(turns), images)


def picture(value: Any, where: str) -> ImageData:
    """Raises DataError."""
    try:
        if isinstance(value, (str, Path)):
            value = Path(value).read_bytes()
        if isinstance(value, bytes):
            with PIL.Image.open(io.BytesIO(value)) as opened:
                value = opened.convert("RGB")
        buffer = io.BytesIO()
        value.convert("RGB").save(buffer, "PNG")
    except Exception as error:  # Pillow raises many kinds, all of which mean the same here
        raise DataError(f"{where}: a picture cannot be read: {error}") from None
    return ImageData(buffer.getvalue(), "image/png", value.width, value.height)


def settings(kwargs: Mapping[str, Any], base: ReplySettings) -> ReplySettings:
    """Their settings of generation as ours; what they leave out is as in `base`.

    Raises:
        ConfigError: a value that is out of range.
    """
    changed = dict(vars(base))
    if kwargs.get("max_new_tokens"):
        changed["max_tokens"] = int(kwargs["max_new_tokens"])
    sampled = kwargs.get("do_sample", (kwargs.get("temperature") or 0) > 0)
    changed["temperature"] = float(kwargs.get("temperature") or 0) if sampled else 0.0
    if kwargs.get("top_p") is not None:
        changed["top_p"] = float(kwargs["top_p"])
    if kwargs.get("num_beams"):
        changed["beams"] = int(kwargs["num_beams"])
    changed["min_tokens"] = min(changed["min_tokens"], changed["max_tokens"] - 1)
    return ReplySettings(**changed)


def text_of(reply: Reply, stops: Sequence[str], folder: Path | None, name: str) -> str:
    """The reply as a string, up to the first of `stops`; with pictures, JSON that names their files.

    Args:
        folder: where pictures go, as NAME-0.png, NAME-1.png, ...

    Raises:
        ConfigError: there are pictures and no folder for them. StorageError.
    """
    text = reply.turn.spelt()
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    refs = [part.ref for part in reply.turn.parts if isinstance(part, Image)]
    if not refs:
        return text.strip()
    if folder is None:
        raise ConfigError("the model drew pictures; say where they go: out=DIR among the model's arguments")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, ref in enumerate(refs):
        paths.append(folder / f"{name}-{i}.png")
        write_atomic(paths[-1], reply.images[ref].data)
    return json.dumps({"text": text.strip(), "images": [str(path) for path in paths]})
