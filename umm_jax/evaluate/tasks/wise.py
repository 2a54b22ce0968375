"""WISE: a thousand prompts that want knowledge of the world; a judge rates each picture three times, 0 to 2.

    cultural_common_sense.json, spatio-temporal_reasoning.json, natural_science.json, or these in data/: lists
    of {"prompt_id" (1 to 1000), "Prompt", "Explanation", "Subcategory"}

A doc is a prompt, its id that of the prompt. The official tool judges pictures "<prompt_id>.png" (see
:func:`export`) and writes, for each of the three files, scores (.jsonl: {"prompt_id", "consistency",
"realism", "aesthetic_quality"}) and the judge's words (.json: [{"prompt_id", "evaluation"}]). The setting
`verdicts` names one of these files, or a folder of them: its .json files with words are read if there are
any, else its .jsonl files. Prefer words: the tool's newest release scores what it cannot read as 0. Or it
names lines of this package, with the judge's words under the prompt's id; :func:`questions` asks for them.

    WiScore = (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2, 0..1

`overall_by_count`, the headline, is the authors': categories weigh as many prompts as they have.
`overall_unweighted` is the plain mean of the six categories, which some reports give. A category is a range
of ids. A prompt whose judge failed is left out, and told; `overall_by_count_unread_as_0` puts 0 for each
rating that could not be read in a judge's words. A reply without a picture, and without a verdict, is worth
0.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umm_jax.errors import DataError
from umm_jax.evaluate import judges, verdicts
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, user
from umm_jax.evaluate.source import Source, take
from umm_jax.evaluate.verdicts import NO_JUDGE, NO_PICTURE, NO_VERDICT, Verdict, Verdicts

FILES = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")
# Category: (last id, weight in the overall score of its authors).
CATEGORIES = {
    "culture": (400, 0.4),
    "time": (567, 0.167),
    "space": (700, 0.133),
    "biology": (800, 0.1),
    "physics": (900, 0.1),
    "chemistry": (1000, 0.1),
}
WEIGHTS = {name: weight for name, (_, weight) in CATEGORIES.items()}
RATINGS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
BEST = 2
FAILED = (9.9, 999)  # what releases of the tool write where the judge failed
_RATING = re.compile(r"\*{0,2}(consistency|realism|aesthetic quality)\*{0,2}\s*:?\s*(\d)", re.IGNORECASE)

TEMPLATES = {
    "": (
        "Rate this picture, which was drawn for the prompt below. Be strict: 2 is for pictures without a "
        "fault, and in doubt the lower rating holds.\n"
        "Consistency: 0, the picture misses or contradicts what the prompt means; 1, it shows a part of it; "
        "2, it shows all of it, as the explanation says.\n"
        "Realism: 0, impossible or plainly artificial; 1, small faults of light, matter or space; 2, like a "
        "photograph.\n"
        "Aesthetic quality: 0, unpleasant or without composition; 1, acceptable; 2, outstanding.\n\n"
        "Prompt: {prompt}\nExplanation: {explanation}\n\n"
        "Answer with three lines and nothing else:\nConsistency: 0, 1 or 2\nRealism: 0, 1 or 2\n"
        "Aesthetic Quality: 0, 1 or 2"
    )
}


@dataclass(frozen=True)
class Settings:
    """Who judged.

    Attributes:
        verdicts: file or folder; a relative name is below the folder of the prompts.
        judge: its name, e.g. "gpt-4o-2024-05-13", where the files do not say it.
    """

    verdicts: str = ""
    judge: str = ""


@dataclass(frozen=True)
class Target:
    """What the judge is told of a prompt, and what it said. `judge` is "" without verdicts."""

    explanation: str
    verdict: Verdict | None
    judge: str


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    entries: dict[str, Mapping[str, Any]] = {}
    for name in FILES:
        where = source.path(name, f"data/{name}")
        for entry in source.json(name, f"data/{name}"):
            id = str(take(entry, "prompt_id", where, int))
            if id in entries:
                raise DataError(f"{where}: the prompt {id} is there twice")
            entries[id] = entry
    found = _verdicts(source, settings, entries) if settings.verdicts else None
    for id, entry in entries.items():
        explanation = take(entry, "Explanation", "WISE", str)
        target = Target(explanation, found.of(id) if found else None, found.identity if found else "")
        group = {"category": _category(int(id)), "subcategory": str(entry.get("Subcategory", ""))}
        yield Doc(id, (user(take(entry, "Prompt", "WISE", str)),), target=target, group=group)


def _category(id: int) -> str:
    for name, (last, _) in CATEGORIES.items():
        if 1 <= id <= last:
            return name
    raise DataError(f"WISE has prompts 1 to 1000, not {id}")


# --- verdicts -----------------------------------------------------------------------------------------


def _verdicts(source: Source, settings: Settings, known: Mapping[str, Any]) -> Verdicts:
    path = verdicts.place(source, settings.verdicts)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.json")) or sorted(path.glob("*.jsonl"))
        if not files:
            raise DataError(f"{path}: holds neither .json nor .jsonl files of verdicts")
    found: dict[tuple[str, str], Verdict] = {}
    recorded: list[dict[str, Any]] = []
    for file in files:
        rows = _rows(file)
        if verdicts.is_recorded(rows[0]):
            recorded += rows
            continue
        for row in rows:
            key = str(take(row, "prompt_id", file)), ""
            if key in found:
                raise DataError(f"{file}: a verdict on prompt {key[0]} came before")
            found[key] = _of_tool(row, file)
    if recorded and found:
        raise DataError(f"{path}: verdicts of two forms; they cannot be of one judge")
    made = verdicts.recorded(recorded, path) if recorded else verdicts.of_tool("wise", settings.judge, found)
    return verdicts.check(made, known, path)


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix != ".json":
        return verdicts.lines(path)
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: must be a list of verdicts")
    return rows


def _of_tool(row: Mapping[str, Any], path: Path) -> Verdict:
    if "evaluation" in row:
        text = take(row, "evaluation", path, str)
        return Verdict(failure="judge failed") if text.startswith("Evaluation failed") else Verdict(text)
    ratings = {name: take(row, name, path, (int, float)) for name in RATINGS}
    if set(ratings.values()) & set(FAILED):
        return Verdict(failure="judge failed")
    return Verdict(score=ratings)


def ratings(text: str) -> dict[str, float]:
    """What a judge's words say of the three, as the official tool reads them: the last of equal names."""
    found = {name.lower().replace(" ", "_"): float(digit) for name, digit in _RATING.findall(text)}
    return {name: found[name] for name in RATINGS if name in found}


