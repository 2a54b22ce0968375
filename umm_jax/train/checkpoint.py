"""Checkpoints of a run: the whole train state, the position in the data, and the config they belong to.

    checkpoints/
        400/
            state/      step, params, opt, ema (Orbax, one entry for each array)
            iterator/   the loader's state of every process, JSON
            config/     the run's config, JSON
        600/ ...

Saving is asynchronous: the arrays are copied to the host, training goes on, and the folder gets its name when
everything in it is on disk. A run that dies while saving leaves a folder with another name, which the next
writer removes. Restoring is always to shapes that carry *our* sharding, so the mesh may have changed.
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from umm_jax import config as configs
from umm_jax import families, sharding
from umm_jax.errors import CheckpointError, ConfigError, StorageError
from umm_jax.families.contract import ModelConfig
from umm_jax.train.optimizer import Tree, flatten, unflatten
from umm_jax.train.state import TrainState, abstract_params
from umm_jax.versions import versions

# How a disk says no, in errno and in the words of the storage library.
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
# As disks say that are mounted from elsewhere.
_REFUSALS |= {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}
_WORDS = (
    "No space left",
    "File too large",
    "quota exceeded",
    "Read-only file system",
    "Permission denied",
    "Error writing",  # what follows from one of the above in another array
)


class Checkpoints:
    """The checkpoints in `directory`.

    Args:
        keep: how many recent ones stay; older ones are removed once a newer one is complete.
        every: those of steps that it divides stay for good (0: none).
        best: (score, number): so many of largest score stay; score(step) is None where it is not known.
        read_only: for everyone but the training run: nothing is created, removed or tidied.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        every: int = 0,
        best: tuple[Callable[[int], float | None], int] | None = None,
        read_only: bool = False,
    ):
        self.directory = Path(directory).absolute()
        self.read_only = read_only
        self._stay = _Stay(keep, every, best)
        self._open()

    def _open(self) -> None:
        read_only = self.read_only
        self._manager = None
        if read_only and not self.directory.is_dir():
            return
        quiet_orbax()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else self._stay,
            read_only=read_only,
        )
        try:
            if not read_only and jax.process_index() == 0:
                # What a killed run left half-written; nobody else writes before this process is here too.
                # Errors are left to the save that would meet them: lock files in there vanish by themselves.
                for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(path, ignore_errors=True)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(),
                    "iterator": ocp.JsonCheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            raise storage_error(error, self.directory) from error

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def reopen(self) -> None:
        """Forgets a save that failed: what is complete is looked up again, what is not is removed."""
        with suppress(Exception):
            self._manager.close()
        self._open()

    # --- writing --------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: TrainState,
        iterator: Any,
        config: Mapping[str, Any],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts saving `state`, which may be given up afterwards; waits for the save before it.

        Args:
            iterator: this process's position in the data, JSON-able.
            config: plain form of the run's config; restoring compares its "family" and "model".
            notes: what else a resumed run must know, JSON-able and the same on every process. The versions of
                the code are put beside it.

        Raises:
            StorageError: not enough room, or an earlier save in the background failed.
        """
        self.wait()
        self._check_room(state)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            iterator=ocp.args.JsonSave(
                {"processes": _of_all_processes(iterator), "notes": dict(notes or {}), "code": versions()}
            ),
            config=ocp.args.JsonSave(dict(config)),
        )
        try:
            self._manager.save(step, args=items, force=True)
        except (OSError, ValueError) as error:
            raise storage_error(error, self.directory) from error

    def wait(self) -> None:
        """Returns when the last save is complete. Raises StorageError when it failed."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise storage_error(error, self.directory) from error

    def close(self) -> None:
        """Completes the last save and lets go of the folder."""
        self.wait()
        if self._manager is not None:
            self._manager.close()

    def _check_room(self, state: TrainState) -> None:
        # A full disk is found before anything is written where the file system can be asked.
        need = int(1.05 * sum(a.nbytes for a in jax.tree.leaves(state))) + (1 << 20)
        free = shutil.disk_usage(self.directory).free if self.directory.is_dir() else need
        # All processes save, or none: the others would wait for the one that does not.
        short = free < need
        if jax.process_count() > 1:
            short = bool(multihost_utils.process_allgather(np.bool_(short)).any())
        if short:
            raise StorageError(
                f"{self.directory}: a checkpoint needs {need / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; "
                f"{self._remaining()}"
            )

    def _remaining(self) -> str:
        steps = self.steps()
        if not steps:
            return "no earlier checkpoint; make room and start again"
        return f"the checkpoint of step {steps[-1]} is intact; make room and run the same command again"

    # --- reading --------------------------------------------------------------------------------

    def restore(
        self, abstract: TrainState, config: Mapping[str, Any] | None = None, step: int | None = None
    ) -> tuple[TrainState, Any]:
        """(state, this process's iterator state) of `step`, the newest unless given.

        Args:
            abstract: ShapeDtypeStructs with shardings, ``Plan.abstract``.
            config: compared with the saved one before anything is read, unless None.

        Raises:
            CheckpointError: no checkpoint, another model's, or another optimizer's.
        """
        step = self.choose(step, config)
        saved = self._manager.restore(step, args=ocp.args.Composite(iterator=ocp.args.JsonRestore()))
        processes = saved.iterator["processes"]
        if len(processes) != jax.process_count():
            raise CheckpointError(
                f"{self.directory}: step {step} was saved by {len(processes)} processes, whose positions in "
                f"the data do not divide over {jax.process_count()}; use as many, or start another run "
                "with train.init_from"
            )
        return self._read(step, abstract, partial=False), processes[jax.process_index()]

    def notes(self, step: int | None = None) -> Mapping[str, Any]:
        """The `notes` given to :meth:`save`."""
        args = ocp.args.Composite(iterator=ocp.args.JsonRestore())
        return self._manager.restore(self.choose(step), args=args).iterator.get("notes", {})

    def restore_params(
        self,
        abstract: Tree,
        config: Mapping[str, Any] | None = None,
        step: int | None = None,
        weights: str = "raw",
    ) -> Tree:
        """Parameters only. ``weights="ema"`` lays the averaged ones over those that were trained.

        Raises:
            CheckpointError: no checkpoint, another model's, or no averaged weights in it.
        """
        step = self.choose(step, config)
        if weights == "raw":
            return self._read(step, {"params": abstract}, partial=True)["params"]
        saved, wanted = self.saved_shapes(step, "ema"), flatten(abstract)
        if not saved:
            raise CheckpointError(
                f"{self.directory}: step {step} keeps no averaged weights (train.ema was not set); "
                "ask for weights='raw'"
            )
        average = {path: leaf for path, leaf in wanted.items() if path in saved}
        rest = {path: leaf for path, leaf in wanted.items() if path not in saved}
        target = {"ema": unflatten(average), "params": unflatten(rest)}
        state = self._read(step, {k: v for k, v in target.items() if v}, partial=True)
        return unflatten({**flatten(state.get("params", {})), **flatten(state["ema"])})

    def restore_matching(self, abstract: Tree, step: int | None = None) -> dict[str, jax.Array]:
        """{path: array} of the saved parameters that `abstract` has too, for starting one run from another.

        Raises:
            CheckpointError: no checkpoint, no parameter in common, or one of another shape.
        """
        step = self.choose(step, None)
        saved, wanted = self.saved_shapes(step, "params"), flatten(abstract)
        common = {path: leaf for path, leaf in wanted.items() if path in saved}
        if not common:
            raise CheckpointError(f"{self.directory}: step {step} has no parameter of this model")
        for path, leaf in common.items():
            if saved[path] != leaf.shape:
                raise CheckpointError(
                    f"{self.directory}: {path} is {list(saved[path])} there and {list(leaf.shape)} here"
                )
        return flatten(self._read(step, {"params": unflatten(common)}, partial=True)["params"])

    def choose(self, step: int | None, config: Mapping[str, Any] | None = None) -> int:
        """`step`, or the newest. Raises CheckpointError: none such, or of another model than `config`'s."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory}: no complete checkpoint; train first, or check the path")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; there are {steps}")
        if config is not None:
            parts = ("family", "model")
            # Through JSON, as the saved one went: tuples are lists there.
            here = json.loads(json.dumps({k: config[k] for k in parts}))
            saved = _with_defaults(self._config(step))
            found = configs.differences({k: saved[k] for k in parts}, here)
            if found:
                raise CheckpointError(
                    f"{self.directory}: step {step} is of another model (saved != asked): {'; '.join(found)}"
                )
        return step

    def config(self, step: int | None = None) -> Mapping[str, Any]:
        """The config saved with `step`, the newest unless given: see :func:`plain_config`.

        Raises:
            CheckpointError: no checkpoint.
        """
        return self._config(self.choose(step, None))

    def _config(self, step: int) -> Mapping[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config

    def _read(self, step: int, target: Tree, partial: bool) -> Tree:
        args = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=partial,
        )
        try:
            state = self._manager.restore(step, args=ocp.args.Composite(state=args)).state
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.directory}: step {step} does not fit this model and optimizer ({_first_line(error)})"
            ) from error
        absent = [path for path, leaf in flatten(state).items() if isinstance(leaf, jax.ShapeDtypeStruct)]
        if absent:
            raise CheckpointError(f"{self.directory}: step {step} has no {', '.join(absent[:3])}")
        return state

    def saved_shapes(self, step: int, section: str) -> dict[str, tuple[int, ...]]:
        """{path: shape} of "params" or "ema" in the checkpoint of `step`."""
        tree = self._manager.item_metadata(step).state.tree
        return {path: tuple(leaf.shape) for path, leaf in flatten(tree.get(section) or {}).items()}


class _Stay(preservation_policy.PreservationPolicy):
    """Which complete checkpoints stay when another one is."""

    def __init__(self, recent: int, every: int, best: tuple[Callable[[int], float | None], int] | None):
        self.recent, self.every, self.best = recent, every, best

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [info.step for info in checkpoints]
        stay = set(sorted(steps)[-self.recent :])
        if self.every:
            stay |= {step for step in steps if step % self.every == 0}
        if self.best is not None:
            score, number = self.best
            scores = {step: found for step in steps if (found := score(step)) is not None}
            stay |= set(sorted(scores, key=lambda step: (-scores[step], step))[:number])
        return [step in stay for step in steps]


def load_params(
    workdir: str | Path, *, mesh: Any = None, weights: str = "raw", step: int | None = None
) -> tuple[configs.RunConfig, ModelConfig, Tree]:
    """(run config, model config, parameters) of a run directory: all that replying and judging need.

    Args:
        mesh: where the parameters go; the first device alone unless given.
        weights: "raw" or "ema".

    Raises:
        ConfigError: not a run directory.
        CheckpointError: nothing saved yet.
    """
    run = configs.load(Path(workdir) / "config.json")
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    # The model is what was saved with it, complete: config.json leaves defaults out, and they may change.
    saved = checkpoints.config(step)
    family = families.get(saved["family"])
    model_config = configs.from_dict(family.config.ModelConfig, saved["model"], "config.model")
    mesh = mesh or sharding.make_mesh(configs.MeshConfig(1, 1, 1), jax.devices()[:1])
    _, _, abstract = abstract_params(lambda rngs: family.model.build(model_config, rngs), mesh)
    return run, model_config, checkpoints.restore_params(abstract, step=step, weights=weights)


def plain_config(run: configs.RunConfig, model_config: ModelConfig) -> dict[str, Any]:
    """The run's config as saved beside a checkpoint: defaults of the model section filled in."""
    return {**configs.to_dict(run), "model": configs.to_dict(model_config)}


