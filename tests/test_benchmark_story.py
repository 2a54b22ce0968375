"""Stories drawn turn by turn, VIST and Pororo-SV, and the structure of interleaved replies."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from umm_jax.config import ReplySettings
from umm_jax.conversation import Box, Image, ImageData, Text, Turn
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import asking, scoring
from umm_jax.evaluate.contract import Response
from umm_jax.evaluate.measures import features
from umm_jax.evaluate.measures.frechet import Moments, frechet
from umm_jax.evaluate.responses import line_of
from umm_jax.evaluate.source import Source
from umm_jax.evaluate.tasks import interleave, story

TASKS = {task.name: task for task in story.TASKS} | {"interleave": interleave.TASK}
COLOUR = f"{__name__}:colour"


def colour(images):
    """Features for tests: the mean of each channel."""
    return np.stack([image.mean((0, 1)) for image in images]) / 255


def other(images):
    """Of shape and brightness."""
    return np.stack([[*image.shape[:2], image.mean()] for image in images])


@pytest.fixture(autouse=True)
def fresh():
    features.extractor.cache_clear()
    yield
    features.extractor.cache_clear()


def picture(*rgb, size=(4, 6)):
    return ImageData.from_array(np.broadcast_to(np.array(rgb, np.uint8), (*size, 3)).copy())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def docs(name, root, **settings):
    task = TASKS[name]
    return scoring.docs_of(task, Source(root, name, task.files), scoring.settings_of(task, settings))


def score(name, root, path, partial=False, **settings):
    return scoring.score(TASKS[name], root, path, settings=settings, partial=partial)


def value(figures, name):
    return figures["metrics"][name]["value"]


def save(folder, *responses):
    """A file of responses in the runner's form, with its pictures."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    for response in responses:
        for image in response.images.values():
            (folder / "media" / f"{image.sha256}.png").write_bytes(image.data)
    return write(folder / "responses.jsonl", lines(*map(line_of, responses)))


# --- VIST ---------------------------------------------------------------------------------------------

FRAMES = {f"{i}": picture(40 * i, 255 - 40 * i, 20) for i in range(6)}


@pytest.fixture
def vist(tmp_path):
    """Two stories, the first's parts out of order."""
    root = tmp_path / "vist"
    stories = {
        "45531": [{"sequence_index": k, "image_id": str(k), "caption": f"part {k}"} for k in ("2", "0", "1")],
        "45530": [{"sequence_index": k, "image_id": str(k + 3), "caption": f"scene {k}"} for k in range(3)],
    }
    write(root / "annotations" / "test_formatted_filtered.json", {"annotations": stories})
    (root / "images" / "test_images").mkdir(parents=True)
    for id, image in FRAMES.items():
        (root / "images" / "test_images" / f"{id}.png").write_bytes(image.data)
    return root


def said(doc):
    return [(turn.role, turn.text) for turn in (*doc.turns, *doc.then)]


def test_a_story_is_told_turn_by_turn(vist):
    found = docs("vist", vist)
    assert [doc.id for doc in found] == ["45530", "45531"]
    doc = found[1]
    assert said(doc) == [("user", "part 0"), ("assistant", ""), ("user", "part 1"), ("user", "part 2")]
    assert len(doc.then) == 1 and doc.turns[1].parts == (Image("frame0"),)
    conversation = doc.conversation()
    conversation.validate()
    assert conversation.images["frame0"].data == FRAMES["0"].data
    assert [frame.name for frame in doc.target] == ["1.png", "2.png"]


@pytest.mark.parametrize("given, drawn", [(0, 3), (1, 2), (2, 1), (-1, 1), (-3, 3)])
def test_how_many_frames_are_given(vist, given, drawn):
    doc = docs("vist", vist, given=given, prompt="draw")[0]
    assert len(doc.target) == drawn == 1 + len(doc.then) and len(doc.images) == 3 - drawn
    assert doc.turns[-1].role == "user" and "the story: scene" in doc.turns[-1].text


@pytest.mark.parametrize("given", [3, -4])
def test_all_frames_cannot_be_given(vist, given):
    with pytest.raises(DataError, match="has 3 frames; given=.* leaves none"):
        docs("vist", vist, given=given)


