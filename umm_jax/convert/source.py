"""PyTorch weights as they lie on disk: names, shapes and dtypes at once, and one tensor at a time.

``.safetensors`` is read here, byte by byte as its format says: eight bytes with the length of a JSON header,
the header, the data. ``.bin`` and ``.pt`` are pickles in a zip: torch reads the pickle (``weights_only``) and
says where in the file each storage lies. Data are read by ``pread`` in both cases and never mapped, so what
is resident is the tensor in hand. Whatever is wrong with a file is a CheckpointError that names it.
"""

import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from umm_jax.convert.folder import sha256_of
from umm_jax.convert.shards import DTYPES
from umm_jax.errors import CheckpointError, ConfigError

Shape = tuple[int, ...]

_LARGEST_HEADER = 100_000_000  # what the format allows
_LFS = b"version https://git-lfs"

# In the order in which they are looked for: safetensors first, since they need no pickle.
_INDICES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
_SINGLES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_PICKLED_INDICES = ("pytorch_model.bin.index.json", "diffusion_pytorch_model.bin.index.json")
_PICKLED_SINGLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
# Pickles that trainers leave beside the weights.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt)")
_SUMS = ("sha256sums", "SHA256SUMS")


class Entry(NamedTuple):
    """Where a tensor lies: `offset` in bytes, `strides` in elements (None: C order)."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: Shape
    strides: tuple[int, ...] | None = None


class Source:
    """The tensors of one checkpoint.

    Attributes:
        where: the path that was opened, for messages.
        entries: {name: Entry} in the order of the files.
        files: the files they lie in.
    """

    def __init__(self, where: Path, entries: Mapping[str, Entry], files: Sequence[Path]):
        self.where, self.entries, self.files = where, entries, tuple(files)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, in its own dtype. Raises CheckpointError where the file ends too early."""
        entry = self.entries[name]
        if entry.strides is None:
            count = int(np.prod(entry.shape, dtype=np.int64))
        else:
            count = 1 + sum((n - 1) * step for n, step in zip(entry.shape, entry.strides))
            count = count if all(entry.shape) else 0
        flat = np.empty(count, entry.dtype)
        _pread(entry.file, flat.view(np.uint8), entry.offset, name)
        if entry.strides is None:
            return flat.reshape(entry.shape)
        steps = [step * entry.dtype.itemsize for step in entry.strides]
        return np.lib.stride_tricks.as_strided(flat, entry.shape, steps)


def open_source(path: str | Path, *, allow_pickle: bool = False, checksums: bool = True) -> Source:
    """Opens a file of weights, an index of shards, or a folder with one or the other.

    Args:
        allow_pickle: whether ``.bin`` and ``.pt`` may be read: a pickle can hold more than numbers, and
            though torch refuses to run what it does not know, it is a larger door than safetensors.
        checksums: whether a ``sha256sums`` file beside the weights is checked, where there is one.

    Raises:
        CheckpointError: nothing there, a file that is cut short or damaged, a shard or tensor that the index
            names and is not there, a checksum that differs.
        ConfigError: a pickle without `allow_pickle`, or no torch to read it with.
    """
    path = Path(path)
    index, files = _find(path)
    pickled = [file for file in files if file.suffix != ".safetensors"]
    if pickled and not allow_pickle:
        raise ConfigError(
            f"{pickled[0]}: a pickle, which may carry code; where you trust who made it, add --allow-pickle "
            "(it is still read with weights_only)"
        )
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file, though {index} names it; download it again")
    if checksums:
        check_sums(path if path.is_dir() else path.parent, files)
    entries: dict[str, Entry] = {}
    for file in files:
        found = _pickle_entries(file) if file in pickled else _safetensors_entries(file)
        for name, entry in found.items():
            if name in entries:
                raise CheckpointError(
                    f"{file} and {entries[name].file} both hold {name}; give the path of one of them"
                )
            entries[name] = entry
    if index is not None:
        for name, file in _weight_map(index).items():
            if name not in entries or entries[name].file.name != file:
                raise CheckpointError(f"{index.parent / file}: has no tensor {name}, though {index} says so")
    return Source(path, entries, files)


def joined(where: Path, sources: Mapping[str, Source]) -> Source:
    """Several sources {prefix: source} as one, each tensor's name with the prefix of its source in front."""
    entries = {
        prefix + name: entry for prefix, source in sources.items() for name, entry in source.entries.items()
    }
    return Source(where, entries, [file for source in sources.values() for file in source.files])


def check_sums(folder: Path, files: Sequence[Path]) -> None:
    """Compares `files` with the sha256sums of `folder`, if it has any. Raises CheckpointError."""
    sums = next((folder / name for name in _SUMS if (folder / name).is_file()), None)
    if sums is None:
        return
    listed = {}
    for line in sums.read_text().splitlines():
        if line.strip():
            digest, _, name = line.strip().partition(" ")
            listed[name.strip().removeprefix("*")] = digest.lower()
    for file in files:
        expected = listed.get(file.name)
        if expected is None:
            continue
        found = sha256_of(file)
        if found != expected:
            raise CheckpointError(
                f"{file}: its sha256 is {found[:12]}..., {sums.name} says {expected[:12]}...; it is damaged "
                "or half downloaded, fetch it again"
            )


