"""The life of a training run, from top to bottom in one function."""

import math
import os
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

from umm_jax import config as configs
from umm_jax import families, sharding
from umm_jax.config import RunConfig
from umm_jax.errors import ConfigError, Interrupted, Preempted, StorageError, UserError
from umm_jax.families import Family
from umm_jax.families.contract import ModelConfig
from umm_jax.models import attention
from umm_jax.train import anomalies
from umm_jax.train import state as states
from umm_jax.train.checkpoint import Checkpoints, plain_config
from umm_jax.train.lock import Lock, held
from umm_jax.train.metrics import Clock, Meter, MetricsFile, Progress, read_metrics
from umm_jax.train.optimizer import flatten, unflatten
from umm_jax.train.profile import Profile
from umm_jax.train.step import make_step
from umm_jax.train.watchdog import Watchdog

TOKENIZER = "tokenizer.model"
# Several processes stop at the same step, for which they ask each other: after about so many seconds. Whoever
# preempts them waits for longer (launch.job.Job.grace).
ASKED = 30.0

# What a run may change when it is continued: how long, how often, where; not what a step computes. (A longer
# run has a longer schedule: its rate goes on from where the new one stands at this step.)
CHANGEABLE = (
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.keep_every",
    "train.keep_best",
    "train.anomaly",
    "train.spike",
    "train.profile",
    "train.hang_minutes",
    "train.eval_every",
    "train.eval_items",
    "data.prefetch",
    "data.workers",
    "mesh.",
    "eval.",
    "reply.",
)


def train(
    run: RunConfig,
    workdir: str | Path,
    *,
    on_eval: Callable[[int, Any], Mapping[str, float]] | None = None,
    family: Family | None = None,
    loader: Any = None,
    ideal: Callable[[RunConfig, int], float | None] | None = None,
) -> dict[str, Any]:
    """Trains `run` in `workdir`, from its newest checkpoint if there is one.

    Args:
        on_eval: called as on_eval(step, params) every train.eval_every steps; what it returns goes into
            metrics.jsonl. It must not keep `params`: the next step gives them up.
        family: that of run.family unless given; of another only ``config`` and ``model`` are needed when a
            `loader` is given.
        loader: iterator of numpy batches with get_state() and set_state(), the run's data unless given.
            Where it has stats(), those are logged; where it has close(), it is closed.
        ideal: ideal(run, devices) is how many seconds a whole batch takes the devices at their peak, or None
            where that is not known; from it "mfu" is told.

    Returns:
        {"step", "seconds", "compile_seconds", "parameters"} of this call.

    Raises:
        UserError: of the kind that says what is wrong. ``Interrupted`` after Ctrl-C, ``Preempted`` after
            SIGTERM, with everything saved. ``BusyError``: another job is training in `workdir`.
    """
    workdir = _local(workdir, "--workdir")
    with _alone(workdir) as lock:
        return _train(run, workdir, on_eval, family or families.get(run.family), loader, ideal, lock)


