"""From a compiled program to a report: memory, work, communication, and an estimate of a step's time.

    seconds = cycles + kernels + exposed

    cycles    sum over instructions of the compiler's own estimate x how often it is executed / clock
    kernels   of Pallas calls, which the compiler has no estimate for: those of attention by the length of
              their schedules, of others their products at half of the peak, or their vector work at 0.3 of
              its, whichever is longer
    exposed   of communication that nothing is computed beside, and of what the rest cannot hide

Against two published steps, 32B on 64 v5p and 8B on 256 v6e, cycles and kernels, theirs at half of the peak,
gave 1.02 and 0.96 of what was measured; both are bound by computation. Nothing here is a measurement.
"""

import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from umm_jax.plan import memory
from umm_jax.plan.chips import GIB, Chip, Topology
from umm_jax.plan.compiling import Compiled
from umm_jax.plan.counting import is_backward, part_of
from umm_jax.plan.hlo import Collective, Program

# Cycles of a core for each score of an attention kernel, and more for each row (of queries; of keys in the
# backward pass): a causal stream cuts one block of each. ``benchmarks/attention_schedule.py`` counts them in
# the compiler's schedules.
SCHEDULED = {
    ("attend_forward", "v5p"): (6.37e-3, 8.4),
    ("attend_backward", "v5p"): (1.30e-2, 3.1),
    ("attend_forward", "v5e"): (6.14e-3, 8.2),
    ("attend_backward", "v5e"): (1.24e-2, 3.3),
    ("attend_forward", "v6e"): (4.31e-3, 9.4),
    ("attend_backward", "v6e"): (7.44e-3, 4.5),
}
# Share of the peak that the products of another kernel run at: assumed.
KERNEL_EFFICIENCY = 0.5
# Share of the vector units' rate that kernels bound by them run at: what the compiler's schedule of the
# sampling kernels for v5e came to (docs/performance.md), rounded down.
VECTOR_EFFICIENCY = 0.3
# A program of this kind is within so much of the estimate, by the two steps it was held against.
BAND = 0.10


