"""Making a folder of conversations: in parallel, resumable, and the same bytes however it was run.

Shard s of S holds the records with indices [count s / S, count (s + 1) / S), each made from its index
alone, so a shard does not depend on who makes it or when. Finished shards are kept when a run is stopped;
the recipe in the folder says whether a later run may add to them.
"""

import json
import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umm_jax.config import differences
from umm_jax.conversation import SCHEMA, Conversation
from umm_jax.data import records
from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.errors import ConfigError, DataError, Interrupted, UserError


@dataclass(frozen=True)
class Noted:
    """A conversation, or None where there is none for an index, and counts of what was left out by reason."""

    conversation: Conversation | None
    left_out: Mapping[str, int] = field(default_factory=dict)


Make = Callable[[int], Conversation | Noted]
_REPORT_EVERY = 64  # records between two messages of a worker about its progress


def synthesize(
    make: Make,
    count: int,
    out: str | Path,
    *,
    how: Mapping[str, Any],
    shards: int = 8,
    workers: int = 1,
    name: str = "data",
    progress: Callable[[int, int], None] | None = None,
) -> records.RecordSource:
    """Writes the conversations make(0) ... make(count - 1) to a folder for :func:`records.open_source`.

    Args:
        make: deterministic; it gives a conversation, or a Noted one, whose counts are added up into the
            manifest's "left_out". With more than one worker also picklable (a module-level function or an
            instance of a module-level class).
        how: plain JSON values from which the data could be made again: generator, settings, seed. It is
            stored, and decides whether shards found in `out` belong to this run.
        shards: number of files. workers: processes; 0 and 1 work in this one.
        progress: called with (records done, count), now and then.

    Raises:
        DataError: `out` holds something else, or `make` gave an invalid record. ConfigError: bad counts.
        StorageError: disk full. Interrupted: Ctrl-C. In each case finished shards stay, and no file that
        is not whole carries a final name.
    """
    out = Path(out)
    if count < 1 or shards < 1 or workers < 0:
        raise ConfigError(f"count and shards must be positive, got {count} and {shards}; workers {workers}")
    shards = min(shards, count)
    recipe = {"schema": SCHEMA, "name": name, "count": count, "shards": shards, "how": _plain(how)}
    if _prepare(out, recipe):
        if progress:
            progress(count, count)
        return records.open_source(out)

    edges = [count * s // shards for s in range(shards + 1)]
    paths = [out / records.shard_name(name, s, shards) for s in range(shards)]
    jobs = {s: (str(paths[s]), edges[s], edges[s + 1]) for s in range(shards) if not paths[s].exists()}
    done = {s: _finished(paths[s], edges[s + 1] - edges[s]) for s in range(shards) if s not in jobs}
    total = Total(sum(edges[s + 1] - edges[s] for s in done), count, progress)
    try:
        if workers > 1 and len(jobs) > 1:
            done |= _parallel(make, jobs, min(workers, len(jobs)), total)
        else:
            done |= {s: _write_shard(make, job, total.add) for s, job in jobs.items()}
    except KeyboardInterrupt:
        finished = sum(path.exists() for path in paths)
        raise Interrupted(
            f"{out}: stopped with {finished} of {shards} shards finished; run the same command again to go on"
        ) from None
    left_out: Counter[str] = sum((counts for _, counts in done.values()), Counter())
    records.write_manifest(out, name, [done[s][0] for s in range(shards)], how=recipe, left_out=left_out)
    with storage_errors(out):
        for path in (out / records.UNFINISHED, *map(_notes, paths)):
            path.unlink(missing_ok=True)
    return records.open_source(out)


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
                part.unlink()
            return complete
        if any(out.iterdir()):
            raise DataError(f"{out}: not empty, and not made here; choose another folder")
    write_atomic(out / records.UNFINISHED, json.dumps(recipe, indent=1) + "\n")
    return False


def _notes(path: Path) -> Path:
    """The file that says what was left out of a shard, until the manifest does."""
    return path.with_suffix(".left_out.json")


def _finished(path: Path, expected: int) -> tuple[records.Shard, Counter]:
    """The entry of a shard an earlier run finished: whole by construction, since renaming came last."""
    notes, left_out = _notes(path), {}
    if notes.exists():
        expected, left_out = json.loads(notes.read_text())
    return records.Shard(path.name, expected, path.stat().st_size, records.file_sha256(path)), Counter(
        left_out
    )


class Total:
    """Counts records over all shards and reports them."""

    def __init__(self, done: int, count: int, report: Callable[[int, int], None] | None):
        self.done, self.count, self.report = done, count, report
        self.add(0)

    def add(self, n: int) -> None:
        self.done += n
        if self.report:
            self.report(self.done, self.count)


def _write_shard(
    make: Make, job: tuple[str, int, int], report: Callable[[int], None]
) -> tuple[records.Shard, Counter]:
    path, start, stop = job
    left_out: Counter[str] = Counter()
    with records.ShardWriter(path) as writer:
        for index in range(start, stop):
            made = make(index)
            if isinstance(made, Noted):
                left_out.update(made.left_out)
                made = made.conversation
            if made is not None:
                writer.write(made)
            if (index - start + 1) % _REPORT_EVERY == 0:
                report(_REPORT_EVERY)
        if left_out or writer.records < stop - start:
            # Before the shard gets its name: a shard that stands has its counts.
            write_atomic(_notes(Path(path)), json.dumps([writer.records, left_out]))
    report((stop - start) % _REPORT_EVERY)
    return writer.shard, left_out


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
        for _, (path, _, _) in jobs.items():
            Path(path + ".part").unlink(missing_ok=True)
    return done


def _worker(make: Make, pipe: multiprocessing.connection.Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    try:
        while True:
            _, job = pipe.recv()
            pipe.send(_write_shard(make, job, pipe.send))
    except (EOFError, ConnectionError):
        return
    except UserError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(f"in a worker:\n{traceback.format_exc()}"))
