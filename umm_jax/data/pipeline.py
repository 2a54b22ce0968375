"""From shard folders to batches: read, shuffle, mix, serialize, pack, batch, prefetch, with an exact state.

    per source   shards -> shuffled anew every epoch, endless -> this process's share
    together     mixed by weight -> decoded and serialized -> first fit into rows -> batches -> prefetched
    or           decoded and serialized -> each source cut into rows, see cut_rows -> mixed by weight -> ...

Everything up to packing is random access: element n of the endless order can be read at any time, and what
a serializer draws at random depends on n and the seed alone. So the whole state is a few integers, the next n
and the n of the conversations in half-filled rows (or the n and the token with which the next row of each
source begins), and it does not depend on the number of workers or the depth of prefetching.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from umm_jax.config import DataConfig, SourceConfig
from umm_jax.conversation import Conversation
from umm_jax.data.cut_rows import CutRows, rule
from umm_jax.data.cutting import after_image, fit_document
from umm_jax.data.licenses import check_commercial
from umm_jax.data.packing import ADDED, Batch, Fill, FirstFit, Row, aligned, batch, budget_name, fit, pack_row
from umm_jax.data.reading import COUNTS, read
from umm_jax.data.records import RecordSource, open_source
from umm_jax.errors import ConfigError, DataError
from umm_jax.stream import Stream, StreamSpec, check_stream, stream_length

Serializer = Callable[..., Stream]  # (conversation, rng), with an attribute `spec`


def make_loader(
    data: DataConfig,
    serializer: Serializer,
    *,
    process_index: int = 0,
    process_count: int = 1,
    skip: int = 0,
) -> "Loader":
    """The endless batches of one process.

    Args:
        data: what is read and how; `batch_size` counts rows over all processes.
        serializer: callable with a `spec`; picklable if `data.workers` > 0.
        process_index, process_count: which share of every source this process reads.
        skip: conversations passed over at the start of this process's order (where rows are cut: of each
            source).

    Raises:
        ConfigError: no source, a weight that is not positive, a batch that cannot be split, budgets for other
            axes than the serializer's.
        DataError: a folder that cannot be read. Later, from the iterator: a broken or oversize record.
    """
    if not data.sources:
        raise ConfigError("data.sources is empty; name at least one folder made by `umm data synthesize`")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} of {process_count}")
    if set(data.budget) != set(serializer.spec.axes):
        raise ConfigError(
            f"this family's rows need a budget for {', '.join(serializer.spec.axes)}; data.axes adds "
            f"{', '.join(data.axes) or 'nothing'} to tokens and images"
        )
    if data.packing == "cut" and serializer.spec.more:
        raise ConfigError("data.packing=cut knows tokens and images only; choose first_fit for this family")
    if data.oversize == "smaller" and not hasattr(serializer, "smaller"):
        raise ConfigError(
            "data.oversize=smaller needs a family whose pictures are of several sizes; choose drop, truncate "
            "or oldest"
        )
    if data.batch_size % process_count:
        raise ConfigError(f"data.batch_size {data.batch_size} is not divisible by {process_count} processes")
    parts = []
    for k, source in enumerate(data.sources):
        if source.weight <= 0:
            raise ConfigError(f"data.sources.{k}.weight must be positive, got {source.weight}")
        records, seed = open_source(Path(source.path)), (data.shuffle_seed + 7919 * k) % 2**32
        if data.licenses == "commercial":
            check_commercial(source.path, records.manifest)
        order = grain.MapDataset.range(len(records)).shuffle(seed=seed).repeat()
        # Drawn for each place of the endless order, so that what is drawn differs from epoch to epoch.
        streams = order.random_map(_Streams(records, serializer, data, source), seed=seed)
        # Shares are taken before mixing: the mixture is a fixed pattern, and a share of it could by
        # chance hold one source only.
        parts.append(streams[process_index::process_count])
    rows: grain.IterDataset
    if data.packing == "cut":
        rows = CutRows(parts, serializer.spec, data, (data.shuffle_seed % 2**32, process_index), skip)
    else:
        weights = [source.weight for source in data.sources]
        mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
        rows = _Packed(mixed, serializer.spec, data, skip)
    return Loader(rows, data.batch_size // process_count, data.prefetch)


def plan(data: DataConfig, spec: StreamSpec, process_count: int = 1) -> str:
    """What the input of one process takes, in a line: rows and their budgets, processes, batches ahead."""
    rows = data.batch_size // process_count
    each = 0
    for axis, features in spec.axes.items():
        numbers = (np.dtype(f.dtype).itemsize * math.prod(f.shape) for f in features.values())
        each += data.budget[axis] * (4 * len(ADDED) + sum(numbers))
    budget = ", ".join(f"{room} {axis}" for axis, room in data.budget.items())
    ahead = f"{data.prefetch} batches ahead ({data.prefetch * rows * each / 2**20:.0f} MiB)"
    return f"{rows} rows of {budget}; {data.workers or 'no'} worker processes, {ahead}"


def fill_rates(data: DataConfig, serializer: Serializer, conversations: int) -> dict[str, Any]:
    """How full the rows are that about so many conversations are packed into.

    Returns:
        plain values: rows, conversations_per_row, {axis}_filled for every axis, "binding" the axis that is
        fullest, and what was left out (dropped, truncated, imageless).

    Raises:
        ConfigError, DataError: as :func:`make_loader` and its batches do.
    """
    data = dataclasses.replace(data, batch_size=1, prefetch=1)
    with make_loader(data, serializer) as loader:
        while True:
            next(loader)
            found = loader.stats()
            if found["rows"] * found["conversations_per_row"] >= conversations:
                break
    filled = {name: share for name, share in found.items() if name.endswith("_filled")}
    return {**found, "binding": max(filled, key=filled.get).removesuffix("_filled")}


class Loader(Iterator[Batch]):
    """Batches as nested dicts of numpy arrays, [B, T, ...] and [B, I, ...]; see :mod:`umm_jax.stream`.

    The state counts batches already returned, not those prefetched, and is small and plain JSON.
    """

    def __init__(self, rows: grain.IterDataset, batch_size: int, prefetch: int):
        batches = rows.batch(batch_size, drop_remainder=True, batch_fn=batch)
        prefetched = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
        self._fill = Fill()
        # Held in a list, so that the last reference is gone once closed, and closed at the latest when the
        # interpreter ends: later Grain's own clean-up finds its modules taken down and complains.
        self._live = [iter(prefetched)]
        self._first = self.get_state()
        self._finalizer = weakref.finalize(self, _close, self._live)

    @property
    def _batches(self) -> grain.DatasetIterator:
        if not self._live:
            raise ValueError("this loader is closed")
        return self._live[0]

    def __next__(self) -> Batch:
        result = next(self._batches)
        self._fill.add(result)
        return result

    def get_state(self) -> dict[str, Any]:
        """What :meth:`set_state` needs to go on after the last batch returned, bit for bit."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises DataError if `state` is not one of ours."""
        if not isinstance(state, dict) or set(state) != set(self._first):
            raise DataError(f"not a state of this input pipeline: {str(state)[:80]}")
        if len(state.get("sources", [])) != len(self._first.get("sources", [])):
            raise DataError(f"a state of {len(state['sources'])} sources, data.sources has another number")
        self._batches.set_state(state)

    def stats(self) -> dict[str, float]:
        """Fill rates of the batches returned by this object; what was left out and truncated in all."""
        state = self.get_state()
        return {**self._fill.summary(), **{name: state[name] for name in COUNTS if name in state}}

    def close(self) -> None:
        """Stops the thread and the worker processes."""
        self._finalizer()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _close(live: list[grain.DatasetIterator]) -> None:
    live.pop().close()


