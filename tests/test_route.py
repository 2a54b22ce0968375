"""What a call takes from where, and `umm route`."""

import io
import json
import sys

import pytest

from umm_jax import cli
from umm_jax.markup import dialects
from umm_jax.markup.grammar import parse
from umm_jax.markup.plan import plan, waves

UMM1 = dialects.get("umm1")


def steps(text: str, *media: str):
    return plan(parse(text, UMM1), media)


def call(task: str, words: str = "x") -> str:
    return f"<{task}>{words}</{task}>"


@pytest.mark.parametrize(
    "text, media, takes",
    [
        (call("image_gen") + call("image_edit") + call("video_gen"), (), [None, "step0", None]),
        (call("image_edit"), ("image", "image"), ["user1"]),
        (call("image_edit"), ("image", "video"), ["user0"]),
        (call("image_gen") + call("image_edit"), ("image",), [None, "step0"]),
        (call("image_gen") + call("image_edit", "@user0 darker"), ("image",), [None, "user0"]),
        (call("image_gen") * 2 + call("image_edit", "@step0 darker"), (), [None, None, "step0"]),
        (call("image_gen") + call("image_to_video") + call("video_edit"), (), [None, "step0", "step1"]),
        # A mask is not a picture: the edit takes what the segmentation took.
        (call("image_seg") + call("image_edit"), ("image",), ["user0", "user0"]),
    ],
)
def test_where_a_call_takes_from(text, media, takes):
    found = steps(text, *media)
    assert [None if s.takes is None else str(s.takes) for s in found] == takes
    assert not any(s.missing for s in found)
    assert all("@" not in s.prompt for s in found)


@pytest.mark.parametrize(
    "text, media, missing",
    [
        (call("image_edit"), (), "no image is there"),
        (call("image_edit"), ("video",), "no image is there"),
        (call("image_edit", "@user3 darker"), ("image",), "@user3 is not there"),
        (call("image_edit", "@step0 darker"), ("image",), "@step0 is not there"),
        (call("video_edit", "@user0 darker"), ("image",), "@user0 is of kind image, not video"),
    ],
)
def test_what_is_missing_is_told(text, media, missing):
    (step,) = steps(text, *media)
    assert step.missing == missing and step.takes is None


def test_what_may_run_side_by_side():
    text = call("image_gen") + call("image_edit") + call("audio_gen") + call("image_to_video", "@step0")
    assert waves(steps(text)) == [[0, 2], [1, 3]]
    assert waves([]) == []


def route(monkeypatch, capsys, given: bytes, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    status = cli.main(["route", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_route_prints_one_object(monkeypatch, capsys):
    text = "Sure. <image_seg>the red mug <box>[0.1, 0.2, 0.3, 0.4]</box>[SEG]</image_seg><nope>"
    status, out, err = route(monkeypatch, capsys, text.encode(), "--json", "--media=image")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert found["segments"] == [{"kind": "text", "text": "Sure. "}, {"kind": "call", "call": 0}]
    (made,) = found["calls"]
    assert made["task"] == "image_seg" and made["prompt"] == "the red mug" and made["masks"] == 1
    assert made["boxes"] == [[0.1, 0.2, 0.3, 0.4]] and made["takes"] == "user0"
    assert [d["code"] for d in found["diagnostics"]] == ["UNKNOWN_TAG"]


def test_route_for_people(monkeypatch, capsys):
    status, out, err = route(monkeypatch, capsys, b"ok <image_edit>darker</image_edit></image_gen>")
    assert status == 0 and out.splitlines() == ["ok", "call 0: image_edit: darker (no image is there)"]
    assert err.startswith("STRAY_CLOSE at")


@pytest.mark.parametrize(
    "given, words, said",
    [
        (b"\xff\xfe", (), "not UTF-8"),
        (b"a" * (2 << 20), (), "more than 1048576 characters"),
        (b"a", ("--dialect=umm2",), "did you mean 'umm1'"),
        (b"a", ("--max-calls=-1",), "must not be negative"),
    ],
)
def test_unusable_input(monkeypatch, capsys, given, words, said):
    status, out, err = route(monkeypatch, capsys, given, "--json", *words)
    assert status == 2 and said in err and not out


# --- with experts


@pytest.fixture
def conversation(tmp_path):
    from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn
    from umm_jax.router.conformance import sample

    user = Turn("user", (Image("i"), Text("make it blue and show me where")))
    record = Conversation("c", (user,), {"i": ImageData.from_array(sample("image").value)})
    (tmp_path / "c.json").write_text(record.to_json())
    return tmp_path / "c.json"


BOX = "<box>[0.250, 0.250, 0.750, 0.750]</box>"


def test_route_runs_experts(monkeypatch, capsys, tmp_path, conversation):
    import numpy as np
    import PIL.Image

    text = f"Done. <image_edit>make it blue {BOX}</image_edit><image_seg>the circle {BOX}[SEG]</image_seg>"
    text += "<video_gen>it rolls</video_gen>"
    words = ["--json", "--experts", f"--conversation={conversation}", f"--out={tmp_path / 'out'}"]
    status, out, err = route(monkeypatch, capsys, text.encode(), *words)
    found = json.loads(out)
    assert (status, err) == (0, "") and json.loads((tmp_path / "out" / "manifest.json").read_text()) == found
    edit, seg, video = found["calls"]
    assert [c["status"] for c in found["calls"]] == ["degraded", "degraded", "error"]
    assert "none of them is named" in video["note"] and video["outputs"] == []
    edited = np.asarray(PIL.Image.open(tmp_path / "out" / edit["outputs"][0]["file"]))
    mask = np.asarray(PIL.Image.open(tmp_path / "out" / seg["outputs"][0]["file"]))
    assert (edited[mask > 0] == (40, 70, 230)).all() and (edited[mask == 0] == 255).all() and mask.any()
    assert edit["expert"] == "classical.edit" and seg["takes"] == "step0"
    status, out, _ = route(monkeypatch, capsys, text.encode(), *words[1:])
    assert status == 0 and "call 0: image_edit: degraded step0-0.png" in out


@pytest.mark.parametrize(
    "words, said", [((), "needs --out"), (("--out=x", "--media=image"), "--conversation")]
)
def test_what_experts_need(monkeypatch, capsys, words, said):
    status, _, err = route(monkeypatch, capsys, b"x", "--experts", *words)
    assert status == 2 and said in err


def test_experts_are_listed(capsys):
    assert cli.main(["experts"]) == 0
    assert "image_seg  stands in for a model" in capsys.readouterr().out


def test_every_kind_of_medium_becomes_a_file():
    import io as bytes_io
    import wave

    import numpy as np
    import PIL.Image

    from umm_jax.router.conformance import sample
    from umm_jax.router.experts import Medium
    from umm_jax.router.saving import encoded

    ending, data = encoded(sample("audio"))
    with wave.open(bytes_io.BytesIO(data)) as file:
        assert ending == ".wav" and file.getnframes() == 16_000 and file.getframerate() == 16_000
    video = sample("video")
    for medium in (video, Medium("track", video.value[..., 0] < 240)):
        ending, data = encoded(medium)
        read = PIL.Image.open(bytes_io.BytesIO(data))
        assert read.n_frames == 4
        read.seek(3)
        wanted = medium.value[3] if medium.kind == "video" else medium.value[3].astype(np.uint8) * 255
        assert (
            np.asarray(read.convert("RGB"))[..., 0] == (wanted[..., 0] if wanted.ndim == 3 else wanted)
        ).all()
