"""A run under way: one step after the other, and what happens between two of them.

The host runs ahead of the device, and reads numbers only when it logs or saves. A save takes the loader's
state before the next batch is drawn.
"""

import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from umm_jax import sharding
from umm_jax.config import RunConfig
from umm_jax.errors import StorageError, UserError
from umm_jax.train import anomalies
from umm_jax.train import state as states
from umm_jax.train.checkpoint import Checkpoints
from umm_jax.train.lock import Lock
from umm_jax.train.metrics import Clock, Meter, MetricsFile, Progress
from umm_jax.train.profile import Profile
from umm_jax.train.watchdog import Watchdog

# Several processes stop at the same step, for which they ask each other: after about so many seconds. Whoever
# preempts them waits for longer (launch.job.Job.grace).
ASKED = 30.0


class Running:
    """The steps of a run, from a state and the rows of its first batch.

    Args:
        compiled: (state, batch, and where steps are skipped the largest loss that is not) -> state, metrics.
        identity: the plain config that checkpoints are told by.
        rows: of this process, of the next batch.
        losses: those before, which a spike is told by.
        started: when the run was begun, of ``time.perf_counter``. facts: for its first line in metrics.jsonl.
        best: seconds that a whole batch takes at the devices' peak, or None.

    Attributes:
        step: the last that was taken. saved: that of the newest checkpoint.
    """

    def __init__(
        self,
        run: RunConfig,
        workdir: Path,
        *,
        plan: states.Plan,
        compiled: Callable,
        loader: Any,
        checkpoints: Checkpoints,
        identity: Mapping[str, Any],
        state: states.TrainState,
        rows: Any,
        losses: Any,
        lock: Lock | None,
        started: float,
        facts: Mapping[str, Any],
        best: float | None,
    ):
        self.run, self.workdir, self.plan, self.compiled = run, workdir, plan, compiled
        self.loader, self.checkpoints, self.identity, self.lock = loader, checkpoints, identity, lock
        self.state, self.best = state, best
        self._put(rows)
        self.step = self.saved = self.logged = int(state["step"])
        self.log = MetricsFile(workdir / "metrics.jsonl", self.step)
        self.log.write(self.step, "run", facts)
        self.wrong: list[tuple[int, str]] = []  # steps, and why, that are to be dealt with
        self.recent: dict[int, Any] = {}  # rows of the steps whose numbers are not known yet
        self.backs: Counter[int] = Counter()
        self.meter, self.clock = Meter(self._judge), Clock(started)
        self.progress = Progress(self.step, run.train.steps)
        self.watch = anomalies.Watch(run.train.anomaly, run.train.spike, self.meter.ahead, losses)
        self.profile = Profile(run.train.profile, workdir / "profile")
        self.asked_every = 1
        minutes = run.train.hang_minutes
        self.watchdog = Watchdog(minutes and 60 * minutes, workdir, str(jax.process_index()))

    def go(self, on_eval: Callable[[int, Any], Mapping[str, float]] | None) -> int:
        """Runs to the end, or to a signal, and saves there. The signal, or 0 at the end."""
        train = self.run.train
        try:
            with _stop_signals() as stopping:
                while True:
                    self._step()
                    last = self.step == train.steps
                    log_now = last or self.step % train.log_every == 0
                    stop = _agreed(stopping, log_now or self.step % self.asked_every == 0)
                    save_now = last or stop or self.step % train.save_every == 0
                    # A state after a NaN must never push out a good one.
                    self.meter.wait(0 if log_now or save_now else None)
                    if said := self.profile.end(self.step, self.metrics):
                        say(said)
                    if self._settled_by_going_back():
                        self._put(next(self.loader))
                        continue
                    if log_now:
                        self._log()
                    if save_now:
                        with self.clock.aside(), self.watchdog.paused():
                            self._save() if last or stop else self._save_or_go_on()
                    evaluates = train.eval_every and (last or self.step % train.eval_every == 0)
                    if on_eval and evaluates and not stop:
                        self._evaluate(on_eval)
                    self.progress.step(self.step)
                    if last or stop:
                        break
                    self.watchdog.alive(f"the data of step {self.step + 1}")
                    with self.clock.input():
                        self._put(next(self.loader))
            # Nothing is left unfinished.
            self.checkpoints.close()
        except BaseException:
            # Whatever went wrong, a save in the background may still be completed.
            with suppress(Exception):
                self.checkpoints.close()
            raise
        finally:
            for part in (self.watchdog, self.profile, self.progress, self.log):
                part.close()
            if hasattr(self.loader, "close"):
                self.loader.close()
        return 0 if last else stop

    # --- a step ---------------------------------------------------------------------------------------

    def _put(self, rows: Any) -> None:
        self.rows, self.batch = rows, sharding.put_batch(rows, self.plan.mesh)

    def _step(self) -> None:
        self.profile.begin(self.step + 1)
        most = limit(self.run, self.watch.limit(self.step + 1))
        self.state, self.metrics = self.compiled(self.state, self.batch, *most)
        self.step += 1
        self.meter.add(self.step, self.metrics)
        self.recent[self.step] = self.rows
        self.recent.pop(self.step - self.meter.ahead - 1, None)
        self.watchdog.alive(f"step {max(self.step - self.meter.ahead, 1)}")

    # --- what is told ---------------------------------------------------------------------------------

    def _log(self) -> None:
        steps = self.step - self.logged
        line = self.meter.read()
        line |= self.clock.read(steps)
        seconds = line["seconds_per_step"] * steps
        line |= {f"{axis}_per_second": line[axis] / seconds for axis in self.batch}
        if hasattr(self.loader, "stats"):
            line |= {f"data/{name}": value for name, value in self.loader.stats().items()}
        if self.best is not None:
            fill = line["tokens"] / (self.run.data.batch_size * self.run.data.tokens * steps)
            line["mfu"] = self.best * fill / line["seconds_per_step"]
        slowest, self.asked_every = _slowest(line, self.run.train.log_every)
        line |= slowest
        self.log.write(self.step, "train", line)
        self.progress.log(self.step, line)
        self.logged = self.step

    def _evaluate(self, on_eval: Callable[[int, Any], Mapping[str, float]]) -> None:
        with self.clock.aside(), self.watchdog.paused():
            now = time.perf_counter()
            found = on_eval(self.step, states.eval_params(self.state, self.run.eval.weights))
            line = {f"eval/{name}": float(value) for name, value in found.items()}
            self.log.write(self.step, "eval", line | {"seconds": time.perf_counter() - now})
        wanted = best_by(self.run)
        if wanted and wanted not in line:
            say(f"ALARM     train.keep_best: {wanted} is not among {', '.join(sorted(line))}")

    # --- what is saved --------------------------------------------------------------------------------

    def _alarm(self, error: StorageError) -> None:
        say(f"ALARM     {error}")
        self.log.write(self.step, "alarm", {"why": str(error)})
        self.checkpoints.reopen()

    def _finish_save(self) -> None:
        """Waits for the save before; that it failed must not cost the next one."""
        try:
            self.checkpoints.wait()
        except StorageError as error:
            self._alarm(error)

    def _save(self) -> None:
        if self.lock is not None:
            self.lock.check()
        self._finish_save()
        notes = {"losses": self.watch.history()}
        self.checkpoints.save(self.step, self.state, self.loader.get_state(), self.identity, notes)
        self.saved = self.step

    def _save_or_go_on(self) -> None:
        """A disk that refuses costs a checkpoint, not the run."""
        try:
            self._save()
        except StorageError as error:
            self._alarm(error)

    # --- what went wrong ------------------------------------------------------------------------------

    def _judge(self, at: int, loss: float, grad_norm: float) -> None:
        if why := self.watch.judge(at, loss, grad_norm):
            self.wrong.append((at, why))

    def _settled_by_going_back(self) -> bool:
        """Deals with all steps that went wrong. True where the run is at an earlier checkpoint now."""
        while self.wrong:
            if self._settle():
                return True
        return False

    def _settle(self) -> bool:
        """Deals with the first of the steps that went wrong."""
        policy, (at, why) = self.run.train.anomaly, self.wrong[0]
        about = {"why": why, "process": jax.process_index()}
        kept = anomalies.write(self.workdir, at, self.recent[at], about) if at in self.recent else None
        # Where steps are skipped each is wrong by itself; else the others only follow from the first.
        del self.wrong[: 1 if policy == "skip" else len(self.wrong)]
        line = {"why": why, "policy": policy, "batch": kept and str(kept)}
        if policy == "rollback":
            self._go_back(why, line)
            return True
        self.log.write(self.step, "anomaly", line)
        if policy == "skip":
            say(f"skipped   {why}")
            return False
        replay = f"; its batch is in {kept}, see umm replay" if kept else ""
        raise UserError(
            f"{why}: training stopped, nothing was saved after it{replay}; lower optim.lr, raise "
            "optim.warmup, look at the data of that step, or set train.anomaly to skip or rollback"
        )

    def _go_back(self, why: str, line: Mapping[str, Any]) -> None:
        self._finish_save()
        back = self.checkpoints.latest()
        if back is None:
            raise UserError(f"{why}, and there is no checkpoint to go back to")
        self.backs[back] += 1
        if self.backs[back] > anomalies.PATIENCE:
            raise UserError(
                f"{why}, after {self.backs[back] - 1} times back to step {back}: training stopped"
            )
        self.state = None  # there may be no room for two
        self.state, _ = self.checkpoints.restore(self.plan.abstract, self.identity)
        self.clock.undo(self.logged - back)
        self.log.close()
        self.log = MetricsFile(self.workdir / "metrics.jsonl", back)
        self.log.write(back, "anomaly", {**line, "back": back})
        say(f"back      to step {back}, with the data after that of step {self.step}: {why}")
        self.step = self.saved = self.logged = back
        self.meter.forget()
        self.watch.forget(back)
        self.recent.clear()


