"""Many models on many benchmarks: cells, each a model, a benchmark and a way of replying; one table.

    # plan.py
    from umm_jax.evaluate.sweep import chain, over, product, zipped

    def get_sweep():
        models = zipped(over("run", ["runs/a", "runs/b"]), over("name", ["A", "B"]))
        skills = over("task", ["world-edit", "world-vqa"])
        return product(models, skills, over("reply", [{"temperature": 0.0}, {"temperature": 0.7}]))

`umm sweep plan.py` runs the cells one after another, `umm launch ... --sweep=plan.py` each on a machine. A
cell that fails is told in the table and stops no other. What is finished is not done again; a sweep may be
killed and started anew at any time.
"""

import hashlib
import importlib.util
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umm_jax import config as configs
from umm_jax.data.files import write_atomic
from umm_jax.errors import ConfigError, UserError
from umm_jax.evaluate import benchmark, samples, scoring, table, tasks
from umm_jax.evaluate.store import PLAN, Folder, hash_of
from umm_jax.evaluate.world_expert import attended
from umm_jax.generate import Identity, Loaded, identify, load_run
from umm_jax.world.scene import WorldConfig

Cells = list[dict[str, Any]]
_MERGED = ("settings", "reply", "config")
FAILED = "failed.json"


# --- what a plan is written with ----------------------------------------------------------------------


def over(key: str, values: Sequence[Any]) -> Cells:
    """One cell for each value of one key."""
    return [{key: value} for value in values]


def product(*parts: Cells) -> Cells:
    """Every way of taking one cell of each part, put together."""
    return [_together(cells) for cells in itertools.product(*parts)]


def zipped(*parts: Cells) -> Cells:
    """First with first, second with second. Raises ConfigError where the parts differ in length."""
    if len({len(part) for part in parts}) > 1:
        raise ConfigError(
            f"zipped parts are of {', '.join(str(len(p)) for p in parts)} cells: not as many each"
        )
    return [_together(cells) for cells in zip(*parts)]


def chain(*parts: Cells) -> Cells:
    """One part after another."""
    return list(itertools.chain(*parts))


