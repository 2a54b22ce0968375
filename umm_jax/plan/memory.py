"""What lies in a chip's memory when: a scheduled program, replayed.

The compiler allocates and tells its peak, but not what lies there at the time. Here each array that an
instruction gives is taken to live from there to its last use; what only names another array (a tuple, a view,
a loop that works in place) gives none. The replay's peak is shown beside the compiler's own, which counts.
"""

from collections import defaultdict
from dataclasses import dataclass

from umm_jax.plan.hlo import Computation, Instruction, Program

# These give no new array: what they give is what they take, or a part of it.
_NAMES = {
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "optimization-barrier",
    "copy-done",
    "async-update",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
    "add-dependency",
    "after-all",
}
_NOTHING = {"parameter", "constant", "partition-id", "replica-id", "iota"}


@dataclass(frozen=True)
class Buffer:
    """An array, where it comes from, and the steps of the schedule between which it lives."""

    bytes: int
    shape: str
    op_name: str
    source: str
    born: int
    dies: int


@dataclass(frozen=True)
class Replay:
    """Of one program.

    Attributes:
        timeline: bytes beside the arguments, at each step of the entry's schedule (loops at their widest).
        largest: what lives at the peak, largest first.
    """

    timeline: tuple[int, ...]
    largest: tuple[Buffer, ...]


def replay(program: Program, keep: int = 20) -> Replay:
    """Follows the schedule of `program`; `keep`: how many of the largest buffers are named."""
    timeline, _ = _walk(program, program.entry)
    alive = sorted(_alive_at_peak(program, program.entry), key=lambda b: -b.bytes)
    return Replay(tuple(timeline), tuple(alive[:keep]))


def _alive_at_peak(program: Program, name: str) -> list[Buffer]:
    """What lives when a computation is at its widest, and in the loops that run then when they are."""
    timeline, buffers = _walk(program, name)
    if not timeline:
        return []
    top = max(range(len(timeline)), key=timeline.__getitem__)
    alive = [b for b in buffers if b.born <= top <= b.dies]
    for inner in _inside(program.computations[name].instructions[top], program):
        alive += _alive_at_peak(program, inner)
    return alive


def _inside(one: Instruction, program: Program) -> list[str]:
    """Computations that run while `one` does, and have arrays of their own."""
    if one.opcode not in ("while", "conditional", "call"):
        return []
    return [n for key, names in one.called.items() if key != "condition" for n in names]


def _walk(program: Program, name: str) -> tuple[list[int], list[Buffer]]:
    computation = program.computations[name]
    order = {one.name: k for k, one in enumerate(computation.instructions)}
    owners = _owners(computation)
    dies: dict[str, int] = {}
    for k, one in enumerate(computation.instructions):
        for operand in one.operands:
            for owner in owners.get(operand, ()):
                dies[owner] = k
    for owner in owners.get(computation.root.name, ()):
        dies[owner] = len(order) - 1
    buffers = []
    change: dict[int, int] = defaultdict(int)
    for k, one in enumerate(computation.instructions):
        if one.opcode in _NAMES or one.opcode in _NOTHING:
            continue
        size = sum(a.bytes for a in one.results if a.space == 0)
        if not size or _in_place(one):
            continue
        end = dies.get(one.name, k)
        shapes = ", ".join(f"{a.dtype}{list(a.shape)}" for a in one.results if a.space == 0)
        buffers.append(Buffer(size, shapes, one.op_name, program.source(one), k, end))
        change[k] += size
        change[end + 1] -= size
    timeline, now = [], 0
    for k, one in enumerate(computation.instructions):
        now += change[k]
        inner = max((max(_walk(program, n)[0], default=0) for n in _inside(one, program)), default=0)
        timeline.append(now + inner)
    return timeline, buffers


def _owners(computation: Computation) -> dict[str, frozenset[str]]:
    """{instruction: those whose arrays it gives or names}."""
    found: dict[str, frozenset[str]] = {}
    for one in computation.instructions:
        if one.opcode in _NAMES or _in_place(one):
            found[one.name] = frozenset().union(*(found.get(o, frozenset()) for o in one.operands))
        else:
            found[one.name] = frozenset((one.name,))
    return found


def _in_place(one: Instruction) -> bool:
    """Whether it writes into what it takes."""
    return one.opcode == "dynamic-update-slice" or "output_to_operand_aliasing" in one.rest
