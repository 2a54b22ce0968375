"""Several requests in one turn: exchanges that may be joined, and dialogues in which they are."""

import dataclasses
from collections.abc import Sequence

from umm_jax.conversation import Conversation, Image, Text, Turn

THEN = " , then "


def joins(before: Turn, after: Turn) -> bool:
    """Whether `after`, a request, may stand in one turn with the one that was replied to by `before`."""
    said = any(isinstance(part, Text) for part in before.parts)
    return not said and not any(isinstance(part, Image) for part in after.parts)


def joined(turns: Sequence[Turn], then: str = THEN) -> tuple[Turn, Turn]:
    """Pairs of request and reply as one request and one reply; `then` stands between the requests."""
    asked, replied = turns[::2], turns[1::2]
    if len(asked) == 1:
        return asked[0], replied[0]
    shown = [part for part in asked[0].parts if not isinstance(part, Text)]
    words = then.join(turn.text for turn in asked)
    op, programs = "chain", [turn.meta.get("program") for turn in asked]
    meta = {"program": programs} if any(programs) else {}
    needs = tuple(sorted({n for turn in asked for n in turn.depends_on}))
    user = Turn("user", (*shown, Text(words)), False, needs, op, meta)
    parts = tuple(part for turn in replied for part in turn.parts)
    return user, Turn("assistant", parts, replied[-1].loss, needs, op, meta)


def chained(record: Conversation, sizes: Sequence[int], then: str = THEN) -> Conversation:
    """The dialogue with runs of exchanges joined, of at most these sizes in turn, where they may be.

    What turns depend on are the joined turns. A dialogue that does not alternate stays as it is.
    """
    roles = [turn.role for turn in record.turns]
    if roles[::2] != ["user"] * len(roles[::2]) or roles[1::2] != ["assistant"] * len(roles[::2]):
        return record
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
        user, bot = joined([turn for k in group for turn in record.turns[k : k + 2]], then)
        at = len(turns)
        needs = tuple(sorted({place[n] for n in user.depends_on if place[n] < at}))
        turns += [
            dataclasses.replace(user, depends_on=needs),
            dataclasses.replace(bot, depends_on=(*needs, at)),
        ]
    return dataclasses.replace(record, turns=tuple(turns))
