"""The deformable aggregation against PyTorch's grid_sample, at the shapes of the MM-Interleaved release.

    python benchmarks/deformable.py [--quick] [--cases unet,llm-1] [--json FILE]
    python benchmarks/deformable.py --tpu v5e:4x4        compiles for a TPU, needs `pip install libtpu`

On the CPU, and where JAX sees a GPU on it: every round runs each contender once, one after the other, on
the same numbers; results and gradients are compared before any clock starts. Printed are the median and
quartiles of seconds and of the ratio to the default implementation ("auto") in the same round, and the median
processor seconds, which suffer less from other work on the machine. Baseline: the usual PyTorch form of
multi-scale deformable attention, one `grid_sample` per level, in two variants: "stacked", which keeps the
samples of all levels and adds them once, and "per level", which adds level by level.

With --tpu nothing runs: each implementation is compiled ahead of time for one device of the topology, in
bfloat16, and its time is estimated as the sum of the compiler's own `estimated_cycles` times the trip
counts of the loops, divided by the clock. The compiler gives no cycles for gathers, scatters and Pallas
kernels: their number is printed, and the estimate is without them. For "pallas" a bound for the kernels is
added, made by hand: no faster than vector work, matmuls or memory traffic at the chip's peak.
"""

import argparse
import functools
import json
import os
import re
import statistics
import time

# name: queries, images, sides. 16 heads of width 64, 8 points a level, one row.
CASES = {
    "llm-1": (2048, 1, (32, 16, 8)),
    "llm-4": (2048, 4, (32, 16, 8)),
    "llm-15": (2048, 15, (32, 16, 8)),
    "unet": (4096, 1, (64, 32, 16, 8)),
}
HEADS, WIDTH, POINTS = 16, 64, 8
# Clock, bfloat16 FLOP/s and bytes/s. Vector units: 4 operations on 8 x 128 numbers a cycle
# (jax-ml.github.io/scaling-book/tpus).
CHIPS = {"v5e": (1.5e9, 197e12, 819e9), "v5p": (1.75e9, 459e12, 2765e9), "v6e": (1.75e9, 918e12, 1640e9)}
VECTOR = 4 * 8 * 128


def make_inputs(case: str):
    """Values, locations (one in ten outside the map), weights and the gradient of the result."""
    import numpy as np

    queries, images, sides = CASES[case]
    rng = np.random.default_rng(0)
    cells, levels = sum(s * s for s in sides), len(sides)
    places = (1, queries, images, HEADS, levels, POINTS)
    return (
        rng.normal(size=(1, images, cells, HEADS, WIDTH)).astype(np.float32),
        rng.uniform(-0.025, 1.025, (*places, 2)).astype(np.float32),
        rng.uniform(0, 2 / (images * levels * POINTS), places).astype(np.float32),
        rng.normal(size=(1, queries, HEADS, WIDTH)).astype(np.float32),
    )


# --- the contenders: each maps "forward" and "both" to a function that returns when the work is done ----


def torch_contender(arrays, sides, stacked: bool, device: str):
    import torch
    import torch.nn.functional as F

    values, locations, weights, grad = (torch.from_numpy(a).to(device) for a in arrays)

    def op(values, locations, weights):
        b, n, _, heads, width = values.shape
        q, points = locations.shape[1], locations.shape[5]
        rows = b * n * heads
        maps = values.permute(0, 1, 3, 4, 2).reshape(rows, width, -1)
        maps = maps.split([s * s for s in sides], dim=-1)
        grid = (2 * locations - 1).permute(0, 2, 3, 1, 4, 5, 6).reshape(rows, q, len(sides), points, 2)
        share = weights.permute(0, 2, 3, 1, 4, 5).reshape(rows, 1, q, len(sides), points)
        sampled = (
            F.grid_sample(m.reshape(rows, width, s, s), grid[:, :, level], align_corners=False)
            for level, (m, s) in enumerate(zip(maps, sides))
        )
        if stacked:
            out = (torch.stack(list(sampled), dim=-2) * share).flatten(-2).sum(-1)
        else:
            out = sum((x * share[:, :, :, level]).sum(-1) for level, x in enumerate(sampled))
        return out.reshape(b, n, heads, width, q).sum(1).permute(0, 3, 1, 2)

    def forward():
        with torch.no_grad():
            out = op(values, locations, weights)
        return done(out)

    def both():
        leaves = [a.detach().requires_grad_() for a in (values, locations, weights)]
        out = op(*leaves)
        out.backward(grad)
        return done(out.detach(), *(leaf.grad for leaf in leaves))

    def done(*found):
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return {"forward": forward, "both": both}


