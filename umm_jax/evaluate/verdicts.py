"""What was said of drawn pictures, read from files: by a judge, a detector, or a benchmark's official tool.

    {"id": "12", "question": "SC", "kind": "openai", "model": "m", "template_hash": "ab", "text": "..."}

is a line of the form of this package, which ``judges.collect`` writes: `question` where a doc has several,
and of "text", "score" (a number, or several by name) and "failure" (why there is neither) just one.
Benchmarks read the files of their official tools besides.

A doc without a verdict has no figure: it is left out of means, counted, and the reason is told. That nobody
answered says nothing about a picture, so it is never worth 0.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from umm_jax.conversation import ImageData
from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.errors import DataError
from umm_jax.evaluate import contract
from umm_jax.evaluate import responses as replies
from umm_jax.evaluate.contract import Marks, Record, Response, Score
from umm_jax.evaluate.measures import groups
from umm_jax.evaluate.source import Source, inside

NO_JUDGE = "no judge"
NO_VERDICT = "no verdict"
NO_PICTURE = "no picture"


@dataclass(frozen=True)
class Verdict:
    """What was said of one picture, or of one question about it.

    Attributes:
        text: a judge's words. score: a number, or several by name, where they are read already.
        failure: why there is neither, in few words.
    """

    text: str = ""
    score: Any = None
    failure: str = ""


@dataclass(frozen=True)
class Verdicts:
    """Those of one file.

    Attributes:
        identity: whose they are; figures of different judges are not comparable.
        found: by (doc's id, question); the question is "" where a doc has one.
    """

    identity: str
    found: Mapping[tuple[str, str], Verdict] = field(default_factory=dict)

    def of(self, id: str, question: str = "") -> Verdict | None:
        return self.found.get((id, question))


# --- files --------------------------------------------------------------------------------------------


def place(source: Source, name: str) -> Path:
    """Where a file of verdicts lies: a relative name is below the folder of the annotations.

    It is no part of the annotations, so it does not go into the source's digest. Raises DataError: not there.
    """
    path = source.root / name
    if not path.exists():
        raise DataError(f"{path}: no such file of verdicts (a relative name is below {source.root})")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises DataError: damaged, or empty."""
    found = replies.read_lines(path)
    if not found:
        raise DataError(f"{path}: holds no verdicts")
    return found


def table(path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises DataError: unreadable, empty, or without one of the columns."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise DataError(f"{path}: holds no verdicts")
    if missing := [c for c in columns if rows[0].get(c) is None]:
        raise DataError(f"{path}: has no column {', '.join(missing)}")
    return rows


def is_recorded(row: Mapping[str, Any]) -> bool:
    """Whether a line is of the form of this package."""
    return "id" in row and bool(row.keys() & {"text", "score", "failure"})


def identity(kind: str, model: str, template_hash: str) -> str:
    """The name of a judge in results."""
    return f"{kind}/{model}/{template_hash}"


def recorded(rows: Iterable[Mapping[str, Any]], where: Path | str) -> Verdicts:
    """Verdicts from lines of the form of this package.

    A failure may be followed by a verdict on the same question: it was asked again.

    Raises:
        DataError: a line of another form, two verdicts on one question, or two judges.
    """
    judges: dict[str, int] = {}
    found: dict[tuple[str, str], Verdict] = {}
    for number, row in enumerate(rows, 1):
        said = [k for k in ("text", "score", "failure") if row.get(k) is not None]
        if "id" not in row or len(said) != 1 or not isinstance(row.get("text", ""), str):
            raise DataError(f"{where}, verdict {number}: needs 'id', and one of 'text', 'score', 'failure'")
        try:
            judge = identity(str(row.get("kind", "recorded")), str(row["model"]), str(row["template_hash"]))
        except KeyError as error:
            raise DataError(f"{where}, verdict {number}: has no {error}: whose is it?") from None
        judges.setdefault(judge, number)
        key = str(row["id"]), str(row.get("question", ""))
        if key in found and not found[key].failure:
            raise DataError(f"{where}, verdict {number}: a verdict on {' '.join(key).strip()!r} came before")
        if key not in found or said[0] != "failure":
            found[key] = Verdict(**{said[0]: row[said[0]] if said[0] == "score" else str(row[said[0]])})
    if len(judges) > 1:
        (a, at), (b, other) = list(judges.items())[:2]
        raise DataError(f"{where}: two judges in one file: {a} (verdict {at}) and {b} (verdict {other})")
    return Verdicts(next(iter(judges), ""), found)


def of_tool(tool: str, judge: str, found: Mapping[tuple[str, str], Verdict]) -> Verdicts:
    """Verdicts from an official tool's file, which does not say who judged: the user may, by name."""
    return Verdicts(f"{tool}/{judge or 'unnamed'}", found)


def check(found: Verdicts, known: Iterable[str], where: Path | str) -> Verdicts:
    """The same. Raises DataError: verdicts on docs this benchmark does not have."""
    known = set(known)
    if strangers := sorted({id for id, _ in found.found} - known):
        raise DataError(
            f"{where}: {len(strangers)} docs with verdicts are not in this benchmark "
            f"({', '.join(strangers[:3])}): they belong to another version or part of it"
        )
    return found


# --- marks and figures --------------------------------------------------------------------------------


def unjudged(reason: str, response: Response) -> Marks:
    """Marks of a doc without a verdict: no figures, and why. A reply without a picture is invalid, too."""
    return Marks({}, "" if response.pictures else NO_PICTURE, {"skipped": reason})


def skips(records: Sequence[Record]) -> str:
    """How many docs have no verdict, and why; "" where all have one."""
    reasons = Counter(r.marks.parts["skipped"] for r in records if "skipped" in r.marks.parts)
    if set(reasons) == {NO_JUDGE}:
        return NO_JUDGE
    told = ", ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
    return f"{reasons.total()} of {len(records)} left out: {told}" if reasons else ""


def skipped(records: Sequence[Record]) -> Score:
    """The number of docs without a verdict, as a figure."""
    return Score(
        float(sum("skipped" in r.marks.parts for r in records)), n=len(records), reason=skips(records)
    )


def mean(records: Sequence[Record], name: str, scale: float = 1.0) -> Score:
    """``contract.mean`` over the docs that have a verdict; its reason tells of the others."""
    score = contract.mean(records, name, scale)
    return replace(score, reason=skips(records) or score.reason)


def split(records: Iterable[Record], group: str) -> dict[str, list[Record]]:
    """Records by a group of their docs, in order of appearance."""
    return groups.together((record.doc.group[group], record) for record in records)


def mean_of_groups(
    records: Sequence[Record],
    name: str,
    group: str,
    scale: float = 1.0,
    weights: Mapping[str, float] | None = None,
) -> Score:
    """The mean of the means of groups; no value where a group has none.

    Args:
        weights: of every group there must be, adding up to 1; without, all that are in the records weigh the
            same.
    """
    values = _values(records, name, group)
    for wanted in weights or ():
        values.setdefault(wanted, {})
    reason = skips(records)
    if reason == NO_JUDGE:
        return Score(None, reason=reason)
    if empty := [key for key, found in values.items() if not found]:
        return Score(None, reason="; ".join(filter(None, (f"nothing judged of {', '.join(empty)}", reason))))
    value = groups.mean_of_means({key: list(found.values()) for key, found in values.items()}, weights)
    judged = [r for r in records if name in r.marks.values]
    return Score(scale * value, None, len(judged), sum(bool(r.marks.invalid) for r in judged), reason)


def units_of_groups(
    records: Sequence[Record],
    name: str,
    group: str,
    scale: float = 1.0,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """{doc's id: its figure, weighted so that their mean is that of :func:`mean_of_groups`}."""
    if mean_of_groups(records, name, group, 1.0, weights).value is None:
        return {}
    weighted = groups.weighted(_values(records, name, group), weights)
    return {id: scale * value for id, value in weighted.items()}


def _values(records: Sequence[Record], name: str, group: str) -> dict[str, dict[str, float]]:
    return {
        key: {r.doc.id: r.marks.values[name] for r in members if name in r.marks.values}
        for key, members in split(records, group).items()
    }


# --- pictures for official tools ----------------------------------------------------------------------


def drawn(response: Response | None) -> ImageData | None:
    """The first picture of a response; None where there is none."""
    return next(iter(response.pictures), None) if response is not None else None


def fresh_folder(path: str | Path) -> Path:
    """A folder to put pictures in.

    Raises:
        DataError: there is something in it: a tool would judge pictures of another model with these.
    """
    path = Path(path)
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise DataError(f"{path}: is not empty; pictures are written to a folder of their own")
    return path


def save(image: ImageData, path: Path) -> None:
    """Writes a picture as PNG in RGB, with the folders above it. Raises StorageError, DataError."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    image.picture().save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def export(docs: Sequence[contract.Doc], responses: Mapping[str, Response], outdir: str | Path) -> list[str]:
    """Writes <id>.png of each doc into a new or empty folder; ids of docs without a picture.

    Raises:
        DataError: the folder has something in it. StorageError.
    """
    folder, missing = fresh_folder(outdir), []
    for doc in docs:
        picture = drawn(responses.get(doc.id))
        if picture is None:
            missing.append(doc.id)
        else:
            save(picture, inside(folder, f"{doc.id}.png"))
    return missing
