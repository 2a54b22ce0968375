"""Records of what is shown as records of what is called for."""

import numpy as np
import pytest

from umm_jax import cli
from umm_jax.conversation import Box, Conversation, Image, ImageData, Mask, RecordError, TaskCall, Text, Turn
from umm_jax.data.making import make_records
from umm_jax.data.records import open_source
from umm_jax.data.tasks import Tasks, with_calls
from umm_jax.errors import ConfigError

PICTURES = {
    name: ImageData.from_array(np.full((8, 8, 3), shade, np.uint8))
    for name, shade in zip("abc", (0, 90, 180))
}
MASK = Mask.from_array("a", np.eye(8, dtype=bool), "the dog")


def user(*parts) -> Turn:
    return Turn("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def bot(*parts) -> Turn:
    return Turn("assistant", tuple(Text(p) if isinstance(p, str) else p for p in parts), True)


def record(*turns) -> Conversation:
    shown = {p.ref for turn in turns for p in turn.parts if isinstance(p, Image)}
    return Conversation("r", turns, {name: PICTURES[name] for name in sorted(shown)})


def call(task: str, payload: str) -> TaskCall:
    return TaskCall(task, {"payload": payload})


EDITS = record(
    user("draw a dog"),
    bot(Image("a")),
    user("make it red"),
    bot("here", Image("b")),
    user("where is the dog"),
    bot(MASK, MASK),
    user("what is it"),
    bot("a dog", Box("b", (0.1, 0.2, 0.3, 0.4))),
)


def test_a_call_stands_before_whatever_is_shown():
    found = with_calls(EDITS)
    found.validate()
    said = [turn.parts for turn in found.turns[1::2]]
    assert said == [
        (call("image_gen", "draw a dog"), Image("a")),
        (Text("here"), call("image_edit", "make it red"), Image("b")),
        (call("image_seg", "the dog"), MASK, MASK),
        EDITS.turns[7].parts,
    ]
    assert found.turns[::2] == EDITS.turns[::2] and found.images == EDITS.images
    assert with_calls(found) == found, "what has its call stays as it is"


def test_a_users_picture_is_edited():
    found = with_calls(record(user(Image("a"), "make it red"), bot(Image("b"))))
    assert found.turns[1].parts[0].name == "image_edit"


def test_what_nobody_asked_for():
    with pytest.raises(RecordError, match="record r, turn 1: image: no words ask for it"):
        with_calls(record(user(Image("a")), bot(Image("b"))))
    with pytest.raises(RecordError, match="would be read as a tag"):
        with_calls(record(user("draw <box>"), bot(Image("a"))))


@pytest.fixture
def folder(tmp_path):
    import dataclasses

    records = [dataclasses.replace(EDITS, id=f"r{k}") for k in range(12)]
    make_records(records.__getitem__, 12, tmp_path / "in", how={"test": 1}, shards=2)
    return tmp_path


def test_requests_are_joined(folder):
    assert (
        cli.main(["data", "tasks", str(folder / "in"), f"--out={folder}/out", "--chain=1,3", "--shards=2"])
        == 0
    )
    found = list(open_source(folder / "out"))
    assert len(found) == 12
    sizes = [sum(isinstance(p, TaskCall) for p in turn.parts) for r in found for turn in r.turns[1::2]]
    assert max(sizes) == 2 and min(sizes) <= 1, "words end a chain, so that the edit's reply is a turn's last"
    for one in found:
        one.validate()
        parts = [p for turn in one.turns[1::2] for p in turn.parts]
        assert parts == [p for turn in with_calls(EDITS).turns[1::2] for p in turn.parts]
        for turn in one.turns[::2]:
            assert turn.text
    again = Tasks(str(folder / "in"), (1, 3))
    assert [again(k) for k in range(12)] == found


def test_settings(folder, capsys):
    with pytest.raises(ConfigError, match="from 1"):
        Tasks(str(folder / "in"), (2, 1))
    assert cli.main(["data", "tasks", str(folder / "in"), f"--out={folder}/o", "--chain=x"]) == 2
    assert "--chain is two whole numbers" in capsys.readouterr().err
