"""Sampling dialogues: what is said next, until the budget of images or words is spent."""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from umm_jax.conversation import Conversation
from umm_jax.markup.chains import chained
from umm_jax.world.choose import TRIES, Choice, Chooser, misplaced
from umm_jax.world.grammar import SMALLTALK
from umm_jax.world.scene import Scene, WorldConfig
from umm_jax.world.splits import DISTANCES, get_split
from umm_jax.world.state import Edit, Question, kinds_absent, reference
from umm_jax.world.talk import STORIES, Exchange, Talk

# Of what is generated from one configuration and seed. Raise it with every change of words, pictures or
# choices, so that data on disk are not taken for what would be made now.
VERSION = 1


class Sampler(Chooser):
    """Samples exchanges and whole dialogues of one world."""

    def __init__(self, config: WorldConfig):
        super().__init__(config)
        self._picture = Choice(config.picture_ops)
        self._talk = Choice(config.talk_ops)

    # --- whole exchanges ---

    def draw(self, rng: random.Random, talk: Talk, scene: Scene) -> Exchange:
        order = scene.occupied
        if self.config.shuffled:
            rng.shuffle(order)
        return talk.draw(scene, order)

    def picture(self, rng: random.Random, talk: Talk, split: str, op: str = "") -> Exchange | None:
        """An exchange that ends in a picture; None when this attempt came to nothing (or was an upload)."""
        state = talk.state
        match op or self._picture(rng):
            case "edit":
                found = self.edit(rng, state.scene, split, state.salient)
                return found and talk.edit(*found)
            case "draw":
                return self.draw(rng, talk, self.world.holdout.sample(rng, split))
            case "upload":
                talk.upload(self.world.holdout.sample(rng, split))
            case "undo":
                older = [i for i, p in enumerate(state.pictures) if p.scene != state.scene]
                if older and rng.random() < self.config.undo_named:
                    to = rng.choice(older)
                    return talk.undo(to, rng.choice(talk.names(to)))
                return talk.undo()
            case "story":
                cells = [c for c in state.scene.occupied if reference(state.scene, c)]
                if cells:
                    story = talk.story(rng.choice(cells), rng.choice(STORIES), rng.randint(2, 3))
                    reach = get_split(split).reach
                    holdout = self.world.holdout
                    if story and all(holdout.scene_class(scene) in reach for _, scene, _ in story.shows):
                        return story
        return None

    def talk(self, rng: random.Random, talk: Talk, split: str, op: str = "") -> Exchange | None:
        """An exchange without a picture; None when this attempt came to nothing."""
        state = talk.state
        older = [i for i, p in enumerate(state.pictures) if p.ref != state.picture.ref]
        match op or self._talk(rng):
            case "ask":
                question = self.question(rng, state.scene, split)
                return question and talk.ask(question)
            case "segment":
                question = self.question(rng, state.scene, split, "segment")
                return question and talk.ask(question)
            case "refer" if older:
                of = rng.choice(older)
                question = self.question(rng, state.pictures[of].scene, split)
                return question and talk.ask(question, of, rng.choice(talk.names(of)))
            case "compare" if older:
                return self._compare(rng, talk, rng.choice(older))
            case "smalltalk":
                if rng.random() < 0.5:
                    a, b = rng.randint(0, 4), rng.randint(0, 5)
                    return talk.smalltalk(f"what is {a} plus {b}", str(a + b))
                return talk.smalltalk(*rng.choice(list(SMALLTALK.items())))
            case "impossible":
                return self._impossible(rng, talk, split)
        return None

    def _compare(self, rng, talk: Talk, other: int) -> Exchange | None:
        state = talk.state
        if rng.random() < 0.5:
            first, second = sorted((other, state.focus))
            changed = state.pictures[first].scene.differing(state.pictures[second].scene)
            return talk.compare_between(first, second) if len(changed) <= 3 else None
        name = rng.choice(("", "shape", "colour"))
        things = [o for p in state.pictures for o in p.scene.cells if o]
        return talk.compare_more(((name, getattr(rng.choice(things), name)),) if name else ())

    def _impossible(self, rng, talk: Talk, split: str) -> Exchange | None:
        """An edit or question whose object is missing or one of several, or an "it" that means nothing."""
        scene, grammar = talk.state.scene, self.world.grammar
        kinds = [(o.colour, o.shape) for o in scene.cells if o]
        several = [kind for kind in kinds if kinds.count(kind) > 1]
        about = None
        if several and rng.random() < 0.5:
            about = tuple(zip(("colour", "shape"), rng.choice(several), strict=True))
        elif talk.state.salient is not None or rng.random() < 0.8:
            absent = kinds_absent(scene, self.world.holdout.kinds(split))
            about = tuple(zip(("colour", "shape"), rng.choice(absent), strict=True)) if absent else None
            if about is None:
                return None
        empty = [c for c, thing in enumerate(scene.cells) if not thing]
        requests = [
            grammar.edit(Edit("remove", 0), about),
            grammar.edit(Edit("recolour", 0, rng.choice(self.config.colours)), about),
            grammar.edit(Edit("move", 0, rng.choice(empty)), about),
        ]
        if about:
            requests += [grammar.question(Question(kind, None, about)) for kind in ("where", "locate")]
        return talk.impossible(rng.choice(requests), about)

    # --- whole dialogues ---

    def dialogue(self, seed: int, index: int, split: str = "train") -> Talk:
        """A dialogue determined by the configuration and these three."""
        get_split(split)
        rng = random.Random(f"{seed}/{index}/{split}")
        config = self.config
        while True:
            talk = Talk(self.world)
            if split == "length":
                self.fill(rng, talk, split, 2 * config.max_images, 3 * config.max_words, config.talk)
                if len(talk.state.pictures) <= config.max_images:
                    continue
            elif split == "distance":
                self.fill(rng, talk, split, max(2, config.max_images), 3 * config.max_words, DISTANCES)
                if len(talk.state.pictures) < 2:
                    continue
            elif split == "hard-distractor":
                if not self._mislead(rng, talk, split):
                    continue
            else:
                self.fill(rng, talk, split, config.max_images, config.max_words, config.talk)
            return talk

    def fill(self, rng, talk: Talk, split: str, images: int, budget: int, pause: Sequence[int]) -> None:
        """Pictures with talk between them until the budget of images or words is spent."""
        config = self.config
        first = self.world.holdout.sample(rng, split)
        if rng.random() < config.first_upload:
            talk.upload(first)
        else:
            talk.add(self.draw(rng, talk, first))
        while True:
            full = len(talk.state.pictures) >= images
            for _ in range(max(rng.randint(*pause), talk.pending and full)):
                if not self._say(rng, talk, budget, lambda: self.talk(rng, talk, split)):
                    break
            if full or not self._say(rng, talk, budget, lambda: self._next(rng, talk, split, images, budget)):
                break
        if talk.pending:
            # A cheap question always fits where an upload was let in.
            talk.add(talk.ask(Question("colour", rng.choice(talk.state.scene.occupied))))

    def _next(self, rng, talk: Talk, split: str, images: int, budget: int) -> Exchange | bool | None:
        """The next picture: an exchange, True for an upload already made, None when nothing was hit upon."""
        op = self._picture(rng)
        if op == "upload":
            room = 16 + self.config.cells
            if talk.pending or talk.words + room > budget:
                return None
            talk.upload(self.world.holdout.sample(rng, split))
            return True
        if op == "draw" and talk.pending:
            return None
        exchange = self.picture(rng, talk, split, op)
        return exchange if exchange and len(talk.state.pictures) + len(exchange.shows) <= images else None

    def _say(self, rng, talk: Talk, budget: int, propose: Callable[[], Exchange | bool | None]) -> bool:
        """Adds the first proposal that fits the budget; whether there was one."""
        for _ in range(TRIES):
            exchange = propose()
            if exchange is True:
                return True
            if exchange and talk.news(exchange) and talk.words + exchange.words(self.config) <= budget:
                talk.add(exchange)
                return True
        return False

    def _mislead(self, rng, talk: Talk, split: str) -> bool:
        """Two pictures alike, then questions and an edit that the wrong one would answer otherwise."""
        config, holdout = self.config, self.world.holdout
        first = holdout.sample(rng, split)
        talk.upload(first)
        question = self.question(rng, first, split)
        if question is None:
            return False
        talk.add(talk.ask(question))
        second = self.distractor(rng, first, split)
        if second is None:
            return False
        talk.add(self.draw(rng, talk, second))
        refers = config.talk_ops.get("refer", 0) > 0
        for asked, other in ((second, first), (first, second)) if refers else ((second, first),) * 2:
            question = self.misleading(rng, asked, other, split)
            if question is None:
                return False
            talk.add(talk.ask(question) if asked is second else talk.ask(question, 0, talk.names(0)[0]))
        found = self.edit(rng, second, split, talk.state.salient, lambda e, _: misplaced(e, second, first))
        if found:
            talk.add(talk.edit(*found))
        return found is not None


sampler = lru_cache(maxsize=8)(Sampler)


def sample_dialogue(config: WorldConfig, seed: int, index: int, split: str = "train") -> Conversation:
    """The conversation number `index` of a split: the same for the same arguments, whatever came before.

    Raises:
        ConfigError: unknown split, or one for which this world holds out nothing.
    """
    talk = sampler(config).dialogue(seed, index, split)
    record = talk.conversation(f"world-{split}-{seed}-{index}", split, seed=seed, index=index)
    if config.chain == (1, 1):
        return record
    rng = random.Random(f"{seed}/{index}/{split}/chain")
    return chained(record, [rng.randint(*config.chain) for _ in record.turns])
