"""Score files side by side: one row a benchmark, one column a model, and what may not be compared.

A cell stands beside the first of its row when both come from the same benchmark, version, settings, prompt,
post-processing, data and judge, on the same docs. Otherwise it is marked, and the reasons are told below the
table. Where two cells have the same docs, the difference is tested over docs, see :func:`paired`.
"""

import csv
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax import config as configs
from umm_jax.errors import DataError
from umm_jax.evaluate import html, tasks
from umm_jax.evaluate.contract import Task
from umm_jax.evaluate.scoring import SCHEMA, compared

# What must be equal, and how a reader is told that it is not.
COMPARED = {
    "version": "version of the task",
    "settings": "settings",
    "prompt_hash": "prompt",
    "post": "post-processing",
    "dataset_hash": "annotations",
    "judge": "judge",
    "noted": "tools at hand",
    "limit": "limit",
    "ids_hash": "docs",
}
RESAMPLES = 10_000
FEW = 30  # docs below which a bootstrap is too sure of itself
_EXACT = 14  # docs up to which all signs are tried
_NEEDED = {"task", "settings", "metrics", "docs", "headline", "n_failed", "parse_rate"}


@dataclass(frozen=True)
class Column:
    """What stands in one column: its name, and score files by task and settings."""

    name: str
    scores: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        marks: numbers of the notes below the table that concern it.
        p: of the difference from the row's first cell; None where it was not tested.
    """

    value: float | None
    stderr: float | None = None
    n: int = 0
    parse_rate: float | None = None
    marks: tuple[int, ...] = ()
    p: float | None = None
    missing: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, and the notes they refer to, from 1 on."""

    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]
    about: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str]
    figure: str | None = None


