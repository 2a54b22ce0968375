"""Records of pictures, masks and boxes as records of calls: what a model that asks experts learns from.

| what an assistant's turn shows | becomes |
|---|---|
| a picture, where one was shown before | a call of image_edit in the user's words, then the picture |
| a picture, where none was | a call of image_gen in the user's words, then the picture |
| masks | a call of image_seg in the words of their label, else the user's, then the masks |
| boxes, words, calls | what they were |

Exchanges about the same pictures may then be joined, so that a turn asks for several things.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from umm_jax.conversation import Conversation, Image, Mask, Part, RecordError, TaskCall
from umm_jax.data.records import open_source
from umm_jax.errors import ConfigError
from umm_jax.markup import grammar
from umm_jax.markup.chains import chained
from umm_jax.markup.grammar import Call
from umm_jax.markup.records import task_call

VERSION = 1
# Between joined requests, in records whose words are people's.
THEN = ("; then ", ", then ", ". After that, ", " and then ")


def with_calls(record: Conversation) -> Conversation:
    """The record with a call before whatever is shown.

    Raises:
        RecordError: a picture or mask that no words ask for.
    """
    turns, shown, asked = [], False, ""
    for index, turn in enumerate(record.turns):
        if turn.role == "user":
            asked = turn.text
        if turn.role == "assistant":
            try:
                turn = replace(turn, parts=tuple(_called(turn.parts, asked, shown)))
            except ValueError as error:
                raise RecordError(f"record {record.id}, turn {index}: {error}") from None
        shown = shown or any(isinstance(part, Image) for part in turn.parts)
        turns.append(turn)
    return replace(record, turns=tuple(turns))


def _called(parts: Sequence[Part], asked: str, shown: bool):
    before: Part | None = None
    for part in parts:
        follows = isinstance(before, TaskCall) or (isinstance(part, Mask) and isinstance(before, Mask))
        if isinstance(part, Image | Mask) and not follows:
            words = (part.label if isinstance(part, Mask) else None) or asked
            if not words:
                raise ValueError(f"{part.kind}: no words ask for it")
            task = "image_seg" if isinstance(part, Mask) else "image_edit" if shown else "image_gen"
            yield task_call(Call(task, (grammar.Text(words),)))
        shown = shown or isinstance(part, Image)
        before = part
        yield part


_opened = lru_cache(maxsize=2)(open_source)


@dataclass(frozen=True)
class Tasks:
    """Makes record number `index`, for ``making.make_records``.

    Attributes:
        path: a folder of records. chain: least and most requests of a turn.
        seed: of how many requests a turn has, and of the words between them.
    """

    path: str
    chain: tuple[int, int] = (1, 1)
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.chain[0] <= self.chain[1]:
            raise ConfigError(f"chain is the least and most requests of a turn, from 1; it is {self.chain}")

    def __call__(self, index: int) -> Conversation:
        record = with_calls(Conversation.from_msgpack(_opened(self.path)[index]))
        if self.chain == (1, 1):
            return record
        rng = random.Random(f"{self.seed}/{record.id}")
        sizes = [rng.randint(*self.chain) for _ in record.turns]
        return chained(record, sizes, rng.choice(THEN))

    def __len__(self) -> int:
        return len(_opened(self.path))

    def recipe(self) -> dict[str, Any]:
        """What the records could be made from again."""
        source = _opened(self.path).manifest
        return {"tasks": VERSION, "chain": list(self.chain), "seed": self.seed, "from": source}