def _train(run: RunConfig, workdir: Path, on_eval, family: Family, loader, ideal, lock: Lock | None):
    started = time.perf_counter()

    # ┌──────────────────────────────────────────────────────────────────────────┐
    # │  The run directory: one config for all of its life                       │
    # └──────────────────────────────────────────────────────────────────────────┘
    model_config = configs.from_dict(family.config.ModelConfig, run.model, "config.model")
    _check_owner(workdir, run)

    # ┌──────────────────────────────────────────────────────────────────────────┐
    # │  Devices                                                                 │
    # └──────────────────────────────────────────────────────────────────────────┘
    mesh = sharding.make_mesh(run.mesh)
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    _say(f"devices   {mesh.size} of {jax.device_count()} ({jax.default_backend()}), mesh {axes}")

    # ┌──────────────────────────────────────────────────────────────────────────┐
    # │  Tokenizer and data                                                      │
    # └──────────────────────────────────────────────────────────────────────────┘
    if loader is None:
        loader = _make_loader(run, workdir, family, model_config, sharding.share_of_batch(mesh))

    # ┌──────────────────────────────────────────────────────────────────────────┐
    # │  Model and state: from the newest checkpoint, another run, or the seed   │
    # └──────────────────────────────────────────────────────────────────────────┘
    plan = states.plan(lambda rngs: family.model.build(model_config, rngs), run, mesh)
    step_function = make_step(plan, run)
    parameters = sum(leaf.size for leaf in flatten(plan.abstract["params"]).values())
    report = plan.report()
    _say(f"model     {run.family}, {parameters:,} parameters; state {report.summary()}")
    for placement in report.large_replicated if mesh.shape["fsdp"] > 1 else ():
        _say(f"          whole on every device: {placement.path} {list(placement.shape)}")
    for line in plan.optimizer.describe(plan.abstract["params"]):
        _say(f"optimizer {line}")

    identity = plain_config(run, model_config)
    checkpoints = Checkpoints(workdir / "checkpoints", **_retention(run, workdir))
    losses = ()
    if checkpoints.latest() is not None:
        state, position = checkpoints.restore(plan.abstract, identity)
        loader.set_state(position)
        losses = checkpoints.notes().get("losses", ())
        _say(f"state     restored from step {checkpoints.latest()}")
    elif run.train.init_from:
        state = _init_from(plan, run)
    else:
        state = states.init(plan, run)
    first = step = saved = int(state["step"])
    if step >= run.train.steps:
        _say(f"done      the run already has its {run.train.steps} steps")
        checkpoints.close()
        return {"step": step, "seconds": 0.0, "compile_seconds": 0.0, "parameters": parameters}

    # ┌──────────────────────────────────────────────────────────────────────────┐
    # │  Compile                                                                 │
    # └──────────────────────────────────────────────────────────────────────────┘
    rows = next(loader)
    batch = sharding.put_batch(rows, mesh)
    now = time.perf_counter()
    with attention.noted(mesh.devices.flat[0].platform) as ways:
        compiled = step_function.lower(state, batch, *_limit(run, math.inf)).compile()
    compile_seconds = time.perf_counter() - now
    for line in ways:
        _say(f"attention {line}")
    best = ideal(run, mesh.size) if ideal else None
    slots = run.data.batch_size * run.data.tokens
    _say(f"compiled  in {compile_seconds:.1f} s; steps {first} to {run.train.steps}")
    # Only now: what failed before this may be mended and begun again in the same folder.
    _claim(workdir, run)

    # ┌──────────────────────────────────────────────────────────────────────────┐
    # │  The loop. The host runs ahead of the device and reads numbers only when │
    # │  it logs; a save takes the loader's state before the next batch is drawn │
    # └──────────────────────────────────────────────────────────────────────────┘
    log = MetricsFile(workdir / "metrics.jsonl", step)
    facts = {"devices": mesh.size, "backend": jax.default_backend(), "parameters": parameters}
    facts |= {"bytes_per_device": report.bytes_per_device, "compile_seconds": compile_seconds}
    log.write(step, "run", facts)
    wrong: list[tuple[int, str]] = []  # steps, and why, that are to be dealt with

    def judge(at: int, loss: float, grad_norm: float):
        if why := watch.judge(at, loss, grad_norm):
            wrong.append((at, why))

    meter, clock, progress = Meter(judge), Clock(started), Progress(first, run.train.steps)
    watch = anomalies.Watch(run.train.anomaly, run.train.spike, meter.ahead, losses)
    profile = Profile(run.train.profile, workdir / "profile")
    logged, recent, backs, asked_every, wanted = step, {}, Counter(), 1, _best_by(run)

    watchdog = Watchdog(
        run.train.hang_minutes and 60 * run.train.hang_minutes, workdir, str(jax.process_index())
    )

    def alarm(error: StorageError):
        _say(f"ALARM     {error}")
        log.write(step, "alarm", {"why": str(error)})
        checkpoints.reopen()

    def finish_save():
        """Waits for the save before; that it failed must not cost the next one."""
        try:
            checkpoints.wait()
        except StorageError as error:
            alarm(error)

    def save():
        nonlocal saved
        if lock is not None:
            lock.check()
        finish_save()
        checkpoints.save(step, state, loader.get_state(), identity, {"losses": watch.history()})
        saved = step

    def save_or_go_on():
        """A disk that refuses costs a checkpoint, not the run."""
        try:
            save()
        except StorageError as error:
            alarm(error)

    def settle():
        """Deals with the steps that went wrong. True where the run has gone back to a checkpoint."""
        nonlocal state, step, saved, logged, log
        at, why = wrong[0]
        about = {"why": why, "process": jax.process_index()}
        kept = anomalies.write(workdir, at, recent[at], about) if at in recent else None
        # Where steps are skipped each is wrong by itself; else the others only follow from the first.
        del wrong[: 1 if run.train.anomaly == "skip" else len(wrong)]
        line = {"why": why, "policy": run.train.anomaly, "batch": kept and str(kept)}
        if run.train.anomaly != "rollback":
            log.write(step, "anomaly", line)
            if run.train.anomaly == "skip":
                _say(f"skipped   {why}")
                return False
            replay = f"; its batch is in {kept}, see umm replay" if kept else ""
            raise UserError(
                f"{why}: training stopped, nothing was saved after it{replay}; lower optim.lr, raise "
                "optim.warmup, look at the data of that step, or set train.anomaly to skip or rollback"
            )
        finish_save()
        back = checkpoints.latest()
        if back is None:
            raise UserError(f"{why}, and there is no checkpoint to go back to")
        backs[back] += 1
        if backs[back] > anomalies.PATIENCE:
            raise UserError(f"{why}, after {backs[back] - 1} times back to step {back}: training stopped")
        state = None  # there may be no room for two
        state, _ = checkpoints.restore(plan.abstract, identity)
        clock.undo(logged - back)
        log.close()
        log = MetricsFile(workdir / "metrics.jsonl", back)
        log.write(back, "anomaly", line | {"back": back})
        _say(f"back      to step {back}, with the data after that of step {step}: {why}")
        step = saved = logged = back
        meter.forget()
        watch.forget(back)
        recent.clear()
        return True

    try:
        with _stop_signals() as stopping:
            while True:
                profile.begin(step + 1)
                state, metrics = compiled(state, batch, *_limit(run, watch.limit(step + 1)))
                step += 1
                meter.add(step, metrics)
                recent[step] = rows
                recent.pop(step - meter.ahead - 1, None)
                watchdog.alive(f"step {max(step - meter.ahead, 1)}")
                last = step == run.train.steps
                log_now = last or step % run.train.log_every == 0
                stop = _agreed(stopping, log_now or step % asked_every == 0)
                save_now = last or stop or step % run.train.save_every == 0
                # A state after a NaN must never push out a good one.
                meter.wait(0 if log_now or save_now else None)
                if said := profile.end(step, metrics):
                    _say(said)
                back = False
                while wrong and not back:
                    back = settle()
                if back:
                    rows = next(loader)
                    batch = sharding.put_batch(rows, mesh)
                    continue

                if log_now:
                    line = meter.read()
                    line |= clock.read(step - logged)
                    seconds = line["seconds_per_step"] * (step - logged)
                    line |= {f"{axis}_per_second": line[axis] / seconds for axis in batch}
                    if hasattr(loader, "stats"):
                        line |= {f"data/{name}": value for name, value in loader.stats().items()}
                    if best is not None:
                        fill = line["tokens"] / (slots * (step - logged))
                        line["mfu"] = best * fill / line["seconds_per_step"]
                    slowest, asked_every = _slowest(line, run.train.log_every)
                    line |= slowest
                    log.write(step, "train", line)
                    progress.log(step, line)
                    logged = step
                if save_now:
                    with clock.aside(), watchdog.paused():
                        save() if last or stop else save_or_go_on()
                if (
                    on_eval
                    and run.train.eval_every
                    and (last or step % run.train.eval_every == 0)
                    and not stop
                ):
                    with clock.aside(), watchdog.paused():
                        now = time.perf_counter()
                        found = on_eval(step, states.eval_params(state, run.eval.weights))
                        line = {f"eval/{name}": float(value) for name, value in found.items()}
                        log.write(step, "eval", line | {"seconds": time.perf_counter() - now})
                        if wanted and wanted not in line:
                            told = ", ".join(sorted(line))
                            _say(f"ALARM     train.keep_best: {wanted} is not among {told}")
                progress.step(step)
                if last or stop:
                    break
                watchdog.alive(f"the data of step {step + 1}")
                with clock.input():
                    rows = next(loader)
                    batch = sharding.put_batch(rows, mesh)
            # ┌──────────────────────────────────────────────────────────────────┐
            # │  The end: nothing is left unfinished                             │
            # └──────────────────────────────────────────────────────────────────┘
            checkpoints.close()
    except BaseException:
        # Whatever went wrong, a save in the background may still be completed.
        with suppress(Exception):
            checkpoints.close()
        raise
    finally:
        watchdog.close()
        profile.close()
        progress.close()
        log.close()
        if hasattr(loader, "close"):
            loader.close()
    if stop and not last:
        kind = Preempted if stop == signal.SIGTERM else Interrupted
        raise kind(f"stopped at step {step}, saved in {workdir}; run the same command again to go on")
    seconds = time.perf_counter() - started
    _say(f"done      {step} steps, {seconds:.0f} s, checkpoint of step {saved} in {workdir}")
    return {"step": step, "seconds": seconds, "compile_seconds": compile_seconds, "parameters": parameters}


