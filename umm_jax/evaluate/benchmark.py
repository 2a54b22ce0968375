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
from umm_jax.config import BenchmarkConfig, ReplySettings
from umm_jax.conversation import ImageData
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import asking, scoring, tasks
from umm_jax.evaluate.asking import Model
from umm_jax.evaluate.contract import Doc, Task
from umm_jax.evaluate.responses import check_ids
from umm_jax.evaluate.source import Source
from umm_jax.evaluate.store import Appending, Folder
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
    requests = {doc.id: _request(common, doc) for doc in docs}
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


def _request(common: str, doc: Doc) -> str:
    """Hash of all that a reply depends on; a picture that cannot be read is one that is not there."""
    media = {}
    for name, image in doc.images.items():
        try:
            data = image.data if isinstance(image, ImageData) else image.read_bytes()
        except OSError:
            data = b""
        media[name] = hashlib.sha256(data).hexdigest()
    said = [[turn.role, [[p.kind, vars(p)] for p in turn.parts]] for turn in (*doc.turns, *doc.then)]
    told = json.dumps([common, doc.id, said, list(doc.options), media], default=str, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def write_plan(folder: str | Path, planned: Planned, model: Mapping[str, Any]) -> dict[str, int]:
    """Writes the plan; {"docs", "answered"}. Raises StorageError."""
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
            "world": configs.to_dict(planned.world) if planned.world else None,
            "model": dict(model),
        },
        list(planned.requests.items()),
    )
    return {"docs": len(planned.docs), "answered": len(stored.lines())}


def planned_model(folder: str | Path) -> dict[str, Any]:
    """The model of a plan, see ``generate.Identity.to_dict``. Raises DataError."""
    return Folder(folder).plan()["model"]


def planned_job(folder: str | Path) -> Job:
    """The job of a plan. Raises DataError."""
    plan = Folder(folder).plan()
    return Job(*(plan[name] for name in ("task", "settings", "data_root", "reply", "limit", "seed")))


def check_planned(folder: str | Path, planned: Planned) -> None:
    """Raises DataError where what would be asked now is not what was planned."""
    if Folder(folder).requests() != dict(planned.requests):
        raise DataError(
            f"{folder}: the model, the annotations or the pictures have changed since this was planned; "
            "plan again: docs whose request is the same keep their response"
        )


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
    batch_size: int,
    index: int = 0,
    count: int = 1,
) -> Spent:
    """Asks what has no response yet.

    Args:
        load: called when there is something to ask.
        batch_size: docs asked together.
        index, count: of the processes that share the batches; each has every count-th one.

    Raises:
        BusyError: another process asks for this share. StorageError.
    """
    began, spent = time.perf_counter(), Spent()
    stored = Folder(folder)
    with held(stored.path, name=f"run-{index}-of-{count}.lock"):
        answered = stored.lines()
        todo = [
            left
            for batch in asking.batches(planned.docs, batch_size)[index::count]
            if (left := [doc for doc in batch if doc.id not in answered])
        ]
        if not todo:
            return spent
        model = _Timed(load(), spent)
        shard = Appending(stored, index, count)
        replies = sum(1 + len(doc.then) for batch in todo for doc in batch)
        label = f"{planned.task.name}{f' {index + 1}/{count}' if count > 1 else ''}"
        try:
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
                    shard.add([(asked.response, planned.requests[asked.doc.id]) for asked in batch])
                    spent.docs += len(batch)
        finally:
            shard.close()
    spent.seconds = time.perf_counter() - began
    return spent


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
    return task, settings, *read_docs(task, settings, planned["data_root"], world, planned["limit"])


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
    if dataset_hash != planned["dataset_hash"]:
        raise DataError(
            f"{folder}: the annotations are not those the docs were asked from; put those back, or plan and "
            "run again"
        )
    found = stored.responses()
    check_ids(found, [doc.id for doc in docs], str(folder), partial=partial)
    records, failed = scoring.mark(task, docs, found, settings)
    figures = scoring.result(
        task,
        settings,
        records,
        dataset_hash=dataset_hash,
        responses_hash=scoring.digest(json.dumps(stored.requests())),
        failed=failed,
        limit=planned["limit"],
    ) | {"model": planned["model"], "reply": planned["reply"], "seed": planned["seed"]}
    rows = ({"id": r.doc.id, "values": r.marks.values, "invalid": r.marks.invalid} for r in records)
    stored.write_score(figures, rows)
    return figures


# --- during training ----------------------------------------------------------------------------------


class Watched:
    """A few docs of a benchmark, read once and asked whenever a run in training wants to know.

    Args:
        chosen: what is asked. world, reply: those of the run.

    Raises:
        ConfigError: unknown task or setting, or a task that needs a judge.
        DataError: annotations.
    """

    def __init__(self, chosen: BenchmarkConfig, world: WorldConfig, reply: ReplySettings):
        self.task = tasks.get(chosen.task)
        if self.task.cost != "A":
            other = "a judge" if self.task.cost == "C" else "a network"
            raise ConfigError(
                f"train.benchmarks: {self.task.name} needs {other} besides the model; ask it afterwards"
            )
        self.settings = scoring.settings_of(self.task, chosen.settings)
        self.docs, _ = read_docs(self.task, self.settings, chosen.data_root, world, chosen.limit)
        self.reply = configs.from_dict(
            ReplySettings, {**configs.to_dict(reply), **self.task.reply, **chosen.reply}, "reply"
        )

    def figures(self, model: Model, *, seed: int, batch_size: int) -> dict[str, float]:
        """{task: headline, task/parse_rate} of what the model replies now; absent where there is none."""
        batches = asking.batches(self.docs, batch_size)
        asked = asking.ask(model, batches, self.reply, seed=seed, batch_size=batch_size)
        found = {a.doc.id: a.response for batch in asked for a in batch}
        records, _ = scoring.mark(self.task, self.docs, found, self.settings)
        if not records:
            return {}
        head = self.task.total(records, self.settings)[self.task.headline].value
        told = {} if head is None else {self.task.name: head}
        return told | {f"{self.task.name}/parse_rate": scoring.parse_rate(records)}
