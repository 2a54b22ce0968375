"""Replies as lines of JSON: what the runner appends while it asks, and what other programs hand in.

    {"id": "262148000", "text": "down"}                 from anywhere; also "scores": [...],
                                                        "images": ["a.png"], "boxes": [[x0, y0, x1, y1]] in
                                                        fractions of the picture, "masks": [COCO's {"size",
                                                        "counts"}]; or all in order, one to an object:
                                                        "parts": [{"text": ...}, {"image": "a.png"}]
    {"id": ..., "request": ..., "turns": [...], ...}    the runner's own, pictures named by their hash

A line that the runner was writing when it died is torn: the last one is dropped, and its doc is asked again.
Anywhere else, and in files of others, that is damage, and said so.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umm_jax.conversation import PARTS, Box, Image, ImageData, Mask, Part, Text, Turn
from umm_jax.data.gate import Limits, examine
from umm_jax.data.quarantine import Rejected
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Response
from umm_jax.evaluate.measures import rle
from umm_jax.evaluate.source import inside

MEDIA = "media"  # the folder of a run's pictures, beside its responses


def read_lines(path: str | Path, *, torn: bool = False) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines.

    Args:
        torn: whether a last line that was cut short is left out, as a run that died leaves one.

    Raises:
        DataError: not there, or damaged; names the line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    found = []
    if torn:
        # Without a line break at its end a line was not written to its end, whatever it says.
        lines[-1] = b""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except (ValueError, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {number}: not a JSON object ({error})") from None
        found.append(value)
    return found


def read(path: str | Path) -> dict[str, Response]:
    """{id: response} of a file.

    Raises:
        DataError: not there, damaged, a line of neither form, or an id that is there twice.
    """
    path = Path(path)
    found: dict[str, Response] = {}
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}, response {number}"
        response = parse(line, path.parent, where)
        if response.id in found:
            raise DataError(
                f"{where}: a response for id {response.id!r} came before; each doc is answered once: "
                "remove one of the two"
            )
        found[response.id] = response
    return found


def parse(line: Mapping[str, Any], folder: Path, where: str) -> Response:
    """A line of either form; pictures are read from `folder`. Raises DataError."""
    if "id" not in line:
        raise DataError(f"{where}: has no 'id'")
    id = str(line["id"])
    scores = line.get("scores") or []
    if not isinstance(scores, list) or not all(_finite(s) for s in scores):
        raise DataError(f"{where}: 'scores' must be numbers, one for each option")
    scores = tuple(float(s) for s in scores)
    if line.get("error"):
        return Response(id, error=str(line["error"]))
    if "turns" in line:
        try:
            turns = tuple(Turn("assistant", tuple(_part(p) for p in turn)) for turn in line["turns"])
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"{where}: a turn cannot be read ({error!r})") from None
        refs = [part.ref for turn in turns for part in turn.parts if isinstance(part, Image)]
        images = {ref: picture(inside(folder / MEDIA, ref), where) for ref in refs}
        return Response(id, turns, images, scores)
    return _foreign(id, line, scores, folder, where)


_ONE_BY_ONE = {"text": "text", "images": "image", "boxes": "box", "masks": "mask"}


def _foreign(id: str, line: Mapping[str, Any], scores, folder: Path, where: str) -> Response:
    """A reply as other programs write it."""
    if not line.keys() & {"parts", "scores", *_ONE_BY_ONE}:
        raise DataError(f"{where}: has none of 'text', 'scores', 'parts', 'images', 'boxes', 'masks'")
    said = line.get("parts")
    if said is None:
        said = [{"text": line.get("text") or ""}]
        for name in ("images", "boxes", "masks"):
            values = line.get(name) or []
            if not isinstance(values, list):
                raise DataError(f"{where}: {name!r} must be a list")
            said += [{_ONE_BY_ONE[name]: value} for value in values]
    if not isinstance(said, list):
        raise DataError(f"{where}: 'parts' must be a list")
    parts: list[Part] = []
    images = {}
    for one in said:
        if not isinstance(one, Mapping) or len(one) != 1 or not one.keys() <= set(_ONE_BY_ONE.values()):
            raise DataError(f"{where}: a part must be one of text, image, box, mask; it is {str(one)[:80]}")
        ((kind, value),) = one.items()
        if kind in ("text", "image") and not isinstance(value, str):
            raise DataError(f"{where}: {kind!r} must be a string, it is {str(value)[:60]!r}")
        if kind == "image":
            images[value] = picture(inside(folder, value), where)
            parts.append(Image(value))
        elif kind == "box":
            if not isinstance(value, Sequence) or len(value) != 4 or not all(_finite(v) for v in value):
                raise DataError(f"{where}: a box must be four numbers, it is {str(value)[:80]}")
            parts.append(Box("", tuple(float(v) for v in value)))
        elif kind == "mask":
            parts.append(Mask.from_array("", rle.decode(value, where)))
        elif value:
            parts.append(Text(value))
    return Response(id, (Turn("assistant", tuple(parts)),), images, scores)


def _finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:
        return False


def _part(plain: Mapping[str, Any]) -> Part:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "kind"}
    part = PARTS[plain["kind"]](**fields)
    words = [getattr(part, name) for name in ("text", "ref", "of") if hasattr(part, name)]
    if not all(isinstance(word, str) for word in words):
        raise ValueError(f"{part.kind}: {words} must be strings")
    if isinstance(part, Mask):
        part.array()  # raises where its runs do not fill it
    if isinstance(part, Box) and not (len(part.xyxy) == 4 and all(map(_finite, part.xyxy))):
        raise ValueError(f"a box must be four numbers, it is {part.xyxy}")
    return part


def picture(path: Path, where: str) -> ImageData:
    """A picture a response names, whole and readable.

    Raises:
        DataError: missing, damaged, or one that the gate rejects.
    """
    try:
        return examine(path.read_bytes(), Limits()).image
    except OSError as error:
        raise DataError(f"{where}: the picture {path} cannot be read: {error.strerror or error}") from None
    except Rejected as error:
        raise DataError(f"{where}: the picture {path}: {error}") from None


def line_of(response: Response, **further: Any) -> dict[str, Any]:
    """The runner's form of a response, pictures named by their hash; which ``store.Appending`` writes."""
    names = {ref: f"{image.sha256}.png" for ref, image in response.images.items()}
    turns = []
    for turn in response.turns:
        parts = [{"kind": part.kind, **vars(part)} for part in turn.parts]
        turns.append([p | {"ref": names[p["ref"]]} if p["kind"] == Image.kind else p for p in parts])
    line: dict[str, Any] = {"id": response.id, **further}
    if response.error:
        return line | {"error": response.error}
    if turns:
        line["turns"] = turns
    if response.scores:
        line["scores"] = list(response.scores)
    return line


def check_ids(found: Iterable[str], wanted: Sequence[str], what: str, *, partial: bool = False) -> None:
    """Whether responses are of these docs: all of them, or with `partial` some.

    Raises:
        DataError: responses to docs that are not there (another version of the benchmark), or docs without.
    """
    found, known = set(found), set(wanted)
    if strangers := sorted(found - known):
        raise DataError(
            f"{what}: {len(strangers)} of {len(found)} responses are to ids this benchmark does not have "
            f"({', '.join(strangers[:3])}): they belong to another split or version of it"
        )
    missing = [id for id in wanted if id not in found]
    if missing and (not partial or not found):
        raise DataError(
            f"{what}: {len(missing)} of {len(wanted)} docs have no response ({', '.join(missing[:3])}); "
            "ask them, or score those that are there with --partial"
        )
