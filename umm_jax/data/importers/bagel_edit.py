"""Chains of edits as BAGEL reads them: a list of pictures, and alternatives for each step between.

    parquet, a row a chain: image_list [bytes, bytes, bytes], instruction_list [["add a hat", "..."], ["..."]]

Of n pictures there are n - 1 lists of instructions, one of which is drawn. BAGEL trains on windows of two or
three pictures, and joins the two instructions of half of the latter; by default here a chain stays whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, fraction, want, want_strings
from umm_jax.data.quarantine import Rejected
from umm_jax.errors import ConfigError

VERSION = 1
LICENSE = ""


@dataclass(frozen=True)
class Settings:
    """What is taken of a chain.

    Attributes:
        window: pictures of a part drawn at random; null is the whole chain.
        join: share of chains whose first two instructions become one, ". " between, without their picture.
    """

    window: int | None = None
    join: float = 0.0

    def __post_init__(self):
        fraction("join", self.join)
        if self.window is not None and self.window < 2:
            raise ConfigError(f"window must be at least 2 pictures, it is {self.window}")


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.parquet",))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The chain as a dialogue: each edit is about the picture before it."""
    pictures, choices = want(entry, "image_list", list), want(entry, "instruction_list", list)
    if len(pictures) != len(choices) + 1 or not choices:
        cause = f"{len(pictures)} pictures and {len(choices)} lists of instructions"
        raise Rejected("unequal pictures and instructions", cause)
    asked = []
    for k in range(len(choices)):
        found = want_strings({f"instruction_list[{k}]": choices[k]}, f"instruction_list[{k}]")
        if not found:
            raise Rejected("empty turn", f"instruction_list[{k}] has no instructions")
        asked.append(found[rng.integers(len(found))])
    if settings.window is not None and settings.window < len(pictures):
        first = int(rng.integers(len(pictures) - settings.window + 1))
        pictures = pictures[first : first + settings.window]
        asked = asked[first : first + settings.window - 1]
    if len(asked) > 1 and rng.random() < settings.join:
        asked = [f"{asked[0]}. {asked[1]}", *asked[2:]]
        pictures = [pictures[0], *pictures[2:]]
    shown = [draft.image(picture) for picture in pictures]
    for k, words in enumerate(asked):
        draft.edit(shown[0] if k == 0 else None, words, shown[k + 1])