def wiscore(found: Mapping[str, float]) -> float:
    """0..1; what is missing is 0."""
    return sum(weight * found.get(name, 0.0) for name, weight in RATINGS.items()) / BEST


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    target: Target = doc.target
    if not target.judge:
        return verdicts.unjudged(NO_JUDGE, response)
    judge, verdict = {"judge": target.judge}, target.verdict
    if verdict is None:
        if response.pictures:
            return Marks({}, "", judge | {"skipped": NO_VERDICT})
        return Marks(dict.fromkeys(("wiscore", "unread_as_0", *RATINGS), 0.0), NO_PICTURE, judge)
    if verdict.failure:
        return Marks({}, "", judge | {"skipped": verdict.failure})
    found = ratings(verdict.text) if verdict.score is None else verdict.score
    as_zero = {"unread_as_0": wiscore(found)} if isinstance(found, Mapping) else {}
    if not isinstance(found, Mapping) or not all(_is_rating(found.get(name)) for name in RATINGS):
        sound = all(_is_rating(v) for v in found.values()) if isinstance(found, Mapping) else False
        reason = "a rating is missing" if sound else "rating out of range"
        return Marks(as_zero if sound else {}, "", judge | {"skipped": reason})
    values = {name: found[name] / BEST for name in RATINGS}
    return Marks({"wiscore": wiscore(found), **as_zero, **values}, "", judge)


def _is_rating(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= BEST


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    unread = verdicts.mean_of_groups(records, "unread_as_0", "category", weights=WEIGHTS)
    found = {
        "overall_by_count": verdicts.mean_of_groups(records, "wiscore", "category", weights=WEIGHTS),
        "overall_unweighted": verdicts.mean_of_groups(
            records, "wiscore", "category", weights=dict.fromkeys(CATEGORIES, 1 / len(CATEGORIES))
        ),
        "overall_by_count_unread_as_0": unread,
    }
    for name in RATINGS:
        found[name] = verdicts.mean(records, name, BEST)
    split = verdicts.split(records, "category")
    for category in (c for c in CATEGORIES if c in split):
        found[f"category={category}"] = verdicts.mean(split[category], "wiscore")
    return found | {"skipped": verdicts.skipped(records)}


def units(records: Sequence[Record], settings: Settings) -> dict[str, float]:
    return verdicts.units_of_groups(records, "wiscore", "category", weights=WEIGHTS)


# --- judging ------------------------------------------------------------------------------------------


def questions(
    docs: Sequence[Doc], responses: Mapping[str, Response], templates: Mapping[str, str] = TEMPLATES
) -> Iterator[judges.Asked]:
    """What a judge is asked about the pictures that were drawn.

    Args:
        templates: {"": words with {prompt} and {explanation}}; those the authors publish, or ours.
    """
    for doc in docs:
        if (picture := verdicts.drawn(responses.get(doc.id))) is not None:
            values = {"{prompt}": doc.turns[0].text, "{explanation}": doc.target.explanation}
            yield judges.Asked(doc.id, "", judges.filled(templates[""], values), (picture,))


TASK = Task(
    "wise",
    docs,
    mark,
    "overall_by_count",
    total,
    Settings,
    reply={"mode": "image"},
    files="prompts are published with WISE (PKU-YuanGroup/WISE), three files in data/",
    prompt="{prompt}",
    post="three ratings of a judge",
    cost="C",
    scale=(0, 1),
    units=units,
    judging=("verdicts", "judge"),
    export=verdicts.export,
    questions=questions,
    templates=TEMPLATES,
)
