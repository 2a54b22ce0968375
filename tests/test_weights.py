"""The table between the release's state dict and our parameters: complete, invertible, loud about misfits."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from umm_jax import families
from umm_jax.errors import CheckpointError, ConfigError
from umm_jax.families.mm_interleaved.reference import reference_config
from umm_jax.models.layers import Keys
from umm_jax.weights.table import TURNS, Fresh, Rule, Table, compare, parse_index, require_fit

FAMILY = families.get("mm_interleaved")
RELEASE = Path(__file__).parent / "data" / "mm_interleaved_release_shapes.json"


def shapes_of(config) -> dict:
    state = nnx.split(nnx.eval_shape(lambda: FAMILY.model.build(config, Keys(0))))[1]
    return {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def release():
    """Config, our shapes and theirs at the released size; nothing is allocated."""
    config = FAMILY.config.ModelConfig()
    theirs = {name: tuple(shape) for name, shape in json.loads(RELEASE.read_text()).items()}
    return config, shapes_of(config), theirs


def test_the_release_is_covered_tensor_by_tensor(release):
    config, ours, theirs = release
    table = FAMILY.weights.table(config)
    table.check(ours)
    assert len(theirs) == 2659
    assert table.theirs(ours) == theirs
    assert compare(table, ours, theirs) == []


def test_misfits_are_named_with_both_shapes(release):
    config, ours, theirs = release
    table = FAMILY.weights.table(config)
    found = dict(theirs)
    del found["soi_token"]
    found["mm_decoder.norm.weight"] = (4096,)
    found["mm_decoder.layers.40.mlp.up_proj.weight"] = (13824, 5120)
    wrong = compare(table, ours, found)
    assert {(w.kind, w.name, w.expected, w.found) for w in wrong} == {
        ("missing", "soi_token", (1, 5120), None),
        ("shape", "mm_decoder.norm.weight", (5120,), (4096,)),
        ("extra", "mm_decoder.layers.40.mlp.up_proj.weight", None, (13824, 5120)),
    }
    with pytest.raises(CheckpointError, match=r"3 tensors.*soi_token is missing \(expected \[1, 5120\]\)"):
        require_fit(table, ours, found, "somewhere")


def test_a_table_with_a_hole_or_an_overlap_is_refused(release):
    config, ours, _ = release
    table = FAMILY.weights.table(config)
    with pytest.raises(ValueError, match="soi_token"):
        replace(table, rules=tuple(r for r in table.rules if r.ours != "soi_token")).check(ours)
    with pytest.raises(ValueError, match="backbone/layers/mlp/up/kernel"):
        lost = "mm_decoder.layers.7.mlp.up_proj.weight"
        replace(table, rules=tuple(r for r in table.rules if r.theirs != lost)).check(ours)
    with pytest.raises(ValueError, match="named twice"):
        replace(table, rules=(*table.rules, table.rules[0])).check(ours)


def test_rows_may_share_a_parameter_by_ranges():
    rows = (Rule("old", "embed/table[0:5]"),)
    new = (Fresh("embed/table[5:7]", np.zeros, "two new tokens"),)
    Table(rows, fresh=new).check({"embed/table": (7, 3)})
    with pytest.raises(ValueError, match="once"):
        Table(rows, fresh=new).check({"embed/table": (8, 3)})
    assert parse_index("a/b[:,0:4]") == (slice(None), slice(0, 4)) and parse_index("a/b") == ()


@pytest.mark.parametrize(
    "how, shape",
    [("same", (3, 4)), ("linear", (3, 4)), ("linear_1x1", (3, 4, 1, 1)), ("conv", (3, 4, 2, 5))]
    + [
        ("unfold_2x2", (3, 4, 2, 2)),
        ("transposed", (3, 4, 2, 2)),
        ("first", (1, 3, 4)),
        ("vector", (1, 1, 1, 5)),
    ],
)
def test_turns_are_inverses(how, shape):
    a = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    turned = TURNS[how].ours(a)
    back = TURNS[how].theirs(turned)
    assert back.shape == shape and np.array_equal(back, a)
    assert turned.size == a.size


def test_every_turn_is_tried_above():
    assert set(TURNS) == {
        "same",
        "linear",
        "linear_1x1",
        "conv",
        "unfold_2x2",
        "transposed",
        "first",
        "vector",
    }


def test_old_names_of_the_autoencoder_are_understood(release):
    table = FAMILY.weights.table(release[0])
    old = "image_decoder.decoder.vae.encoder.mid_block.attentions.0.proj_attn.bias"
    assert table.canonical(old) == "image_decoder.decoder.vae.encoder.mid_block.attentions.0.to_out.0.bias"
    assert table.canonical("visual_tokenizer.proj.weight") == "visual_tokenizer.proj.weight"


def test_a_model_of_another_layout_has_no_released_names():
    config = replace(FAMILY.config.ModelConfig(), added_tokens=0)
    with pytest.raises(ConfigError, match="added_tokens"):
        FAMILY.weights.table(config)


def test_the_constants_are_those_of_the_reference():
    folder = Path(os.environ.get("UMM_PARITY_DIR", Path(__file__).parents[2] / "shared" / "parity"))
    path = folder / "mm_interleaved" / "model.safetensors"
    if not path.exists():
        pytest.skip(f"reference tensors not found at {path}; set UMM_PARITY_DIR to run this comparison")
    from safetensors.numpy import load_file

    state = load_file(path)
    found = {name: a.shape for name, a in state.items()}
    config = reference_config(json.loads((path.parent / "config.json").read_text()), found)
    table, ours = FAMILY.weights.table(config), shapes_of(config)
    table.check(ours)
    assert compare(table, ours, found) == []
    for constant in table.constants:
        assert np.abs(state[constant.theirs] - constant.value()).max() <= constant.tolerance, constant.theirs
