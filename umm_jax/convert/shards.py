"""Safetensors files written in place: room is taken first, tensors come in any order."""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

Shape = tuple[int, ...]

# Names of safetensors' dtypes.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """What is known of a tensor before it is written."""

    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Shards:
    """Safetensors files of at most `limit` bytes of data, whose tensors are then written in any order.

    Headers are written and room is taken at once, so that a full disk is found before the work. A tensor
    larger than `limit` has a shard of its own. With more than one shard there is an index.

    Attributes:
        files: their names, in order. total: bytes of all tensors.
    """

    def __init__(self, folder: Path, stem: str, tensors: Mapping[str, Tensor], limit: int):
        self.folder, self.tensors = folder, dict(tensors)
        self.total = sum(tensor.nbytes for tensor in tensors.values())
        self._places: dict[str, tuple[str, int]] = {}
        self._open: dict[str, int] = {}
        groups = self._cut(limit)
        count = len(groups)
        self.files = [
            f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
            for i in range(count)
        ]
        for file, group in zip(self.files, groups):
            self._begin(file, group)
        if count > 1:
            index = {
                "metadata": {"total_size": self.total},
                "weight_map": {name: self._places[name][0] for name in self.tensors},
            }
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")

    def _cut(self, limit: int) -> list[list[str]]:
        groups, size = [[]], 0
        for name, tensor in self.tensors.items():
            if groups[-1] and size + tensor.nbytes > limit:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += tensor.nbytes
        return groups

    def _begin(self, file: str, names: list[str]) -> None:
        # Wide elements first: then each tensor begins at a multiple of its element's size.
        names = sorted(names, key=lambda name: -self.tensors[name].dtype.itemsize)
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            tensor = self.tensors[name]
            end = at + tensor.nbytes
            dtype = DTYPE_NAMES[tensor.dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        for name in names:
            self._places[name] = (file, begin + header[name]["data_offsets"][0])
        descriptor = os.open(self.folder / file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._open[file] = descriptor
        _pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        try:
            os.posix_fallocate(descriptor, 0, begin + at)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(descriptor, begin + at)  # a file system that cannot promise room

    def write(self, name: str, array: np.ndarray) -> None:
        """Puts a C-contiguous array of the promised shape and dtype in its place."""
        tensor = self.tensors[name]
        if array.shape != tensor.shape or array.dtype != tensor.dtype or not array.flags.c_contiguous:
            raise ValueError(f"{name}: {array.dtype} {array.shape}, promised {tensor.dtype} {tensor.shape}")
        file, offset = self._places.pop(name)
        _pwrite(self._open[file], array.reshape(-1).view(np.uint8), offset)

    def close(self, complete: bool = True) -> None:
        """Closes the files. Raises ValueError when a tensor was forgotten."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}
        if complete and self._places:
            raise ValueError(f"never written: {', '.join(list(self._places)[:5])}")

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(complete=kind is None)


def _pwrite(descriptor: int, data: bytes | np.ndarray, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + (1 << 30)], offset + done)
