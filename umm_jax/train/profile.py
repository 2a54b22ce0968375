"""A profile of a few steps, asked for by train.profile or by a signal while the run goes on."""

import signal
import threading
from pathlib import Path

import jax

STEPS = 5  # that a signal asks for


class Profile:
    """Writes traces (for XProf, TensorBoard or Perfetto) to `folder`.

    Args:
        steps: "100:105" for steps 100 to 104, or "" for none. SIGUSR1 asks for the next STEPS; only the main
            thread can listen.
    """

    def __init__(self, steps: str, folder: Path):
        first, last = map(int, steps.split(":")) if steps else (0, 0)
        self._window, self._folder, self._on = range(first, last), folder, False
        self._asked = threading.Event()
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, lambda *_: self._asked.set())

    def begin(self, step: int) -> None:
        """`step` begins now."""
        if self._asked.is_set() and not self._on:
            self._window = range(step, step + STEPS)
        self._asked.clear()
        if step in self._window and not self._on:
            # A folder each: JAX names what it writes by the second.
            jax.profiler.start_trace(str(self._place))
            self._on = True

    def end(self, step: int, value) -> str | None:
        """`step` was begun and gives `value`; a line to say where its profile is, when it is complete."""
        if not self._on or step + 1 in self._window:
            return None
        jax.block_until_ready(value)
        self._finish()
        return f"profile   of steps {self._window.start} to {step} in {self._place}"

    def close(self) -> None:
        """Completes what was begun, and listens no more."""
        self._finish()
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)

    @property
    def _place(self) -> Path:
        return self._folder / f"steps-{self._window.start}-{self._window.stop - 1}"

    def _finish(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
