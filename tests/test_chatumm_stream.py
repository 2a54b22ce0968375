"""Streams of ChatUMM: what is said where, what is left out, and pictures of any shape."""

import dataclasses
import json

import chatumm_toy as toy
import numpy as np
import parity
import pytest

from umm_jax import config
from umm_jax.conversation import Conversation, Image, TaskCall, Text, Turn
from umm_jax.data.packing import pack_row
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.chatumm.pictures import FitConfig, fitted, fitted_size, patches, places
from umm_jax.families.chatumm.segments import NO_LABEL, Segment, Shown, Special, lay
from umm_jax.stream import check_stream, stream_length

START, END, VISION, VISION_END, TURN_END = range(4, 9)


@pytest.fixture(scope="module")
def serializer():
    return toy.serializer(toy.model_config())


def in_order(stream):
    """Everything of a stream by its place in it: (kind, id or image, label, mode) a token."""
    tokens, latents = stream["tokens"], stream["latents"]
    kinds = np.where(tokens["patch"] >= 0, "patch", "word")
    found = dict(zip(tokens["order"].tolist(), zip(kinds, tokens["ids"], tokens["label"], tokens["weight"])))
    noised = np.where(latents["time"] >= 0, "noised", "clean")
    found |= dict(
        zip(latents["order"].tolist(), zip(noised, latents["image"], latents["time"], latents["weight"]))
    )
    assert sorted(found) == list(range(len(found)))
    return [found[i] for i in range(len(found))]


def test_what_each_token_is_and_is_asked(serializer):
    ids = toy.Words().encode
    c = Conversation(
        "c",
        (
            Turn("user", (Text("draw a circle"),)),
            Turn("assistant", (Text("ok"), Image("a")), loss=True),
            Turn("user", (Text("what color"),)),
            Turn("assistant", (Text("red"),), loss=True),
        ),
        {"a": toy.picture(np.random.default_rng(0), (8, 8))},
    )
    stream = serializer(c)
    check_stream(stream, serializer.spec)
    found = in_order(stream)
    said = [(kind, int(what), int(label)) for kind, what, label, weight in found if weight or kind != "clean"]
    draw, ok, what, red = ids("draw a circle"), ids("ok"), ids("what color"), ids("red")
    words = lambda values, label=NO_LABEL: [("word", value, label) for value in values]  # noqa: E731
    expected = [
        *words([START, *draw]),
        ("word", END, START),  # the user has spoken: write
        ("word", START, ok[0]),
        ("word", ok[0], END),
        ("word", END, VISION),  # then draw
        *words([VISION]),
        *[("noised", 0, 0)] * 4,
        *words([VISION_END]),
        *words([VISION, VISION_END]),  # around the clean cells, which are left out of this list
        *words([VISION]),
        ("patch", 0, NO_LABEL),
        ("word", VISION_END, TURN_END),  # and the turn is over
        *words([START, *what]),
        ("word", END, START),
        ("word", START, red[0]),
        ("word", red[0], END),
        ("word", END, TURN_END),
    ]
    assert said == expected
    control = stream["tokens"]["control"]
    assert control.sum() == 5 and set(stream["tokens"]["ids"][control == 1]) == {END, VISION_END}
    # The noised copy takes the position of the clean one; what follows stands after both.
    ropes = {kind: set() for kind in ("noised", "clean")}
    for time, rope in zip(stream["latents"]["time"], stream["latents"]["rope"]):
        ropes["clean" if time < 0 else "noised"].add(int(rope))
    assert ropes["noised"] == ropes["clean"] == {8}
    assert stream["tokens"]["rope"].max() == 8 + 2 + 4 + 3 - 1


def test_a_prompt_ends_where_something_is_to_be_said_and_has_nothing_noised(serializer):
    c = toy.asked(toy.conversation(0), "what color is it")
    prompt = serializer.prompt(c)
    assert prompt["tokens"]["ids"][-1] == END and not prompt["tokens"]["weight"].any()
    assert (prompt["latents"]["time"] == -1).all()
    whole = serializer(toy.conversation(0))
    for axis, key in (("tokens", "rope"), ("latents", "place")):
        clean = whole[axis][key] if axis == "tokens" else whole[axis][key][whole[axis]["time"] < 0]
        if axis == "tokens":
            # The brackets of two noised pictures are the only understanding tokens a prompt lacks.
            assert len(clean) - 4 + len(toy.Words().encode("what color is it")) + 2 == len(prompt[axis][key])
        else:
            np.testing.assert_array_equal(prompt[axis][key], clean)


