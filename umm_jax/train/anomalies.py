"""Steps that went wrong: noticed, kept for replay, and dealt with as train.anomaly says.

A step is wrong where its loss or gradient norm is not finite, or, with train.spike, where its loss lies far
above those before it. What is done then:

    stop      the run ends; the newest checkpoint is from before
    skip      the step does not change the state (the compiled step sees to it), and the run goes on
    rollback  the newest checkpoint is read again, and the data goes on after the batch that was wrong

The batch is written to anomalies/step-N-PROCESS.npz in the run's folder; ``umm replay`` says which of its
rows and which part of the loss it was.
"""

import io
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax import families, sharding
from umm_jax.config import MeshConfig
from umm_jax.errors import CheckpointError, StorageError, UserError
from umm_jax.train.checkpoint import Checkpoints, load_params
from umm_jax.train.optimizer import flatten, unflatten
from umm_jax.train.state import abstract_params

FOLDER = "anomalies"
WINDOW, FEWEST = 128, 32  # steps that a spike is told from: at most, at least
DUMPS = 20  # batches kept of one run
PATIENCE = 25  # wrong steps one after another, or rollbacks to one checkpoint, that end the run all the same


class Watch:
    """Judges the steps of a run, each once and in order.

    Args:
        policy, spike: train.anomaly and train.spike.
        lag: how many steps the host runs ahead. What a step is held against was known when it began, however
            often the run logs: a resumed run decides as the uninterrupted one.
        losses: of earlier steps, from :meth:`history`.
    """

    def __init__(self, policy: str, spike: float | None, lag: int, losses: Iterable[tuple[int, float]] = ()):
        self.policy, self.spike, self.lag = policy, spike, lag
        self._losses = [(int(step), float(loss)) for step, loss in losses]
        self._row = 0  # wrong steps one after another

    def history(self) -> list[tuple[int, float]]:
        """What a resumed run must know, JSON-able."""
        return list(self._losses)

    def forget(self, step: int) -> None:
        """The steps after `step` will be done again."""
        self._losses = [known for known in self._losses if known[0] <= step]

    def limit(self, step: int) -> float:
        """The loss above which `step` is a spike; infinite without train.spike or with too little known."""
        if self.spike is None:
            return math.inf
        known = [loss for at, loss in self._losses if at < step - self.lag][-WINDOW:]
        if len(known) < FEWEST:
            return math.inf
        middle = statistics.median(known)
        # 1.4826 times the median deviation is the standard deviation of normal noise, and one spike in the
        # window does not move it. A flat curve must not make a spike of every ripple.
        deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in known)
        return middle + self.spike * max(deviation, 1e-3 * abs(middle))

    def judge(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why `step` is wrong, or None.

        Raises:
            UserError: too many wrong steps one after another.
        """
        why = None
        limit = self.limit(step)
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if why is None and not math.isfinite(value):
                why = f"{name} is {value} at step {step}"
        if why is None and loss > limit:
            why = (
                f"loss {loss:.4g} at step {step} is above {limit:.4g}, what train.spike={self.spike:g} allows"
            )
        if why is None:
            self._row = 0
            self._losses = [*self._losses, (step, loss)][-(WINDOW + self.lag + 1) :]
        else:
            self._row += 1
            if self._row >= PATIENCE:
                raise UserError(f"{why}, and {PATIENCE - 1} steps before it were wrong: training stopped")
        return why


def write(workdir: Path, step: int, batch: Any, about: Mapping[str, Any]) -> Path | None:
    """Keeps this process's rows of a batch and what is known of its step.

    None where DUMPS are kept already, or the disk refuses, which is said.

    Args:
        batch: nested dict of numpy arrays.
    """
    from umm_jax.data.files import write_atomic

    folder = workdir / FOLDER
    if len(list(folder.glob("*.npz"))) >= DUMPS * jax.process_count():
        return None
    path = folder / f"step-{step}-{jax.process_index()}.npz"
    file = io.BytesIO()
    np.savez_compressed(file, about=json.dumps({"step": step, **about}), **flatten(batch))
    try:
        folder.mkdir(exist_ok=True)
        write_atomic(path, file.getvalue())
    except (OSError, StorageError) as error:
        print(f"ALARM     {path}: {error}; the batch of step {step} is not kept", file=sys.stderr, flush=True)
        return None
    return path


def read(path: Path) -> tuple[dict[str, Any], Any]:
    """(about, batch) of a file of :func:`write`."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(str(arrays.pop("about")))
    return about, unflatten(arrays)


def replay(workdir: str | Path, step: int) -> tuple[int, list[dict[str, Any]]]:
    """The parts of the loss for each row of the batch kept of `step`, with the newest parameters before it.

    Returns:
        (step of the checkpoint, [{"process", "row", PART: mean over the row's own weight, None where it has
        none}])

    Raises:
        CheckpointError: nothing was kept of that step, or no checkpoint is from before it.
    """
    workdir = Path(workdir)
    paths = sorted((workdir / FOLDER).glob(f"step-{step}-*.npz"))
    if not paths:
        kept = sorted({int(p.name.split("-")[1]) for p in (workdir / FOLDER).glob("step-*.npz")})
        raise CheckpointError(f"{workdir}: no batch was kept of step {step}; there are {kept}")
    before = [s for s in Checkpoints(workdir / "checkpoints", read_only=True).steps() if s < step]
    if not before:
        raise CheckpointError(f"{workdir}: no checkpoint is from before step {step}")
    run, model_config, params = load_params(workdir, step=before[-1])

    family = families.get(run.family)
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    graphdef, _, _ = abstract_params(lambda rngs: family.model.build(model_config, rngs), mesh)
    alone = run.train.objective == "autoencoder"
    cast = lambda p: p.astype(run.train.dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p  # noqa: E731

    @jax.jit
    def parts(params, rows):
        model = nnx.merge(graphdef, nnx.State(jax.tree.map(cast, params)))
        key = jax.random.fold_in(jax.random.key(run.train.seed), step - 1)
        weights = (model.autoencoder_weights if alone else model.loss_weights)(rows)
        sums, _ = (model.autoencoder_sums if alone else model.loss_sums)(rows, key)
        return sums, weights

    found = []
    for path in paths:
        about, batch = read(path)
        for row in range(len(jax.tree.leaves(batch)[0])):
            sums, weights = jax.device_get(parts(params, jax.tree.map(lambda x: x[row : row + 1], batch)))  # noqa: B023
            means = {name: float(sums[name]) / float(w) if w > 0 else None for name, w in weights.items()}
            found.append({"process": about["process"], "row": row, **means})
    return before[-1], found
