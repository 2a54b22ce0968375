"""Rows whose tokens are shared out among devices by the mesh axis sequence: the same numbers."""

import collections
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from jobs import environment, two_processes

from umm_jax import sharding
from umm_jax.errors import DeviceError

ATTENTION = """
import collections
import json
import jax, jax.numpy as jnp, numpy as np
from umm_jax import sharding
from umm_jax.config import MeshConfig
from umm_jax.models import attention, attention_blocks, attention_gathered, attention_plain, masks

b, kv, g, t, h = 2, 2, 2, 256, 8
keys = jax.random.split(jax.random.key(0), 4)
q, grad = (jax.random.normal(k, (b, kv, g, t, h)) for k in keys[:2])
k, v = (jax.random.normal(k, (b, kv, t, h)) for k in keys[2:])
at = jnp.arange(t)
mask = masks.stream(jnp.stack([1 + at // 100, jnp.where(at < 200, 1, 0)]))
mask = (mask, mask)

def both(way, mesh):
    def run(q, k, v, grad):
        with sharding.use(mesh):
            forward, backward = attention._shared(way, mask)
            out, total = forward(q, k, v, mask, 0.3)
            return out, *backward(q, k, v, mask, out, total, grad, 0.3)
    return [np.asarray(x) for x in jax.jit(run)(q, k, v, grad)]

one = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
class Plain:
    forward = staticmethod(lambda q, k, v, m, s: attention_plain.forward(q, k, v, masks.dense(*m), s))
    backward = staticmethod(
        lambda q, k, v, m, *rest: attention_plain.backward(q, k, v, masks.dense(*m), *rest)
    )
wanted = both(Plain, one)
worst = {}
for name, way in dict(
    blocks=attention_blocks, gathered=attention_gathered, some=attention._InBlocks(2**14, 1)
).items():
    for sizes in ([1, 1, 1, 8], [1, 2, 2, 2]):
        found = both(way, sharding.make_mesh(MeshConfig(*sizes)))
        worst[f"{name} {sizes}"] = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))
print(json.dumps(worst))
"""

SAMPLING = """
import json
import jax, jax.numpy as jnp, numpy as np
from umm_jax import sharding
from umm_jax.config import MeshConfig
from umm_jax.models.deformable import sample

keys = jax.random.split(jax.random.key(0), 4)
values = jax.random.normal(keys[0], (2, 2, 16 + 4, 2, 8))
locations = jax.random.uniform(keys[1], (2, 256, 2, 2, 2, 3, 2), minval=-0.1, maxval=1.1)
weights = jax.random.normal(keys[2], locations.shape[:-1])
grad = jax.random.normal(keys[3], (2, 256, 2, 8))

def both(implementation, mesh):
    def run(*arrays):
        with sharding.use(mesh):
            out, back = jax.vjp(lambda *a: sample(*a, (4, 2), implementation=implementation), *arrays)
            return out, *back(grad)
    return [np.asarray(x) for x in jax.jit(run)(values, locations, weights)]

wanted = both("gather", sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
worst = {}
for sizes in ([1, 1, 1, 8], [1, 2, 2, 2], [2, 1, 4, 1]):
    found = both("pallas", sharding.make_mesh(MeshConfig(*sizes)))
    worst[str(sizes)] = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))
print(json.dumps(worst))
"""

GRADIENTS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from umm_jax import sharding
from umm_jax.config import MeshConfig
from umm_jax.data.packing import batch, pack_row
from umm_jax.models import attention
from umm_jax.train.optimizer import flatten

attention.KEPT = 0  # These rows are short; what long ones do is asked for.
name = sys.argv[1]
if name == "unified_mllm":
    import unified_toy as toy
    lay = toy.serializer()
    model, data = toy.model(toy.config()), toy.batch([[toy.chain()], [toy.chain()]], lay, tokens=256)
elif name == "chatumm":
    import chatumm_toy as toy
    config = toy.model_config(loss_chunk=64)
    lay = toy.serializer(config)
    budget = {"tokens": 160, "images": 4, "latents": 160, "patches": 16}
    rows = [[lay(toy.conversation(seed, upload=True))] for seed in range(2)]
    model, data = toy.model(config), batch([pack_row(row, lay.spec, budget) for row in rows])
else:
    import mm_interleaved_toy as toy
    config = toy.model_config(loss_chunk=16)
    lay = toy.serializer(config)
    budget = {"tokens": 96, "images": 6}
    rows = [[lay(toy.conversation(seed, upload=True))] for seed in range(2)]
    model, data = toy.model(config), batch([pack_row(row, lay.spec, budget) for row in rows])
