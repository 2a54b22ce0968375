"""Answers that ask for what they show: pictures and masks by calls, and several requests in one turn.

In a world with ``calls`` the bot draws nothing itself. What gives a picture or mask is a call that says what
is wanted so that whoever does it needs to know nothing else of the dialogue: objects by name and place, where
the user said "it".
"""

from collections.abc import Sequence

from umm_jax.conversation import Part, TaskCall, Text
from umm_jax.markup import dialects, grammar
from umm_jax.markup.grammar import Boxes, Call
from umm_jax.markup.records import task_call

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
