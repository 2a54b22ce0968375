"""What a trained model is asked, and what its replies are worth.

An item is a conversation that waits for a reply, with the right one and its meaning. Replies are judged by
meaning: pictures are read back by the judge, sentences are parsed. Of an answer that names its evidence
first, only the final verdict counts; whether the evidence was right is a figure of its own.

A caller scores one item so (a dialogue has several replies, any other item one):

    conversation, replies, images = item.conversation, [], {}
    for turn in (*item.user_turns, None):
        reply = ...reply to conversation...
        replies.append(reply.turn); images |= reply.images
        conversation = conversation.with_turn(reply.turn, reply.images)
        if turn: conversation = conversation.with_turn(turn)
    scores.append(score(judge, item, replies, images))

and then `report(skill, scores)`. The user turns of a dialogue are fixed in advance: they follow the right
pictures, whatever the model drew.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from umm_jax.config import suggest
from umm_jax.conversation import Box, Conversation, Image, ImageData, Text, Turn
from umm_jax.errors import ConfigError
from umm_jax.world.dialogue import PATIENT, Sampler, misplaced, sampler
from umm_jax.world.judge import Judge, Parsed, edit_scores, scene_exact, scene_f1
from umm_jax.world.scene import Scene, WorldConfig
from umm_jax.world.splits import DISTANCES, get_split
from umm_jax.world.state import Edit, Question, answer
from umm_jax.world.talk import Exchange, Talk, world

TALK_SPLITS = ("length", "distance", "hard-distractor")


@dataclass(frozen=True)
class Expected:
    """The right reply to one user turn, and what it means.

    Attributes:
        answer: the right turn.
        target: the scene its picture must show, or None when it shows none.
        before: the scene that is edited or asked about, or None.
        question, edit: what was asked; `it` when the object was called "it".
        recent: the scene shown last before the reply.
        distractor: a scene that could be mistaken for `before`.
        probe: whether this reply has what the split measures.
    """

    answer: Turn
    target: Scene | None = None
    before: Scene | None = None
    question: Question | None = None
    edit: Edit | None = None
    it: bool = False
    recent: Scene | None = None
    distractor: Scene | None = None
    probe: bool = False


@dataclass(frozen=True)
class Item:
    """A conversation that ends with a user turn, what follows it, and the right replies.

    Attributes:
        kind: the type of question or edit; the split of a dialogue.
        user_turns: what the user says after each reply but the last; empty but for dialogues.
        expected: one for each reply.
    """

    id: str
    skill: str
    kind: str
    conversation: Conversation
    user_turns: tuple[Turn, ...]
    expected: tuple[Expected, ...]

    @property
    def answer(self) -> Turn:
        return self.expected[0].answer

    @property
    def target(self) -> Scene | None:
        return self.expected[0].target

    @property
    def before(self) -> Scene | None:
        return self.expected[0].before


@dataclass(frozen=True)
class Skill:
    """Kinds are asked in turn, so that each has its share; "" leaves the kind to the configured weights."""

    kinds: tuple[str, ...]
    splits: tuple[str, ...]


_EVERY = ("train", "iid", "pair", "position", *TALK_SPLITS)
SKILLS = {
    # A drawing needs nothing that came before, so distance and distractors say nothing about it.
    "draw_scene": Skill(("draw",), ("train", "iid", "pair", "position", "length")),
    "edit": Skill(("",), _EVERY),
    "vqa": Skill(("colour", "shape", "what", "where"), _EVERY),
    "exists": Skill(("exists",), _EVERY),
    "count": Skill(("count",), _EVERY),
    "describe": Skill(("describe",), _EVERY),
    "locate": Skill(("locate",), _EVERY),
    "dialogue": Skill(("",), _EVERY),
}


def items(config: WorldConfig, skill: str, split: str, n: int, seed: int) -> list[Item]:
    """The first `n` items of a skill on a split; the same for the same arguments, longer `n` only adds.

    Raises:
        ConfigError: unknown skill or split, or a split that says nothing about the skill.
    """
    if skill not in SKILLS:
        raise ConfigError(f"skill {skill!r} is unknown{suggest(skill, list(SKILLS))}")
    get_split(split)
    if split not in SKILLS[skill].splits:
        raise ConfigError(f"skill {skill!r} has no split {split!r}; it has {', '.join(SKILLS[skill].splits)}")
    kinds = SKILLS[skill].kinds
    maker = _Maker(sampler(config), split)
    return [maker.make(skill, kinds[i % len(kinds)], f"{skill}-{split}-{seed}-{i}") for i in range(n)]


# --- making items ---------------------------------------------------------------------------------


class _Maker:
    """Makes items of one split."""

    def __init__(self, sampler: Sampler, split: str):
        self.sampler, self.split = sampler, split
        self.config, self.holdout = sampler.config, sampler.world.holdout

    def make(self, skill: str, kind: str, name: str) -> Item:
        rng = random.Random(name)
        while True:
            talk = Talk(self.sampler.world)
            if skill == "dialogue":
                expected = self._script(rng, talk)
            else:
                expected = self._single(rng, talk, skill, kind)
            if expected is None:
                continue
            first = len(talk.turns) - 2 * len(expected) + 1  # turns up to the first one to be answered
            conversation = talk.conversation(name, self.split, turns=first)
            kind = expected[0].edit.kind if skill == "edit" else kind or self.split
            return Item(name, skill, kind, conversation, tuple(talk.turns[first + 1 :: 2]), tuple(expected))

    def _single(self, rng, talk: Talk, skill: str, kind: str) -> list[Expected] | None:
        other = self._before(rng, talk, needs_picture=skill != "draw_scene")
        if other is False:
            return None
        if skill == "draw_scene":
            return [self._draw(rng, talk, self.holdout.sample(rng, self.split))]
        found = self._edit(rng, talk, other) if skill == "edit" else self._ask(rng, talk, kind, other)
        return found and [found]

    def _before(self, rng, talk: Talk, needs_picture: bool) -> Scene | bool | None:
        """What is said before the item proper; the scene that could be mistaken, if any, or False: failed."""
        config, split = self.config, self.split
        if split == "length":
            self.sampler.fill(rng, talk, split, 2 * config.max_images, 3 * config.max_words, config.talk)
            return None if len(talk.state.pictures) >= config.max_images else False
        if not needs_picture:
            return None
        scene = self.holdout.sample(rng, split)
        talk.upload(scene)
        if split == "distance":
            return None if self._chat(rng, talk, rng.randint(*DISTANCES)) else False
        if split == "hard-distractor":
            second = self.sampler.distractor(rng, scene, split)
            if second is None or not self._chat(rng, talk, 1):
                return False
            talk.add(self.sampler.draw(rng, talk, second))
            return scene
        return None

    def _chat(self, rng, talk: Talk, exchanges: int) -> bool:
        """Distinct questions about the present picture, rightly answered."""
        for _ in range(exchanges):
            for _ in range(PATIENT):
                question = self.sampler.question(rng, talk.state.scene, self.split)
                if question and talk.news(talk.ask(question)):
                    talk.add(talk.ask(question))
                    break
            else:
                return False
        return True

    def _say(self, talk: Talk, exchange: Exchange, **meaning) -> Expected:
        talk.add(exchange)
        return Expected(talk.turns[-1], **meaning)

    def _draw(self, rng, talk: Talk, scene: Scene, probe: bool = False) -> Expected:
        recent = talk.state.scene if talk.state.pictures else None
        return self._say(talk, self.sampler.draw(rng, talk, scene), target=scene, recent=recent, probe=probe)

    def _edit(self, rng, talk: Talk, other: Scene | None = None, probe: bool = True) -> Expected | None:
        """An edit of the present picture; `other` has the same object elsewhere."""
        before, telling = talk.state.scene, self.holdout.telling

        def accept(edit: Edit, after: Scene) -> bool:
            if other is not None:
                return misplaced(edit, before, other)
            if self.split in ("pair", "position"):
                changed = set(before.differing(after))
                return bool(changed & {*telling(self.split, before), *telling(self.split, after)})
            return True

        found = self.sampler.edit(rng, before, self.split, talk.state.salient, accept)
        if found is None:
            return None
        exchange = talk.edit(*found)
        _, after, _ = exchange.shows[0]
        return self._say(
            talk,
            exchange,
            target=after,
            before=before,
            edit=found[0],
            it=found[1],
            recent=before,
            distractor=other,
            probe=probe,
        )

    def _ask(self, rng, talk: Talk, kind: str = "", other: Scene | None = None, probe: bool = True):
        """A question about the present picture; `other` would give another answer."""
        scene, split = talk.state.scene, self.split
        of = name = None
        if other is not None:
            if self.config.talk_ops.get("refer") and rng.random() < 0.5:
                # The picture asked about lies behind the one that distracts.
                scene, other, of = other, scene, 0
                name = talk.names(0)[0]
            question = self.sampler.misleading(rng, scene, other, split, kind)
        else:
            telling = split in ("pair", "position") and bool(self.holdout.telling(split, scene))
            question = self.sampler.question(rng, scene, split, kind, telling)
        if question is None:
            return None
        recent = talk.state.scene
        exchange = talk.ask(question, of, name)
        return self._say(
            talk, exchange, before=scene, question=question, recent=recent, distractor=other, probe=probe
        )

    def _script(self, rng, talk: Talk) -> list[Expected] | None:
        """The replies of a dialogue, every picture drawn by the bot; None when an attempt came to nothing."""
        split, most = self.split, self.config.max_images
        first = self.holdout.sample(rng, split)
        replies: list[Expected | None] = [self._draw(rng, talk, first)]
        if split == "length":
            for pictures in range(2, most + 3):
                replies.append(self._edit(rng, talk, probe=pictures > most) if replies[-1] else None)
                replies.append(self._ask(rng, talk, probe=pictures > most) if replies[-1] else None)
        elif split == "distance":
            for _ in range(rng.randint(*DISTANCES)):
                question = self._ask(rng, talk, probe=False)
                replies.append(question)
            replies += [self._edit(rng, talk), self._ask(rng, talk, probe=False)]
        elif split == "hard-distractor":
            second = self.sampler.distractor(rng, first, split)
            if second is None:
                return None
            replies += [self._ask(rng, talk, probe=False), self._draw(rng, talk, second)]
            replies += [self._ask(rng, talk, other=first), self._edit(rng, talk, other=first)]
        else:
            for step in (self._edit, self._ask, self._edit, self._ask):
                replies.append(step(rng, talk, probe=False) if replies[-1] else None)
        said = [turn.parts for turn in talk.turns[::2]]
        repeated = split == "distance" and len(set(said)) < len(said)
        return None if None in replies or repeated else replies


# --- scoring --------------------------------------------------------------------------------------


def text_of(turn: Turn) -> str:
    """The words of a turn."""
    return " ".join(part.text for part in turn.parts if isinstance(part, Text)).strip()


def _picture(judge: Judge, turn: Turn, images: Mapping[str, ImageData]) -> Parsed | None:
    """The one picture of a reply as read; None when there is none, or more than one."""
    refs = [part.ref for part in turn.parts if isinstance(part, Image)]
    return judge.read(images[refs[0]]) if len(refs) == 1 else None


def _boxes(turn: Turn, expected: Expected) -> tuple[Box | None, Box]:
    gold = next(part for part in expected.answer.parts if isinstance(part, Box))
    found = [part for part in turn.parts if isinstance(part, Box)]
    return found[0] if len(found) == 1 else None, gold


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = width * height
    return area / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - area)


def _answered(judge: Judge, expected: Expected, turn: Turn) -> dict[str, float]:
    """Whether the reply to a question is right, and its evidence where it should name some."""
    question = expected.question
    if question.kind == "locate":
        found, gold = _boxes(turn, expected)
        px = judge.config.px
        exact = found is not None and [round(v * px) for v in found.xyxy] == [round(v * px) for v in gold.xyxy]
        overlap = iou(found.xyxy, gold.xyxy) if found else 0.0
        return {"right": float(exact), "iou50": float(overlap >= 0.5)}
    understood, meaning = world(judge.config).grammar.parse_answer(question, text_of(turn))
    wanted = answer(question, expected.before)
    if question.kind not in ("count", "exists"):
        return {"right": float(understood and meaning == wanted)}
    if not understood:
        return {"right": 0.0, "evidence": 0.0}
    return {"right": float(meaning.value == wanted.value), "evidence": float(meaning.evidence == wanted.evidence)}


def turn_right(judge: Judge, expected: Expected, turn: Turn, images: Mapping[str, ImageData]) -> bool:
    """Whether one reply is right: the picture shows the scene, or the answer means the same."""
    if expected.target is not None:
        return scene_exact(_picture(judge, turn, images), expected.target)
    return _answered(judge, expected, turn)["right"] == 1


def score(
    judge: Judge, item: Item, reply: Turn | Sequence[Turn], images: Mapping[str, ImageData]
) -> dict[str, float]:
    """The figures of one item, by final name; a figure that does not apply to it is absent.

    Args:
        reply: the turn, or for dialogues the turns, with which the model answered.
        images: the pictures they show.
    """
    turns = [reply] if isinstance(reply, Turn) else list(reply)
    if len(turns) != len(item.expected):
        raise ValueError(f"item {item.id}: {len(item.expected)} replies expected, got {len(turns)}")
    return _SCORES.get(item.skill, _score_answer)(judge, item, turns, images)


def _score_drawing(judge: Judge, item: Item, turns: list[Turn], images) -> dict[str, float]:
    parsed = _picture(judge, turns[0], images)
    return {
        "draw_scene_exact": float(scene_exact(parsed, item.target)),
        "draw_scene_f1": scene_f1(parsed, item.target),
        "draw_scene_valid": float(parsed is not None and parsed.valid),
    }


def _score_edit(judge: Judge, item: Item, turns: list[Turn], images) -> dict[str, float]:
    parsed = _picture(judge, turns[0], images)
    became = edit_scores(parsed, item.before, item.target)
    scores = {f"edit_{name}": value for name, value in became.items()}
    scores["edit_valid"] = float(parsed is not None and parsed.valid)
    if judge.config.effect:
        stated = world(judge.config).grammar.parse_effect(item.before, text_of(turns[0]))
        scores["edit_stated"] = float(stated == item.target)
    scores[f"edit_exact_{item.kind}"] = became["exact"]
    return scores


def _score_answer(judge: Judge, item: Item, turns: list[Turn], images) -> dict[str, float]:
    result = _answered(judge, item.expected[0], turns[0])
    right = result["right"]
    if item.skill == "vqa":
        return {"vqa_accuracy": right, f"vqa_{item.kind}": right}
    if item.skill == "describe":
        described = world(judge.config).grammar.parse_scene(text_of(turns[0]))
        parsed = described and Parsed(described, True, 0.0, (), 0.0)
        return {"describe_exact": right, "describe_f1": scene_f1(parsed, item.before)}
    further = {f"{item.skill}_{name}": value for name, value in result.items() if name != "right"}
    return {f"{item.skill}_accuracy": right, **further}


def _score_dialogue(judge: Judge, item: Item, turns: list[Turn], images) -> dict[str, float]:
    right = [float(turn_right(judge, e, t, images)) for e, t in zip(item.expected, turns, strict=True)]
    scores = {"dialogue_turn_accuracy": _mean(right), "dialogue_all_turns": float(all(right))}
    scores |= {f"dialogue_turn_{i}": value for i, value in enumerate(right, 1)}
    groups: dict[str, Callable[[Expected], bool]] = {
        "dialogue_pictures": lambda e: e.target is not None,
        "dialogue_answers": lambda e: e.target is None,
        "dialogue_probe": lambda e: e.probe,
        "dialogue_it": lambda e: e.it,
    }
    for name, belongs in groups.items():
        values = [r for r, e in zip(right, item.expected, strict=True) if belongs(e)]
        if values:
            scores[name] = _mean(values)
    return scores


_SCORES = {"draw_scene": _score_drawing, "edit": _score_edit, "dialogue": _score_dialogue}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def report(skill: str, scores: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, int, float]]:
    """{figure: (mean, number of items it applied to, standard error of the mean)}, in a steady order.

    A figure of one item has no standard error: nan.
    """
    if skill not in SKILLS:
        raise ConfigError(f"skill {skill!r} is unknown{suggest(skill, list(SKILLS))}")
    figures: dict[str, list[float]] = {}
    for one in scores:
        for name, value in one.items():
            figures.setdefault(name, []).append(value)
    result = {}
    for name, values in figures.items():
        n, mean = len(values), _mean(values)
        spread = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
        result[name] = (mean, n, math.sqrt(spread / n))
    return result
