"""From responses to figures: marks every reply, adds up, and says what the figures stand on.

A score file (``umm eval score --json``) holds

    schema, task, headline, scale    what was measured
    metrics                          {figure: {"value", "stderr", "n", "n_invalid", "reason"}}
    n, n_invalid, stderr             those of the headline; n_failed: docs that could not be asked or judged
    parse_rate                       share of the marked replies in which something could be read
    cost_class, judge, noted, settings, prompt_hash, post, dataset_hash, responses_hash, versions
    ids_hash                         of the docs that were marked
    docs                             {id: value} of docs or groups of them, on no scale but their own: their
                                     mean moves as the headline does, and they are for paired comparisons

Figures that differ in judge, settings, prompt, post-processing or data are not comparable, and
``umm eval table`` says so.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from umm_jax import __version__
from umm_jax import config as configs
from umm_jax.data.files import write_atomic
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import responses as replies
from umm_jax.evaluate.contract import Doc, Record, Response, Score, Task
from umm_jax.evaluate.source import Source

SCHEMA = 1


def settings_of(task: Task, values: Mapping[str, Any] | None = None) -> Any:
    """The task's Settings with these values. Raises ConfigError."""
    return configs.from_dict(task.Settings, values or {}, f"settings of {task.name}")


def docs_of(task: Task, source: Any, settings: Any, limit: int | None = None) -> list[Doc]:
    """The docs, at most `limit`; every id once. Raises DataError."""
    docs = list(task.docs(source, settings))
    seen = set()
    for doc in docs:
        if doc.id in seen:
            raise DataError(f"{task.name}: the annotations hold the id {doc.id!r} twice")
        seen.add(doc.id)
    if not docs:
        raise DataError(f"{task.name}: the annotations hold nothing to ask")
    return docs[:limit]


def mark(
    task: Task, docs: Sequence[Doc], found: Mapping[str, Response], settings: Any
) -> tuple[list[Record], int]:
    """Records of the docs that have a response, and how many of those are failures."""
    records, failed = [], 0
    for doc in docs:
        response = found.get(doc.id)
        if response is None:
            continue
        if response.error:
            failed += 1
            continue
        marks = task.mark(doc, response, settings)
        records.append(Record(doc, marks))
    return records, failed


def result(
    task: Task,
    settings: Any,
    records: Sequence[Record],
    *,
    dataset_hash: str,
    responses_hash: str = "",
    failed: int = 0,
    limit: int | None = None,
) -> dict[str, Any]:
    """The content of a score file. Raises DataError: records of several judges."""
    if records:
        scores = task.total(records, settings)
    else:
        scores = {task.headline: Score(None, reason="no doc could be marked")}
    head = scores[task.headline]
    skipped = sum("skipped" in r.marks.parts for r in records)
    return {
        "schema": SCHEMA,
        "task": task.name,
        "version": task.version,
        "headline": task.headline,
        "scale": list(task.scale),
        "metrics": {name: asdict(score) for name, score in scores.items()},
        "n": head.n,
        "n_invalid": head.n_invalid,
        "n_failed": failed + skipped,
        "stderr": head.stderr,
        "parse_rate": parse_rate(records),
        "cost_class": task.cost,
        "judge": _judge_of(task, records),
        "noted": dict(task.noted(records, settings)) if task.noted else {},
        "settings": configs.to_dict(settings),
        "prompt_hash": digest(task.prompt),
        "post": task.post,
        "dataset_hash": dataset_hash,
        "ids_hash": digest("\n".join(sorted(r.doc.id for r in records))),
        "responses_hash": responses_hash,
        "limit": limit,
        "versions": {"umm_jax": __version__},
        "docs": dict(units(task, records, settings)),
    }


def _judge_of(task: Task, records: Sequence[Record]) -> str | None:
    found = sorted({r.marks.parts["judge"] for r in records if r.marks.parts.get("judge")})
    if len(found) > 1:
        raise DataError(f"{task.name}: replies were judged by several: {', '.join(found[:3])}")
    return found[0] if found else None


def compared(task: Task, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a task's settings as plain values, those that change what is measured."""
    return {key: value for key, value in settings.items() if key not in task.judging}


def units(task: Task, records: Sequence[Record], settings: Any) -> Mapping[str, float]:
    """{id: headline figure} of what the headline is a mean of: docs, or groups of them."""
    if task.units:
        return task.units(records, settings)
    return {r.doc.id: r.marks.values[task.headline] for r in records if task.headline in r.marks.values}


def parse_rate(records: Sequence[Record]) -> float | None:
    """Share of the marked replies in which something could be read."""
    return sum(not r.marks.invalid for r in records) / len(records) if records else None


def digest(text: str) -> str:
    """Of a prompt or another small text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def score(
    task: Task,
    root: str | Path,
    responses: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    partial: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """Figures from published annotations and a file of responses alone.

    Args:
        root: folder of the annotations. responses: see ``evaluate/responses.py``.
        settings: what differs from the task's Settings.
        partial: score the docs that have a response, where some have none.

    Raises:
        DataError: annotations missing or damaged, responses damaged, twice for one doc, or of other docs.
        ConfigError: unknown settings.
    """
    if task.source == "world":
        raise ConfigError(
            f"{task.name} asks about a run's own world: umm eval plan --run=DIR --task={task.name}"
        )
    chosen = settings_of(task, settings)
    source = Source(root, task.name, task.files)
    docs = docs_of(task, source, chosen, limit)
    found = replies.read(responses)
    replies.check_ids(found, [doc.id for doc in docs], str(responses), partial=partial)
    records, failed = mark(task, docs, found, chosen)
    return result(
        task,
        chosen,
        records,
        dataset_hash=source.digest,
        responses_hash=hashlib.sha256(Path(responses).read_bytes()).hexdigest(),
        failed=failed,
        limit=limit,
    )


def write(path: str | Path, figures: Mapping[str, Any]) -> None:
    """Raises StorageError."""
    write_atomic(path, json.dumps(figures, indent=1, allow_nan=False) + "\n")


def lines(figures: Mapping[str, Any]) -> str:
    """The figures for the terminal."""
    found = [
        f"{figures['task']}: n {figures['n']}, invalid {figures['n_invalid']}, failed {figures['n_failed']}"
    ]
    for name, one in figures["metrics"].items():
        value = "-" if one["value"] is None else f"{one['value']:.4g}"
        spread = "" if one["stderr"] is None else f" ± {one['stderr']:.2g}"
        why = f"  ({one['reason']})" if one["reason"] else ""
        found.append(f"  {name:32} {value}{spread}{why}")
    return "\n".join(found)
