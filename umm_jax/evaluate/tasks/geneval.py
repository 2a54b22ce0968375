"""GenEval: short prompts of objects, counts, colours and places; a detector looks for them in the picture.

    evaluation_metadata.jsonl, or prompts/evaluation_metadata.jsonl: 553 lines of {"tag", "include": [...],
    "exclude": [...], "prompt"}

Each prompt is drawn four times: a doc is one picture, its id "00017/0002" the third of the 18th line. The
official evaluator judges a folder of pictures, which :func:`export` writes, and its results.jsonl is what the
setting `verdicts` names: {"filename", "tag", "prompt", "correct", "reason", "metadata"} of each picture.

A task's score is the share of its pictures that are right. `overall` is the mean of the six tasks' scores,
not of pictures, and counts a picture that is not in the results as wrong; `overall_of_found` leaves it out,
as the official summary does. `missing` says how many there are. `correct_prompts` is the share of prompts of
which any picture is right.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umm_jax.data.files import write_atomic
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import verdicts
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, of_values, user
from umm_jax.evaluate.source import Source, take
from umm_jax.evaluate.verdicts import NO_JUDGE, NO_PICTURE, Verdict, Verdicts

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
WEIGHTS = dict.fromkeys(TAGS, 1 / len(TAGS))
_FILENAME = re.compile(r"(?:^|/)(\d+)/samples/(\d+)\.png$")


@dataclass(frozen=True)
class Settings:
    """What is asked, and who judged.

    Attributes:
        samples: pictures of each prompt; four in published figures.
        verdicts: the official evaluator's results.jsonl; a relative name is below the folder of the prompts.
        judge: which detector that was, where it was not the evaluator's own.
    """

    samples: int = 4
    verdicts: str = ""
    judge: str = "mask2former-swin-s-coco"

    def __post_init__(self):
        if self.samples < 1:
            raise ConfigError("samples: at least one picture of each prompt")


@dataclass(frozen=True)
class Target:
    """What must be in a picture, as published; and what the detector says. `judge` is "" without verdicts."""

    entry: Mapping[str, Any]
    verdict: Verdict | None
    judge: str


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    names = "evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"
    where = source.path(*names)
    entries = source.lines(*names)
    for entry in entries:
        if take(entry, "tag", where, str) not in TAGS:
            raise DataError(f"{where}: the tag {entry['tag']!r} is none of {', '.join(TAGS)}")
    found = _verdicts(source, entries, settings) if settings.verdicts else None
    for index, entry in enumerate(entries):
        for sample in range(settings.samples):
            id = f"{index:05d}/{sample:04d}"
            yield Doc(
                id,
                (user(take(entry, "prompt", where, str)),),
                target=Target(entry, found.of(id) if found else None, found.identity if found else ""),
                group={"tag": entry["tag"], "prompt": f"{index:05d}"},
            )


def _verdicts(source: Source, entries: Sequence[Mapping[str, Any]], settings: Settings) -> Verdicts:
    """Those of results.jsonl. Raises DataError: not of the form, or of other prompts or more pictures."""
    path = verdicts.place(source, settings.verdicts)
    found: dict[tuple[str, str], Verdict] = {}
    for row in verdicts.lines(path):
        name = take(row, "filename", path, str)
        at = _FILENAME.search(name.replace("\\", "/"))
        if at is None:
            raise DataError(f"{path}: {name!r} does not end as pictures do, in <00000>/samples/<0000>.png")
        index, sample = int(at.group(1)), int(at.group(2))
        if index >= len(entries) or sample >= settings.samples:
            raise DataError(
                f"{path}: {name} is not among {len(entries)} prompts with pictures 0 to "
                f"{settings.samples - 1}; there may be more pictures of each: set `samples`"
            )
        if take(row, "tag", path, str) != entries[index]["tag"] or not _same(row, entries[index]):
            raise DataError(f"{path}: {name} was judged by other metadata than line {index + 1} of ours")
        correct = take(row, "correct", path, (bool, int))
        key = f"{index:05d}/{sample:04d}", ""
        if key in found:
            raise DataError(f"{path}: {name} is there twice")
        found[key] = Verdict(score=bool(correct))
    return verdicts.of_tool("geneval", settings.judge, found)


def _same(row: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether what a picture was judged by is what we asked for; prompts may have been put in other words."""
    try:
        by = json.loads(row["metadata"]) if isinstance(row["metadata"], str) else row["metadata"]
        return all(by.get(name, []) == entry.get(name, []) for name in ("include", "exclude"))
    except (KeyError, ValueError, AttributeError):
        return True  # other programs leave it out


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    target: Target = doc.target
    if not target.judge:
        return verdicts.unjudged(NO_JUDGE, response)
    parts: dict[str, Any] = {"judge": target.judge}
    if target.verdict is not None:
        correct = float(target.verdict.score)
        return Marks({"overall": correct, "found": correct}, "", parts)
    return Marks({"overall": 0.0}, "" if response.pictures else NO_PICTURE, parts | {"missing": True})


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    found = {
        "overall": verdicts.mean_of_groups(records, "overall", "tag", weights=WEIGHTS),
        "overall_of_found": verdicts.mean_of_groups(records, "found", "tag", weights=WEIGHTS),
        "correct_images": verdicts.mean(records, "overall"),
        "correct_prompts": _of_prompts(records),
    }
    for tag, members in sorted(verdicts.split(records, "tag").items(), key=lambda kv: TAGS.index(kv[0])):
        found[f"tag={tag}"] = verdicts.mean(members, "overall")
    reason = verdicts.skips(records)
    missing = float(sum("missing" in r.marks.parts for r in records))
    return found | {"missing": Score(None if reason else missing, n=len(records), reason=reason)}


