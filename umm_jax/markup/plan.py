"""What the calls of an answer take from where: steps, and which of them wait for which.

A call that works on a kind of medium takes, in this order:

1. what its first word names: ``@user0`` is the user's first medium, ``@step1`` what the second call gives;
2. what the nearest call before it gives of that kind;
3. the user's last medium of that kind;
4. nothing: then the user is asked for it.

Where the call it takes from fails, a step is skipped: the user's own picture in its place would be a result
that looks right and is not.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from umm_jax.markup.grammar import Answer, Call
from umm_jax.markup.tasks import TASKS


class Source(NamedTuple):
    """Where a step's medium comes from: "user" or "step", and which."""

    kind: str
    index: int

    def __str__(self) -> str:
        return f"{self.kind}{self.index}"


class Step(NamedTuple):
    """A call to be run.

    Attributes:
        takes: None where the task needs nothing, or where nothing is there: then `missing` says what.
        prompt: the call's words without the reference.
    """

    index: int
    call: Call
    takes: Source | None
    prompt: str
    missing: str = ""


_NAMED = re.compile(r"@(user|step)(\d{1,4})(?:\s+|$)")


def plan(answer: Answer, media: Sequence[str] = ()) -> list[Step]:
    """The steps of an answer, in its order, which is an order they can be run in.

    Args:
        media: kinds of what the user sent, in order: "image", "video", "audio".
    """
    steps: list[Step] = []
    for index, call in enumerate(answer.calls):
        needs, prompt = TASKS[call.task].takes, call.prompt
        named = _NAMED.match(prompt)
        if named:
            prompt = prompt[named.end() :]
        takes, missing = None, ""
        if needs is not None:
            takes, missing = _source(needs, named, steps, media)
        steps.append(Step(index, call, takes, prompt, missing))
    return steps


def _source(
    needs: str, named: re.Match | None, steps: Sequence[Step], media: Sequence[str]
) -> tuple[Source | None, str]:
    given = [gives(step.call) for step in steps]
    if named:
        kind, index = named[1], int(named[2])
        there = media if kind == "user" else given
        if index >= len(there):
            return None, f"@{kind}{index} is not there"
        if there[index] != needs:
            return None, f"@{kind}{index} is of kind {there[index]}, not {needs}"
        return Source(kind, index), ""
    for kind, there in (("step", given), ("user", media)):
        for index in reversed(range(len(there))):
            if there[index] == needs:
                return Source(kind, index), ""
    return None, f"no {needs} is there"


def gives(call: Call) -> str:
    """Kind of what a call gives."""
    return TASKS[call.task].gives


def waves(steps: Sequence[Step]) -> list[list[int]]:
    """Steps by number in groups: those of a group need nothing of one another, only of groups before."""
    depth: list[int] = []
    for step in steps:
        depends = step.takes is not None and step.takes.kind == "step"
        depth.append(depth[step.takes.index] + 1 if depends else 0)
    return [[k for k, d in enumerate(depth) if d == level] for level in range(max(depth, default=-1) + 1)]
