"""How long a training step of 13 billion parameters takes to compile, by its depth.

    python benchmarks/compile_time.py --layers 10,40 --rounds 3

Compiles ``configs/text_13b.py`` (or --config) for a TPU topology with as many layers as asked, each time in a
process of its own and with nothing cached, in turns; prints seconds to trace and lower and to compile, and
each depth as a ratio to the first. Needs the ``plan`` extra (``make setup-plan``) and a quiet machine.
"""

import argparse
import os
import statistics
import sys
import tempfile

from umm_jax import config as configs
from umm_jax.plan import chips, compiling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/text_13b.py")
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--layers", default="10,40")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="let the compiler search less")
    args = parser.parse_args()
    depths = [int(n) for n in args.layers.split(",")]
    seconds = {n: [] for n in depths}
    for turn in range(args.rounds):
        for n in depths:
            lower, compile_ = _compile(args, n)
            print(
                f"round {turn + 1}  {n} layers  lowered {lower:.1f} s  compiled {compile_:.1f} s", flush=True
            )
            seconds[n].append(lower + compile_)
    print(f"\n{'layers':>6}  {'median s':>9}  {'from':>7}  {'to':>7}  times the first (median, from, to)")
    for n in depths:
        ratios = [a / b for a, b in zip(seconds[n], seconds[depths[0]])]
        figures = (min(seconds[n]), max(seconds[n]))
        print(
            f"{n:>6}  {statistics.median(seconds[n]):>9.1f}  {figures[0]:>7.1f}  {figures[1]:>7.1f}  "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def _compile(args: argparse.Namespace, layers: int) -> tuple[float, float]:
    run = configs.load(args.config, [f"model.backbone.layers={layers}"])
    with tempfile.TemporaryDirectory() as empty:
        os.environ["UMM_PLAN_CACHE"] = empty
        facts = compiling.compiled(run, chips.topology(args.topology, 1), quick=args.quick).facts
    if "error" in facts:
        sys.exit(f"{layers} layers do not compile: {facts['error']}")
    return facts["lower_seconds"], facts["compile_seconds"]


if __name__ == "__main__":
    main()
