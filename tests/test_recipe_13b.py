"""The published recipe at its real size, without memory: where parameters lie, and that a step lowers."""

import json
from pathlib import Path

import pytest
from flax import nnx
from lowering import MESH, lowered

from umm_jax import config, families, sharding
from umm_jax.models.layers import Keys
from umm_jax.train.optimizer import Optimizer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "data" / "mm_interleaved_13b_sharding.json"
RECIPES = ("mm_interleaved_13b", "mm_interleaved_13b_sft")


class Shape:
    """All that ``sharding.param_spec`` asks of a mesh."""

    shape = MESH


def abstract(name: str):
    """(run config, model config, abstract model state)."""
    run = config.load(ROOT / "configs" / f"{name}.py")
    family = families.get(run.family)
    model = config.from_dict(family.config.ModelConfig, run.model, "config.model")
    return run, model, nnx.split(nnx.eval_shape(lambda: family.model.build(model, Keys(0))))[1]


def placements(state) -> dict:
    """{path: [shape, where each dimension is split]}."""
    axes, found = sharding.logical_axes(state), {}
    for path, leaf in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        found[name] = [
            list(leaf.shape),
            [*map(str, sharding.param_spec(axes[name], leaf.shape, 4, Shape))],
        ]
    return found


def test_every_parameter_lies_where_it_lay():
    """Run this file as a script to write the golden anew after a change of the rules that is meant."""
    _, _, state = abstract("mm_interleaved_13b")
    found, golden = placements(state), json.loads(GOLDEN.read_text())
    assert set(found) == set(golden)
    moved = {path: (golden[path], found[path]) for path in golden if found[path] != golden[path]}
    assert not moved


def test_the_groups_are_the_published_ones():
    run, model, state = abstract("mm_interleaved_13b")
    optimizer = Optimizer(run.optim, run.train.steps, sharding.logical_axes(state))
    found = {}
    for rule in optimizer.rules:
        for path in rule.paths:
            decay = rule.group.weight_decay if path in rule.decayed else 0.0
            found[path] = (run.optim.lr * rule.group.lr_scale, decay)
    for path, wanted in EXPECTED.items():
        assert found[path] == pytest.approx(wanted), path
    frozen = ("backbone/layers/mlp/up/kernel", "embed/table", "head/base/kernel", "tower/clip/position")
    assert optimizer.frozen >= {*frozen, "autoencoder/quant/kernel", "unet_sync/mid/core/ignore"}
    assert (model.vocab, run.data.tokens, run.train.loss) == (32002, 2048, {"text": 1.0, "image": 10.0})
    learnt = sum(v.size for p, v in nnx.to_flat_state(state) if "/".join(map(str, p)) not in optimizer.frozen)
    assert 1.4e9 < learnt < 1.6e9


EXPECTED = {
    "backbone/syncs/gate": (1e-4, 0.0),
    "backbone/syncs/core/offsets/kernel": (1e-5, 0.0),
    "tower/extra/0/attention/offsets/kernel": (1e-5, 0.0),
    "backbone/syncs/core/values/kernel": (1e-4, 0.05),
    "backbone/syncs/core/ignore": (1e-4, 0.05),
    "backbone/syncs/core/values/bias": (1e-4, 0.0),
    "backbone/syncs/query_norm/scale": (1e-4, 0.05),
    "unet/mid/resnets/0/norm_1/scale": (1e-5, 0.05),
    "unet/mid/resnets/0/norm_1/bias": (1e-5, 0.0),
    "unet/mid/attentions/0/blocks/0/norm_1/scale": (1e-5, 0.0),
    "unet_sync/mid/query_norm/scale": (1e-4, 0.0),
    "tower/stem/norms/0/scale": (1e-4, 0.05),
    "tower/level": (1e-4, 0.05),
    "soi_token": (1e-4, 0.05),
    "null_condition": (1e-4, 0.05),
    "visual_resampler/queries": (1e-4, 0.05),
    "visual_resampler/norm/scale": (1e-4, 0.0),
    "visual_proj/kernel": (1e-4, 0.05),
}

# Few layers: the rules see every kind of parameter, and lowering takes half a minute.
FEW = ("backbone.layers=4", "tower.clip_adapter.clip.layers=4", "visual_resampler.layers=2")
FEW += ("unet.layers_per_block=1", "tower.clip_adapter.extra=1")


@pytest.mark.parametrize("name", [RECIPES[0], pytest.param(RECIPES[1], marks=pytest.mark.slow)])
def test_a_step_lowers_on_eight_devices_at_reduced_depth(name):
    found = lowered(name, *(f"model.{few}" for few in FEW))
    assert found["mesh"] == MESH and not found["whole"] and found["split"] and found["size"] > 100_000


if __name__ == "__main__":
    rows = (f"{json.dumps(p)}: {json.dumps(v)}" for p, v in placements(abstract(RECIPES[0])[2]).items())
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")
