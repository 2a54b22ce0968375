"""Stories in pictures, VIST and Pororo-SV: a picture is drawn for each caption, with those before in sight.

    vist    annotations/{split}_formatted_filtered.json, {annotations: {story: [{sequence_index, image_id,
            caption}]}}, as MM-Interleaved has it, or {split}.story-in-sequence.json, the release's
            {annotations: [[{story_id, photo_flickr_id, text, worker_arranged_photo_order}]]};
            images/{split}_images/<id>.png, or images/{split}/<id>.jpg
    pororo  pororo_{split}.jsonl, a line a story: {id, captions: [...], images: [...]}; pictures beside it.
            The release's .npy files are pickles, which run code when they are read: they are never opened.
            Of the release's pictures, which hold the frames of a clip one below the other, cut one.

The first `given` frames of a story are shown; from then on each caption is a turn, and what the model drew
stays in sight. MM-Interleaved draws the last frame of VIST, all before it given (given=-1).

`pictures` is the share of stories with one picture for each caption; it needs nothing. `clip_i`, the
headline, is the mean cosine of each picture with the true frame, in CLIP's features, one that is missing
counting 0; `fid` is the Fréchet distance of all pictures to all true frames, in Inception's. Both are null
until settings name a network, see ``measures.features``. FID depends on the number of pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from umm_jax.conversation import Image, ImageData, Part, Turn
from umm_jax.data.gate import Limits, examine
from umm_jax.data.quarantine import Rejected
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Stored, Task, mean, user
from umm_jax.evaluate.measures import features
from umm_jax.evaluate.measures.frechet import Moments, frechet
from umm_jax.evaluate.source import Source, take

PROMPTS = {"caption": "{caption}", "draw": "Draw the next picture of the story: {caption}"}


@dataclass(frozen=True)
class Settings:
    """What is asked, and what pictures are compared with.

    Attributes:
        split: of the release.
        given: true frames shown before the first is drawn; below 0 counted from the end.
        prompt: the words around a caption, see PROMPTS.
        clip: the network of clip_i, e.g. "clip:FOLDER"; fid: that of fid, e.g. "clean-fid:FOLDER".
        fid_size: pictures and frames are brought to this square before `fid`; 0 leaves them as they are.
            MM-Interleaved's release has 64.
    """

    split: Literal["test", "val"] = "test"
    given: int = 1
    prompt: Literal["caption", "draw"] = "caption"
    clip: str = ""
    fid: str = ""
    fid_size: int = 0

    def __post_init__(self):
        if self.fid_size < 0:
            raise ConfigError(f"fid_size must be 0 or a number of pixels, it is {self.fid_size}")


# --- docs ---------------------------------------------------------------------------------------------


def _doc(id: str, captions: Sequence[str], frames: Sequence[Stored], settings: Settings, where: str) -> Doc:
    """A story: frames that are given, then a turn for each that is drawn."""
    if len(captions) != len(frames):
        raise DataError(f"{where}: story {id!r} has {len(captions)} captions and {len(frames)} pictures")
    given = settings.given + len(frames) if settings.given < 0 else settings.given
    if not 0 <= given < len(frames):
        raise DataError(f"{where}: story {id!r} has {len(frames)} frames; given={settings.given} leaves none")
    said = [user(PROMPTS[settings.prompt].replace("{caption}", caption)) for caption in captions]
    turns: list[Turn] = []
    for number in range(given):
        turns += [said[number], Turn("assistant", (Image(f"frame{number}"),))]
    return Doc(
        id,
        (*turns, said[given]),
        {f"frame{number}": frames[number] for number in range(given)},
        then=tuple(said[given + 1 :]),
        target=tuple(frames[given:]),
    )


def _vist(source: Source, settings: Settings) -> Iterator[Doc]:
    split = settings.split
    formatted = f"annotations/{split}_formatted_filtered.json", f"{split}_formatted_filtered.json"
    released = f"{split}.story-in-sequence.json", f"sis/{split}.story-in-sequence.json"
    name = source.path(*formatted, *released).name
    stories = take(source.json(*formatted, *released), "annotations", name, (dict, list))
    fields = ("sequence_index", "image_id", "caption")
    if isinstance(stories, list):
        fields = ("worker_arranged_photo_order", "photo_flickr_id", "text")
        found: dict[str, list] = {}
        for entry in stories:
            one = take(entry, 0, name, dict)
            found.setdefault(str(take(one, "story_id", name)), []).append(one)
        stories = found
    for id in sorted(stories):
        parts = [tuple(take(entry, field, name) for field in fields) for entry in stories[id]]
        try:
            parts.sort(key=lambda part: int(part[0]))
        except (TypeError, ValueError):
            raise DataError(f"{name}: story {id!r}: {fields[0]!r} must be a number") from None
        frames = [_vist_frame(source, split, str(image)) for _, image, _ in parts]
        yield _doc(str(id), [str(caption) for *_, caption in parts], frames, settings, name)


def _vist_frame(source: Source, split: str, id: str) -> Stored:
    names = (f"images/{split}_images/{id}.png", f"images/{split}/{id}.jpg", f"images/{split}/{id}.png")
    return source.picture(*names)


def _pororo(source: Source, settings: Settings) -> Iterator[Doc]:
    name = f"pororo_{settings.split}.jsonl"
    if not (source.root / name).exists() and (source.root / "descriptions.npy").exists():
        raise DataError(
            f"{source.root}: descriptions.npy and the other .npy files of the release are pickles, which run "
            f"code when they are read, so they are not opened; write {name}, a line a story: "
            '{"id": ..., "captions": [...], "images": ["file below this folder", ...]}'
        )
    for entry in source.lines(name):
        captions = [take({"caption": c}, "caption", name, str) for c in take(entry, "captions", name, list)]
        frames = [
            source.picture(take({"image": f}, "image", name, str)) for f in take(entry, "images", name, list)
        ]
        yield _doc(str(take(entry, "id", name)), captions, frames, settings, name)


# --- marks and figures --------------------------------------------------------------------------------


def _drawn(response: Response, wanted: int) -> tuple[list[ImageData | None], bool]:
    """(the picture for each caption, whether there is exactly one for each).

    With a turn for each caption, the first picture of each; replies of other programs have one turn, whose
    pictures are taken in order.
    """
    turns: list[Sequence[Part]] = [turn.parts for turn in response.turns]
    if len(turns) == wanted:
        shown = [[response.images[p.ref] for p in parts if isinstance(p, Image)] for parts in turns]
        return [next(iter(pictures), None) for pictures in shown], all(len(p) == 1 for p in shown)
    pictures = response.pictures
    padded: list[ImageData | None] = [*pictures[:wanted], *[None] * (wanted - len(pictures))]
    return padded, len(pictures) == wanted


def _frame(stored: Stored) -> np.ndarray:
    """uint8[h, w, 3] of a true frame. Raises DataError, never another picture."""
    try:
        return examine(stored.read_bytes(), Limits()).image.array()
    except OSError as error:
        raise DataError(f"{stored}: cannot be read: {error.strerror or error}") from None
    except Rejected as error:
        raise DataError(f"{stored}: {error}") from None


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    """Whether there is a picture for each caption; their features where settings name networks."""
    found, exact = _drawn(response, len(doc.target))
    there = [i for i, picture in enumerate(found) if picture is not None]
    values: dict[str, float] = {"pictures": float(exact)}
    parts: dict[str, Any] = {}
    if settings.clip or settings.fid:
        drawn = [found[i].array() for i in there]
        true = [_frame(stored) for stored in doc.target]
        if settings.clip:
            likeness = _features(settings.clip, drawn, [true[i] for i in there], features.cosines)
            values["clip_i"] = float(np.sum(likeness)) / len(found)
        if settings.fid:
            if settings.fid_size:
                drawn, true = (
                    [features.middle(i, settings.fid_size) for i in side] for side in (drawn, true)
                )
            parts["drawn"] = features.of(settings.fid, drawn) if drawn else None
            parts["true"] = features.of(settings.fid, true)
    missing = len(found) - len(there)
    return Marks(values, f"{missing} pictures missing" if missing else "", parts)


def _features(name: str, drawn: list, true: list, compared: Callable) -> np.ndarray:
    return compared(features.of(name, drawn), features.of(name, true)) if drawn else np.zeros(0)


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    n, invalid = len(records), sum(bool(r.marks.invalid) for r in records)

    def without(setting: str) -> Score:
        return Score(None, n=n, n_invalid=invalid, reason=f"no network: set `{setting}`")

    return {
        "clip_i": mean(records, "clip_i", 1) if settings.clip else without("clip"),
        "fid": _fid(records, n, invalid) if settings.fid else without("fid"),
        "pictures": mean(records, "pictures"),
    }


def _fid(records: Sequence[Record], n: int, invalid: int) -> Score:
    drawn, true = Moments("drawn pictures"), Moments("true frames")
    for record in records:
        if record.marks.parts["drawn"] is not None:
            drawn.add(record.marks.parts["drawn"])
        true.add(record.marks.parts["true"])
    try:
        value = frechet(drawn, true)
    except DataError as error:
        return Score(None, n=n, n_invalid=invalid, reason=str(error))
    return Score(value, None, n, invalid, f"{drawn.n} pictures, {true.n} frames")


def noted(records: Sequence[Record], settings: Settings) -> dict[str, str]:
    """The networks and the size figures are by: folders by their last names, which say what is in them."""
    clip, fid = (name.rstrip("/").rsplit("/", 1)[-1] for name in (settings.clip, settings.fid))
    return {"clip": clip, "fid": fid and f"{fid} at {settings.fid_size or 'full size'}"}


def _task(name: str, docs: Callable[[Source, Settings], Iterator[Doc]], files: str) -> Task:
    return Task(
        name,
        docs,
        mark,
        "clip_i",
        total,
        Settings,
        files=files,
        reply={"mode": "image", "max_images": 1},
        prompt=str(PROMPTS),
        post="the first picture of each turn",
        cost="B",
        scale=(-1, 1),
        judging=("clip", "fid", "fid_size"),
        noted=noted,
    )


TASKS = [
    _task(
        "vist", _vist, "stories in sequence (SIS) and pictures are published at visionandlanguage.net/VIST"
    ),
    _task(
        "pororo", _pororo, "Pororo-SV is published with StoryGAN; list its stories in pororo_{split}.jsonl"
    ),
]
