"""MMMU: college questions of thirty subjects with pictures in the text, most with options, some open.

    <Subject>/validation-00000-of-00001.parquet, or one such file for all below data/; or validation.jsonl, or
    validation.json (a list), with the same fields: id ("validation_Art_Theory_3"), question, options (a list,
    also written as Python writes one), answer, question_type ("multiple-choice" or "open"), subfield, and
    image_1 to image_7: {"bytes", "path"}, in JSON a file name

"<image 2>" in a question or option stands for image_2; the picture is put there. An open question may have
several answers, written as a list.

`accuracy` is the official evaluator's, but where it can read no option it draws one at random, and here the
reply is invalid and wrong; `accuracy_official_expected` is what its draws would give on average. It finds an
answer to an open question anywhere in the reply; `accuracy_strict` wants a bare letter, or the answer alone.
Answers of the test split are not published. All figures are means over questions, not over subjects.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from umm_jax.conversation import Image, Part, Text
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Response, Task, means, user
from umm_jax.evaluate.measures import choices
from umm_jax.evaluate.source import Source, take

DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": (
        "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health"
    ),
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": (
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
        "Mechanical_Engineering"
    ),
}
DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects.split()}
PROMPTS = {
    "choice": "{question}\n\n{options}\n\nAnswer with the option's letter from the given choices directly.",
    "open": "{question}\n\nAnswer the question using a single word or phrase.",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PICTURES = tuple(f"image_{number}" for number in range(1, 8))


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        split: "validation", or "dev" with its five questions a subject; "test" says that it has no answers.
        parser: of letters: the evaluator's current one, or that of its first release, see ``choices``.
    """

    split: Literal["validation", "dev", "test"] = "validation"
    parser: Literal["current", "first_release"] = "current"


@dataclass(frozen=True)
class Target:
    """The right answers; options by letter where it is a choice."""

    answers: tuple[str, ...]
    options: Mapping[str, str] | None


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    for entry, picture, where in _entries(source, settings.split):
        id = take(entry, "id", where, str)
        subject = _subject(id, where)
        target = _target(entry, f"{where}, {id}")
        question = take(entry, "question", where, str)
        if target.options is None:
            words = PROMPTS["open"].format(question=question)
        else:
            options = "\n".join(f"({letter}) {text}" for letter, text in target.options.items())
            words = PROMPTS["choice"].format(question=question, options=options)
        parts = _parts(words)
        shown = {part.ref: picture(part.ref) for part in parts if isinstance(part, Image)}
        group = {"subject": subject, "discipline": DISCIPLINE_OF[subject]}
        yield Doc(id, (user(*parts),), shown, target=target, group=group)


def _entries(source: Source, split: str) -> Iterator[tuple[dict, Callable[[str], Path], str]]:
    """(fields, picture by its field, file) of all questions."""
    files = [p for at in (f"{split}-*.parquet", f"*/{split}-*.parquet") for p in source.root.glob(at)]
    for path in sorted(files):
        yield from ((entry, picture, str(path)) for entry, picture in source.parquet(path, PICTURES))
    if files:
        return
    path = source.path(f"{split}.jsonl", f"{split}.json", f"Accounting/{split}-00000-of-00001.parquet")
    entries = source.lines(path.name) if path.suffix == ".jsonl" else source.json(path.name)
    if not isinstance(entries, list):
        raise DataError(f"{path}: must be a list of questions")
    for entry in entries:
        yield entry, partial(_named, source, entry, path), str(path)


def _named(source: Source, entry: Mapping[str, Any], path: Path, field: str) -> Path:
    return source.picture(take(entry, field, path, str))


def _subject(id: str, where: str) -> str:
    """Of "validation_Art_Theory_3": "Art_Theory". Raises DataError."""
    subject = id.partition("_")[2].rpartition("_")[0]
    if subject not in DISCIPLINE_OF:
        raise DataError(f"{where}: the id {id!r} names none of MMMU's subjects")
    return subject


def _target(entry: Mapping[str, Any], where: str) -> Target:
    answer = take(entry, "answer", where, (str, list))
    several = isinstance(answer, list) or answer.startswith(("['", '["'))
    answers = _listed(answer, where) if several else [answer]
    if answers in ([], [""], ["?"]):
        raise DataError(f"{where}: has no answer; those of the test split are known to MMMU's server alone")
    if take(entry, "question_type", where, str) != "multiple-choice":
        return Target(tuple(answers), None)
    texts = _listed(take(entry, "options", where, (str, list)), where)
    options = dict(zip(LETTERS, texts))
    if len(options) < 2 or not set(answers) <= set(options):
        raise DataError(f"{where}: the answer {answer!r} is none of {len(options)} options")
    return Target(tuple(answers), options)


def _listed(value: str | list, where: str) -> list[str]:
    """The texts of a list, or of one written as Python writes it. Raises DataError."""
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
        if isinstance(found, list):
            return [str(one) for one in found]
    except (ValueError, SyntaxError):
        pass
    raise DataError(f"{where}: is no list as Python writes one: {str(value)[:120]}")


def _parts(words: str) -> list[Part]:
    """The text in pieces, with pictures where it names them."""
    first, *pieces = words.split("<image ")
    parts: list[Part] = [Text(first)]
    for piece in pieces:
        number, closed, text = piece.partition(">")
        if closed and f"image_{number}" in PICTURES:
            parts += [Image(f"image_{number}"), Text(text)]
        else:
            parts.append(Text(f"<image {piece}"))
    return [part for part in parts if not isinstance(part, Text) or part.text.strip()]


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    target, text = doc.target, response.text
    if target.options is None:
        right = choices.mmmu_open_right(target.answers, choices.mmmu_open(text))
        strict = choices.mmmu_open_same(target.answers, text)
        return Marks(_values(right, right, strict), "" if text else "empty")
    letter = choices.mmmu_choice(text, target.options, first_release=settings.parser == "first_release")
    right = letter in target.answers
    expected = len(target.answers) / len(target.options) if letter is None else right
    strict = choices.strict_letter(text, target.options) in target.answers
    return Marks(_values(right, expected, strict), choices.why_none(text, letter))


def _values(right: bool, expected: float, strict: bool) -> dict[str, float]:
    return {
        "accuracy": float(right),
        "accuracy_official_expected": float(expected),
        "accuracy_strict": float(strict),
    }


TASK = Task(
    "mmmu",
    docs,
    mark,
    "accuracy",
    means("accuracy", "accuracy_official_expected", "accuracy_strict", by=("discipline", "subject")),
    Settings,
    files="published as MMMU/MMMU on the Hugging Face hub; parquet needs the extra [data]",
    reply={"mode": "text", "max_tokens": 128},
    prompt=str(PROMPTS),
    post="official parsers without chance, and strict",
)
