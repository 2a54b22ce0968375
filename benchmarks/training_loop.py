"""What the loop around the compiled step costs: the whole loop against the bare step, in one process.

    python benchmarks/training_loop.py --data=runs/demo/data --tokenizer=runs/demo/tokenizer.model

Blocks of steps are taken in turn: through ``train.loop.train`` (reading, packing, transfer, logging and all),
and, where the loop would evaluate, by calling the same compiled program on one batch that is already on the
device. Prints a JSON object: seconds per step of every block, the ratio of each loop block to the mean of the
bare blocks before and after it, their median and quartiles, and the share of the loop's time spent waiting
for input. Baseline of the ratio: the bare compiled step.
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
    parser.add_argument("--block", type=int, default=10, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=16, help="counted blocks of each kind")
    args = parser.parse_args()
    run = config.load(
        args.config,
        [
            f'data.sources=[{{"path": "{args.data}"}}]',
            f"data.tokenizer={args.tokenizer}",
            f"train.steps={args.block * (args.blocks + 1)}",
            f"train.log_every={args.block}",
            f"train.eval_every={args.block}",
            "train.save_every=1000000",
        ],
    )
    bare, plain = Bare(run), []
    bare.block(args.block)

    def between(step, params):
        plain.append(bare.block(args.block))
        return {}

    with tempfile.TemporaryDirectory() as folder:
        loop.train(run, folder, on_eval=between)
        lines = [line for line in read_metrics(Path(folder) / "metrics.jsonl") if line["kind"] == "train"]
    # The first block of the loop warms up; each other one stands between two bare ones.
    whole = [line["seconds_per_step"] for line in lines[1:]]
    ratios = [2 * w / (before + after) for w, before, after in zip(whole, plain, plain[1:])]
    quartiles = statistics.quantiles(ratios, n=4)
    found = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "loop_seconds_per_step": whole,
        "bare_seconds_per_step": plain,
        "loop_over_bare": {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]},
        "input_wait_share": statistics.median(line["input_wait"] for line in lines[1:]),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
