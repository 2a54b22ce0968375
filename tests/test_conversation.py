"""Conversation: exact round trips, and messages that name record, turn and part."""

import base64
import dataclasses
import json

import msgpack
import numpy as np
import pytest

from umm_jax.conversation import (
    SCHEMA,
    Box,
    Conversation,
    Image,
    ImageData,
    Mask,
    RecordError,
    TaskCall,
    Text,
    Turn,
)
from umm_jax.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
REGION = PIXELS[..., 0] > 128
IMAGE = ImageData.from_array(PIXELS)


def example() -> Conversation:
    return Conversation(
        id="r1",
        turns=(
            Turn("system", (Text("be brief"),)),
            Turn("user", (Text("draw Zürich 🦉\n"), Image("in"), Box("in", (0, 0.25, 1 / 3, 1.0), "lake"))),
            Turn(
                "assistant",
                (
                    Image("out"),
                    Mask.from_array("in", REGION, "sky"),
                    TaskCall("go", {"n": 1, "s": "x", "b": True}),
                ),
                loss=True,
                depends_on=(0, 1),
                op="draw",
                meta={"k": [1, 0.1, None, {"deep": "é"}]},
            ),
        ),
        images={"in": IMAGE, "out": ImageData.from_array(PIXELS[::-1].copy())},
        source="test",
        license="CC0-1.0",
        language="de",
        split="iid",
        provenance=("made", "checked"),
        meta={"seed": 2**60, "empty": {}},
    )


def test_round_trips_are_exact():
    c = example()
    c.validate()
    assert Conversation.from_json(c.to_json()) == c
    assert Conversation.from_msgpack(c.to_msgpack()) == c
    back = Conversation.from_msgpack(Conversation.from_json(c.to_json()).to_msgpack())
    assert back.to_msgpack() == c.to_msgpack() and "\n" not in c.to_json()
    assert isinstance(back.turns[2].parts[1].rle, tuple) and isinstance(back.turns, tuple)


@pytest.mark.parametrize("region", [REGION, ~REGION, np.zeros((2, 3), bool), np.ones((2, 3), bool)])
def test_masks_round_trip(region):
    mask = Mask.from_array("in", region)
    assert mask.size == region.shape and sum(mask.rle) == region.size
    np.testing.assert_array_equal(mask.array(), region)
    assert all(type(run) is int for run in mask.rle)


def test_images_round_trip_and_say_when_damaged():
    np.testing.assert_array_equal(IMAGE.array(), PIXELS)
    assert (IMAGE.width, IMAGE.height, IMAGE.mime) == (7, 5, "image/png")
    assert len(IMAGE.sha256) == 64
    with pytest.raises(DataError, match="cannot be decoded"):
        dataclasses.replace(IMAGE, data=IMAGE.data[:40]).array()
    with pytest.raises(ValueError, match="uint8"):
        ImageData.from_array(PIXELS / 255)


def test_with_turn_continues_and_refuses_to_overwrite():
    c = example()
    turn = Turn("user", (Image("new"),))
    longer = c.with_turn(turn, {"new": IMAGE})
    longer.validate()
    assert longer.turns[-1] is turn and len(c.turns) == 3 and "new" not in c.images
    assert c.with_turn(turn, {"in": IMAGE}).images == c.images
    with pytest.raises(RecordError, match="r1.*'out'"):
        c.with_turn(turn, {"out": IMAGE})


def turn(**changes):
    """The example with changes to its last turn."""
    c = example()
    return dataclasses.replace(c, turns=(*c.turns[:-1], dataclasses.replace(c.turns[-1], **changes)))


def part(new):
    """The example with a part added to its last turn."""
    return turn(parts=(*example().turns[-1].parts, new))


def images(**changes):
    return dataclasses.replace(example(), images={**example().images, **changes})


