"""What a trained model is asked: items of every skill on every split, with the right replies."""

import dataclasses
import random
from dataclasses import dataclass

from umm_jax.config import suggest
from umm_jax.conversation import Conversation, Text, Turn
from umm_jax.errors import ConfigError
from umm_jax.markup.chains import joined
from umm_jax.world.choose import PATIENT, misplaced
from umm_jax.world.dialogue import Sampler, sampler
from umm_jax.world.scene import Scene, WorldConfig
from umm_jax.world.splits import DISTANCES, get_split
from umm_jax.world.state import Edit, Question
from umm_jax.world.talk import Exchange, Talk

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
        kind: the type of question or edit; the split of a dialogue; the length of a chain.
        user_turns: what the user says after each reply but the last; empty but for dialogues.
        expected: one for each reply; for a chain, one for each request of its one turn.
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
    """Kinds are asked in turn, so that each has its share; "" leaves the kind to the configured weights.

    `calls`: there are such items only in worlds with calls.
    """

    kinds: tuple[str, ...]
    splits: tuple[str, ...]
    calls: bool = False


_EVERY = ("train", "iid", "pair", "position", *TALK_SPLITS)
SKILLS = {
    # A drawing needs nothing that came before, so distance and distractors say nothing about it.
    "draw_scene": Skill(("draw",), ("train", "iid", "pair", "position", "length")),
    "edit": Skill(("",), _EVERY),
    "vqa": Skill(("colour", "shape", "what", "where"), _EVERY),
    "exists": Skill(("yes", "no"), _EVERY),
    "count": Skill(("count",), _EVERY),
    "describe": Skill(("describe",), _EVERY),
    "locate": Skill(("locate",), _EVERY),
    "segment": Skill(("segment",), _EVERY, calls=True),
    # Two or three requests in one turn.
    "chain": Skill(("2", "3"), ("train", "iid"), calls=True),
    "dialogue": Skill(("",), _EVERY),
}


def skills_of(config: WorldConfig, split: str) -> list[str]:
    """The skills that a world is asked for on a split."""
    return [n for n, skill in SKILLS.items() if split in skill.splits and (config.calls or not skill.calls)]


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
    if SKILLS[skill].calls and not config.calls:
        raise ConfigError(f"skill {skill!r} is of worlds with calls: set calls in the world's overrides")
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
        if kind == "no" and rng.random() < self.config.hard_negatives:
            kind = "hard"  # decided once: what is easier to find must not become more frequent
        while True:
            talk = Talk(self.sampler.world)
            if skill == "dialogue":
                expected = self._script(rng, talk)
            elif skill == "chain":
                expected = self._requests(rng, talk, int(kind))
            else:
                expected = self._single(rng, talk, skill, kind)
            if expected is None:
                continue
            first = len(talk.turns) - 2 * len(expected) + 1  # turns up to the first one to be answered
            conversation = talk.conversation(name, self.split, turns=first)
            if skill == "chain":
                asked, _ = joined(talk.turns[first - 1 :])
                conversation = dataclasses.replace(conversation, turns=(*conversation.turns[:-1], asked))
                return Item(name, skill, kind, conversation, (), tuple(expected))
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

    def _requests(self, rng, talk: Talk, count: int) -> list[Expected] | None:
        """Requests that may stand in one turn about a picture the user brings; a question comes last."""
        talk.upload(self.holdout.sample(rng, self.split))
        found: list[Expected | None] = []
        for k in range(count):
            last = k == count - 1
            op = rng.choice(("edit", "segment", "ask", "ask") if last else ("edit", "edit", "segment"))
            found.append(
                self._edit(rng, talk) if op == "edit" else self._ask(rng, talk, op.replace("ask", ""))
            )
            if found[-1] is None:
                return None
            if not last and any(isinstance(part, Text) for part in found[-1].answer.parts):
                return None
        return found

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
