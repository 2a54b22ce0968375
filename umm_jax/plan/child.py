"""Compiles the steps of a config for devices that are not there. Run by ``compiling.py``, in its own process.

    python -m umm_jax.plan.child REQUEST OUT

REQUEST is a JSON file, see ``compiling.compiled``. OUT gets train.json, what is known of the program,
train.txt.gz, its text, and work.json, the model FLOPs of each part.
"""

import dataclasses
import gzip
import json
import re
import sys
import time
from pathlib import Path
from typing import Any


def main(request: str, out: str) -> None:
    """Compiles what the request says."""
    import jax

    from umm_jax import config as configs
    from umm_jax.config import MeshConfig
    from umm_jax.plan import chips
    from umm_jax.plan.counting import model_flops
    from umm_jax.plan.steps import train_step

    asked, folder = json.loads(Path(request).read_text()), Path(out)
    if asked["quick"]:
        jax.config.update("jax_optimization_level", "O1")
    run = configs.from_dict(configs.RunConfig, asked["config"], "config")
    if asked["topology"] is None:
        devices = jax.devices()
    else:
        devices = _devices(chips.topology(asked["topology"], asked["slices"]))
    _write(folder, "train", train_step(run, devices), asked["quick"])
    # Work is counted where it is whole: on one device.
    alone = train_step(dataclasses.replace(run, mesh=MeshConfig(1, 1, 1)), jax.devices("cpu")[:1])
    work = {part: dataclasses.asdict(w) for part, w in model_flops(alone).items()}
    (folder / "work.json").write_text(json.dumps(work, indent=1))


def _devices(topology) -> list:
    from jax.experimental import topologies

    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, wrap=topology.wrap, **more
    )
    return found.devices


def _write(folder: Path, name: str, step, quick: bool) -> None:
    import jax

    began = time.perf_counter()
    lowered = step.lower()
    lower_seconds = time.perf_counter() - began
    plan = step.plan
    mesh, report = plan.mesh, plan.report()
    device = mesh.devices.flat[0]
    facts = {
        "program": name,
        "quick": quick,
        "mesh": dict(mesh.shape),
        "device": device.device_kind,
        "platform": device.platform,
        "parameters": sum(p.size for p in jax.tree.leaves(plan.abstract["params"])),
        "trained": sum(p.size for p in jax.tree.leaves(plan.optimizer.split(plan.abstract["params"])[0])),
        "state_bytes": report.bytes_per_device,
        "placements": [
            {"path": p.path, "shape": list(p.shape), "spec": str(p.spec), "bytes": p.bytes_per_device}
            for p in report.placements
        ],
        "lower_seconds": lower_seconds,
        "jax": jax.__version__,
    }
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        facts |= {"error": str(error), "compile_seconds": time.perf_counter() - began}
        facts |= exceeded(str(error))
    else:
        facts["compile_seconds"] = time.perf_counter() - began
        memory = compiled.memory_analysis()
        facts["memory"] = {
            key: int(getattr(memory, f"{key}_in_bytes", 0))
            for key in ("argument_size", "output_size", "alias_size", "temp_size", "peak_memory")
        } | {"host_temp_size": int(getattr(memory, "host_temp_size_in_bytes", 0))}
        with gzip.open(folder / f"{name}.txt.gz", "wt", compresslevel=4) as file:
            file.write(compiled.as_text())
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1))


# How the compiler says what it would need and what there is; the first names arrays, too.
_EXCEEDED = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)


def exceeded(message: str) -> dict[str, Any]:
    """What a compiler that ran out of a chip's memory says: {"needs", "has": bytes, "largest": arrays}.

    {} for any other message.
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = next((hit for pattern in _EXCEEDED if (hit := pattern.search(message))), None)
    if found is None:
        return {}
    needs, has = float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]
    largest = re.findall(r"Size: ([\d.]+[KMGT]?)\s+(?:Operator: (.*)\n\s*)?Shape: (.*)", message)
    return {
        "needs": int(needs),
        "has": int(has),
        "largest": [{"size": size, "op_name": name, "shape": shape} for size, name, shape in largest[:20]],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