def _with_defaults(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved config with the options its model has learnt to take since then, at their defaults."""
    try:
        model_config = families.get(saved["family"]).config.ModelConfig
        model = configs.to_dict(configs.from_dict(model_config, saved["model"], "config.model"))
    except ConfigError:
        # A family or option that is no more: what is saved is compared as it is, and named.
        return saved
    return {**saved, "model": json.loads(json.dumps(model))}


def _of_all_processes(value: Any) -> list[Any]:
    """The JSON-able `value` of each process, on every process."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def storage_error(error: Exception, directory: Path) -> Exception:
    """StorageError when `error` is the disk's refusal, else `error` itself."""
    refused = isinstance(error, OSError) and error.errno in _REFUSALS
    word = next((w for w in _WORDS if w.lower() in str(error).lower()), None)
    if not refused and word is None:
        return error
    # The manager forgets its steps after a failure; the folders are the truth.
    done = sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit()) if directory.is_dir() else []
    rest = f"the checkpoint of step {done[-1]} is intact" if done else "there is no earlier checkpoint"
    what = word or error.strerror
    return StorageError(
        f"{directory}: the checkpoint was not saved ({what}); {rest}; make room and start again"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def quiet_orbax() -> None:
    """Orbax logs what it also raises, with tracebacks, through the absl logger: one clear line is enough."""
    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)


def _not_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname.replace("\\", "/")
