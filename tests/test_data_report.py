"""The report of a data folder: figures that are counted by hand, what is in common with others, the page."""

import html.parser
import json

import numpy as np
import PIL.Image
import pytest
from test_synthesis import record, world

from umm_jax import cli
from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn
from umm_jax.data import report
from umm_jax.data.likeness import Pictures, dhash, overlap
from umm_jax.data.making import make_records
from umm_jax.data.records import open_source
from umm_jax.data.synthesis.synthesizer import Synthesizer
from umm_jax.errors import DataError


def photograph(seed: int, size: int = 64) -> np.ndarray:
    """Smooth noise, as photographs are smooth."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(coarse).resize((size, size), PIL.Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, quality: int) -> ImageData:
    import io

    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return ImageData(buffer.getvalue(), "image/jpeg", pixels.shape[1], pixels.shape[0])


def showing(name: str, image: ImageData, text: str = "hello") -> Conversation:
    turns = (Turn("user", (Image("i"), Text(text))), Turn("assistant", (Text("yes"),), loss=True))
    return Conversation(name, turns, {"i": image})


# --- likeness ---------------------------------------------------------------------------------------------


def test_pictures_that_look_alike_are_found_and_others_are_not():
    known = Pictures()
    for seed in range(40):
        known.add(encoded(photograph(seed), 90), f"p{seed}")
    for seed in range(40):
        worse = encoded(photograph(seed, 48), 40)
        assert known.same(worse) is None and known.near(worse) == f"p{seed}"
        assert known.same(encoded(photograph(seed), 90)) == f"p{seed}"
    assert all(known.near(encoded(photograph(seed), 90)) is None for seed in range(100, 160))


def test_hashes_at_six_bits_are_near_and_at_seven_are_not(monkeypatch):
    from umm_jax.data import likeness

    rng = np.random.default_rng(0)
    image = encoded(photograph(0), 90)
    base = dhash(image)
    known = Pictures()
    known.add(image, "it")
    for count, near in ((1, True), (6, True), (7, False), (20, False)):
        for _ in range(50):
            value = base
            for bit in rng.choice(64, count, replace=False):
                value ^= 1 << int(bit)
            monkeypatch.setattr(likeness, "dhash", lambda _, value=value: value)
            assert (known.near(image) == "it") is near


def test_what_folders_have_in_common():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    others = [showing("o1", encoded(photograph(1), 90), words), showing("o2", encoded(photograph(2), 90))]
    records = [
        showing("same", encoded(photograph(1), 90)),
        showing("near", encoded(photograph(2), 50)),
        showing("told", encoded(photograph(3), 90), f"well, {words.upper()}!"),
        showing("fresh", encoded(photograph(4), 90), words.removesuffix(" thirteen")),
    ]
    found = overlap(records, others)
    assert found["same picture"] == [("same", "o1")] and found["near picture"] == [("near", "o2")]
    assert found["same words"] == [("told", "o1")]


# --- figures ----------------------------------------------------------------------------------------------


def test_figures_by_hand(tmp_path):
    records = [
        record("a", (["a", "how many"], ["one"], "ask"), (["what colour"], ["red"], "ask")),
        record("b", (["a", "how many"], ["one"], "ask"), (["what colour"], ["red"], "ask")),
        record("c", (["draw a boat"], ["b"], "draw"), (["how many"], ["two"], "ask")),
    ]
    records = [
        Conversation(
            **{
                **vars(r),
                "turns": tuple(
                    Turn(**{**vars(t), "op": t.op or r.turns[k + 1].op, "depends_on": (0,) if k == 2 else ()})
                    for k, t in enumerate(r.turns)
                ),
            }
        )
        for r in records
    ]
    make_records(lambda k: records[k], 3, tmp_path / "d", how={"x": 1}, shards=1)
    found = report.write(tmp_path / "d", tmp_path / "out")
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["turns"] == {"mean": 4.0, "max": 4, "counts": {"4": 3}}
    assert found["operations"] == {"ask": 5, "draw": 1}
    assert found["operations in a row"] == {"ask > ask": 2, "draw > ask": 1}
    assert found["dependency distance"]["counts"] == {"0": 3, "1": 3}
    assert found["duplicates"] == {"records": 1, "pictures": 2, "pictures in several records": 1}
    assert found["licenses"] == {"MIT": 3}
    answers = found["answers"]["ask"]
    assert (answers["answers"], answers["different"], answers["majority"]) == (5, 3, 0.4)
    assert found["context"] == {"dependent turns": 0}
    assert found["distinct"]["1-grams"] == round(7 / 13, 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    world(folder / "world", 100)
    make = Synthesizer([folder / "world"])
    make_records(make, 100, folder / "made", how=make.recipe(), shards=2)
    return folder


def test_necessity_is_measured_and_not_believed(folders, tmp_path):
    context = report.write(folders / "made", tmp_path / "out")["context"]
    assert context["dependent turns"] > 50 and context["necessity"] == 1.0
    assert context["checks failed"] == {} and context["distance"]["counts"].get("1", 0) == 0
    damaged = []
    for r in open_source(folders / "made"):
        turns = tuple(
            Turn(**{**vars(t), "parts": (*t.parts[:-1], Text(t.meta["words"]))})
            if t.meta.get("role") == "dependent"
            else t
            for t in r.turns
        )
        damaged.append(Conversation(**{**vars(r), "turns": turns}))
    make_records(lambda k: damaged[k], len(damaged), tmp_path / "bad", how={}, shards=1)
    context = report.write(tmp_path / "bad", tmp_path / "worse")["context"]
    assert context["necessity"] == 0.0
    assert context["checks failed"]["reference-lost"] == context["dependent turns"]


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.images = [], [], 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "link", "iframe"):
            self.loaded.append(tag)
        for name in ("src", "href"):
            if name in values and not values[name].startswith("data:"):
                self.loaded.append(values[name])
        self.images += tag == "img"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(folders, tmp_path, capsys):
    evil = record("x", (["a", "<script>alert(1)</script>"], ["<img src=http://evil>"], "ask"))
    make_records(lambda k: evil, 1, tmp_path / "evil", how={}, shards=1)
    assert cli.main(["data", "report", str(tmp_path / "evil"), f"--out={tmp_path / 'e'}"]) == 0
    words = ["data", "report", str(folders / "made"), f"--against={folders / 'world'}"]
    assert cli.main([*words, f"--out={tmp_path / 'out'}"]) == 0
    assert "need the history" in capsys.readouterr().out
    for out in ("e", "out"):
        page = Page()
        page.feed((tmp_path / out / "report.html").read_text())
        assert page.open == [] and page.loaded == [] and page.images > 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["overlap"][str(folders / "world")]
    assert found["same picture"]["records"] > 90, "they are made of these"
    with pytest.raises(DataError, match="is the folder itself"):
        report.write(folders / "made", tmp_path / "x", [folders / "made"])
