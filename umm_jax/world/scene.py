"""What there is in the world: boards with at most one object a cell, and the configuration of it all."""

import dataclasses
import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from umm_jax.config import RunConfig, from_dict, suggest
from umm_jax.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (250, 215, 20),
    "purple": (150, 40, 190),
    "cyan": (30, 205, 220),
    "orange": (250, 130, 10),
    "pink": (250, 140, 190),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "brown": (110, 70, 40)}
SIZES = ("large", "small")
TEXTURES = ("plain", "striped")

QUESTIONS = ("colour", "shape", "what", "where", "count", "exists", "describe", "locate")
CHANGES = {"recolour": "colour", "reshape": "shape", "resize": "size", "retexture": "texture"}
EDITS = ("add", "remove", "move", "background", *CHANGES)
PICTURE_OPS = ("edit", "draw", "upload", "undo", "story")
TALK_OPS = ("ask", "refer", "compare", "segment", "smalltalk", "impossible")


class Object(NamedTuple):
    """One thing on the board. The field names are the attributes a change may name."""

    colour: str
    shape: str
    size: str = SIZES[0]
    texture: str = TEXTURES[0]


class Scene(NamedTuple):
    """A background and, for each cell in reading order, its object or None."""

    background: str
    cells: tuple[Object | None, ...]

    @property
    def occupied(self) -> list[int]:
        """Cells that hold an object, in reading order."""
        return [cell for cell, thing in enumerate(self.cells) if thing]

    def find(self, **attributes: str) -> list[int]:
        """Cells whose object has all these attributes, in reading order."""
        found = self.occupied
        for name, value in attributes.items():
            found = [cell for cell in found if getattr(self.cells[cell], name) == value]
        return found

    def put(self, *changes: tuple[int, Object | None]) -> "Scene":
        """This scene with the given cells replaced."""
        cells = list(self.cells)
        for cell, thing in changes:
            cells[cell] = thing
        return Scene(self.background, tuple(cells))

    def differing(self, other: "Scene") -> list[int]:
        """Cells whose content is not the same in both."""
        return [cell for cell, (a, b) in enumerate(zip(self.cells, other.cells, strict=True)) if a != b]

    def digest(self) -> int:
        """A 32-bit number that depends on nothing but the content: it decides the split."""
        things = ",".join(" ".join(thing) if thing else "" for thing in self.cells)
        return zlib.crc32(f"{self.background}:{things}".encode())


