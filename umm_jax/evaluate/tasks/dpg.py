"""DPG-Bench: long prompts, each with yes/no questions that a fixed network answers about the picture.

    dpg_bench.csv, or dpg_bench/dpg_bench.csv: item_id, text, keywords, proposition_id, dependency,
    category_broad, category_detailed, tuple, question_natural_language; a row is a question
    prompts/<item_id>.txt beside it, where they are there: what is asked, else `text` of the table

Each prompt is drawn four times: a doc is one picture, "partiprompts97/0" the first of that item. The official
evaluator looks at the four in a grid, which :func:`export` writes. The setting `verdicts` names the answers:

    <name>_detail.txt  of the official evaluator: a line "path, (left, top, right, bottom), question, answer"
    .csv               item_id, picture (0 to 3), proposition_id, answer
    .jsonl             lines with the same names; or of this package, one for each picture and question:
                       {"id": "partiprompts97/0", "question": "1", "text": "yes", "model", "template_hash"}

A question counts as no if one that it depends on is no. A picture's score is the share of yes, an item's the
mean of its pictures; `overall` is the mean of items, in percent. A picture of which an answer is missing is
left out, and told; one that was not drawn has every question wrong. Categories are means over questions,
before dependencies are looked at, as the evaluator has them. Anything but "yes" is a no: `other_answers`
counts what is neither.

The released evaluator takes the first question of the table for a header, so that questions which depend on
it stop it, and an item whose evaluation stops vanishes; it passes dependencies on only in the order of the
table; its categories are of the last picture alone. `compat="released"` does all that.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import PIL.Image

from umm_jax.conversation import ImageData
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import verdicts
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, of_values, user
from umm_jax.evaluate.measures import dependency
from umm_jax.evaluate.source import Source, take
from umm_jax.evaluate.verdicts import NO_JUDGE, NO_PICTURE, NO_VERDICT, Verdict, Verdicts

_TABLE = "dpg_bench.csv", "dpg_bench/dpg_bench.csv"
_DETAIL = re.compile(r"(.+?), \((\d+), (\d+), \d+, \d+\), (.*)")


@dataclass(frozen=True)
class Settings:
    """What is asked, and who answered.

    Attributes:
        samples: pictures of each prompt, at most four; four in published figures.
        verdicts: file of answers; a relative name is below the folder of the table.
        judge: which network answered, where it was not the evaluator's own.
        compat: "released" as the released evaluator adds up, with its errors; for comparing with its figures.
    """

    samples: int = 4
    verdicts: str = ""
    judge: str = "mplug-large"
    compat: Literal["none", "released"] = "none"

    def __post_init__(self):
        if not 1 <= self.samples <= 4:
            raise ConfigError(f"samples: one to four pictures of each prompt, got {self.samples}")


@dataclass(frozen=True)
class Question:
    """One of an item. `parents` are ids of other questions, 0 is none; `category` is "broad - detailed"."""

    text: str
    parents: tuple[int, ...]
    category: str


@dataclass(frozen=True)
class Target:
    """Questions by their id, and the answers; `judge` is "" without a file of verdicts."""

    questions: Mapping[int, Question]
    answers: Mapping[int, Verdict]
    judge: str


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    where = source.path(*_TABLE)
    texts, items = _items(source.table(*_TABLE, delimiter=","), where, settings)
    found = _verdicts(source, items, settings) if settings.verdicts else None
    for item, questions in items.items():
        words = f"{where.parent.relative_to(source.root).as_posix()}/prompts/{item}.txt"
        prompt = source.text(words).strip() if (source.root / words).exists() else texts[item]
        for sample in range(settings.samples):
            id = f"{item}/{sample}"
            answers = {q: v for q in questions if found and (v := found.of(id, str(q))) is not None}
            target = Target(questions, answers, found.identity if found else "")
            yield Doc(id, (user(prompt),), target=target, group={"item": item})


def _items(
    rows: Sequence[Mapping[str, str]], where: Path, settings: Settings
) -> tuple[dict[str, str], dict[str, dict[int, Question]]]:
    """(prompts, questions) of the items. Raises DataError: a damaged row, or a parent that is not there."""
    texts: dict[str, str] = {}
    items: dict[str, dict[int, Question]] = {}
    for number, row in enumerate(rows, 2):
        line = f"{where}, row {number}"
        item = take(row, "item_id", line, str)
        if "/" in item:
            raise DataError(f"{line}: the item {item!r} has a slash in its name")
        texts.setdefault(item, take(row, "text", line, str))
        questions = items.setdefault(item, {})
        if settings.compat == "released" and number == 2:
            continue
        try:
            id = int(take(row, "proposition_id", line, str))
            parents = tuple(int(p) for p in take(row, "dependency", line, str).split(","))
        except ValueError:
            raise DataError(f"{line}: proposition_id and dependency must be numbers") from None
        if id in questions:
            raise DataError(f"{line}: {item} has question {id} twice")
        text = take(row, "question_natural_language", line, str)
        questions[id] = Question(text, parents, take(row, "tuple", line, str).split("(")[0].strip())
    for item, questions in items.items() if settings.compat == "none" else ():
        if unknown := {p for q in questions.values() for p in q.parents} - {0, *questions}:
            raise DataError(f"{where}: questions of {item} depend on {min(unknown)}, which it does not have")
    return texts, items


# --- answers ------------------------------------------------------------------------------------------


def _verdicts(source: Source, items: Mapping[str, Mapping[int, Question]], settings: Settings) -> Verdicts:
    """Answers by (picture's doc, question's id). Raises DataError."""
    path = verdicts.place(source, settings.verdicts)
    if path.suffix == ".txt":
        found = verdicts.of_tool("dpg", settings.judge, _official(path, items, settings))
    elif path.suffix == ".csv":
        rows = verdicts.table(path, "item_id", "picture", "proposition_id", "answer")
        found = verdicts.of_tool("dpg", settings.judge, _plain(rows, path))
    else:
        rows = verdicts.lines(path)
        if verdicts.is_recorded(rows[0]):
            found = verdicts.recorded(rows, path)
        else:
            found = verdicts.of_tool("dpg", settings.judge, _plain(rows, path))
    known = {f"{item}/{sample}" for item in items for sample in range(settings.samples)}
    return verdicts.check(found, known, path)


def _plain(rows: Sequence[Mapping[str, Any]], path: Path) -> dict[tuple[str, str], Verdict]:
    found: dict[tuple[str, str], Verdict] = {}
    for row in rows:
        key = (
            f"{take(row, 'item_id', path)}/{take(row, 'picture', path)}",
            str(take(row, "proposition_id", path)),
        )
        if key in found:
            raise DataError(f"{path}: question {key[1]} of {key[0]} is answered twice")
        found[key] = Verdict(text=take(row, "answer", path, str))
    return found


def _official(
    path: Path, items: Mapping[str, Mapping[int, Question]], settings: Settings
) -> dict[tuple[str, str], Verdict]:
    """Of the evaluator's detail file, which names questions by their words, in the order of the table."""
    found: dict[tuple[str, str], Verdict] = {}
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if (parts := _DETAIL.fullmatch(line)) is None:
            raise DataError(f"{where}: must be 'picture, (left, top, right, bottom), question, answer'")
        item = Path(parts.group(1)).name.split(".")[0]
        # Two in a row, two rows: the place of a picture in the grid.
        id = f"{item}/{(int(parts.group(2)) > 0) + 2 * (int(parts.group(3)) > 0)}"
        said = parts.group(4)
        if item not in items:
            raise DataError(f"{where}: the table has no item {item!r}; the answers belong to another version")
        # The longest that fits: one question may begin with another's words.
        texts = {q: question.text for q, question in items[item].items()}
        asked = max((t for t in texts.values() if said.startswith(f"{t}, ")), key=len, default=None)
        # Of questions with the same words the first is answered first.
        left = next((q for q, t in texts.items() if t == asked and (id, str(q)) not in found), None)
        if asked is None or left is None:
            raise DataError(f"{where}: {item} has no such question, or it is answered already: {said[:80]!r}")
        found[id, str(left)] = Verdict(text=said[len(asked) + 2 :])
    if not found:
        raise DataError(f"{path}: holds no verdicts")
    return found


