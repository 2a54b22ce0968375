"""What the loop around the compiled step costs: the whole loop against the bare step, in one process.

    python benchmarks/training_loop.py --data=runs/demo/data --tokenizer=runs/demo/tokenizer.model

Blocks of steps are taken in turn: through ``train.loop.train`` (reading, packing, transfer, logging and all),
and by calling the same compiled program on one batch that is already on the device. Prints a JSON object:
seconds per step of every block, their medians, the ratio of the medians, and the share of the loop's time
spent waiting for input. Baseline of the ratio: the bare compiled step.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax

from umm_jax import config, families, sharding
from umm_jax.data.pipeline import make_loader
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.train import loop, state, step
from umm_jax.train.metrics import read_metrics


def looped(run, workdir: Path) -> tuple[list[float], list[float]]:
    """Seconds per step and input wait of each block of `log_every` steps; the first block warms up."""
    loop.train(run, workdir)
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "train"][1:]
    return [line["seconds_per_step"] for line in lines], [line["input_wait"] for line in lines]


class Bare:
    """The compiled step on a batch that does not move."""

    def __init__(self, run):
        family = families.get(run.family)
        model = config.from_dict(family.config.ModelConfig, run.model, "config.model")
        mesh = sharding.make_mesh(run.mesh)
        plan = state.plan(lambda keys: family.model.build(model, keys), run, mesh)
        self.state = state.init(plan, run)
        serializer = family.stream.Serializer(model, Tokenizer.load(run.data.tokenizer))
        with make_loader(run.data, serializer) as loader:
            self.batch = sharding.put_batch(next(loader), mesh)
        self.step = step.make_step(plan, run).lower(self.state, self.batch).compile()

    def block(self, steps: int) -> float:
        """Seconds per step of `steps` steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/world_tiny.py")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--block", type=int, default=20, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=3, help="counted blocks of each kind in a round")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    run = config.load(
        args.config,
        [
            f'data.sources=[{{"path": "{args.data}"}}]',
            f"data.tokenizer={args.tokenizer}",
            f"train.steps={args.block * (args.blocks + 1)}",
            f"train.log_every={args.block}",
            "train.save_every=1000000",
            "train.eval_every=0",
        ],
    )
    bare, whole, plain, waits = Bare(run), [], [], []
    bare.block(args.block)
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds, wait = looped(run, Path(folder))
        whole, waits = whole + seconds, waits + wait
        plain += [bare.block(args.block) for _ in range(args.blocks)]
    medians = {"loop": statistics.median(whole), "bare": statistics.median(plain)}
    found = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "loop_seconds_per_step": whole,
        "bare_seconds_per_step": plain,
        "medians": medians,
        "loop_over_bare": medians["loop"] / medians["bare"],
        "input_wait_share": statistics.median(waits),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
