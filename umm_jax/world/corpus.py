"""Every word of a world, in sentences: what a tokenizer is trained from."""

from collections.abc import Iterator

from umm_jax.markup.chains import THEN
from umm_jax.world import calls
from umm_jax.world.grammar import DIRECTIONS, SMALLTALK, UNDO, WHICH
from umm_jax.world.scene import CHANGES, Scene, WorldConfig
from umm_jax.world.state import Count, Edit, Exists, Question
from umm_jax.world.talk import STORIES, world


def vocabulary_text(config: WorldConfig) -> Iterator[str]:
    """Sentences that together hold every word a dialogue of this world can contain.

    Operations that the configuration gives no weight are left out, so that the tokenizer stays small.
    """
    grammar = world(config).grammar
    kinds = config.objects
    for background in config.backgrounds:
        yield grammar.draw(Scene(background, (None,) * config.cells))
        yield grammar.effect(Scene("", ()), Scene(background, ())) if config.effect else "ok"
    for cell, place in enumerate(grammar.place):
        yield grammar.question(Question("colour", cell))
        yield grammar.question(Question("shape", cell))
        yield f"{grammar.question(Question('what', cell))} {place} nothing"
    attributes = ("size", "texture", "colour", "shape")
    varying = [name for name in attributes if len(getattr(config, f"{name}s")) > 1]
    for thing in kinds:
        about = tuple((name, getattr(thing, name)) for name in varying)
        yield f"add {grammar.phrase[thing]} and the {grammar.about(about)}"
    about = (("colour", config.colours[0]), ("shape", config.shapes[0]))
    for kind, weight in config.edits.items():
        if weight:
            one = {"add": kinds[0], "move": 0, "background": config.backgrounds[0], "remove": None}
            for value in [one[kind]] if kind in one else getattr(config, f"{CHANGES[kind]}s"):
                yield grammar.edit(Edit(kind, 0, value), about)
                yield grammar.edit(Edit(kind, 0, value), None)
    yield "ok empty nothing"
    for kind in config.questions:
        if kind not in ("colour", "shape", "what"):
            yield grammar.question(Question(kind, None, about if kind != "count" else ()))
    for name in ("colour", "shape"):
        for value in getattr(config, f"{name}s"):
            yield grammar.question(Question("count", None, ((name, value),)))
    numbers = range(config.max_objects + 3)
    yield " ".join(map(str, numbers))
    if config.evidence:
        yield grammar.answer(Question("count"), Count(0, ()))
        yield grammar.answer(Question("exists", None, about), Exists(False, ()))
    yield "yes no"
    if config.calls:
        yield " ".join(calls.numbers(config.px))
        yield f"draw{THEN}segment"
    yield from _further_operations(config, grammar, about)


def _further_operations(config: WorldConfig, grammar, about) -> Iterator[str]:
    talk, pictures = config.talk_ops, config.picture_ops
    if any(talk.get(op) for op in ("refer", "compare")) or pictures.get("undo"):
        for index in range(2 * config.max_images):  # split "length" has up to twice as many
            yield grammar.in_picture(grammar.ordinal(index), Question("describe"))
        yield "in the previous picture the picture before the last change the one you drew first"
    if talk.get("compare"):
        yield f"{grammar.more(())} {grammar.more(about)} same"
        yield grammar.between("", "")
    if talk.get("segment"):
        yield grammar.question(Question("segment", None, about))
    if talk.get("smalltalk"):
        yield "what is 0 1 2 3 4 5 6 7 8 9 plus"
        for said, reply in SMALLTALK.items():
            yield f"{said} {reply}"
    if talk.get("impossible"):
        yield f"{grammar.missing(about)} {WHICH}"
    if pictures.get("undo"):
        yield f"{UNDO} go back to"
    if pictures.get("story"):
        for rule in STORIES:
            yield grammar.story(3, about, rule)
        yield f"step 1 2 3 : {' '.join(DIRECTIONS)}"


def vocabulary(config: WorldConfig) -> list[str]:
    """The words of :func:`vocabulary_text`, sorted."""
    return sorted({word for sentence in vocabulary_text(config) for word in sentence.split()})