# --- what the headings above need --------------------------------------------------------------------


def _local(path: str | Path, name: str) -> Path:
    if "://" in str(path):
        raise ConfigError(
            f"{name}={path}: only local folders are written and read so far; mount the bucket (gcsfuse) and "
            "give the path it is mounted at"
        )
    return Path(path)


@contextmanager
def _alone(workdir: Path) -> Iterator[Lock | None]:
    """The run's lock, which the first process of a job holds for all of them."""
    if jax.process_index() != 0:
        yield None
        return
    with held(workdir) as lock:
        yield lock


def _check_owner(workdir: Path, run: RunConfig) -> None:
    """Raises ConfigError where the folder holds a run of another config; names the fields."""
    path = workdir / "config.json"
    if path.exists():
        found = configs.differences(configs.load(path), run)
        odd = [text for text in found if not text.split(":")[0].startswith(CHANGEABLE)]
        if odd:
            raise ConfigError(
                f"{workdir} holds a run of another config (there != here): {'; '.join(odd)}; "
                "choose another workdir, or give the run its own config back"
            )


def _best_by(run: RunConfig) -> str:
    """What the best checkpoints are told by, as metrics.jsonl names it; "" where none are."""
    return run.train.keep_best and f"eval/{run.train.keep_best.split()[0].removeprefix('-')}"


