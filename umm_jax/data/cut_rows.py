"""Rows cut from documents as a Grain dataset with an exact state; the rules are those of ``data.cutting``.

Every source has rows of its own, and the rows are mixed. Documents follow one another without end, the first
of an epoch after the last of the one before: no row is ever left incomplete.
"""

from functools import partial
from typing import Any

import grain
import numpy as np

from umm_jax.config import DataConfig, SourceConfig
from umm_jax.data.cutting import MERGED, Cutter, Piece, Rule, after_image, merged
from umm_jax.data.packing import Row, pack_row
from umm_jax.data.reading import COUNTS, read
from umm_jax.errors import DataError
from umm_jax.stream import StreamSpec, stream_length

_PATIENCE = 10_000  # documents dropped, or rows without an image, in a row before giving up


def rule(data: DataConfig, source: SourceConfig) -> Rule:
    """Where the rows of a source end."""
    return Rule(data.tokens, source.images or data.images, source.cut)


class CutRows(grain.IterDataset):
    """Rows cut from endless random-access datasets, one a source, in random order by weight."""

    def __init__(self, parents: list[grain.MapDataset], spec: StreamSpec, data: DataConfig, seed, skip: int):
        super().__init__(parents)
        self.make = partial(_CutIterator, parents, spec, data, seed, skip)

    def __iter__(self) -> "_CutIterator":
        return self.make()


class _CutIterator(grain.DatasetIterator):
    """The state: rows returned, counts, and for each source where its next row begins, see _Source."""

    def __init__(self, parts: list[grain.MapDataset], spec: StreamSpec, data: DataConfig, seed, skip: int):
        super().__init__()
        workers = -(-data.workers // len(parts))
        self._sources = [
            _Source(part, spec, data, source, workers, (*seed, k))
            for k, (part, source) in enumerate(zip(parts, data.sources))
        ]
        self._seed, total = tuple(seed), sum(source.weight for source in data.sources)
        self._shares = [source.weight / total for source in data.sources]
        places = [[skip, 0, skip] for _ in parts]
        self.set_state({"row": 0, "sources": places, **dict.fromkeys(COUNTS, 0)})

    def __next__(self) -> Row:
        # Drawn anew for every row, so that a position needs no state of a generator.
        chosen = np.random.default_rng((*self._seed, self._row)).choice(len(self._shares), p=self._shares)
        row = self._sources[chosen].row(self._counts)
        self._row += 1
        return row

    def get_state(self) -> dict[str, Any]:
        return {"row": self._row, "sources": [source.place for source in self._sources], **self._counts}

    def set_state(self, state: dict[str, Any]) -> None:
        self._row, self._counts = state["row"], {name: state[name] for name in COUNTS}
        for source, place in zip(self._sources, state["sources"]):
            source.go_to(place)

    def close(self) -> None:
        super().close()
        for source in self._sources:
            source.stop_reading()


class _Source:
    """The rows of one source. Its place: the document and the token with which the next row begins, and the
    first document not yet counted as dropped or truncated."""

    def __init__(
        self,
        elements: grain.MapDataset,
        spec: StreamSpec,
        data: DataConfig,
        source: SourceConfig,
        workers: int,
        seed,
    ):
        self._elements, self._spec, self._data, self._source = elements, spec, data, source
        self._workers, self._seed = workers, seed
        self._rule = rule(data, source)
        self._reader = None

    @property
    def place(self) -> list[int]:
        return [*(self._cutter.place or (self._next, self._start)), self._counted]

    def go_to(self, place: list[int]) -> None:
        self.stop_reading()
        self._next, self._start, self._counted = place
        self._cutter = Cutter(self._spec, self._rule)

    def row(self, counts: dict[str, int]) -> Row:
        """The next row that holds an image."""
        for _ in range(_PATIENCE):
            self._fill(counts)
            n, start, _ = self.place
            pieces = self._cutter.row()
            if any(stream_length(piece.stream)["images"] for piece in pieces):
                return self._packed(pieces, (n, start))
            counts["imageless"] += 1
        raise DataError(
            f"{self._source.path}: {_PATIENCE} rows in a row hold no image; cutting is for documents with"
        )

    def _packed(self, pieces: list[Piece], begins: tuple[int, int]) -> Row:
        streams = [piece.stream for piece in pieces]
        rng = np.random.default_rng((*self._seed, *begins))
        if rng.random() < self._source.merge and self._data.compat != "release":
            streams = merged(pieces, self._spec, int(rng.integers(MERGED[0], MERGED[1] + 1)))
        if self._source.text_loss == "after_image":
            # Only now: an image may lie in the row before, or in the document merged in front of this one.
            streams = [after_image(stream, self._spec) for stream in streams]
        return pack_row(streams, self._spec, self._data.budget)

    def _fill(self, counts: dict[str, int]) -> None:
        dropped_in_a_row = 0
        while not self._cutter.full:
            if self._reader is None:
                self._reader = read(self._elements, self._next, self._workers)
            stream, truncated = next(self._reader)
            n, self._next = self._next, self._next + 1
            if n >= self._counted:
                self._counted = n + 1
                counts["dropped"] += stream is None
                counts["truncated"] += truncated
            dropped_in_a_row = dropped_in_a_row + 1 if stream is None else 0
            if dropped_in_a_row == _PATIENCE:
                raise DataError(
                    f"{_PATIENCE} documents in a row exceed data.tokens={self._data.tokens}; raise it"
                )
            if stream is not None:
                self._cutter.add(n, stream, self._start)
            self._start = 0

    def stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
