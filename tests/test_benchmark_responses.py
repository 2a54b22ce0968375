"""Replies as lines of JSON: what other programs may hand in, and what is said where it is wrong."""

import json

import pytest
from benchmark_toy import PICTURE, responses, vqa_data

from umm_jax.conversation import Image, Text, Turn
from umm_jax.errors import DataError
from umm_jax.evaluate import scoring, tasks
from umm_jax.evaluate.contract import Response
from umm_jax.evaluate.measures import rle
from umm_jax.evaluate.responses import read
from umm_jax.evaluate.store import Appending, Folder


@pytest.fixture
def data(tmp_path):
    return vqa_data(tmp_path)


def test_score_needs_a_response_to_every_doc_and_to_no_other(tmp_path, data):
    task = tasks.get("vqav2")
    full = {str(i): "word 0" for i in range(10)}
    good = scoring.score(task, data, responses(tmp_path / "r", full))
    assert good["n"] == 10 and good["parse_rate"] == 1
    with pytest.raises(DataError, match="1 of 11 responses are to ids"):
        scoring.score(task, data, responses(tmp_path / "r", full | {"77": "x"}))
    del full["3"]
    with pytest.raises(DataError, match=r"1 of 10 docs have no response \(3\)"):
        scoring.score(task, data, responses(tmp_path / "r", full))
    assert scoring.score(task, data, tmp_path / "r", partial=True)["n"] == 9
    (tmp_path / "r").write_text('{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n')
    with pytest.raises(DataError, match="came before"):
        read(tmp_path / "r")


def test_replies_of_other_programs_alternate_in_parts(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE.data)
    parts = [{"text": "one"}, {"image": "a.png"}, {"text": "two"}, {"box": [0, 0, 1, 0.5]}]
    responses_file = tmp_path / "r"
    responses_file.write_text(json.dumps({"id": 1, "parts": parts}))
    found = read(responses_file)["1"]
    assert [part.kind for part in found.turns[0].parts] == ["text", "image", "text", "box"]
    assert found.text == "one two" and found.pictures[0].data == PICTURE.data
    for wrong, message in (
        ({"parts": [{"sound": "a"}]}, "a part must be one of"),
        ({"parts": [{"image": "none.png"}]}, "none.png cannot be read"),
        ({"boxes": [[0, 1, 2]]}, "four numbers"),
        ({"text": 3}, "must be a string"),
        ({"answer": "a"}, "has none of"),
    ):
        responses_file.write_text(json.dumps({"id": 1, **wrong}))
        with pytest.raises(DataError, match=message):
            read(responses_file)


def test_a_torn_line_in_a_file_of_others_is_damage(tmp_path):
    (tmp_path / "r").write_text('{"id": 1, "text": "a"}\n{"id": 2, "te')
    with pytest.raises(DataError, match="line 2: not a JSON object"):
        read(tmp_path / "r")
    (tmp_path / "r").write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}')
    assert set(read(tmp_path / "r")) == {"1", "2"}


@pytest.mark.parametrize(
    "line, message",
    [
        ({"boxes": 5}, "'boxes' must be a list"),
        ({"parts": 5}, "'parts' must be a list"),
        ({"scores": "123"}, "'scores' must be numbers"),
        ({"scores": [10**400]}, "'scores' must be numbers"),
        ({"turns": [["a"]]}, "a turn cannot be read"),
        ({"turns": [[{"kind": "text", "text": 5}]]}, "must be strings"),
        ({"turns": [[{"kind": "mask", "of": "a", "size": [2, 2], "rle": [3]}]]}, "a turn cannot be read"),
        ({"turns": [[{"kind": "image", "ref": "../../secret.png"}]]}, "leads out of the folder"),
        ({"images": ["../secret.png"]}, "leads out of the folder"),
        ({"images": ["/secret.png"]}, "leads out of the folder"),
        ({"images": ["a\0.png"]}, "leads out of the folder"),
    ],
)
def test_lines_of_others_that_are_wrong_are_said(tmp_path, line, message):
    (tmp_path / "secret.png").write_bytes(PICTURE.data)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "r").write_text(json.dumps({"id": 1, **line}) + "\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "in" / "r")


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [2, 2.0], "counts": [4]},
        {"size": [-2, -2], "counts": [4]},
        {"size": [2, 2], "counts": [10**30]},
        {"size": [2, 2], "counts": [5, -1]},
        {"size": [2, 2], "counts": [3]},
        {"size": [2, 2], "counts": "\x01"},
        {"counts": [4]},
        [4],
    ],
)
def test_masks_that_are_none_are_said(mask):
    with pytest.raises(DataError, match="here: a mask must be"):
        rle.decode(mask, "here")


def test_pictures_of_replies_are_kept_and_read_back(tmp_path):
    folder = Folder(tmp_path)
    folder.write_plan({}, [("a", "h")])
    drawn = Response("a", (Turn("assistant", (Text("here"), Image("x"))),), {"x": PICTURE})
    shard = Appending(folder, 0, 1)
    shard.add([(drawn, "h")])
    shard.close()
    found = folder.responses()["a"]
    assert found.text == "here" and [p.data for p in found.pictures] == [PICTURE.data]
    (tmp_path / "media" / f"{PICTURE.sha256}.png").write_bytes(b"")
    with pytest.raises(DataError, match="a: the picture"):
        folder.responses()
