"""``umm convert to-torch``: a checkpoint of ours becomes a folder for PyTorch.

    DIR/model-0000i-of-0000N.safetensors, model.safetensors.index.json    tensors in the release's names
    DIR/config.json        the model section, complete
    DIR/tokenizer.model    and what else of the tokenizer came with the weights
    DIR/README.md          what this is and how to load it
    DIR/parity.json        what was checked, and the sha256 of every tensor
    DIR/sha256sums         of every file

The folder appears when all of it is on the disk. Tensors go one by one: a parameter whose layers lie in one
chunk of the checkpoint is read in groups of layers within `memory`.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from umm_jax import __version__, families
from umm_jax import config as configs
from umm_jax.convert import card
from umm_jax.convert import layout as layouts
from umm_jax.convert.folder import new_folder, require_new, require_room, write_sums
from umm_jax.convert.from_torch import sha256_of_array
from umm_jax.convert.layout import Layout
from umm_jax.convert.shards import DTYPE_NAMES, DTYPES, Shards, Tensor
from umm_jax.convert.source import open_source
from umm_jax.errors import CheckpointError, ConfigError
from umm_jax.train.parts import PartReader
from umm_jax.weights.hub import Folder
from umm_jax.weights.table import TURNS, Rule, Table

TARGETS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def to_torch(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    weights: str = "raw",
    dtype: str = "keep",
    shard_size: int = 5_000_000_000,
    memory: int = 1_000_000_000,
    verified: str | Path | None = None,
    part: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the checkpoint `step` of the run folder `run` to the new folder `out`.

    Args:
        step: the newest unless given; weights: "raw" or "ema".
        dtype: "keep" (that of each tensor when it came from PyTorch, else that of the checkpoint) or one of
            TARGETS for all floating-point tensors.
        shard_size, memory: bytes of a shard, and of the layers read together.
        verified: a JSON file of ``umm convert verify --json``, to go into parity.json.
        part: one of the family's stock parts alone, as a folder that its stock class loads; "all" makes a
            folder of each below `out`. The whole model unless given.

    Raises:
        CheckpointError: no such checkpoint, one that does not fit its config, a value too large for `dtype`.
        ConfigError: `out` is there already, or the model has no released layout.
        StorageError: no room. Nothing is left behind then, nor in any other case.
    """
    run, out = Path(run), Path(out)
    require_new(out)
    export = Export(run, step, weights, dtype, shard_size, memory)
    if verified is not None and not Path(verified).is_file():
        raise ConfigError(f"--verified={verified}: no such file")
    parity = None if verified is None else layouts.read_json(Path(verified))
    if part is not None:
        _parts(export, out, part, parity, say)
        return
    table = export.kept_table(export.layout.table)
    release = families.get(export.layout.family).weights
    with new_folder(out) as folder:
        written = export.write_all(table, folder, release.FOLDER)
        if release.FOLDER is not None:
            for key, content in release.FOLDER.describe(export.layout.model).items():
                (folder / release.FOLDER.configs[key]).write_text(json.dumps(content, indent=1) + "\n")
        config = {
            "architectures": [release.ARCHITECTURE],
            "model_type": export.layout.family,
            "torch_dtype": _main_dtype(written),
            "family": export.layout.family,
            "model": configs.to_dict(export.layout.model),
            "umm_jax_version": __version__,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        tokenizers = export.write_tokenizer(folder)
        report = export.report(written, parity)
        (folder / "parity.json").write_text(json.dumps(report, indent=1) + "\n")
        (folder / "README.md").write_text(card.whole(config, report, tokenizers))
        write_sums(folder)
    say(f"{out}: {len(written)} tensors, {_gigabytes(written):.2f} GB; {_verdict(report)}")


def _parts(export: "Export", out: Path, part: str, parity: Any, say: Callable[[str], None]) -> None:
    """Writes one stock part into `out`, or all of them into folders of their names."""
    weights = families.get(export.layout.family).weights
    chosen = weights.PARTS if part == "all" else (part,)
    described = {name: weights.stock_part(name, export.layout.model) for name in chosen}
    for name, stock in described.items():
        if stock.whole:
            raise ConfigError(f"--part={part}: {name} cannot be written as a stock folder: {stock.whole}")
        stock.table.check(stock.subset(export.layout.ours))
        export.check(stock.table)
    with new_folder(out) as folder:
        for name, stock in described.items():
            at = folder / name if part == "all" else folder
            at.mkdir(exist_ok=True)
            written = export.write(stock.table, at, stock.stem)
            config = stock.config | ({"torch_dtype": _main_dtype(written)} if stock.stem == "model" else {})
            (at / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            if name == "llm":
                export.write_tokenizer(at)
            report = export.report(written, parity)
            (at / "parity.json").write_text(json.dumps(report, indent=1) + "\n")
            (at / "README.md").write_text(card.part(stock, report))
            write_sums(at)
            say(f"{out}: {name}: {len(written)} tensors, {_gigabytes(written):.2f} GB; {_verdict(report)}")


class Export:
    """One checkpoint on its way out.

    Attributes:
        layout: family, model config and table. reader: the checkpoint. manifest: {name: line} of what was
            written down when the weights came from PyTorch; empty where they did not. origin: the same by
            our part, as rules name it.
    """

    def __init__(self, run: Path, step: int | None, weights: str, dtype: str, shard_size: int, memory: int):
        if not (run / "config.json").is_file():
            raise CheckpointError(f"{run}: no run here (no config.json)")
        self.run, self.weights, self.dtype = run, weights, dtype
        self.shard_size, self.memory = shard_size, memory
        self.reader = PartReader(run / "checkpoints", step, weights)
        saved = self.reader.config
        cls = families.get(saved["family"]).config.ModelConfig
        model = configs.from_dict(cls, saved["model"], "config.model")
        self.layout = Layout(saved["family"], model)
        noted = layouts.read_json(run / layouts.MANIFEST) or {}
        self.manifest: dict[str, Any] = noted.get("tensors", {})
        self.origin: dict[str, Any] = {}
        if self.manifest:
            self.origin = {r.ours: self.manifest[r.theirs] for r in self.layout.table.rules}
        self._came_as: dict[str, Any] = {}
        path = run / layouts.CONSTANTS
        self.constants = open_source(path) if path.is_file() else None

    def kept_table(self, table: Table) -> Table:
        """`table` without constants that the original did not have either."""
        if not self.manifest:
            return table
        kept = tuple(c for c in table.constants if c.theirs in self.manifest)
        return Table(table.rules, kept, table.unused, table.fresh, table.aliases)

    def check(self, table: Table) -> None:
        """Raises CheckpointError where the checkpoint lacks a parameter of `table`, or has another shape."""
        arrays, ours = self.reader.arrays, self.layout.ours
        paths = {rule.path for rule in table.rules}
        wrong = [
            f"{path} is missing (expected {list(ours[path])})"
            if path not in arrays
            else f"{path} is {list(arrays[path][0])}, expected {list(ours[path])}"
            for path in sorted(paths)
            if path not in arrays or arrays[path][0] != ours[path]
        ]
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise CheckpointError(
                f"{self.run}: {len(wrong)} parameters do not fit its config: {'; '.join(wrong[:5])}{more}"
            )

    def write_all(self, table: Table, folder: Path, own_way: Folder | None) -> dict[str, dict[str, Any]]:
        """Writes the whole model, in the files of `own_way` where the release has such."""
        if own_way is None:
            return self.write(table, folder, "model")
        written, came_as = {}, {}
        for file, prefix in own_way.files.items():
            mine = lambda row, prefix=prefix: own_way.prefix(row.theirs) == prefix  # noqa: E731
            bare = lambda row, prefix=prefix: replace(row, theirs=row.theirs.removeprefix(prefix))  # noqa: E731
            part = Table(
                tuple(bare(r) for r in table.rules if mine(r)),
                tuple(bare(c) for c in table.constants if mine(c)),
            )
            found = self.write(part, folder, Path(file).stem, limit=1 << 62)
            written |= {prefix + name: line for name, line in found.items()}
            came_as |= {prefix + name: line for name, line in self._came_as.items()}
        self._came_as = came_as
        return written

    def write(
        self, table: Table, folder: Path, stem: str, limit: int | None = None
    ) -> dict[str, dict[str, Any]]:
        """Writes the tensors of `table` as shards; returns {name: {"dtype", "shape", "sha256"}}."""
        self.check(table)
        ours = self.layout.ours
        shapes = Table(table.rules).theirs(ours)
        tensors = {r.theirs: Tensor(shapes[r.theirs], self._target(r)) for r in table.rules}
        for constant in table.constants:
            array = self._constant(constant)
            tensors[constant.theirs] = Tensor(array.shape, array.dtype)
        require_room(folder, sum(t.nbytes for t in tensors.values()) + (16 << 20), "the export")
        self._came_as = {r.theirs: self.origin[r.ours] for r in table.rules if r.ours in self.origin}
        self._came_as |= {
            c.theirs: self.manifest[c.theirs] for c in table.constants if c.theirs in self.manifest
        }
        written = {}
        with (
            Shards(folder, stem, tensors, limit or self.shard_size) as shards,
            tqdm(total=len(tensors), desc="to-torch", unit=" tensors", disable=None) as bar,
        ):

            def put(name: str, array: np.ndarray) -> None:
                tensor = tensors[name]
                array = layouts.cast(array, tensor.dtype, name)
                shards.write(name, array)
                written[name] = {
                    "dtype": DTYPE_NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "sha256": sha256_of_array(array),
                }
                bar.update()

            for rule, part in self._parts(table.rules):
                put(rule.theirs, TURNS[rule.how].theirs(part))
            for constant in table.constants:
                put(constant.theirs, self._constant(constant))
        return {name: written[name] for name in tensors}

    def _parts(self, rules: tuple[Rule, ...]) -> Iterator[tuple[Rule, np.ndarray]]:
        """Each rule and its part of our parameter; parameter by parameter, few layers at a time."""
        by_path: dict[str, list[Rule]] = {}
        for rule in rules:
            by_path.setdefault(rule.path, []).append(rule)
        stacked = layouts.stacked(rules)
        for path, of_path in by_path.items():
            if path not in stacked:
                for rule in of_path:
                    yield rule, self.reader.read(path, rule.index)
                continue
            shape, dtype = self.reader.arrays[path]
            together = self.reader.layers_per_chunk(path)
            if together > 1:
                fit = max(1, self.memory // max(1, layouts.nbytes(shape[1:], dtype)))
                # Whole chunks where they fit, so that none is read twice.
                together = fit - fit % together if fit >= together else fit
            layers = {rule.index[0]: rule for rule in of_path}
            for start in range(0, shape[0], together):
                block = self.reader.read(path, (slice(start, min(start + together, shape[0])),))
                for i in range(len(block)):
                    if start + i in layers:
                        yield layers[start + i], block[i]

    def _target(self, rule: Rule) -> np.dtype:
        if self.dtype != "keep":
            return TARGETS[self.dtype]
        stored = self.reader.arrays[rule.path][1]
        noted = self.origin.get(rule.ours)
        return stored if noted is None else DTYPES[noted["dtype"]]

    def _constant(self, constant: Any) -> np.ndarray:
        """As it came, or as we compute it; in the dtype that was asked for, if it is not a whole number."""
        if self.constants is not None and constant.theirs in self.constants.entries:
            array = self.constants.read(constant.theirs)
        else:
            array = np.asarray(constant.value())
        whole = np.issubdtype(array.dtype, np.integer)
        return array if self.dtype == "keep" or whole else array.astype(TARGETS[self.dtype])

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Puts the tokenizer's files there: those that came with the weights, else the run's own."""
        kept = self.run / layouts.TOKENIZER
        found = sorted(kept.iterdir()) if kept.is_dir() else []
        names = [path.name for path in found]
        if (
            not {"tokenizer.model", "tokenizer.json"} & set(names)
            and (self.run / "tokenizer.model").is_file()
        ):
            found.append(self.run / "tokenizer.model")
        for path in found:
            shutil.copyfile(path, folder / path.name)
        return [path.name for path in found]

    def report(self, written: Mapping[str, Any], verified: Any = None) -> dict[str, Any]:
        """What parity.json says of the tensors :meth:`write` wrote last: each check, with its outcome."""
        came_as = self._came_as
        equal = [name for name in came_as if written[name] == came_as[name]]
        checks = [
            {
                "check": "every parameter of the model is in exactly one tensor, and every shape is expected",
                "tensors": len(written),
                "passed": True,
            }
        ]
        if came_as:
            checks.append(
                {
                    "check": "dtype, shape and bits equal those of the checkpoint the run was converted from",
                    "compared": len(came_as),
                    "equal": len(equal),
                    "passed": len(equal) == len(came_as),
                }
            )
        return {
            "written_by": f"umm_jax {__version__}",
            "weights": {"step": self.reader.step, "weights": self.weights, "dtype": self.dtype},
            "checks": checks,
            "verified": verified,
            "tensors": dict(written),
        }


def _main_dtype(written: Mapping[str, Any]) -> str:
    """The dtype most weights have, as torch calls it."""
    sizes: dict[str, int] = {}
    for line in written.values():
        sizes[line["dtype"]] = sizes.get(line["dtype"], 0) + math.prod(line["shape"])
    return DTYPES[max(sizes, key=sizes.get)].name


def _gigabytes(written: Mapping[str, Any]) -> float:
    return sum(layouts.nbytes(line["shape"], DTYPES[line["dtype"]]) for line in written.values()) / 1e9


def _verdict(report: Mapping[str, Any]) -> str:
    compared = next((c for c in report["checks"] if "compared" in c), None)
    if compared is None:
        return "these weights did not come from PyTorch, so there was nothing to compare them with"
    return f"{compared['equal']} of {compared['compared']} are bit for bit what they came as"
