"""One job at a time in a run folder: a file that says whose it is, and beats while the job lives.

    RUN/run.lock    {"job", "host", "pid", "born", "beats"}

A lock is given up when its job ends. One that was left behind by a job that died is taken over: at once where
that was on this machine and its process is gone, else when it has not beaten for some time by our own clock
(what other machines think the time is does not matter). Two that take over at once find out; one gives way.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from umm_jax.errors import BusyError

NAME = "run.lock"
BEAT = 10.0  # seconds between two beats
PATIENCE = 4  # beats that must stay away before a lock of another machine counts as left behind


class Lock:
    """A held lock. ``lost`` is set when another job has taken it over."""

    def __init__(self, path: Path, beat: float):
        self.path, self.beat, self.job = path, beat, uuid.uuid4().hex
        self.lost, self._stop, self._beats = threading.Event(), threading.Event(), 0
        self._thread = threading.Thread(target=self._keep, daemon=True, name="run lock")

    def check(self) -> None:
        """Raises BusyError where another job has taken the folder over."""
        if self.lost.is_set():
            raise BusyError(
                f"{self.path}: another job has taken this run over; this one stops, without saving"
            )

    def _said(self) -> dict[str, Any]:
        pid = os.getpid()
        said = {"job": self.job, "host": socket.gethostname(), "pid": pid, "born": born(pid)}
        return said | {"beats": self._beats}

    def _write(self) -> None:
        fresh = self.path.with_name(f"{self.path.name}.{self.job}")
        fresh.write_text(json.dumps(self._said()))
        os.replace(fresh, self.path)

    def _keep(self) -> None:
        while not self._stop.wait(self.beat):
            found = read(self.path)
            # What cannot be read says nothing: a disk that is away for a moment is no other job.
            if found and found.get("job") != self.job:
                self.lost.set()
                return
            self._beats += 1
            # A disk that is full or away for a while is the affair of those who save; the next beat may do.
            with contextlib.suppress(OSError):
                self._write()

    def _release(self) -> None:
        self._stop.set()
        self._thread.join()
        if (read(self.path) or {}).get("job") == self.job:
            self.path.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any] | None:
    """What a lock says; {} where it cannot be read, None where there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def born(pid: int) -> str:
    """When a process of this machine began, in words that tell it from a later one of that number; or ""."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_alive(said: dict[str, Any]) -> bool:
    """Whether the process of a lock of this machine still runs."""
    try:
        os.kill(said["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return born(said["pid"]) == said.get("born", "")


@contextlib.contextmanager
def held(
    folder: Path, *, name: str = NAME, beat: float = BEAT, patience: int = PATIENCE
) -> Iterator[Lock]:
    """Holds the lock called `name` of a run folder, which is made.

    Raises:
        BusyError: another job holds it, and lives.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / name, beat)
    _take(lock, patience)
    lock._thread.start()
    try:
        yield lock
    finally:
        lock._release()
        if new:
            # A job that was refused before it wrote anything leaves nothing behind.
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(lock: Lock, patience: int) -> None:
    path = lock.path
    for _ in range(3):
        try:
            with open(path, "x") as file:
                file.write(json.dumps(lock._said()))
        except FileExistsError:
            pass
        else:
            return
        found = read(path)
        if found is None:
            continue
        _require_dead(path, found, lock.beat, patience)
        lock._write()
        # Whoever wrote last has it; the others see that after a moment.
        time.sleep(min(0.2, lock.beat))
        if (read(path) or {}).get("job") == lock.job:
            return
    raise BusyError(f"{path}: other jobs are taking this run over, too; one of them has it")


def _require_dead(path: Path, found: dict[str, Any], beat: float, patience: int) -> None:
    """Returns when the job of a lock is gone. Raises BusyError when it lives."""
    who = f"pid {found.get('pid', '?')} on {found.get('host', 'an unknown machine')}"
    if found.get("host") == socket.gethostname() and isinstance(found.get("pid"), int):
        if is_alive(found):
            raise BusyError(
                f"{path.parent}: another job ({who}) is at work here; stop it, or choose another folder"
            )
        return
    print(f"lock      {path} is held by {who}; waiting whether it beats", file=sys.stderr, flush=True)
    end = time.monotonic() + patience * beat
    while time.monotonic() < end:
        time.sleep(min(beat / 2, max(end - time.monotonic(), 0)))
        now = read(path)
        if now is None:
            return
        if now != found:
            raise BusyError(
                f"{path.parent}: another job ({who}) is at work here; stop it, or choose another folder"
            )