graphdef, state = nnx.split(model)
keys = iter(jax.random.split(jax.random.key(5), 10000))
params = jax.tree.map(
    lambda p: p + 0.02 * jax.random.normal(next(keys), p.shape), nnx.to_pure_dict(state)
)

def gradients(sizes):
    mesh = sharding.make_mesh(MeshConfig(*sizes))

    def loss(params, data):
        with sharding.use(mesh):
            module = nnx.merge(graphdef, nnx.State(params))
            sums, _ = module.loss_sums(data, jax.random.key(3))
            weights = module.loss_weights(data)
            return sum(sums[name] / jnp.maximum(weights[name], 1) for name in sums)

    places = sharding.shardings(state, mesh), sharding.batch_sharding(mesh)
    compiled = jax.jit(jax.value_and_grad(loss), in_shardings=places).lower(params, data).compile()
    value, found = compiled(*jax.device_put((params, data), places))
    return float(value), {k: np.asarray(v) for k, v in flatten(found).items()}, places[0]

value, one, _ = gradients([1, 1, 1, 1])
other, found, placed = gradients([1, 2, 1, 4])
norms = {path: np.linalg.norm(x) for path, x in one.items()}
large = max(norms.values())
worst = max((float(np.linalg.norm(found[p] - x) / (norms[p] + 1e-4 * large)), p) for p, x in one.items())
split = sum("sequence" in str(s.spec) for s in jax.tree.leaves(placed))
print(json.dumps({"values": [value, other], "worst": worst, "split": split}))
"""


def told(program: str, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(8),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_attention_whose_queries_are_shared_out():
    worst = told(ATTENTION)
    assert len(worst) == 6 and max(worst.values()) < 2e-5, worst


def test_sampling_kernels_on_each_devices_part():
    worst = told(SAMPLING)
    assert len(worst) == 3 and max(worst.values()) < 1e-4, worst


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("mm_interleaved", "unified_mllm")]


@pytest.mark.parametrize("family", ["chatumm", *SLOW])
def test_gradients_are_those_of_one_device(family):
    found = told(GRADIENTS, family)
    one, other = found["values"]
    assert abs(one - other) < 1e-4 * abs(one), found
    assert found["worst"][0] < 1e-3 and found["split"] > 0, found


SHARES = """
import sys
port, process = sys.argv[1], int(sys.argv[2])
import jax
jax.distributed.initialize(f"localhost:{port}", 2, process)
import numpy as np
from umm_jax import sharding
from umm_jax.config import MeshConfig
for sizes in ([2, 2, 2, 1], [1, 2, 2, 2], [1, 1, 4, 2]):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    index, count = sharding.share_of_batch(mesh)
    rows = np.arange(8).reshape(count, -1)[index]
    x = sharding.put_batch(rows, mesh)
    seen = sorted({int(v) for shard in x.addressable_shards for v in shard.data})
    total = jax.jit(lambda x: (x**2).sum())(x)
    print("at:", index, count, x.shape, seen, int(total))
"""


def test_processes_that_hold_the_same_rows_read_the_same_share():
    wanted = (np.arange(8) ** 2).sum()
    for process, out in enumerate(two_processes(SHARES)):
        own = list(range(4 * process, 4 * process + 4))
        lines = [f"{process} 2 (8,) {own} {wanted}"] * 2 + [f"0 1 (8,) {list(range(8))} {wanted}"]
        # Gloo prints from several threads: parts of its lines and empty ones stand between ours.
        told = [line[line.find("at: ") + 4 :] for line in out.splitlines() if "at: " in line]
        assert told == lines


def test_processes_that_hold_parts_of_each_others_rows_are_refused(monkeypatch):
    parts = [(0, 0), (0, 1), (1, 1), (1, 2)]
    device = collections.namedtuple("device", "process_index id")
    places = {device(p, k): (slice(part, part + 1),) for k, (p, part) in enumerate(parts)}
    fake = SimpleNamespace(devices_indices_map=lambda shape: places)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: fake)
    monkeypatch.setattr(sharding, "batch_ways", lambda mesh: 3)
    with pytest.raises(DeviceError, match=r"parts \[0, 1\], \[1, 2\] of it; choose mesh.tensor x"):
        sharding.share_of_batch.__wrapped__(None)
