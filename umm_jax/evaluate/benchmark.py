"""One model on one benchmark, in four steps over files: plan, run, score, table.

    plan     what is asked: docs, settings, the hash of every request     needs annotations, the run's config
    run      asks what has no response yet                                needs the model
    score    marks the responses and adds up                              needs annotations alone
    table    several side by side                                         needs score files alone

Each may be run again and does only what is left. `run` may be killed at any time.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from umm_jax import config as configs
from umm_jax.config import ReplySettings
from umm_jax.conversation import ImageData
from umm_jax.errors import BusyError, ConfigError, DataError
from umm_jax.evaluate import asking, scoring, tasks
from umm_jax.evaluate.asking import Model
from umm_jax.evaluate.contract import Doc, Task
from umm_jax.evaluate.responses import check_ids
from umm_jax.evaluate.source import Source
from umm_jax.evaluate.store import Appending, Folder, hash_of
from umm_jax.train.lock import held
from umm_jax.world.scene import WorldConfig


@dataclass(frozen=True)
class Job:
    """What is asked of whom.

    Attributes:
        task: the benchmark. settings: what differs from its Settings.
        data_root: folder of its files; None for tasks of the world.
        reply: what differs from how the task, and before it the run's config, has replies made.
        limit: only the first docs. seed: of all replies.
    """

    task: str
    settings: Mapping[str, Any]
    data_root: str | None
    reply: Mapping[str, Any]
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Planned:
    """A job with its docs, and the hash of each one's request by the doc's id."""

    job: Job
    task: Task
    settings: Any
    docs: Sequence[Doc]
    dataset_hash: str
    reply: ReplySettings
    world: WorldConfig | None
    requests: Mapping[str, str]


def plan(job: Job, model: Mapping[str, Any], world: WorldConfig | None, reply: ReplySettings) -> Planned:
    """Works out what is asked; writes nothing.

    Args:
        model: what tells it from others: its run, checkpoint, weights and fingerprint.
        world: that of the run, for tasks of the world. reply: that of the run's config.

    Raises:
        ConfigError: unknown task or setting. DataError: annotations.
    """
    task = tasks.get(job.task)
    settings = scoring.settings_of(task, job.settings)
    docs, dataset_hash = read_docs(task, settings, job.data_root, world, job.limit)
    made = {**configs.to_dict(reply), **task.reply, **job.reply}
    reply = configs.from_dict(ReplySettings, made, "reply")
    common = json.dumps(
        {
            "model": model["fingerprint"],
            "prompt": scoring.digest(task.prompt),
            "reply": configs.to_dict(reply),
            "seed": job.seed,
        },
        sort_keys=True,
    )
    seen: dict[str, str] = {}
    requests = {doc.id: _request(common, doc, seen) for doc in docs}
    world = world if task.source == "world" else None
    return Planned(job, task, settings, docs, dataset_hash, reply, world, requests)


def read_docs(
    task: Task, settings: Any, data_root: str | None, world: WorldConfig | None, limit: int | None
) -> tuple[list[Doc], str]:
    """(docs, hash of what they were read from) from the user's files or the run's world. Raises DataError."""
    if task.source == "world":
        if world is None:
            raise DataError(f"{task.name} asks about a run's own world, and this model has none")
        plain = json.dumps(configs.to_dict(world), sort_keys=True)
        return scoring.docs_of(task, world, settings, limit), scoring.digest(plain)
    if data_root is None:
        raise DataError(f"{task.name} needs the folder of its published files, --data-root=DIR: {task.files}")
    source = Source(data_root, task.name, task.files)
    return scoring.docs_of(task, source, settings, limit), source.digest


def _request(common: str, doc: Doc, seen: dict[str, str]) -> str:
    """Hash of all that a reply depends on; a picture that cannot be read is one that is not there.

    Args:
        seen: hashes of pictures by their place, so that one that many docs show is read once.
    """
    media = {}
    for name, image in doc.images.items():
        if isinstance(image, ImageData):
            media[name] = image.sha256
            continue
        if str(image) not in seen:
            try:
                data = image.read_bytes()
            except OSError:
                data = b""
            seen[str(image)] = hashlib.sha256(data).hexdigest()
        media[name] = seen[str(image)]
    said = [[turn.role, [[p.kind, vars(p)] for p in turn.parts]] for turn in (*doc.turns, *doc.then)]
    told = json.dumps([common, doc.id, said, list(doc.options), media], default=str, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def write_plan(
    folder: str | Path, planned: Planned, model: Mapping[str, Any], batch_size: int
) -> dict[str, int]:
    """Writes the plan; {"docs", "answered"}. Raises StorageError.

    Args:
        batch_size: docs asked together, by whoever runs it.
    """
    job = planned.job
    stored = Folder(folder)
    stored.write_plan(
        {
            "task": planned.task.name,
            "settings": configs.to_dict(planned.settings),
            "data_root": job.data_root,
            "dataset_hash": planned.dataset_hash,
            "reply": configs.to_dict(planned.reply),
            "limit": job.limit,
            "seed": job.seed,
            "batch_size": batch_size,
            "world": configs.to_dict(planned.world) if planned.world else None,
            "model": dict(model),
        },
        list(planned.requests.items()),
    )
    return {"docs": len(planned.docs), "answered": len(stored.lines())}


def read_plan(folder: str | Path) -> tuple[Job, dict[str, Any]]:
    """The job and the model of a plan, see ``generate.Identity.to_dict``. Raises DataError."""
    plan = Folder(folder).plan()
    job = Job(*(plan[name] for name in ("task", "settings", "data_root", "reply", "limit", "seed")))
    return job, plan["model"]


def check_planned(folder: str | Path, planned: Planned) -> None:
    """Raises DataError where what would be asked now is not what was planned."""
    if Folder(folder).requests() != dict(planned.requests):
        raise DataError(
            f"{folder}: the model, the annotations or the pictures have changed since this was planned; "
            "plan again: docs whose request is the same keep their response"
        )


_FRESH = 60.0  # seconds after which the lock of a share that does not beat counts as left behind


@dataclass
class Spent:
    """What asking cost: docs that were asked, wall seconds, and those of them inside the model."""

    docs: int = 0
    seconds: float = 0.0
    in_model: float = 0.0


class _Timed:
    """A model whose time is taken."""

    def __init__(self, model: Model, spent: Spent):
        self.model, self.spent = model, spent

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent.in_model += time.perf_counter() - began

    def reply(self, conversations, settings, seeds):
        with self._timed():
            return self.model.reply(conversations, settings, seeds)

    def score(self, conversation, options):
        with self._timed():
            return self.model.score(conversation, options)


def run(
    folder: str | Path,
    planned: Planned,
    load: Callable[[], Model],
    *,
    index: int = 0,
    count: int = 1,
    retry: bool = False,
) -> Spent:
    """Asks what has no response yet.

    Args:
        load: called when there is something to ask.
        index, count: of the processes that share the batches; each has every count-th one.
        retry: whether docs that could not be asked are asked again.

    Raises:
        BusyError: another process asks for this share, or others share the docs in another way. StorageError.
    """
    began, spent = time.perf_counter(), Spent()
    stored = Folder(folder)
    batch_size = stored.plan()["batch_size"]
    with (
        held(stored.path, name=f"run-{index}-of-{count}.lock") as lock,
        Appending(stored, index, count) as shard,
    ):
        _check_shares(stored.path, count)
        answered = {id for id, line in stored.lines().items() if not (retry and line.get("error"))}
        todo = [
            left
            for batch in asking.batches(planned.docs, batch_size)[index::count]
            if (left := [doc for doc in batch if doc.id not in answered])
        ]
        if not todo:
            return spent
        model = _Timed(load(), spent)
        replies = sum(1 + len(doc.then) for batch in todo for doc in batch)
        label = f"{planned.task.name}{f' {index + 1}/{count}' if count > 1 else ''}"
        with tqdm(total=replies, desc=label, unit=" replies", disable=None) as bar:
            found = asking.ask(
                model,
                todo,
                planned.reply,
                seed=planned.job.seed,
                batch_size=batch_size,
                progress=bar.update,
            )
            for batch in found:
                lock.check()
                shard.add([(asked.response, planned.requests[asked.doc.id]) for asked in batch])
                spent.docs += len(batch)
    spent.seconds = time.perf_counter() - began
    return spent


def _check_shares(folder: Path, count: int) -> None:
    """Raises BusyError where a process that lives, or beat a moment ago, shares the docs among others."""
    for path in folder.glob("run-*-of-*.lock"):
        with contextlib.suppress(OSError):
            if not path.name.endswith(f"-of-{count}.lock") and time.time() - path.stat().st_mtime < _FRESH:
                raise BusyError(
                    f"{path}: the docs are being asked in shares of another number; wait for those, or use it"
                )


def planned_docs(
    folder: str | Path, judging: Mapping[str, Any] | None = None
) -> tuple[Task, Any, list[Doc], str]:
    """(task, settings, docs, hash of what they were read from) of a plan.

    Args:
        judging: values of the settings that say who judged, see ``contract.Task``; others stay as planned.

    Raises:
        DataError: nothing planned, or annotations. ConfigError: another setting than those.
    """
    planned = Folder(folder).plan()
    task = tasks.get(planned["task"])
    if odd := set(judging or ()) - set(task.judging):
        allowed = ", ".join(task.judging) or "nothing"
        raise ConfigError(
            f"{folder}: {', '.join(sorted(odd))} was set when this was planned; {allowed} may be set now"
        )
    settings = scoring.settings_of(task, {**planned["settings"], **(judging or {})})
    world = configs.from_dict(WorldConfig, planned["world"], "world") if planned["world"] else None
    docs, dataset_hash = read_docs(task, settings, planned["data_root"], world, planned["limit"])
    if dataset_hash != planned["dataset_hash"]:
        raise DataError(
            f"{folder}: the annotations are not those the docs were asked from; put those back, or plan and "
            "run again"
        )
    return task, settings, docs, dataset_hash


def score(
    folder: str | Path, *, judging: Mapping[str, Any] | None = None, partial: bool = False
) -> dict[str, Any]:
    """Marks what came back and writes the figures; needs neither the model nor its run.

    Args:
        judging: see :func:`planned_docs`.

    Raises:
        DataError: nothing planned, docs without a response, or annotations other than those planned with.
        ConfigError: another setting than those.
    """
    stored = Folder(folder)
    planned = stored.plan()
    task, settings, docs, dataset_hash = planned_docs(folder, judging)
    lines = stored.lines()
    found = stored.responses(lines)
    check_ids(found, [doc.id for doc in docs], str(folder), partial=partial)
    records, failed = scoring.mark(task, docs, found, settings)
    figures = scoring.result(
        task,
        settings,
        records,
        dataset_hash=dataset_hash,
        responses_hash=hash_of(lines),
        failed=failed,
        limit=planned["limit"],
    ) | {name: planned[name] for name in ("model", "reply", "seed", "requests_hash")}
    rows = ({"id": r.doc.id, "values": r.marks.values, "invalid": r.marks.invalid} for r in records)
    stored.write_score(figures, rows)
    return figures
