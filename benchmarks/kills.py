"""Kills a run again and again, and holds what it ends with against a run that nobody killed.

    python benchmarks/kills.py --kills=100 --processes=1 --signal=KILL

Trains world_tiny on a few dialogues, made here. A third of the kills waits until a checkpoint is being
written, a third for a random number of steps, and a third comes within 25 seconds of the start. After each
the newest complete checkpoint is read, whole. With --signal=TERM a run must save and end with the status of a
preempted one, unless it was too young to listen. At the end every array of the state is compared bit for bit,
and every logged loss. Prints a JSON object: kills, how many fell into a save, at which steps, what was read,
what differed.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from umm_jax import cli, config, families, sharding
from umm_jax.train import state as states
from umm_jax.train.checkpoint import Checkpoints
from umm_jax.train.metrics import read_metrics
from umm_jax.train.optimizer import flatten

PREEMPTED = 128 + signal.SIGTERM
ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "world_tiny.py"


def command(folder: Path, workdir: Path, steps: int, processes: int) -> list[str]:
    return [
        *(sys.executable, "-m", "umm_jax.cli", "train", f"--config={CONFIG}", f"--workdir={workdir}"),
        f'--config.data.sources=[{{"path": "{folder / "data"}"}}]',
        f"--config.data.tokenizer={folder / 'tokenizer.model'}",
        *(f"--config.data.batch_size={8}", "--config.data.workers=0", f"--config.train.steps={steps}"),
        *("--config.train.log_every=1", "--config.train.save_every=4", "--config.train.eval_every=0"),
        f"--config.mesh.data={processes}",
    ]


def start(argv: list[str], processes: int, cache: Path) -> list[subprocess.Popen]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    job = [f"--coordinator=localhost:{port}", f"--processes={processes}"]
    return [
        subprocess.Popen(
            [*argv, *([*job, f"--process={i}"] if processes > 1 else [])],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(running: list[subprocess.Popen]) -> None:
    for process in running:
        _, error = process.communicate()
        if process.returncode:
            sys.exit(f"a run ended with {process.returncode}:\n{error[-3000:]}")


def reached(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0


def saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def state_of(workdir: Path) -> tuple[int, dict]:
    """Step and arrays of the newest complete checkpoint, all of it read."""
    run = config.load(workdir / "config.json", ["mesh.data=1"])
    family = families.get(run.family)
    model = config.from_dict(family.config.ModelConfig, run.model, "config.model")
    mesh = sharding.make_mesh(run.mesh, jax.devices()[:1])
    plan = states.plan(lambda rngs: family.model.build(model, rngs), run, mesh)
    kept = Checkpoints(workdir / "checkpoints", read_only=True)
    step = kept.latest()
    # The state alone: the positions in the data are of as many processes as there were.
    return step, {k: jax.device_get(v) for k, v in flatten(kept._read(step, plan.abstract, False)).items()}


def losses(workdir: Path) -> list[tuple[int, float]]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    # A kill at a random time loses up to four steps of a few, a signal that is listened to none; the run must
    # outlast all of them.
    steps = {"KILL": 4, "TERM": 14}[args.signal] * args.kills + 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cli.dispatch(
            [
                "data",
                "synthesize",
                f"--config={CONFIG}",
                "--count=96",
                f"--out={folder / 'data'}",
                "--shards=2",
            ]
        )
        cli.dispatch(["data", "tokenizer", f"--config={CONFIG}", f"--out={folder / 'tokenizer.model'}"])
        whole, killed = folder / "whole", folder / "killed"
        began = time.monotonic()
        finish(start(command(folder, whole, steps, args.processes), args.processes, folder / "cache"))
        pace = (time.monotonic() - began) / steps
        workdir = killed
        argv = command(folder, workdir, steps, args.processes)
        found = {
            "processes": args.processes,
            "steps": steps,
            "kills": 0,
            "during_save": 0,
            "before_a_step": 0,
            "signal": args.signal,
            "too_young": 0,
        }
        at, read, early = [], 0, 0
        while found["kills"] < args.kills:
            before = reached(workdir)
            running = start(argv, args.processes, folder / "cache")
            kind = ("save", "time", "steps")[found["kills"] % 3]
            if kind == "save":
                while not saving(workdir) and all(p.poll() is None for p in running):
                    time.sleep(0.001)
                time.sleep(rng.random() * 0.05)
            else:
                limit = time.monotonic() + (rng.random() * 25 if kind == "time" else 600)
                goal = before + (rng.randrange(1, 12) if kind == "steps" else steps)
                while time.monotonic() < limit and reached(workdir) < goal:
                    if any(p.poll() is not None for p in running):
                        break
                    time.sleep(0.01)
            if any(p.poll() is not None for p in running):
                finish(running)  # Ended before it was killed: it must have ended well.
                early += 1
                break
            hit = saving(workdir)
            for process in running:
                process.send_signal(getattr(signal, f"SIG{args.signal}"))
            errors = [process.communicate()[1] for process in running]
            status = [process.returncode for process in running]
            if args.signal == "TERM" and set(status) != {PREEMPTED}:
                # Before a run listens for the signal, it ends by it; so does a process left by its peers.
                if reached(workdir) > before and PREEMPTED not in status:
                    sys.exit(f"SIGTERM ended the run with {status}:\n{errors[0][-3000:]}")
                found["too_young"] += 1
            found["kills"] += 1
            found["during_save"] += hit
            found["before_a_step"] += reached(workdir) <= before
            at.append(reached(workdir))
            if Checkpoints(workdir / "checkpoints", read_only=True).latest() is not None:
                state_of(workdir)
                read += 1
            print(f"kill {found['kills']} at step {at[-1]}{', saving' if hit else ''}", file=sys.stderr)
        finish(start(argv, args.processes, folder / "cache"))
        one, other = state_of(whole), state_of(killed)
        same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
        differing = [k for k in one[1] if k not in other[1] or not same(one[1][k], other[1][k])]
        found |= {
            "killed_at": at,
            "checkpoints_read": read,
            "ended_early": early,
            "arrays": len(one[1]),
            "arrays_that_differ": len(differing),
            "same_step": one[0] == other[0],
            "same_losses": losses(whole) == losses(killed),
            "seconds_a_step": pace,
        }
    print(json.dumps(found))
    if differing or not found["same_losses"] or not found["same_step"]:
        sys.exit(f"not the same: {differing[:5]}")


if __name__ == "__main__":
    main()
