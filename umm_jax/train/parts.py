"""The arrays of one checkpoint, part by part: for whoever must not hold a whole model in memory.

What :class:`PartWriter` leaves is an ordinary checkpoint that :mod:`umm_jax.train.checkpoint` restores, with
"params" alone in it; :class:`PartReader` reads any of ours. A part is what an index such as ``(3,)`` or
``(slice(0, 7),)`` selects of an array. Orbax lays the checkpoint out; the arrays go by tensorstore.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from umm_jax.errors import CheckpointError
from umm_jax.train.checkpoint import Checkpoints, quiet_orbax, storage_error
from umm_jax.train.optimizer import unflatten

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]
Array = tuple[Shape, np.dtype]

LARGEST_CHUNK = 64 << 20
# Layers of a stack below this size share a chunk: a file for each bias of each layer would be too many.
_SMALL_CHUNK = 1 << 20


def _context() -> ts.Context:
    # Nothing is kept beyond the part in hand; files are synced together when all are written.
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": 1},
            "file_io_concurrency": {"limit": 4},
            "file_io_sync": False,
        }
    )


def chunk_shape(shape: Shape, itemsize: int, stacked: bool) -> Shape:
    """How an array is cut on disk: along the layers where it is `stacked`, then along the next axis.

    Chunks are at most LARGEST_CHUNK bytes where the cut axis allows it, and of nearly equal length.
    """
    if not shape or 0 in shape:
        return tuple(max(1, n) for n in shape)
    one = itemsize * math.prod(shape[1:] if stacked else shape)
    if stacked and one <= _SMALL_CHUNK:
        return (min(shape[0], max(1, _SMALL_CHUNK // one)), *shape[1:])
    lead, rest = ((1,), shape[1:]) if stacked else ((), shape)
    if rest:
        pieces = min(rest[0], -(-one // LARGEST_CHUNK))
        rest = (-(-rest[0] // pieces), *rest[1:])
    return (*lead, *rest)


class PartWriter:
    """A new checkpoint of step 0 with the parameters `arrays`, to be filled by :meth:`write`.

    Args:
        directory: the run's ``checkpoints``; it must not hold step 0 yet.
        arrays: {path: (shape, dtype)} of the parameters.
        stacked: paths whose leading axis is layers that are written one by one.
        config: plain config of the run, as ``checkpoint.plain_config`` gives it.

    Raises:
        StorageError: disk full, no permission.
    """

    def __init__(
        self,
        directory: Path,
        arrays: Mapping[str, Array],
        stacked: set[str],
        config: Mapping[str, Any],
    ):
        quiet_orbax()
        self.directory = Path(directory).absolute()
        self.arrays, self.stacked = dict(arrays), stacked
        placeholders = {path: np.zeros((1,), dtype) for path, (_, dtype) in arrays.items()}
        try:
            manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(use_ocdbt=False),
                    "iterator": ocp.JsonCheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                },
            )
            manager.save(
                0,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave({"params": unflatten(placeholders)}),
                    iterator=ocp.args.JsonSave({"processes": []}),
                    config=ocp.args.JsonSave(dict(config)),
                ),
                force=True,
            )
            manager.close()
        except (OSError, ValueError) as error:
            raise storage_error(error, self.directory) from error
        self._context, self._stores = _context(), {}

    def write(self, path: str, index: Index, array: np.ndarray) -> None:
        """Writes `array`, of the dtype promised, as the part `index` of parameter `path`."""
        try:
            store = self._stores.get(path) or self._create(path)
            store[index].write(array).result()
        except (OSError, ValueError) as error:
            raise storage_error(error, self.directory) from error

    def _create(self, path: str) -> ts.TensorStore:
        shape, dtype = self.arrays[path]
        spec = {
            "driver": "zarr",
            "kvstore": _file(self.directory / "0" / "state", path),
            "metadata": {
                "shape": shape,
                "chunks": chunk_shape(shape, dtype.itemsize, path in self.stacked),
                "compressor": None,
            },
            "dtype": dtype.name,
        }
        self._stores[path] = ts.open(spec, create=True, delete_existing=True, context=self._context).result()
        return self._stores[path]


class PartReader:
    """The arrays of one checkpoint of a run.

    Args:
        directory: the run's ``checkpoints``.
        step: the newest unless given.
        weights: "raw", or "ema": the averaged ones, and what has no average as it is.

    Attributes:
        step: the one that is read. config: the run's config, as saved with it.
        arrays: {path: (shape, dtype)}.

    Raises:
        CheckpointError: no such checkpoint, or no averaged weights in it.
    """

    def __init__(self, directory: Path, step: int | None = None, weights: str = "raw"):
        checkpoints = Checkpoints(directory, read_only=True)
        self.step = checkpoints.choose(step)
        self.config = checkpoints.config(self.step)
        self._state = Path(directory).absolute() / str(self.step) / "state"
        layout = json.loads((self._state / "_METADATA").read_text())
        self._ocdbt, self._zarr3 = layout.get("use_ocdbt", True), layout.get("use_zarr3", False)
        self._context, self._stores = _context(), {}
        sections = {path: "params" for path in checkpoints.saved_shapes(self.step, "params")}
        if weights == "ema":
            averaged = checkpoints.saved_shapes(self.step, "ema")
            if not averaged:
                raise CheckpointError(
                    f"{directory}: step {self.step} keeps no averaged weights (train.ema was not set); "
                    "ask for --weights=raw"
                )
            sections |= {path: "ema" for path in averaged}
        self._sections = sections
        self.arrays: dict[str, Array] = {}
        for path in sections:
            store = self._open(path)
            self.arrays[path] = (tuple(store.shape), np.dtype(store.dtype.numpy_dtype))

    def read(self, path: str, index: Index = ()) -> np.ndarray:
        """The part `index` of parameter `path`, in the dtype it is stored in.

        Raises:
            CheckpointError: the file that holds it is missing or damaged.
        """
        try:
            return self._open(path)[index].read().result()
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0][:200]
            raise CheckpointError(f"{self._state}: {path} cannot be read ({first})") from None

    def layers_per_chunk(self, path: str) -> int:
        """How many entries of the leading axis must be read together."""
        shape = self._open(path).chunk_layout.read_chunk.shape
        return shape[0] if shape else 1

    def _open(self, path: str) -> ts.TensorStore:
        if path not in self._stores:
            name = f"{self._sections[path]}/{path}"
            if self._ocdbt:
                where = {
                    "driver": "ocdbt",
                    "base": f"file://{self._state}/",
                    "path": name.replace("/", ".") + "/",
                }
            else:
                where = _file(self._state, name, section="")
            spec = {"driver": "zarr3" if self._zarr3 else "zarr", "kvstore": where}
            try:
                self._stores[path] = ts.open(spec, open=True, read=True, context=self._context).result()
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0][:200]
                raise CheckpointError(f"{self._state}: {path} cannot be read ({first})") from None
        return self._stores[path]


def _file(state: Path, path: str, section: str = "params/") -> dict[str, str]:
    name = (section + path).replace("/", ".")
    return {"driver": "file", "path": f"{state / name}/"}
