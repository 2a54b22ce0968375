"""What is written while training: averages over the last steps, metrics.jsonl, the progress line.

metrics.jsonl has one JSON object a line, told apart by "kind":
    run     at each start: devices, parameters, bytes per device, seconds of compiling
    train   every train.log_every steps: loss, loss/PART, what the model adds, lr, grad_norm,
            seconds_per_step, input_wait (share of the time spent waiting for data), tokens_per_second,
            images_per_second, tokens, images (real ones seen in these steps), data/NAME from the loader
    eval    after each in-training evaluation: eval/NAME for what the callback returned, seconds
Every line has "step", the number of finished steps.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from umm_jax.errors import UserError


class Meter:
    """Metrics of the steps since the last log line, left on the device until they are asked for.

    ``add`` never waits. ``wait`` holds the host back to `ahead` steps before the device, which bounds the
    batches in flight and costs nothing: the device always has the next step in its queue.
    """

    def __init__(self, ahead: int = 2):
        self._pending: list[tuple[int, Any]] = []
        self.ahead = ahead

    def add(self, step: int, metrics: Any) -> None:
        self._pending.append((step, metrics))

    def wait(self) -> None:
        if len(self._pending) > self.ahead:
            jax.block_until_ready(self._pending[-1 - self.ahead][1]["scalars"]["loss"])

    def check(self) -> list[tuple[int, Any]]:
        """All pending metrics as numbers.

        Raises:
            UserError: a loss or gradient norm that is not finite; names the first such step.
        """
        self._pending = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        for step, metrics in self._pending:
            for name in ("loss", "grad_norm"):
                value = float(metrics["scalars"][name])
                if not math.isfinite(value):
                    raise UserError(
                        f"{name} is {value} at step {step}: training stopped, nothing was saved after it; "
                        "lower optim.lr, raise optim.warmup, or look at the data of that step"
                    )
        return self._pending

    def read(self) -> dict[str, float]:
        """Means over the pending steps (weighted for sums; totals of counts; the last lr); forgets them."""
        rows = [metrics for _, metrics in self.check()]
        self._pending = []
        line = {name: sum(float(r["scalars"][name]) for r in rows) / len(rows) for name in rows[0]["scalars"]}
        line["lr"] = float(rows[-1]["scalars"]["lr"])
        for name in rows[0]["sums"]:
            total = sum(float(r["sums"][name][0]) for r in rows)
            weight = sum(float(r["sums"][name][1]) for r in rows)
            if weight > 0:
                line[name] = total / weight
        for name in rows[0]["counts"]:
            line[name] = sum(int(r["counts"][name]) for r in rows)
        return line


class Clock:
    """Where the wall time between two log lines goes: steps, waiting for input, and what is counted apart."""

    def __init__(self):
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
        self.reset()
        return line


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
            self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")

    def close(self) -> None:
        if self._file is not None:
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
