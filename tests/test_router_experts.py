"""Experts run in their time, in turn or side by side; what they do wrong never reaches the user as right."""

import sys
import threading
import time

import numpy as np
import pytest

from umm_jax.errors import ConfigError
from umm_jax.markup import dialects
from umm_jax.markup.grammar import parse
from umm_jax.markup.plan import plan
from umm_jax.router.classical import Edit, Segment, salient
from umm_jax.router.conformance import BOX, failures, request, sample
from umm_jax.router.execute import Executor, Limits, box_mask
from umm_jax.router.experts import (
    SHIPPED,
    Expert,
    ExpertError,
    Medium,
    Registry,
    Request,
    Result,
    Spec,
    flaw,
)

UMM1 = dialects.get("umm1")
WHITE = Medium("image", np.full((4, 6, 3), 255, np.uint8))


class Toy:
    """Does what it is told to; its picture's first pixel counts the calls before it."""

    def __init__(self, name="toy", tasks=("image_gen", "image_edit"), does=None, **facts):
        self.spec, self.does = Spec(name, "1", frozenset(tasks), **facts), does
        self.asked: list[Request] = []

    def run(self, request):
        self.asked.append(request)
        if self.does is not None:
            return self.does(request)
        before = 0 if request.medium is None else int(request.medium.value[0, 0, 0])
        return Result((Medium("image", np.full((2, 2, 3), before + 1, np.uint8)),))

    def close(self):
        pass


def run(text: str, *experts, media=(WHITE,), **options):
    registry = Registry()
    for expert in experts:
        registry.add(expert)
    steps = plan(parse(text, UMM1), [medium.kind for medium in media])
    return Executor(registry, **options).run(steps, media)


def call(task: str, words: str = "x") -> str:
    return f"<{task}>{words}</{task}>"


def test_a_chain_hands_on_what_it_made():
    done = run(call("image_gen") + call("image_edit") + call("image_edit"), Toy())
    assert [d.status for d in done] == ["ok"] * 3
    assert [int(d.media[0].value[0, 0, 0]) for d in done] == [1, 2, 3]
    assert [d.seed for d in done] == [0, 1, 2] and done[0].plain["gives"] == ["image"]


def fails(request):
    raise ExpertError("no ideas")


def crashes(request):
    raise RuntimeError("boom")


def leaves(request):
    sys.exit(3)


def wrong_kind(request):
    return Result((Medium("mask", np.ones((2, 2), bool)),))


def wrong_form(request):
    return Result((Medium("image", np.ones((2, 2, 3))),))


def giant(request):
    return Result((Medium("image", np.zeros((10_000, 10_000, 3), np.uint8)),))


def nothing(request):
    return None


def hangs(request):
    time.sleep(60)


BAD = [
    (fails, "no ideas"),
    (crashes, "RuntimeError: boom"),
    (leaves, "SystemExit: 3"),
    (wrong_kind, "gave mask in place of image"),
    (wrong_form, "gave image: float64 (2, 2, 3) in place of uint8"),
    (giant, "gave image of 300000000 numbers"),
    (nothing, "gave no Result"),
    (hangs, "took longer than 0.2 s"),
]


@pytest.mark.parametrize("does, said", BAD)
def test_an_expert_that_fails_fails_alone(does, said):
    """Its consumer is skipped, not given the user's picture; what needs neither is done."""
    bad = Toy("bad", ("image_gen",), does)
    edit, sound = (
        Toy("edit", ("image_edit",)),
        Toy("sound", ("audio_gen",), lambda r: Result((sample("audio"),))),
    )
    text = call("image_gen") + call("image_edit") + call("audio_gen")
    began = time.monotonic()
    done = run(text, bad, edit, sound, limits=Limits(seconds=0.2))
    assert time.monotonic() - began < 20
    assert [d.status for d in done] == ["error", "skipped", "ok"]
    assert said in done[0].note and not done[0].media and not edit.asked
    assert done[1].note == "step0, which it takes from, gave nothing"


@pytest.mark.parametrize("does, said", BAD)
def test_the_next_expert_is_asked(does, said):
    done = run(call("image_gen"), Toy("bad", does=does, priority=1), Toy("good"), limits=Limits(seconds=0.2))
    assert done[0].status == "ok" and done[0].expert == "good"
    (tried,) = done[0].tried
    assert tried.startswith("bad: ") and said in tried


@pytest.mark.parametrize("boxes", [(0.1, 0.2, 0.3, 0.4), ((0.1, "b", 0.3, 0.4),), ((0, 0, 2, 1),)])
def test_boxes_of_another_form_are_a_flaw(boxes):
    assert "four shares" in flaw(Medium("boxes", boxes), 100)