def jax_contender(arrays, sides, implementation: str):
    import jax

    arrays = [jax.device_put(a) for a in arrays]
    steps = jax_steps(sides, implementation)
    return {
        "forward": lambda: jax.block_until_ready(steps["forward"](*arrays[:3])),
        "both": lambda: jax.block_until_ready(steps["both"](*arrays)),
    }


def jax_steps(sides, implementation: str):
    import jax

    from umm_jax.models.deformable import sample

    op = functools.partial(sample, sides=sides, implementation=implementation)

    def both(values, locations, weights, grad):
        out, back = jax.vjp(op, values, locations, weights)
        return (out, *back(grad))

    return {"forward": jax.jit(lambda *a: (op(*a),)), "both": jax.jit(both)}


# --- clocks ---------------------------------------------------------------------------------------------


def compare(case: str, names: list[str], steps: list[str], rounds: int, device: str) -> dict:
    import numpy as np

    sides, arrays = CASES[case][2], make_inputs(case)
    contenders = {}
    for name in names:
        if name.startswith("torch"):
            contenders[name] = torch_contender(arrays, sides, name == "torch stacked", device)
        else:
            contenders[name] = jax_contender(arrays, sides, name)
    found = {}
    for step in steps:
        expected = None
        for name, contender in contenders.items():  # also the warm-up
            got = [np.asarray(getattr(a, "cpu", lambda a=a: a)()) for a in contender[step]()]
            expected = expected or got
            for a, b in zip(got, expected):
                worst = np.abs(a - b).max() / np.abs(b).max()
                # A gradient of a location jumps on pixel centres, where rounding may choose the side.
                if worst > 1e-4 and np.mean(np.abs(a - b) > 1e-4 * np.abs(b).max()) > 1e-6:
                    raise SystemExit(f"{case}, {step}: {name} differs from {names[0]} by {worst:.1e}")
        wall = {name: [] for name in names}
        busy = {name: [] for name in names}
        for _ in range(rounds):
            for name, contender in contenders.items():
                start, processor = time.perf_counter(), time.process_time()
                contender[step]()
                wall[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - processor)
        found[step] = {
            name: {
                "seconds": spread(wall[name]),
                "processor_seconds": statistics.median(busy[name]),
                "times_as_long_as_auto": spread([a / b for a, b in zip(wall[name], wall["auto"])]),
                "rounds": wall[name],
            }
            for name in names
        }
        for name, row in found[step].items():
            low, high = row["times_as_long_as_auto"]["quartiles"]
            print(
                f"{case:7} {step:8} {name:16} {row['seconds']['median']:8.3f} s "
                f"({row['processor_seconds']:.3f} processor s)   "
                f"{row['times_as_long_as_auto']['median']:6.2f} x auto ({low:.2f} to {high:.2f})",
                flush=True,
            )
    return found


def spread(numbers: list[float]) -> dict:
    if len(numbers) == 1:
        return {"median": numbers[0], "quartiles": [numbers[0], numbers[0]]}
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high]}


# --- ahead of time for a TPU ----------------------------------------------------------------------------


def estimate(case: str, implementation: str, step: str, device) -> dict:
    """Cycles and memory of one implementation compiled for a TPU device that is not here."""
    import jax
    import jax.numpy as jnp

    here = jax.sharding.SingleDeviceSharding(device)
    types = (jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16)
    arrays = [jax.ShapeDtypeStruct(a.shape, t, sharding=here) for a, t in zip(make_inputs(case), types)]
    used = arrays[:3] if step == "forward" else arrays
    compiled = jax_steps(CASES[case][2], implementation)[step].lower(*used).compile()
    program = compiled.as_text()
    unknown = r"^ +%(gather|scatter)\w*fusion\S* = |custom_call_target=\"tpu_custom_call\""
    silent = [n for n in program.splitlines() if "estimated_cycles" not in n and re.search(unknown, n)]
    return {
        "cycles": cycles(program),
        "without_cycles": len(silent),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def cycles(program: str) -> int:
    """Sum of `estimated_cycles` of a scheduled HLO text, every loop counted as often as it turns."""
    bodies: dict[str, list[str]] = {}
    for line in program.splitlines():
        if start := re.match(r"(ENTRY )?%(\S+) .*\{$", line):
            current = "ENTRY" if start[1] else start[2]
            bodies[current] = []
        elif line.startswith(" "):
            bodies[current].append(line)

    def total(name: str) -> int:
        count = 0
        for line in bodies[name]:
            if found := re.search(r'"estimated_cycles":"(\d+)"', line):
                count += int(found[1])
            if loop := re.search(r" while\(.*condition=%([^,]+), body=%([^,]+)", line):
                limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[loop[1]]))
                if len(limits) != 1:
                    raise SystemExit(f"cannot read how often the loop {loop[2]} turns: {limits}")
                count += int(limits[0]) * total(loop[2])
        return count

    return total("ENTRY")


