"""Compiles the steps of a config for devices that are not there. Run by ``compiling.py``, in its own process.

    python -m umm_jax.plan.child REQUEST OUT

REQUEST is a JSON file, see ``compiling.Request``. For each program it asks for, OUT gets NAME.json, what is
known of it, and NAME.txt.gz, its text.
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
    from umm_jax import families, sharding
    from umm_jax.plan import chips
    from umm_jax.train import state as states

    asked, folder = json.loads(Path(request).read_text()), Path(out)
    run = configs.from_dict(configs.RunConfig, asked["config"], "config")
    family = families.get(run.family)
    model = configs.from_dict(family.config.ModelConfig, run.model, "config.model")
    if asked["topology"] is None:
        devices = jax.devices()
    else:
        devices = _devices(chips.topology(asked["topology"], asked["slices"]))
    mesh = sharding.make_mesh(run.mesh, devices)
    plan = states.plan(lambda rngs: family.model.build(model, rngs), run, mesh)
    spec = family.stream.spec(model)
    _write(folder, "train", _train(run, plan, spec, mesh), plan)
    (folder / "work.json").write_text(json.dumps(_work(run, family, model, spec), indent=1))


def _devices(topology) -> list:
    from jax.experimental import topologies

    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, wrap=topology.wrap, **more
    )
    return found.devices


def _train(run, plan, spec, mesh):
    from umm_jax.train.step import abstract_batch, make_step

    began = time.perf_counter()
    lowered = make_step(plan, run).lower(plan.abstract, abstract_batch(run, spec, mesh))
    return lowered, time.perf_counter() - began


def _work(run, family, model, spec) -> dict[str, dict[str, float]]:
    """Model FLOPs of a step, {part: {"forward", "backward"}}, counted where it is whole: on one device."""
    import jax

    from umm_jax import sharding
    from umm_jax.config import MeshConfig
    from umm_jax.plan.counting import model_flops
    from umm_jax.train import state as states
    from umm_jax.train.step import abstract_batch, make_step

    alone = dataclasses.replace(run, mesh=MeshConfig(1, 1, 1))
    mesh = sharding.make_mesh(alone.mesh, jax.devices("cpu")[:1])
    plan = states.plan(lambda rngs: family.model.build(model, rngs), alone, mesh)
    found = model_flops(make_step(plan, alone), plan.abstract, abstract_batch(alone, spec, mesh))
    return {part: dataclasses.asdict(work) for part, work in found.items()}


def _write(folder: Path, name: str, made: tuple[Any, float], plan) -> None:
    import jax

    lowered, lower_seconds = made
    mesh, report = plan.mesh, plan.report()
    device = mesh.devices.flat[0]
    facts = {
        "program": name,
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
        cost = compiled.cost_analysis() or {}
        facts["reported"] = {key: float(cost[key]) for key in ("flops", "bytes accessed") if key in cost}
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
