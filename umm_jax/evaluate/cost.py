"""What a run cost, kept in its folder: wall seconds by stage (summed over resumed runs) and peak memory."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from umm_jax.data.files import write_atomic
from umm_jax.errors import DataError, Interrupted

FILE = "cost.json"


def read(workdir: str | Path) -> dict[str, dict[str, float]]:
    """{stage: {"seconds", "peak_memory_bytes"}} of a run so far; empty where nothing was recorded."""
    path = Path(workdir) / FILE
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it, and its costs are forgotten") from None


@contextlib.contextmanager
def stage(workdir: str | Path, name: str) -> Iterator[None]:
    """Adds the time of the block to stage `name` of the run, also when the block is interrupted.

    A block that fails is not recorded: the folder may not be a run's.
    """
    start = time.perf_counter()
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        _add(Path(workdir), name, time.perf_counter() - start)
        raise
    _add(Path(workdir), name, time.perf_counter() - start)


def _add(workdir: Path, name: str, seconds: float) -> None:
    if not workdir.is_dir():
        return
    stages = read(workdir)
    before = stages.get(name, {"seconds": 0.0, "peak_memory_bytes": 0})
    stages[name] = {
        "seconds": round(before["seconds"] + seconds, 2),
        "peak_memory_bytes": max(before["peak_memory_bytes"], peak_memory()),
    }
    write_atomic(workdir / FILE, json.dumps(stages, indent=1) + "\n")


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes; 0 where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