def _of_prompts(records: Sequence[Record]) -> Score:
    prompts = verdicts.split(records, "prompt").values()
    if reason := verdicts.skips(records):
        return Score(None, reason=reason)
    return of_values([max(r.marks.values["overall"] for r in members) for members in prompts], 1.0)


def units(records: Sequence[Record], settings: Settings) -> dict[str, float]:
    """Of each prompt, whose pictures are not independent."""
    found: dict[str, float] = {}
    weighted = verdicts.units_of_groups(records, "overall", "tag", weights=WEIGHTS)
    prompts = verdicts.split(records, "prompt")
    for prompt, members in prompts.items() if weighted else ():
        found[prompt] = sum(weighted[r.doc.id] for r in members) * len(prompts) / len(records)
    return found


def export(docs: Sequence[Doc], responses: Mapping[str, Response], outdir: str | Path) -> list[str]:
    """Writes the folder the official evaluator reads, <00000>/{metadata.jsonl, samples/<0000>.png}.

    Args:
        outdir: new or empty.

    Returns:
        ids of the docs without a picture, which have no file.

    Raises:
        DataError: the folder has something in it. StorageError.
    """
    folder, missing = verdicts.fresh_folder(outdir), []
    for doc in docs:
        prompt, sample = doc.id.split("/")
        (folder / prompt / "samples").mkdir(parents=True, exist_ok=True)
        if not (folder / prompt / "metadata.jsonl").exists():
            write_atomic(folder / prompt / "metadata.jsonl", json.dumps(dict(doc.target.entry)))
        picture = verdicts.drawn(responses.get(doc.id))
        if picture is None:
            missing.append(doc.id)
        else:
            verdicts.save(picture, folder / prompt / "samples" / f"{sample}.png")
    return missing


TASK = Task(
    "geneval",
    docs,
    mark,
    "overall",
    total,
    Settings,
    reply={"mode": "image"},
    files=(
        "prompts and evaluator are published with GenEval (djghosh13/geneval), the prompts as "
        "prompts/evaluation_metadata.jsonl"
    ),
    prompt="{prompt}",
    post="official detector",
    cost="B",
    scale=(0, 1),
    units=units,
    judging=("verdicts", "judge"),
    export=export,
)
