"""POPE: is an object in the picture, asked of objects at random, frequent ones, and ones often seen together.

    coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, or below output/coco/: lines of
    {"question_id", "image", "text", "label"}, label "yes" or "no"; val2014/

The three files number their questions alike, so an id is "<category>-<question_id>": "popular-17".

Of every figure there are two. The official evaluator takes for yes whatever does not say no, so one that
never answers gets 50 with a yes ratio of 100; the ``strict_`` ones want the reply to begin with yes or no,
and count any other as wrong and as no yes. A reply that is neither is invalid, though the official figures
have read a yes in it. The precision, recall and F1 of all are those of all questions together;
`f1_of_categories` is the mean over categories that is often printed instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from umm_jax.conversation import Image, Text
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, mean, user
from umm_jax.evaluate.measures import groups, yesno
from umm_jax.evaluate.source import Source, take

PROMPTS = {
    "short": "{question}\nAnswer the question using a single word or phrase.",
    "published": "{question}",
}
CATEGORIES = ("random", "popular", "adversarial")
_MEANS = ("accuracy", "yes_ratio")


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        categories: of CATEGORIES. prompt: the words around a question, see PROMPTS.
    """

    categories: tuple[Literal["random", "popular", "adversarial"], ...] = CATEGORIES
    prompt: Literal["short", "published"] = "short"


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    for category in settings.categories:
        name = f"coco_pope_{category}.json"
        for entry in source.lines(name, f"output/coco/{name}"):
            label = take(entry, "label", name, str)
            if label not in ("yes", "no"):
                raise DataError(f"{name}: a label must be yes or no, it is {label!r}")
            question = PROMPTS[settings.prompt].replace("{question}", take(entry, "text", name, str))
            image = take(entry, "image", name, str)
            yield Doc(
                f"{category}-{take(entry, 'question_id', name)}",
                (user(Image("image"), Text(question)),),
                {"image": source.picture(f"val2014/{image}", image)},
                target=label == "yes",
                group={"category": category},
            )


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    official, strict = yesno.pope(response.text), yesno.strict(response.text)
    invalid = "empty" if not response.text else "neither yes nor no" if strict is None else ""
    return Marks(
        {
            "accuracy": float(official is doc.target),
            "yes_ratio": float(official),
            "strict_accuracy": float(strict is doc.target),
            "strict_yes_ratio": float(strict is True),
        },
        invalid,
        {"official": official, "strict": strict},
    )


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    found = _figures(records)
    split = groups.together((r.doc.group["category"], r) for r in records)
    parts = {category: _figures(split[category]) for category in settings.categories if category in split}
    for by in ("", "strict_"):
        f1 = [figures[f"{by}f1"].value for figures in parts.values()]
        if f1 and None not in f1:
            found[f"{by}f1_of_categories"] = Score(sum(f1) / len(f1), n=len(records))
        else:
            found[f"{by}f1_of_categories"] = Score(None, reason="a category has no F1")
    for category, figures in parts.items():
        found |= {f"{name}/category={category}": score for name, score in figures.items()}
    return found


def _figures(records: Sequence[Record]) -> dict[str, Score]:
    found, invalid = {}, sum(bool(r.marks.invalid) for r in records)
    for by, kind in (("", "official"), ("strict_", "strict")):
        table = yesno.figures((r.doc.target, r.marks.parts[kind]) for r in records)
        for name, value in table.items():
            if name in _MEANS:
                found[by + name] = mean(records, by + name)
            elif value is None:
                found[by + name] = Score(None, n=len(records), reason="nothing is, or was called, a yes")
            else:
                found[by + name] = Score(100 * value, n=len(records), n_invalid=invalid)
    return found


TASK = Task(
    "pope",
    docs,
    mark,
    "accuracy",
    total,
    Settings,
    files="questions are published in output/coco of POPE's repository, pictures at cocodataset.org",
    reply={"mode": "text", "max_tokens": 16},
    prompt=str(PROMPTS),
    post="official and strict yes/no",
)
