"""GEdit-Bench: instructions of eleven kinds to change photographs, in English and Chinese; rated by a judge.

    train-*.parquet, or these in data/: task_type, key, instruction, instruction_language ("en" or "cn"),
    input_image ({"bytes", "path"}), Intersection_exist; or gedit.jsonl with the same, input_image a file name

A doc is an instruction in one language, its id "subject-add/en/<key>", as the official folder of pictures has
it, which :func:`export` writes. The setting `verdicts` names one of

    .csv    of the official tool: <model>_combined_gpt_score.csv with edited_image, sementics_score (so
            spelled), quality_score; or the folder of it, where without it those of each kind are read
    .jsonl  of this package: for each doc the judge's words under question "SC" and "PQ", which
            :func:`questions` asks for, or a `score` of 0 to 10

SC and PQ are what ``measures/viescore.py`` reads, 0..10; `overall` of a doc is sqrt(SC * PQ), of the
benchmark the mean over the eleven kinds of their means; so are `semantics` and `quality`. Those called
`intersection_` are over the docs marked Intersection_exist. `overall_by_sample` is the mean of docs, which
lmms-eval reports. A doc whose judge failed is left out, and told: the official tool draws a rating at random
where it cannot read one, so its files may hold such ratings. A reply without a picture, and without a
verdict, is worth 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from umm_jax.conversation import Image
from umm_jax.errors import DataError
from umm_jax.evaluate import judges, verdicts
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Stored, Task, user
from umm_jax.evaluate.measures import viescore
from umm_jax.evaluate.source import Source, take
from umm_jax.evaluate.verdicts import NO_JUDGE, NO_PICTURE, NO_VERDICT, Verdict, Verdicts

GROUPS = (
    "background_change color_alter material_alter motion_change ps_human style_change subject-add "
    "subject-remove subject-replace text_change tone_transfer"
).split()
WEIGHTS = dict.fromkeys(GROUPS, 1 / len(GROUPS))
QUESTIONS = ("SC", "PQ")
FIGURES = ("overall", "semantics", "quality")
_FIELDS = ("task_type", "key", "instruction", "instruction_language", "Intersection_exist")

TEMPLATES = {
    "SC": (
        "The first picture was edited by a program; the second is what it made. The instruction was: "
        "{instruction}\n"
        "Give two ratings of 0 to 10. First, how far the second picture follows the instruction: 0 not at "
        "all, 10 perfectly. Second, how well it spares what the instruction does not speak of: 0 it is "
        "another picture, 10 nothing else has changed. If the two look the same, the edit has failed.\n"
        'Answer with JSON alone: {"score": [first, second], "reasoning": "a short sentence"}'
    ),
    "PQ": (
        "This picture was made by a program. Give two ratings of 0 to 10. First, how natural it looks: 0 "
        "plainly false in space or light, 10 natural. Second, how free it is of faults of drawing: 0 mostly "
        "faults, such as smears or wrong limbs, 10 none.\n"
        'Answer with JSON alone: {"score": [first, second], "reasoning": "a short sentence"}'
    ),
}


@dataclass(frozen=True)
class Settings:
    """What is asked, and who judged.

    Attributes:
        language: of the instructions.
        verdicts: file or folder; a relative name is below the folder of the data.
        judge: its name, e.g. "gpt-4.1-2025-04-14", where the files do not say it.
    """

    language: Literal["en", "cn"] = "en"
    verdicts: str = ""
    judge: str = ""


@dataclass(frozen=True)
class Target:
    """What the judge said to either question. `judge` is "" without verdicts."""

    answers: Mapping[str, Verdict]
    judge: str


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    rows = [(row, picture, where) for row, picture, where in _rows(source)]
    ids = [_id(row, where) for row, _, where in rows]
    found = _verdicts(source, settings, ids) if settings.verdicts else None
    for id, (row, picture, where) in zip(ids, rows):
        if row["instruction_language"] != settings.language:
            continue
        answers = {q: v for q in QUESTIONS if found and (v := found.of(id, q)) is not None}
        both = take(row, "Intersection_exist", where, (bool, int))
        yield Doc(
            id,
            (user(Image("image"), take(row, "instruction", where, str)),),
            {"image": picture},
            target=Target(answers, found.identity if found else ""),
            group={"kind": row["task_type"], "intersection": "yes" if both else "no"},
        )


def _id(row: Mapping[str, Any], where: str) -> str:
    kind, language = take(row, "task_type", where, str), take(row, "instruction_language", where, str)
    if kind not in GROUPS or language not in ("en", "cn"):
        raise DataError(f"{where}: {kind!r} in {language!r} is no kind and language of GEdit-Bench")
    return f"{kind}/{language}/{take(row, 'key', where, str)}"


# --- data ---------------------------------------------------------------------------------------------


def _rows(source: Source) -> Iterator[tuple[Mapping[str, Any], Stored, str]]:
    """(fields, picture to be edited, file) of all docs."""
    files = sorted(p for at in ("train-*.parquet", "data/train-*.parquet") for p in source.root.glob(at))
    for path in files:
        for row, picture in source.parquet(path, fields=_FIELDS):
            yield row, picture("input_image"), str(path)
    if not files:
        path = source.path("gedit.jsonl", "data/train-00000-of-00001.parquet")
        for row in source.lines(path.name):
            yield row, source.picture(take(row, "input_image", path, str)), str(path)


# --- verdicts -----------------------------------------------------------------------------------------


def _verdicts(source: Source, settings: Settings, known: Sequence[str]) -> Verdicts:
    path = verdicts.place(source, settings.verdicts)
    if path.is_file() and path.suffix != ".csv":
        return verdicts.check(verdicts.recorded(verdicts.lines(path), path), known, path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*_combined_gpt_score.csv")) or sorted(path.glob("*_gpt_score.csv"))
        if not files:
            raise DataError(f"{path}: holds no *_gpt_score.csv")
        if len(files) > 1 and files[0].name.endswith("_combined_gpt_score.csv"):
            raise DataError(f"{path}: holds verdicts on several models; name one of the files")
    found: dict[tuple[str, str], Verdict] = {}
    for file in files:
        for row in verdicts.table(file, "edited_image", "sementics_score", "quality_score"):
            id = "/".join(PurePosixPath(row["edited_image"]).with_suffix("").parts[-3:])
            if (id, "SC") in found:
                raise DataError(f"{file}: verdicts on {id} came before")
            for question, column in zip(QUESTIONS, ("sementics_score", "quality_score")):
                found[id, question] = _of_cell(row[column], file)
    return verdicts.check(verdicts.of_tool("gedit", settings.judge, found), known, path)


def _of_cell(text: str, path: Path) -> Verdict:
    if not text.strip() or text.strip().lower() == "nan":
        return Verdict(failure="judge failed")
    try:
        return Verdict(score=float(text))
    except ValueError:
        raise DataError(f"{path}: a score must be a number, it is {text!r}") from None


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    target: Target = doc.target
    if not target.judge:
        return verdicts.unjudged(NO_JUDGE, response)
    judge = {"judge": target.judge}
    if not target.answers and not response.pictures:
        return Marks(dict.fromkeys(FIGURES, 0.0), NO_PICTURE, judge)
    found = [_rating(target.answers.get(question)) for question in QUESTIONS]
    if problem := next((f for f in found if isinstance(f, str)), ""):
        return Marks({}, "", judge | {"skipped": problem})
    semantics, quality = found
    scores = viescore.overall(semantics, quality), semantics, quality
    return Marks({name: score / viescore.BEST for name, score in zip(FIGURES, scores)}, "", judge)


def _rating(verdict: Verdict | None) -> float | str:
    """0..10, or why there is none."""
    if verdict is None:
        return NO_VERDICT
    if verdict.failure:
        return verdict.failure
    if verdict.score is None:
        found = viescore.ratings(verdict.text)
        return found if isinstance(found, str) else min(found)
    sound = isinstance(verdict.score, (int, float)) and not isinstance(verdict.score, bool)
    return float(verdict.score) if sound and 0 <= verdict.score <= viescore.BEST else "rating out of range"


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    sets = {"": records, "intersection_": [r for r in records if r.doc.group["intersection"] == "yes"]}
    found = {
        f"{prefix}{name}": verdicts.mean_of_groups(members, name, "kind", viescore.BEST, WEIGHTS)
        for prefix, members in sets.items()
        for name in FIGURES
    }
    found["overall_by_sample"] = verdicts.mean(records, "overall", viescore.BEST)
    split = verdicts.split(records, "kind")
    for kind in (g for g in GROUPS if g in split):
        found[f"kind={kind}"] = verdicts.mean(split[kind], "overall", viescore.BEST)
    return found | {"skipped": verdicts.skipped(records)}


def units(records: Sequence[Record], settings: Settings) -> dict[str, float]:
    return verdicts.units_of_groups(records, "overall", "kind", viescore.BEST, WEIGHTS)


# --- judging ------------------------------------------------------------------------------------------


def questions(
    docs: Sequence[Doc], responses: Mapping[str, Response], templates: Mapping[str, str] = TEMPLATES
) -> Iterator[judges.Asked]:
    """What a judge is asked about the pictures that were drawn: SC with the source picture before, PQ alone.

    Args:
        templates: {"SC": words with {instruction} (VIEScore writes <instruction>), "PQ": words}.
    """
    for doc in docs:
        if (picture := verdicts.drawn(responses.get(doc.id))) is None:
            continue
        before = doc.conversation().images["image"]
        values = dict.fromkeys(("{instruction}", "<instruction>"), doc.turns[0].text)
        yield judges.Asked(doc.id, "SC", judges.filled(templates["SC"], values), (before, picture))
        yield judges.Asked(doc.id, "PQ", templates["PQ"], (picture,))


def export(docs: Sequence[Doc], responses: Mapping[str, Response], outdir: str | Path) -> list[str]:
    """Writes fullset/<kind>/<language>/<key>.png and <key>_SRCIMG.png for the official tool.

    Args:
        outdir: new or empty.

    Returns:
        ids of the docs without a picture.

    Raises:
        DataError: the folder has something in it, or a source picture cannot be read. StorageError.
    """
    folder, missing = verdicts.fresh_folder(outdir), []
    for doc in docs:
        picture = verdicts.drawn(responses.get(doc.id))
        if picture is None:
            missing.append(doc.id)
            continue
        verdicts.save(picture, folder / "fullset" / f"{doc.id}.png")
        verdicts.save(doc.conversation().images["image"], folder / "fullset" / f"{doc.id}_SRCIMG.png")
    return missing


TASK = Task(
    "gedit",
    docs,
    mark,
    "overall",
    total,
    Settings,
    reply={"mode": "image"},
    files="published as the data set stepfun-ai/GEdit-Bench, parquet files",
    prompt="{image}{instruction}",
    post="smallest of each list of ratings, VIEScore",
    cost="C",
    scale=(0, 10),
    units=units,
    judging=("verdicts", "judge"),
    export=export,
    questions=questions,
    templates=TEMPLATES,
)