USER = {"role": "user", "depends_on": []}
T2 = r"^record r1, turn 2 \(assistant\)"
P3 = T2 + r", part 3 "
WRONG = {
    "role": (turn(role="bot"), r"^record r1, turn 2 \(bot\): unknown role 'bot'"),
    "no turns": (dataclasses.replace(example(), turns=(), images={}), "^record r1: has no turns"),
    "empty turn": (turn(parts=()), T2 + ": empty turn"),
    "empty text": (turn(parts=(Text(""),)), T2 + ": empty turn"),
    "text type": (part(Text(3)), P3 + r"\(text\): text must be a string"),
    "image ref": (part(Image("nope")), P3 + r"\(image\): unknown image 'nope'; the record has 'in', 'out'"),
    "box of": (part(Box("nope", (0, 0, 1, 1))), P3 + r"\(box\): of unknown image 'nope'"),
    "box outside": (part(Box("in", (0, 0, 1.1, 1))), P3 + r"\(box\): .* leaves the image"),
    "box reversed": (part(Box("in", (0.5, 0, 0.4, 1))), P3 + r"\(box\): .* is reversed"),
    "box nan": (part(Box("in", (0, 0, float("nan"), 1))), P3 + r"\(box\): a box is four numbers"),
    "box of three": (part(Box("in", (0, 0, 1))), P3 + r"\(box\): a box is four numbers"),
    "mask runs": (
        part(Mask("in", (5, 7), (30, 4))),
        P3 + r"\(mask\): run lengths sum to 34, but 5 x 7 is 35",
    ),
    "mask negative": (part(Mask("in", (5, 7), (36, -1))), P3 + r"\(mask\): run lengths must be positive"),
    "mask zero run": (part(Mask("in", (5, 7), (30, 0, 5))), P3 + r"\(mask\): run lengths must be positive"),
    "mask size": (part(Mask("in", (35,), (35,))), P3 + r"\(mask\): size must be \(height, width\)"),
    "label": (part(Box("in", (0, 0, 1, 1), 5)), P3 + r"\(box\): label must be a string"),
    "task name": (part(TaskCall("", {})), P3 + r"\(task\): a task needs a name"),
    "task args": (part(TaskCall("go", {"x": [1]})), P3 + r"\(task\): argument 'x' must be"),
    "part type": (part("hello"), P3 + r"\(str\): is no part"),
    "forward": (turn(depends_on=(2,)), T2 + ": depends_on 2 is no earlier turn; possible: 0 to 1"),
    "negative": (turn(depends_on=(-1,)), T2 + ": depends_on -1"),
    "twice": (turn(depends_on=(1, 1)), T2 + ": duplicate turns in depends_on"),
    "first": (
        dataclasses.replace(example(), turns=(Turn("user", (Text("x"),), depends_on=(0,)),)),
        "nothing",
    ),
    "loss": (turn(role="user"), r"^record r1, turn 2 \(user\): loss on a user turn"),
    "meta tuple": (turn(meta={"a": [{"b": (1, 2)}]}), T2 + r": meta.a\[0\].b: tuple is no plain JSON value"),
    "meta nan": (dataclasses.replace(example(), meta={"a": float("nan")}), "^record r1: meta.a: nan"),
    "meta key": (dataclasses.replace(example(), meta={1: 2}), "^record r1: meta: names must be strings"),
    "id": (dataclasses.replace(example(), id=""), "id must be a non-empty string"),
    "short png": (
        images(out=dataclasses.replace(IMAGE, data=IMAGE.data[:20])),
        "image .out.: 20 bytes cannot be decoded",
    ),
    "bytes": (
        images(out=dataclasses.replace(IMAGE, data=b"junk")),
        "^record r1, image 'out': 4 bytes cannot be",
    ),
    "size": (
        images(out=dataclasses.replace(IMAGE, width=9)),
        "^record r1, image 'out': size is given as 9 x 5",
    ),
    "mime": (images(out=dataclasses.replace(IMAGE, mime="image/jpeg")), "image 'out': type is given"),
    "unused": (images(spare=IMAGE), "^record r1, image 'spare': is stored but shown by no turn"),
    "not yet shown": (
        Conversation(
            "r1", (Turn("user", (Box("a", (0, 0, 1, 1)),)), Turn("user", (Image("a"),))), {"a": IMAGE}
        ),
        r"turn 0 \(user\), part 0 \(box\): of image 'a', which no part has shown before",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_validation_names_record_turn_and_part(name):
    record, message = WRONG[name]
    with pytest.raises(RecordError, match=message):
        record.validate()


def plain(**changes) -> bytes:
    return msgpack.packb({**msgpack.unpackb(example().to_msgpack()), **changes})


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a msgpack conversation"),
        (example().to_msgpack()[:-5], "not a msgpack conversation"),
        (msgpack.packb([1]), "not a conversation"),
        (plain(schema=SCHEMA + 1), f"record r1: written with schema {SCHEMA + 1}, this release reads"),
        (plain(turns=[{"role": "user"}]), "record r1, turn 0: 'parts' is missing"),
        (plain(turns=[{**USER, "parts": [{"kind": "smell"}]}]), "turn 0, part 0: unknown"),
        (plain(turns=[{**USER, "parts": [{"kind": "text"}]}]), "turn 0, part 0: .*'text'"),
        (plain(turns=[{**USER, "parts": [], "los": 1}]), "turn 0: .*'los'"),
        (plain(turns=3), "record r1: "),
        (plain(colour="red"), "record r1: .*'colour'"),
        (plain(images={"a": {}}), "record r1, image 'a': 'data' is missing"),
    ],
)
def test_what_is_no_conversation_is_refused(data, message):
    with pytest.raises(RecordError, match=message):
        Conversation.from_msgpack(data)


def test_json_mistakes():
    text = example().to_json()
    encoded = base64.b64encode(IMAGE.data).decode()
    for wrong, message in [
        (text[:-3], "not a JSON conversation"),
        ('{"schema": 1, "schema": 1}', "duplicate name 'schema'"),
        (text.replace(encoded, "%%%"), "image 'in': data is not base64"),
        (json.dumps({"a": 1}), "no schema version"),
    ]:
        with pytest.raises(RecordError, match=message):
            Conversation.from_json(wrong)
    for unwritable in (part(TaskCall("go", {"x": object()})),):
        with pytest.raises(RecordError, match="record r1: cannot be written"):
            unwritable.to_json()
        with pytest.raises(RecordError, match="record r1: cannot be written"):
            unwritable.to_msgpack()