# --- small things ----------------------------------------------------------------------------------------


def limit(run: RunConfig, loss: float) -> tuple[np.ndarray, ...]:
    """The step's third argument, where it has one."""
    return (np.float32(loss),) if run.train.anomaly == "skip" else ()


def best_by(run: RunConfig) -> str:
    """What the best checkpoints are told by, as metrics.jsonl names it; "" where none are."""
    return run.train.keep_best and f"eval/{run.train.keep_best.split()[0].removeprefix('-')}"


def _slowest(line: Mapping[str, float], log_every: int) -> tuple[dict[str, float], int]:
    """Of several processes, which waited longest for its data: all others wait for it in turn.

    And after how many steps they are to ask each other whether to stop, so that it is known in ASKED seconds.
    """
    if jax.process_count() == 1:
        return {}, log_every
    mine = np.array([line["input_wait"], line["seconds_per_step"]], np.float32)
    waits, paces = multihost_utils.process_allgather(mine).T
    asked_every = int(np.clip(ASKED / max(paces.max(), 1e-6), 1, log_every))
    worst = {"input_wait_worst": float(waits.max()), "input_wait_worst_process": int(waits.argmax())}
    return worst, asked_every


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM puts its number into; a second signal acts as usual. Only the main thread
    can listen."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore():
        for number in numbers:
            signal.signal(number, before[number])

    def listen(number, frame):
        got.append(number)
        restore()
        say("\nstopping soon, and saving; once more to stop at once")

    for number in numbers:
        signal.signal(number, listen)
    try:
        yield got
    finally:
        restore()


def _agreed(got: list[int], now: bool) -> int:
    """The signal to stop for, or 0. Several processes must stop at the same step: they ask each other `now`
    and then."""
    mine = max(got, default=0)
    if jax.process_count() == 1:
        return mine
    return int(multihost_utils.process_allgather(np.array(mine)).max()) if now else 0


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
