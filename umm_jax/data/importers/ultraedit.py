"""UltraEdit: edits of pictures with the scores of their automatic filters (arXiv 2407.05282).

    parquet, a row an edit: source_image {"bytes": ...}, edited_image {"bytes": ...}, edit_prompt "...",
    source_caption "...", target_caption "...", and scores: clip_sim_... 0.31, dinov2_sim 0.93, ssim 0.8

A score that a filter asks for must be in the row: one that lacks it is rejected, not passed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, want
from umm_jax.data.quarantine import LeftOut
from umm_jax.errors import ConfigError

VERSION = 1
LICENSE = ""


@dataclass(frozen=True)
class Settings:
    """Which edits are good enough; nothing is asked for unless said.

    Attributes:
        at_least, at_most: bounds by the name of a score, as {"dinov2_sim": 0.9} and {"ssim": 0.98}.
    """

    at_least: dict[str, float] = field(default_factory=dict)
    at_most: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name, bound in (*self.at_least.items(), *self.at_most.items()):
            if not math.isfinite(bound):
                raise ConfigError(f"the bound of {name} is {bound}")


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.parquet",))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """One edit, if its scores are within the bounds."""
    asked = want(entry, "edit_prompt", str)
    for name, bound in settings.at_least.items():
        if not want(entry, name, (int, float)) >= bound:
            raise LeftOut(f"edits with {name} below {bound:g}")
    for name, bound in settings.at_most.items():
        if not want(entry, name, (int, float)) <= bound:
            raise LeftOut(f"edits with {name} above {bound:g}")
    source = draft.image(want(entry, "source_image", (str, bytes, dict)))
    draft.edit(source, asked, draft.image(want(entry, "edited_image", (str, bytes, dict))))
