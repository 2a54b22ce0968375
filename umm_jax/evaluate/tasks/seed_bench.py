"""SEED-Bench: questions of four options on pictures, told by the letter that is said or by likelihood.

    SEED-Bench.json: {"questions": [{"question_id", "question", "choice_a" to "choice_d", "answer" ("A" to
    "D"), "data_id", "data_type", "question_type_id"}], "question_type": {name: id}};
    SEED-Bench-image/<data_id>

Only the questions of data type "image" are asked, kinds 1 to 9; those of videos need frames that the release
does not hold. SEED-Bench-2 has another form and is not read.

The authors rank the four options by their likelihood as continuations (``by="likelihood"``): the log-
probabilities of a response, summed over each option's tokens; the first of equals is taken. Most who publish
figures ask for the letter (``by="letter"``), and take the first sign of the reply for it, so that "A dog"
says A; `accuracy_strict` wants a bare letter. The two ways must never be set side by side.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from umm_jax.conversation import Image, Text
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Response, Task, means, user
from umm_jax.evaluate.measures import choices
from umm_jax.evaluate.source import Source, take

PROMPTS = {
    "letter": "{question}\n{options}\nAnswer with the option's letter from the given choices directly.",
    "likelihood": "Question: {question}\nAnswer:",
}
LETTERS = "ABCD"


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        by: the letter a reply begins with, or the likeliest of the options.
    """

    by: Literal["letter", "likelihood"] = "letter"


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    path = source.path("SEED-Bench.json")
    release = source.json("SEED-Bench.json")
    kinds = {number: name for name, number in take(release, "question_type", path, dict).items()}
    for entry in take(release, "questions", path, list):
        if take(entry, "data_type", path, str) != "image":
            continue
        options = {letter: take(entry, f"choice_{letter.lower()}", path, str) for letter in LETTERS}
        answer = take(entry, "answer", path, str)
        if answer not in options:
            raise DataError(f"{path}: an answer must be A, B, C or D, it is {answer!r}")
        words = PROMPTS[settings.by].format(
            question=take(entry, "question", path, str),
            options="\n".join(f"{letter}. {text}" for letter, text in options.items()),
        )
        image = take(entry, "data_id", path, str)
        kind = take(entry, "question_type_id", path, int)
        yield Doc(
            str(take(entry, "question_id", path)),
            (user(Image("image"), Text(words)),),
            {"image": source.picture(f"SEED-Bench-image/{image}", f"seed_bench_image/{image}")},
            options=tuple(options.values()) if settings.by == "likelihood" else (),
            target=answer,
            group={"question_type": kinds.get(kind, str(kind))},
        )


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    if settings.by == "likelihood":
        if len(response.scores) != len(LETTERS):
            return Marks({"accuracy": 0.0}, "no score for each option")
        likeliest = LETTERS[max(range(len(LETTERS)), key=lambda at: response.scores[at])]
        return Marks({"accuracy": float(likeliest == doc.target)})
    text = response.text
    letter = text[:1].upper() if text[:1].upper() in set(LETTERS) else None
    strict = choices.strict_letter(text, LETTERS)
    values = {"accuracy": float(letter == doc.target), "accuracy_strict": float(strict == doc.target)}
    return Marks(values, choices.why_none(text, letter))


TASK = Task(
    "seed-bench",
    docs,
    mark,
    "accuracy",
    means("accuracy", "accuracy_strict", by=("question_type",)),
    Settings,
    files="published as AILab-CVC/SEED-Bench on the Hugging Face hub",
    reply={"mode": "text", "max_tokens": 16},
    prompt=str(PROMPTS),
    post="first sign, or likelihood",
)
