"""Answers that ask for what they show: pictures and masks by calls, and several requests in one turn.

In a world with ``calls`` the bot draws nothing itself. What gives a picture or mask is a call that says what
is wanted so that whoever does it needs to know nothing else of the dialogue: objects by name and place, where
the user said "it".
"""

import dataclasses
from collections.abc import Sequence

from umm_jax.conversation import Conversation, Image, Part, TaskCall, Text, Turn
from umm_jax.markup import dialects, grammar
from umm_jax.markup.grammar import Boxes, Call
from umm_jax.markup.records import task_call

THEN = " , then "
_UMM1 = dialects.get("umm1")


def call(task: str, prompt: str, box: tuple[float, ...] | None = None) -> TaskCall:
    """A call in words, with the box of the object it changes."""
    parts = [grammar.Text(prompt)]
    if box is not None:
        parts += [grammar.Text(" "), Boxes((box,))]
    return task_call(Call(task, tuple(parts)))


def with_calls(parts: Sequence[Part], asks: Sequence[TaskCall]) -> tuple[Part, ...]:
    """A reply's parts with a call before each picture or mask. What it says it does, the call says."""
    left, found = iter(asks), []
    for part in parts:
        if isinstance(part, Text) and asks:
            continue
        if not isinstance(part, Text) and asks:
            found.append(next(left))
        found.append(part)
    return tuple(found)


def numbers(px: int) -> list[str]:
    """Every way an edge may be written in a box, so that each is one piece of a tokenizer."""
    edges = (f"{k / px:.3f}" for k in range(px + 1))
    return [
        f"{before}{edge}{after}" for edge in edges for before, after in (("[", ","), ("", ","), ("", "]"))
    ]


def joins(before: Turn, after: Turn) -> bool:
    """Whether `after`, a request, may stand in one turn with the one that was replied to by `before`."""
    said = any(isinstance(part, Text) for part in before.parts)
    return not said and not any(isinstance(part, Image) for part in after.parts)


def joined(turns: Sequence[Turn]) -> tuple[Turn, Turn]:
    """Pairs of request and reply as one request and one reply."""
    asked, replied = turns[::2], turns[1::2]
    shown = [part for part in asked[0].parts if not isinstance(part, Text)]
    words = THEN.join(turn.text for turn in asked)
    op = asked[0].op if len(asked) == 1 else "chain"
    program = [turn.meta["program"] for turn in asked]
    meta = {"program": program[0] if len(asked) == 1 else program}
    needs = tuple(sorted({n for turn in asked for n in turn.depends_on}))
    user = Turn("user", (*shown, Text(words)), False, needs, op, meta)
    parts = tuple(part for turn in replied for part in turn.parts)
    return user, Turn("assistant", parts, replied[-1].loss, needs, op, meta)


def chained(record: Conversation, sizes: Sequence[int]) -> Conversation:
    """The dialogue with runs of exchanges joined, of at most these sizes in turn, where they may be.

    Numbers of turns in what turns depend on, and of pictures in questions, are those of the joined turns.
    """
    groups: list[list[int]] = []
    for k in range(0, len(record.turns), 2):
        size = sizes[(len(groups) - 1) % len(sizes)] if groups else 0
        if groups and len(groups[-1]) < size and joins(record.turns[k - 1], record.turns[k]):
            groups[-1].append(k)
        else:
            groups.append([k])
    place = {k + half: 2 * g + half for g, group in enumerate(groups) for k in group for half in (0, 1)}
    turns: list[Turn] = []
    for group in groups:
        user, bot = joined([turn for k in group for turn in record.turns[k : k + 2]])
        at = len(turns)
        needs = tuple(sorted({place[n] for n in user.depends_on if place[n] < at}))
        turns += [
            dataclasses.replace(user, depends_on=needs),
            dataclasses.replace(bot, depends_on=(*needs, at)),
        ]
    return dataclasses.replace(record, turns=tuple(turns))
