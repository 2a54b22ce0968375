"""The life of a training run, from top to bottom in one function."""

import os
import signal
import sys
import threading
import time
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
from umm_jax.errors import ConfigError, Interrupted
from umm_jax.families import Family
from umm_jax.families.contract import ModelConfig
from umm_jax.models import attention
from umm_jax.train import state as states
from umm_jax.train.checkpoint import Checkpoints, plain_config
from umm_jax.train.lock import Lock, held
from umm_jax.train.metrics import Clock, Meter, MetricsFile, Progress
from umm_jax.train.optimizer import flatten, unflatten
from umm_jax.train.step import make_step
from umm_jax.train.watchdog import Watchdog

# What a run may change when it is continued: how long, how often, where; not what a step computes. (A longer
# run has a longer schedule: its rate goes on from where the new one stands at this step.)
CHANGEABLE = (
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.keep",
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
) -> dict[str, Any]:
    """Trains `run` in `workdir`, from its newest checkpoint if there is one.

    Args:
        on_eval: called as on_eval(step, params) every train.eval_every steps; what it returns goes into
            metrics.jsonl. It must not keep `params`: the next step gives them up.
        family: that of run.family unless given; of another only ``config`` and ``model`` are needed when a
            `loader` is given.
        loader: iterator of numpy batches with get_state() and set_state(), the run's data unless given.
            Where it has stats(), those are logged; where it has close(), it is closed.

    Returns:
        {"step", "seconds", "compile_seconds", "parameters"} of this call.

    Raises:
        UserError: of the kind that says what is wrong. ``Interrupted`` after Ctrl-C or SIGTERM, with
            everything saved. ``BusyError``: another job is training in `workdir`.
    """
    workdir = _local(workdir, "--workdir")
    with _alone(workdir) as lock:
        return _train(run, workdir, on_eval, family or families.get(run.family), loader, lock)


def _train(run: RunConfig, workdir: Path, on_eval, family: Family, loader: Any, lock: Lock | None):
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
        loader = _make_loader(run, workdir, family, model_config)

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
    checkpoints = Checkpoints(workdir / "checkpoints", keep=run.train.keep)
    if checkpoints.latest() is not None:
        state, position = checkpoints.restore(plan.abstract, identity)
        loader.set_state(position)
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
    batch = sharding.put_batch(next(loader), mesh)
    now = time.perf_counter()
    with attention.noted(mesh.devices.flat[0].platform) as ways:
        compiled = step_function.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - now
    for line in ways:
        _say(f"attention {line}")
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
    meter, clock, progress = Meter(), Clock(), Progress(first, run.train.steps)
    logged = step

    watchdog = Watchdog(
        run.train.hang_minutes and 60 * run.train.hang_minutes, workdir, str(jax.process_index())
    )

    def save():
        nonlocal saved
        if lock is not None:
            lock.check()
        meter.check()  # A state after a NaN must never push out a good one.
        checkpoints.save(step, state, loader.get_state(), identity)
        saved = step

    try:
        with _stop_signals() as stopping:
            while True:
                state, metrics = compiled(state, batch)
                step += 1
                meter.add(step, metrics)
                watchdog.alive(f"step {max(step - meter.ahead, 1)}")
                meter.wait()
                last = step == run.train.steps
                log_now = last or step % run.train.log_every == 0
                stop = _agreed(stopping, log_now)

                if log_now:
                    line = meter.read()
                    line |= clock.read(step - logged)
                    seconds = line["seconds_per_step"] * (step - logged)
                    line |= {f"{axis}_per_second": line[axis] / seconds for axis in batch}
                    if hasattr(loader, "stats"):
                        line |= {f"data/{name}": value for name, value in loader.stats().items()}
                    log.write(step, "train", line)
                    progress.log(step, line)
                    logged = step
                if last or stop or step % run.train.save_every == 0:
                    with clock.aside(), watchdog.paused():
                        save()
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
                progress.step(step)
                if last or stop:
                    break
                watchdog.alive(f"the data of step {step + 1}")
                with clock.input():
                    batch = sharding.put_batch(next(loader), mesh)
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
        progress.close()
        log.close()
        if hasattr(loader, "close"):
            loader.close()
    if stop and not last:
        raise Interrupted(f"stopped at step {step}, saved in {workdir}; run the same command again to go on")
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


def _claim(workdir: Path, run: RunConfig) -> None:
    """Writes config.json: the folder is this run's from now on."""
    if jax.process_index() == 0:
        path = workdir / "config.json"
        configs.save(run, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def _make_loader(run: RunConfig, workdir: Path, family: Family, model_config: ModelConfig) -> Any:
    """The run's loader; the tokenizer is copied beside the run, which owns it from then on."""
    from umm_jax.data.files import write_atomic
    from umm_jax.data.pipeline import make_loader, plan
    from umm_jax.data.tokenizer import Tokenizer

    source, kept = Path(run.data.tokenizer), workdir / "tokenizer.model"
    if not kept.exists():
        if not source.is_file():
            raise ConfigError(f"data.tokenizer={run.data.tokenizer!r}: no such file")
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, source.read_bytes())
    elif source.is_file() and source.read_bytes() != kept.read_bytes():
        raise ConfigError(f"{source} is not the tokenizer this run began with ({kept})")
    tokenizer = Tokenizer.load(kept if kept.exists() else source)
    serializer = family.stream.Serializer(model_config, tokenizer)
    loader = make_loader(
        run.data, serializer, process_index=jax.process_index(), process_count=jax.process_count()
    )
    _say(f"data      {len(run.data.sources)} sources, {tokenizer.size} pieces")
    _say(f"input     {plan(run.data, serializer.spec, jax.process_count())}")
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
def _stop_signals() -> Iterator[threading.Event]:
    """An event set by Ctrl-C or SIGTERM; a second signal acts as usual. Only the main thread can listen."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore():
        for number in numbers:
            signal.signal(number, before[number])

    def listen(number, frame):
        event.set()
        restore()
        _say("\nstopping after this step and saving; once more to stop at once")

    for number in numbers:
        signal.signal(number, listen)
    try:
        yield event
    finally:
        restore()


def _agreed(event: threading.Event, now: bool) -> bool:
    """Whether to stop. Several processes must stop at the same step: they ask each other when they log."""
    if jax.process_count() == 1:
        return event.is_set()
    return now and bool(multihost_utils.process_allgather(np.array(event.is_set())).any())


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
