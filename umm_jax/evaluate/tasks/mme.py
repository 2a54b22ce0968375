"""MME: two yes/no questions of each picture, one of either answer, in fourteen categories.

    <category>/images/<name>.jpg (or .png) and <category>/questions_answers_YN/<name>.txt, or both side by
    side in <category>/; below the folder itself, or below MME_Benchmark_release_version/ (MME_Benchmark/)

A text file has two lines, "question<TAB>Yes" and "question<TAB>No". An id is "<category>/<name>-1" or "-2".

Each category has `acc`, the share of questions that are right, and `acc_plus`, that of pictures both of whose
questions are, each 0..100; its `score` is their sum. The headline `perception` adds up the scores of ten
categories (0..2000), `cognition` those of four (0..800), `total` both. The official evaluator reads the first
four letters of a reply, see ``measures/yesno.py``; what has neither yes nor no there is invalid. It takes a
"know" for a no: the sums called ``strict_`` want the first word to be yes or no.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from umm_jax.conversation import Image, Text
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, of_values, user
from umm_jax.evaluate.measures import groups, yesno
from umm_jax.evaluate.source import Source

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark")
PERCEPTION += ("artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUMS = {"perception": PERCEPTION, "cognition": COGNITION, "total": PERCEPTION + COGNITION}
OWN_WORDS = " Please answer yes or no."
PROMPTS = {
    "published": "{question}",
    "short": "{question}\nAnswer the question using a single word or phrase.",
}
_FOLDERS = ("", "MME_Benchmark_release_version/MME_Benchmark/", "MME_Benchmark_release_version/")


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        categories: the folders that are asked; a sum has no value where one of its own is left out.
        prompt: "published" asks as the file does, which ends in OWN_WORDS; "short" has other words for these.
    """

    categories: tuple[str, ...] = SUMS["total"]
    prompt: Literal["published", "short"] = "published"


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    for category in settings.categories:
        folder = source.path(*(f"{above}{category}" for above in _FOLDERS))
        apart = (folder / "questions_answers_YN").is_dir()
        texts = folder / "questions_answers_YN" if apart else folder
        pictures = folder / "images" if apart else folder
        names = sorted(p.stem for p in texts.glob("*.txt") if not p.name.startswith("."))
        if not names:
            raise DataError(f"{texts}: has no question files (.txt)")
        for name in names:
            asked = _questions(source, texts / f"{name}.txt")
            below = (pictures / name).relative_to(source.root).as_posix()
            picture = source.picture(*(f"{below}{end}" for end in (".jpg", ".png", ".jpeg")))
            for number, (question, right) in enumerate(asked, 1):
                if settings.prompt == "short":
                    question = question.replace(OWN_WORDS, "")
                yield Doc(
                    f"{category}/{name}-{number}",
                    (user(Image("image"), Text(PROMPTS[settings.prompt].replace("{question}", question))),),
                    {"image": picture},
                    target=right,
                    group={"category": category, "picture": name},
                )


def _questions(source: Source, path: Path) -> list[tuple[str, bool]]:
    """[(question, whether yes is right)], two of them. Raises DataError."""
    lines = source.text(path.relative_to(source.root).as_posix()).split("\n")
    found = [line.strip().split("\t") for line in lines if line.strip()]
    if len(found) != 2 or any(len(f) != 2 or f[1].strip().lower() not in ("yes", "no") for f in found):
        raise DataError(f"{path}: must be two lines, each a question, a tab, and Yes or No")
    return [(question.strip(), answer.strip().lower() == "yes") for question, answer in found]


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    official, strict = yesno.mme(response.text), yesno.strict(response.text)
    invalid = "empty" if not response.text else "neither yes nor no" if official is None else ""
    return Marks({"acc": float(official is doc.target), "strict": float(strict is doc.target)}, invalid)


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    split = groups.together((r.doc.group["category"], r) for r in records)
    of_category = {by: {c: _pair(split[c], by) for c in split} for by in ("acc", "strict")}
    found = {}
    for by, prefix in (("acc", ""), ("strict", "strict_")):
        for name, categories in SUMS.items():
            found[prefix + name] = _sum(of_category[by], categories)
    for category in split:
        acc, plus = of_category["acc"][category]
        found[f"acc/category={category}"], found[f"acc_plus/category={category}"] = acc, plus
        found[f"score/category={category}"] = _sum(of_category["acc"], (category,))
    return found


def _pair(records: Sequence[Record], by: str) -> tuple[Score, Score]:
    """(acc, acc_plus) of a category; pictures with one reply of two have no part in the second."""
    pictures = groups.together((r.doc.group["picture"], r.marks) for r in records)
    whole = [marks for marks in pictures.values() if len(marks) == 2]
    acc = of_values([r.marks.values[by] for r in records], 100, sum(bool(r.marks.invalid) for r in records))
    both = [float(all(m.values[by] for m in marks)) for marks in whole]
    return acc, of_values(both, 100, sum(any(m.invalid for m in marks) for marks in whole))


def _sum(of_category: dict[str, tuple[Score, Score]], categories: Sequence[str]) -> Score:
    """acc and acc_plus of these categories added up; no value where one has none."""
    missing = [c for c in categories if c not in of_category or of_category[c][1].value is None]
    if missing:
        return Score(None, reason=f"no replies to whole pictures of {', '.join(missing)}")
    pairs = [of_category[c] for c in categories]
    value = sum(acc.value + plus.value for acc, plus in pairs)
    return Score(value, None, sum(acc.n for acc, _ in pairs), sum(acc.n_invalid for acc, _ in pairs))


TASK = Task(
    "mme",
    docs,
    mark,
    "perception",
    total,
    Settings,
    files="MME's authors send it on request; its release is the folder MME_Benchmark_release_version",
    reply={"mode": "text", "max_tokens": 16},
    prompt=str(PROMPTS),
    post="first four letters",
    scale=(0, 2000),
)