def _together(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for cell in cells:
        for key, value in cell.items():
            if key in _MERGED and isinstance(value, Mapping):
                clash = made.get(key, {}).keys() & value.keys()
                made[key] = {**made.get(key, {}), **value}
            else:
                clash = {key} if key in made else set()
                made[key] = value
            if clash:
                raise ConfigError(f"a sweep sets {key} {sorted(clash)} in two parts that are put together")
    return made


# --- cells --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One model on one benchmark.

    Attributes:
        run, step, weights: the model; the newest checkpoint, and the weights it is judged by, unless given.
        config: values of its config that differ, as {"reply.max_tokens": 32}; of `model` only what no
            parameter depends on.
        task, settings, data_root, limit, seed, reply: see ``benchmark.Job``.
        batch_size: docs asked together; that of the run's config unless given.
        name: of the model, in the table's head.
    """

    run: str
    task: str
    step: int | None = None
    weights: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    data_root: str | None = None
    reply: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    seed: int = 0
    batch_size: int | None = None
    name: str = ""

    @property
    def overrides(self) -> tuple[str, ...]:
        return tuple(f"--config.{key}={json.dumps(value)}" for key, value in self.config.items())

    @property
    def label(self) -> str:
        """The column it stands in."""
        if self.name:
            return self.name
        said = [Path(self.run).name]
        said += [] if self.step is None else [f"step {self.step}"]
        said += [] if self.weights is None else [self.weights]
        said += [f"{k}={v}" for k, v in (*self.reply.items(), *self.config.items())]
        return ", ".join(said) + (f", seed {self.seed}" if self.seed else "")

    @property
    def place(self) -> tuple[str, str]:
        """Column and row of the table. Raises ConfigError for an unknown task or setting."""
        task = tasks.get(self.task)
        return self.label, table.row_of(task, scoring.settings_of(task, self.settings))

    @property
    def folder(self) -> str:
        """Its folder's name: readable, and of no other cell."""
        told = configs.to_dict(self) | {"run": os.path.normpath(self.run), "name": "", "batch_size": None}
        told = json.dumps(told, sort_keys=True)
        return f"{self.task}-{Path(self.run).name}-{hashlib.sha256(told.encode()).hexdigest()[:10]}"

    @property
    def job(self) -> benchmark.Job:
        return benchmark.Job(self.task, self.settings, self.data_root, self.reply, self.limit, self.seed)


def read(path: str | Path) -> list[Cell]:
    """The cells of a plan.

    Raises:
        ConfigError: no such file, no get_sweep(), a cell with an unknown or missing key, or one that is there
            twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such plan of a sweep")
    spec = importlib.util.spec_from_file_location("umm_sweep", path)
    if spec is None:
        raise ConfigError(f"{path}: a plan of a sweep ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = module.get_sweep() if hasattr(module, "get_sweep") else None
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's own file does
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(made, list) or not all(isinstance(cell, Mapping) for cell in made):
        raise ConfigError(f"{path}: needs a get_sweep() that gives a list of mappings, one a cell")
    cells = [configs.from_dict(Cell, cell, f"cell {i}") for i, cell in enumerate(made)]
    if not cells:
        raise ConfigError(f"{path}: get_sweep() gives no cell")
    folders = [cell.folder for cell in cells]
    if twice := next((c for c in cells if folders.count(c.folder) > 1), None):
        raise ConfigError(f"{path}: the same cell is there twice: {twice.task} of {twice.label}")
    places = [cell.place for cell in cells]
    if twice := next((c for c in cells if places.count(c.place) > 1), None):
        raise ConfigError(
            f"{path}: two cells would stand in one place of the table, {twice.place[1]} of {twice.label}; "
            "give them different names"
        )
    return cells


# --- running ------------------------------------------------------------------------------------------


@dataclass
class State:
    """Where a cell stands: its plan, and how many of its docs are answered."""

    cell: Cell
    identity: Identity
    planned: benchmark.Planned
    answered: int
    scored: bool

    @property
    def done(self) -> bool:
        return self.scored and self.answered == len(self.planned.docs)


def look(cell: Cell, out: Path) -> State:
    """What a cell asks, and what is there; writes nothing. Raises UserError."""
    identity = identify(cell.run, cell.step, cell.weights, cell.overrides)
    run = identity.run
    planned = benchmark.plan(cell.job, identity.to_dict(), WorldConfig.of(run), run.reply)
    folder = Folder(out / cell.folder)
    answered, scored = 0, False
    if (folder.path / PLAN).exists() and folder.requests() == dict(planned.requests):
        lines = folder.lines()
        answered, scored = len(lines), _is_of(folder.score(), planned, folder, hash_of(lines))
    return State(cell, identity, planned, answered, scored)


def _is_of(
    figures: Mapping[str, Any] | None, planned: benchmark.Planned, folder: Folder, responses_hash: str
) -> bool:
    """Whether figures are of these requests, settings and responses, and marked as they would be now."""
    if figures is None:
        return False
    wanted = {
        "version": planned.task.version,
        "settings": json.loads(json.dumps(configs.to_dict(planned.settings))),
        "dataset_hash": planned.dataset_hash,
        "requests_hash": folder.plan()["requests_hash"],
        "responses_hash": responses_hash,
    }
    return all(figures.get(key) == value for key, value in wanted.items())


def dry_run(cells: Sequence[Cell], out: Path) -> Iterator[str]:
    """A line for each cell: what would be run, and what is there."""
    left = 0
    for i, cell in enumerate(cells):
        try:
            state = look(cell, out)
        except UserError as error:
            yield f"{i:4} {cell.task:20} {cell.label}: cannot be run: {error}"
            continue
        docs = len(state.planned.docs)
        left += docs - state.answered
        what = "cached" if state.done else f"{docs - state.answered} of {docs} docs to ask"
        yield f"{i:4} {cell.task:20} {cell.label}: {what}"
    yield f"{len(cells)} cells, {left} docs to ask; results go to {out}"


def run(
    cells: Sequence[Cell], out: Path, *, say: Callable[[str], Any] = print
) -> tuple[int, benchmark.Spent]:
    """Runs cells one after another, those of one model together; (how many failed, what it cost).

    Each failure is kept in the cell's folder, and the next cell is begun.
    """
    models, spent, failed = _Models(), benchmark.Spent(), 0
    # Loading is what a change of model costs.
    for cell in sorted(cells, key=lambda c: (c.run, str(c.step), str(c.weights), c.overrides)):
        folder = out / cell.folder
        try:
            state = look(cell, out)
            if state.done:
                say(f"{cell.task} of {cell.label}: done already")
            else:
                model = state.identity.to_dict()
                size = cell.batch_size or state.identity.run.eval.batch_size
                benchmark.write_plan(folder, state.planned, model, size)
                cost = benchmark.run(folder, state.planned, models.loader(state))
                figures = benchmark.score(folder)
                head = figures["metrics"][figures["headline"]]["value"]
                shown = "-" if head is None else f"{head:.4g}"
                say(f"{cell.task} of {cell.label}: {figures['headline']} {shown}")
                for name in ("docs", "seconds", "in_model"):
                    setattr(spent, name, getattr(spent, name) + getattr(cost, name))
            (folder / FAILED).unlink(missing_ok=True)
        except Exception as error:
            # A bug in one benchmark must not cost the others either; its traceback is shown, and kept.
            failed += 1
            told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            say(f"{cell.task} of {cell.label}: failed: {told}")
            trace = "" if isinstance(error, UserError) else traceback.format_exc()
            sys.stderr.write(trace)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / FAILED, json.dumps({"failed": told, "traceback": trace}, indent=1) + "\n")
    return failed, spent


class _Models:
    """The model loaded last."""

    def __init__(self):
        self._key, self._model = None, None

    def loader(self, state: State) -> Callable[[], Loaded]:
        def load() -> Loaded:
            cell, identity = state.cell, state.identity
            if self._key != identity.fingerprint:
                self._model = None  # given up before the next is loaded
                loaded = load_run(cell.run, identity.step, identity.weights, cell.overrides)
                self._key, self._model = identity.fingerprint, attended(loaded)
            return self._model

        return load


# --- the table ----------------------------------------------------------------------------------------


def gathered(cells: Sequence[Cell], out: Path) -> table.Table:
    """The cells that are finished, and of the others what became of them."""
    columns: dict[str, dict[str, Any]] = {}
    for cell in cells:
        folder = Folder(out / cell.folder)
        label, row = cell.place
        found: Mapping[str, Any] | None = None
        if (folder.path / FAILED).exists():
            found = {"failed": f"failed: {json.loads((folder.path / FAILED).read_text())['failed']}"}
        columns.setdefault(label, {})[row] = found or folder.score() or {"failed": "not run yet"}
    return table.build([table.Column(name, scores) for name, scores in columns.items()])


def write_tables(cells: Sequence[Cell], out: Path, title: str) -> list[Path]:
    """table.md, table.csv, and table.html with samples of each cell. Raises StorageError."""
    made = gathered(cells, out)
    texts = {"md": table.markdown(made), "csv": table.comma_separated(made)}
    shown = [
        samples.section(out / cell.folder, f"{cell.place[1]}: {cell.label}")
        for cell in cells
        if not (out / cell.folder / FAILED).exists()
    ]
    texts["html"] = table.page(made, title, "".join(shown))
    paths = []
    for kind, text in texts.items():
        paths.append(out / f"table.{kind}")
        write_atomic(paths[-1], text)
    return paths