@dataclass(frozen=True)
class WorldConfig:
    """Everything the world is made from. The defaults are preset "tiny".

    Attributes:
        px, grid: image side in pixels; cells per side. A cell is a whole number of pixels.
        shapes, colours, backgrounds, sizes, textures: what exists, by name.
        min_objects, max_objects: objects in a scene, uniform when drawn, and the bounds edits keep to.
        held_out_pairs: (colour, shape) that appear in split "pair" only, in pictures and in words.
        held_out_cells: shape -> cells it occupies in split "position" only.
        held_out_one_in: one scene in so many belongs to split "iid".
        max_images, max_words: where a dialogue stops; see :func:`umm_jax.world.dialogue.words`.
        first_upload: how often the first picture is the user's own rather than drawn on request.
        talk: least and most exchanges without a picture after each picture.
        picture_ops, talk_ops, questions, edits: relative weights.
        it: how often an edit says "it" where that is defined.
        undo_named: how often an undo names the picture to go back to, rather than saying "undo that".
        occupied: how often a question about a position names an occupied one.
        hard_negatives: how often "is there a" with answer no names two attributes that are both present.
        present: how often "how many" names an attribute that is present.
        evidence: whether the bot says what it found before "how many" and "is there" are answered.
        effect: whether the bot says what an edit changes before drawing it.
        shuffled: whether a drawing request lists objects in random rather than reading order.
        plural: whether "how many" names shapes in the plural.
        calls: whether the bot asks for pictures and masks by calls, see :mod:`umm_jax.world.calls`.
        chain: least and most requests of a turn, where there are calls.
        blurs: widths in pixels of the blurred templates of the judge.
        gate: largest root mean square residual of any cell, in units of full scale, of a valid picture.
    """

    px: int = 24
    grid: int = 3
    shapes: tuple[str, ...] = SHAPES[:4]
    colours: tuple[str, ...] = tuple(COLOURS)[:6]
    backgrounds: tuple[str, ...] = ("white", "black")
    sizes: tuple[str, ...] = SIZES[:1]
    textures: tuple[str, ...] = TEXTURES[:1]
    min_objects: int = 2
    max_objects: int = 4
    held_out_pairs: tuple[tuple[str, str], ...] = (("purple", "circle"), ("green", "triangle"))
    held_out_cells: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"square": (2, 6)}, hash=False)
    held_out_one_in: int = 8
    max_images: int = 3
    max_words: int = 128
    first_upload: float = 0.4
    talk: tuple[int, int] = (0, 4)
    picture_ops: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(PICTURE_OPS, 0.0) | {"edit": 0.8, "draw": 0.12, "upload": 0.08},
        hash=False,
    )
    talk_ops: dict[str, float] = field(
        default_factory=lambda: {"ask": 1.0} | dict.fromkeys(TALK_OPS[1:], 0.0), hash=False
    )
    questions: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(QUESTIONS, 1.0) | {"describe": 0.5}, hash=False
    )
    edits: dict[str, float] = field(
        default_factory=lambda: (
            dict.fromkeys(EDITS, 1.0) | {"background": 0.5, "resize": 0.0, "retexture": 0.0}
        ),
        hash=False,
    )
    it: float = 0.25
    undo_named: float = 0.3
    occupied: float = 0.85
    hard_negatives: float = 0.7
    present: float = 0.75
    evidence: bool = True
    effect: bool = True
    shuffled: bool = True
    plural: bool = False
    calls: bool = False
    chain: tuple[int, int] = (1, 1)
    blurs: tuple[float, ...] = (0.0, 0.6, 1.0)
    gate: float = 0.06

    def __post_init__(self):
        for name, known in _KNOWN.items():
            values = getattr(self, name)
            for value in values:
                if value not in known:
                    raise ConfigError(f"{name}: unknown {value!r}{suggest(value, list(known))}")
            if isinstance(values, Mapping):
                if min(values.values(), default=0) < 0 or not sum(values.values()) > 0:
                    raise ConfigError(f"{name}: weights must not be negative, nor all zero; got {values}")
            elif not values:
                raise ConfigError(f"{name}: at least one is needed")
        if not 2 <= self.grid <= 4 or self.px % self.grid or self.cell_px < 8:
            raise ConfigError(
                f"grid must be 2 to 4, and px a multiple of it with cells of 8 px or more; "
                f"got grid {self.grid}, px {self.px}"
            )
        if not 1 <= self.min_objects <= self.max_objects < self.grid**2:
            raise ConfigError(f"need 1 <= min_objects <= max_objects < {self.grid**2}")
        if not 0 <= self.talk[0] <= self.talk[1]:
            raise ConfigError(f"talk must be (least, most), got {self.talk}")
        if not 1 <= self.chain[0] <= self.chain[1] or (self.chain[1] > 1 and not self.calls):
            raise ConfigError(
                f"chain must be (least, most) from 1, and be (1, 1) without calls; it is {self.chain}"
            )
        if self.calls and (self.picture_ops.get("undo") or self.picture_ops.get("story")):
            raise ConfigError(
                "calls: there is none for undo and story; set their weights in picture_ops to 0"
            )
        # There are words for sixteen pictures, and split "length" shows twice as many as training.
        if not 1 <= self.max_images <= 8 or self.max_words < 48 or self.held_out_one_in < 2:
            raise ConfigError("need 1 <= max_images <= 8, max_words >= 48 and held_out_one_in >= 2")
        for colour, shape in self.held_out_pairs:
            if colour not in self.colours or shape not in self.shapes:
                raise ConfigError(f"held_out_pairs: there is no {colour} {shape} in this world")
        for shape, cells in self.held_out_cells.items():
            if shape not in self.shapes or any(not 0 <= cell < self.grid**2 for cell in cells):
                raise ConfigError(f"held_out_cells: no {shape!r}, or no such cell, in this world")
        if not self.kinds:
            raise ConfigError("held_out_pairs leave nothing to train on")
        seen = {thing.shape for thing in self.kinds}
        open_to = [c for c in range(self.cells) if any(c not in self.held_out_cells.get(s, ()) for s in seen)]
        if len(open_to) < self.min_objects:
            raise ConfigError(
                f"held_out_cells leave {len(open_to)} cells to train on, and a scene has min_objects = "
                f"{self.min_objects}; hold out fewer cells, or of fewer shapes"
            )

    @classmethod
    def preset(cls, name: str = "tiny", **overrides: Any) -> "WorldConfig":
        """A named world with some fields replaced; weights given in part are merged into the preset's.

        Raises:
            ConfigError: unknown preset, field or value.
        """
        if name not in PRESETS:
            raise ConfigError(f"world preset {name!r} is unknown{suggest(name, list(PRESETS))}")
        base = cls(**PRESETS[name])
        values = {f.name: getattr(base, f.name) for f in dataclasses.fields(cls)}
        for key, value in overrides.items():
            merge = key in _KNOWN and isinstance(values.get(key), Mapping) and isinstance(value, Mapping)
            values[key] = {**values[key], **value} if merge else value
        return from_dict(cls, values, "world")

    @classmethod
    def of(cls, run: RunConfig) -> "WorldConfig":
        """The world a run learnt from; one that learnt from other data is asked about the default one.

        Raises:
            ConfigError: unknown preset, field or value.
        """
        return cls.preset(run.world.preset, **run.world.overrides)

    @property
    def cell_px(self) -> int:
        return self.px // self.grid

    @property
    def cells(self) -> int:
        return self.grid**2

    @property
    def objects(self) -> list[Object]:
        """Every object there can be."""
        return [Object(*o) for o in itertools.product(self.colours, self.shapes, self.sizes, self.textures)]

    @property
    def kinds(self) -> list[Object]:
        """The objects that may be seen in training."""
        return [o for o in self.objects if (o.colour, o.shape) not in self.held_out_pairs]