def test_nothing_is_asked_of_a_model_without_control():
    plain = toy.serializer(toy.model_config(layout={**toy.model_section()["layout"], "control": False}))
    stream = plain(toy.conversation(0))
    assert not stream["tokens"]["control"].any()
    ends = stream["tokens"]["ids"] == END
    assert (stream["tokens"]["label"][ends] == NO_LABEL).all()


def test_roles_and_the_last_picture_are_choices():
    layout = toy.model_section()["layout"]
    named = toy.serializer(toy.model_config(layout={**layout, "roles": "chatml"}))
    ids = named(toy.conversation(0))["tokens"]["ids"]
    assert [toy.Words().pieces[i] for i in ids[:3]] == ["<|im_start|>", "user", "draw"]
    ends = toy.serializer(toy.model_config(layout={**layout, "last_image": "drawn"}))
    stream = ends(toy.conversation(0, exchanges=1))
    assert (stream["latents"]["time"] == 0).all() and stream_length(stream)["patches"] == 0


def test_packing_keeps_references_on_every_axis(serializer):
    streams = [serializer(toy.conversation(seed, exchanges=1 + seed)) for seed in range(2)]
    budget = {"tokens": 80, "images": 4, "latents": 100, "patches": 20}
    row = pack_row(streams, serializer.spec, budget)
    for k, stream in enumerate(streams, 1):
        here = {axis: row[axis]["segment_ids"] == k for axis in row}
        patch = row["tokens"]["patch"][here["tokens"]]
        read = row["patches"]["pixels"][patch[patch >= 0]]
        np.testing.assert_array_equal(read, stream["patches"]["pixels"])
        image = row["latents"]["image"][here["latents"]]
        np.testing.assert_array_equal(
            row["images"]["pixels"][image], stream["images"]["pixels"][stream["latents"]["image"]]
        )
        assert (row["latents"]["time"][here["latents"]] >= 0).sum() == (stream["latents"]["time"] >= 0).sum()
    assert (row["latents"]["time"][row["latents"]["segment_ids"] == 0] == -1).all()


def test_a_picture_that_is_drawn_again_has_a_time_of_its_own(serializer):
    c = toy.conversation(5, exchanges=1)
    c = toy.asked(c, "draw a red circle").with_turn(Turn("assistant", (Image("i0"),), loss=True))
    c = toy.asked(c, Image("i0"), "what color is it").with_turn(Turn("assistant", (Text("red"),), loss=True))
    stream = serializer(c)
    noised = stream["latents"]["time"][stream["latents"]["time"] >= 0]
    assert sorted(set(noised)) == [0, 1] and len(noised) == 2 * 16
    # Shown by the user, it is the one drawn last; as history there is only one.
    assert stream_length(stream)["images"] == 2 and stream["latents"]["image"][-1] == 1
    assert stream_length(serializer.prompt(toy.asked(c, "ok")))["images"] == 1


# --- what is left out ---------------------------------------------------------------------------------


def with_drop(**drop):
    layout = {**toy.model_section()["layout"], "drop": dict(text=0.0, images=0.0, single=None) | drop}
    return toy.serializer(toy.model_config(layout=layout))


def count(stream, kind):
    return sum(k == kind for k, *_ in in_order(stream))


def test_each_regime_leaves_out_what_it_says():
    c, rng = toy.conversation(1, exchanges=3), np.random.default_rng
    whole = with_drop()(c, rng(0))
    words = with_drop(text=1.0)(c, rng(0))
    # The user's five tokens of the last turn, and nothing else; positions close up behind them.
    gone = len(toy.Words().encode("draw a red circle")) + 2
    assert stream_length(words)["tokens"] == stream_length(whole)["tokens"] - gone
    assert whole["tokens"]["rope"].max() - words["tokens"]["rope"].max() == gone
    blind = with_drop(images=1.0)(c, rng(0))
    assert count(blind, "noised") == count(whole, "noised") == 3 * 16
    assert count(blind, "clean") == 16 and count(blind, "patch") == count(whole, "patch") / 3
    # A picture that is left out still takes its positions.
    assert blind["tokens"]["rope"].max() == whole["tokens"]["rope"].max()
    for stream in (words, blind):
        check_stream(stream, toy.serializer(toy.model_config()).spec)


