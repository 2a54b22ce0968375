"""The explicit state of a dialogue, and what edits and questions mean: total functions on scenes.

Nothing here knows words; :mod:`umm_jax.world.grammar` does.
"""

from typing import Any, NamedTuple

from umm_jax.world.scene import CHANGES, Object, Scene

# Attributes that pick out objects: (("colour", "red"), ("shape", "ring")).
About = tuple[tuple[str, str], ...]


class Picture(NamedTuple):
    """One showing of a scene.

    Attributes:
        ref: its key among the images; an undone edit shows an earlier key again.
        turn: index of the turn that shows it.
        origin: "draw", "upload", "edit", "undo" or "story".
        parent: index of the picture it was made from, or None.
    """

    ref: str
    scene: Scene
    turn: int
    origin: str
    parent: int | None = None


class State(NamedTuple):
    """What has happened so far.

    Attributes:
        pictures: every showing, oldest first.
        focus: index of the picture that "it" and plain questions are about (-1: none yet).
        salient: cell in the focus picture of the object last singled out, or None: what "it" means.
        salient_turn: the user turn that singled it out.
        log: operations so far.
    """

    pictures: tuple[Picture, ...] = ()
    focus: int = -1
    salient: int | None = None
    salient_turn: int = -1
    log: tuple[str, ...] = ()

    @property
    def picture(self) -> Picture:
        return self.pictures[self.focus]

    @property
    def scene(self) -> Scene:
        return self.pictures[self.focus].scene


# --- edits ----------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """A change of a scene.

    | kind | cell | value |
    |---|---|---|
    | add | where | Object |
    | remove | which | None |
    | move | which | cell it goes to |
    | background | None | name |
    | recolour, reshape, resize, retexture | which | new colour, shape, size, texture |
    """

    kind: str
    cell: int | None = None
    value: Any = None

    def program(self) -> list:
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return ["edit", self.kind, self.cell, value]


def apply(edit: Edit, scene: Scene) -> Scene:
    """The scene after the edit."""
    match edit.kind:
        case "add":
            return scene.put((edit.cell, edit.value))
        case "remove":
            return scene.put((edit.cell, None))
        case "move":
            return scene.put((edit.cell, None), (edit.value, scene.cells[edit.cell]))
        case "background":
            return Scene(edit.value, scene.cells)
    changed = scene.cells[edit.cell]._replace(**{CHANGES[edit.kind]: edit.value})
    return scene.put((edit.cell, changed))


def salient_after(edit: Edit, salient: int | None) -> int | None:
    """The cell "it" means after the edit."""
    match edit.kind:
        case "remove":
            return None
        case "move":
            return edit.value
        case "background":
            return salient
    return edit.cell


# --- questions ------------------------------------------------------------------------------------


class Question(NamedTuple):
    """Something to ask of one picture.

    `cell` is the position of "colour", "shape" and "what"; `about` names the objects of "where", "locate",
    "segment", "count" (empty: all objects) and "exists".
    """

    kind: str
    cell: int | None = None
    about: About = ()

    def program(self) -> list:
        return ["ask", self.kind, self.cell, [list(pair) for pair in self.about]]


class Count(NamedTuple):
    """How many, and where they are (None: not said)."""

    value: int
    evidence: tuple[int, ...] | None = None


class Exists(NamedTuple):
    """Whether, and the shapes of everything of that colour in reading order (None: not said)."""

    value: bool
    evidence: tuple[str, ...] | None = None


def answer(question: Question, scene: Scene) -> Any:
    """The meaning of the right answer.

    Returns:
        colour, shape: str or None for an empty cell. what: Object or None. where, locate, segment: the
        cell, or None when not exactly one object fits. count: Count. exists: Exists. describe: Scene.
    """
    kind, cell, about = question
    if kind in ("colour", "shape", "what"):
        thing = scene.cells[cell]
        return thing if thing is None or kind == "what" else getattr(thing, kind)
    if kind == "describe":
        return scene
    found = scene.find(**dict(about))
    if kind == "count":
        return Count(len(found), tuple(found))
    if kind == "exists":
        colour = dict(about)["colour"]
        return Exists(bool(found), tuple(scene.cells[c].shape for c in scene.find(colour=colour)))
    return found[0] if len(found) == 1 else None


def mentions(question: Question, scene: Scene) -> int | None:
    """The one object a question singles out, if it does."""
    if question.kind in ("colour", "shape", "what"):
        return question.cell if scene.cells[question.cell] else None
    return answer(question, scene) if question.kind in ("where", "locate", "segment") else None


def reference(scene: Scene, cell: int) -> About | None:
    """The fewest attributes, colour and shape always among them, that single out the object in `cell`."""
    thing = scene.cells[cell]
    others = [o for c, o in enumerate(scene.cells) if o and c != cell]
    for names in (("colour", "shape"), ("size", "colour", "shape"), ("size", "texture", "colour", "shape")):
        wanted = [getattr(thing, name) for name in names]
        if all([getattr(o, name) for name in names] != wanted for o in others):
            return tuple(zip(names, wanted, strict=True))
    return None


def kinds_absent(scene: Scene, kinds: list[Object]) -> list[tuple[str, str]]:
    """(colour, shape) of `kinds` that no object of the scene has."""
    present = {(o.colour, o.shape) for o in scene.cells if o}
    return list(dict.fromkeys((o.colour, o.shape) for o in kinds if (o.colour, o.shape) not in present))
