"""An answer as words, places and calls: read from text or token ids, written back.

    answer := (text | place | call)*          call  := "<" TASK ">" (text | place | mark)* "</" TASK ">"
    place  := "<ref>" text "</ref>" | "<box>" box (";" box)* "</box>" | "<time>" span (";" span)* "</time>"
    box    := "[" x0 ", " y0 ", " x1 ", " y1 "]"      span := "{" from ", " to "}"      mark := "[SEG]"

Reading never fails: what is wrong is mended or left out, and told. Each diagnostic has a code:

| code | what was wrong | lenient | strict |
|---|---|---|---|
| UNCLOSED_CALL | a call without its end | what it says counts | call rejected |
| UNCLOSED_BOX | a place without its end | ends at the next tag | rejected |
| MISMATCHED_CLOSE | the end of another task | the beginning counts | rejected |
| NESTED_CALL | a call in a call | both count, one after the other | rejected |
| STRAY_CLOSE | an end of nothing | left out | left out |
| UNKNOWN_TAG | a tag that the dialect lacks | left out, its words are prose | error |
| ALIAS | a misspelling that is known | read as meant | error |
| EMPTY_CALL | a call without words where some are needed | left out | left out |
| BARE_SEG | a mask's mark outside a call | a call to segment | error |
| SEG_WRONG_CALL | such a mark in a call that gives no mask | region of an edit, else ignored | error |
| BOX_ARITY, TIME_ARITY | not four, or two, finite numbers | left out | rejected |
| BOX_CLIP, TIME_CLIP | slightly outside | brought to the edge | rejected |
| BOX_RANGE, TIME_RANGE | far outside | left out | rejected |
| BOX_SWAP, TIME_SWAP | corners or ends in the other order | put in order | rejected |
| BOX_EMPTY | no area | left out | rejected |
| TOO_MANY_CALLS | more calls than allowed | the first ones count | rejected |
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from umm_jax.markup.coordinates import SLACK, Box, checked
from umm_jax.markup.dialects import Dialect
from umm_jax.markup.tasks import SEGMENTING, TASKS

MAX_CALLS = 8
# What is left out of an answer and rejects no call; those of _ERRORS make the answer as a whole unsound.
_LEFT_OUT = ("STRAY_CLOSE", "EMPTY_CALL")
_ERRORS = ("UNKNOWN_TAG", "ALIAS", "BARE_SEG", "SEG_WRONG_CALL")


class Diagnostic(NamedTuple):
    """What was wrong, and where: a character of the text, or a token."""

    code: str
    at: int
    detail: str = ""


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Ref:
    """A phrase that names what the place after it is of."""

    text: str


@dataclass(frozen=True)
class Boxes:
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Times:
    """Spans of a clip, as shares of its length."""

    spans: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Seg:
    """A mark whose hidden state asks for one mask.

    Attributes:
        at: which mark of the answer it is, from 0; not part of what is compared.
    """

    at: int = -1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seg)

    def __hash__(self) -> int:
        return hash(Seg)


Part = Text | Ref | Boxes | Times | Seg


@dataclass(frozen=True)
class Call:
    """What an expert is asked to do.

    Attributes:
        parts: as they stand.
        implicit: asked for by a mark alone.
        flawed: something in it was left out, so that it may say more, or more widely, than was meant.
    """

    task: str
    parts: tuple[Part, ...]
    implicit: bool = False
    flawed: bool = False

    @property
    def prompt(self) -> str:
        """Its words. Where objects are laid out, those beside the objects' phrases."""
        kinds = Text if self.task == "layout_gen" else Text | Ref
        return _plain(" ".join(part.text for part in self.parts if isinstance(part, kinds)))

    @property
    def boxes(self) -> tuple[Box, ...]:
        return tuple(box for part in self.parts if isinstance(part, Boxes) for box in part.boxes)

    @property
    def times(self) -> tuple[tuple[float, float], ...]:
        return tuple(span for part in self.parts if isinstance(part, Times) for span in part.spans)

    @property
    def masks(self) -> tuple[Seg, ...]:
        return tuple(part for part in self.parts if isinstance(part, Seg))

    @property
    def objects(self) -> tuple[tuple[str, tuple[Box, ...]], ...]:
        """(phrase, boxes) of each phrase with the boxes right after it."""
        found: list[tuple[str, tuple[Box, ...]]] = []
        for part in self.parts:
            if isinstance(part, Ref):
                found.append((_plain(part.text), ()))
            elif isinstance(part, Boxes) and found:
                found[-1] = (found[-1][0], (*found[-1][1], *part.boxes))
        return tuple(found)


