"""MMVP: pairs of pictures that CLIP hardly tells apart, the same question of both, with opposite answers.

    Questions.csv: a row for each picture in the order of their numbers: Index, Question, Options
    ("(a) Open (b) Closed"), Correct Answer ("(a)"); "MMVP Images"/1.jpg to 300.jpg

Pictures 1 and 2 are a pair, 3 and 4 the next; rows are told by their place, as the authors' script does.

`pair`, the headline, is the share of pairs of which both are right; `accuracy` that of pictures. The authors
have GPT-4 say whether a reply is right. Here letters are read, a bare one first, else as MMBench reads them;
``_strict`` figures want a bare one. Pairs with one reply of two are in no pair figure.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from umm_jax.conversation import Image, Text
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, mean, of_values, user
from umm_jax.evaluate.measures import choices, groups
from umm_jax.evaluate.source import Source, take

PROMPTS = {
    "letter": "{question}\n{options}\nAnswer with the option's letter from the given choices directly.",
    "published": "{question} {published}",
}
# Two pairs whose answers are the wrong way round in the release, as the suite lmms-eval has them.
CORRECTED = {99: "B", 100: "A", 279: "B", 280: "A"}
_OPTION = re.compile(r"\(([a-z])\)\s*(.*?)\s*(?=\([a-z]\)|$)", re.I | re.S)


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        prompt: the words around a question, see PROMPTS; "published" is the authors' own.
        answers: as they were published, or with the CORRECTED ones.
    """

    prompt: Literal["letter", "published"] = "letter"
    answers: Literal["published", "corrected"] = "published"


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    path = source.path("Questions.csv")
    rows = source.table("Questions.csv", delimiter=",")
    if len(rows) % 2:
        raise DataError(f"{path}: has {len(rows)} rows; they must be pairs")
    for number, row in enumerate(rows, 1):
        published = take(row, "Options", path, str)
        options = {letter.upper(): text for letter, text in _OPTION.findall(published)}
        answer = take(row, "Correct Answer", path, str).strip(" ()").upper()
        if len(options) < 2 or answer not in options:
            raise DataError(f"{path}, row {number}: the answer {answer!r} is none of {published!r}")
        if settings.answers == "corrected":
            answer = CORRECTED.get(number, answer)
        words = PROMPTS[settings.prompt].format(
            question=take(row, "Question", path, str),
            options="\n".join(f"{letter}. {text}" for letter, text in options.items()),
            published=published,
        )
        yield Doc(
            str(number),
            (user(Image("image"), Text(words)),),
            {"image": source.picture(f"MMVP Images/{number}.jpg", f"MMVP Imgaes/{number}.jpg")},
            target={"answer": answer, "options": options, "pair": (number + 1) // 2},
        )


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    options, answer = doc.target["options"], doc.target["answer"]
    strict = choices.strict_letter(response.text, options)
    letter = strict or choices.mmbench(response.text, options)
    values = {"accuracy": float(letter == answer), "accuracy_strict": float(strict == answer)}
    return Marks(values, choices.why_none(response.text, letter))


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    whole = _whole(records).values()
    invalid = sum(any(m.invalid for m in marks) for marks in whole)
    found = {}
    for by in ("", "_strict"):
        both = [float(all(m.values[f"accuracy{by}"] for m in marks)) for marks in whole]
        found[f"pair{by}"] = of_values(both, 100, invalid)
        found[f"accuracy{by}"] = mean(records, f"accuracy{by}")
    return found


def _whole(records: Sequence[Record]) -> dict[int, list[Marks]]:
    """{pair: marks of both}, of pairs that are all there."""
    pairs = groups.together((r.doc.target["pair"], r.marks) for r in records)
    return {pair: marks for pair, marks in pairs.items() if len(marks) == 2}


def units(records: Sequence[Record], settings: Settings) -> dict[str, float]:
    whole = _whole(records).items()
    return {str(pair): float(all(m.values["accuracy"] for m in marks)) for pair, marks in whole}


TASK = Task(
    "mmvp",
    docs,
    mark,
    "pair",
    total,
    Settings,
    files="published as MMVP/MMVP on the Hugging Face hub",
    reply={"mode": "text", "max_tokens": 16},
    prompt=str(PROMPTS),
    post="letter, then option text; no judge",
    units=units,
)
