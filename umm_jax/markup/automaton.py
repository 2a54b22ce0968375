"""What may come next in an answer, as tables over a vocabulary: for decoding that cannot write a broken tag.

A state is a pair (context, mode). The context is the call one is in, or none. The mode says where in the
words one is: plain, inside a phrase, or at one character of a box or span. What text may follow depends on
the mode alone; which tags may, on the context, too::

    mode     plain --<ref>--> ref --</ref>--> plain
             plain --<box>--> box 0 --"["--> box 1 --"0"--> ... --"]"--> box end --</box>--> plain
             box end --";"--> box 0
    context  none --<task>--> task --</task>--> none

A token of several characters is allowed where all of them are, one after another. Places are written as
``grammar.render`` writes them. numpy only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from umm_jax.errors import ConfigError
from umm_jax.markup.dialects import Dialect
from umm_jax.markup.tasks import SEGMENTING, TASKS

Level = Literal["tags", "full"]
PLAIN, REF = 0, 1  # modes
_CONTEXTS = {name: k for k, name in enumerate(TASKS, 1)}
_FAR = 1 << 20


class Automaton(NamedTuple):
    """Tables over V tokens, M modes and C contexts (0: in no call); one begins in mode 0 and context 0.

    Attributes:
        follow: int16 [M, V], the mode after a token; -1 where it may not come.
        within: bool [C, V], where it may come as far as the context matters.
        after: int8 [V], the context after it; -1 leaves it as it is.
        ends: bool [V], the tokens that end an answer.
        least: int32 [M], tokens it takes at least to be plain again.
    """

    follow: np.ndarray
    within: np.ndarray
    after: np.ndarray
    ends: np.ndarray
    least: np.ndarray


def build(
    dialect: Dialect,
    pieces: Mapping[int, str],
    marks: Mapping[int, str],
    ends: tuple[int, ...],
    size: int,
    *,
    level: Level = "full",
    decimals: int = 3,
) -> Automaton:
    """The tables of a vocabulary.

    Args:
        pieces: the text of each token that is text; what is in neither `pieces` nor `marks` nor `ends` never
            comes.
        marks: the literal of each added token.
        ends: tokens that end an answer.
        size: V.
        level: "tags" balances tags and leaves what stands between those of a place to the model; "full"
            writes places digit by digit.

    Raises:
        ConfigError: a dialect without tags of its own, whose answers cannot be held to them; or one whose
            places "full" cannot write.
    """
    tags = [meaning for meaning in dialect.marks.values() if meaning[0] in ("open", "close")]
    paired = all(("close", task) in tags for kind, task in tags if kind == "open")
    if dialect.bare or not tags or not paired:
        raise ConfigError(f"dialect {dialect.name!r} has no tags to hold an answer to")
    if level == "full" and dialect.scale != 1:
        raise ConfigError(f"dialect {dialect.name!r} writes boxes in whole numbers: constrain its tags alone")
    modes = _Modes()
    for name in ("box", "time"):
        if (name, "") not in dialect.marks.values():
            continue
        if level == "tags":
            modes.free_place(name)
        else:
            modes.spelt_place(name, decimals)
    follow = np.full((modes.count, size), -1, np.int16)
    within = np.ones((len(TASKS) + 1, size), bool)
    after, last = np.full(size, -1, np.int8), np.zeros(size, bool)
    written = {char for _, char in modes.spelt}
    for token, text in pieces.items():
        # Most words of a vocabulary are no part of a number.
        for mode in range(modes.count) if written.issuperset(text) else modes.free:
            follow[mode, token] = modes.run(mode, text) if text else -1
    for token, literal in marks.items():
        kind, task = dialect.marks.get(literal, ("", ""))
        match kind:
            case "open":
                follow[PLAIN, token], after[token] = PLAIN, _CONTEXTS[task]
                within[1:, token] = False
            case "close":
                follow[PLAIN, token], after[token] = PLAIN, 0
                within[:, token] = False
                within[_CONTEXTS[task], token] = True
            case "seg":
                follow[PLAIN, token] = PLAIN
                within[:, token] = False
                within[[_CONTEXTS[task] for task in (*SEGMENTING, "image_edit")], token] = True
            case "ref":
                follow[PLAIN, token] = REF
            case "/ref":
                follow[REF, token] = PLAIN
            case "box" | "time":
                follow[PLAIN, token] = modes.begins[kind]
            case "/box" | "/time":
                follow[modes.ends[kind[1:]], token] = PLAIN
    for token in ends:
        follow[PLAIN, token], last[token] = PLAIN, True
        within[1:, token] = False
    return Automaton(follow, within, after, last, _least(follow))


@dataclass
class _Modes:
    """Modes by number as they are made, and what a character leads to.

    Attributes:
        begins: of each kind of place the mode after its tag; ends: the modes where it may be closed.
        free: modes in which any text leaves things as they are.
    """

    count: int = 2
    begins: dict[str, int] = field(default_factory=dict)
    ends: dict[str, list[int]] = field(default_factory=dict)
    free: set[int] = field(default_factory=lambda: {PLAIN, REF})
    spelt: dict[tuple[int, str], int] = field(default_factory=dict)

    def new(self) -> int:
        self.count += 1
        return self.count - 1

    def free_place(self, name: str) -> None:
        mode = self.new()
        self.free.add(mode)
        self.begins[name], self.ends[name] = mode, [mode]

    def spelt_place(self, name: str, decimals: int) -> None:
        """As ``grammar.render`` writes it: ``[0.120, 0.300, 0.560, 0.910]``, and more after a semicolon."""
        opened, closed, count = ("[", "]", 4) if name == "box" else ("{", "}", 2)
        begin = self.begins[name] = self.new()
        # What stands first in a text may come with a blank that is not one.
        blank = self._char(begin, " ")
        mode = self._char(blank, opened)
        self._char(begin, opened, mode)
        for k in range(count):
            if k:
                mode = self._char(self._char(mode, ","), " ")
            mode = self._share(mode, decimals)
        end = self._char(mode, closed)
        self._char(end, ";", begin)
        self.ends[name] = [end]

    def _share(self, mode: int, decimals: int) -> int:
        """A zero and digits, or a one and zeros."""
        after = self.new()
        for first, digits in (("0", "0123456789"), ("1", "0")):
            at = self._char(self._char(mode, first), ".")
            for k in range(decimals):
                to = after if k == decimals - 1 else self.new()
                for digit in digits:
                    self._char(at, digit, to)
                at = to
        return after

    def _char(self, mode: int, char: str, to: int | None = None) -> int:
        self.spelt[mode, char] = self.new() if to is None else to
        return self.spelt[mode, char]

    def run(self, mode: int, text: str) -> int:
        """The mode after a text; -1 where it may not come."""
        if mode in self.free:
            return mode
        for char in text:
            mode = self.spelt.get((mode, char), -1)
            if mode < 0:
                break
        return mode


def _least(follow: np.ndarray) -> np.ndarray:
    """Steps from each mode to plain, by tokens that there are."""
    least = np.full(len(follow), _FAR, np.int32)
    least[PLAIN] = 0
    while True:
        reach = np.where(follow >= 0, least[follow], _FAR).min(axis=1) + 1
        reach = np.minimum(least, np.minimum(reach, _FAR))
        if (reach == least).all():
            return least
        least = reach