def _retention(run: RunConfig, workdir: Path) -> dict[str, Any]:
    """Which checkpoints stay: arguments of ``Checkpoints``."""
    best = None
    if run.train.keep_best:
        sign, name = (-1.0 if run.train.keep_best.startswith("-") else 1.0), _best_by(run)

        def score(step: int) -> float | None:
            path = workdir / "metrics.jsonl"
            lines = read_metrics(path) if path.exists() else []
            found = [line[name] for line in lines if line["step"] == step and name in line]
            return sign * found[-1] if found else None

        best = score, int(run.train.keep_best.split()[1])
    return {"keep": run.train.keep, "every": run.train.keep_every, "best": best}


def _limit(run: RunConfig, loss: float) -> tuple[np.ndarray, ...]:
    """The step's third argument, where it has one."""
    return (np.float32(loss),) if run.train.anomaly == "skip" else ()


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


def _claim(workdir: Path, run: RunConfig) -> None:
    """Keeps the tokenizer and then config.json: the folder is this run's from now on, and it owns both."""
    from umm_jax.data.files import write_atomic

    if jax.process_index() == 0:
        path, source, kept = workdir / "config.json", Path(run.data.tokenizer), workdir / TOKENIZER
        if not path.exists() and source.is_file() and source.resolve() != kept.resolve():
            write_atomic(kept, source.read_bytes())
        configs.save(run, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def _make_loader(
    run: RunConfig, workdir: Path, family: Family, model_config: ModelConfig, share: tuple[int, int]
) -> Any:
    """The loader of a share of the run's data."""
    from umm_jax.data.pipeline import make_loader, plan
    from umm_jax.data.tokenizer import Tokenizer

    source, kept = Path(run.data.tokenizer), workdir / TOKENIZER
    began = (workdir / "config.json").exists() and kept.exists()
    if not began and not source.is_file():
        raise ConfigError(f"data.tokenizer={run.data.tokenizer!r}: no such file")
    if began and source.is_file() and source.read_bytes() != kept.read_bytes():
        raise ConfigError(f"{source} is not the tokenizer this run began with ({kept})")
    tokenizer = Tokenizer.load(kept if began else source)
    serializer = family.stream.Serializer(model_config, tokenizer)
    index, count = share
    loader = make_loader(run.data, serializer, process_index=index, process_count=count)
    _say(f"data      {len(run.data.sources)} sources, {tokenizer.size} pieces")
    _say(f"input     {plan(run.data, serializer.spec, count)}")
    return loader


def _init_from(plan: states.Plan, run: RunConfig) -> states.TrainState:
    """Fresh state whose parameters, wherever paths agree, are those of another run.

    From a run that trained only an autoencoder, only the autoencoder is taken.
    """
    source = _local(run.train.init_from, "train.init_from")
    other = configs.load(source / "config.json")
    wanted = flatten(plan.abstract["params"])
    if other.train.objective == "autoencoder":
        wanted = {path: leaf for path, leaf in wanted.items() if states.is_autoencoder(path)}
    found = Checkpoints(source / "checkpoints", read_only=True).restore_matching(unflatten(wanted))
    fresh = flatten(states.init(plan, run)["params"])
    _say(f"state     {len(found)} of {len(fresh)} parameter arrays from {source}, the others from the seed")
    return states.with_params(plan, run, unflatten({**fresh, **found}))


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
        _say("\nstopping soon, and saving; once more to stop at once")

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


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