_KNOWN = {
    "shapes": SHAPES,
    "colours": COLOURS,
    "backgrounds": BACKGROUNDS,
    "sizes": SIZES,
    "textures": TEXTURES,
    "picture_ops": PICTURE_OPS,
    "talk_ops": TALK_OPS,
    "questions": QUESTIONS,
    "edits": EDITS,
}

# By position and number: a shape or colour added later leaves the worlds that exist as they were.
_TALKATIVE = {
    "sizes": SIZES[:2],
    "shapes": SHAPES[:6],
    "colours": tuple(COLOURS)[:8],
    "held_out_pairs": (
        ("purple", "circle"),
        ("green", "triangle"),
        ("cyan", "cross"),
        ("red", "diamond"),
        ("orange", "square"),
        ("blue", "ring"),
    ),
    "held_out_cells": {"square": (3, 12)},
    "picture_ops": {"edit": 0.62, "draw": 0.12, "upload": 0.08, "undo": 0.12, "story": 0.06},
    "talk_ops": {
        "ask": 0.60,
        "refer": 0.12,
        "compare": 0.08,
        "segment": 0.06,
        "smalltalk": 0.07,
        "impossible": 0.07,
    },
    "plural": True,
    # Small objects fill less of their cell, so a ghost of one moves the residual less.
    "gate": 0.05,
}

# "small" has more kinds of things and ways to talk than "tiny"; "full" textures and more backgrounds too.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": _TALKATIVE
    | {
        "px": 48,
        "grid": 4,
        "min_objects": 1,
        "max_objects": 6,
        "max_images": 4,
        "max_words": 256,
        "edits": dict.fromkeys(EDITS, 1.0) | {"background": 0.5, "retexture": 0.0},
    },
    "full": _TALKATIVE
    | {
        "px": 64,
        "grid": 4,
        "backgrounds": tuple(BACKGROUNDS)[:4],
        "textures": TEXTURES[:2],
        "min_objects": 1,
        "max_objects": 8,
        "max_images": 8,
        "max_words": 768,
        "edits": dict.fromkeys(EDITS, 1.0) | {"background": 0.5},
    },
}
