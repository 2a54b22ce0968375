"""What shortcuts score: replies made without the skill in question, judged by the same scorer.

A figure that does not stand clear of these is not evidence of the skill.

| oracle | reply |
|---|---|
| majority | the most frequent right answer in a training sample, by type of question |
| majority_by_question | the same, by the exact question ("how many red" apart from "how many objects") |
| everything | a mask of all there is |
| bag | anything present: the colour, shape, object, position or number of a random object; "yes" when both |
|     | attributes are present |
| random_cells | the right objects, in random cells |
| blank | the right background, no objects |
| copy_last_image | the picture as it was |
| random_object | the requested edit, done to a random object |
| no_history | sees the last user turn only: draws what it names, guesses the rest by majority |
| recency | right about the picture shown last; takes "it" for a random object of it |
| wrong_picture | right about the other picture |

Where a dialogue needs both pictures and answers, each of its oracles combines one of each kind.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from umm_jax.conversation import Box, Image, ImageData, Mask, Part, Text, Turn
from umm_jax.world import skills
from umm_jax.world.judge import Judge
from umm_jax.world.scene import Scene
from umm_jax.world.skills import Expected, Item
from umm_jax.world.state import Count, Edit, Exists, Question, answer, apply
from umm_jax.world.talk import region, world

# Oracles that see, draw and say everything rightly and err only in which picture or object is meant. They
# tell how much of a skill needs that memory, and may be near 1 where none is needed; every other oracle
# lacks the skill itself.
IDEALS = ("recency", "wrong_picture")

VOTERS = 600  # items whose right answers make the majority
_ASKING = ("vqa", "exists", "count", "describe", "locate", "dialogue", "chain")
Guess = Scene | Sequence[Part]  # what a reply shows, or what it says
Oracle = Callable[["_Room", Expected, random.Random], Guess]


class _Room:
    """What all oracles may look at: the world, and what is usually answered in it."""

    def __init__(self, judge: Judge, skill: str):
        self.config = judge.config
        self.world = world(judge.config)
        votes: dict = {}
        usual = skills.items(judge.config, skill, "train", VOTERS if skill in _ASKING else 0, VOTERS)
        asked = [step for item in usual for step in item.expected if step.question]
        for step in (step for step in asked if step.question.kind != "segment"):
            said = self._verdict(step)
            for key in (step.question.kind, (step.question.kind, step.question.about)):
                votes.setdefault(key, Counter())[said] += 1
        self.majorities = {key: counter.most_common(1)[0][0] for key, counter in votes.items()}

    def _verdict(self, step: Expected) -> tuple[Part, ...]:
        """The right answer without evidence, which would split the votes, and without a picture's name."""
        meaning = answer(step.question, step.before)
        if isinstance(meaning, Count | Exists):
            return tuple(self.say(step.question, type(meaning)(meaning.value)))
        parts = step.answer.parts
        return tuple(dataclasses.replace(p, of="") if isinstance(p, Box | Mask) else p for p in parts)

    def say(self, question: Question, meaning) -> list[Part]:
        return [Text(self.world.grammar.answer(question, meaning))]

    def scatter(self, rng: random.Random, scene: Scene) -> Scene:
        """The objects of a scene in random cells."""
        cells = list(scene.cells)
        rng.shuffle(cells)
        return Scene(scene.background, tuple(cells))

    def empty(self, background: str) -> Scene:
        return Scene(background, (None,) * self.config.cells)


# --- answers --------------------------------------------------------------------------------------


def _majority(room: _Room, step: Expected, rng) -> Guess:
    return room.majorities[step.question.kind]


def _usual(room: _Room, step: Expected, rng) -> Guess:
    """By majority; no mask is frequent, so a random object's."""
    return (_bag if step.question.kind == "segment" else _majority)(room, step, rng)


