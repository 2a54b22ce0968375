"""The configs of the 7B model: whole mixtures, and a step that lowers on eight devices."""

from pathlib import Path

import pytest
from lowering import MESH, lowered

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


def test_a_step_lowers_on_eight_devices_at_reduced_depth():
    found = lowered("chatumm_7b", "model.mixture.layers=2", "model.vision.layers=2")
    assert found["mesh"] == MESH and not found["whole"] and found["split"] and found["size"] > 100_000