# --- marks --------------------------------------------------------------------------------------------


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    target: Target = doc.target
    if not target.judge:
        return verdicts.unjudged(NO_JUDGE, response)
    judge, released = {"judge": target.judge}, settings.compat == "released"
    if not target.answers and not response.pictures and not released:
        wrong = dict.fromkeys(target.questions, False)
        return Marks(
            {"overall": 0.0}, NO_PICTURE, judge | {"answers": _by_category(target, wrong), "other": 0}
        )
    if problem := _problem(target):
        return Marks({}, "", judge | {"skipped": problem})
    answers = {q: _is_yes(target.answers[q].text, released) for q in target.questions}
    parents = {q: question.parents for q, question in target.questions.items()}
    try:
        kept = (dependency.apply_in_order if released else dependency.apply)(answers, parents)
    except KeyError:
        return Marks({}, "", judge | {"skipped": "depends on a question that was dropped"})
    other = sum(_plain_word(target.answers[q].text) not in ("yes", "no") for q in answers)
    parts = judge | {"answers": _by_category(target, answers), "other": other}
    return Marks({"overall": sum(kept.values()) / len(kept)}, "", parts)


def _problem(target: Target) -> str:
    """Why a picture cannot be scored; "" where it can."""
    if not target.answers:
        return NO_VERDICT
    if failures := sorted({v.failure for v in target.answers.values() if v.failure}):
        return failures[0]
    return "" if len(target.answers) == len(target.questions) else "a question has no answer"


