"""Training steps of configs at their real widths on eight virtual devices, each in a process of its own.

python lowering.py lowered CONFIG [OVERRIDE ...]      prints what was lowered
python lowering.py executed CONFIG [OVERRIDE ...]     prints the FLOPs of a device, alone and of eight
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MESH = {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}


def lowered(name: str, *overrides: str) -> dict:
    """{"mesh", "whole": large arrays that no axis splits, "size" of the text, "split"} of configs/NAME.py."""
    mesh = [f"mesh.{axis}={size}" for axis, size in MESH.items()]
    return _apart("lowered", name, *overrides, *mesh, "data.batch_size=8")


def executed(name: str, *overrides: str) -> dict[str, int]:
    """{"1": FLOPs of one device that has the whole batch of configs/NAME.py, "8": of one of eight}."""
    return _apart("executed", name, *overrides)


def _apart(what: str, name: str, *overrides: str) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, what, str(ROOT / "configs" / f"{name}.py"), *overrides],
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


def main(what: str, path: str, *overrides: str) -> None:
    import jax

    from umm_jax import config
    from umm_jax.config import MeshConfig
    from umm_jax.plan import counting, hlo
    from umm_jax.plan.steps import train_step

    run = config.load(path, list(overrides))

    def flops(devices: int) -> int:
        step = train_step(dataclasses.replace(run, mesh=MeshConfig(1, devices, 1)), jax.devices()[:devices])
        # The optimizer of matrices works on whole ones, wherever they are.
        by_name = hlo.parse(step.lower().compile().as_text()).flops_by_name().items()
        return sum(n for name, n in by_name if counting.part_of(name) != counting.OPTIMIZER)

    if what == "executed":
        print(json.dumps({str(n): flops(n) for n in (1, 8)}))
        return
    step = train_step(run, jax.devices())
    text = step.lower().as_text()
    whole = [placement.path for placement in step.plan.report().large_replicated]
    found = {"mesh": step.plan.mesh.shape, "whole": whole, "size": len(text), "split": "sharding" in text}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
