"""From captioned JPEGs to packed batches: records a second, against PyTorch's DataLoader and webdataset.

    python benchmarks/input_pipeline.py                       # one core, no worker processes
    python benchmarks/input_pipeline.py --workers 2 --json input.json

Records are a photograph of 640 x 480 (smooth noise, JPEG at quality 85) and a caption. All contenders decode
with Pillow, resize and crop to the same pixels (halving by a box filter while twice too large, then bicubic),
tokenise with the same tokenizer, pack by the same first fit into rows of 2,048 tokens and 30 images, and end
with the same arrays. Ours reads ArrayRecord shards of msgpack; the DataLoader one JPEG file and one entry of
a JSON index a sample, in random order; webdataset a tar, in its order. They take turns, each turn in a
process of its own, whose first rows are not counted.
"""

import argparse
import importlib.util
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import PIL.Image

TOKENS, IMAGES, SLOTS = 2048, 30, 64
WORDS = (
    "a the red blue old small boat house river tree under near with two three people light morning".split()
)


def make_data(folder: Path, count: int) -> None:
    """The same samples as shards, as files with an index, and as a tar."""
    from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn
    from umm_jax.data.making import make_records
    from umm_jax.data.tokenizer import Tokenizer

    (folder / "files").mkdir()
    rng = np.random.default_rng(0)
    records, index = [], []
    for k in range(count):
        coarse = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        smooth = PIL.Image.fromarray(coarse).resize((640, 480), PIL.Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (480, 640, 1))
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        caption = " ".join(rng.choice(WORDS, rng.integers(5, 41)))
        data = buffer.getvalue()
        (folder / "files" / f"{k:06d}.jpg").write_bytes(data)
        index.append({"file": f"{k:06d}.jpg", "caption": caption})
        turn = Turn("document", (Image("i"), Text(caption)), loss=True)
        records.append(Conversation(f"c{k}", (turn,), {"i": ImageData(data, "image/jpeg", 640, 480)}))
    make_records(lambda k: records[k], count, folder / "shards", how={"made": "here"}, shards=4)
    (folder / "index.json").write_text(json.dumps(index))
    with tarfile.open(folder / "samples.tar", "w") as tar:
        for k, entry in enumerate(index):
            tar.add(folder / "files" / entry["file"], f"{k:06d}.jpg")
            text = entry["caption"].encode()
            member = tarfile.TarInfo(f"{k:06d}.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    control = ["<user>", "<bot>", "<eot>", "<soi>", "<image>"]
    Tokenizer.train([e["caption"] for e in index], folder / "t.model", control, 512, whole_words=False)
    size = sum((folder / "files" / e["file"]).stat().st_size for e in index) / count
    print(f"{count} photographs of {size / 1000:.0f} kB on average")


# --- contenders: endless iterators of rows ---------------------------------------------------------------


def ours(folder: Path, side: int, workers: int, **options):
    from umm_jax.config import DataConfig, SourceConfig
    from umm_jax.data.pipeline import make_loader
    from umm_jax.data.tokenizer import Tokenizer
    from umm_jax.families.mm_interleaved.stream import Serializer

    layout = dict(
        image_size=side, target_size=side, image_tokens=SLOTS, soi_id=7, box_format="text", **options
    )
    serializer = Serializer({"layout": layout}, Tokenizer.load(folder / "t.model"))
    source = SourceConfig(str(folder / "shards"))
    data = DataConfig(
        sources=(source,), tokens=TOKENS, images=IMAGES, batch_size=1, prefetch=1, workers=workers
    )
    return make_loader(data, serializer)


def ours_scaled(folder: Path, side: int, workers: int):
    """JPEGs that are twice too large or more are decoded at a fraction of their size."""
    return ours(folder, side, workers, scaled_decode=True)


class Samples:
    """One sample as arrays, from its JPEG and caption; at module level for the workers."""

    def __init__(self, folder: Path, side: int):
        self.folder, self.side = folder, side
        self.index = json.loads((folder / "index.json").read_text())
        self._tokenizer = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, k: int):
        entry = self.index[k]
        return self.sample((self.folder / "files" / entry["file"]).read_bytes(), entry["caption"])

    def of_tar(self, sample: dict):
        return self.sample(sample["jpg"], sample["txt"].decode())

    def sample(self, data: bytes, caption: str):
        from umm_jax.data.tokenizer import Tokenizer

        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self.folder / "t.model")
        with PIL.Image.open(io.BytesIO(data)) as opened:
            pixels = resized(opened.convert("RGB"), self.side)
        ids = self._tokenizer.encode(caption)
        return np.array([1, 7, *[8] * SLOTS, *ids, 2], np.int32), pixels


