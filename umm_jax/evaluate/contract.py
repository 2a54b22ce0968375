"""What a benchmark is: things to ask, what a reply is worth, and how that adds up. No model, no chance.

    Task      docs(source, settings) -> Doc ...       what is asked, with the right answers
              mark(doc, response, settings) -> Marks  what one reply is worth
              total(records, settings) -> Score ...   the figures of all of them

A task is one file of ``evaluate/tasks``; formulas that several share are in ``evaluate/measures``. Replies
come from a model (``evaluate/asking.py``) or from a file (``evaluate/responses.py``): marking needs neither.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from umm_jax.conversation import Box, Conversation, Image, ImageData, Mask, Part, Text, Turn
from umm_jax.data.gate import Limits, examine
from umm_jax.data.quarantine import Rejected
from umm_jax.errors import DataError
from umm_jax.evaluate.measures.groups import together


class Stored(Protocol):
    """Where a picture lies: a Path, or a ``source.Embedded``. Its str names it for complaints."""

    def read_bytes(self) -> bytes:
        """Raises OSError."""


@dataclass(frozen=True)
class Doc:
    """One thing to ask.

    Attributes:
        id: its own in the benchmark, as text; replies are matched by it.
        turns: what the model is shown; the last is the user's.
        images: the pictures they show, or where they lie: they are read when the doc is asked, not before.
        then: further user turns, said one after each reply, whatever it was.
        options: continuations to be ranked by their probability, where nothing is written.
        target: the right answers, as the task's `mark` wants them; the model never sees it.
        group: names by which figures are told apart, e.g. {"category": "OCR"}.
    """

    id: str
    turns: tuple[Turn, ...]
    images: Mapping[str, ImageData | Stored] = field(default_factory=dict)
    then: tuple[Turn, ...] = ()
    options: tuple[str, ...] = ()
    target: Any = None
    group: Mapping[str, str] = field(default_factory=dict)

    def conversation(self) -> Conversation:
        """What is asked, pictures read and let through the gate.

        Raises:
            DataError: a picture is missing, or one that the gate rejects; it names the file.
        """
        images = {}
        for name, image in self.images.items():
            if not isinstance(image, ImageData):
                try:
                    image = examine(image.read_bytes(), Limits()).image
                except OSError as error:
                    raise DataError(f"{image}: cannot be read: {error.strerror or error}") from None
                except Rejected as error:
                    raise DataError(f"{image}: {error}") from None
            images[name] = image
        return Conversation(self.id, self.turns, images)


def user(*parts: Part | str) -> Turn:
    """A user's turn; a str is a text."""
    return Turn("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


@dataclass(frozen=True)
class Response:
    """What came back for one doc.

    Attributes:
        turns: the model's, one for the doc and one for each of its further user turns.
        images: the pictures they show.
        scores: a log-probability for each option of the doc.
        error: why nothing came back, where nothing did: a failure of ours, never the model's.
    """

    id: str
    turns: tuple[Turn, ...] = ()
    images: Mapping[str, ImageData] = field(default_factory=dict)
    scores: tuple[float, ...] = ()
    error: str = ""

    @property
    def text(self) -> str:
        """All its text."""
        return " ".join(turn.text for turn in self.turns).strip()

    def parts(self, kind: type) -> list:
        """Its parts of a kind, in order."""
        return [part for turn in self.turns for part in turn.parts if isinstance(part, kind)]

    @property
    def masks(self) -> list[Mask]:
        return self.parts(Mask)

    @property
    def boxes(self) -> list[Box]:
        return self.parts(Box)

    @property
    def pictures(self) -> list[ImageData]:
        """The pictures it shows, in order."""
        return [self.images[part.ref] for part in self.parts(Image)]


@dataclass(frozen=True)
class Marks:
    """What one reply is worth.

    Attributes:
        values: figures of this doc alone, as a task defines them; those of which means are taken lie in 0..1.
        invalid: why nothing could be read in the reply, where nothing could: it counts as wrong, and apart.
        parts: what a task's `total` needs beyond figures, e.g. areas to be added up; in memory alone.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    invalid: str = ""
    parts: Mapping[str, Any] = field(default_factory=dict)


class Record(NamedTuple):
    """A doc that was marked."""

    doc: Doc
    marks: Marks


@dataclass(frozen=True)
class Score:
    """A figure of a whole benchmark, on the scale its authors use.

    Attributes:
        value: None where it could not be had; `reason` says why.
        stderr: standard error of the value; None where the figure is no mean of docs.
        n: docs it is of. n_invalid: those of them in whose reply nothing could be read.
    """

    value: float | None
    stderr: float | None = None
    n: int = 0
    n_invalid: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as it is called on the command line.
        source: what `docs` is given: a ``source.Source`` of the user's files, or the WorldConfig of a run.
        docs: (source, settings) -> Docs in the benchmark's own order; reads annotations, opens no picture.
        mark: (doc, response, settings) -> Marks; never sees a response with an error.
        headline: the figure a table shows.
        total: (records, settings) -> {figure: Score}, the headline among them; of all records that could be
            marked, invalid ones included.
        Settings: a frozen dataclass of what can be chosen; everything that changes a figure is in it.
        reply: what a model's ReplySettings are made with, e.g. {"mode": "text"}.
        files: what its authors publish and where, for who lacks it.
        prompt: the words around what is asked, for the report; part of its hash.
        post: names what is done to a reply before it is compared.
        cost: A needs annotations and a formula, B a fixed network too, C a judge.
        version: raised when the same replies would be worth something else.
        scale: what the headline is between; for the report.
        units: (records, settings) -> {id: value}, where the headline is no mean of docs: of groups of docs,
            or of docs weighted so that their mean moves as the headline does; for paired comparisons.
        noted: (records, settings) -> {name: text} of what else figures depend on, such as the tokenizer that
            was at hand; where that differs, cells are not compared.
        judging: settings that say who judged replies and where that lies. They may be given when replies are
            scored, and cells that differ in them alone are compared, if the judge is the same: each record
            tells it as `judge` among its marks' parts.
        export: (docs, responses, folder) -> ids without a picture; writes what an official tool wants.
        questions: (docs, responses, templates) -> what a judge is asked, see ``judges.Asked``; templates: the
            words, by question, unless others are given.
    """

    name: str
    docs: Callable[[Any, Any], Iterable[Doc]]
    mark: Callable[[Doc, Response, Any], Marks]
    headline: str
    total: Callable[[Sequence[Record], Any], Mapping[str, Score]]
    Settings: type
    reply: Mapping[str, Any] = field(default_factory=lambda: {"mode": "text"})
    files: str = ""
    prompt: str = ""
    post: str = "none"
    cost: Literal["A", "B", "C"] = "A"
    version: int = 1
    scale: tuple[float, float] = (0, 100)
    source: Literal["files", "world"] = "files"
    units: Callable[[Sequence[Record], Any], Mapping[str, float]] | None = None
    noted: Callable[[Sequence[Record], Any], Mapping[str, str]] | None = None
    judging: tuple[str, ...] = ()
    export: Callable[[Sequence[Doc], Mapping[str, Response], Any], Sequence[str]] | None = None
    questions: Callable[..., Iterable[Any]] | None = None
    templates: Mapping[str, str] = field(default_factory=dict)


# --- adding up ----------------------------------------------------------------------------------------


def mean(records: Sequence[Record], name: str, scale: float = 100.0) -> Score:
    """The mean over docs that have this figure, times `scale`, with its standard error."""
    values = [r.marks.values[name] for r in records if name in r.marks.values]
    invalid = sum(bool(r.marks.invalid) for r in records if name in r.marks.values)
    return of_values(values, scale, invalid)


def of_values(values: Sequence[float], scale: float = 100.0, n_invalid: int = 0) -> Score:
    """The mean of numbers, times `scale`; one number has no standard error, none have no mean."""
    n = len(values)
    if not n:
        return Score(None, reason="no doc has this figure")
    centre = math.fsum(values) / n
    spread = math.fsum((v - centre) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
    return Score(scale * centre, scale * math.sqrt(spread / n) if n > 1 else None, n, n_invalid)


def means(*names: str, scale: float = 100.0, by: Sequence[str] = ()) -> Callable:
    """A `total` that is the mean of figures; and of the first of them by groups, as ``name/group=value``."""

    def total(records: Sequence[Record], settings: Any = None) -> dict[str, Score]:
        found = {name: mean(records, name, scale) for name in names}
        for group in by:
            split = together((r.doc.group[group], r) for r in records if group in r.doc.group)
            for value in sorted(split):
                found[f"{names[0]}/{group}={value}"] = mean(split[value], names[0], scale)
        return found

    return total