def test_what_carries_loss_is_never_left_out():
    drop = with_drop(single=(1.0, 1.0, 1.0))
    stream = drop(toy.conversation(2, exchanges=1), np.random.default_rng(0))
    assert count(stream, "noised") == 16 and count(stream, "clean") == count(stream, "patch") == 0
    learned = stream["tokens"]["label"][stream["tokens"]["weight"] > 0]
    assert learned.tolist() == [*toy.Words().encode("ok a blue square"), END, VISION]


def test_shares_are_as_asked_and_nothing_is_drawn_without_a_generator():
    lay_out, c = with_drop(text=0.3, images=0.2), toy.conversation(3)
    whole = stream_length(lay_out(c))
    found = [stream_length(lay_out(c, np.random.default_rng(n))) for n in range(400)]
    same = np.mean([length == whole for length in found])
    blind = np.mean([length["patches"] < whole["patches"] for length in found])
    assert abs(same - 0.5) < 0.08 and abs(blind - 0.2) < 0.07
    with pytest.raises(ConfigError, match="shares must lie in"):
        with_drop(text=0.7, images=0.7)


def test_latents_of_pictures_that_are_only_talked_about():
    c = toy.conversation(4, exchanges=1, upload=True)
    assert count(with_drop(latents=1.0)(c, np.random.default_rng(0)), "clean") == 0
    assert count(with_drop(latents=1.0)(toy.conversation(4, 1), np.random.default_rng(0)), "clean") == 16


