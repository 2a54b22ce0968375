"""ImgEdit-Bench, its basic part: single changes to photographs of nine types; a judge gives three ratings.

    basic_edit.json (earlier singleturn.json): {key: {"id": picture, "prompt", "edit_type"}}; the pictures at
    these names, or below singleturn/ or original_images/

A doc is an edit, its id the key. The official tool judges pictures "<key>.png" (see :func:`export`) and
writes result.json: {key: the judge's words, or {"error"}}. The setting `verdicts` names that file, or lines
of this package with the judge's words, which :func:`questions` asks for.

A doc's score is the mean of three ratings, 1..5, each on a line "Name: number". `overall_by_type`, the
headline, is the mean of the types' means, `overall_by_sample` that of all docs. Words in which there are not
just three ratings of 1 to 5 are no verdict: the doc is left out, and told. A reply without a picture, and
without a verdict, has the lowest rating.

The released scripts average whichever ratings they find ("4." or "4/5" they do not), of any size, and round
to two decimals twice: `released_by_type`.

The multi-turn part of the benchmark is judged by hand, so it is not here.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umm_jax.conversation import Image
from umm_jax.errors import DataError
from umm_jax.evaluate import judges, verdicts
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, user
from umm_jax.evaluate.source import Source, take
from umm_jax.evaluate.verdicts import NO_JUDGE, NO_PICTURE, NO_VERDICT, Verdict, Verdicts

LEAST, BEST, COUNT = 1, 5, 3
RATINGS = ("rating_1", "rating_2", "rating_3")
_LINE = re.compile(r"(.*?):[\s*_]+([0-9]{1,3})(?: ?/ ?5)?[\s*_.]*")

TEMPLATES = {
    "": (
        "The first picture was edited by a program; the second is what it made. The edit is of the type "
        "{edit_type}; the instruction was: {edit_prompt}\n"
        "Give three ratings of 1 (worst) to 5 (best): how far the instruction was followed, and only it; how "
        "seamless the result looks; how sound light, contact, detail and the untouched rest are. The second "
        "and third rating are not above the first.\n"
        "Answer in four lines:\nBrief reasoning: at most 20 words\nCompliance: a number from 1 to 5\n"
        "Seamlessness: a number from 1 to 5\nIntegrity: a number from 1 to 5"
    )
}


@dataclass(frozen=True)
class Settings:
    """Who judged.

    Attributes:
        verdicts: a file; a relative name is below the folder of the data.
        judge: its name, e.g. "gpt-4o-2024-11-20", where the file does not say it.
    """

    verdicts: str = ""
    judge: str = ""


@dataclass(frozen=True)
class Target:
    """What the judge said. `judge` is "" without verdicts."""

    verdict: Verdict | None
    judge: str


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    names = "basic_edit.json", "Basic/basic_edit.json", "singleturn.json"
    where, entries = source.path(*names), source.json(*names)
    if not isinstance(entries, dict):
        raise DataError(f"{where}: must be an object of edits by their keys")
    found = _verdicts(source, settings, entries) if settings.verdicts else None
    for key, entry in entries.items():
        name = take(entry, "id", where, str)
        yield Doc(
            key,
            (user(Image("image"), take(entry, "prompt", where, str)),),
            {"image": source.picture(name, f"singleturn/{name}", f"original_images/{name}")},
            target=Target(found.of(key) if found else None, found.identity if found else ""),
            group={"type": take(entry, "edit_type", where, str)},
        )


# --- verdicts -----------------------------------------------------------------------------------------


def _verdicts(source: Source, settings: Settings, known: Mapping[str, Any]) -> Verdicts:
    path = verdicts.place(source, settings.verdicts)
    if path.suffix == ".jsonl":
        return verdicts.check(verdicts.recorded(verdicts.lines(path), path), known, path)
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(said, dict) or not said:
        raise DataError(f"{path}: must be an object of the judge's words by the edits' keys")
    found = {(key, ""): _of_tool(value, key, path) for key, value in said.items()}
    return verdicts.check(verdicts.of_tool("imgedit", settings.judge, found), known, path)


def _of_tool(value: Any, key: str, path: Path) -> Verdict:
    if isinstance(value, dict) and "error" in value:
        return Verdict(failure="judge failed")
    if not isinstance(value, str):
        raise DataError(f"{path}: {key!r} must hold the judge's words, it is {str(value)[:60]!r}")
    return Verdict(value)


def ratings(text: str) -> list[float] | str:
    """The three ratings in a judge's words, or why they cannot be read.

    Marks of bold print around a line's parts, "/5" and a full stop at its end are no hindrance.
    """
    lines = [line for line in map(_LINE.fullmatch, text.splitlines()) if line]
    found = [float(line.group(2)) for line in lines if ": " not in line.group(1)]
    if len(found) != COUNT:
        return "not just three ratings"
    return found if all(LEAST <= f <= BEST for f in found) else "rating out of range"


def released(text: str) -> float | None:
    """What the released scripts make of a judge's words: the mean of what they find, rounded, if any."""
    parts = [line.strip().split(": ") for line in text.splitlines()]
    found = [int(p[1]) for p in parts if len(p) == 2 and p[1].isascii() and p[1].isdigit()]
    return round(sum(found) / len(found), 2) if found else None


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    target: Target = doc.target
    if not target.judge:
        return verdicts.unjudged(NO_JUDGE, response)
    parts: dict[str, Any] = {"judge": target.judge}
    if target.verdict is None and not response.pictures:
        return Marks(dict.fromkeys(("score", *RATINGS), LEAST / BEST), NO_PICTURE, parts)
    if target.verdict is None or target.verdict.failure:
        return Marks({}, "", parts | {"skipped": target.verdict.failure if target.verdict else NO_VERDICT})
    if target.verdict.score is not None:
        return _of_number(target.verdict.score, parts)
    if (as_released := released(target.verdict.text)) is not None:
        parts["released"] = as_released
    found = ratings(target.verdict.text)
    if isinstance(found, str):
        return Marks({}, "", parts | {"skipped": found})
    each = {name: rating / BEST for name, rating in zip(RATINGS, found)}
    return Marks({"score": sum(found) / COUNT / BEST, **each}, "", parts)


