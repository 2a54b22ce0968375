"""The tasks an answer can ask for, by name: what each takes and what it gives."""

from typing import NamedTuple


class Task(NamedTuple):
    """A kind of call.

    Attributes:
        takes: kind of the medium that it works on, or None.
        gives: kind of the result.
        empty: whether it may be asked for without words.
    """

    takes: str | None
    gives: str
    empty: bool = False


TASKS = {
    "image_gen": Task(None, "image"),
    "layout_gen": Task(None, "image"),
    "image_edit": Task("image", "image"),
    "image_seg": Task("image", "mask", empty=True),
    "image_ground": Task("image", "boxes", empty=True),
    "video_gen": Task(None, "video"),
    "video_edit": Task("video", "video"),
    "video_seg": Task("video", "track", empty=True),
    "audio_gen": Task(None, "audio"),
    "image_to_video": Task("image", "video"),
    "audio_edit": Task("audio", "audio"),
}
SEGMENTING = ("image_seg", "video_seg")
