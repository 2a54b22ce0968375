"""Scenes, their configuration, how they look, and what is held out."""

import json
import random

import numpy as np
import pytest

from umm_jax.config import from_dict, to_dict
from umm_jax.errors import ConfigError
from umm_jax.world.render import Renderer
from umm_jax.world.scene import BACKGROUNDS, COLOURS, PRESETS, Object, Scene, WorldConfig
from umm_jax.world.splits import SPLITS, Holdout

TINY = WorldConfig.preset("tiny")


def scene(background="white", **cells):
    """scene(c0=("red", "circle")): a tiny scene by cell number."""
    things = [None] * TINY.cells
    for name, kind in cells.items():
        things[int(name[1:])] = Object(*kind)
    return Scene(background, tuple(things))


def test_tiny_is_the_preset_of_the_recipe():
    assert (TINY.px, TINY.grid, TINY.cell_px) == (24, 3, 8)
    assert TINY.shapes == ("circle", "square", "triangle", "cross") and len(TINY.colours) == 6
    assert TINY.backgrounds == ("white", "black") and (TINY.min_objects, TINY.max_objects) == (2, 4)
    assert TINY.held_out_pairs == (("purple", "circle"), ("green", "triangle"))
    assert len(TINY.objects) == 24 and len(TINY.kinds) == 22
    assert not any(TINY.picture_ops[op] for op in ("undo", "story"))
    assert [op for op, weight in TINY.talk_ops.items() if weight] == ["ask"]


def test_a_config_survives_json_and_overrides_merge():
    for name in PRESETS:
        config = WorldConfig.preset(name)
        again = from_dict(WorldConfig, json.loads(json.dumps(to_dict(config))))
        assert again == config and hash(again) == hash(config)
    changed = WorldConfig.preset("tiny", questions={"describe": 0.0}, evidence=False)
    assert changed.questions["describe"] == 0 and changed.questions["colour"] == 1 and not changed.evidence
    assert changed != TINY


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"colour": ["red"]}, "did you mean 'colours'"),
        ({"colours": ["rde"]}, "did you mean 'red'"),
        ({"picture_ops": {"edits": 1.0}}, "did you mean 'edit'"),
        ({"questions": dict.fromkeys(TINY.questions, 0.0)}, "nor all zero"),
        ({"px": 25}, "multiple"),
        ({"max_objects": 9}, "max_objects"),
        ({"held_out_pairs": [["red", "ring"]]}, "no red ring"),
        ({"max_images": 0}, "max_images"),
        ({"evidence": 1}, "expected bool"),
    ],
)
def test_bad_configs_say_what_is_wrong(overrides, message):
    with pytest.raises(ConfigError, match=message):
        WorldConfig.preset("tiny", **overrides)


def test_an_unknown_preset_is_named():
    with pytest.raises(ConfigError, match="did you mean 'small'"):
        WorldConfig.preset("smal")


@pytest.mark.parametrize("name", PRESETS)
def test_boxes_are_tight_and_masks_lie_inside(name):
    config = WorldConfig.preset(name)
    renderer = Renderer(config)
    for index, thing in enumerate(config.objects):
        cell = index % config.cells
        one = Scene("white", tuple(thing if c == cell else None for c in range(config.cells)))
        drawn = (renderer.render(one) != 255).any(-1)
        rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
        assert renderer.box(one, cell) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        mask = renderer.mask(one, cell)
        assert mask.any() and not (mask & ~drawn).any()


def test_rendering_is_exact_where_nothing_is_mixed():
    image = Renderer(TINY).render(scene("black", c0=("red", "square"), c8=("cyan", "cross")))
    assert image.shape == (24, 24, 3) and image.dtype == np.uint8
    assert tuple(image[0, 0]) == BACKGROUNDS["black"]
    assert (image[1:7, 1:7] == COLOURS["red"]).all()
    assert tuple(image[20, 20]) == COLOURS["cyan"] and tuple(image[17, 17]) == BACKGROUNDS["black"]
    with pytest.raises(ValueError, match="empty"):
        Renderer(TINY).box(scene(), 3)


def test_every_scene_has_one_class_that_depends_on_content_alone():
    holdout = Holdout(TINY)
    assert holdout.scene_class(scene(c0=("purple", "circle"))) == "pair"
    assert holdout.scene_class(scene(c2=("red", "square"))) == "position"
    assert holdout.scene_class(scene(c2=("red", "square"), c3=("green", "triangle"))) == "mixed"
    # Published digests: changing how they are made would let test scenes into old training data.
    assert scene(c0=("red", "circle"), c4=("blue", "cross")).digest() == 2468744293
    rng = random.Random(0)
    wanted = ["train"] * 20 + ["iid"] * 20 + ["pair"] * 20 + ["position"] * 20
    assert [holdout.scene_class(holdout.sample(rng, split)) for split in wanted] == wanted


def test_about_one_scene_in_eight_is_held_out():
    rng, holdout = random.Random(0), Holdout(TINY)
    classes = []
    for _ in range(4000):
        cells = [rng.choice(TINY.objects) if rng.random() < 0.3 else None for _ in range(TINY.cells)]
        classes.append(holdout.scene_class(Scene(rng.choice(TINY.backgrounds), tuple(cells))))
    common = classes.count("iid") + classes.count("train")
    assert common > 1000
    assert abs(classes.count("iid") / common - 1 / 8) < 3 * (1 / 8 * 7 / 8 / common) ** 0.5


def test_every_split_names_known_classes_and_says_what_it_measures():
    for split in SPLITS.values():
        assert {split.start, *split.reach} <= {"train", "iid", "pair", "position"} and split.measures
    assert SPLITS["train"].reach == ("train",)


def test_a_world_without_rare_things_says_so():
    plain = WorldConfig.preset("tiny", held_out_pairs=[])
    with pytest.raises(ConfigError, match="holds out nothing for split 'pair'"):
        Holdout(plain).sample(random.Random(0), "pair")


def test_a_world_that_holds_out_too_much_is_refused_rather_than_searched_for_ever():
    everywhere = list(range(TINY.cells))
    with pytest.raises(ConfigError, match="held_out_cells leave 1 cells to train on, .* min_objects = 2"):
        WorldConfig.preset("tiny", held_out_cells=dict.fromkeys(TINY.shapes, everywhere[1:]))
    # Every rare thing is in a held-out place too, so that no scene is of the one class alone.
    overlap = {"held_out_pairs": [["red", "square"]], "held_out_cells": {"square": everywhere}}
    holdout = Holdout(WorldConfig.preset("tiny", **overlap))
    with pytest.raises(ConfigError, match="no scene of split 'pair'"):
        holdout.sample(random.Random(0), "pair")
    assert holdout.scene_class(holdout.sample(random.Random(0), "train")) == "train"