def test_the_releases_own_file(vist):
    annotations = [
        [{"story_id": "7", "photo_flickr_id": str(i), "text": f"t{i}", "worker_arranged_photo_order": i}]
        for i in (1, 0)
    ]
    (vist / "annotations" / "test_formatted_filtered.json").unlink()
    write(vist / "sis" / "test.story-in-sequence.json", {"annotations": annotations})
    (doc,) = docs("vist", vist)
    assert doc.id == "7" and said(doc) == [("user", "t0"), ("assistant", ""), ("user", "t1")]


class Painter:
    """Draws the true frames of a story; notes what it had in sight."""

    def __init__(self, known):
        self.known, self.seen = known, []

    def reply(self, conversations, settings, seeds):
        found = []
        for c in conversations:
            shown = [p.ref for turn in c.turns for p in turn.parts if isinstance(p, Image)]
            self.seen.append((c.id, shown, [turn.role for turn in c.turns]))
            ref = f"drawn{len(shown)}"
            image = self.known[c.id][len(shown)]
            found.append(SimpleNamespace(turn=Turn("assistant", (Image(ref),)), images={ref: image}))
        return found


def asked(vist, painter, **settings):
    batches = asking.batches(docs("vist", vist, **settings), 2)
    found = asking.ask(painter, batches, ReplySettings(mode="image"), seed=1, batch_size=2)
    return [one.response for batch in found for one in batch]


def test_what_was_drawn_stays_in_sight(vist, tmp_path):
    truth = {"45530": [FRAMES[k] for k in "345"], "45531": [FRAMES[k] for k in "012"]}
    painter = Painter(truth)
    responses = asked(vist, painter)
    last = [seen for seen in painter.seen if len(seen[1]) == 2]
    assert {(id, tuple(shown)) for id, shown, _ in last} == {
        ("45530", ("frame0", "drawn1")),
        ("45531", ("frame0", "drawn1")),
    }
    assert last[0][2] == ["user", "assistant", "user", "assistant", "user"]
    path = save(tmp_path / "out", *responses)
    figures = score("vist", vist, path, clip=COLOUR, fid=COLOUR)
    assert value(figures, "clip_i") == pytest.approx(1) and value(figures, "pictures") == 100
    assert value(figures, "fid") == pytest.approx(0, abs=1e-12)
    assert figures["metrics"]["fid"]["reason"] == "4 pictures, 4 frames"
    assert figures["cost_class"] == "B" and figures["settings"]["clip"] == COLOUR
    assert figures["docs"] == pytest.approx({"45530": 1, "45531": 1})


def drawn(id, *turns):
    """A response whose turns show these pictures."""
    images = {f"p{i}{j}": image for i, turn in enumerate(turns) for j, image in enumerate(turn)}
    parts = [
        tuple(Image(f"p{i}{j}") for j in range(len(turn))) or (Text("no"),) for i, turn in enumerate(turns)
    ]
    return Response(id, tuple(Turn("assistant", p) for p in parts), images)


RED, GREEN = picture(255, 0, 0, size=(9, 9)), picture(0, 255, 0)


def test_figures_by_hand(vist, tmp_path):
    """The cosine of red with (a, b, c) is a over its length; FID is that of 4 pictures and 4 frames."""
    path = save(tmp_path / "out", drawn("45530", [RED], [RED]), drawn("45531", [RED], [GREEN]))
    figures = score("vist", vist, path, clip=COLOUR, fid=COLOUR)
    true = {k: np.array([40 * k, 255 - 40 * k, 20]) / 255 for k in range(6)}
    alike = {k: true[k] / np.linalg.norm(true[k]) for k in true}
    each = {"45530": (alike[4][0] + alike[5][0]) / 2, "45531": (alike[1][0] + alike[2][1]) / 2}
    assert figures["docs"] == pytest.approx(each, rel=1e-5)
    assert value(figures, "clip_i") == pytest.approx(np.mean(list(each.values())), rel=1e-5)
    frames = np.stack([true[k] for k in (4, 5, 1, 2)])
    pictures = np.array([[1, 0, 0]] * 3 + [[0, 1, 0]])
    expected = frechet(Moments().add(pictures), Moments().add(frames))
    assert value(figures, "fid") == pytest.approx(expected, rel=1e-4)
    assert figures["metrics"]["fid"]["stderr"] is None and figures["stderr"] is not None


