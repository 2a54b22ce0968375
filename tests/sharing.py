"""FLOPs that a device executes of a step of a config, where one has the batch and where eight share it.

python sharing.py CONFIG [OVERRIDE ...]     with eight virtual devices; prints {"1": FLOPs, "8": FLOPs}
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def executed(name: str, *overrides: str) -> dict[str, int]:
    """What :func:`main` says of configs/NAME.py, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, str(ROOT / "configs" / f"{name}.py"), *overrides],
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
    import jax

    from umm_jax import config, families, sharding
    from umm_jax.config import MeshConfig
    from umm_jax.plan import counting, hlo
    from umm_jax.train.state import plan
    from umm_jax.train.step import abstract_batch, make_step

    def flops(devices: int) -> int:
        run = dataclasses.replace(config.load(path, list(overrides)), mesh=MeshConfig(1, devices, 1))
        family = families.get(run.family)
        model = config.from_dict(family.config.ModelConfig, run.model, "model")
        mesh = sharding.make_mesh(run.mesh, jax.devices()[:devices])
        described = plan(lambda rngs: family.model.build(model, rngs), run, mesh)
        batch = abstract_batch(run, family.stream.spec(model), mesh)
        text = make_step(described, run).lower(described.abstract, batch).compile().as_text()
        # The optimizer of matrices works on whole ones, wherever they are.
        by_name = hlo.parse(text).flops_by_name().items()
        return sum(n for name, n in by_name if counting.part_of(name) != counting.OPTIMIZER)

    print(json.dumps({str(n): flops(n) for n in (1, 8)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