def _everything(room: _Room, step: Expected, rng) -> Guess:
    """A mask of the whole picture."""
    return [Mask.from_array("", np.ones((room.config.px, room.config.px), bool))]


def _majority_by_question(room: _Room, step: Expected, rng) -> Guess:
    """Questions that training never asks are answered like others of their type."""
    kind, _, about = step.question
    return room.majorities.get((kind, about), room.majorities[kind])


def _bag(room: _Room, step: Expected, rng) -> Guess:
    question, scene = step.question, step.before
    cell = rng.choice(scene.occupied)
    thing = scene.cells[cell]
    match question.kind:
        case "colour" | "shape":
            return room.say(question, getattr(thing, question.kind))
        case "what":
            return room.say(question, thing)
        case "where":
            return room.say(question, cell)
        case "locate" | "segment" as kind:
            return [region(room.world, kind, "", scene, cell)]
        case "describe":
            return room.say(question, room.scatter(rng, scene))
        case "count":
            name = rng.choice(("colour", "shape"))
            return room.say(question, Count(len(scene.find(**{name: getattr(thing, name)}))))
    present = all(scene.find(**{name: value}) for name, value in question.about)
    return room.say(question, Exists(present))


def _about(room: _Room, step: Expected, scene: Scene, rng) -> Guess:
    """The answer that is right for `scene`; by majority where it has none."""
    meaning = answer(step.question, scene)
    if (kind := step.question.kind) in ("locate", "segment"):
        found = [region(room.world, kind, "", scene, meaning)] if meaning is not None else None
        return found or _usual(room, step, rng)
    if step.question.kind == "where" and meaning is None:
        return _majority(room, step, None)
    return room.say(step.question, meaning)


def _answer_recent(room: _Room, step: Expected, rng) -> Guess:
    return _about(room, step, step.recent, rng)


def _answer_wrong(room: _Room, step: Expected, rng) -> Guess:
    return _about(room, step, step.distractor or step.recent, rng)


# --- pictures -------------------------------------------------------------------------------------


def _right(room: _Room, step: Expected, rng) -> Guess:
    return step.target


def _random_cells(room: _Room, step: Expected, rng) -> Guess:
    return room.scatter(rng, step.target)


def _blank(room: _Room, step: Expected, rng) -> Guess:
    return room.empty(step.target.background)


def _copy(room: _Room, step: Expected, rng) -> Guess:
    """Before the first picture of a dialogue there is none to copy: an empty board."""
    return step.recent or room.empty(rng.choice(room.config.backgrounds))


def _random_object(room: _Room, step: Expected, rng) -> Guess:
    """A drawing has no referent: its objects go to random cells."""
    edit, scene = step.edit, step.before
    if edit is None:
        return _random_cells(room, step, rng)
    if edit.kind == "background":
        return step.target
    if edit.kind == "add":
        # Add names its cell, and no other object; what is random here is the cell.
        free = [cell for cell, thing in enumerate(scene.cells) if not thing]
        return apply(edit._replace(cell=rng.choice(free)), scene)
    return apply(edit._replace(cell=rng.choice(scene.occupied)), scene)


def _forgetful(room: _Room, step: Expected, rng) -> Guess:
    """A drawing request says all there is to know; of an edit, only what it names is drawn."""
    edit = step.edit
    if edit is None:
        return step.target
    blank = room.empty(rng.choice(room.config.backgrounds))
    named = edit.kind in ("add", "background") or edit.kind == "move" and not step.it
    if not named:
        return blank
    thing = edit if edit.kind != "move" else Edit("add", edit.value, step.before.cells[edit.cell])
    return apply(thing, blank)


def _edit_recent(room: _Room, step: Expected, rng) -> Guess:
    return _random_object(room, step, rng) if step.it else step.target