def test_without_networks_figures_are_null_and_say_so(vist, tmp_path):
    path = save(tmp_path / "out", drawn("45530", [RED], [RED]), drawn("45531", [RED], []))
    for frame in (vist / "images" / "test_images").iterdir():
        frame.unlink()  # nothing but the count is asked for
    figures = score("vist", vist, path)
    for name, setting in (("clip_i", "clip"), ("fid", "fid")):
        assert value(figures, name) is None
        assert figures["metrics"][name]["reason"] == f"no network: set `{setting}`"
    assert value(figures, "pictures") == 50 and figures["docs"] == {}


def test_missing_and_surplus_pictures(vist, tmp_path):
    """One that is missing counts 0 in clip_i and apart; of two in a turn the first is taken."""
    path = save(tmp_path / "out", drawn("45530", [], [RED]), drawn("45531", [RED, GREEN], [GREEN]))
    figures = score("vist", vist, path, clip=COLOUR, fid=COLOUR)
    whole = save(tmp_path / "whole", drawn("45530", [GREEN], [RED]), drawn("45531", [RED], [GREEN]))
    others = score("vist", vist, whole, clip=COLOUR)["docs"]
    assert figures["docs"]["45531"] == pytest.approx(others["45531"])
    true = np.array([200, 55, 20])
    assert figures["docs"]["45530"] == pytest.approx(true[0] / np.linalg.norm(true) / 2, rel=1e-5)
    assert value(figures, "pictures") == 0 and figures["n_invalid"] == 1
    assert figures["metrics"]["fid"]["reason"] == "3 pictures, 4 frames"


def test_nothing_drawn_at_all(vist, tmp_path):
    path = save(tmp_path / "out", drawn("45530", [], []), drawn("45531", [], []))
    figures = score("vist", vist, path, clip=COLOUR, fid=COLOUR)
    assert value(figures, "clip_i") == 0 and figures["parse_rate"] == 0
    assert value(figures, "fid") is None
    assert "drawn pictures: a covariance needs two pictures or more" in figures["metrics"]["fid"]["reason"]