def kernel_bound(case: str, step: str, chip: str) -> float:
    """Seconds that the Pallas kernels take at least."""
    queries, images, sides = CASES[case]
    clock, flops, bandwidth = CHIPS[chip]
    pairs = queries * images * HEADS
    cells = sum(s * s for s in sides)
    both = step == "both"
    # Per point and pixel a product and a sum to make the maps; backward makes them again and has two more
    # of each. Per pixel one matmul forward, two backward.
    vector = pairs * cells * POINTS * (8 if both else 2) / (VECTOR * clock)
    matmul = pairs * cells * 2 * WIDTH * (3 if both else 1) / flops
    points = pairs * len(sides) * POINTS * 3 * 4  # x, y and weight in float32
    values = images * cells * HEADS * WIDTH * 2 + 2 * queries * HEADS * WIDTH * 4
    return max(vector, matmul, (points + values) * (3 if both else 1) / bandwidth)


def estimates(topology: str, cases: list[str], steps: list[str], implementations: list[str]) -> dict:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    chip = topology.split(":")[0]
    if chip not in CHIPS:
        raise SystemExit(f"no clock known for {chip!r}; choose a topology of {', '.join(CHIPS)}")
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    found = {}
    for case in cases:
        for step in steps:
            for name in implementations:
                row = estimate(case, name, step, device)
                row["estimated_seconds"] = row["cycles"] / CHIPS[chip][0]
                note = f"{row['without_cycles']} gathers, scatters or kernels not in it"
                if name == "pallas":
                    row["kernel_bound_seconds"] = kernel_bound(case, step, chip)
                    note = f"and {1e3 * row['kernel_bound_seconds']:.2f} ms at least for the kernels"
                found.setdefault(case, {}).setdefault(step, {})[name] = row
                print(
                    f"{case:7} {step:8} {name:8} {1e3 * row['estimated_seconds']:9.2f} ms "
                    f"(estimate; {note}), {row['temporary_bytes'] / 2**20:.0f} MiB of temporaries",
                    flush=True,
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one image, three rounds")
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--also", default="", help="implementations to time beside auto, such as gather,hat")
    # In llm-15 with backward PyTorch keeps over 8 GiB of samples.
    parser.add_argument("--steps", default="forward,both", help="both is forward and backward")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="processors for everyone")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="estimate for a TPU instead, such as v5e:4x4")
    args = parser.parse_args()
    cases = args.cases.split(",") if args.cases else (["llm-1"] if args.quick else ["llm-1", "llm-4", "unet"])
    if unknown := [c for c in cases if c not in CASES]:
        raise SystemExit(f"unknown cases {', '.join(unknown)}; choose of {', '.join(CASES)}")
    steps = args.steps.split(",")
    also = [name for name in args.also.split(",") if name]

    if hasattr(os, "sched_setaffinity"):  # before any library starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.tpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
        results = estimates(args.tpu, cases, steps, also or ["gather", "hat", "pallas"])
        report = {"topology": args.tpu, "estimates": results}
    else:
        try:
            import torch
        except ImportError:
            raise SystemExit("the baseline is PyTorch: pip install torch") from None
        import jax

        torch.set_num_threads(args.threads)
        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise SystemExit("JAX is on a GPU, PyTorch is not; set JAX_PLATFORMS=cpu to compare on the CPU")
        names = ["torch per level", "torch stacked", "auto", *also]
        rounds = 3 if args.quick else args.rounds
        before = os.getloadavg()[0]
        report = {
            "device": jax.devices()[0].device_kind,
            "threads": args.threads,
            "versions": {"jax": jax.__version__, "torch": torch.__version__},
            "cases": {c: compare(c, names, steps, rounds, "cuda" if on_gpu else "cpu") for c in cases},
        }
        # Above the number of processors, others had their share of them.
        report["load_average"] = [before, os.getloadavg()[0]]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
