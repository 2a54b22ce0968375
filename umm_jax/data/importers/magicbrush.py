"""MagicBrush: edits by hand of photographs, several in a row (arXiv 2306.10012).

    parquet, a row a turn: img_id "242679", turn_index 1, source_img {"bytes": ...}, mask_img {"bytes": ...},
    instruction "let the asparagus be replaced with sausages", target_img {"bytes": ...}

Rows that follow one another with the same img_id are one dialogue. The source of a turn must be of the size
of the target before it; whether it is that very picture is not checked, since it may be encoded anew. Masks
are not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, want
from umm_jax.data.quarantine import Rejected
from umm_jax.errors import ConfigError

VERSION = 1
LICENSE = ""


@dataclass(frozen=True)
class Settings:
    """How long dialogues are.

    Attributes:
        max_turns: edits of a dialogue; the rest of its rows is not used.
    """

    max_turns: int = 8

    def __post_init__(self):
        if self.max_turns < 1:
            raise ConfigError(f"max_turns must be positive, it is {self.max_turns}")


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.parquet",), group="img_id")


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The first source, and all edits of it in their order."""
    rows = want(entry, "rows", list)
    rows = sorted(rows, key=lambda row: want(row, "turn_index", int))
    numbers = [row["turn_index"] for row in rows]
    if numbers != list(range(1, len(rows) + 1)):
        raise Rejected("turns out of order", f"turn_index of one picture is {numbers}, expected 1, 2, ...")
    size = None
    for k, row in enumerate(rows[: settings.max_turns]):
        asked = want(row, "instruction", str)
        source = draft.image(want(row, "source_img", (str, bytes, dict)))
        if k and draft.size(source) != size:
            cause = f"turn {k + 1} begins with {draft.size(source)} pixels, turn {k} ended with {size}"
            raise Rejected("broken chain of edits", cause)
        target = draft.image(want(row, "target_img", (str, bytes, dict)))
        size = draft.size(target)
        draft.edit(source if k == 0 else None, asked, target)