def header_of(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked: the file is exactly as long as its tensors need.

    Raises:
        CheckpointError: names the file, with the bytes expected and found.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        if start + stream.read(len(_LFS) - 8) == _LFS:
            raise CheckpointError(f"{file}: a git-lfs pointer, not the weights; run git lfs pull")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _LARGEST_HEADER:
            raise CheckpointError(f"{file}: no safetensors file, or damaged ({size} bytes, no header)")
        stream.seek(8)
        text = stream.read(length)
    if len(text) < length:
        raise CheckpointError(
            f"{file}: cut short: its header needs {8 + length} bytes, the file has {size}; fetch it again"
        )
    try:
        header = json.loads(text)
        spans = sorted(
            (*map(int, value["data_offsets"]), name)
            for name, value in header.items()
            if name != "__metadata__"
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file}: its header is no safetensors header; damaged") from None
    at = 0
    for begin, end, name in spans:
        if begin != at or end < begin:
            raise CheckpointError(f"{file}: damaged header: {name} begins at {begin}, expected {at}")
        at = end
    if size != 8 + length + at:
        what = "cut short" if size < 8 + length + at else "longer than its header says"
        raise CheckpointError(f"{file}: {what}: expected {8 + length + at} bytes, found {size}")
    return header | {"__data__": 8 + length}


# --- finding files ----------------------------------------------------------------------------------


def _find(path: Path) -> tuple[Path | None, list[Path]]:
    """(the index, or None, and the files of weights) of a path."""
    if path.is_file():
        if path.name.endswith(".index.json"):
            return path, _indexed(path)
        if path.suffix not in (".safetensors", ".bin", ".pt"):
            raise CheckpointError(f"{path}: weights end in .safetensors, .bin, .pt or .index.json")
        return None, [path]
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    for indices, singles, suffixes in (
        (_INDICES, _SINGLES, (".safetensors",)),
        (_PICKLED_INDICES, _PICKLED_SINGLES, (".bin", ".pt")),
    ):
        for name in indices:
            if (path / name).is_file():
                return path / name, _indexed(path / name)
        for name in singles:
            if (path / name).is_file():
                return None, [path / name]
        files = sorted(f for f in path.iterdir() if f.suffix in suffixes and not _NO_WEIGHTS.match(f.name))
        if files:
            return None, files
    raise CheckpointError(f"{path}: no weights in there (.safetensors, .bin or .pt)")


def _indexed(index: Path) -> list[Path]:
    return [index.parent / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
            raise ValueError
        return found
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: no index of shards (a JSON file with a weight_map)") from None


# --- what is in a file ------------------------------------------------------------------------------


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    header = header_of(file)
    data = header.pop("__data__")
    header.pop("__metadata__", None)
    entries = {}
    for name, value in header.items():
        dtype, shape = DTYPES.get(value.get("dtype")), tuple(value.get("shape", ()))
        if dtype is None:
            raise CheckpointError(f"{file}: {name} has dtype {value.get('dtype')}, which is not known here")
        begin, end = value["data_offsets"]
        need = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if end - begin != need:
            raise CheckpointError(
                f"{file}: damaged header: {name} {list(shape)} needs {need} bytes, it has {end - begin}"
            )
        entries[name] = Entry(file, data + begin, dtype, shape)
    return entries


def _pickle_entries(file: Path) -> dict[str, Entry]:
    torch = import_torch("a .bin or .pt file")
    with open(file, "rb") as stream:
        start = stream.read(len(_LFS))
    if start == _LFS:
        raise CheckpointError(f"{file}: a git-lfs pointer, not the weights; run git lfs pull")
    if not zipfile.is_zipfile(file):
        if start[:2] == b"PK":
            raise CheckpointError(
                f"{file}: cut short: the directory at its end is not among its {file.stat().st_size} bytes; "
                "fetch it again"
            )
        raise CheckpointError(
            f"{file}: not a file that PyTorch 1.6 or newer wrote; load it there and save it again"
        )
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        # Tensors without data, whose storages know where in the file they lie.
        with FakeTensorMode():
            state = torch.load(file, weights_only=True)
    except Exception as error:  # whatever the pickle or the zip brings up: the file is the culprit
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file}: cannot be read as weights ({first[:200]})") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, not tensors by name")
    dtypes = {
        getattr(torch, name): np.dtype(dtype)
        for name, dtype in {
            "float64": np.float64,
            "float32": np.float32,
            "float16": np.float16,
            "bfloat16": ml_dtypes.bfloat16,
            "int64": np.int64,
            "int32": np.int32,
            "int16": np.int16,
            "int8": np.int8,
            "uint8": np.uint8,
            "bool": np.bool_,
        }.items()
    }
    entries = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{file}: {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"{file}: {name} has dtype {tensor.dtype}, which is not known here")
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if begin is None:
            raise ConfigError(
                f"{file}: torch {torch.__version__} does not say where in the file tensors lie; install 2.6 "
                "or newer"
            )
        dtype = dtypes[tensor.dtype]
        strides = None if tensor.is_contiguous() else tuple(tensor.stride())
        offset = begin + tensor.storage_offset() * dtype.itemsize
        entries[name] = Entry(file, offset, dtype, tuple(tensor.shape), strides)
    return entries


def import_torch(what: str) -> Any:
    """The torch module. Raises ConfigError, saying how to install it, where there is none."""
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"{what} needs PyTorch, which is not installed: pip install torch "
            "--index-url https://download.pytorch.org/whl/cpu"
        ) from None
    return torch


def _pread(file: Path, into: np.ndarray, offset: int, name: str) -> None:
    view, done = memoryview(into), 0
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            while done < len(view):
                # One call reads at most 2 GB.
                got = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
                if got == 0:
                    raise CheckpointError(
                        f"{file}: ends within {name}: {len(view)} bytes expected, {done} found"
                    )
                done += got
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
