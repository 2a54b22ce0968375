"""Comparing our tensors with those a reference implementation wrote: rows, tolerances, the printed table.

A family says what can be compared in ``convert/fixtures/<family>.py``; here is what a comparison is. Forward
tensors must agree within 1e-4 of the tensor's scale (its largest magnitude), gradients and the optimizer step
within 1e-3, chosen tokens exactly. Everything is computed in float32.
"""

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.errors import CheckpointError

FORWARD, BACKWARD, SAMPLING = 1e-4, 1e-3, 1e-3
DESCRIPTIONS = ("config.json", "fixture.json")  # what says what a folder holds


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        file, tensor: where the reference's tensor is; the family's checks say what it is compared with.
        error: largest absolute difference (for ids: how many differ).
        scale: what the error is measured against, the largest magnitude of the reference's tensor.
        tolerance: largest error over scale that passes; 0 asks for equality.
    """

    file: str
    tensor: str
    error: float
    scale: float
    tolerance: float

    @property
    def relative(self) -> float:
        """Error over scale."""
        return self.error / self.scale if self.scale else (0.0 if self.error == 0 else float("inf"))

    @property
    def passed(self) -> bool:
        # A NaN is no number that could be small enough.
        return bool(np.isfinite(self.error) and self.relative <= self.tolerance)


def compared(
    file: str,
    tensor: str,
    ours: Any,
    theirs: Any,
    tolerance: float = FORWARD,
    *,
    where: Any = None,
    scale: float | None = None,
) -> Row:
    """A row for two arrays of the same shape.

    Args:
        where: bool, broadcastable to both: what counts; None is everything.
        scale: in place of the largest magnitude of `theirs`.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise CheckpointError(f"{file}: {tensor} is {list(theirs.shape)}, ours is {list(ours.shape)}")
    counts = np.ones(theirs.shape, bool) if where is None else np.broadcast_to(where, theirs.shape)
    error = float(np.max(np.abs(ours - theirs), where=counts, initial=0.0))
    if not np.isfinite(ours[counts]).all():
        error = float("nan")
    if scale is None:
        scale = np.max(np.abs(theirs), where=counts, initial=0.0)
    return Row(file, tensor, error, float(scale), tolerance)


def equal(file: str, tensor: str, ours: Any, theirs: Any) -> Row:
    """A row for ids: how many of them differ; none may."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        return Row(file, tensor, float(max(ours.size, theirs.size)), 1.0, 0.0)
    return Row(file, tensor, float(np.sum(ours != theirs)), 1.0, 0.0)


def checks(folder: str | Path, only: Sequence[str] = ()) -> Iterator[Row]:
    """Every comparison a fixture folder allows, whatever its dimensions.

    Args:
        only: beginnings of the names of the files to compare; all where there are none.

    Raises:
        CheckpointError: not a folder of fixtures of a known family, or one that lacks what it names.
    """
    folder = Path(folder)
    path = next((folder / name for name in DESCRIPTIONS if (folder / name).is_file()), None)
    if path is None:
        known = " or ".join(DESCRIPTIONS)
        raise CheckpointError(f"{folder}: no {known}; a folder of reference tensors has one")
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    for name in _families():
        module = importlib.import_module(f"umm_jax.convert.fixtures.{name}")
        if module.knows(found):
            yield from module.checks(folder, found, only)
            return
    raise CheckpointError(f"{path} is of no layout known here ({', '.join(_families())})")


def _families() -> list[str]:
    folder = Path(__file__).parent / "fixtures"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


# --- what is shown ------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """One line of the table."""
    verdict = "ok" if row.passed else "MISS"
    asked = "equal" if row.tolerance == 0 else f"{row.tolerance:.0e}"
    return f"{verdict:<5}{row.error:>10.2e}{row.relative:>10.2e}{asked:>8}  {row.file:<24} {row.tensor}"


HEADER = f"{'':<5}{'max abs':>10}{'relative':>10}{'bound':>8}  {'file':<24} tensor"


def summary(rows: Sequence[Row]) -> str:
    """The last line: how many passed, and the worst."""
    missed = [row for row in rows if not row.passed]
    share = [row.relative / row.tolerance for row in rows if row.tolerance and row.passed]
    text = f"{len(rows) - len(missed)} of {len(rows)} rows pass"
    if missed:
        return f"{text}; missed: {', '.join(f'{r.file}/{r.tensor}' for r in missed[:5])}"
    return f"{text}; the closest has used {100 * max(share, default=0.0):.1f} % of its bound"


def as_json(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """Plain form of the table."""
    return [asdict(row) | {"relative": row.relative, "passed": row.passed} for row in rows]
