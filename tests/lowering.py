"""A training step of a config at its real widths, lowered on eight devices that are not there.

    python lowering.py CONFIG PIECES [OVERRIDE ...]     with eight virtual devices; prints what was lowered

PIECES is the JSON of {"size": n, "ids": {piece: id}}: all a serializer asks of a tokenizer to tell its axes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def lowered(name: str, pieces: dict, *overrides: str) -> dict:
    """What :func:`main` says of configs/NAME.py, run in a process of its own."""
    mesh = [f"mesh.{axis}={size}" for axis, size in MESH.items()]
    config = str(ROOT / "configs" / f"{name}.py")
    done = subprocess.run(
        [sys.executable, __file__, config, json.dumps(pieces), *overrides, *mesh, "data.batch_size=8"],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def main(path: str, pieces: str, *overrides: str) -> None:
    import jax
    import numpy as np

    from umm_jax import config, families, sharding
    from umm_jax.errors import ConfigError
    from umm_jax.train.state import plan
    from umm_jax.train.step import make_step

    class Pieces:
        size, ids = json.loads(pieces)["size"], json.loads(pieces)["ids"]

        def id(self, piece):
            if piece not in self.ids:
                raise ConfigError(piece)
            return self.ids[piece]

        def encode(self, text):
            return []

    run = config.load(path, list(overrides))
    family = families.get(run.family)
    model = config.from_dict(family.config.ModelConfig, run.model, "config.model")
    mesh = sharding.make_mesh(run.mesh)
    described = plan(lambda rngs: family.model.build(model, rngs), run, mesh)
    spec, home = family.stream.Serializer(model, Pieces()).spec, sharding.batch_sharding(mesh)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct((run.data.batch_size, *shape), np.dtype(dtype), sharding=home)

    batch = {}
    for axis, features in spec.axes.items():
        count = run.data.budget[axis]
        batch[axis] = {n: array((count, *f.shape), f.dtype) for n, f in features.items()}
        batch[axis] |= {n: array((count,), "int32") for n in ("segment_ids", "positions")}
    text = make_step(described, run).lower(described.abstract, batch).as_text()
    whole = [placement.path for placement in described.report().large_replicated]
    print(json.dumps({"mesh": mesh.shape, "whole": whole, "size": len(text), "split": "sharding" in text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