def _of_number(score: Any, parts: dict[str, Any]) -> Marks:
    if isinstance(score, (int, float)) and not isinstance(score, bool) and LEAST <= score <= BEST:
        return Marks({"score": score / BEST}, "", parts)
    return Marks({}, "", parts | {"skipped": "rating out of range"})


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    found = {
        "overall_by_type": verdicts.mean_of_groups(records, "score", "type", BEST),
        "overall_by_sample": verdicts.mean(records, "score", BEST),
        "released_by_type": _released_by_type(records),
    }
    found |= {name: verdicts.mean(records, name, BEST) for name in RATINGS}
    for kind, members in sorted(verdicts.split(records, "type").items()):
        found[f"type={kind}"] = verdicts.mean(members, "score", BEST)
    return found | {"skipped": verdicts.skipped(records)}


def _released_by_type(records: Sequence[Record]) -> Score:
    read = [r for r in records if "released" in r.marks.parts]
    if not read:
        return Score(None, reason=verdicts.skips(records) or "no words of a judge")
    means = []
    for members in verdicts.split(read, "type").values():
        values = [r.marks.parts["released"] for r in members]
        means.append(round(sum(values) / len(values), 2))
    return Score(sum(means) / len(means), n=len(read))


def units(records: Sequence[Record], settings: Settings) -> dict[str, float]:
    return verdicts.units_of_groups(records, "score", "type", BEST)


# --- judging ------------------------------------------------------------------------------------------


def questions(
    docs: Sequence[Doc], responses: Mapping[str, Response], templates: Mapping[str, str] = TEMPLATES
) -> Iterator[judges.Asked]:
    """What a judge is asked about the pictures that were drawn, the source picture before each.

    Args:
        templates: {edit type: words with {edit_prompt}, or as published <edit_prompt>}; "" is for types that
            have none of their own. The authors' are a file of this form.
    """
    for doc in docs:
        if (picture := verdicts.drawn(responses.get(doc.id))) is None:
            continue
        kind = doc.group["type"]
        if (template := templates.get(kind, templates.get(""))) is None:
            raise DataError(f"{doc.id}: no words for a judge of edits of type {kind!r}")
        values = dict.fromkeys(("{edit_prompt}", "<edit_prompt>"), doc.turns[0].text)
        words = judges.filled(template, values | {"{edit_type}": kind})
        yield judges.Asked(doc.id, "", words, (doc.conversation().images["image"], picture))


TASK = Task(
    "imgedit",
    docs,
    mark,
    "overall_by_type",
    total,
    Settings,
    reply={"mode": "image"},
    files="published with ImgEdit (PKU-YuanGroup/ImgEdit): Benchmark/Basic/basic_edit.json, and its pictures",
    prompt="{image}{instruction}",
    post="mean of three ratings of a judge",
    cost="C",
    scale=(1, 5),
    units=units,
    judging=("verdicts", "judge"),
    export=verdicts.export,
    questions=questions,
    templates=TEMPLATES,
)
