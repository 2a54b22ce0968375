"""A training step of a config at its real widths, lowered on eight devices that are not there.

python lowering.py CONFIG [OVERRIDE ...]     with eight virtual devices; prints what was lowered
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MESH = {"data": 1, "fsdp": 4, "tensor": 2}


def lowered(name: str, *overrides: str) -> dict:
    """What :func:`main` says of configs/NAME.py, run in a process of its own."""
    mesh = [f"mesh.{axis}={size}" for axis, size in MESH.items()]
    config = str(ROOT / "configs" / f"{name}.py")
    done = subprocess.run(
        [sys.executable, __file__, config, *overrides, *mesh, "data.batch_size=8"],
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


def main(path: str, *overrides: str) -> None:

    from umm_jax import config, families, sharding
    from umm_jax.train.state import plan
    from umm_jax.train.step import abstract_batch, make_step

    run = config.load(path, list(overrides))
    family = families.get(run.family)
    model = config.from_dict(family.config.ModelConfig, run.model, "config.model")
    mesh = sharding.make_mesh(run.mesh)
    described = plan(lambda rngs: family.model.build(model, rngs), run, mesh)
    batch = abstract_batch(run, family.stream.spec(model), mesh)
    text = make_step(described, run).lower(described.abstract, batch).as_text()
    whole = [placement.path for placement in described.report().large_replicated]
    print(json.dumps({"mesh": mesh.shape, "whole": whole, "size": len(text), "split": "sharding" in text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
