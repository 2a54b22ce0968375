"""How answers are spelt, a table for each system: tags, marks of masks, and how places are written.

`umm1` is this project's own. `unifiedmllm` is provisional and equal to it until the authors' strings are
known. The others spell what their public code reads; `olympus` has more tasks than there are here, which are
listed as unknown. What a table leaves out is not read: nothing is guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from umm_jax.config import suggest
from umm_jax.errors import ConfigError
from umm_jax.markup.tasks import TASKS

_PAIRS = {f"<{name}>": ("open", name) for name in TASKS} | {f"</{name}>": ("close", name) for name in TASKS}
_PLACES = {
    "<ref>": ("ref", ""),
    "</ref>": ("/ref", ""),
    "<box>": ("box", ""),
    "</box>": ("/box", ""),
    "<time>": ("time", ""),
    "</time>": ("/time", ""),
}


@dataclass(frozen=True)
class Dialect:
    """A table of spellings.

    Attributes:
        marks: literal -> (kind, task): kinds "open", "close", "ref", "/ref", "box", "/box", "time", "/time",
            "seg", "signal" (a call without words; a run of them is one) and "skip". A "close" of task ""
            closes any.
        aliases: literals that are told as misspelt -> what they stand for.
        scale: what the far edge of a picture is in boxes: 1, or 1000 say.
        square: boxes are of the picture padded to a square, see ``coordinates``.
        bare: boxes and spans stand in the prose without tags.
        bare_seg: a mark of a mask outside a call is how segmentation is asked for.
        phrase_seg: the phrase before such a mark is what is segmented.
        labelled: a call's words begin with a label and a colon.
    """

    name: str
    marks: Mapping[str, tuple[str, str]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0
    square: bool = False
    bare: bool = False
    bare_seg: bool = False
    phrase_seg: bool = False
    labelled: bool = False

    @property
    def tokens(self) -> tuple[str, ...]:
        """The marks a tokenizer has as pieces of their own."""
        return tuple(self.marks)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds marks, and what looks like a tag but is none."""
        known = sorted((*self.marks, *self.aliases), key=len, reverse=True)
        return re.compile("|".join((*map(re.escape, known), r"</?[A-Za-z][A-Za-z0-9_]{0,63}>")))

    def spelling(self, kind: str, task: str = "") -> str:
        """The first mark of this meaning. Raises ConfigError where the dialect has none."""
        for mark, meaning in self.marks.items():
            if meaning == (kind, task):
                return mark
        raise ConfigError(f"dialect {self.name!r} cannot write {kind} {task}".rstrip())


def _pairs(**tags: str) -> dict[str, tuple[str, str]]:
    opened = {f"<{tag}>": ("open", task) for tag, task in tags.items()}
    return opened | {f"</{tag}>": ("close", task) for tag, task in tags.items()}


_UMM1 = Dialect(
    "umm1",
    {**_PAIRS, **_PLACES, "[SEG]": ("seg", "")},
    aliases={"<aud_cap>": "<audio_gen>", "</audio_cap>": "</audio_gen>", "</aud_cap>": "</audio_gen>"},
)
_MODULES = dict(
    A="image_gen",
    B="image_seg",
    C="image_edit",
    D="video_gen",
    E="video_seg",
    F="video_edit",
    G="image_to_video",
)
DIALECTS = {
    d.name: d
    for d in (
        _UMM1,
        replace(_UMM1, name="unifiedmllm"),
        Dialect(
            "olympus",
            _pairs(**{t: t for t in ("image_gen", "image_edit", "image_seg", "video_gen", "audio_gen")}),
        ),
        Dialect(
            "llmbind",
            {
                **_pairs(gen="image_gen", edit="image_edit", vid_cap="video_gen", aud_cap="audio_gen"),
                "[SEG]": ("seg", ""),
            },
            # What it was trained to write and what its code looks for are two things.
            aliases={
                "<audio_cap>": "<aud_cap>",
                "</audio_cap>": "</aud_cap>",
                "<video_cap>": "<vid_cap>",
                "</video_cap>": "</vid_cap>",
            },
            bare_seg=True,
        ),
        Dialect(
            "vitron",
            {
                **{f"<module>{letter}</module>": ("open", task) for letter, task in _MODULES.items()},
                "<instruction>": ("skip", ""),
                "</instruction>": ("close", ""),
                "<region>": ("box", ""),
                "</region>": ("/box", ""),
            },
            labelled=True,
        ),
        Dialect("lisa", {"[SEG]": ("seg", "")}, bare_seg=True),
        Dialect(
            "glamm",
            {
                "<p>": ("ref", ""),
                "</p>": ("/ref", ""),
                "[SEG]": ("seg", ""),
                "<bbox>": ("box", ""),
                "</bbox>": ("/box", ""),
            },
            bare_seg=True,
            phrase_seg=True,
        ),
        Dialect(
            "nextgpt",
            {
                **{f"[IMG{k}]": ("signal", "image_gen") for k in range(4)},
                **{f"[VID{k}]": ("signal", "video_gen") for k in range(24)},
                **{f"[AUD{k}]": ("signal", "audio_gen") for k in range(8)},
                **{f"<image_{k:02}>": ("signal", "image_gen") for k in range(4)},
                **{f"<video_{k:02}>": ("signal", "video_gen") for k in range(24)},
                **{f"<audio_{k:02}>": ("signal", "audio_gen") for k in range(8)},
            },
        ),
        Dialect("groundinggpt", {}, square=True, bare=True),
    )
}


def get(name: str) -> Dialect:
    """Raises ConfigError on an unknown name."""
    if name not in DIALECTS:
        raise ConfigError(f"dialect {name!r} is unknown{suggest(name, list(DIALECTS))}")
    return DIALECTS[name]
