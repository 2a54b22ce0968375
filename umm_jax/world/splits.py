"""What is held out, decided by the content of a scene alone, so that no list of test items need be kept.

Every scene belongs to exactly one class:

    pair       holds a (colour, shape) of `held_out_pairs`
    position   holds a shape in one of its `held_out_cells`
    mixed      both of these; used nowhere
    iid        none of these, and its digest is 0 modulo `held_out_one_in`
    train      all the rest

Training dialogues start from, and edit into, scenes of class train only; the held-out pairs are not named
there either. The remaining splits hold out a way of talking rather than a scene; they use iid scenes.
"""

import random
from dataclasses import dataclass

from umm_jax.config import suggest
from umm_jax.errors import ConfigError
from umm_jax.world.scene import Object, Scene, WorldConfig


@dataclass(frozen=True)
class Split:
    """A split by name.

    Attributes:
        start: class of the scenes a conversation begins with.
        reach: classes an edit may lead into.
        measures: what a score on it says.
    """

    start: str
    reach: tuple[str, ...]
    measures: str


SPLITS = {
    "train": Split("train", ("train",), "fit"),
    "iid": Split("iid", ("iid",), "unseen scenes"),
    # Taking the rare thing away leaves an ordinary unseen scene; anything else would leak into training.
    "pair": Split("pair", ("pair", "iid"), "colours and shapes never seen together"),
    "position": Split("position", ("position", "iid"), "a shape in cells where it was never seen"),
    "length": Split("iid", ("iid",), "more pictures than any training dialogue has"),
    "distance": Split("iid", ("iid",), "5 to 8 exchanges between a picture and the turn that needs it"),
    "hard-distractor": Split("iid", ("iid",), "another picture or object gives another plausible answer"),
}
DISTANCES = (5, 8)
TRIES = 20_000  # a scene of a rare class is found in far fewer


def get_split(name: str) -> Split:
    """Raises ConfigError on an unknown name."""
    if name not in SPLITS:
        raise ConfigError(f"split {name!r} is unknown{suggest(name, list(SPLITS))}")
    return SPLITS[name]


class Holdout:
    """Classes of the scenes of one world, and scenes of a wanted class."""

    def __init__(self, config: WorldConfig):
        self.config = config
        self.rare = {o for o in config.objects if (o.colour, o.shape) in config.held_out_pairs}
        self.rare_cells = {shape: frozenset(cells) for shape, cells in config.held_out_cells.items()}
        self._all, self._common = config.objects, config.kinds
        self._rare_list = [o for o in self._all if o in self.rare]
        self._misplaced = [(o, cell) for o in self._common for cell in self.rare_cells.get(o.shape, ())]
        self._misplaced.sort()

    def scene_class(self, scene: Scene) -> str:
        """One of train, iid, pair, position, mixed."""
        pair = position = False
        for cell, thing in enumerate(scene.cells):
            if thing:
                pair |= thing in self.rare
                position |= cell in self.rare_cells.get(thing.shape, ())
        if pair or position:
            return "mixed" if pair and position else "pair" if pair else "position"
        return "train" if scene.digest() % self.config.held_out_one_in else "iid"

    def kinds(self, split: str) -> list[Object]:
        """Objects that may be named in a split."""
        return self._all if split == "pair" else self._common

    def telling(self, split: str, scene: Scene) -> list[int]:
        """The cells a question must be about to measure what the split measures."""
        if split == "pair":
            return [cell for cell in scene.occupied if scene.cells[cell] in self.rare]
        if split == "position":
            return [c for c in scene.occupied if c in self.rare_cells.get(scene.cells[c].shape, ())]
        return scene.occupied

    def sample(self, rng: random.Random, split: str) -> Scene:
        """A scene of the class in which conversations of the split begin; object count uniform.

        Raises:
            ConfigError: an unknown split, or one of which this world has no scene to be found.
        """
        config, wanted = self.config, get_split(split).start
        if wanted == "pair" and not self._rare_list or wanted == "position" and not self._misplaced:
            raise ConfigError(f"this world holds out nothing for split {split!r}")
        for _ in range(TRIES):
            cells: list[Object | None] = [None] * config.cells
            places = rng.sample(range(config.cells), rng.randint(config.min_objects, config.max_objects))
            for cell in places:
                cells[cell] = rng.choice(self._common)
            if wanted == "pair":
                cells[places[0]] = rng.choice(self._rare_list)
            elif wanted == "position":
                thing, cell = rng.choice(self._misplaced)
                cells[cell], cells[places[0]] = thing, cells[cell]
            scene = Scene(rng.choice(config.backgrounds), tuple(cells))
            if self.scene_class(scene) == wanted:
                return scene
        raise ConfigError(
            f"no scene of split {split!r} in {TRIES} tries: held_out_pairs and held_out_cells overlap, "
            "or leave next to nothing"
        )