def read(path: str | Path) -> dict[str, dict[str, Any]]:
    """{row: figures} of a score file, or of all score files below a folder.

    Raises:
        DataError: none is there, one is damaged or of another schema, or two would stand in one row.
    """
    path = Path(path)
    files = sorted(path.rglob("score.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no score.json in it; umm eval score writes them")
    found, came = {}, {}
    for file in files:
        try:
            figures = json.loads(file.read_text())
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise DataError(f"{file}: damaged: {error}") from None
        known = isinstance(figures, dict) and figures.get("schema") == SCHEMA
        if not known or not figures.keys() >= _NEEDED or not isinstance(figures["task"], str):
            raise DataError(f"{file}: no score file of this release (umm eval score --json)")
        task = tasks.get(figures["task"])
        row = row_of(task, configs.from_dict(task.Settings, figures["settings"], str(file)))
        if row in found:
            raise DataError(f"{path}: holds two of {row}, of {came[row]} and {file}; name a column for each")
        found[row], came[row] = figures, file
    return found


def row_of(task: Task, settings: Any) -> str:
    """Names the row of a benchmark: its task, and what differs from the task's own settings."""
    plain, usual = (compared(task, configs.to_dict(s)) for s in (settings, task.Settings()))
    said = [f"{key}={value}" for key, value in plain.items() if value != usual[key]]
    return f"{task.name} ({', '.join(said)})" if said else task.name


def build(columns: Sequence[Column], figure: str | None = None) -> Table:
    """Args: figure: instead of each task's headline."""
    rows = list(dict.fromkeys(row for column in columns for row in column.scores))
    notes: list[str] = []
    cells, about = {}, {}
    for row in rows:
        found = [c.scores[row] for c in columns if row in c.scores]
        about[row] = next((f for f in found if "failed" not in f), found[0])
        cells[row] = [_cell(c.scores.get(row), about[row], figure, notes) for c in columns]
    return Table([c.name for c in columns], cells, about, notes, figure)


def _cell(found: Mapping[str, Any] | None, first: Mapping[str, Any], figure: str | None, notes) -> Cell:
    if found is None:
        return Cell(None, missing="not scored")
    if "failed" in found:
        short, colon, why = found["failed"].partition(": ")
        return Cell(None, missing=short, marks=(_note(notes, why),) if colon else ())
    name = figure or found["headline"]
    score = found["metrics"].get(name)
    if score is None:
        return Cell(None, missing=f"has no {name}")
    task = tasks.get(found["task"])
    here, there = ({**f, "settings": compared(task, f["settings"])} for f in (found, first))
    differs = [text for key, text in COMPARED.items() if here.get(key) != there.get(key)]
    if found["docs"].keys() != first["docs"].keys() and "docs" not in differs:
        differs.append("docs")
    marks = []
    if differs:
        marks.append(_note(notes, f"not comparable with the first of its row: another {', '.join(differs)}"))
    if found["n_failed"]:
        marks.append(_note(notes, f"{found['n_failed']} docs could not be asked or judged, and are left out"))
    if score["reason"]:
        marks.append(_note(notes, score["reason"]))
    tested = found is not first and not differs and name == found["headline"]
    p = paired(found["docs"], first["docs"]) if tested else None
    return Cell(score["value"], score["stderr"], score["n"], found["parse_rate"], tuple(marks), p)


def _note(notes: list[str], text: str) -> int:
    if text not in notes:
        notes.append(text)
    return notes.index(text) + 1


def paired(a: Mapping[str, float], b: Mapping[str, float]) -> float | None:
    """Two-sided p of mean(a) = mean(b) over the same docs; None where they are not, or fewer than two.

    A bootstrap of their differences, whose mean is moved to zero: the share of draws at least as far from
    zero as the mean that was seen. Of fewer than FEW docs, where that would find differences everywhere, the
    share of choices of the differences' signs that give as much. The same files give the same p.
    """
    ids = sorted(a)
    if len(ids) < 2 or a.keys() != b.keys():
        return None
    difference = np.array([a[i] - b[i] for i in ids])
    seen = abs(difference.mean()) * (1 - 1e-12)
    if not difference.any():
        return 1.0
    rng = np.random.default_rng(zlib.crc32("".join(ids).encode()))
    n = len(ids)
    if n <= _EXACT:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((abs((signs * difference).mean(1)) >= seen).mean())
    if n < FEW:
        signs = rng.choice([-1, 1], (RESAMPLES, n))
        far = abs((signs * difference).mean(1)) >= seen
        return float((far.sum() + 1) / (RESAMPLES + 1))
    # How often each value is drawn is all that counts: there are few where docs are right or wrong.
    values, counts = np.unique(difference - difference.mean(), return_counts=True)
    far = 0
    for part in _parts(RESAMPLES, max(1, 2_000_000 // len(values))):
        means = rng.multinomial(n, counts / n, part) @ values / n
        far += int((abs(means) >= seen).sum())
    return (far + 1) / (RESAMPLES + 1)


def _parts(total: int, most: int):
    while total > 0:
        yield min(total, most)
        total -= most


# --- showing ------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Of figures on any scale: three digits after the point, or two from ten on."""
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _shown(cell: Cell) -> str:
    if cell.value is None:
        return (cell.missing or "-") + "".join(f" [{m}]" for m in cell.marks)
    text = number(cell.value)
    if cell.stderr is not None:
        text += f" ± {cell.stderr:.2g}"
    if cell.p is not None:
        text += f" (p {cell.p:.2g})"
    return text + "".join(f" [{m}]" for m in cell.marks)


def _facts(table: Table, row: str) -> list[str]:
    """What stands before the cells of a row; where cells differ, of the first of them."""
    about = table.about[row]
    low, high = about.get("scale", (0, 0))
    head = about.get("headline", "-")
    scale = f"{low:g} to {high:g}" if table.figure in (None, head) else "-"
    return [
        row,
        table.figure or head,
        scale,
        about.get("cost_class", "-"),
        about.get("judge") or "-",
        f"{about.get('prompt_hash', '-')[:8]}/{about.get('dataset_hash', '-')[:8]}",
    ]


def _counts(table: Table, row: str) -> list[str]:
    """The most docs of a cell, and the least share that could be read."""
    cells = table.rows[row]
    shares = [c.parse_rate for c in cells if c.parse_rate is not None]
    return [str(max((c.n for c in cells), default=0)), f"{min(shares):.1%}" if shares else "-"]


HEAD = ["benchmark", "figure", "scale", "class", "judge", "prompt/data"]
COUNTS = ["n (most)", "read (least)"]


def markdown(table: Table) -> str:
    """Cells and notes."""
    head = [*HEAD, *COUNTS, *table.columns]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row, cells in table.rows.items():
        shown = [*_facts(table, row), *_counts(table, row), *map(_shown, cells)]
        lines.append("| " + " | ".join(s.replace("|", "\\|") for s in shown) + " |")
    notes = [f"[{i}] {text}" for i, text in enumerate(table.notes, 1)]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def comma_separated(table: Table) -> str:
    """One line a cell, numbers in full."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fields = ["value", "stderr", "n", "parse_rate", "p"]
    writer.writerow([*HEAD, "model", *fields, "notes"])
    for row, cells in table.rows.items():
        for column, cell in zip(table.columns, cells):
            notes = "; ".join([cell.missing, *(table.notes[m - 1] for m in cell.marks)]).strip("; ")
            values = ["" if getattr(cell, f) is None else getattr(cell, f) for f in fields]
            writer.writerow([*_facts(table, row), column, *values, notes])
    return out.getvalue()


def page(table: Table, title: str, further: str = "") -> str:
    """The table as a page of its own; `further` is markup that follows it."""
    rows = [[*_facts(table, r), *_counts(table, r), *map(_shown, cells)] for r, cells in table.rows.items()]
    notes = "".join(f"<p class='soft small'>[{i}] {html.escape(n)}</p>" for i, n in enumerate(table.notes, 1))
    body = (
        f"<h1>{html.escape(title)}</h1>"
        + html.table([*HEAD, *COUNTS, *table.columns], rows, words=range(6))
        + notes
    )
    return html.page(title, body + further)