@dataclass(frozen=True)
class Moved:
    """Collectives of a kind along the same axes of the mesh."""

    kind: str
    axes: str
    count: int
    bytes: int
    seconds: float
    hidden: bool


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, and what they are made of."""

    cycles: float
    kernels: float
    exposed: float
    communication: float

    @property
    def seconds(self) -> float:
        return self.cycles + self.kernels + self.exposed


@dataclass(frozen=True)
class Report:
    """All that is told of one program; sizes in bytes of one device, work of one device.

    Attributes:
        work: model FLOPs by part. executed: FLOPs of the program, and by part.
        cycles_by_part: seconds of the estimate by part, gradients apart. traffic: bytes of memory by part.
        estimate: None where the program does not fit, or the compiler makes no estimates (GPU, CPU).
        notes: what was assumed or could not be read.
    """

    topology: str
    devices: int
    facts: dict[str, Any]
    tokens: int
    capacity: int | None
    work: dict[str, dict[str, float]]
    executed: dict[str, float] = field(default_factory=dict)
    cycles_by_part: dict[str, dict[str, float]] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)
    collectives: tuple[Moved, ...] = ()
    estimate: Estimate | None = None
    utilisation: float | None = None
    replay: memory.Replay | None = None
    peak_flops: float | None = None
    bandwidth: float | None = None
    cached: bool = False
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return "error" not in self.facts

    @property
    def model_flops(self) -> float:
        """Of one device and step."""
        return sum(part["forward"] + part["backward"] for part in self.work.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        found = asdict(self)
        found |= {"fits": self.fits, "model_flops": self.model_flops}
        if self.estimate is not None:
            found["estimate"]["seconds"] = self.estimate.seconds
        return found


def report(made: Compiled, topology: Topology | None, tokens: int) -> Report:
    """Reads what was compiled.

    Args:
        tokens: of a whole batch, padding and all: what a step's time is shared among.
    """
    facts, devices = made.facts, int(np.prod(list(made.facts["mesh"].values())))
    share = {part: {k: v / devices for k, v in one.items()} for part, one in made.work.items()}
    chip = topology.chip if topology else None
    common = dict(
        topology=str(topology) if topology else f"{devices} x {facts['device']}",
        devices=devices,
        facts=facts,
        tokens=tokens,
        capacity=chip.memory if chip else None,
        work=share,
        peak_flops=chip.peak if chip else None,
        bandwidth=chip.bandwidth if chip else None,
        cached=made.cached,
    )
    program = made.program
    if program is None:
        return Report(**common)
    notes = []
    if facts["quick"]:
        notes.append(
            "compiled with --quick: the compiler searched less, so that the time is one of a slower program"
        )
    executed: dict[str, float] = defaultdict(float)
    for name, flops in program.flops_by_name().items():
        executed[part_of(name)] += flops
    traffic: dict[str, float] = defaultdict(float)
    for name, size in program.traffic_by_name().items():
        traffic[part_of(name)] += size
    found = dict(executed=dict(executed), traffic=dict(traffic), replay=memory.replay(program))
    if program.unknown_loops:
        notes.append(f"{len(program.unknown_loops)} loops whose turns are not known are counted once")
    if chip is None:
        return Report(**common, **found, notes=tuple(notes))
    by_part: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for name, cycles in program.cycles_by_name().items():
        by_part[part_of(name)]["backward" if is_backward(name) else "forward"] += cycles / chip.clock
    moved = _moved(program, facts["mesh"], topology)
    between, note = _between_slices(program, chip)
    moved, notes = moved + between, notes + note
    cycles = program.cycles / chip.clock
    kernels, note = _kernels(program, chip)
    open_, hidden = (sum(m.seconds for m in moved if m.hidden is which) for which in (False, True))
    estimate = Estimate(cycles, kernels, open_ + max(0.0, hidden - cycles - kernels), open_ + hidden)
    work = sum(sum(one.values()) for one in share.values())
    notes += note
    return Report(
        **common,
        **found,
        cycles_by_part=dict(by_part),
        collectives=tuple(moved),
        estimate=estimate,
        utilisation=work / (estimate.seconds * chip.peak),
        notes=tuple(notes),
    )


def _moved(program: Program, mesh: dict[str, int], topology: Topology) -> list[Moved]:
    sums: dict[tuple[str, str, bool], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    hidden = _overlapped(program)
    for one in program.collectives():
        axes = axes_of(one, mesh)
        rate = topology.chip.links * _links(axes, mesh)
        entry = sums[one.kind, axes, one.name in hidden]
        entry[0] += one.count
        entry[1] += one.moved * one.count
        entry[2] += one.moved * one.count / rate
    return sorted(
        (Moved(k, axes, int(n), int(b), s, h) for (k, axes, h), (n, b, s) in sums.items()),
        key=lambda m: -m.seconds,
    )


def _between_slices(program: Program, chip: Chip) -> tuple[list[Moved], list[str]]:
    """What goes from slice to slice, through the hosts; begun and ended apart, as all of it is."""
    count, size = 0, 0
    for computation, one, times in program.each():
        if one.opcode == "send":
            count += times
            size += times * sum(a.bytes for a in computation.by_name[one.operands[0]].arrays)
    if not count:
        return [], []
    if chip.network is None:
        said = f"{count} transfers between slices, {size / 1e9:.2f} GB: their time is missing, as the network"
        return [], [f"{said} of {chip.name} is not published"]
    return [Moved("send", "slices", count, size, size / chip.network, True)], []


def _links(axes: str, mesh: dict[str, int]) -> float:
    """The share of a chip's links that a collective can use: all for one over every device, else a third."""
    taken = np.prod([mesh[a] for a in axes.split(" x ") if a in mesh] or [1])
    return 1.0 if taken == np.prod(list(mesh.values())) else 1 / 3


def axes_of(one: Collective, mesh: dict[str, int]) -> str:
    """The axes of the mesh along which the devices of a group lie, such as ``data x fsdp``."""
    sizes = tuple(mesh.values())
    if one.groups.size == 1 or one.groups.max() >= np.prod(sizes):
        return "all"
    places = np.stack(np.unravel_index(one.groups, sizes), axis=-1)  # [G, D, axes]
    varies = (places != places[:, :1]).any(axis=(0, 1))
    return " x ".join(name for name, moves in zip(mesh, varies) if moves) or "none"


def _overlapped(program: Program) -> set[str]:
    """Collectives that are begun and ended apart, so that something can be computed between."""
    found = set()
    for computation, one, _ in program.each():
        kind = one.opcode
        if kind.endswith("-start") or re.match(r"(async_collective|all_gather|all_reduce)", computation.name):
            found.add(one.name)
        elif kind == "custom-call" and one.target == "AsyncCollectiveStart":
            found |= set(one.operands)
    return found


