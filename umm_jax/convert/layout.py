"""What both ways share: our shapes, the family's table, and how dtypes are chosen and changed."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from umm_jax import config as configs
from umm_jax import families
from umm_jax.errors import CheckpointError
from umm_jax.models.layers import Keys
from umm_jax.weights.table import Rule, Table

Shape = tuple[int, ...]

# In a run that was converted: what the checkpoint held beside parameters, so that it can be given back.
KEPT = "torch"
MANIFEST = f"{KEPT}/manifest.json"
CONSTANTS = f"{KEPT}/constants.safetensors"
TOKENIZER = f"{KEPT}/tokenizer"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)

_FLOATS = {np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Layout:
    """A model of one family and config, as parameters and as tensors."""

    family: str
    model: Any

    @cached_property
    def ours(self) -> dict[str, Shape]:
        """{path: shape} of every parameter."""
        return shapes_of(self.family, self.model)

    @cached_property
    def table(self) -> Table:
        """The family's table. Raises ConfigError where this config has no released layout."""
        module = families.get(self.family).weights
        table = module.table(self.model)
        table.check(self.ours)
        return table


def shapes_of(family: str, model: Any) -> dict[str, Shape]:
    """{path: shape} of every parameter of a model; no array is made."""
    build = families.get(family).model.build
    state = nnx.split(nnx.eval_shape(lambda: build(model, Keys(0))))[1]
    return {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(state)}


def stacked(rules: Iterable[Rule]) -> set[str]:
    """Paths of the parameters whose leading axis is layers, one tensor each."""
    return {r.path for r in rules if len(r.index) == 1 and isinstance(r.index[0], int)}


def common_dtype(dtypes: Mapping[str, np.dtype]) -> np.dtype:
    """The narrowest float dtype that holds every value of tensors with `dtypes` {name: dtype} exactly.

    Raises:
        CheckpointError: a tensor that does not hold floating-point weights; names it.
    """
    for name, dtype in dtypes.items():
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{name} has dtype {dtype}: weights must be float16, bfloat16, float32 or float64; "
                "a quantised checkpoint must be turned back first"
            )
    kinds = set(dtypes.values())
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` in C order and `dtype`.

    Raises:
        CheckpointError: a finite value that `dtype` cannot hold; names the tensor.
    """
    with np.errstate(over="ignore"):
        out = _in_order(array, dtype)
    if dtype.itemsize < array.dtype.itemsize and not np.isfinite(out).all() and np.isfinite(array).all():
        largest = float(np.abs(array).max())
        raise CheckpointError(f"{name}: {largest:.4g} is too large for {dtype}; choose another --dtype")
    return out


def _in_order(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in C order and `dtype`, itself where it is that already."""
    if array.ndim != 2 or array.flags.c_contiguous or array.size < 1 << 20:
        return array.astype(dtype, order="C", copy=False)
    # A turned matrix, tile by tile: twice as fast as row by row, which meets each line of the cache anew.
    out, tile = np.empty(array.shape, dtype), 128
    for i in range(0, array.shape[0], tile):
        for j in range(0, array.shape[1], tile):
            out[i : i + tile, j : j + tile] = array[i : i + tile, j : j + tile]
    return out


def tolerance(array: np.ndarray, absolute: float) -> np.ndarray:
    """How far a stored constant may be from ours: `absolute`, and one rounding to its dtype."""
    if array.dtype not in _FLOATS:
        return np.full(array.shape, absolute)
    return absolute + float(ml_dtypes.finfo(array.dtype).eps) * np.abs(array.astype(np.float64))


def read_json(path: Path) -> Any:
    """What a JSON file holds, or None where there is no file. Raises CheckpointError."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None


def folder_family(path: Path) -> str | None:
    """The family whose release has a folder like `path`, where that is laid out in a way of its own."""
    for name in families.names():
        folder = families.get(name).weights.FOLDER
        if folder is not None and all((path / file).is_file() for file in folder.files):
            return name
    return None


def own_config(found: Any) -> tuple[str, Any] | None:
    """(family, ModelConfig) of a ``config.json`` that we wrote into an export; None where it is another's."""
    if not isinstance(found, Mapping) or not {"family", "model"} <= set(found):
        return None
    cls = families.get(found["family"]).config.ModelConfig
    return found["family"], configs.from_dict(cls, found["model"], "config.model")


def nbytes(shape: Shape, dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
