"""The words of the world: sentences for every operation and answer, and the meaning of answers.

Sentences are words separated by single spaces, punctuation included. Row and column come last in an object
phrase: whoever reads from left to right has the whole object by the column word.
"""

from collections.abc import Sequence
from typing import Any

from umm_jax.world.scene import CHANGES, Object, Scene, WorldConfig
from umm_jax.world.state import About, Count, Edit, Exists, Question

ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom"), 4: ("top", "upper", "lower", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "center", "right"), 4: ("left", "midleft", "midright", "right")}
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    *("eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth"),
)
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}
PLURALS = {"cross": "crosses"}
SMALLTALK = {
    "hello": "hello",
    "good morning": "good morning",
    "how are you": "fine thank you",
    "thank you": "you are welcome",
    "that is nice": "thank you",
    "what is your name": "i am a bot",
}
WHICH = "which one"
UNDO = "undo that"


class Grammar:
    """Says and understands the sentences of one world."""

    def __init__(self, config: WorldConfig):
        self.config = config
        grid = config.grid
        self.place = [f"{row} {column}" for row in ROWS[grid] for column in COLUMNS[grid]]
        self._cell = {place: cell for cell, place in enumerate(self.place)}
        self.phrase = {thing: self._phrase(thing) for thing in config.objects}
        self._object = {phrase: thing for thing, phrase in self.phrase.items()}
        self.plural = {s: PLURALS.get(s, s + "s") if config.plural else s for s in config.shapes}

    def _phrase(self, thing: Object) -> str:
        words = [thing.size] if len(self.config.sizes) > 1 else []
        # The first texture goes without saying.
        words += [thing.texture] if thing.texture != self.config.textures[0] else []
        return " ".join([*words, thing.colour, thing.shape])

    # --- scenes ---

    def scene(self, scene: Scene, order: Sequence[int] | None = None) -> str:
        """Such as "on white : red circle top left and ..."; `order` lists the occupied cells."""
        cells = scene.occupied if order is None else order
        things = [f"{self.phrase[scene.cells[cell]]} {self.place[cell]}" for cell in cells]
        return f"on {scene.background} : {' and '.join(things) or 'nothing'}"

    def parse_scene(self, text: str) -> Scene | None:
        """The meaning of :meth:`scene` in any order; None when it is no description of a scene."""
        head, colon, tail = text.partition(" : ")
        words = head.split()
        if not colon or len(words) != 2 or words[0] != "on" or words[1] not in self.config.backgrounds:
            return None
        cells: list[Object | None] = [None] * self.config.cells
        for phrase in [] if tail == "nothing" else tail.split(" and "):
            phrase, place = phrase.rsplit(" ", 2)[0], " ".join(phrase.rsplit(" ", 2)[1:])
            cell = self._cell.get(place)
            if cell is None or phrase not in self._object or cells[cell]:
                return None
            cells[cell] = self._object[phrase]
        return Scene(words[1], tuple(cells))

    def draw(self, scene: Scene, order: Sequence[int] | None = None) -> str:
        return f"draw {self.scene(scene, order)}"

    def changes(self, before: Scene, after: Scene) -> str:
        """What is different: cells that became empty first, then filled ones, then the background."""
        cells = before.differing(after)
        said = [f"{self.place[c]} empty" for c in cells if not after.cells[c]]
        said += [f"{self.place[c]} {self.phrase[after.cells[c]]}" for c in cells if after.cells[c]]
        if before.background != after.background:
            said.append(f"background {after.background}")
        return " and ".join(said) or "nothing"

    def effect(self, before: Scene, after: Scene) -> str:
        """What the bot says before it draws the result of an edit."""
        return f"ok {self.changes(before, after)}" if self.config.effect else "ok"

    # --- requests ---

    def about(self, about: About) -> str:
        """Attributes as a phrase: "small red circle"."""
        return " ".join(value for _, value in about)

    def edit(self, edit: Edit, about: About | None) -> str:
        """`about` refers to the object the edit changes; None says "it"."""
        it = "it" if about is None else f"the {self.about(about)}"
        match edit.kind:
            case "add":
                return f"add {self.phrase[edit.value]} {self.place[edit.cell]}"
            case "remove":
                return f"remove {it}"
            case "move":
                return f"move {it} to {self.place[edit.value]}"
            case "background":
                return f"background {edit.value}"
        return f"make {it} {edit.value}"

    def parse_edit(self, text: str, scene: Scene) -> Edit | None:
        """The meaning of :meth:`edit` for a scene; None where it is no such request, or cannot be met."""
        words = text.split()
        match words:
            case ["background", value] if value in self.config.backgrounds:
                return Edit("background", None, value)
            case ["add", *thing, row, column]:
                kind, cell = self._object.get(" ".join(thing)), self._cell.get(f"{row} {column}")
                free = kind is not None and cell is not None and scene.cells[cell] is None
                return Edit("add", cell, kind) if free else None
            case ["remove", "the", *about]:
                cell = self._meant(about, scene)
                return None if cell is None else Edit("remove", cell)
            case ["move", "the", *about, "to", row, column]:
                cell, to = self._meant(about, scene), self._cell.get(f"{row} {column}")
                free = cell is not None and to is not None and scene.cells[to] is None
                return Edit("move", cell, to) if free else None
            case ["make", "the", *about, value]:
                cell = self._meant(about, scene)
                kinds = [k for k, name in CHANGES.items() if value in getattr(self.config, f"{name}s")]
                return None if cell is None or not kinds else Edit(kinds[0], cell, value)
        return None

    def _meant(self, words: Sequence[str], scene: Scene) -> int | None:
        """The one object with all these attributes."""
        named = {}
        for word in words:
            names = [name for name in CHANGES.values() if word in getattr(self.config, f"{name}s")]
            if not names:
                return None
            named[names[0]] = word
        found = scene.find(**named) if named else []
        return found[0] if len(found) == 1 else None

    def question(self, question: Question) -> str:
        kind, cell, about = question
        match kind:
            case "colour":
                return f"what color at {self.place[cell]}"
            case "shape":
                return f"what shape at {self.place[cell]}"
            case "what":
                return f"what is at {self.place[cell]}"
            case "where":
                return f"where is the {self.about(about)}"
            case "count":
                things = self.about(about) or "objects"
                return f"how many {self.plural.get(things, things)}"
            case "exists":
                return f"is there a {self.about(about)}"
            case "describe":
                return "describe"
            case "locate" | "segment":
                return f"{kind} the {self.about(about)}"
        raise ValueError(f"no such question: {kind}")

    # --- answers ---

    def answer(self, question: Question, meaning: Any) -> str:
        """The sentence for a meaning of :func:`umm_jax.world.state.answer` (text questions only)."""
        match question.kind:
            case "colour" | "shape":
                return meaning or "nothing"
            case "what":
                return self.phrase[meaning] if meaning else "nothing"
            case "where":
                return self.place[meaning]
            case "count":
                if meaning.evidence is None or not self.config.evidence:
                    return str(meaning.value)
                found = " and ".join(self.place[cell] for cell in meaning.evidence) or "none"
                return f"{found} so {meaning.value}"
            case "exists":
                verdict = "yes" if meaning.value else "no"
                if meaning.evidence is None or not self.config.evidence:
                    return verdict
                colour = dict(question.about)["colour"]
                found = " and ".join(f"{colour} {shape}" for shape in meaning.evidence) or f"no {colour}"
                return f"{found} so {verdict}"
            case "describe":
                return self.scene(meaning)
        raise ValueError(f"{question.kind} is not answered in words")

    def parse_answer(self, question: Question, text: str) -> tuple[bool, Any]:
        """(understood, meaning) of a reply in words; the meaning is that of :func:`state.answer`.

        Evidence is optional whatever the configuration says, and None when missing or not understood.
        """
        text = " ".join(text.split())
        match question.kind:
            case "colour" | "shape":
                known = self.config.colours if question.kind == "colour" else self.config.shapes
                return text in known or text == "nothing", text if text in known else None
            case "what":
                return text in self._object or text == "nothing", self._object.get(text)
            case "where":
                return text in self._cell, self._cell.get(text)
            case "describe":
                scene = self.parse_scene(text)
                return scene is not None, scene
        evidence, so, verdict = text.rpartition(" so ")
        if question.kind == "count":
            if not verdict.isascii() or not verdict.isdigit():
                return False, None
            cells = [] if evidence == "none" else [self._cell.get(p) for p in evidence.split(" and ")]
            return True, Count(int(verdict), tuple(cells) if so and None not in cells else None)
        if question.kind == "exists":
            if verdict not in ("yes", "no"):
                return False, None
            colour = dict(question.about)["colour"]
            found = [] if evidence == f"no {colour}" else [p.split() for p in evidence.split(" and ")]
            known = so and all(len(p) == 2 and p[0] == colour and p[1] in self.config.shapes for p in found)
            return True, Exists(verdict == "yes", tuple(p[1] for p in found) if known else None)
        raise ValueError(f"{question.kind} is not answered in words")

    def parse_effect(self, before: Scene, text: str) -> Scene | None:
        """The scene that :meth:`effect` announces; None when it is no such announcement."""
        words = text.split()
        if words[:1] != ["ok"] or len(words) == 1:
            return None
        after = before
        for change in [] if words[1:] == ["nothing"] else " ".join(words[1:]).split(" and "):
            first, _, rest = change.partition(" ")
            if first == "background" and rest in self.config.backgrounds:
                after = Scene(rest, after.cells)
                continue
            cell = self._cell.get(" ".join(change.split()[:2]))
            thing = " ".join(change.split()[2:])
            if cell is None or thing != "empty" and thing not in self._object:
                return None
            after = after.put((cell, self._object.get(thing)))
        return after

    # --- pictures, stories, refusals ---

    def ordinal(self, index: int) -> str:
        return f"the {ORDINALS[index]} picture"

    def in_picture(self, name: str, question: Question) -> str:
        return f"in {name} {self.question(question)}"

    def more(self, about: About) -> str:
        things = self.question(Question("count", None, about)).removeprefix("how many ")
        return f"which picture has more {things}"

    def between(self, first: str, second: str) -> str:
        return f"what changed between {first} and {second}"

    def story(self, steps: int, about: About, rule: str) -> str:
        return f"tell a {steps} step story : the {self.about(about)} {rule}"

    def step(self, number: int, before: Scene, after: Scene) -> str:
        said = f" : {self.changes(before, after)}" if self.config.effect else ""
        return f"step {number}{said}"

    def missing(self, about: About) -> str:
        return f"there is no {self.about(about)}"