def _kernels(program: Program, chip: Chip) -> tuple[float, list[str]]:
    """Seconds of Pallas calls that say their work, and what is to be said of them and of the others."""
    scheduled, assumed, silent = [0.0, 0.0], [0.0, 0.0, 0.0], 0
    for _, one, count in program.each():
        if one.opcode != "custom-call" or one.target != "tpu_custom_call":
            continue
        flops, others = (
            count * int(found[1]) if (found := re.search(rf'"{name}":"?(\d+)', one.rest)) else 0
            for name in ("flops", "transcendentals")
        )
        kernel = re.match(r"\w+", one.name)[0]
        if known := SCHEDULED.get((kernel, chip.name)):
            rows = count * math.prod(one.arrays[0].shape[:-1])
            cycles = others * known[0] + rows * known[1]
            scheduled = [scheduled[0] + flops, scheduled[1] + cycles / chip.cores / chip.clock]
        elif flops:
            # A kernel takes as long as its products or its vector work do, whichever is longer.
            time = max(flops / (KERNEL_EFFICIENCY * chip.peak), others / (VECTOR_EFFICIENCY * chip.vector))
            assumed = [a + b for a, b in zip(assumed, (flops, others, time))]
        else:
            silent += 1
    notes = []
    if scheduled[1]:
        share = scheduled[0] / scheduled[1] / chip.peak
        notes.append(
            f"attention kernels: {scheduled[0] / 1e12:.2f} TFLOP in {scheduled[1]:.3f} s, as the compiler "
            f"schedules them ({share:.0%} of the peak); memory is not waited for"
        )
    if assumed[2]:
        notes.append(
            f"other Pallas kernels: {assumed[0] / 1e12:.2f} TFLOP at {KERNEL_EFFICIENCY:.0%} of the peak, or "
            f"{assumed[1] / 1e12:.2f} T vector operations at {VECTOR_EFFICIENCY:.0%} of theirs where these "
            f"are longer (assumed): {assumed[2]:.3f} s"
        )
    if silent:
        notes.append(f"{silent} Pallas kernels do not say their FLOPs: their time is missing")
    return scheduled[1] + assumed[2], notes


# --- words -----------------------------------------------------------------------------------------------


def lines(found: Report) -> list[str]:
    """The report as a person reads it."""
    facts = found.facts
    mesh = " x ".join(f"{name} {size}" for name, size in facts["mesh"].items())
    out = [
        f"{facts['program']} on {found.topology}: {found.devices} devices, mesh {mesh}",
        f"parameters  {facts['parameters'] / 1e9:.3f} billion, {facts['trained'] / 1e9:.3f} of them trained; "
        f"state {_gib(facts['state_bytes'])} on each device",
    ]
    if not found.fits:
        needs, has = facts["needs"], facts["has"]
        over = _gib(needs - has)
        out.append(f"memory      DOES NOT FIT: needs {_gib(needs)} of {_gib(has)}, {over} too much")
        out += [f"            {b['size']:>8} {b['shape'][:48]} {b['op_name']}" for b in facts["largest"][:8]]
        return out
    said = facts["memory"]
    limit = f" of {_gib(found.capacity)}" if found.capacity else ""
    out.append(
        f"memory      arguments {_gib(said['argument_size'])}, temporaries {_gib(said['temp_size'])}, "
        f"peak {_gib(said['peak_memory'])}{limit}"
    )
    out += [
        f"            {_gib(b.bytes):>10} {b.shape[:40]:40} {b.source or b.op_name[-60:]}"
        for b in found.replay.largest[:8]
    ]
    total = found.model_flops
    out.append(f"model       {total / 1e12:.2f} TFLOP on each device")
    for part, work in found.work.items():
        both = work["forward"] + work["backward"]
        out.append(f"            {both / 1e12:10.3f} {100 * both / total:5.1f} % {part}")
    executed = sum(found.executed.values())
    out.append(
        f"executed    {executed / 1e12:.2f} TFLOP on each device ({executed / total:.2f} of the model's)"
    )
    for one in found.collectives[:8]:
        how = "beside computation" if one.hidden else "alone"
        out.append(
            f"moves       {one.bytes / 1e9:8.2f} GB {one.count:6} x {one.kind} over {one.axes}, "
            f"{one.seconds:.3f} s {how}"
        )
    if found.estimate is not None:
        e = found.estimate
        trust = "more than it takes" if facts["quick"] else f"{BAND:.0%} if computation bounds it"
        out.append(
            f"ESTIMATE    {e.seconds:.3f} s a step (cycles {e.cycles:.3f}, kernels {e.kernels:.3f}, exposed "
            f"communication {e.exposed:.3f}); {trust}, no measurement"
        )
        out.append(
            f"            {100 * found.utilisation:.1f} % of the peak in model FLOPs, "
            f"{found.tokens / e.seconds / found.devices:,.0f} tokens/s/device, padding counted"
        )
    out += [f"note        {note}" for note in found.notes]
    out.append(
        f"compiled    in {facts['compile_seconds']:.0f} s" + (" (kept from before)" if found.cached else "")
    )
    return out


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"
