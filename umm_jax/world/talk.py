"""Exchanges: what user and bot say for one operation in a given state, and the dialogue they add up to.

An :class:`Exchange` is a proposal, a pure function of the state. :meth:`Talk.add` makes it part of the
dialogue. A sampler can therefore look at what an exchange would cost before it says it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from umm_jax.conversation import Box, Conversation, Image, ImageData, Mask, Part, TaskCall, Text, Turn
from umm_jax.world.calls import call, with_calls
from umm_jax.world.grammar import DIRECTIONS, UNDO, WHICH, Grammar
from umm_jax.world.render import Renderer
from umm_jax.world.scene import Scene, WorldConfig
from umm_jax.world.splits import Holdout
from umm_jax.world.state import (
    About,
    Edit,
    Picture,
    Question,
    State,
    answer,
    apply,
    mentions,
    reference,
    salient_after,
)


class World:
    """Everything made from one configuration, made once."""

    def __init__(self, config: WorldConfig):
        self.config = config
        self.grammar = Grammar(config)
        self.renderer = Renderer(config)
        self.holdout = Holdout(config)


world = lru_cache(maxsize=8)(World)


@dataclass
class Exchange:
    """One user turn and the bot's reply, not yet said.

    Attributes:
        shows: (ref or None for a new one, scene, parent) of each picture in `bot`, in order; a picture is
            a None among the parts until it has its name.
        asks: where there are calls, one for each picture or mask in `bot`, in order.
        needs: earlier turns without which the reply cannot be known.
        salient: what "it" means afterwards, when the exchange shows a picture or `singles_out` an object.
    """

    op: str
    user: list[Part]
    bot: list[Part | None]
    program: list
    needs: tuple[int, ...] = ()
    shows: list[tuple[str | None, Scene, int | None]] = field(default_factory=list)
    salient: int | None = None
    singles_out: bool = False
    asks: list[TaskCall] = field(default_factory=list)

    def words(self, config: WorldConfig) -> int:
        """Length of both turns; see :func:`words`."""
        bot = with_calls(self.bot, self.asks) if config.calls else self.bot
        return words(self.user, config) + words(bot, config)


def words(parts: Sequence[Part | None], config: WorldConfig) -> int:
    """Length of a turn as the samplers count it.

    A word, number or punctuation mark is 1, a turn has 2 markers, an image is one mark and one position a
    cell, a box is 6, a mask one mark and its runs, a call its words, with 3 marks. A dialogue has one further
    position for its beginning.
    """
    total = 2
    for part in parts:
        if isinstance(part, Text):
            total += len(part.text.split())
        elif part is None or isinstance(part, Image):
            total += 1 + config.cells
        elif isinstance(part, TaskCall):
            total += 3 + len(part.args["payload"].split())
        else:
            total += 6 if isinstance(part, Box) else 1 + len(part.rle)
    return total


class Talk:
    """A dialogue in the making: turns, named scenes, and the state they have led to."""

    def __init__(self, world: World):
        self.world = world
        self.turns: list[Turn] = []
        self.scenes: dict[str, Scene] = {}
        self.state = State()
        self.words = 1
        self._pending: Image | None = None
        self._said: set[str] = set()

    # --- saying ---

    def upload(self, scene: Scene) -> None:
        """The user brings a picture: it opens the next user turn, whatever that says."""
        if self._pending:
            raise ValueError("a picture has been uploaded already and nothing said about it")
        self._pending = self._show(None, scene, "upload", None, len(self.turns))
        self.state = self.state._replace(focus=len(self.state.pictures) - 1, salient=None)
        self._said.clear()
        self.words += 1 + self.world.config.cells

    @property
    def pending(self) -> bool:
        """Whether an uploaded picture waits for the user to say something."""
        return self._pending is not None

    def news(self, exchange: Exchange) -> bool:
        """Whether the user has not said just this about the present picture already."""
        return exchange.user[0].text not in self._said

    def _show(self, ref: str | None, scene: Scene, origin: str, parent: int | None, turn: int) -> Image:
        ref = f"i{len(self.scenes)}" if ref is None else ref
        self.scenes[ref] = scene
        picture = Picture(ref, scene, turn, origin, parent)
        self.state = self.state._replace(pictures=(*self.state.pictures, picture))
        return Image(ref)

    def add(self, exchange: Exchange) -> None:
        """Says it: two turns more, and the state after them."""
        turn = len(self.turns)
        user = tuple(exchange.user)
        if self._pending:
            user, self._pending = (self._pending, *user), None
        shows = iter(exchange.shows)
        bot = tuple(
            self._show(*_origin(next(shows), exchange.op), turn + 1) if part is None else part
            for part in (with_calls(exchange.bot, exchange.asks) if self.world.config.calls else exchange.bot)
        )
        needs = tuple(sorted({n for n in exchange.needs if n < turn}))
        meta = {"program": exchange.program}
        self.turns.append(Turn("user", user, False, needs, exchange.op, meta))
        self.turns.append(Turn("assistant", bot, True, (*needs, turn), exchange.op, meta))
        self.words += exchange.words(self.world.config)
        if exchange.shows:
            self._said.clear()
        else:
            self._said.add(exchange.user[0].text)
        pictures, focus, salient, salient_turn, log = self.state
        if exchange.shows or exchange.singles_out:
            focus = len(pictures) - 1 if exchange.shows else focus
            salient, salient_turn = exchange.salient, turn
        self.state = State(pictures, focus, salient, salient_turn, (*log, exchange.op))

    def conversation(self, name: str, split: str = "train", turns: int | None = None, **meta) -> Conversation:
        """The record of the first `turns` turns (all of them), with their pictures drawn.

        Raises:
            ValueError: an upload was left unsaid.
        """
        if self._pending:
            raise ValueError("an uploaded picture waits for the user to say something")
        said = tuple(self.turns[:turns])
        shown = dict.fromkeys(p.ref for turn in said for p in turn.parts if isinstance(p, Image))
        render = self.world.renderer.render
        images = {ref: ImageData.from_array(render(self.scenes[ref])) for ref in shown}
        return Conversation(
            id=name,
            turns=said,
            images=images,
            source="world",
            license="CC0-1.0",
            split=split,
            provenance=("sampled from umm_jax.world",),
            meta=meta,
        )

    # --- proposals: pictures ---

    def draw(self, scene: Scene, order: Sequence[int] | None = None) -> Exchange:
        text = self.world.grammar.draw(scene, order)
        asks = [call("image_gen", text)]
        return Exchange("draw", [Text(text)], [None], ["draw"], (), [(None, scene, None)], asks=asks)

    def edit(self, edit: Edit, it: bool = False) -> Exchange:
        """`it` says "it" for the object edited, which must then be the salient one."""
        state, grammar = self.state, self.world.grammar
        before, after = state.scene, apply(edit, state.scene)
        about, needs = None, [state.picture.turn]
        if it:
            needs.append(state.salient_turn)
        elif edit.cell is not None and before.cells[edit.cell]:
            about = reference(before, edit.cell)
            if about is None:
                raise ValueError(f"no words single out the object in cell {edit.cell}")
        said = Text(grammar.effect(before, after))
        asked = Text(grammar.edit(edit, about))
        shows = [(None, after, state.focus)]
        salient = salient_after(edit, state.salient)
        asks = [self._asked(edit, before)]
        return Exchange(
            "edit", [asked], [said, None], edit.program(), tuple(needs), shows, salient, asks=asks
        )

    def _asked(self, edit: Edit, before: Scene) -> TaskCall:
        """An edit as a call: its object by name and place, whatever the user called it."""
        about = box = None
        if edit.cell is not None and before.cells[edit.cell]:
            about = reference(before, edit.cell)
            # A box says that nothing outside of it changes; who moves something changes two places.
            box = None if edit.kind == "move" else place(self.world, before, edit.cell)
        return call("image_edit", self.world.grammar.edit(edit, about), box)

    def undo(self, to: int | None = None, name: str | None = None) -> Exchange | None:
        """Back to the picture before the last change, or to picture `to`, called `name`; None: no such."""
        state, grammar = self.state, self.world.grammar
        target = state.picture.parent if to is None else to
        if target is None:
            return None
        old = state.pictures[target]
        asked = Text(UNDO if to is None else f"go back to {name}")
        said = Text(grammar.effect(state.scene, old.scene))
        needs = (state.picture.turn, old.turn)
        # The picture comes back under its own name, and what it was made from with it.
        shows = [(old.ref, old.scene, old.parent)]
        return Exchange("undo", [asked], [said, None], ["undo", target], needs, shows)

    def story(self, cell: int, rule: str, steps: int) -> Exchange | None:
        """Several pictures in one reply. None when the board or the palette has no room for it."""
        state, grammar = self.state, self.world.grammar
        scenes = _story(self.world.config, state.scene, cell, rule, steps)
        about = reference(state.scene, cell)
        if scenes is None or about is None:
            return None
        bot: list[Part | None] = []
        before = state.scene
        for number, after in enumerate(scenes, 1):
            bot += [Text(grammar.step(number, before, after)), None]
            before = after
        first = len(state.pictures)
        shows = [(None, s, state.focus if i == 0 else first + i - 1) for i, s in enumerate(scenes)]
        asked = Text(grammar.story(steps, about, rule))
        return Exchange("story", [asked], bot, ["story", cell, rule, steps], (state.picture.turn,), shows)

    # --- proposals: talk ---

    def ask(self, question: Question, of: int | None = None, name: str | None = None) -> Exchange:
        """A question about the focus picture, or about picture `of`, called `name`."""
        state, world = self.state, self.world
        picture = state.picture if of is None else state.pictures[of]
        meaning = answer(question, picture.scene)
        asks: list[TaskCall] = []
        if question.kind == "segment":
            asks = [call("image_seg", world.grammar.about(question.about))]
        if question.kind in ("locate", "segment"):
            label = world.grammar.about(question.about) if world.config.calls else None
            reply = [region(world, question.kind, picture.ref, picture.scene, meaning, label)]
        else:
            reply = [Text(world.grammar.answer(question, meaning))]
        text = world.grammar.question(question) if name is None else world.grammar.in_picture(name, question)
        op = "ask" if of is None else "refer"
        singled = mentions(question, picture.scene) if of is None else None
        program = question.program() if of is None else [*question.program(), of]
        return Exchange(
            op if question.kind != "segment" else "segment",
            [Text(text)],
            reply,
            program,
            (picture.turn,),
            salient=singled,
            singles_out=singled is not None,
            asks=asks,
        )

    def compare_more(self, about: About) -> Exchange:
        """Which of the pictures shown so far has more of something."""
        pictures, grammar = self.state.pictures, self.world.grammar
        counts = [len(p.scene.find(**dict(about))) for p in pictures]
        best = [i for i, count in enumerate(counts) if count == max(counts)]
        reply = grammar.ordinal(best[0]) if len(best) == 1 else "same"
        program = ["compare", "more", [list(pair) for pair in about]]
        needs = tuple(p.turn for p in pictures)
        return Exchange("compare", [Text(grammar.more(about))], [Text(reply)], program, needs)

    def compare_between(self, first: int, second: int) -> Exchange:
        """What changed from one picture to another."""
        pictures, grammar = self.state.pictures, self.world.grammar
        asked = grammar.between(grammar.ordinal(first), grammar.ordinal(second))
        reply = grammar.changes(pictures[first].scene, pictures[second].scene)
        needs = (pictures[first].turn, pictures[second].turn)
        program = ["compare", "between", first, second]
        return Exchange("compare", [Text(asked)], [Text(reply)], program, needs)

    def impossible(self, request: str, about: About | None) -> Exchange:
        """A request that cannot be met: `about` fits no object or several; None is an "it" without sense."""
        found = [] if about is None else self.state.scene.find(**dict(about))
        if len(found) == 1:
            raise ValueError(f"{about} fits exactly one object")
        reply = WHICH if found or about is None else self.world.grammar.missing(about)
        program = ["impossible", [list(pair) for pair in about or ()]]
        return Exchange("impossible", [Text(request)], [Text(reply)], program, (self.state.picture.turn,))

    def smalltalk(self, said: str, reply: str) -> Exchange:
        return Exchange("smalltalk", [Text(said)], [Text(reply)], ["smalltalk"])

    def names(self, index: int) -> list[str]:
        """Everything picture `index` may be called."""
        state, grammar = self.state, self.world.grammar
        last = len(state.pictures) - 1
        names = [grammar.ordinal(index)]
        if index == last - 1:
            names.append("the previous picture")
        if index == state.picture.parent and state.picture.origin == "edit":
            names.append("the picture before the last change")
        drawn = [i for i, p in enumerate(state.pictures) if p.origin == "draw"]
        if drawn and index == drawn[0]:
            names.append("the one you drew first")
        return names


def region(
    world: World, kind: str, ref: str, scene: Scene, cell: int, label: str | None = None
) -> Box | Mask:
    """Where the object in `cell` lies in picture `ref`: "locate" a box, "segment" a mask."""
    if kind == "segment":
        return Mask.from_array(ref, world.renderer.mask(scene, cell), label)
    return Box(ref, place(world, scene, cell), label)


def place(world: World, scene: Scene, cell: int) -> tuple[float, float, float, float]:
    """The box of the object in `cell`, as shares of the picture's sides."""
    return tuple(edge / world.config.px for edge in world.renderer.box(scene, cell))


def _origin(show: tuple, op: str) -> tuple:
    ref, scene, parent = show
    return ref, scene, op, parent


STORIES = (*(f"moves {d}" for d in DIRECTIONS), *(f"grows {d}" for d in DIRECTIONS), "changes color")


def _story(config: WorldConfig, scene: Scene, cell: int, rule: str, steps: int) -> list[Scene] | None:
    """The scenes of a story, one a step: an object marches, is copied in a line, or runs through colours."""
    verb, word = rule.split()
    scenes = []
    for _ in range(steps):
        thing = scene.cells[cell]
        if verb == "changes":
            following = config.colours[(config.colours.index(thing.colour) + 1) % len(config.colours)]
            scene = scene.put((cell, thing._replace(colour=following)))
        else:
            row, column = cell // config.grid + DIRECTIONS[word][0], cell % config.grid + DIRECTIONS[word][1]
            goal = row * config.grid + column
            if not (0 <= row < config.grid and 0 <= column < config.grid) or scene.cells[goal]:
                return None
            scene = scene.put((goal, thing)) if verb == "grows" else scene.put((cell, None), (goal, thing))
            cell = goal
        if len(scene.occupied) > config.max_objects:
            return None
        scenes.append(scene)
    return scenes
