"""Writing files so that a name only ever stands for a whole file."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from umm_jax.errors import StorageError


@contextlib.contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turns an operating-system error inside the block into one line about `path`.

    Raises:
        StorageError: disk or quota full, no permission, read-only file system, input/output error.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{path}: the disk is full; what was finished before is kept, free some space and run again"
            ) from None
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None


def sync(path: str | Path) -> None:
    """Waits until the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish(temporary: Path, final: Path) -> None:
    """Gives a completely written file its name, in an order that survives a power cut."""
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Writes a whole file or leaves what was there. Raises StorageError."""
    path = Path(path)
    # Others may be writing the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    with storage_errors(path):
        try:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            finish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
