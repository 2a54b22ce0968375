"""Reports from the files of a run: the figures kept, the page whole, damage and absence said in one line."""

import html.parser
import json
import math
import re

import msgpack
import numpy as np
import pytest

from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn
from umm_jax.errors import CheckpointError, DataError
from umm_jax.evaluate import cost, report
from umm_jax.evaluate import html as pieces


def picture(value: int) -> ImageData:
    return ImageData.from_array(np.full((6, 6, 3), value, np.uint8))


def sample(skill: str, ok: bool, index: int, kind: str = "", dialogue: bool = False) -> dict:
    drawn = {"drawn": picture(50)}
    asked = Turn("user", (Text(f"draw <b>{skill} {index}</b>"),))
    conversation = Conversation(f"{skill}-{index}", (asked,))
    conversation = conversation.with_turn(Turn("assistant", (Text("ok"), Image("drawn"))), drawn)
    return {
        "split": "iid",
        "skill": skill,
        "kind": kind or skill,
        "id": conversation.id,
        "ok": ok,
        "scores": {"exact": float(ok)},
        "conversation": conversation.to_msgpack(),
        "verdicts": {"1": {"ok": ok, "expected": "right answer"}} if dialogue else {},
        "expected": "on white : nothing",
        "target": None if dialogue or skill == "vqa" else picture(51).data,
        "before": picture(52).data if skill == "edit" else None,
    }


def figure(value: float, **oracles: float) -> dict:
    return {"value": value, "n": 64, "stderr": 0.01, "oracles": oracles}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "demo"
    (folder / "eval").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"family": "mm_interleaved", "train": {"steps": 40}}))
    rows = [{"step": 0, "kind": "run", "devices": 1, "parameters": 5}]
    rows += [
        {"step": s, "kind": "train", "loss": 2.0 / s, "loss/text": 1.0 / s, "lr": 0.1} for s in range(1, 41)
    ]
    rows += [{"step": 40, "kind": "eval", "eval/draw_scene_exact": 0.9, "seconds": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    results = {
        "step": 40,
        "weights": "raw",
        "parameters": 2_489_352,
        "device": "cpu",
        "splits": {
            "iid": {
                "draw_scene_exact": figure(0.95, random_cells=0.003),
                "vqa_accuracy": figure(0.9, majority=0.2, bag=0.44),
            },
            "pair": {"draw_scene_exact": figure(0.8, random_cells=0.0)},
        },
    }
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    samples = [sample("draw", True, 0), sample("edit", False, 1), sample("vqa", False, 2, "colour")]
    samples += [sample("dialogue", False, 3, dialogue=True)]
    (folder / "eval" / "samples.msgpack").write_bytes(msgpack.packb(samples))
    return folder


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order and that nothing is fetched from elsewhere."""

    VOID = ("meta", "img", "line", "circle", "polyline", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.sources += [v for k, v in attributes if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def test_the_report_says_what_the_files_say(run):
    with cost.stage(run, "train"):
        pass
    paths = report.write(run)
    got = json.loads(paths["json"].read_text())
    assert got["skills"]["draw_scene_exact"] == figure(0.95, random_cells=0.003)
    assert got["splits"]["pair"]["draw_scene_exact"]["value"] == 0.8
    assert set(got["wall_seconds"]) == {"train", "total"}
    assert got["peak_memory_bytes"] > 1_000_000
    assert got["curves"]["loss"][-1] == [40, 0.05]
    assert got["curves"]["eval/draw_scene_exact"] == [[40, 0.9]]
    assert "seconds" not in got["curves"] and "devices" not in got["curves"]
    assert got["config"]["family"] == "mm_interleaved" and "jax" in got["versions"]
    assert not list(run.glob("*.part"))


def test_the_page_is_whole_and_fetches_nothing(run):
    text = report.write(run)["html"].read_text()
    page = Page(text)
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not re.search(r"https?://", text) and "<script" not in text
    words = " ".join(page.text)
    for expected in (
        "Draws a scene",
        "random_cells",
        ".950",
        "not all right",
        "Right: on white : nothing",
        "2.49 M",
    ):
        assert expected in words, expected
    # What users and models say is text, never markup.
    assert "<b>draw 0</b>" not in text and "&lt;b&gt;draw 0&lt;/b&gt;" in text


def test_a_page_without_samples_or_curves_is_still_whole(run):
    (run / "eval" / "samples.msgpack").unlink()
    (run / "metrics.jsonl").unlink()
    words = " ".join(Page(report.write(run)["html"].read_text()).text)
    assert "What it learned" in words and "Drawings" not in words and "How it learned" not in words


def test_a_run_that_was_not_judged_is_refused(run):
    (run / "eval" / "results.json").unlink()
    with pytest.raises(CheckpointError, match="umm eval --run="):
        report.write(run)
    with pytest.raises(CheckpointError, match="no run"):
        report.write(run.parent / "nowhere")


def test_damaged_files_are_named(run):
    (run / "eval" / "samples.msgpack").write_bytes(b"\xc1half")
    with pytest.raises(DataError, match="samples.msgpack: damaged"):
        report.write(run)
    (run / "eval" / "results.json").write_text('{"splits": ')
    with pytest.raises(DataError, match="results.json: damaged"):
        report.write(run)


def test_curves_survive_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "kind": "train", "loss": float(s)} for s in (1, 2, 3, 2, 3)]
    rows[-1]["loss"] = 30.0
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 4, "lo')
    assert report.read_curves(path) == {"loss": [[1, 1.0], [2, 2.0], [3, 30.0]]}
    path.write_text('{"step": 1,\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 1"):
        report.read_curves(path)


def test_long_curves_keep_their_last_point(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": s, "kind": "train", "loss": 1.0}) + "\n" for s in range(5000))
    )
    points = report.read_curves(path)["loss"]
    assert len(points) <= report.MOST_POINTS + 1 and points[-1][0] == 4999


def test_chart_axes_contain_their_points():
    points = [(step, 10 ** (-step / 100)) for step in range(0, 301, 10)]
    card = pieces.curves("Loss", {"loss": points, "other": [(0, math.nan), (300, 0.0)]}, log=True)
    Page(card)
    drawn = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', card)[1].split()]
    assert len(drawn) == 31
    assert all(46 <= x <= 470 and 8 <= y <= 204 for x, y in drawn)
    assert [y for _, y in drawn] == sorted(y for _, y in drawn), "a falling loss goes down the page"
    assert "other" not in card, "a series with nothing to draw has no legend"
    assert pieces.curves("Nothing", {"a": []}) == ""


@pytest.mark.parametrize(
    "value, text", [(0.934, ".934"), (1.0, "1.00"), (0, ".000"), (None, "–"), (math.nan, "–")]
)
def test_numbers_as_people_read_them(value, text):
    assert pieces.number(value) == text


@pytest.mark.parametrize("seconds, text", [(42.4, "42 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_clock(seconds, text):
    assert pieces.clock(seconds) == text


def test_time_of_resumed_stages_adds_up(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), cost.stage(tmp_path, "train"):
            raise KeyboardInterrupt
    with cost.stage(tmp_path, "evaluate"):
        pass
    stages = cost.read(tmp_path)
    assert set(stages) == {"train", "evaluate"}
    assert stages["train"]["seconds"] >= 0 and stages["train"]["peak_memory_bytes"] > 0
    with cost.stage(tmp_path / "nowhere", "train"):
        pass
    assert not (tmp_path / "nowhere").exists(), "recording a cost makes no folder"
