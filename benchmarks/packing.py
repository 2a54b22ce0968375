"""How full rows are: first fit and best fit at several numbers of open rows, on lengths of real shape.

    python benchmarks/packing.py
    python benchmarks/packing.py --json packing.json

Lengths of the world are those of its dialogues under `configs/world_tiny.py`, in rows of 1,024 tokens and
26 images. Lengths of pages are simulated after MMC4: one to six images of 64 slots, a log-normal number of
words, into rows of 2,048 tokens and 30 images. The baseline, next fit, has one open row. "Binding" is the
axis that is fullest on average.
"""

import argparse
import json
import time
from collections import Counter

import numpy as np

BINS = (1, 8, 16, 32, 64, 128)


def pages(count: int) -> tuple[list[dict[str, int]], dict[str, int]]:
    rng = np.random.default_rng(0)
    images = 1 + rng.binomial(5, 0.3, count)
    words = np.clip(rng.lognormal(5.0, 0.9, count), 20, 1500).astype(int)
    tokens = np.minimum(words + 65 * images + 2, 2048)
    lengths = [{"tokens": int(t), "images": int(i)} for t, i in zip(tokens, images)]
    return lengths, {"tokens": 2048, "images": 30}


def world(count: int) -> tuple[list[dict[str, int]], dict[str, int]]:
    import tempfile
    from pathlib import Path

    from umm_jax import config, families
    from umm_jax.data.tokenizer import Tokenizer
    from umm_jax.stream import stream_length
    from umm_jax.world import corpus
    from umm_jax.world.dialogue import sample_dialogue
    from umm_jax.world.scene import WorldConfig

    run = config.load(str(Path(__file__).parents[1] / "configs" / "world_tiny.py"), [])
    chosen = WorldConfig.of(run)
    family = families.get(run.family)
    with tempfile.TemporaryDirectory() as folder:
        control = family.stream.control_pieces(run.model)
        text = corpus.vocabulary_text(chosen)
        tokenizer = Tokenizer.train(text, Path(folder) / "t.model", control, run.model["backbone"]["vocab"])
    serializer = family.stream.Serializer(run.model, tokenizer)
    found = (serializer(sample_dialogue(chosen, 0, k)) for k in range(count))
    return [stream_length(stream) for stream in found], {"tokens": 1024, "images": 26}


def pack(lengths: list[dict[str, int]], budget: dict[str, int], bins: int, best: bool) -> dict:
    from umm_jax.data.packing import FirstFit

    class BestFit(FirstFit):
        """Takes the row whose fullest axis is then the fullest."""

        def _choose(self, rows, length):
            full = lambda row: max((row.used[axis] + length[axis]) / budget[axis] for axis in budget)  # noqa: E731
            return max(rows, key=full, default=None)

    packer = (BestFit if best else FirstFit)(budget, bins)
    used: Counter[str] = Counter()
    rows = 0
    start = time.process_time()
    for k, length in enumerate(lengths):
        closed = packer.add(k, length)
        if closed is not None:
            rows += 1
            for item in closed:
                used.update(lengths[item])
    seconds = time.process_time() - start
    fills = {axis: used[axis] / (rows * room) for axis, room in budget.items()}
    binding = max(fills, key=fills.get)
    return {"rows": rows, "fill": fills, "binding": binding, "microseconds": 1e6 * seconds / len(lengths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    report: dict = {}
    for name, make in (("world", world), ("pages", pages)):
        lengths, budget = make(args.count)
        for bins in BINS:
            for best in (False, True) if bins > 1 else (False,):
                kind = "next fit" if bins == 1 else "best fit" if best else "first fit"
                found = pack(lengths, budget, bins, best)
                report.setdefault(name, {})[f"{kind} {bins}"] = found
                fills = "  ".join(f"{axis} {share:.3f}" for axis, share in found["fill"].items())
                print(
                    f"{name:6} {kind:9} {bins:4} open  {fills}  binding {found['binding']}, "
                    f"{found['microseconds']:.0f} us a conversation",
                    flush=True,
                )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
