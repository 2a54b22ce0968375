"""Two programs on the same cores in turns: the harness of the benchmarks that compare with PyTorch.

A benchmark gives :func:`main` its sides (classes made as ``Side(row, device, threads)`` with a method
`step() -> loss`, `device`, `parameters`, `compile_seconds` and `device_peak()`) and its rows. Each side lives
in a process of its own and they take turns: a block of steps of one, then of the other, so that a change of
the machine's speed meets both. A block begins with a step that is not timed.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """What is compared.

    Attributes:
        script: the file of the benchmark, which each side's process runs again.
        sides: {"ours": class, "torch": class}. rows: {name: what a side is made for}.
        tell: a row in words, for the table. needs: modules the baseline needs.
        quick: the row of --quick.
    """

    script: str
    sides: Mapping[str, Any]
    rows: Mapping[str, Any]
    tell: Callable[[Any], str]
    needs: Sequence[str]
    quick: str


def resident(field: str) -> int | None:
    """Bytes of a line of /proc/self/status; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def serve(benchmark: Benchmark, side: str, row: str, device: str, threads: int) -> None:
    """Answers each line "steps N" on stdin with a line of JSON on stdout, the first one unasked."""
    # What libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    it = benchmark.sides[side](benchmark.rows[row], device, threads)
    loss = it.step()
    life = resident("VmHWM")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what compilation left behind goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # and the peak starts anew
    except (OSError, AttributeError):
        life = None
    answer = {
        "device": it.device,
        "parameters": it.parameters,
        "compile_seconds": it.compile_seconds,
        "first_loss": loss,
    }
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        asked = sys.stdin.readline().split()
        if not asked:
            return
        count = int(asked[1])
        # What a side gave back to the system has gone cold while the other had its turn.
        it.step()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            loss = it.step()
        answer = {
            "wall": (time.perf_counter() - start) / count,
            "cpu": (time.process_time() - cpu) / count,
            "loss": loss,
            "peak_resident": resident("VmHWM"),
            "peak_resident_with_start": life,
            "peak_device": it.device_peak(),
        }


class Child:
    """A side, as its parent sees it."""

    def __init__(self, benchmark: Benchmark, side: str, row: str, device: str, threads: int):
        environment = dict(os.environ)
        if device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both sides share the card
        command = [sys.executable, benchmark.script, "--serve", side, "--rows", row]
        command += ["--device", device, "--threads", str(threads)]
        pipe = subprocess.PIPE
        self.side = side
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.about = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the side {self.side!r} ended with status {self.process.wait()}, see above")
        return json.loads(line)

    def block(self, steps: int) -> dict:
        print("steps", steps, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# --- the comparison -----------------------------------------------------------------------------------


def spread(values: list[float]) -> dict:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "quartiles": [values[0]] * 2}
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "quartiles": [low, high]}


def compare(benchmark: Benchmark, row: str, sides: list[str], args: argparse.Namespace) -> dict:
    """All blocks of one row."""
    children = [Child(benchmark, side, row, args.device, args.threads) for side in sides]
    blocks = {side: [] for side in sides}
    for i in range(args.blocks):
        # Each side goes first as often as the other.
        for child in children if i % 2 == 0 else reversed(children):
            blocks[child.side].append(child.block(args.steps))
    found: dict = {"row": row, "about": benchmark.tell(benchmark.rows[row])}
    for child in children:
        child.close()
        mine = blocks[child.side]
        found[child.side] = {
            **child.about,
            "wall_seconds": spread([b["wall"] for b in mine]),
            "cpu_seconds": spread([b["cpu"] for b in mine]),
            "last_loss": mine[-1]["loss"],
            **{key: mine[-1][key] for key in mine[-1] if key.startswith("peak")},
            "blocks": mine,
        }
    if len(sides) == 2:
        pairs = list(zip(blocks["torch"], blocks["ours"]))
        for kind in ("wall", "cpu"):
            found[f"torch_over_ours_{kind}"] = spread([theirs[kind] / ours[kind] for theirs, ours in pairs])
    return found


def lines(found: dict) -> list[str]:
    """A row of results as text."""

    def number(value: dict, unit: str = "s") -> str:
        low, high = value["quartiles"]
        return f"{value['median']:.3g} {unit} ({low:.3g} to {high:.3g})"

    out = [f"{found['row']}: {found['about']}"]
    for side in ("ours", "torch"):
        if side in found:
            f = found[side]
            peak = f["peak_device"] or f["peak_resident"]
            held = "" if peak is None else f", peak {peak / 2**20:.0f} MiB"
            out.append(
                f"  {side:5s} wall {number(f['wall_seconds'])}, CPU {number(f['cpu_seconds'])}{held}; "
                f"{f['parameters']['total'] / 1e6:.1f}M parameters, "
                f"{f['parameters']['trained'] / 1e6:.1f}M trained"
            )
    for kind in ("wall", "cpu"):
        if f"torch_over_ours_{kind}" in found:
            out.append(f"  torch / ours, {kind}: {number(found[f'torch_over_ours_{kind}'], 'times')}")
    return out


def main(benchmark: Benchmark, doc: str) -> None:
    """The command line of a benchmark whose module says `doc`."""
    rows_, sides_ = benchmark.rows, list(benchmark.sides)
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rows", default=",".join(rows_), help=f"of {', '.join(rows_)}")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="cores of either side")
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each side")
    parser.add_argument("--steps", type=int, default=1, help="steps of a block")
    parser.add_argument("--quick", action="store_true", help=f"the row {benchmark.quick}, 3 blocks")
    parser.add_argument("--only", choices=sides_, help="time one side alone")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--serve", choices=sides_, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.blocks = benchmark.quick, 3
    rows = args.rows.split(",")
    unknown = [row for row in rows if row not in rows_]
    if unknown:
        parser.error(f"row {unknown[0]!r} is unknown; choose of {', '.join(rows_)}")
    if args.serve:
        return serve(benchmark, args.serve, rows[0], args.device, args.threads)
    sides = [args.only] if args.only else sides_
    missing = [name for name in benchmark.needs if importlib.util.find_spec(name) is None]
    if missing and "torch" in sides:
        message = f"{', '.join(missing)} not installed (pip install {' '.join(missing)}): no baseline"
        if args.only:
            raise SystemExit(message)
        print(f"{message}, timing ours alone", file=sys.stderr)
        sides = ["ours"]
    results = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
    }
    results["rows"] = []
    for row in rows:
        results["rows"].append(compare(benchmark, row, sides, args))
        print("\n".join(lines(results["rows"][-1])), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