def test_replies_of_other_programs(vist, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name, image in (("a.png", RED), ("b.png", GREEN)):
        (out / name).write_bytes(image.data)
    path = write(
        out / "responses.jsonl",
        lines({"id": "45530", "images": ["a.png", "b.png"]}, {"id": "45531", "images": ["b.png"]}),
    )
    figures = score("vist", vist, path, clip=COLOUR)
    assert value(figures, "pictures") == 50 and figures["n_invalid"] == 1
    same = save(tmp_path / "same", drawn("45530", [RED], [GREEN]), drawn("45531", [GREEN], []))
    assert score("vist", vist, same, clip=COLOUR)["docs"] == pytest.approx(figures["docs"])


def test_fid_at_another_size(vist, tmp_path):
    path = save(tmp_path / "out", drawn("45530", [RED], [RED]), drawn("45531", [RED], [GREEN]))
    far = score("vist", vist, path, fid=f"{__name__}:other")
    near = score("vist", vist, path, fid=f"{__name__}:other", fid_size=3)
    assert value(near, "fid") < value(far, "fid"), "all are 3 by 3 now"
    assert near["settings"]["fid_size"] == 3
    with pytest.raises(ConfigError, match="fid_size"):
        score("vist", vist, path, fid_size=-1)


def test_a_true_frame_that_is_missing_is_an_error_and_no_other_picture(vist, tmp_path):
    path = save(tmp_path / "out", drawn("45530", [RED], [RED]), drawn("45531", [RED], [RED]))
    frame = vist / "images" / "test_images" / "4.png"
    frame.write_bytes(b"no picture")
    with pytest.raises(DataError, match="4.png"):
        score("vist", vist, path, clip=COLOUR)
    frame.unlink()
    with pytest.raises(DataError, match="4.png.*cannot be read"):
        score("vist", vist, path, fid=COLOUR)


def test_bad_annotations_of_vist(vist):
    path = vist / "annotations" / "test_formatted_filtered.json"
    for stories, complaint in (
        ({"1": [{"sequence_index": "x", "image_id": "1", "caption": "a"}]}, "'sequence_index' must be a num"),
        ({"1": [{"sequence_index": 0, "image_id": "1"}]}, "has no 'caption'"),
        ({}, "nothing to ask"),
        ([[]], "has no 0"),
    ):
        write(path, {"annotations": stories})
        with pytest.raises(DataError, match=complaint):
            docs("vist", vist)
    path.unlink()
    with pytest.raises(DataError, match="test_formatted_filtered.json.*story-in-sequence.json"):
        docs("vist", vist)


# --- Pororo -------------------------------------------------------------------------------------------


def test_pororo(tmp_path):
    root = tmp_path / "pororo"
    entry = {"id": 8, "captions": ["Pororo jumps.", "Crong sits."], "images": ["a/1.png", "a/2.png"]}
    write(root / "pororo_test.jsonl", lines(entry))
    (root / "a").mkdir()
    for name in entry["images"]:
        (root / name).write_bytes(RED.data)
    (doc,) = docs("pororo", root)
    assert doc.id == "8" and said(doc)[-1] == ("user", "Crong sits.")
    path = save(tmp_path / "out", drawn("8", [RED]))
    assert value(score("pororo", root, path, clip=COLOUR), "clip_i") == pytest.approx(1)
    one = score("pororo", root, path, fid=COLOUR)["metrics"]["fid"]
    assert one["value"] is None and "there are 1" in one["reason"]
    for change, complaint in (
        ({"images": ["a/1.png"]}, "2 captions and 1 pictures"),
        ({"captions": [1, 2]}, "'caption' is of another type"),
        ({"images": ["../1.png", "a/2.png"]}, "leads out of the folder"),
        ({"images": None}, "'images' is of another type"),
    ):
        write(root / "pororo_test.jsonl", lines(entry | change))
        with pytest.raises(DataError, match=complaint):
            docs("pororo", root)
    write(root / "pororo_test.jsonl", lines(entry, entry))
    with pytest.raises(DataError, match="'8' twice"):
        docs("pororo", root)


def test_pickles_are_not_opened(tmp_path, monkeypatch):
    np.save(tmp_path / "descriptions.npy", {"a": ["b"]}, allow_pickle=True)
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(DataError, match="descriptions.npy.*are pickles.*pororo_test.jsonl"):
        docs("pororo", tmp_path)
    (tmp_path / "descriptions.npy").unlink()
    with pytest.raises(DataError, match="pororo_test.jsonl, which is not there"):
        docs("pororo", tmp_path)


# --- structure of interleaved replies -----------------------------------------------------------------

T, I = "text", "image"


@pytest.mark.parametrize(
    "found, wanted, expected",
    [
        ([], [], 0),
        ([T], [T], 0),
        ([], [T, I], 1),
        ([T, I, T, I], [T, I, I], 1 / 4),  # a text taken out
        ([I, T], [T, I], 2 / 2),  # both changed
        ([T, I, T, I, T], [I, T, I], 2 / 5),
        ([I] * 4, [I], 3 / 4),
    ],
)
def test_distance_of_structures(found, wanted, expected):
    assert interleave.distance(found, wanted) == interleave.distance(wanted, found) == pytest.approx(expected)


def test_neighbouring_texts_are_one_block():
    assert interleave.joined([T, T, I, I, T, T, T]) == (T, I, I, T)
    parts = (Text("a"), Text("\n "), Text("b"), Image("x"), Box("x", (0, 0, 1, 1)), Text("c"))
    response = Response("1", (Turn("assistant", parts), Turn("assistant", (Text("d"),))))
    assert interleave.blocks(response) == (T, T, I, T, T)


def reply(id, *kinds):
    parts = tuple(Text("words") if kind == T else Image("x") for kind in kinds)
    return Response(id, (Turn("assistant", parts),), {"x": RED})


@pytest.fixture
def structures(tmp_path):
    entries = [
        {"id": 1, "prompt": "Tell it in two steps.", "structure": [T, I, T, I], "category": "steps"},
        {"id": 2, "prompt": "Vary it.", "structure": [I, I], "images": ["a.png"], "category": "style"},
        {"id": 3, "prompt": "Say it.", "structure": [T, T]},
    ]
    root = tmp_path / "data"
    write(root / "interleave.jsonl", lines(*entries))
    (root / "a.png").write_bytes(RED.data)
    return root


def test_structure_figures_by_hand(structures, tmp_path):
    found = docs("interleave", structures)
    assert found[1].conversation().turns[0].parts == (Image("image1"), Text("Vary it."))
    path = save(
        tmp_path / "out",
        reply("1", T, T, I, T, I),  # right, but for a text in two
        reply("2", T, I, I),  # a text too many: 1 of 3
        reply("3", T),  # right; the unjoined want two
    )
    figures = score("interleave", structures, path)
    assert value(figures, "order") == pytest.approx(100 * 2 / 3)
    assert value(figures, "count") == 100
    assert value(figures, "distance") == pytest.approx(100 * (0 + 1 / 3 + 0) / 3)
    assert value(figures, "order_unjoined") == 0
    assert value(figures, "order/category=steps") == 100 and value(figures, "order/category=style") == 0
    assert figures["docs"] == {"1": 1, "2": 0, "3": 1} and figures["cost_class"] == "A"


def test_an_empty_reply_has_no_structure(structures, tmp_path):
    path = save(tmp_path / "out", reply("1"), reply("2", I, I), reply("3", T))
    figures = score("interleave", structures, path)
    assert figures["n_invalid"] == 1 and value(figures, "order") == pytest.approx(100 * 2 / 3)
    assert value(figures, "distance") == pytest.approx(100 / 3), "all is missing"


def test_replies_told_in_turns_by_other_programs(structures, tmp_path):
    """As the docstring shows them: blocks in order, pictures in media/."""
    out = tmp_path / "out"
    (out / "media").mkdir(parents=True)
    (out / "media" / "a.png").write_bytes(RED.data)
    text, image = {"kind": "text", "text": "words"}, {"kind": "image", "ref": "a.png"}
    entries = [
        {"id": "1", "turns": [[text, image, text, image]]},
        {"id": "2", "turns": [[image, image]]},
        {"id": "3", "text": "words"},
    ]
    path = write(out / "responses.jsonl", lines(*entries))
    assert value(score("interleave", structures, path), "order") == 100


def test_isg_bench(tmp_path):
    root = tmp_path / "isg"
    entry = {
        "id": "0000",
        "Category": "Prediction",
        "Query": [{"type": T, "content": "What is next?"}, {"type": I, "content": "images/0000_q1.png"}],
        "Golden": [{"type": T, "content": "..."}, {"type": I, "content": "images/0000_g1.png"}],
        "predict": {"structural": {}},
    }
    write(root / "ISG-Bench.jsonl", lines(entry))
    (doc,) = docs("interleave", root)
    assert doc.target == (T, I) and doc.group == {"category": "Prediction"}
    assert doc.turns[0].parts == (Text("What is next?"), Image("image1"))
    assert doc.images["image1"] == root / "images" / "0000_q1.png"
    path = save(tmp_path / "out", reply("0000", T, I))
    assert value(score("interleave", root, path), "order_unjoined") == 100


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"structure": []}, "blocks must be text or image"),
        ({"structure": ["video"]}, "blocks must be text or image, they are .'video'."),
        ({"structure": "text"}, "'structure' is of another type"),
        ({"prompt": None}, "'prompt' is of another type"),
        ({"images": ["../a.png"]}, "leads out"),
    ],
)
def test_bad_structures(tmp_path, change, complaint):
    write(tmp_path / "interleave.jsonl", lines({"id": 1, "prompt": "p", "structure": [T]} | change))
    with pytest.raises(DataError, match=complaint):
        docs("interleave", tmp_path)


def test_structures_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="interleave.jsonl or .*ISG-Bench.jsonl, which is not there"):
        docs("interleave", tmp_path)
    write(tmp_path / "interleave.jsonl", lines(*[{"id": 1, "prompt": "p", "structure": [T]}] * 2))
    with pytest.raises(DataError, match="'1' twice"):
        docs("interleave", tmp_path)