class _Streams:
    """Record number -> (stream or None if dropped, truncated), for one source."""

    def __init__(self, source: RecordSource, serializer: Serializer, data: DataConfig, config: SourceConfig):
        self.source, self.serializer = source, serializer
        # Where rows are cut, what comes before an image is known only once the row is made.
        self.after_image = config.text_loss == "after_image" and data.packing != "cut"
        if data.packing == "cut":
            self.fit = partial(
                fit_document, spec=serializer.spec, rule=rule(data, config), oversize=data.oversize
            )
        else:
            self.fit = partial(fit, budget=data.budget, oversize=data.oversize)

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Stream | None, bool]:
        conversation = self.source.conversation(index)
        seed = int(rng.integers(2**63))

        def serialize(conversation: Conversation, share: float = 1.0) -> Stream:
            serializer = self.serializer if share == 1 else self.serializer.smaller(share)
            # The same draws for every beginning of a conversation that is too long.
            return serializer(conversation, np.random.default_rng(seed))

        try:
            stream, truncated = self.fit(conversation, serializer=serialize)
        except DataError as error:
            raise DataError(f"{self.source.where(index)}: {error}") from None
        if stream is not None:
            check_stream(stream, self.serializer.spec)
            if self.after_image:
                stream = after_image(stream, self.serializer.spec)
        return stream, truncated


