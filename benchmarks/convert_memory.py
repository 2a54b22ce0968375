"""How much memory conversion takes, and how fast it is: a random checkpoint, each way in its own process.

    python benchmarks/convert_memory.py --size=5GB --dtype=float16 --folder=/var/tmp/convert

The checkpoint is the release with fewer layers in the language model: as many as come near `--size`, all
tensors of their real size (the largest is the embedding, 32002 x 5120). It is written into `--folder`,
converted with ``umm convert from-torch`` and back with ``to-torch``, compared with what it was, and removed.
Needs three times its size of disk. Prints a JSON object: for each way the peak resident memory (ru_maxrss of
the process, so with Python and JAX) and bytes of tensors per second, and the same of copying the files with
``cp``, the baseline of the speeds.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def make(folder: Path, size: int, dtype: np.dtype) -> int:
    """Writes the checkpoint; returns the bytes of its tensors."""
    from umm_jax import families
    from umm_jax.config import to_dict
    from umm_jax.convert.layout import Layout
    from umm_jax.convert.shards import Shards, Tensor

    release = families.get("mm_interleaved").weights.release_config()

    def layout(layers: int) -> Layout:
        backbone = dataclasses.replace(release.backbone, layers=layers)
        return Layout("mm_interleaved", dataclasses.replace(release, backbone=backbone))

    def tensors(of: Layout) -> dict[str, Tensor]:
        constants = {c.theirs: np.asarray(c.value()).dtype for c in of.table.constants}
        shapes = of.table.theirs(of.ours)
        return {name: Tensor(shape, constants.get(name, dtype)) for name, shape in shapes.items()}

    step = release.backbone.sync_every
    sizes = [sum(t.nbytes for t in tensors(layout(step * n)).values()) for n in (1, 2)]
    groups = max(1, 1 + round((size - sizes[0]) / (sizes[1] - sizes[0])))
    chosen = layout(step * groups)
    promised = tensors(chosen)
    constants = {c.theirs: c for c in chosen.table.constants}
    # Random numbers, drawn once and rolled: drawing gigabytes would take longer than converting them.
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(dtype)
    folder.mkdir(parents=True)
    with Shards(folder, "model", promised, limit=5_000_000_000) as shards:
        for i, (name, tensor) in enumerate(promised.items()):
            if name in constants:
                array = np.asarray(constants[name].value())
            else:
                count = int(np.prod(tensor.shape))
                array = np.resize(np.roll(noise, 7919 * i), count).reshape(tensor.shape)
            shards.write(name, np.ascontiguousarray(array))
    config = {"family": "mm_interleaved", "model": to_dict(chosen.model)}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(t.nbytes for t in promised.values())


def measured(words: list[str], nbytes: int) -> dict[str, float]:
    """Runs a command to its end: its seconds, bytes per second, seconds of CPU and peak resident memory."""
    start = time.perf_counter()
    process = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(words)} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(seconds, 1),
        "mb_per_second": round(nbytes / seconds / 1e6, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gb": round(usage.ru_maxrss * unit / 1e9, 3),
    }


def main() -> None:
    from umm_jax.cli import _size
    from umm_jax.convert.folder import sha256_of

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=_size, default="5GB")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16")
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed at the end")
    args = parser.parse_args()
    folder = args.folder.absolute()
    if folder.exists():
        sys.exit(f"{folder} exists; give a new name")
    source, run, back = folder / "source", folder / "run", folder / "back"
    umm = [sys.executable, "-m", "umm_jax.cli", "convert"]
    try:
        pid = os.fork()
        if pid == 0:  # apart, so that making it does not count
            nbytes = make(source, args.size, np.dtype(DTYPES[args.dtype]))
            (folder / "bytes").write_text(str(nbytes))
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit("the checkpoint could not be made")
        nbytes = int((folder / "bytes").read_text())
        found = {"bytes": nbytes, "dtype": args.dtype, "cores": os.cpu_count()}
        # A copy is on the disk only after sync, as what the commands leave is.
        copy = f"cp -r '{source}' '{folder / 'copy'}' && sync '{folder / 'copy'}'/*"
        found["copy"] = measured(["sh", "-c", copy], nbytes)
        shutil.rmtree(folder / "copy")
        found["from_torch"] = measured([*umm, "from-torch", str(source), f"--out={run}"], nbytes)
        found["to_torch"] = measured([*umm, "to-torch", f"--run={run}", f"--out={back}"], nbytes)
        files = sorted(p.name for p in source.glob("*.safetensors"))
        found["same_files"] = all(sha256_of(source / name) == sha256_of(back / name) for name in files)
        print(json.dumps(found, indent=1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
