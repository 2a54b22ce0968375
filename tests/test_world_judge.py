"""The judge: exact on right pictures, also slightly soft or noisy ones, and not fooled by ghosts."""

import random

import numpy as np
import pytest

from umm_jax.conversation import ImageData
from umm_jax.errors import DataError
from umm_jax.world.judge import Judge, attributes_right, blur, edit_scores, scene_exact, scene_f1
from umm_jax.world.scene import BACKGROUNDS, Object, Scene, WorldConfig
from umm_jax.world.state import Edit, apply
from umm_jax.world.talk import world

TINY = WorldConfig.preset("tiny")
N = 100


@pytest.fixture(scope="module")
def truth():
    """(judge, scenes, float images)."""
    made, rng = world(TINY), random.Random(0)
    scenes = [made.holdout.sample(rng, "iid") for _ in range(N)]
    return Judge(TINY), scenes, np.stack([made.renderer.render(s) for s in scenes]).astype(float)


def read(judge, images):
    return judge.parse(np.clip(np.round(images), 0, 255).astype(np.uint8))


def exact(judge, scenes, images):
    return np.mean([scene_exact(p, s) for p, s in zip(read(judge, images), scenes, strict=True)])


def test_clean_pictures_are_read_exactly(truth):
    judge, scenes, images = truth
    parsed = read(judge, images)
    assert [p.scene for p in parsed] == scenes and all(p.valid for p in parsed)
    assert max(p.residual for p in parsed) < 0.002 and min(p.margin for p in parsed) > 0.05
    assert all(len(p.cell_residual) == 9 and max(p.cell_residual) == p.residual for p in parsed)


@pytest.mark.parametrize("preset", ["small", "full"])
def test_the_larger_worlds_are_read_exactly_too(preset):
    config = WorldConfig.preset(preset)
    made, judge, rng = world(config), Judge(config), random.Random(1)
    scenes = [made.holdout.sample(rng, "train") for _ in range(24)]
    images = np.stack([made.renderer.render(s) for s in scenes])
    assert exact(judge, scenes, images) == 1
    assert exact(judge, scenes, np.stack([blur(i.astype(float), 0.8) for i in images])) == 1


# Calibration: the corruption table of the recipe for correct pictures (its section 1), with the gate of .06.
@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.2])
def test_blurred_pictures_are_read_exactly(truth, sigma):
    judge, scenes, images = truth
    assert exact(judge, scenes, np.stack([blur(i, sigma) for i in images])) == 1


def test_noise_is_read_exactly_and_gated_by_its_size(truth):
    judge, scenes, images = truth
    rng = np.random.default_rng(0)
    noise = 255 * rng.normal(size=images.shape)
    assert exact(judge, scenes, images + 0.05 * noise) >= 0.99
    loud = read(judge, images + 0.1 * noise)
    assert np.mean([p.scene == s for p, s in zip(loud, scenes, strict=True)]) >= 0.99
    assert not any(p.valid for p in loud)  # .1 of noise is .1 of residual, beyond the gate


def test_dimmed_pictures_and_pure_noise_do_not_pass_for_right_ones(truth):
    judge, scenes, images = truth
    assert exact(judge, scenes, 0.85 * images) < 0.6
    noise = np.random.default_rng(0).uniform(0, 255, images.shape)
    assert not any(p.valid for p in read(judge, noise))


@pytest.mark.parametrize("opacity", [0.3, 0.5, 0.7])
def test_ghosts_are_rejected(truth, opacity):
    judge, scenes, images = truth
    ground = np.array([BACKGROUNDS[s.background] for s in scenes], float)[:, None, None]
    ghosts = read(judge, (1 - opacity) * ground + opacity * images)
    assert not any(p.valid for p in ghosts)


def test_without_blurred_templates_soft_pictures_are_refused(truth):
    _, scenes, images = truth
    sharp = Judge(WorldConfig.preset("tiny", blurs=[0.0]))
    assert exact(sharp, scenes, np.stack([blur(i, 0.8) for i in images])) < 0.5


def test_other_sizes_are_refused_not_resized(truth):
    judge = truth[0]
    with pytest.raises(DataError, match="24, 24"):
        judge.parse(np.zeros((1, 48, 48, 3), np.uint8))
    assert judge.read(ImageData.from_array(np.zeros((48, 48, 3), np.uint8))) is None


BEFORE = Scene("white", (Object("red", "circle"), None, None, None, Object("blue", "cross"), *[None] * 4))
EDITS = [
    Edit("add", 8, Object("cyan", "square")),
    Edit("remove", 0),
    Edit("move", 4, 2),
    Edit("background", None, "black"),
    Edit("recolour", 0, "yellow"),
    Edit("reshape", 4, "square"),
]


def see(shown):
    return Judge(TINY).parse(world(TINY).renderer.render(shown)[None])[0]


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.kind)
def test_edit_scores_tell_change_from_preservation(edit):
    target = apply(edit, BEFORE)
    done = {"exact": 1, "success": 1, "preservation": 1, "no_op": 0}
    assert edit_scores(see(target), BEFORE, target) == done
    undone = {"exact": 0, "success": 0, "preservation": 1, "no_op": 1}
    assert edit_scores(see(BEFORE), BEFORE, target) == undone
    # Right change, but something else appears where nothing was asked for.
    over = {"exact": 0, "success": 1, "preservation": 0, "no_op": 0}
    assert edit_scores(see(target.put((6, Object("green", "cross")))), BEFORE, target) == over
    assert set(edit_scores(None, BEFORE, target).values()) == {0.0}


def test_scene_scores():
    half = BEFORE.put((4, Object("red", "cross")))
    assert scene_f1(see(BEFORE), BEFORE) == 1 and scene_f1(see(half), BEFORE) == 0.5
    assert not scene_exact(see(half), BEFORE) and scene_f1(None, BEFORE) == 0
    right = attributes_right(see(half), BEFORE)
    assert right == {"presence": 1, "colour": 0.5, "shape": 1, "size": 1, "texture": 1}