def resized(picture: PIL.Image.Image, side: int) -> np.ndarray:
    """As one writes it: the short side to `side`, the middle of the rest."""
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), PIL.Image.Resampling.BOX)
    scale = side / min(picture.size)
    size = (max(side, round(picture.width * scale)), max(side, round(picture.height * scale)))
    picture = picture.resize(size, PIL.Image.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.array(picture.crop((left, top, left + side, top + side)))


def packed(samples, side: int):
    """Rows of the arrays the model gets, by first fit."""
    from umm_jax.data.packing import FirstFit

    packer = FirstFit({"tokens": TOKENS, "images": IMAGES}, 8)
    for ids, pixels in samples:
        ids, pixels = np.asarray(ids), np.asarray(pixels)
        closed = packer.add((ids, pixels), {"tokens": len(ids), "images": 1})
        if closed is None:
            continue
        row = {
            name: np.zeros(TOKENS, np.float32 if name == "weight" else np.int32)
            for name in ("ids", "segment_ids", "positions", "weight", "image", "slot")
        }
        images = np.zeros((IMAGES, side, side, 3), np.uint8)
        at = 0
        for k, (ids, pixels) in enumerate(closed):
            place = slice(at, at + len(ids))
            row["ids"][place], row["segment_ids"][place] = ids, k + 1
            row["positions"][place] = np.arange(len(ids))
            row["weight"][place] = ids > 8
            row["image"][place] = np.where(ids == 8, k, -1)
            row["slot"][place] = np.cumsum(ids == 8)
            images[k] = pixels
            at += len(ids)
        yield {"tokens": row, "images": {"pixels": images, "segment_ids": np.arange(IMAGES) < len(closed)}}


def dataloader(folder: Path, side: int, workers: int):
    import torch

    class Endless(torch.utils.data.Sampler):
        def __init__(self, count: int):
            self.count = count

        def __iter__(self):
            for epoch in itertools.count():
                yield from np.random.default_rng(epoch).permutation(self.count).tolist()

    samples = Samples(folder, side)
    options = dict(sampler=Endless(len(samples)), batch_size=None, num_workers=workers)
    return packed(torch.utils.data.DataLoader(samples, **options), side)


def webdataset(folder: Path, side: int, workers: int):
    import torch
    import webdataset as wds

    samples = Samples(folder, side)
    url = str(folder / "samples.tar")
    # A tar is a shard, and workers share shards: each gets the one there is.
    source = wds.WebDataset(
        [url] * max(workers, 1), shardshuffle=False, nodesplitter=None, empty_check=False
    ).map(samples.of_tar)
    return packed(torch.utils.data.DataLoader(source.repeat(), batch_size=None, num_workers=workers), side)


# --- clocks ---------------------------------------------------------------------------------------------

CONTENDERS = {"ours": ours, "scaled": ours_scaled, "dataloader": dataloader, "webdataset": webdataset}


def measure(rows, discard: int, count: int) -> dict:
    """Seconds, records and tokens of `count` rows."""
    for _ in range(discard):
        next(rows)
    records = tokens = 0
    start = time.perf_counter()
    for _ in range(count):
        segments = np.asarray(next(rows)["tokens"]["segment_ids"])
        records += int(segments.max())
        tokens += int(np.count_nonzero(segments))
    return {"seconds": time.perf_counter() - start, "records": records, "tokens": tokens}


def turn(name: str, folder: Path, side: int, args) -> dict:
    """One contender in a process of its own."""
    command = [sys.executable, __file__, "--turn", name, str(folder), str(side)]
    command += ["--workers", str(args.workers), "--rows", str(args.rows)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def spread(numbers: list[float]) -> dict:
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", default="224,512")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--count", type=int, default=600, help="photographs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20, help="of a turn, beside three that are not counted")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cores = max(args.workers, 1)
    if hasattr(os, "sched_setaffinity"):  # before any library starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if args.turn:
        warnings.simplefilter("ignore")
        name, folder, side = args.turn
        rows = iter(CONTENDERS[name](Path(folder), int(side), args.workers))
        print(json.dumps(measure(rows, 3, args.rows)), flush=True)
        os._exit(0)  # loaders are endless, and their workers would be waited for
    names = list(CONTENDERS)
    if importlib.util.find_spec("webdataset") is None:
        print("webdataset is not installed (pip install webdataset): without its row")
        names.remove("webdataset")
    report: dict = {"cores": cores, "workers": args.workers, "cases": {}}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_data(folder, args.count)
        for side in map(int, args.sides.split(",")):
            taken: dict[str, list] = {name: [] for name in names}
            for _ in range(args.rounds):
                for name in names:
                    taken[name].append(turn(name, folder, side, args))
            rates = {
                name: [one["records"] / one["seconds"] / cores for one in found]
                for name, found in taken.items()
            }
            case = report["cases"][side] = {}
            for name, found in taken.items():
                row = case[name] = {
                    "records_per_second_per_core": spread(rates[name]),
                    "tokens_per_second_per_core": spread([f["tokens"] / f["seconds"] / cores for f in found]),
                    "times_dataloader": spread([a / b for a, b in zip(rates[name], rates["dataloader"])]),
                }
                low, high = row["times_dataloader"]["quartiles"]
                records, tokens = (
                    row[f"{what}_per_second_per_core"]["median"] for what in ("records", "tokens")
                )
                print(
                    f"{side} pixels  {name:10} {records:7.1f} records/s, {tokens:8.0f} tokens/s a core, "
                    f"{row['times_dataloader']['median']:.2f} times the DataLoader ({low:.2f} to {high:.2f})",
                    flush=True,
                )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
