"""Making a folder of conversations: in parallel, resumable, and the same bytes however it was run.

Shard s of S holds the records with indices [count s / S, count (s + 1) / S), each made from its index
alone, so a shard does not depend on who makes it or when. Finished shards are kept when a run is stopped;
the recipe in the folder says whether a later run may add to them. For which indices there is no record, and
why, is counted in the manifest and written to the quarantine, see ``quarantine.py``.
"""

import json
import multiprocessing
import multiprocessing.connection
import shutil
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from umm_jax.config import differences
from umm_jax.conversation import SCHEMA, Conversation
from umm_jax.data import quarantine, records
from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.data.quarantine import Tally
from umm_jax.errors import ConfigError, DataError, Interrupted, UserError


class Made(NamedTuple):
    """What an index gave: a conversation, or None, and what there is to count."""

    conversation: Conversation | None
    tally: Tally


Make = Callable[[int], Conversation | Made]
# (path, first index, last index + 1, whether the first rejected record fails it) of a shard.
Job = tuple[str, int, int, bool]
# Does the jobs with :func:`write_shard`, wherever that is, so that all files are in place when it returns.
Runner = Callable[[Make, Sequence[Job]], None]
_REPORT_EVERY = 64  # records between two messages of a worker about its progress


def make_records(
    make: Make,
    count: int,
    out: str | Path,
    *,
    how: Mapping[str, Any],
    shards: int = 8,
    workers: int = 1,
    runner: Runner | None = None,
    name: str = "data",
    max_rejected: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> records.RecordSource:
    """Writes the conversations make(0) ... make(count - 1) to a folder for :func:`records.open_source`.

    Args:
        make: deterministic; it gives a conversation, or Made. With more than one worker also picklable (a
            module-level function or an instance of a module-level class).
        how: plain JSON values from which the data could be made again: generator, settings, seed. It is
            stored, and decides whether shards found in `out` belong to this run.
        shards: number of files. workers: processes; 0 and 1 work in this one.
        runner: writes the shards in place of `workers`.
        max_rejected: the share of records, and of pictures, that may be rejected. More fail the run, with 0
            the very first does; what was finished is kept, and a later run may allow more.
        progress: called with (records done, count), now and then.

    Raises:
        DataError: `out` holds something else, `make` gave an invalid record, or too much was rejected.
        ConfigError: bad counts.
        StorageError: disk full. Interrupted: Ctrl-C. In each case finished shards stay, and no file that
        is not whole carries a final name.
    """
    out = Path(out)
    if count < 1 or shards < 1 or workers < 0:
        raise ConfigError(f"count and shards must be positive, got {count} and {shards}; workers {workers}")
    if not 0 <= max_rejected <= 1:
        raise ConfigError(f"max_rejected is a share from 0 to 1, it is {max_rejected}")
    shards = min(shards, count)
    recipe = {"schema": SCHEMA, "name": name, "count": count, "shards": shards, "how": _plain(how)}
    if _prepare(out, recipe):
        if progress:
            progress(count, count)
        _refuse(out, Tally.of(records.read_manifest(out).get("counts", {})), max_rejected, count)
        return records.open_source(out)

    edges = [count * s // shards for s in range(shards + 1)]
    paths = [out / records.shard_name(name, s, shards) for s in range(shards)]
    strict = max_rejected == 0
    finished = {s for s in range(shards) if paths[s].exists() and _tally(paths[s]).exists()}
    jobs = {s: (str(paths[s]), edges[s], edges[s + 1], strict) for s in range(shards) if s not in finished}
    done = {s: _finished(paths[s]) for s in finished}
    total = Total(sum(edges[s + 1] - edges[s] for s in done), count, progress)
    try:
        if runner is not None and jobs:
            runner(make, list(jobs.values()))
            done |= {s: _finished(paths[s]) for s in jobs}
            total.add(count - total.done)
        elif workers > 1 and len(jobs) > 1:
            done |= _parallel(make, jobs, min(workers, len(jobs)), total)
        else:
            done |= {s: write_shard(make, job, total.add) for s, job in jobs.items()}
    except KeyboardInterrupt:
        there = sum(path.exists() for path in paths)
        raise Interrupted(
            f"{out}: stopped with {there} of {shards} shards finished; run the same command again to go on"
        ) from None
    tally = Tally()
    for s in range(shards):
        tally.add(done[s][1])
    _join_quarantines(out, paths)
    _refuse(out, tally, max_rejected, count)
    records.write_manifest(out, name, [done[s][0] for s in range(shards)], how=recipe, counts=tally.plain())
    with storage_errors(out):
        for path in (out / records.UNFINISHED, *map(_tally, paths), *map(_quarantine, paths)):
            path.unlink(missing_ok=True)
    return records.open_source(out)


def _refuse(out: Path, tally: Tally, limit: float, count: int) -> None:
    if said := tally.too_many(limit, count):
        raise DataError(
            f"{out}: {said}; {out / quarantine.FILE} says where and why. Mend the data and bring them into "
            "another folder, or run again with a higher --max-rejected: what was finished is kept"
        )


def _join_quarantines(out: Path, paths: Sequence[Path]) -> None:
    parts = [_quarantine(path).read_bytes() for path in paths if _quarantine(path).exists()]
    if parts:
        write_atomic(out / quarantine.FILE, b"".join(parts))


def _plain(how: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back, so that recipes compare equal; refuses what JSON cannot hold."""
    try:
        return json.loads(json.dumps(how, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the recipe must be plain JSON values: {error}") from None


def _prepare(out: Path, recipe: dict[str, Any]) -> bool:
    """Makes `out` ready to be written to; True if everything is there already."""
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for found, complete in ((records.MANIFEST, True), (records.UNFINISHED, False)):
            if not (out / found).exists():
                continue
            try:
                stored = json.loads((out / found).read_text())
                stored = stored["how"] if complete else stored
            except (ValueError, KeyError) as error:
                raise DataError(
                    f"{out / found}: damaged ({error}); delete the folder and run again"
                ) from None
            different = differences(stored, recipe)
            if different:
                raise DataError(
                    f"{out}: holds data made another way ({'; '.join(different[:3])}); "
                    "choose another folder, or delete this one"
                )
            for part in out.glob("*.part"):  # left by a run that was killed
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            return complete
        if any(out.iterdir()):
            raise DataError(f"{out}: not empty, and not made here; choose another folder")
    write_atomic(out / records.UNFINISHED, json.dumps(recipe, indent=1) + "\n")
    return False


def files_of(path: Path) -> tuple[Path, ...]:
    """All that :func:`write_shard` writes, in order: the shard comes last, and with it the rest is whole."""
    return _quarantine(path), _tally(path), path


def _tally(path: Path) -> Path:
    """The file of the counts of a shard, until the manifest has them."""
    return path.with_suffix(".tally.json")


def _quarantine(path: Path) -> Path:
    """The file of what was rejected for a shard, until it is joined to the others."""
    return path.with_suffix(".quarantine.jsonl")


def _finished(path: Path) -> tuple[records.Shard, Tally]:
    """The entry of a shard an earlier run finished: whole by construction, since renaming came last."""
    written, counts = json.loads(_tally(path).read_text())
    shard = records.Shard(path.name, written, path.stat().st_size, records.file_sha256(path))
    return shard, Tally.of(counts)


class Total:
    """Counts records over all shards and reports them."""

    def __init__(self, done: int, count: int, report: Callable[[int, int], None] | None):
        self.done, self.count, self.report = done, count, report
        self.add(0)

    def add(self, n: int) -> None:
        self.done += n
        if self.report:
            self.report(self.done, self.count)


def write_shard(make: Make, job: Job, report: Callable[[int], None]) -> tuple[records.Shard, Tally]:
    """Makes the records of one shard and writes them, and beside them what there is to count and to tell."""
    path, start, stop, strict = job
    beside = (_quarantine(Path(path)), _tally(Path(path)))
    for file in beside:
        file.unlink(missing_ok=True)  # of a run that was killed before the shard had its name
    tally, quarantined = Tally(), []
    try:
        with records.ShardWriter(path) as writer:
            for index in range(start, stop):
                made = make(index)
                if not isinstance(made, Made):
                    made = Made(made, Tally())
                if strict and made.tally.quarantine:
                    raise DataError(_first(made.tally.quarantine[0]))
                tally.add(made.tally)
                quarantined.append(made.tally.lines())
                if made.conversation is not None:
                    tally.count("licenses", made.conversation.license)
                    writer.write(made.conversation)
                if (index - start + 1) % _REPORT_EVERY == 0:
                    report(_REPORT_EVERY)
            # Before the shard gets its name: a shard that stands has its counts.
            if any(quarantined):
                write_atomic(beside[0], "".join(quarantined))
            write_atomic(beside[1], json.dumps([writer.records, tally.plain()]))
    except BaseException:
        for file in beside:
            file.unlink(missing_ok=True)
        raise
    report((stop - start) % _REPORT_EVERY)
    return writer.shard, tally


def _first(rejected: Mapping[str, Any]) -> str:
    where, cause = rejected["where"], rejected["cause"]
    return (
        f"{where} (record {rejected['record']}): {cause}; mend it, or let a share of such records be left "
        "out with --max-rejected"
    )


# --- processes ------------------------------------------------------------------------------------


def _parallel(make: Make, jobs: dict[int, tuple], workers: int, total: Total) -> dict[int, tuple]:
    """Hands out shards one by one over a pipe to each worker.

    Plain pipes rather than a pool: when this process dies, even by SIGKILL, the workers read the end of
    their pipe and leave, and a worker that is killed is noticed here at once.
    """
    context = multiprocessing.get_context("spawn")  # threads of the caller are safe only so
    waiting, done, running = list(jobs), {}, {}
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            shard = waiting.pop(0)
            ours.send((shard, jobs[shard]))
            running[ours] = shard
        while running:
            for pipe in multiprocessing.connection.wait(list(running)):
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionError):
                    raise DataError(
                        f"the worker making {jobs[running[pipe]][0]} died (out of memory?); run the same "
                        "command again, with fewer workers"
                    ) from None
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, int):
                    total.add(message)
                    continue
                done[running.pop(pipe)] = message
                if waiting:
                    running[pipe] = waiting.pop(0)
                    pipe.send((running[pipe], jobs[running[pipe]]))
                else:
                    pipe.close()
    finally:
        for process in processes:
            if running:  # something went wrong: do not wait for shards nobody will use
                process.terminate()
            process.join()
        for path, *_ in jobs.values():
            # A worker may have been stopped while it wrote the shard, or the tally beside it.
            shard = Path(path)
            for part in shard.parent.glob(f"{shard.name.partition('.')[0]}.*.part"):
                part.unlink(missing_ok=True)
    return done


def _worker(make: Make, pipe: multiprocessing.connection.Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    while True:
        try:
            _, job = pipe.recv()
        except (EOFError, ConnectionError):
            return  # the parent is gone, or wants no more
        try:
            said = write_shard(make, job, pipe.send)
        except UserError as error:
            said = error
        except Exception:
            said = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
        try:
            pipe.send(said)
        except ConnectionError:
            return
        if isinstance(said, Exception):
            return
