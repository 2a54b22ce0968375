"""A compiled program, read from its text: what is executed how often, and what moves.

The compiler's own ``cost_analysis()`` counts the body of a loop once, so that the figures of a model whose
layers are scanned are those of one layer. Here the text of the scheduled program is walked from its entry,
and whatever stands in a loop counts as often as the loop turns. See docs/plan.md for what is read and how far
it can be trusted.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from umm_jax.errors import UserError

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation|"
    r"called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Array:
    """An array's element type, shape, and the memory it lies in (0 is the chip's main one)."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return (self.elements * bits(self.dtype) + 7) // 8


def bits(dtype: str) -> int:
    """Of an element type as the text spells it: f32, bf16, s4, f8e4m3fn, pred."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        arrays: what it gives; several for a tuple.
        operands: names of what it takes. text: what stands within its parentheses. rest: what follows them.
        root: whether it is what its computation gives.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    rest: str
    root: bool = False

    @property
    def cycles(self) -> int | None:
        """The compiler's own estimate, where it made one."""
        found = re.search(r'"estimated_cycles":"(-?\d+)"', self.rest)
        return int(found[1]) if found else None

    @property
    def results(self) -> tuple[Array, ...]:
        """`arrays`, without the operands that what begins an operation names beside them."""
        if not self.opcode.endswith("-start") or len(self.arrays) < 2:
            return self.arrays
        at = {"copy-start": slice(0, 1), "collective-permute-start": slice(1, 2)}
        return self.arrays[at.get(self.opcode, slice(len(self.arrays) // 2, None))]

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program, such as ``jit(step)/jvp()/while/body/dot_general``."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found[1] if found else ""

    @property
    def frame(self) -> int | None:
        """The number of its stack frame, see :meth:`Program.source`."""
        found = re.search(r"stack_frame_id=(\d+)", self.rest)
        return int(found[1]) if found else None

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """{attribute: names of computations}."""
        found: dict[str, tuple[str, ...]] = {}
        for key, names in _CALLED.findall(_without_strings(self.rest)):
            found[key] = tuple(name.strip().lstrip("%") for name in names.strip("{}").split(","))
        return found


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {one.name: one for one in self.instructions}

    @property
    def root(self) -> Instruction:
        return next((one for one in self.instructions if one.root), self.instructions[-1])


@dataclass(frozen=True)
class Collective:
    """A collective operation, and how often it is executed.

    Attributes:
        kind: one of COLLECTIVES. groups: lists of devices that act together, int [G, D].
        bytes: of its result, or its operand where that is larger. moved: what a device sends in a ring.
    """

    name: str
    kind: str
    bytes: int
    moved: int
    groups: np.ndarray = field(repr=False)
    count: int
    op_name: str = ""
    source: str = ""


class Unreadable(UserError):
    """The text holds what this reader does not know."""


@dataclass
class Program:
    """The text of a compiled module.

    Attributes:
        computations: by name. entry: the name of the first.
        unknown_loops: loops whose turns could not be read; they are counted once, and a report must say so.
    """

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    unknown_loops: list[str] = field(default_factory=list)

    # --- how often ----------------------------------------------------------------------------------

    @cached_property
    def _calls(self) -> dict[tuple[str, str], int]:
        """{(computation, name of its caller): how often it is executed so}."""
        times: dict[tuple[str, str], int] = defaultdict(int)

        def visit(name: str, caller: str, count: int):
            times[name, caller] += count
            for one in self.computations[name].instructions:
                for key, called in one.called.items():
                    turns = 1
                    if one.opcode == "while" and key in ("body", "condition"):
                        turns = self.turns(one)
                    for other in called:
                        if other in self.computations and not _is_scalar_rule(one, key):
                            visit(other, _full_name(one.op_name, caller), count * turns)

        visit(self.entry, "", 1)
        return dict(times)

    @cached_property
    def executed(self) -> dict[str, int]:
        """{computation: how often it is executed}, what is fused into others included.

        Of the branches of a conditional each is counted: which is taken is not known.
        """
        times: dict[str, int] = defaultdict(int)
        for (name, _), count in self._calls.items():
            times[name] += count
        return dict(times)

    def turns(self, loop: Instruction) -> int:
        """How often a `while` turns: what the compiler says, else the bound its condition compares with."""
        said = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if said:
            return int(said[1])
        found = self._bound(self.computations[loop.called["condition"][0]])
        if found is None:
            if loop.name not in self.unknown_loops:
                self.unknown_loops.append(loop.name)
            return 1
        return found

    def _bound(self, condition: Computation) -> int | None:
        compares = [one for one in condition.instructions if one.opcode == "compare"]
        inside = condition
        if not compares and condition.root.opcode == "fusion":
            inside = self.computations[condition.root.called["calls"][0]]
            compares = [one for one in inside.instructions if one.opcode == "compare"]
        if len(compares) != 1 or "direction=LT" not in compares[0].rest:
            return None
        # The counter begins at zero and goes by one in every loop that jax or the partitioner make.
        for operand in compares[0].operands:
            found = self._constant(inside, operand, condition)
            if found is not None:
                return found
        return None

    @staticmethod
    def _constant(inside: Computation, name: str, outside: Computation) -> int | None:
        one = inside.by_name.get(name)
        if one is not None and one.opcode == "parameter" and outside is not inside:
            one = outside.by_name.get(outside.root.operands[int(one.text)])
        while one is not None and one.opcode in ("copy", "bitcast", "convert"):
            one = outside.by_name.get(one.operands[0])
        if one is None or one.opcode != "constant" or one.arrays[0].dtype[0] not in "su":
            return None
        return int(one.text)

    # --- what is executed ---------------------------------------------------------------------------

    def each(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that is executed, with its computation and how often."""
        for name, count in self.executed.items():
            for one in self.computations[name].instructions:
                yield self.computations[name], one, count

    def scheduled(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """As :meth:`each`, without what lies inside of fusions: what the device is told, one by one."""
        inside = {
            name
            for computation in self.computations.values()
            for one in computation.instructions
            if one.opcode in ("fusion", "custom-call", "reduce", "sort", "scatter", "map")
            for names in one.called.values()
            for name in names
        }
        for computation, one, count in self.each():
            if computation.name not in inside:
                yield computation, one, count

    @cached_property
    def flops(self) -> int:
        """Of products of matrices and convolutions, as often as they are executed."""
        return sum(self.flops_by_name().values())

    def flops_by_name(self) -> dict[str, int]:
        """{op_name, with those of its callers where it does not have them: FLOPs} of the same."""
        found: dict[str, int] = defaultdict(int)
        for (name, caller), count in self._calls.items():
            computation = self.computations[name]
            for one in computation.instructions:
                if one.opcode in ("dot", "convolution"):
                    found[_full_name(one.op_name, caller)] += count * _flops(one, computation)
        return dict(found)

    @cached_property
    def cycles(self) -> int:
        """The sum of the compiler's estimates, as often as each is executed.

        Those of Pallas kernels and of communication are not among them.
        """
        return sum(self.cycles_by_name().values())

    def cycles_by_name(self) -> dict[str, int]:
        """{op_name: cycles} of the same."""
        found: dict[str, int] = defaultdict(int)
        for _, one, count in self.scheduled():
            if one.cycles:
                found[one.op_name] += count * one.cycles
        return dict(found)

    def traffic_by_name(self) -> dict[str, int]:
        """{op_name: bytes} that fusions, kernels and products read from and write to the chip's memory.

        Each counts what it takes and gives in full, though it may read a part of it only.
        """
        found: dict[str, int] = defaultdict(int)
        for computation, one, count in self.scheduled():
            if one.opcode not in ("fusion", "convolution", "dot", "custom-call", "reduce", "sort", "scatter"):
                continue
            taken = [
                a for n in one.operands if n in computation.by_name for a in computation.by_name[n].arrays
            ]
            found[one.op_name] += count * sum(a.bytes for a in (*taken, *one.arrays) if a.space == 0)
        return dict(found)

    def custom_calls(self) -> dict[str, int]:
        """{target: how often} of the calls that leave the compiler's own code."""
        found: dict[str, int] = defaultdict(int)
        for _, one, count in self.each():
            if one.opcode == "custom-call":
                found[one.target] += count
        return dict(found)

    def collectives(self) -> list[Collective]:
        """Each once, however many fusions its parts were spread over, largest movement first."""
        found: dict[tuple[str, str], Collective] = {}
        for computation, one, count in self.each():
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", one.rest)
            key = (kind, channel[1] if channel else one.name)
            if key in found and found[key].count >= count:
                continue
            groups = _groups(one)
            size = groups.shape[1]
            given = sum(a.bytes for n in one.operands for a in computation.by_name[n].arrays)
            taken = sum(a.bytes for a in one.results)
            large = max(given, taken)
            found[key] = Collective(
                one.name, kind, large, _moved(kind, large, size), groups, count, one.op_name, self.source(one)
            )
        return sorted(found.values(), key=lambda c: -c.moved * c.count)

    def source(self, one: Instruction) -> str:
        """``file:line`` of the innermost frame of ours, or of the first there is."""
        number, first = one.frame, ""
        while number in self.frames:
            file, line, parent = self.frames[number]
            first = first or f"{file}:{line}"
            if "/umm_jax/" in file:
                return f"{file[file.rindex('umm_jax/') :]}:{line}"
            if parent == number:
                break
            number = parent
        return first


# --- the text --------------------------------------------------------------------------------------------


def parse(text: str) -> Program:
    """Reads what ``compiled.as_text()`` gives.

    Raises:
        Unreadable: it has no entry.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    header: list[str] = []
    for line in text.splitlines():
        if not name:
            found = _HEAD.match(line)
            if found is None:
                header.append(line)
                continue
            name, lines = found[2], []
            entry = name if found[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(lines))
            name = ""
        elif " = " in line:
            lines.append(_instruction(line))
    if not entry:
        raise Unreadable("no entry computation: this is not the text of a compiled program")
    return Program(computations, entry, _frames(header))


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    root = left.startswith("ROOT ")
    kind, after = _split_type(right)
    opcode, after = after.split("(", 1)
    inner, rest = _balanced(after)
    return Instruction(
        left.removeprefix("ROOT ").lstrip("%"),
        opcode.strip(),
        _arrays(kind),
        tuple(re.findall(r"%([\w.\-]+)", inner) or re.findall(r"[\w.\-]+", inner)),
        inner,
        rest,
        root,
    )


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        kind, rest = text.split(" ", 1)
        return kind, rest
    inner, rest = _balanced(text[1:])
    return inner, rest.lstrip()


def _balanced(text: str) -> tuple[str, str]:
    """(what stands before the parenthesis that closes, what follows it)."""
    depth, quoted = 0, False
    for k, c in enumerate(text):
        if c == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif c == "(":
            depth += 1
        elif c == ")":
            if depth == 0:
                return text[:k], text[k + 1 :]
            depth -= 1
    raise Unreadable(f"a line without its end: {text[:80]}")


def _arrays(text: str) -> tuple[Array, ...]:
    found = []
    for dtype, shape, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text)):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(n.removeprefix("<=")) for n in shape.split(",") if n)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _without_strings(text: str) -> str:
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)


def _full_name(op_name: str, caller: str) -> str:
    """Before functions are put in line, names of what they hold begin at the function."""
    return op_name if not caller or op_name.startswith(caller.split("/")[0]) else f"{caller}/{op_name}"


def _is_scalar_rule(one: Instruction, key: str) -> bool:
    """Whether what is called combines two numbers: its cost is that of the caller."""
    return key == "to_apply" and one.opcode not in ("call", "async-start")


def _frames(header: Sequence[str]) -> dict[int, tuple[str, int, int]]:
    """{frame: (file, line, parent)} of the tables in front of the program."""
    tables: dict[str, dict[int, str]] = defaultdict(dict)
    table = ""
    for line in header:
        if re.fullmatch(r"FileNames|FunctionNames|FileLocations|StackFrames", line.strip()):
            table = line.strip()
        elif table and (found := re.match(r"(\d+) (.*)", line)):
            tables[table][int(found[1])] = found[2]
    files = {n: text.strip('"') for n, text in tables["FileNames"].items()}
    places = {}
    for n, text in tables["FileLocations"].items():
        values = dict(re.findall(r"(\w+)=(\d+)", text))
        places[n] = files.get(int(values.get("file_name_id", 0)), ""), int(values.get("line", 0))
    frames = {}
    for n, text in tables["StackFrames"].items():
        values = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", text)}
        frames[n] = (
            *places.get(values.get("file_location_id", 0), ("", 0)),
            values.get("parent_frame_id", n),
        )
    return frames


# --- what an operation costs -------------------------------------------------------------------------------


def _flops(one: Instruction, computation: Computation) -> int:
    left, right = (computation.by_name[name].arrays[0] for name in one.operands[:2])
    return _dot(one, left) if one.opcode == "dot" else _convolution(one, left, right)


def _dot(one: Instruction, left: Array) -> int:
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    contracted = math.prod(left.shape[int(d)] for d in dims[1].split(",") if d) if dims else 1
    return 2 * one.arrays[0].elements * contracted


def _convolution(one: Instruction, left: Array, right: Array) -> int:
    """Two for each product that is not with padding or with a hole of dilation."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    window = _window(one.rest)
    lhs, rhs, out = labels[1], labels[2], labels[3]
    group = re.search(r"feature_group_count=(\d+)", one.rest)
    batch = re.search(r"batch_group_count=(\d+)", one.rest)
    shape = one.arrays[0].shape
    products = 1
    for d in range(len(rhs) - 2):
        number = str(d)
        products *= _valid(
            left.shape[lhs.index(number)],
            right.shape[rhs.index(number)],
            shape[out.index(number)],
            {key: values[d] for key, values in window.items()},
        )
    features = left.shape[lhs.index("f")] // int(group[1] if group else 1)
    given = left.shape[lhs.index("b")] // int(batch[1] if batch else 1)
    return 2 * products * features * given * shape[out.index("f")]


def _window(rest: str) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", rest)
    values: dict[str, list] = {}
    for key, value in re.findall(r"(\w+)=(\S+)", found[1] if found else ""):
        values[key] = [tuple(map(int, one.split("_"))) if key == "pad" else one for one in value.split("x")]
    return values


def _valid(size: int, kernel: int, out: int, window: Mapping) -> int:
    """Pairs of a place in the output and one in the kernel that meet a number of the input."""
    stride, dilation = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    holes, low = int(window.get("lhs_dilate", 1)), window.get("pad", (0, 0))[0]
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - low
    return int(((at >= 0) & (at % holes == 0) & (at // holes < size)).sum())


def _groups(one: Instruction) -> np.ndarray:
    """The devices that act together, [G, D]; [1, 1] where the text does not say."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}(?:,|$)(?!\{)", one.rest)
    if pairs:
        found = re.findall(r"\{(\d+),(\d+)\}", one.rest[pairs.start() :].split("}}")[0] + "}")
        return np.array([[int(a), int(b)] for a, b in found], int).reshape(-1, 2)
    found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.rest)
    if found:
        shape, iota = (tuple(map(int, found[k].split(","))) for k in (1, 2))
        devices = np.arange(math.prod(iota)).reshape(iota)
        if found[3]:
            devices = devices.transpose(tuple(map(int, found[3].split(","))))
        return devices.reshape(shape)
    found = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", one.rest)
    if found:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        along = re.findall(r"'([^']+)'", found[2])
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        last = [list(sizes).index(name) for name in along]
        rest = [k for k in range(len(sizes)) if k not in last]
        return devices.transpose((*rest, *last)).reshape(-1, math.prod(sizes[name] for name in along))
    found = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", one.rest)
    if found:
        rows = [[int(n) for n in row.split(",") if n] for row in re.findall(r"\{([\d,]*)\}", found[1])]
        if rows and len(set(map(len, rows))) == 1 and rows[0]:
            return np.array(rows)
    return np.zeros((1, 1), int)


def _moved(kind: str, size: int, devices: int) -> int:
    """Bytes that a device sends where the group passes them round a ring; `size`: of the whole."""
    if kind == "collective-permute":
        return size
    share = (devices - 1) / max(devices, 1)
    return round(size * share * (2 if kind == "all-reduce" else 1))