@dataclass(frozen=True)
class Answer:
    """What an answer says, in its order, and what was wrong with it."""

    segments: tuple[Text | Ref | Boxes | Times | Call, ...]
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(segment for segment in self.segments if isinstance(segment, Call))

    @property
    def text(self) -> str:
        """The prose alone."""
        return _plain("".join(s.text for s in self.segments if isinstance(s, Text | Ref)))


def _plain(text: str) -> str:
    return " ".join(text.split())


# --- lexemes ------------------------------------------------------------------------------------------------


class Lexeme(NamedTuple):
    """A piece of an answer: a text, or a mark of the dialect by its kind, with its task where it has one."""

    kind: str
    value: str
    at: int


def lex(text: str, dialect: Dialect) -> Iterator[Lexeme]:
    """Marks found in a text. Only for what no user wrote: no text can tell a typed tag from a token."""
    end = 0
    for found in dialect.pattern.finditer(text):
        if found.start() > end:
            yield Lexeme("text", text[end : found.start()], end)
        end = found.end()
        yield from _mark(found[0], found.start(), dialect)
    if end < len(text):
        yield Lexeme("text", text[end:], end)


def split(text: str, dialect: Dialect) -> Iterator[str]:
    """The marks of a text and the words between them, in order."""
    end = 0
    for found in dialect.pattern.finditer(text):
        if found[0] in dialect.marks:
            if found.start() > end:
                yield text[end : found.start()]
            yield found[0]
            end = found.end()
    if end < len(text):
        yield text[end:]


def lex_ids(ids: Sequence[int], marks: dict[int, str], decode, dialect: Dialect) -> Iterator[Lexeme]:
    """Marks among token ids: those of the added vocabulary, whatever the words between them spell.

    Args:
        marks: id -> literal of each added token.
        decode: the text of a run of other ids.
    """
    words: list[int] = []
    for at, token in enumerate(ids):
        literal = marks.get(int(token))
        if literal is None:
            words.append(int(token))
            continue
        if words:
            yield Lexeme("text", decode(words), at - len(words))
            words = []
        yield from _mark(literal, at, dialect)
    if words:
        yield Lexeme("text", decode(words), len(ids) - len(words))


def _mark(literal: str, at: int, dialect: Dialect) -> Iterator[Lexeme]:
    if literal in dialect.aliases:
        yield Lexeme("alias", literal, at)
        literal = dialect.aliases[literal]
    kind, task = dialect.marks.get(literal, ("unknown", literal))
    yield Lexeme(kind, task, at)


# --- reading ------------------------------------------------------------------------------------------------


def parse(
    answer: str | Iterable[Lexeme],
    dialect: Dialect,
    *,
    mode: Literal["lenient", "strict"] = "lenient",
    max_calls: int = MAX_CALLS,
) -> Answer:
    """Reads an answer; whatever it is, it gives one.

    Args:
        answer: a text, or the lexemes of one.
        max_calls: calls beyond are left out; strict, all are.
    """
    reader = _Reader(dialect, mode == "strict")
    for lexeme in lex(answer, dialect) if isinstance(answer, str) else answer:
        reader.read(lexeme)
    return reader.finish(max_calls)


