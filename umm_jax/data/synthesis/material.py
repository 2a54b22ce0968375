"""What dialogues are composed of: the records of some folders, taken apart, and what of them can be moved."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from umm_jax.data.records import open_source
from umm_jax.data.synthesis.exchanges import Exchange, Picture, chain_of
from umm_jax.errors import DataError

# Talk for dialogues whose records have none: a sum is nobody's property, and has no picture in it.
_SUMS = ("what is {a} plus {b}", "how much is {a} plus {b}", "please add {a} and {b}")


class Material:
    """Chains of exchanges by number, and single exchanges by kind; deterministic, and picklable for workers.

    Args:
        folders: finished folders of records; dialogues alone are of use.
        split: the records of this split, others are passed over, so that nothing leaks from one to another.

    Raises:
        DataError: nothing of use in them.
    """

    def __init__(self, folders: Sequence[str | Path], split: str = "train"):
        self.sources = [open_source(folder) for folder in folders]
        self.chains: list[tuple[int, int]] = []  # (folder, record)
        self.singles: dict[str, list[tuple[int, int, int]]] = {}  # kind: (folder, record, exchange)
        self.about: dict[str, list[tuple[int, int, int]]] = {}  # picture: what is said of it
        self.drawn: dict[str, list[tuple[int, int, int]]] = {}  # picture: what it was drawn for
        for f, source in enumerate(self.sources):
            for r, record in enumerate(source):
                if record.split != split:
                    continue
                chain = chain_of(record)
                if chain and chain[0].pictures:
                    self.chains.append((f, r))
                for e, exchange in enumerate(chain):
                    if not exchange.stands_alone:
                        continue
                    self.singles.setdefault(_kind(exchange), []).append((f, r, e))
                    if exchange.about is not None:
                        self.about.setdefault(exchange.about.key, []).append((f, r, e))
                    elif exchange.op == "draw" and len(exchange.pictures) == 1:
                        self.drawn.setdefault(exchange.pictures[0].key, []).append((f, r, e))
        if not self.chains:
            where = ", ".join(str(folder) for folder in folders)
            raise DataError(
                f"{where}: no dialogues of split {split!r} with a picture, so nothing to compose from"
            )

    def __len__(self) -> int:
        return len(self.chains)

    def chain(self, index: int) -> tuple[list[Exchange], str, str]:
        """The exchanges of record `index`, its source and its license."""
        folder, record = self.chains[index]
        found = self.sources[folder].conversation(record)
        return chain_of(found), found.source, found.license

    def of(
        self, picture: Picture, rng: random.Random, told: Sequence[Exchange]
    ) -> tuple[Exchange, str] | None:
        """What another record says or makes of a picture, and its licence; nothing of `told` again."""
        return self._joined(self.about, picture, rng, told)

    def request(
        self, picture: Picture, rng: random.Random, told: Sequence[Exchange]
    ) -> tuple[Exchange, str] | None:
        """What a picture was drawn for, and its licence; None where the data does not say."""
        return self._joined(self.drawn, picture, rng, told)

    def _joined(self, index, picture, rng, told) -> tuple[Exchange, str] | None:
        places = index.get(picture.key, ())
        said = {e.said for e in told if picture.key in {p.key for p in (e.about, *e.pictures) if p}}
        for folder, record, at in rng.sample(places, min(len(places), 8)):
            found = self.sources[folder].conversation(record)
            exchange = chain_of(found)[at]
            if exchange.said not in said:
                return exchange, found.license
        return None

    def single(self, kind: str, rng: random.Random, avoid: set[str]) -> tuple[Exchange, str] | None:
        """An exchange that stands alone, with its licence: "talk", "question", "draw", "edit" or "story".

        A picture it is about comes with it. None where there is none that shows no picture of `avoid`.
        """
        if kind == "talk" and not self.singles.get("talk"):
            a, b = rng.randrange(1, 50), rng.randrange(1, 50)
            said = rng.choice(_SUMS).format(a=a, b=b)
            return Exchange("chat", said, (str(a + b),), role="distractor", source="sums"), "CC0-1.0"
        places = self.singles.get(kind, ())
        for _ in range(8 if places else 0):
            folder, record, at = rng.choice(places)
            found = self.sources[folder].conversation(record)
            exchange = chain_of(found)[at]
            if exchange.about is not None and exchange.about not in exchange.brings:
                exchange = replace(exchange, brings=(exchange.about,))
            if not {picture.key for picture in exchange.pictures} & avoid:
                return replace(exchange, role="distractor"), found.license
        return None


def _kind(exchange: Exchange) -> str:
    if len(exchange.pictures) - len(exchange.brings) > 1:
        return "story"  # or steps: an answer of several pictures
    match exchange.op:
        case "draw" | "edit":
            return exchange.op
        case "chat":
            return "talk"
    return "question"


def keys(exchanges: Sequence[Exchange]) -> set[str]:
    """Of all pictures they show."""
    return {picture.key for exchange in exchanges for picture in exchange.pictures}


def distinct(exchanges: Sequence[Exchange]) -> list[Picture]:
    """The pictures they show, each once, in the order in which they are first shown."""
    return list({picture.key: picture for exchange in exchanges for picture in exchange.pictures}.values())