# --- pictures -------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_reference():
    path = parity.FOLDER.parent / "bagel" / "fixture.json"
    if not path.exists():
        pytest.skip(f"reference tensors not found at {path}; set UMM_PARITY_DIR to run this comparison")
    for case in json.loads(path.read_text())["resize_cases"]:
        limits = FitConfig(*(case[name] for name in ("max_size", "min_size", "stride", "max_pixels")))
        assert list(fitted_size(*case["in_wh"], limits, case["img_num"])) == case["out_wh"]


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 900), (1024, 1024), (517, 511)])
def test_every_picture_fits_the_canvas_and_the_table(size):
    large, small = FitConfig(), FitConfig(980, 224, 14)
    pixels = fitted(np.zeros((size[1], size[0], 3), np.uint8), large)
    seen = fitted(pixels, small)
    for shape, limits in ((pixels.shape, large), (seen.shape, small)):
        assert max(shape[:2]) <= limits.longest and min(shape[:2]) >= limits.stride
        assert shape[0] % limits.stride == shape[1] % limits.stride == 0
        places(shape[0] // limits.stride, shape[1] // limits.stride, limits.most_cells)


def test_patches_go_by_row_column_channel():
    pixels = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    found = patches(pixels, 2)
    assert found.shape == (6, 12)
    np.testing.assert_array_equal(found[4], pixels[2:4, 2:4].reshape(-1))
    with pytest.raises(ValueError, match="do not tile"):
        patches(pixels, 4)


def test_a_table_that_is_too_small_is_named_when_the_config_is_read():
    layout = toy.model_section()["layout"]
    with pytest.raises(ConfigError, match="latent_grid=3"):
        toy.model_config(layout={**layout, "latent_grid": 3})
    with pytest.raises(ConfigError, match="a latent token covers 8 pixels"):
        toy.model_config(latent_patch=8)


# --- what cannot be ------------------------------------------------------------------------------------


def test_parts_the_family_cannot_express_are_named(serializer):
    c = Conversation("t", (Turn("user", (TaskCall("segment", {}),)),))
    with pytest.raises(DataError, match="record t, turn 0: the chatumm family cannot express task calls"):
        serializer(c)
    silent = Conversation("s", (Turn("user", ()), Turn("assistant", (Text("ok"),), loss=True)))
    with pytest.raises(DataError, match="record s, turn 0: a user turn without any part"):
        serializer(silent)


def test_the_frames_of_a_video_are_one_split_with_one_time():
    shown = [Shown((2, 2), (1, 1))] * 2
    frames = [
        Segment("latent", image=0, learned=True, delta=2),
        Segment("latent", image=1, learned=True, continues=True),
    ]
    laid = lay(frames, shown, Special(*range(4, 9)), toy.model_config().layout.grids)
    assert set(laid.latents["split"]) == {0} and set(laid.latents["time"]) == {0}
    assert laid.latents["rope"].tolist() == [0] * 4 + [2] * 4


def test_what_the_loader_needs_is_said_by_the_axes(tmp_path):
    from umm_jax.data.making import make_records
    from umm_jax.data.pipeline import make_loader

    out = make_records(toy.conversation, 6, tmp_path / "data", how={}, shards=1)
    source = {"path": str(tmp_path / "data")}
    base = dict(sources=[source], tokens=160, images=4, batch_size=2, packing="none")
    make = lambda **more: config.from_dict(config.DataConfig, base | more)  # noqa: E731
    lay_out = with_drop(text=0.5)
    with pytest.raises(ConfigError, match="need a budget for tokens, images, latents, patches"):
        make_loader(make(), lay_out)
    data = make(axes=dict(latents=96, patches=16))
    with make_loader(data, lay_out) as loader:
        first = [next(loader) for _ in range(7)]
        state = loader.get_state()
        rest = next(loader)
    with make_loader(data, lay_out) as loader:
        loader.set_state(state)
        again = next(loader)
    for axis, features in rest.items():
        for name, values in features.items():
            np.testing.assert_array_equal(again[axis][name], values)
    # Six records, fourteen rows: what is left out of one differs from epoch to epoch.
    lengths = {}
    for batch in first:
        for row in range(2):
            key = batch["images"]["pixels"][row].tobytes()
            lengths.setdefault(key, set()).add(int((batch["tokens"]["segment_ids"][row] > 0).sum()))
    assert len(lengths) == len(out) and any(len(found) > 1 for found in lengths.values())
    with pytest.raises(DataError, match="raise data.axes.latents"):
        with make_loader(dataclasses.replace(data, axes=dict(latents=40, patches=16)), lay_out) as loader:
            next(loader)


def test_pictures_are_made_smaller_where_a_row_is_too_short_for_them(tmp_path):
    from umm_jax.data.making import make_records
    from umm_jax.data.pipeline import make_loader

    make_records(toy.conversation, 6, tmp_path / "data", how={}, shards=1)
    base = dict(
        sources=[{"path": str(tmp_path / "data")}], tokens=160, images=4, batch_size=2, packing="none"
    )
    whole = config.from_dict(config.DataConfig, base | dict(axes=dict(latents=96, patches=16)))
    short = dataclasses.replace(whole, axes=dict(latents=40, patches=16), oversize="smaller")
    lay_out = with_drop(text=0.0, images=0.0)
    with make_loader(whole, lay_out) as loader, make_loader(short, lay_out) as other:
        for _ in range(6):
            full, less = next(loader), next(other)
            for row in range(2):
                needed = int((full["latents"]["segment_ids"][row] > 0).sum())
                used = int((less["latents"]["segment_ids"][row] > 0).sum())
                # What fits is left as it is; the words are there either way.
                assert used == needed if needed <= 40 else 0 < used <= 40
                texts = [b["tokens"]["ids"][row][b["tokens"]["patch"][row] < 0] for b in (full, less)]
                np.testing.assert_array_equal(*(t[t > 0] for t in texts))
        assert other.stats()["truncated"] > 0 and other.stats()["dropped"] == 0


def test_a_smaller_picture_keeps_its_shape_and_the_bounds():
    whole = FitConfig(1024, 512, 16)
    less = whole.smaller(0.25)
    assert (less.longest, less.shortest, less.stride) == (512, 256, 16)
    assert fitted_size(1024, 512, less) == (512, 256)
    assert FitConfig(16, 16, 16).smaller(0.01).longest == 16
