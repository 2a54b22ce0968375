"""The families on the real world, through the command line: the same on 8 devices and after any death."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jobs import environment

from umm_jax import cli
from umm_jax.train.checkpoint import load_params
from umm_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent


class World(NamedTuple):
    """A config, and a folder with a few dialogues and their tokenizer."""

    config: Path
    folder: Path

    @property
    def overrides(self) -> list[str]:
        return [
            f'data.sources=[{{"path": "{self.folder / "data"}"}}]',
            f"data.tokenizer={self.folder / 'tokenizer.model'}",
            "data.batch_size=8",
        ]


STAGE_3 = pytest.param("world_unified_3", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["world_tiny", "world_chatumm", STAGE_3])
def world(request, tmp_path_factory):
    config, folder = ROOT / "configs" / f"{request.param}.py", tmp_path_factory.mktemp("world")
    base = [f"--config={config}"]
    cli.dispatch(["data", "synthesize", *base, "--count=96", f"--out={folder / 'data'}", "--shards=2"])
    cli.dispatch(["data", "tokenizer", *base, f"--out={folder / 'tokenizer.model'}"])
    return World(config, folder)


def command(world, workdir, steps, *overrides):
    return [
        sys.executable,
        "-m",
        "umm_jax.cli",
        "train",
        f"--config={world.config}",
        f"--workdir={workdir}",
        *(f"--config.{override}" for override in world.overrides),
        f"--config.train.steps={steps}",
        "--config.train.log_every=1",
        "--config.train.eval_every=0",
        *overrides,
    ]


def run(argv, devices=1, timeout=600):
    done = subprocess.run(argv, env=environment(devices), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.slow
def test_one_device_and_eight_give_equal_losses(world, tmp_path):
    """float32 over 10 steps; the mesh has all three axes."""
    run(command(world, tmp_path / "one", 10))
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    run(command(world, tmp_path / "eight", 10, *mesh), devices=8)
    one, eight = losses(tmp_path / "one"), losses(tmp_path / "eight")
    assert len(one) == 10 and one[-1] < one[0]
    np.testing.assert_allclose(eight, one, rtol=1e-4)


GRADIENTS = """
import sys, jax, numpy as np
from flax import nnx
from umm_jax import config, families, sharding
from umm_jax.data.pipeline import make_loader
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.train import state
from umm_jax.train.optimizer import flatten

found = []
for sizes in ([1, 1, 1], [2, 2, 2]):
    mesh = [f"mesh.{name}={size}" for name, size in zip(sharding.AXES, sizes)]
    run = config.load(sys.argv[1], [*sys.argv[2:], *mesh])
    family = families.get(run.family)
    model = config.from_dict(family.config.ModelConfig, run.model, "config.model")
    mesh = sharding.make_mesh(run.mesh)
    plan = state.plan(lambda key: family.model.build(model, key), run, mesh)
    params = state.init(plan, run)["params"]
    serializer = family.stream.Serializer(model, Tokenizer.load(run.data.tokenizer))
    with make_loader(run.data, serializer) as loader:
        batch = sharding.put_batch(next(loader), mesh)

    def loss(params, batch):
        with sharding.use(mesh):
            module = nnx.merge(plan.graphdef, nnx.State(params))
            sums, _ = module.loss_sums(batch, jax.random.key(3))
            weights = module.loss_weights(batch)
            return sum(sums[name] / weights[name] for name in sums)

    gradient = flatten(jax.jit(jax.grad(loss))(params, batch))
    found.append({path: np.asarray(value) for path, value in gradient.items()})
for path, one in found[0].items():
    norm = np.linalg.norm(one)
    if norm > 1e-6:
        print(np.linalg.norm(found[1][path] - one) / norm, path)
"""


@pytest.mark.slow
def test_one_device_and_eight_give_equal_gradients_of_every_parameter(world):
    """Losses forgive a wrong gradient for a while; this does not."""
    argv = [sys.executable, "-c", GRADIENTS, str(world.config), *world.overrides]
    done = subprocess.run(argv, env=environment(8), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 50
    assert not [line for line in lines if float(line[0]) > 1e-4]


@pytest.mark.slow
def test_killed_at_three_random_steps_a_run_ends_with_the_same_bits(world, tmp_path):
    saves = ["--config.train.save_every=2"]
    run(command(world, tmp_path / "whole", 12, *saves))
    argv, workdir = command(world, tmp_path / "killed", 12, *saves), tmp_path / "killed"
    for at in sorted(random.sample(range(2, 12), 3)):
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(argv, env=environment(), **silent)
        while process.poll() is None and reached(workdir) < at:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(argv)
    whole, killed = (load_params(tmp_path / name)[2] for name in ("whole", "killed"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(killed), strict=True):
        assert np.array_equal(a, b)
    assert losses(workdir) == losses(tmp_path / "whole")


def reached(workdir):
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return max((json.loads(line)["step"] for line in lines), default=0)