class _Reader:
    """What has been read so far: finished segments, the parts of a call, the inside of a place."""

    def __init__(self, dialect: Dialect, strict: bool):
        self.dialect, self.strict = dialect, strict
        self.segments: list = []
        self.diagnostics: list[Diagnostic] = []
        self.task: str | None = None
        self.parts: list[Part] = []
        self.since = 0  # diagnostics before the present call
        self.place: str | None = None
        self.inside = ""
        self.marks = 0
        self.signal: str | None = None  # the task of the run of signals under way
        self.at = 0

    def tell(self, code: str, detail: str = "") -> None:
        self.diagnostics.append(Diagnostic(code, self.at, detail[:80]))

    def read(self, lexeme: Lexeme) -> None:
        kind, value, self.at = lexeme
        if kind != "signal":
            self.signal = None
        if self.place is not None:
            if kind == "text":
                self.inside += value
                return
            closes = kind == "/" + self.place
            if not closes:
                self.tell("UNCLOSED_BOX", self.place)
            self._end_place()
            if closes:
                return
        match kind:
            case "text":
                self._text(value)
            case "open":
                since = len(self.diagnostics)
                if self.task is not None:
                    self.tell("NESTED_CALL", value)
                    self.tell("UNCLOSED_CALL", self.task)
                    self._end_call()
                self.task, self.since = value, since
            case "close":
                if self.task is None:
                    self.tell("STRAY_CLOSE", value)
                    return
                if value not in ("", self.task):
                    self.tell("MISMATCHED_CLOSE", value)
                self._end_call()
            case "ref" | "box" | "time":
                self.place, self.inside = kind, ""
            case "/ref" | "/box" | "/time":
                self.tell("STRAY_CLOSE", kind)
            case "seg":
                self._seg()
            case "signal":
                if self.signal != value:
                    self._add(Call(value, ()))
                self.signal = value
            case "alias":
                self.tell("ALIAS", value)
            case "unknown":
                self.tell("UNKNOWN_TAG", value)

    def finish(self, max_calls: int) -> Answer:
        if self.place is not None:
            self.tell("UNCLOSED_BOX", self.place)
            self._end_place()
        if self.task is not None:
            self.tell("UNCLOSED_CALL", self.task)
            self._end_call()
        found = [
            Call("image_seg", tuple(s), implicit=True) if isinstance(s, list) else s for s in self.segments
        ]
        count = sum(isinstance(segment, Call) for segment in found)
        kept, calls = [], 0
        for segment in found:
            if isinstance(segment, Call):
                calls += 1
                if calls > max_calls:
                    self.tell("TOO_MANY_CALLS", segment.task)
                if calls > max_calls or (self.strict and count > max_calls):
                    continue
            kept.append(segment)
        return Answer(tuple(_joined(kept)), tuple(self.diagnostics))

    # --- pieces ---

    def _add(self, part) -> None:
        (self.segments if self.task is None else self.parts).append(part)

    def _text(self, value: str) -> None:
        if self.dialect.bare and self.task is None:
            end = 0
            for found in _PLACE.finditer(value):
                if found.start() > end:
                    self._add(Text(value[end : found.start()]))
                end = found.end()
                read = self._boxes if found[0][0] == "[" else self._times
                if (place := read(found[0])) is not None:
                    self._add(place)
            value = value[end:]
        if value:
            self._add(Text(value))

    def _seg(self) -> None:
        mark = Seg(self.marks)
        self.marks += 1
        if self.task is not None:
            if self.task not in SEGMENTING:
                self.tell("SEG_WRONG_CALL", self.task)
                if self.task != "image_edit" or self.strict:
                    return
            self._add(mark)
            return
        if not self.dialect.bare_seg:
            self.tell("BARE_SEG")
            if self.strict:
                return
        if not (self.segments and isinstance(self.segments[-1], list)):
            # A list until all marks in a row are there.
            self.segments.append([])
            before = self.segments[-2:-1]
            if before and isinstance(before[0], Text) and not before[0].text.strip():
                before = self.segments[-3:-2]
            if self.dialect.phrase_seg and before and isinstance(before[0], Ref):
                self.segments[-1].append(Text(before[0].text.strip()))
        self.segments[-1].append(mark)

    def _end_place(self) -> None:
        kind, inside = self.place, self.inside
        self.place = None
        if kind == "ref":
            self._add(Ref(inside))
        elif (place := (self._boxes if kind == "box" else self._times)(inside)) is not None:
            self._add(place)

    def _end_call(self) -> None:
        flaws = {d.code for d in self.diagnostics[self.since :]}
        call = Call(self.task, tuple(_joined(self.parts)))
        if self.dialect.labelled and call.parts and isinstance(call.parts[0], Text):
            label, colon, said = call.parts[0].text.partition(":")
            if colon and " " not in label.strip():
                call = replace(call, parts=(Text(said), *call.parts[1:]))
        self.task, self.parts = None, []
        if not call.prompt and not call.objects and not (TASKS[call.task].empty and call.parts):
            self.tell("EMPTY_CALL", call.task)
        elif not (self.strict and flaws - set(_LEFT_OUT)):
            lost = {"BOX_ARITY", "BOX_RANGE", "BOX_EMPTY", "TIME_ARITY", "TIME_RANGE"}
            self.segments.append(replace(call, flawed=bool(flaws & lost)))

    def _boxes(self, text: str) -> Boxes | None:
        found = []
        for numbers in self._numbers(text, _BOX, 4, "BOX_ARITY"):
            box, code = checked(numbers, self.dialect.scale)
            if code:
                self.tell(code, str(numbers))
            if box is not None and not (self.strict and code):
                found.append(box)
        return Boxes(tuple(found)) if found else None

    def _times(self, text: str) -> Times | None:
        found = []
        for begin, end in self._numbers(text, _SPAN, 2, "TIME_ARITY"):
            code = ""
            if min(begin, end) < -SLACK or max(begin, end) > 1 + SLACK:
                self.tell("TIME_RANGE", f"{begin}, {end}")
                continue
            if min(begin, end) < 0 or max(begin, end) > 1:
                begin, end, code = min(max(begin, 0.0), 1.0), min(max(end, 0.0), 1.0), "TIME_CLIP"
            if begin > end:
                begin, end, code = end, begin, code or "TIME_SWAP"
            if code:
                self.tell(code, f"{begin}, {end}")
            if not (self.strict and code):
                found.append((begin, end))
        return Times(tuple(found)) if found else None

    def _numbers(self, text: str, pattern: re.Pattern, count: int, code: str) -> list[list[float]]:
        """The groups of `count` finite numbers in a place."""
        found = []
        groups = pattern.findall(text)
        if not groups:
            self.tell(code, text)
        for group in groups:
            numbers = [_number(word) for word in group.split(",")]
            if len(numbers) != count or not all(map(math.isfinite, numbers)):
                self.tell(code, group)
            else:
                found.append(numbers)
        return found


