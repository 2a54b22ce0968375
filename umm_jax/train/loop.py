"""The life of a training run, from top to bottom in one function; its steps are ``running.py``."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from umm_jax import config as configs
from umm_jax import families, sharding
from umm_jax.config import RunConfig
from umm_jax.errors import ConfigError, Interrupted, Preempted
from umm_jax.families import Family
from umm_jax.families.contract import ModelConfig
from umm_jax.models import attention
from umm_jax.train import state as states
from umm_jax.train.checkpoint import Checkpoints, plain_config
from umm_jax.train.lock import Lock, held
from umm_jax.train.metrics import read_metrics
from umm_jax.train.optimizer import flatten, unflatten
from umm_jax.train.running import Running, best_by, limit, say
from umm_jax.train.step import make_step

TOKENIZER = "tokenizer.model"

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
    say(f"devices   {mesh.size} of {jax.device_count()} ({jax.default_backend()}), mesh {axes}")

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
    say(f"model     {run.family}, {parameters:,} parameters; state {report.summary()}")
    for placement in report.large_replicated if mesh.shape["fsdp"] > 1 else ():
        say(f"          whole on every device: {placement.path} {list(placement.shape)}")
    for line in plan.optimizer.describe(plan.abstract["params"]):
        say(f"optimizer {line}")

    identity = plain_config(run, model_config)
    checkpoints = Checkpoints(workdir / "checkpoints", **_retention(run, workdir))
    losses = ()
    if checkpoints.latest() is not None:
        state, position = checkpoints.restore(plan.abstract, identity)
        loader.set_state(position)
        losses = checkpoints.notes().get("losses", ())
        say(f"state     restored from step {checkpoints.latest()}")
    elif run.train.init_from:
        state = _init_from(plan, run)
    else:
        state = states.init(plan, run)
    first = int(state["step"])
    if first >= run.train.steps:
        say(f"done      the run already has its {run.train.steps} steps")
        checkpoints.close()
        return {"step": first, "seconds": 0.0, "compile_seconds": 0.0, "parameters": parameters}

    # ┌──────────────────────────────────────────────────────────────────────────┐
    # │  Compile                                                                 │
    # └──────────────────────────────────────────────────────────────────────────┘
    rows = next(loader)
    batch = sharding.put_batch(rows, mesh)
    now = time.perf_counter()
    with attention.noted(mesh.devices.flat[0].platform) as ways:
        compiled = step_function.lower(state, batch, *limit(run, math.inf)).compile()
    compile_seconds = time.perf_counter() - now
    for line in ways:
        say(f"attention {line}")
    best = ideal(run, mesh.size) if ideal else None
    say(f"compiled  in {compile_seconds:.1f} s; steps {first} to {run.train.steps}")
    # Only now: what failed before this may be mended and begun again in the same folder.
    _claim(workdir, run)

    # ┌──────────────────────────────────────────────────────────────────────────┐
    # │  Steps, until all are done or somebody says stop                         │
    # └──────────────────────────────────────────────────────────────────────────┘
    facts = {"devices": mesh.size, "backend": jax.default_backend(), "parameters": parameters}
    facts |= {"bytes_per_device": report.bytes_per_device, "compile_seconds": compile_seconds}
    going = Running(
        run,
        workdir,
        plan=plan,
        compiled=compiled,
        loader=loader,
        checkpoints=checkpoints,
        identity=identity,
        state=state,
        rows=rows,
        losses=losses,
        lock=lock,
        started=started,
        facts=facts,
        best=best,
    )
    del state, batch  # each step gives up the ones before
    stop = going.go(on_eval)
    if stop:
        kind = Preempted if stop == signal.SIGTERM else Interrupted
        raise kind(f"stopped at step {going.step}, saved in {workdir}; run the same command again to go on")
    seconds = time.perf_counter() - started
    say(f"done      {going.step} steps, {seconds:.0f} s, checkpoint of step {going.saved} in {workdir}")
    return {
        "step": going.step,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "parameters": parameters,
    }


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


def _retention(run: RunConfig, workdir: Path) -> dict[str, Any]:
    """Which checkpoints stay: arguments of ``Checkpoints``."""
    best = None
    if run.train.keep_best:
        sign, name = (-1.0 if run.train.keep_best.startswith("-") else 1.0), best_by(run)

        def score(step: int) -> float | None:
            path = workdir / "metrics.jsonl"
            lines = read_metrics(path) if path.exists() else []
            found = [line[name] for line in lines if line["step"] == step and name in line]
            return sign * found[-1] if found else None

        best = score, int(run.train.keep_best.split()[1])
    return {"keep": run.train.keep, "every": run.train.keep_every, "best": best}


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
    say(f"data      {len(run.data.sources)} sources, {tokenizer.size} pieces")
    say(f"input     {plan(run.data, serializer.spec, count)}")
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
    say(f"state     {len(found)} of {len(fresh)} parameter arrays from {source}, the others from the seed")
    return states.with_params(plan, run, unflatten({**fresh, **found}))
