"""A whole training step against the same model put together of stock PyTorch parts.

    python benchmarks/train_step.py                       # all rows, CPU: some minutes to compile each
    python benchmarks/train_step.py --rows bench --threads 1 --json step.json
    python benchmarks/train_step.py --quick               # the smallest row, a few steps

A step is forward, backward, clipping and AdamW in float32, with the release's frozen parts; the autoencoder's
encoding of the targets is included. Ours is the compiled step of ``train.step.make_step``; the baseline is
``torch_mm_interleaved.py`` (needs torch, transformers and diffusers; without them ours is timed alone). The
first row, ``bench``, is one for which the reference implementation has been timed too.

Both sides live in a process of their own, on the same `--threads` cores, and take turns: a block of steps of
one, then of the other, so that a change of the machine's speed meets both. Reported are medians and quartiles
of wall and CPU seconds per step; the ratio is that of neighbouring blocks, above 1 where ours is faster.
Where other programs use the machine, only CPU seconds with ``--threads 1`` mean much. Peak memory of the
steps is measured after the first one, so that it leaves out compilation; that of the process's whole life
stands beside it.
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
from pathlib import Path

from train_step_rows import ROWS, make_batch


class Ours:
    """The compiled step on a batch that does not move."""

    def __init__(self, row, device: str, threads: int):
        import jax

        from umm_jax import config, families, sharding
        from umm_jax.families.mm_interleaved.recipe import optimizer_groups
        from umm_jax.train import state, step
        from umm_jax.train.optimizer import flatten

        family = families.get("mm_interleaved")
        sections = dict(
            family="mm_interleaved",
            model=row.model,
            data=dict(tokens=row.tokens, images=max(row.images), batch_size=len(row.images)),
            optim=dict(lr=1e-4, b1=0.9, b2=0.995, eps=1e-6, clip=1.0, groups=optimizer_groups()),
            train=dict(loss=dict(text=1.0, image=10.0)),
        )
        run = config.from_dict(config.RunConfig, sections)
        model = config.from_dict(family.config.ModelConfig, row.model, "config.model")
        mesh = sharding.make_mesh(run.mesh, jax.devices()[:1])
        plan = state.plan(lambda keys: family.model.build(model, keys), run, mesh)
        sizes = {path: leaf.size for path, leaf in flatten(plan.abstract["params"]).items()}
        frozen = plan.optimizer.frozen
        self.parameters = {
            "total": sum(sizes.values()),
            "trained": sum(n for path, n in sizes.items() if path not in frozen),
        }
        self.state, self.jax = state.with_params(plan, run, parameters(plan.abstract["params"])), jax
        self.batch = sharding.put_batch(make_batch(row), mesh)
        start = time.perf_counter()
        self.run = step.make_step(plan, run).lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.device = f"jax {jax.__version__}, {jax.devices()[0].device_kind}"

    def step(self) -> float:
        self.state, metrics = self.run(self.state, self.batch)
        self.jax.block_until_ready(self.state)
        return float(metrics["scalars"]["loss"])

    def device_peak(self) -> int | None:
        stats = self.jax.devices()[0].memory_stats()
        return None if stats is None else stats.get("peak_bytes_in_use")


def parameters(abstract: dict) -> dict:
    """Random ones, drawn by numpy: the program that initialises a model takes minutes to compile."""
    import numpy as np

    rng = np.random.default_rng(0)

    def draw(tree: dict) -> dict:
        return {
            name: draw(leaf) if isinstance(leaf, dict) else one(name, leaf) for name, leaf in tree.items()
        }

    def one(name: str, leaf) -> np.ndarray:
        if name == "scale":
            return np.ones(leaf.shape, np.float32)
        fan_in = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else leaf.shape[0]
        return rng.standard_normal(leaf.shape, np.float32) / max(fan_in, 1) ** 0.5

    return draw(abstract)


class Torch:
    """The baseline on the same batch."""

    def __init__(self, row, device: str, threads: int):
        import torch
        from torch_mm_interleaved import Trainer

        torch.set_num_threads(threads)
        # As JAX does by default on such cards; no effect on a CPU.
        torch.backends.cuda.matmul.allow_tf32 = True
        self.torch, self.cuda = torch, device == "gpu"
        self.trainer = Trainer(row, make_batch(row), "cuda" if self.cuda else "cpu")
        self.parameters, self.compile_seconds = self.trainer.parameters, None
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.device = f"torch {torch.__version__}, {name}"

    def step(self) -> float:
        loss = self.trainer.step()
        if self.cuda:
            self.torch.cuda.synchronize()
        return loss.item()

    def device_peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.cuda else None


SIDES = {"ours": Ours, "torch": Torch}


# --- a side in its own process ------------------------------------------------------------------------


def resident(field: str) -> int | None:
    """Bytes of a line of /proc/self/status; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def serve(side: str, row: str, device: str, threads: int) -> None:
    """Answers each line "steps N" on stdin with a line of JSON on stdout, the first one unasked."""
    # What libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    it = SIDES[side](ROWS[row], device, threads)
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

    def __init__(self, side: str, row: str, device: str, threads: int):
        environment = dict(os.environ)
        if device == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both sides share the card
        command = [sys.executable, __file__, "--serve", side, "--rows", row]
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


def compare(row: str, sides: list[str], args: argparse.Namespace) -> dict:
    """All blocks of one row."""
    children = [Child(side, row, args.device, args.threads) for side in sides]
    blocks = {side: [] for side in sides}
    for i in range(args.blocks):
        # Each side goes first as often as the other.
        for child in children if i % 2 == 0 else reversed(children):
            blocks[child.side].append(child.block(args.steps))
    found: dict = {"row": row, "tokens": ROWS[row].tokens, "images": ROWS[row].images}
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

    out = [
        f"{found['row']}: {len(found['images'])} rows x {found['tokens']} tokens, images {found['images']}"
    ]
    for side in SIDES:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="cores of either side")
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each side")
    parser.add_argument("--steps", type=int, default=1, help="steps of a block")
    parser.add_argument("--quick", action="store_true", help="the row small, 3 blocks")
    parser.add_argument("--only", choices=list(SIDES), help="time one side alone")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rows, args.blocks = "small", 3
    rows = args.rows.split(",")
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        parser.error(f"row {unknown[0]!r} is unknown; choose of {', '.join(ROWS)}")
    if args.serve:
        return serve(args.serve, rows[0], args.device, args.threads)
    sides = [args.only] if args.only else list(SIDES)
    missing = [
        name for name in ("torch", "transformers", "diffusers") if importlib.util.find_spec(name) is None
    ]
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
        results["rows"].append(compare(row, sides, args))
        print("\n".join(lines(results["rows"][-1])), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
