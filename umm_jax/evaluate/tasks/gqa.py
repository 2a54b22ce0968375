"""GQA: questions made from scene graphs, of the balanced set, answered in a word or two.

    testdev_balanced_questions.json (or val_balanced_questions.json, also below questions1.2/): {question id:
    {"question", "answer", "imageId", "isBalanced", "types": {"structural", "semantic", "detailed"}}};
    images/<imageId>.jpg

The official evaluator wants the very text of the answer: `accuracy_verbatim`. Figures of chat models are of
replies in small letters whose last full stops were taken off, as LLaVA hands them to it: `accuracy`. The
suite lmms-eval takes all marks of punctuation off both sides: `accuracy_no_marks`. The other official figures
(consistency, validity, plausibility, distribution) need further files, and are not here.
"""

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from umm_jax.conversation import Image, Text
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Response, Task, means, user
from umm_jax.evaluate.source import Source, take

PROMPTS = {"short": "{question}\nAnswer the question using a single word or phrase."}
_MARKS = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        split: of the balanced questions; answers of "test" and "challenge" are not published.
    """

    split: Literal["testdev", "val", "train"] = "testdev"


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    name = f"{settings.split}_balanced_questions.json"
    names = (name, f"questions1.2/{name}")
    path, questions = source.path(*names), source.json(*names)
    if not isinstance(questions, dict):
        raise DataError(f"{path}: must be questions by their ids")
    for id, entry in questions.items():
        if not take(entry, "isBalanced", path, bool):
            continue
        types = entry.get("types") or {}
        asked = PROMPTS["short"].replace("{question}", take(entry, "question", path, str))
        yield Doc(
            id,
            (user(Image("image"), Text(asked)),),
            {"image": source.picture(f"images/{take(entry, 'imageId', path, str)}.jpg")},
            target=take(entry, "answer", path, str),
            group={kind: types[kind] for kind in ("structural", "semantic") if types.get(kind)},
        )


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    text, answer = response.text, doc.target
    values = {
        "accuracy": text.rstrip(".").lower() == answer,
        "accuracy_verbatim": text == answer,
        "accuracy_no_marks": text.lower().translate(_MARKS) == answer.lower().translate(_MARKS),
    }
    return Marks({name: float(right) for name, right in values.items()}, "" if text else "empty")


TASK = Task(
    "gqa",
    docs,
    mark,
    "accuracy",
    means("accuracy", "accuracy_verbatim", "accuracy_no_marks", by=("structural", "semantic")),
    Settings,
    files="questions and pictures are published at cs.stanford.edu/people/dorarad/gqa",
    reply={"mode": "text", "max_tokens": 16},
    prompt=str(PROMPTS),
    post="small letters, last full stop off",
)
