"""The configs of the 7B model: whole mixtures, and a step that lowers on eight devices."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from umm_jax import config, families

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"chatumm_7b": (1,), "chatumm_7b_b": (1, 2), "chatumm_7b_c": (1, 2, 3)}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_a_whole_mixture_and_the_released_sizes(name):
    run = config.load(ROOT / "configs" / f"{name}.py")
    assert abs(sum(source.weight for source in run.data.sources) - 1) < 1e-6
    dialogues = [s.path for s in run.data.sources if s.path.startswith("data/dialogues")]
    assert dialogues == [f"data/dialogues_{n}" for n in STAGES[name]]
    model = config.from_dict(families.get("chatumm").config.ModelConfig, run.model, "config.model")
    assert (model.mixture.layers, model.vision.layers, model.schedule.shift) == (28, 26, 4.0)
    assert model.layout.control and run.train.loss == {"text": 0.25, "image": 1.0}


LOWER = """
    import sys
    import jax, numpy as np
    from umm_jax import config, families, sharding
    from umm_jax.train.state import plan
    from umm_jax.train.step import make_step

    class Pieces:
        size = 151665
        ids = {"<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652}
        ids |= {"<|vision_end|>": 151653, "<|endoftext|>": 151643, "<box>": 1, "</box>": 2}
        def id(self, piece): return self.ids[piece]
        def encode(self, text): return []

    over = ["model.mixture.layers=2", "model.vision.layers=2", "mesh.fsdp=4", "mesh.tensor=2"]
    run = config.load(sys.argv[1], [*over, "data.batch_size=8"])
    family = families.get(run.family)
    model = config.from_dict(family.config.ModelConfig, run.model, "config.model")
    mesh = sharding.make_mesh(run.mesh)
    described = plan(lambda rngs: family.model.build(model, rngs), run, mesh)
    assert not described.report().large_replicated, described.report().large_replicated[:3]
    spec, home = family.stream.Serializer(model, Pieces()).spec, sharding.batch_sharding(mesh)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct((run.data.batch_size, *shape), np.dtype(dtype), sharding=home)

    batch = {}
    for axis, features in spec.axes.items():
        count = run.data.budget[axis]
        batch[axis] = {n: array((count, *f.shape), f.dtype) for n, f in features.items()}
        batch[axis] |= {n: array((count,), "int32") for n in ("segment_ids", "positions")}
    text = make_step(described, run).lower(described.abstract, batch).as_text()
    print(dict(mesh.shape), len(text) > 100_000, "sharding" in text)
"""


def test_a_step_lowers_on_eight_devices_at_reduced_depth():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOWER), str(ROOT / "configs" / "chatumm_7b.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[0] == "{'data': 1, 'fsdp': 4, 'tensor': 2} True True"