def test_what_cannot_be_loaded_is_tried_once_and_what_can_is_loaded_once(monkeypatch):
    made = []

    def slow():
        made.append(1)
        time.sleep(0.05)
        return Toy("slow")

    monkeypatch.setattr(sys.modules[__name__], "_slow", slow, raising=False)
    registry = Registry({"slow": f"{__name__}:_slow", "none": "no_such_module:X"})
    threads = [threading.Thread(target=registry.chain, args=("image_gen",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1] and [e.spec.name for e in registry.chain("image_gen")] == ["slow"]
    with pytest.raises(ConfigError, match="'none' cannot be loaded"):
        registry.get("none")
    registry.add(Toy("none"))  # one that is given after all
    assert registry.get("none").spec.name == "none"


def test_what_stands_in_for_a_model_is_marked_and_asked_last():
    done = run(call("image_gen"), Toy("a", degraded=True, priority=-10), Toy("b"))
    assert (done[0].status, done[0].expert) == ("ok", "b")
    (done,) = run(call("image_gen"), Toy("a", degraded=True))
    assert done.status == "degraded"
    (done,) = run(call("image_gen"), Toy("a", degraded=True), Toy("b"), chosen={"image_gen": ["a"]})
    assert done.expert == "a"


def test_what_cannot_be_done_is_told():
    done = run(call("image_edit") + call("video_gen"), Toy(), media=())
    assert [(d.status, d.note) for d in done] == [
        ("missing_input", "no image is there"),
        ("error", "no expert for video_gen"),
    ]


def test_all_steps_together_have_their_time():
    slow = Toy("slow", ("image_gen",), lambda r: time.sleep(0.3) or Result((WHITE,)))
    done = run(
        call("image_gen") + call("image_edit") * 8,
        slow,
        Toy("slower", ("image_edit",), slow.does),
        limits=Limits(total=0.5),
    )
    assert done[0].status == "ok" and done[-1].status in ("error", "skipped")


def test_steps_that_need_nothing_of_one_another_run_together():
    meet = threading.Barrier(3, timeout=20)
    done = run(call("image_gen") * 3, Toy(does=lambda r: meet.wait() and None or Result((WHITE,))))
    assert [d.status for d in done] == ["ok"] * 3


def test_strict_running_stops_at_the_first_error():
    bad, edit = Toy("bad", ("image_gen",), fails), Toy("edit", ("image_edit",))
    text = call("image_gen") + call("image_edit", "@user0 darker") + call("image_edit")
    black = (Medium("image", np.zeros((2, 2, 3), np.uint8)),)
    assert [d.status for d in run(text, bad, edit, media=black)] == ["error", "ok", "ok"]
    assert [d.status for d in run(text, bad, edit, media=black, strict=True)] == ["error", "ok", "skipped"]


def test_a_box_says_what_may_change():
    toy = Toy()
    run("<image_edit>darker <box>[0.000, 0.000, 0.500, 0.500]</box></image_edit>", toy)
    region = toy.asked[0].region
    assert region.tolist() == [[True] * 3 + [False] * 3] * 2 + [[False] * 6] * 2


# --- ours ---------------------------------------------------------------------------------------------------


# Those of other libraries need their models: see test_router_adapters.
@pytest.mark.parametrize("name", sorted(name for name in SHIPPED if not name.startswith("adapters.")))
def test_every_shipped_expert_conforms(name):
    assert failures(Registry.installed().get(name)) == []


def edited(words: str, **changes) -> np.ndarray:
    from dataclasses import replace

    return Edit().run(replace(request("image_edit"), prompt=words, **changes)).media[0].value


def test_classical_edits():
    before = sample("image").value
    red = (before == (220, 30, 30)).all(-1)
    blue = edited("make the red circle blue")
    assert (blue[red] == (40, 70, 230)).all() and (blue[~red] == 255).all()
    assert (edited("remove the circle") > 250).all()
    assert (edited("darker", region=None) <= before).all()
    gray = edited("grayscale", region=None)
    assert (gray[..., 0] == gray[..., 1]).all() and (gray != before).any()
    assert edited("brighter")[24, 32].sum() > before[24, 32].sum()
    with pytest.raises(ExpertError, match="none of them is named"):
        edited("paint a moustache")


def test_classical_masks():
    (mask,) = Segment().run(request("image_seg")).media
    assert (mask.value == (sample("image").value == (220, 30, 30)).all(-1)).all()
    empty = salient(np.full((8, 8, 3), 9, np.uint8), box_mask([BOX], 8, 8))
    assert not empty.any()


def made(name: str, task: str, prompt: str, **more) -> Medium:
    from dataclasses import replace

    asked = replace(request(task), prompt=prompt, **more)
    return Registry.installed().get(name).run(asked).media[0]


def test_classical_layouts():
    objects = (("a red circle", ((0.0, 0.0, 0.5, 0.5),)), ("a blue square", ((0.5, 0.5, 1.0, 1.0),)))
    picture = made("classical.shapes", "layout_gen", "still life on black", objects=objects).value
    assert picture.shape == (256, 256, 3)
    assert (picture[64, 64] == (220, 30, 30)).all() and (picture[2, 2] == 0).all(), "a circle has no corners"
    assert (picture[130:, 130:] == (40, 70, 230)).all() and (picture[10, 200] == 0).all()
    two = made("classical.shapes", "image_gen", "a green ring and a yellow triangle", objects=()).value
    assert {tuple(c) for c in two.reshape(-1, 3)} == {(255, 255, 255), (20, 160, 50), (250, 215, 20)}
    with pytest.raises(ExpertError, match="none of them is named"):
        made("classical.shapes", "image_gen", "justice", objects=())


def test_classical_videos():
    still = sample("image").value
    video = made("classical.motion", "image_to_video", "the circle moves left").value
    np.testing.assert_array_equal(video[0], still)
    assert (video[3] == np.roll(still, -3, axis=1)).all()
    edited = made("classical.film", "video_edit", "make it blue", times=((0.5, 1.0),), boxes=()).value
    before = sample("video").value
    np.testing.assert_array_equal(edited[:2], before[:2])
    assert ((edited[2:] == (40, 70, 230)).all(-1) == (before[2:] == (220, 30, 30)).all(-1)).all()
    track = made("classical.film", "video_seg", "the circle").value
    assert track.shape == before.shape[:3] and (track[0] == (before[0] == (220, 30, 30)).all(-1)).all()


def test_classical_sounds():
    low, high = (made("classical.sound", "audio_gen", f"a {w} tone").value for w in ("low", "high"))
    peak = [int(np.argmax(np.abs(np.fft.rfft(wave)))) for wave in (low, high)]
    assert peak == [220, 880] and np.abs(low).max() <= 1
    rain = [made("classical.sound", "audio_gen", "rain", seed=s).value for s in (1, 1, 2)]
    assert (rain[0] == rain[1]).all() and (rain[0] != rain[2]).any()
    wave = sample("audio").value
    assert (made("classical.sound", "audio_edit", "reverse it").value == wave[::-1]).all()
    assert len(made("classical.sound", "audio_edit", "faster").value) == len(wave) // 2
    with pytest.raises(ExpertError, match="none of them is named"):
        made("classical.sound", "audio_gen", "silence")


# --- theirs -------------------------------------------------------------------------------------------------


class Liar(Toy):
    """Breaks every promise there is."""

    def __init__(self):
        super().__init__("liar", ("image_edit", "image_seg", "image_gen"), needs_box=frozenset({"image_seg"}))
        self.count = 0

    def run(self, request):
        self.count += 1
        if request.task == "image_edit":
            request.medium.value[0, 0] = self.count
            return Result((Medium("image", request.medium.value + np.uint8(1)),))
        if request.task == "image_seg":
            return Result((Medium("mask", np.ones((2, 2), bool)),))
        return Result((Medium("image", np.full((2, 2, 3), self.count)),))


def test_the_kit_finds_what_is_broken():
    found = {tuple(line.split(": ")[:2]) for line in failures(Liar())}
    assert found >= {
        ("image_edit", "same again"),
        ("image_edit", "request untouched"),
        ("image_edit", "outside untouched"),
        ("image_seg", "size"),
        ("image_seg", "missing input"),
        ("image_gen", "kinds"),
        ("image_gen", "same again"),
    }
    assert failures(object()) == ["spec: no Expert: it needs spec (a Spec), run and close"]


PACKAGE = """
import numpy as np
from umm_jax.router.experts import Medium, Result, Spec

class Tone:
    spec = Spec("example.tone", "0.3", frozenset({"audio_gen"}))
    def run(self, request):
        high = 440.0 if "high" in request.prompt else 220.0
        return Result((Medium("audio", np.sin(np.arange(800) * high / 8000).astype(np.float32)),))
    def close(self):
        pass
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of somebody else's, as pip leaves it."""
    (tmp_path / "example_experts.py").write_text(PACKAGE)
    facts = tmp_path / "example_experts-0.3.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: example-experts\nVersion: 0.3\n")
    (facts / "entry_points.txt").write_text(
        "[umm.experts]\nexample.tone = example_experts:Tone\nexample.gone = example_experts:Gone\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Registry.installed()
    sys.modules.pop("example_experts", None)


def test_a_package_of_others_is_found_and_conforms(installed):
    assert {"example.tone", *SHIPPED} <= set(installed.names)
    expert = installed.get("example.tone")
    assert isinstance(expert, Expert) and failures(expert) == []
    done = Executor(installed).run(plan(parse(call("audio_gen", "a high tone"), UMM1)))
    assert (done[0].status, done[0].expert, done[0].version) == ("ok", "example.tone", "0.3")
    with pytest.raises(ConfigError, match="example.gone.*cannot be loaded"):
        installed.get("example.gone")
    with pytest.raises(ConfigError, match="did you mean 'example.tone'"):
        installed.get("example.ton")


def test_tasks_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="no tasks fly"):
        Spec("x", "1", frozenset({"fly"}))
