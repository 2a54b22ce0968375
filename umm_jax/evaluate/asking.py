"""Puts docs to a model: in batches of like shape, turn by turn, each reply on its own seed.

A reply depends on its doc, the settings, the seed and the weights alone: not on the order of docs, the batch,
the number of processes, or where a run was resumed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, ImageData, Turn
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Response
from umm_jax.families.contract import Reply
from umm_jax.generate import seed_of


class Model(Protocol):
    """What is asked: ``generate.Loaded``, or anything that does the same."""

    def reply(self, conversations, settings, seeds) -> Sequence[Reply]:
        """See ``families.contract.Replier``."""

    def score(self, conversation: Conversation, options: Sequence[str]) -> Sequence[float]:
        """A log-probability for each option; asked for docs with options alone."""


@dataclass
class Asked:
    """What became of one doc: the conversation as it was had, and of it the model's turns and pictures."""

    doc: Doc
    conversation: Conversation
    turns: list[Turn] = field(default_factory=list)
    images: dict[str, ImageData] = field(default_factory=dict)
    scores: tuple[float, ...] = ()
    error: str = ""

    @property
    def response(self) -> Response:
        if self.error:
            return Response(self.doc.id, error=self.error)
        return Response(self.doc.id, tuple(self.turns), self.images, self.scores)


def batches(docs: Sequence[Doc], batch_size: int) -> list[list[Doc]]:
    """Docs of like shape together, so that few programs are compiled.

    Where a run is resumed, or shared out among processes, whole batches of this list are left out: what is
    asked together stays the same, and so does every rounding.
    """
    order = sorted(range(len(docs)), key=lambda i: (*shape(docs[i]), i))
    return [[docs[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]


def ask(
    model: Model,
    asked: Iterable[Sequence[Doc]],
    settings: ReplySettings,
    *,
    seed: int,
    batch_size: int,
    progress: Callable[[int], Any] = lambda replies: None,
) -> Iterator[list[Asked]]:
    """Has every doc answered, further user turns on the model's own replies and pictures; batch by batch.

    Every batch has `batch_size` rows, filled up with repetitions. A doc that cannot be put (a picture that
    cannot be read, a conversation that is too long) is a failure of its own and takes none of its batch
    along.

    Args:
        asked: batches, see :func:`batches`.
        seed: of all; each reply's is drawn from it, the doc's id and the turn.
        progress: called with the number of replies that were made.
    """
    for docs in asked:
        batch = [_begun(doc) for doc in docs]
        for turn in range(1 + max(len(a.doc.then) for a in batch)):
            due = [a for a in batch if turn <= len(a.doc.then)]
            for one in [a for a in due if a.doc.options and not a.error]:
                _rank(model, one)
            if able := [a for a in due if not (a.doc.options or a.error)]:
                _take_turn(model, able, turn, settings, seed, batch_size)
            progress(len(due))
        yield batch


def shape(doc: Doc) -> tuple[int, ...]:
    """Docs of one shape run through the same programs, as far as can be told without reading pictures."""
    return len(doc.options), len(doc.then), len(doc.images), sum(len(turn.spelt()) for turn in doc.turns)


def _begun(doc: Doc) -> Asked:
    try:
        return Asked(doc, doc.conversation())
    except DataError as error:
        return Asked(doc, Conversation(doc.id, doc.turns), error=str(error))


def _rank(model: Model, asked: Asked) -> None:
    try:
        scores = tuple(model.score(asked.conversation, asked.doc.options))
    except DataError as error:
        asked.error = str(error)
        return
    if all(map(math.isfinite, scores)):
        asked.scores = scores
    else:
        asked.error = "a log-probability is not a number; the checkpoint may hold such values"


def _take_turn(model: Model, asked: list[Asked], turn: int, settings, seed: int, batch_size: int) -> None:
    try:
        replies = _replies(model, asked, turn, settings, seed, batch_size)
    except DataError as error:
        if len(asked) == 1:
            asked[0].error = str(error)
            return
        # One of them cannot be answered; alone, the others get the replies they would have had.
        for one in asked:
            _take_turn(model, [one], turn, settings, seed, batch_size)
        return
    for one, reply in zip(asked, replies):
        one.turns.append(reply.turn)
        one.images |= reply.images
        one.conversation = one.conversation.with_turn(reply.turn, reply.images)
        if turn < len(one.doc.then):
            one.conversation = one.conversation.with_turn(one.doc.then[turn])


def _replies(model: Model, asked: list[Asked], turn: int, settings, seed: int, batch_size: int) -> list:
    rows = (asked + [asked[-1]] * batch_size)[:batch_size]
    seeds = [seed_of(seed, a.doc.id, turn) for a in rows]
    return model.reply([a.conversation for a in rows], settings, seeds)[: len(asked)]
