"""Choosing what to do to a scene and what to ask about it, inside a split."""

import random
from bisect import bisect
from collections.abc import Callable, Mapping

from umm_jax.world.scene import CHANGES, Object, Scene, WorldConfig
from umm_jax.world.splits import get_split
from umm_jax.world.state import Count, Edit, Exists, Question, answer, apply, kinds_absent, reference
from umm_jax.world.talk import World, world

TRIES = 4  # proposals per step of a training dialogue before something else is said
PATIENT = 200  # proposals where a held-out scene must be hit


class Choice:
    """A weighted choice prepared once: names in order, drawn with one random number."""

    def __init__(self, weights: Mapping[str, float]):
        self.names = [name for name, weight in weights.items() if weight > 0]
        self._sums: list[float] = []
        for name in self.names:
            self._sums.append((self._sums[-1] if self._sums else 0.0) + weights[name])

    def __call__(self, rng: random.Random) -> str:
        return self.names[bisect(self._sums, rng.random() * self._sums[-1], 0, len(self.names) - 1)]


class Chooser:
    """Chooses scenes, edits and questions of one world."""

    def __init__(self, config: WorldConfig):
        self.config = config
        self.world: World = world(config)
        self._question = Choice(config.questions)
        self._edit = Choice(config.edits)

    # --- what to do to a scene ---

    def edit(
        self,
        rng: random.Random,
        scene: Scene,
        split: str,
        salient: int | None = None,
        accept: Callable[[Edit, Scene], bool] = lambda edit, after: True,
    ) -> tuple[Edit, bool] | None:
        """An edit that leads into the split, and whether it says "it"; None when none was hit upon.

        `salient` is what "it" means, if anything.
        """
        reach = get_split(split).reach
        holdout = self.world.holdout
        for _ in range(TRIES if split == "train" else PATIENT):
            it = salient is not None and rng.random() < self.config.it
            edit = self._propose(rng, self._edit(rng), scene, split, salient if it else None)
            if edit is None:
                continue
            after = apply(edit, scene)
            if after != scene and holdout.scene_class(after) in reach and accept(edit, after):
                return edit, it and edit.cell == salient and edit.kind not in ("add", "background")
        return None

    def _propose(self, rng, kind: str, scene: Scene, split: str, cell: int | None) -> Edit | None:
        config = self.config
        if kind == "background":
            return Edit(kind, None, rng.choice(config.backgrounds))
        occupied = scene.occupied
        empty = [c for c, thing in enumerate(scene.cells) if not thing]
        if kind == "add":
            if len(occupied) >= config.max_objects:
                return None
            return Edit(kind, rng.choice(empty), rng.choice(self.world.holdout.kinds(split)))
        if cell is None:
            cell = rng.choice(occupied) if occupied else None
            if cell is None or reference(scene, cell) is None:
                return None
        if kind == "remove":
            return Edit(kind, cell) if len(occupied) > config.min_objects else None
        if kind == "move":
            return Edit(kind, cell, rng.choice(empty))
        return Edit(kind, cell, rng.choice(getattr(config, CHANGES[kind] + "s")))

    # --- what to ask about a scene ---

    def question(
        self, rng: random.Random, scene: Scene, split: str, kind: str = "", telling: bool = False
    ) -> Question | None:
        """A question with an answer, of a kind drawn by weight unless given; None when none was hit upon.

        Kinds "yes", "no" and "hard" (no, but both attributes are present) are "exists" with that verdict.
        `telling` asks about what the split holds out.
        """
        config = self.config
        cells = self.world.holdout.telling(split, scene) if telling else scene.occupied
        if not cells:
            return None
        match kind or self._question(rng):
            case "colour" | "shape" | "what" as kind:
                empty = [c for c, thing in enumerate(scene.cells) if not thing]
                asked = cells if telling or rng.random() < config.occupied else empty
                return Question(kind, rng.choice(asked))
            case "where" | "locate" | "segment" as kind:
                about = reference(scene, rng.choice(cells))
                return about and Question(kind, None, about)
            case "count":
                name = rng.choice(("shape", "colour") if telling else ("", "shape", "colour"))
                if not name:
                    return Question("count")
                present = telling or rng.random() < config.present
                values = getattr(config, f"{name}s")
                if present:
                    values = [getattr(scene.cells[c], name) for c in cells]
                return Question("count", None, ((name, rng.choice(values)),))
            case "exists" | "yes" | "no" | "hard" as verdict:
                return self._exists(rng, scene, split, cells, telling, verdict)
        return Question("describe")

    def _exists(self, rng, scene: Scene, split, cells, telling: bool, verdict: str) -> Question | None:
        if verdict == "yes" or verdict == "exists" and rng.random() < 0.5:
            thing = scene.cells[rng.choice(cells)]
            colour, shape = thing.colour, thing.shape
        else:
            things = [scene.cells[c] for c in scene.occupied]
            absent = kinds_absent(scene, self.world.holdout.kinds(split))
            if telling and split == "pair":
                absent = [kind for kind in absent if kind in self.config.held_out_pairs]
            colours, shapes = {o.colour for o in things}, {o.shape for o in things}
            hard = [(c, s) for c, s in absent if c in colours and s in shapes]
            share = self.config.hard_negatives
            pool = absent
            if verdict == "hard" or verdict == "exists" and hard and rng.random() < share:
                pool = hard
            if not pool:
                return None
            colour, shape = rng.choice(pool)
        return Question("exists", None, (("colour", colour), ("shape", shape)))

    # --- what misleads ---

    def distractor(self, rng: random.Random, scene: Scene, split: str) -> Scene | None:
        """A scene easily taken for `scene`: its objects, one exchanged, in other cells; None: none found."""
        reach, holdout = get_split(split).reach, self.world.holdout
        things: list[Object | None] = list(scene.cells)
        for _ in range(PATIENT):
            other = things.copy()
            cell = rng.choice(scene.occupied)
            other[cell] = rng.choice(holdout.kinds(split))
            rng.shuffle(other)
            candidate = Scene(rng.choice(self.config.backgrounds), tuple(other))
            # One object that moved, and one cell that holds another object: both can mislead.
            pairs = list(zip(scene.cells, candidate.cells, strict=True))
            moved = any(a and a != b and a in candidate.cells for a, b in pairs)
            crossed = any(a and b and a != b for a, b in pairs)
            if moved and crossed and holdout.scene_class(candidate) in reach:
                return candidate
        return None

    def misleading(self, rng, scene: Scene, distractor: Scene, split: str, kind: str = "") -> Question | None:
        """A question about `scene` that `distractor` would answer too, and otherwise."""
        for _ in range(PATIENT):
            question = self.question(rng, scene, split, kind)
            if question is None:
                continue
            other, right = answer(question, distractor), answer(question, scene)
            if isinstance(right, Count | Exists):
                other, right = other.value, right.value  # other evidence for the same verdict misleads nobody
            if other is not None and other != right:
                return question
        return None


def misplaced(edit: Edit, scene: Scene, other: Scene) -> bool:
    """Whether the edit changes an object of `scene` that `other` has too, but in another cell."""
    thing = scene.cells[edit.cell] if edit.cell is not None else None
    return thing is not None and thing in other.cells and other.cells[edit.cell] != thing