def _joined(parts: Sequence) -> Iterator:
    """With texts that follow one another as one."""
    for is_text, run in itertools.groupby(parts, lambda part: isinstance(part, Text)):
        if is_text:
            yield Text("".join(part.text for part in run))
        else:
            yield from run


_BOX = re.compile(r"\[([^\[\]]{0,200})\]")
_SPAN = re.compile(r"\{([^{}]{0,200})\}")
# What may be a place in prose: numbers, and nothing else.
_PLACE = re.compile(r"\[[-+0-9.,eE ]{7,200}\]|\{[-+0-9.,eE ]{3,200}\}")
_NUMBER = re.compile(r"\s*[-+]?(\d{1,20}(\.\d{0,40})?|\.\d{1,40})([eE][-+]?\d{1,4})?\s*")


def _number(word: str) -> float:
    return float(word) if _NUMBER.fullmatch(word) else math.nan


def sound(answer: Answer) -> bool:
    """Whether strict reading has nothing against the answer as a whole."""
    return not any(d.code in _ERRORS for d in answer.diagnostics)


# --- writing ------------------------------------------------------------------------------------------------


def render(answer: Answer, dialect: Dialect, decimals: int = 3) -> str:
    """The answer in the spelling of a dialect.

    Raises:
        ConfigError: the dialect cannot say this.
        ValueError: words that the dialect would read as tags.
    """
    return "".join(_written(segment, dialect, decimals) for segment in answer.segments)


def _written(part, dialect: Dialect, decimals: int) -> str:
    share = f"{{:.{decimals}f}}".format
    number = share if dialect.scale == 1 else lambda v: str(round(v * dialect.scale))
    match part:
        case Text(text):
            return _safe(text, dialect)
        case Ref(text):
            return dialect.spelling("ref") + _safe(text, dialect) + dialect.spelling("/ref")
        case Boxes(boxes):
            said = ";".join(f"[{', '.join(map(number, box))}]" for box in boxes)
            return said if dialect.bare else dialect.spelling("box") + said + dialect.spelling("/box")
        case Times(spans):
            said = ";".join(f"{{{', '.join(map(share, span))}}}" for span in spans)
            return said if dialect.bare else dialect.spelling("time") + said + dialect.spelling("/time")
        case Seg():
            return dialect.spelling("seg")
    inner = "".join(_written(inside, dialect, decimals) for inside in part.parts)
    if part.implicit:
        return inner
    return dialect.spelling("open", part.task) + inner + dialect.spelling("close", part.task)


def _safe(text: str, dialect: Dialect) -> str:
    if found := dialect.pattern.search(text):
        raise ValueError(f"{found[0]!r} among the words would be read as a tag")
    return text