# --- packing as a Grain dataset -------------------------------------------------------------------

_EMPTY = {"next": 0, "rows": [], "dropped": 0, "truncated": 0}
_PATIENCE = 10_000  # conversations dropped in a row before giving up


class _Packed(grain.IterDataset):
    """Rows made by first fit from an endless random-access dataset."""

    def __init__(self, parent: grain.MapDataset, spec: StreamSpec, data: DataConfig, skip: int):
        super().__init__(parent)
        self.elements, self.spec, self.data, self.skip = parent, spec, data, skip

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(self.elements, self.spec, self.data, self.skip)


class _PackedIterator(grain.DatasetIterator):
    """See the module's first paragraph for the state."""

    def __init__(self, elements: grain.MapDataset, spec: StreamSpec, data: DataConfig, skip: int):
        super().__init__()
        self._elements, self._spec, self._data = elements, spec, data
        self._reader = None
        self.set_state({**_EMPTY, "next": skip})

    def __next__(self) -> Row:
        closed, dropped_in_a_row = None, 0
        while closed is None:
            if self._reader is None:
                self._reader = read(self._elements, self._next, self._data.workers)
            stream, truncated = next(self._reader)
            n, self._next = self._next, self._next + 1
            if stream is None:
                self._dropped += 1
                dropped_in_a_row += 1
                if dropped_in_a_row == _PATIENCE:
                    budget = " or ".join(f"{budget_name(a)}={n}" for a, n in self._data.budget.items())
                    raise DataError(f"{_PATIENCE} conversations in a row exceed {budget}; raise the budget")
                continue
            dropped_in_a_row = 0
            self._truncated += truncated
            closed = self._open.add((n, stream), self._taken(stream))
        return pack_row([stream for _, stream in closed], self._spec, self._data.budget, self._data.align)

    def get_state(self) -> dict[str, Any]:
        return {
            "next": self._next,
            "rows": [[n for n, _ in row] for row in self._open.rows],
            "dropped": self._dropped,
            "truncated": self._truncated,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop_reading()
        self._next, self._dropped, self._truncated = state["next"], state["dropped"], state["truncated"]
        bins = self._data.packing_bins if self._data.packing == "first_fit" else 0
        self._open = FirstFit(self._data.budget, bins)
        self._open.restore([[self._again(n) for n in row] for row in state["rows"]])

    def _again(self, n: int) -> tuple[tuple[int, Stream], dict[str, int]]:
        stream, _ = self._elements[n]
        return (n, stream), self._taken(stream)

    def _taken(self, stream: Stream) -> dict[str, int]:
        return aligned(stream_length(stream), self._data.align)

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def close(self) -> None:
        super().close()
        self._stop_reading()
