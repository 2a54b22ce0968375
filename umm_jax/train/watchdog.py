"""Notices that a run hangs: nothing has come to an end for too long. Says where it hangs, and ends it.

A collective whose other side died waits for ever, and so does a read from a disk that went away. Nothing can
be mended inside the process, so it leaves with a status of its own, and whoever started it starts it again
from the last checkpoint.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HUNG = 75  # EX_TEMPFAIL: to be tried again
PATIENCE = 20.0  # seconds that writing the stacks may take


class Watchdog:
    """Expects :meth:`alive` to be called at least every `seconds` seconds.

    Args:
        seconds: None watches nothing.
        folder: where stacks.txt goes, what every thread was doing. name: of this process in its name.
        bite: what is done after that; by default the process ends with status HUNG.
    """

    def __init__(
        self, seconds: float | None, folder: Path, name: str = "0", bite: Callable[[], None] | None = None
    ):
        self.seconds, self.path = seconds, folder / f"stacks-{name}.txt"
        self._bite = bite or (lambda: os._exit(HUNG))
        self._last, self._what, self._paused = time.monotonic(), "the first step", 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        if seconds is not None:
            self._thread.start()

    def alive(self, what: str) -> None:
        """Something came to an end; `what` is waited for now."""
        self._last, self._what = time.monotonic(), what

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What may take any time: evaluation, a save."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self._last = time.monotonic()

    def close(self) -> None:
        """Ends watching."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            late = time.monotonic() - self._last
            if self._paused or late < self.seconds:
                continue
            # If it is the disk that went away, writing to it may fail, or never come back.
            late_bite = threading.Timer(PATIENCE, self._bite)
            late_bite.daemon = True
            late_bite.start()
            said = f"nothing for {late:.0f} s while waiting for {self._what}"
            print(
                f"watchdog  {said}; {self.path} says what every thread was doing; ending with status {HUNG}, "
                "to be started again",
                file=sys.stderr,
                flush=True,
            )
            try:
                with open(self.path, "w") as file:
                    file.write(f"{said}\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            except OSError as error:
                print(f"watchdog  {self.path}: {error}", file=sys.stderr, flush=True)
            late_bite.cancel()
            self._bite()
            return