def _edit_wrong(room: _Room, step: Expected, rng) -> Guess:
    """The edit done to the other picture, where there is one: to the same thing, wherever that lies."""
    if step.edit is None or step.distractor is None:
        return step.target
    edit, other = step.edit, step.distractor
    found = [cell for cell, thing in enumerate(other.cells) if thing == step.before.cells[edit.cell]]
    return apply(edit._replace(cell=found[0]), other)


# --- which oracles a skill has --------------------------------------------------------------------


def _both(picture: Oracle, reply: Oracle) -> Oracle:
    return lambda room, step, rng: (picture if step.target is not None else reply)(room, step, rng)


_ANSWERS: dict[str, Oracle] = {
    "majority": _majority,
    "majority_by_question": _majority_by_question,
    "bag": _bag,
}
_REMEMBERING: dict[str, Oracle] = {
    "no_history": _both(_forgetful, _majority),
    "recency": _both(_edit_recent, _answer_recent),
}
_ORACLES: dict[str, dict[str, Oracle]] = {
    "draw_scene": {"random_cells": _random_cells, "blank": _blank},
    "edit": {"copy_last_image": _copy, "random_object": _random_object, "blank": _blank},
    "vqa": _ANSWERS,
    "exists": _ANSWERS,
    "count": _ANSWERS,
    "describe": _ANSWERS,
    "locate": _ANSWERS,
    "segment": {"bag": _bag, "everything": _everything},
    "chain": {
        "copy_last_image": _both(_copy, _usual),
        "random_object": _both(_random_object, _bag),
        "right_pictures_majority_answers": _both(_right, _usual),
    },
    "dialogue": {
        "copy_last_image": _both(_copy, _majority),
        "random_cells": _both(_random_cells, _bag),
        "random_object": _both(_random_object, _bag),
        "right_pictures_majority_answers": _both(_right, _majority),
    },
}


def oracles_of(items: Sequence[Item]) -> dict[str, Oracle]:
    """The oracles that say something about these items (of one skill and split), by name.

    Where the whole item is one user turn, memory is not asked for, and its oracles would be right.
    """
    found = dict(_ORACLES[items[0].skill])
    one = items[0].skill == "chain"
    history = any((len(i.expected) > 1 and not one) or len(i.conversation.turns) > 1 for i in items)
    if history and items[0].skill != "draw_scene":
        found |= _REMEMBERING
    if any(step.distractor for item in items for step in item.expected):
        found["wrong_picture"] = _both(_edit_wrong, _answer_wrong)
    return found


def reply(
    room: _Room, oracle: Oracle, item: Item, rng: random.Random
) -> tuple[list[Turn], dict[str, ImageData]]:
    """The turns and pictures with which an oracle answers an item."""
    turns, images = [], {}
    for i, step in enumerate(item.expected):
        guess = oracle(room, step, rng)
        parts: tuple[Part, ...]
        if step.target is not None:
            ref = f"oracle{i}"
            images[ref] = ImageData.from_array(room.world.renderer.render(guess))
            parts = (Image(ref),)
            if step.edit is not None and room.config.effect:
                parts = (Text(room.world.grammar.effect(step.before, guess)), *parts)
        else:
            parts = tuple(guess)
        turns.append(Turn("assistant", parts))
    if item.skill == "chain":
        turns = [Turn("assistant", tuple(part for turn in turns for part in turn.parts))]
    return turns, images


def run(
    judge: Judge, skill: str, items: Sequence[Item], seed: int = 0
) -> Mapping[str, dict[str, tuple[float, int, float]]]:
    """{oracle: {figure: (value, n, standard error)}} on these items, which are all of `skill`."""
    if not items or any(item.skill != skill for item in items):
        raise ValueError(f"expected items of skill {skill!r}, at least one")
    room, results = _Room(judge, skill), {}
    for name, oracle in oracles_of(items).items():
        rng = random.Random(f"{seed}/{skill}/{name}")
        scores = [skills.score(judge, item, *reply(room, oracle, item, rng)) for item in items]
        results[name] = skills.report(skill, scores)
    return results
