"""Folders that exist only once they are whole."""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from umm_jax.data.files import storage_errors, sync
from umm_jax.errors import ConfigError, StorageError

_BLOCK = 8 << 20


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder to fill; it gets the name `target` when the block ends well and all of it is on disk.

    It grows beside its later place under the name ``.NAME.part``. Whatever ends the block early, `target`
    is never there; what a killed process left is removed by the next one.

    Raises:
        ConfigError: `target` exists and is not an empty folder, or another process is filling it.
        StorageError: disk full, no permission, ...
    """
    target = Path(target).absolute()
    require_new(target)
    part = target.with_name(f".{target.name}.part")
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _owned(part):
            try:
                yield part
                sync_tree(part)
                if target.is_dir():
                    target.rmdir()  # empty, see above; fails if it no longer is
                os.rename(part, target)
                sync(target.parent)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise


def require_new(target: Path) -> None:
    """Raises ConfigError where `target` is anything but a new name or an empty folder."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"{target}: is there already; choose another --out, or remove it first")


@contextlib.contextmanager
def _owned(part: Path) -> Iterator[None]:
    """Makes `part` an empty folder that is this process's, by a lock that ends with the process."""
    part.mkdir(exist_ok=True)
    lock = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{part}: another process is writing there; wait for it to end") from None
        for left in part.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        os.close(lock)


def sync_tree(folder: Path) -> None:
    """Waits until every file below `folder`, and every name, is on the disk."""
    found = []
    for root, _, files in os.walk(folder, topdown=False):
        found += [os.path.join(root, name) for name in files] + [root]
    # Together: a disk does many at a time for little more than the price of one.
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(sync, found))


def require_room(folder: Path, need: int, what: str) -> None:
    """Raises StorageError where the disk of `folder` has less than `need` bytes free."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(there).free
    if free < need:
        raise StorageError(
            f"{folder}: {what} needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; nothing was "
            "written, make room and run again"
        )


def write_sums(folder: Path) -> dict[str, str]:
    """Writes ``sha256sums`` of every file in `folder`, as ``sha256sum -c`` reads it: {name: digest}."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "sha256sums")
    sums = {str(path.relative_to(folder)): sha256_of(path) for path in files}
    (folder / "sha256sums").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return sums
