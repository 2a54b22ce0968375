"""What eight devices of two processes saved is the same on any others, and in half precision."""

import json

import jobs
import ml_dtypes
import numpy as np
from test_sharding import on_eight_devices

SAVES = """
import sys, jax, numpy as np
port, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
from umm_jax import processes, sharding
processes.join(f"localhost:{port}", 2, process)
from jax.experimental import multihost_utils
import toy_family as toy
from test_train_loop import QUIET
from umm_jax.train import state
from umm_jax.train.checkpoint import Checkpoints
from umm_jax.train.optimizer import flatten

run = toy.run_config(mesh={"data": 1, "fsdp": 4, "tensor": 2}, train={"ema": 0.9})
plan = state.plan(lambda rngs: toy.build(QUIET, rngs), run, sharding.make_mesh(run.mesh))
made = state.init(plan, run)
split = [leaf for leaf in jax.tree.leaves(made) if not leaf.is_fully_replicated]
assert split and len(jax.local_devices()) == 4
checkpoints = Checkpoints(folder + "/checkpoints")
checkpoints.save(7, made, {"process": process}, {"family": "toy", "model": {}})
checkpoints.close()
whole = multihost_utils.process_allgather(made["params"], tiled=True)
if process == 0:
    np.savez(folder + "/whole.npz", **flatten(whole))
"""

RESTORES = """
import json, sys, jax, jax.numpy as jnp, numpy as np
import toy_family as toy
from test_train_loop import QUIET
from umm_jax import sharding
from umm_jax.config import MeshConfig
from umm_jax.train import state
from umm_jax.train.checkpoint import Checkpoints
from umm_jax.train.optimizer import flatten

folder = sys.argv[1]
for count, axes, dtype in json.loads(sys.argv[2]):
    run = toy.run_config(train={"ema": 0.9})
    mesh = sharding.make_mesh(MeshConfig(*axes), jax.devices()[:count])
    plan = state.plan(lambda rngs: toy.build(QUIET, rngs), run, mesh)
    as_asked = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    abstract = jax.tree.map(as_asked, plan.abstract["params"])
    found = Checkpoints(folder + "/checkpoints", read_only=True).restore_params(abstract)
    for leaf, asked in zip(jax.tree.leaves(found), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == asked.sharding and leaf.dtype == asked.dtype
    name = f"{folder}/{count}-{'-'.join(map(str, axes))}-{dtype}.npz"
    np.savez(name, **{k: np.asarray(v).astype(np.float32) for k, v in flatten(found).items()})
"""


def test_saved_by_two_processes_and_restored_on_other_meshes(tmp_path):
    jobs.two_processes(SAVES, str(tmp_path))
    cases = [
        (1, (1, 1, 1), "float32"),
        (2, (2, 1, 1), "float32"),
        (2, (1, 1, 2), "float32"),
        (4, (1, 4, 1), "float32"),
        (4, (1, 2, 2), "bfloat16"),
        (8, (2, 2, 2), "float32"),
    ]

    on_eight_devices(RESTORES, str(tmp_path), json.dumps(cases))
    whole = dict(np.load(tmp_path / "whole.npz"))
    assert len(whole) > 10 and any(np.ptp(value) > 0.1 for value in whole.values())
    for count, axes, dtype in cases:
        found = dict(np.load(tmp_path / f"{count}-{'-'.join(map(str, axes))}-{dtype}.npz"))
        assert set(found) == set(whole)
        for path, value in whole.items():
            wanted = value.astype(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bfloat16" else value
            assert np.array_equal(found[path], wanted), (count, axes, path)
