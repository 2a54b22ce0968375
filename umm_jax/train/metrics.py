"""What is written while training: averages over the last steps, metrics.jsonl, the progress line.

metrics.jsonl has one JSON object a line, told apart by "kind":
    run     at each start: devices, parameters, bytes per device, seconds of compiling
    train   every train.log_every steps: loss, loss/PART, what the model adds, lr, grad_norm,
            seconds_per_step, input_wait (share of the time spent waiting for data), tokens_per_second,
            images_per_second, tokens, images (real ones seen in these steps), data/NAME of the loader,
            goodput (share of this start's time so far that went into steps that count), skipped (steps),
            mfu (where the peak of the devices is known: the model FLOPs of a batch times the share of its
            tokens that are real, over what the devices could have done),
            input_wait_worst and input_wait_worst_process (several processes)
    alarm   a save that failed while the run went on: why
    anomaly a step that went wrong: why, policy, batch (where it is kept), back (the step gone back to)
    eval    after each in-training evaluation: eval/NAME for what the callback returned, seconds
Every line has "step", the number of finished steps, and "time", seconds since 1970.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax


class Meter:
    """Metrics of the steps since the last log line, left on the device until they are asked for.

    ``add`` never waits. ``wait`` holds the host back to `ahead` steps before the device, which bounds the
    batches in flight and costs nothing: the device always has the next step in its queue.

    Args:
        judge: called as judge(step, loss, grad_norm), once for each step and in their order.
    """

    def __init__(self, judge: Callable[[int, float, float], None] = lambda *_: None, ahead: int = 2):
        self._pending: list[tuple[int, Any]] = []
        self._judged = 0
        self._judge, self.ahead = judge, ahead

    def add(self, step: int, metrics: Any) -> None:
        self._pending.append((step, metrics))

    def wait(self, ahead: int | None = None) -> None:
        """Waits until all but the last `ahead` steps are done, and has them judged."""
        ready = max(len(self._pending) - (self.ahead if ahead is None else ahead), 0)
        for step, metrics in self._pending[self._judged : ready]:
            found = jax.device_get({name: metrics["scalars"][name] for name in ("loss", "grad_norm")})
            self._judged += 1
            self._judge(step, float(found["loss"]), float(found["grad_norm"]))

    def forget(self) -> None:
        """Drops the pending steps: they do not count."""
        self._pending, self._judged = [], 0

    def read(self) -> dict[str, float]:
        """Means over the pending steps (weighted for sums; totals of counts; the last lr); forgets them.

        Steps that were skipped are in the counts alone.
        """
        self.wait(0)
        rows = [jax.device_get(metrics) for _, metrics in self._pending]
        self.forget()
        every, rows = rows, [row for row in rows if not row["counts"].get("skipped")] or rows
        line = {name: sum(float(r["scalars"][name]) for r in rows) / len(rows) for name in rows[0]["scalars"]}
        line["lr"] = float(rows[-1]["scalars"]["lr"])
        for name in rows[0]["sums"]:
            total = sum(float(r["sums"][name][0]) for r in rows)
            weight = sum(float(r["sums"][name][1]) for r in rows)
            if weight > 0:
                line[name] = total / weight
        for name in rows[0]["counts"]:
            line[name] = sum(int(r["counts"][name]) for r in every)
        return line


class Clock:
    """Where the wall time between two log lines goes: steps, waiting for input, and what is counted apart.

    Args:
        began: what goodput counts from, as time.perf_counter() tells it; now unless given.
    """

    def __init__(self, began: float | None = None):
        self._began = time.perf_counter() if began is None else began
        self._good, self._steps = 0.0, 0
        self.reset()

    def reset(self) -> None:
        self._start, self._input, self._aside = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def input(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._input += time.perf_counter() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Saving and evaluation are not part of a step's time."""
        start = time.perf_counter()
        yield
        self._aside += time.perf_counter() - start

    def read(self, steps: int) -> dict[str, float]:
        """{"seconds_per_step", "input_wait" (share)} since the last reading, which starts a new one."""
        seconds = max(time.perf_counter() - self._start - self._aside, 1e-9)
        line = {"seconds_per_step": seconds / steps, "input_wait": self._input / seconds}
        self._good, self._steps = self._good + seconds, self._steps + steps
        line["goodput"] = self._good / max(time.perf_counter() - self._began, 1e-9)
        self.reset()
        return line

    def undo(self, steps: int) -> None:
        """So many of the last steps that were read will be done again."""
        if steps > 0:
            self._good *= max(1 - steps / self._steps, 0)
            self._steps = max(self._steps - steps, 0)
        self.reset()


class MetricsFile:
    """metrics.jsonl of a run; only the first process writes.

    Opening it at `step` removes lines of later steps (they belong to steps that are done again after a crash)
    and a half-written last line, so that each step appears once.
    """

    def __init__(self, path: str | Path, step: int):
        self._file = None
        if jax.process_index() != 0:
            return
        path = Path(path)
        kept = (
            [json.dumps(line) for line in read_metrics(path) if line["step"] <= step] if path.exists() else []
        )
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(line + "\n" for line in kept))
        os.replace(fresh, path)
        self._file = open(path, "a", buffering=1)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            line = json.dumps({"step": step, "kind": kind, "time": time.time(), **values})
            try:
                self._file.write(line + "\n")
            except OSError as error:  # costs the line, not the run
                print(f"ALARM     {self._file.name}: {error}; lost: {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # told by whichever line it refused
                self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl."""
    lines = []
    for text in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # The last line of a run that was killed while writing it.
    return lines


class Progress:
    """One line with bar, loss and time left, redrawn in place on a terminal; a plain line a log elsewhere."""

    def __init__(self, first: int, total: int, stream=None):
        self._stream = stream or sys.stderr
        self._first, self._total, self._start = first, total, time.perf_counter()
        self._live = self._stream.isatty() and jax.process_index() == 0
        self._text = ""

    def step(self, step: int) -> None:
        if self._live:
            done = int(24 * step / self._total)
            bar = "#" * done + "." * (24 - done)
            self._stream.write(f"\r\x1b[K[{bar}] {step}/{self._total}  {self._text}ETA {self._eta(step)}")
            self._stream.flush()

    def log(self, step: int, line: Mapping[str, float]) -> None:
        self._text = f"loss {line['loss']:.4f}  {line['seconds_per_step']:.3g} s/step  "
        if not self._live and jax.process_index() == 0:
            print(f"step {step}/{self._total}  {self._text}ETA {self._eta(step)}", file=self._stream)

    def close(self) -> None:
        if self._live:
            self._stream.write("\n")

    def _eta(self, step: int) -> str:
        # The whole run's pace, pauses included: saving and evaluation will come again.
        pace = (time.perf_counter() - self._start) / max(step - self._first, 1)
        minutes, seconds = divmod(int(pace * (self._total - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
