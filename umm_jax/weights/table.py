"""One declarative table between a PyTorch state dict and our parameters, used in both directions.

A row says which tensor is which part of which parameter, and how it is turned::

    Rule("mm_decoder.layers.3.mlp.up_proj.weight", "backbone/layers/mlp/up/kernel[3]", "linear")

Layers that lie stacked in one parameter are addressed by an index behind the path, which may hold numbers and
ranges: ``[3]``, ``[0:32000]``, ``[:,0:32000]``. Turning is one of the closed set :data:`TURNS`, each with
its inverse, so that going there and back gives the same bits. What is no parameter of ours is a row too: a
:class:`Constant` is computed, compared when it is read, and written again; an :class:`Unused` tensor is left
out for a reason. Nothing is ignored in silence: see :meth:`Table.check`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from umm_jax.errors import CheckpointError, ConfigError

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]


class Turn(NamedTuple):
    """How a tensor of theirs becomes ours, and back; both only move axes or rename shapes."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


TURNS: dict[str, Turn] = {
    "same": Turn(lambda a: a, lambda a: a),
    # torch Linear [out, in] and a kernel [in, out].
    "linear": Turn(lambda a: a.T, lambda a: a.T),
    # A 1x1 convolution [out, in, 1, 1] that we hold as a linear layer [in, out].
    "linear_1x1": Turn(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),
    # torch Conv2d [out, in, h, w] and HWIO.
    "conv": Turn(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    # A transposed 2x2 convolution of stride 2 [in, out, 2, 2], held as a linear layer to four pixels.
    "unfold_2x2": Turn(
        lambda a: a.transpose(0, 2, 3, 1).reshape(a.shape[0], -1),
        lambda a: a.reshape(a.shape[0], 2, 2, -1).transpose(0, 3, 1, 2),
    ),
    # The same [in, out, 2, 2], held as [in, 2, 2, out].
    "transposed": Turn(lambda a: a.transpose(0, 2, 3, 1), lambda a: a.transpose(0, 3, 1, 2)),
    # [1, ...] and [...].
    "first": Turn(lambda a: a[0], lambda a: a[None]),
    # [1, 1, 1, n] and [n].
    "vector": Turn(lambda a: a[0, 0, 0], lambda a: a[None, None, None]),
}


@dataclass(frozen=True)
class Rule:
    """Tensor `theirs` is `ours`, a path with an index behind it where it is a part, after the turn `how`."""

    theirs: str
    ours: str
    how: str = "same"

    @property
    def path(self) -> str:
        return self.ours.partition("[")[0]

    @property
    def index(self) -> Index:
        """What of the parameter it is; () is all of it."""
        return parse_index(self.ours)


@dataclass(frozen=True)
class Constant:
    """A tensor of theirs that we compute: made by `value`, compared to `tolerance` (absolute) when read.

    An older or stock checkpoint may lack it where it is `optional`.
    """

    theirs: str
    value: Callable[[], np.ndarray]
    tolerance: float = 1e-5
    optional: bool = True


@dataclass(frozen=True)
class Unused:
    """Tensors whose names match `pattern` in full are left out, because of `why`."""

    pattern: str
    why: str


@dataclass(frozen=True)
class Fresh:
    """A part of our parameters that no tensor gives; `value` makes it, None leaves it to the seed."""

    ours: str
    value: Callable[[Shape], np.ndarray] | None
    why: str


@dataclass(frozen=True)
class Table:
    """All rows of one checkpoint layout.

    Attributes:
        rules: tensors that are parameters; constants: those that are computed.
        unused: tensors left out; fresh: our parameters that no tensor gives.
        aliases: (regular expression, replacement) applied to the names found in a checkpoint: what older
            versions of a library called a tensor.
    """

    rules: tuple[Rule, ...]
    constants: tuple[Constant, ...] = ()
    unused: tuple[Unused, ...] = ()
    fresh: tuple[Fresh, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def canonical(self, name: str) -> str:
        """The name of a tensor with its alias resolved."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def reason(self, name: str) -> str | None:
        """Why tensor `name` is left out, or None when it is not."""
        return next((u.why for u in self.unused if re.fullmatch(u.pattern, name)), None)

    def theirs(self, ours: Mapping[str, Shape]) -> dict[str, Shape]:
        """{name: shape} of every tensor the table makes of parameters of the shapes `ours`, in its order."""
        found = {r.theirs: _turned_shape(r, ours[r.path]) for r in self.rules}
        return found | {c.theirs: c.value().shape for c in self.constants}

    def fill(self, ours: Mapping[str, Shape], read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        """{path: array} of every parameter, from tensors that `read` gives by name: for models that fit in
        memory twice. Constants are not looked at."""
        made: dict[str, np.ndarray] = {}
        for rule in self.rules:
            part = TURNS[rule.how].ours(np.asarray(read(rule.theirs)))
            if rule.index == ():
                made[rule.path] = part
            else:
                if rule.path not in made:
                    made[rule.path] = np.zeros(ours[rule.path], part.dtype)
                made[rule.path][rule.index] = part
        return made

    def check(self, ours: Mapping[str, Shape]) -> None:
        """Every element of every parameter is made exactly once, and every name stands once.

        Raises:
            ValueError: a mistake in the table, with the paths concerned.
        """
        names = [r.theirs for r in self.rules] + [c.theirs for c in self.constants]
        twice = (
            sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        )
        if twice:
            raise ValueError(f"tensors named twice: {', '.join(twice[:5])}")
        parts: dict[str, list[Index]] = {}
        for row in (*self.rules, *self.fresh):
            path = row.ours.partition("[")[0]
            parts.setdefault(path, []).append(parse_index(row.ours))
        missing, unknown = sorted(set(ours) - set(parts)), sorted(set(parts) - set(ours))
        if missing or unknown:
            raise ValueError(f"no row makes {missing[:5]}; rows for what the model has not: {unknown[:5]}")
        for path, indices in parts.items():
            if not _covers(indices, ours[path]):
                raise ValueError(f"{path} {ours[path]}: its rows {indices[:5]} do not make each element once")


def _covers(indices: Sequence[Index], shape: Shape) -> bool:
    """Whether the parts at `indices` make up an array of `shape`, each element once."""
    if all(len(i) == 1 and isinstance(i[0], int) for i in indices):
        return sorted(i[0] for i in indices) == list(range(shape[0]))
    if len(indices) == 1 and indices[0] == ():
        return True
    count = np.zeros(shape, np.int8)
    for index in indices:
        count[index] += 1
    return bool((count == 1).all())


def parse_index(ours: str) -> Index:
    """The index behind a path: "a/b[3]" -> (3,), "a/b[:,0:7]" -> (slice(None), slice(0, 7)), "a/b" -> ()."""
    _, bracket, text = ours.partition("[")
    if not bracket:
        return ()

    def one(part: str) -> int | slice:
        if ":" not in part:
            return int(part)
        return slice(*(int(p) if p else None for p in part.split(":")))

    return tuple(one(part) for part in text.rstrip("]").split(","))


def _turned_shape(rule: Rule, ours: Shape) -> Shape:
    # A view with strides of zero: turning it tells the shape and costs nothing.
    part = np.broadcast_to(np.zeros((), bool), ours)[rule.index]
    return TURNS[rule.how].theirs(part).shape


class Mismatch(NamedTuple):
    """One way in which a checkpoint does not fit: "missing", "extra" or "shape"."""

    kind: str
    name: str
    expected: Shape | None
    found: Shape | None

    def __str__(self) -> str:
        if self.kind == "missing":
            return f"{self.name} is missing (expected {list(self.expected)})"
        if self.kind == "extra":
            return f"{self.name} {list(self.found)} is not known"
        return f"{self.name} is {list(self.found)}, expected {list(self.expected)}"


def compare(table: Table, ours: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[Mismatch]:
    """Where the tensors `found` ({canonical name: shape}) differ from what `table` reads, if anywhere."""
    expected = table.theirs(ours)
    optional = {c.theirs for c in table.constants if c.optional}
    wrong = []
    for name, shape in expected.items():
        if name not in found:
            if name not in optional:
                wrong.append(Mismatch("missing", name, shape, None))
        elif tuple(found[name]) != tuple(shape):
            wrong.append(Mismatch("shape", name, shape, tuple(found[name])))
    for name, shape in found.items():
        if name not in expected and table.reason(name) is None:
            wrong.append(Mismatch("extra", name, None, tuple(shape)))
    return wrong


def require_fit(table: Table, ours: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Raises CheckpointError, naming the first tensors that do not fit, when :func:`compare` finds any."""
    wrong = compare(table, ours, found)
    if wrong:
        shown = "; ".join(map(str, wrong[:5]))
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors do not fit this model: {shown}{more}. Nothing was written; check "
            "that the config has the checkpoint's sizes"
        )


def require(what: str, found: Mapping[str, tuple[Any, Any]]) -> None:
    """Holds a config against what a checkpoint's layout can name: {field: (value, the one there is)}.

    Raises:
        ConfigError: another value; says which `what` has.
    """
    for name, (value, needed) in found.items():
        if value != needed:
            raise ConfigError(f"config.model.{name} is {value!r}: {what} has {needed!r} and nothing else")