def _plain_word(answer: str) -> str:
    return answer.strip().strip(".!").lower()


def _is_yes(answer: str, released: bool) -> bool:
    return (answer if released else _plain_word(answer)) == "yes"


def _by_category(target: Target, answers: Mapping[int, bool]) -> list[list]:
    """[[category, 0 or 1], ...], as plain values."""
    return [[target.questions[q].category, int(yes)] for q, yes in answers.items()]


# --- figures ------------------------------------------------------------------------------------------


def _judged(records: Sequence[Record], settings: Settings) -> dict[str, list[Record]]:
    """Pictures that have a score, by item; the released evaluator loses an item with any that has none."""
    found = {}
    for item, members in verdicts.split(records, "item").items():
        left = [r for r in members if "overall" in r.marks.values]
        if left and (settings.compat == "none" or len(left) == len(members)):
            found[item] = left
    return found


def units(records: Sequence[Record], settings: Settings) -> dict[str, float]:
    """{item: mean of its pictures, in percent}"""
    return {
        item: 100 * sum(r.marks.values["overall"] for r in members) / len(members)
        for item, members in _judged(records, settings).items()
    }


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    reason = verdicts.skips(records)
    items = _judged(records, settings)
    if reason == NO_JUDGE or not items:
        found = {"overall": Score(None, reason=reason or NO_VERDICT)}
        return found | {"skipped": verdicts.skipped(records)}
    invalid = sum(any(r.marks.invalid for r in members) for members in items.values())
    score = of_values(list(units(records, settings).values()), 1.0, invalid)
    found = {"overall": Score(score.value, score.stderr, score.n, invalid, reason)}
    last = settings.compat == "released"
    judged = [r for members in items.values() for r in (members[-1:] if last else members)]
    broad: dict[str, list[int]] = {}
    detailed: dict[str, list[int]] = {}
    for record in judged:
        for category, yes in record.marks.parts["answers"]:
            broad.setdefault(category.split("-")[0].strip(), []).append(yes)
            detailed.setdefault(category, []).append(yes)
    found |= {f"category={name}": of_values(broad[name]) for name in sorted(broad)}
    found |= {f"detailed={name}": of_values(detailed[name]) for name in sorted(detailed)}
    other = sum(r.marks.parts["other"] for r in judged)
    found["other_answers"] = Score(float(other), n=sum(len(r.marks.parts["answers"]) for r in judged))
    return found | {"skipped": verdicts.skipped(records)}


def export(docs: Sequence[Doc], responses: Mapping[str, Response], outdir: str | Path) -> list[str]:
    """Writes <item_id>.png, its pictures in a grid of two rows, as the official evaluator reads them.

    Its `resolution` is the side of one picture. A place without a picture is black.

    Args:
        outdir: new or empty.

    Returns:
        ids of the docs without a picture.

    Raises:
        DataError: the folder has something in it, or pictures are not square or not of one size.
    """
    folder, missing, side = verdicts.fresh_folder(outdir), [], 0
    items: dict[str, dict[int, ImageData]] = {}
    for doc in docs:
        item, sample = doc.id.rsplit("/", 1)
        picture = verdicts.drawn(responses.get(doc.id))
        if picture is None:
            missing.append(doc.id)
            continue
        if picture.width != picture.height or (side and picture.width != side):
            raise DataError(
                f"{doc.id}: the evaluator cuts squares of one size out of a grid; this picture is "
                f"{picture.width} x {picture.height}" + (f", another {side} x {side}" if side else "")
            )
        side = picture.width
        items.setdefault(item, {})[int(sample)] = picture
    several = max((max(pictures) for pictures in items.values()), default=0) > 0
    for item, pictures in items.items():
        grid = PIL.Image.new("RGB", (2 * side, 2 * side) if several else (side, side))
        for place, picture in pictures.items():
            grid.paste(picture.picture(), (side * (place % 2), side * (place // 2)))
        grid.save(folder / f"{item}.png")
    return missing


TASK = Task(
    "dpg",
    docs,
    mark,
    "overall",
    total,
    Settings,
    reply={"mode": "image"},
    files="prompts, table and evaluator are published with ELLA (TencentQQGYLab/ELLA, dpg_bench/)",
    prompt="{prompt}",
    post="yes or no by a fixed network",
    cost="B",
    units=units,
    judging=("verdicts", "judge"),
    export=export,
)
