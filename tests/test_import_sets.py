"""The importers of public sets: edits, web pages, tars, stories, regions; made up in their formats."""

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from importing_toy import (
    GREY,
    all_of,
    causes,
    dialogue,
    make_pictures,
    only,
    picture,
    why,
    write_lines,
    write_parquet,
)

from umm_jax.conversation import Box, Mask
from umm_jax.data.importing import Import
from umm_jax.errors import ConfigError, DataError

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("images"))


def stored(grey: int, size: tuple[int, int] = (8, 6)) -> dict:
    return {"bytes": picture(grey, size=size), "path": None}


def rejection(make: Import, index: int = 0) -> str:
    made = make(index)
    assert made.conversation is None
    (reason,) = why(made)["rejected records"]
    return reason


def needs(record) -> list[tuple[int, ...]]:
    return [turn.depends_on for turn in record.turns]


# --- edits ----------------------------------------------------------------------------------------------

P2P = {
    "original_prompt": "a lake",
    "original_image": stored(0),
    "edit_prompt": "make it winter",
    "edited_prompt": "a lake in winter",
    "edited_image": stored(20),
}


def test_instruct_pix2pix(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [P2P])
    record = only(Import("instruct_pix2pix", file))
    assert dialogue(record) == [("user", 0, "make it winter"), ("assistant", 20)]
    assert [turn.op for turn in record.turns] == [None, "edit"] and record.turns[1].loss
    drawn = only(Import("instruct_pix2pix", file, settings=dict(form="draw", request="paint {caption}!")))
    assert dialogue(drawn) == [
        ("user", "paint a lake!"),
        ("assistant", 0),
        ("user", "make it winter"),
        ("assistant", 20),
    ]
    assert needs(drawn) == [(), (0,), (1,), (1, 2)]
    with pytest.raises(ConfigError, match="must hold {caption}"):
        Import("instruct_pix2pix", file, settings=dict(request="draw"))
    broken = write_parquet(
        tmp_path / "b.parquet", [P2P | {"edit_prompt": None}, P2P | {"edited_image": {"bytes": b"x"}}]
    )
    make = Import("instruct_pix2pix", broken)
    assert [rejection(make, k) for k in range(2)] == ["field of another type", "no picture"]


def brush(name: str, turn: int, source: int, target: int, **more) -> dict:
    row = {"img_id": name, "turn_index": turn, "source_img": stored(source), "target_img": stored(target)}
    return {**row, "mask_img": stored(0), "instruction": f"edit {turn}", **more}


def test_magicbrush_rows_of_a_picture_are_one_dialogue(tmp_path):
    rows = [brush("x", 2, 20, 40), brush("x", 1, 0, 20), brush("y", 1, 60, 80)]
    make = Import("magicbrush", write_parquet(tmp_path / "a.parquet", rows))
    first, second = all_of(make)
    assert dialogue(first) == [
        ("user", 0, "edit 1"),
        ("assistant", 20),
        ("user", "edit 2"),
        ("assistant", 40),
    ]
    assert needs(first) == [(), (0,), (1,), (1, 2)]
    assert dialogue(second) == [("user", 60, "edit 1"), ("assistant", 80)] and len(first.images) == 3
    short = Import("magicbrush", tmp_path / "a.parquet", settings=dict(max_turns=1))
    assert len(short(0).conversation.turns) == 2
    bad = [brush("x", 1, 0, 20), brush("x", 3, 20, 40), brush("y", 1, 0, 20)]
    bad += [brush("y", 2, 0, 0, source_img=stored(20, (9, 9)))]
    make = Import("magicbrush", write_parquet(tmp_path / "b.parquet", bad))
    assert [rejection(make, k) for k in range(2)] == ["turns out of order", "broken chain of edits"]
    assert "turn 2 begins with (9, 9) pixels, turn 1 ended with (8, 6)" in causes(make(1))[0]


def test_ultraedit_filters_by_the_scores_of_the_row(tmp_path):
    row = {"source_image": stored(0), "edited_image": stored(20), "edit_prompt": "add a hat"}
    rows = [row | {"dinov2_sim": d, "ssim": s} for d, s in ((0.9, 0.5), (0.5, 0.5), (0.9, 0.99))]
    rows.append(row | {"dinov2_sim": None, "ssim": 0.5})
    file = write_parquet(tmp_path / "a.parquet", rows)
    assert len([r for r in all_of(Import("ultraedit", file)) if r]) == 4
    make = Import("ultraedit", file, settings=dict(at_least={"dinov2_sim": 0.8}, at_most={"ssim": 0.98}))
    assert dialogue(make(0).conversation) == [("user", 0, "add a hat"), ("assistant", 20)]
    assert why(make(1)) == {"left out": {"edits with dinov2_sim below 0.8": 1}}
    assert why(make(2)) == {"left out": {"edits with ssim above 0.98": 1}}
    assert rejection(make, 3) == "field of another type"
    assert rejection(Import("ultraedit", file, settings=dict(at_least={"clip": 0.1}))) == "field missing"
    with pytest.raises(ConfigError, match="bound of ssim is nan"):
        Import("ultraedit", file, settings=dict(at_most={"ssim": float("nan")}))


def test_seed_data_edit(tmp_path, images):
    single = {"source_image": "a.png", "target_image": "b.png", "instruction": "add a hat"}
    chain = {"images": ["a.png", "b.png", "c.png"], "instructions": ["one", "two"]}
    bad = [
        chain | {"instructions": ["one"]},
        {"images": ["a.png"]},
        chain | {"images": ["a.png", "b.png", "gone.png"]},
    ]
    make = Import("seed_data_edit", write_lines(tmp_path / "a.jsonl", single, chain, *bad), images)
    one, two = (make(k).conversation for k in range(2))
    assert dialogue(one) == [("user", 0, "add a hat"), ("assistant", 20)] and one.license == "CC-BY-NC-4.0"
    assert dialogue(two)[2:] == [("user", "two"), ("assistant", 40)]
    reasons = [rejection(make, k) for k in range(2, 5)]
    assert reasons == ["unequal pictures and instructions", "field missing", "missing picture"]
    other = write_lines(tmp_path / "b.jsonl", {"from": "a.png", "to": "b.png", "say": "x"})
    fields = dict(source="from", target="to", instruction="say")
    assert dialogue(only(Import("seed_data_edit", other, images, settings=fields)))[0] == ("user", 0, "x")


def test_bagel_chains(tmp_path):
    shades = (0, 20, 40, 60)
    chain = {"image_list": [picture(g) for g in shades], "instruction_list": [["a1", "a2"], ["b1"], ["c1"]]}
    file = write_parquet(tmp_path / "a.parquet", [chain] * 40)
    records = all_of(Import("bagel_edit", file))
    assert {dialogue(r)[0][2] for r in records} == {"a1", "a2"}
    assert [turn for turn in dialogue(records[0])][3:] == [
        ("assistant", 40),
        ("user", "c1"),
        ("assistant", 60),
    ]
    windows = all_of(Import("bagel_edit", file, settings=dict(window=2)))
    assert {(dialogue(r)[0][1], dialogue(r)[1][1]) for r in windows} == {(0, 20), (20, 40), (40, 60)}
    joined = all_of(Import("bagel_edit", file, settings=dict(join=1.0)))
    assert dialogue(joined[0])[0][2] in ("a1. b1", "a2. b1") and dialogue(joined[0])[1] == ("assistant", 40)
    some = [len(r.turns) for r in all_of(Import("bagel_edit", file, settings=dict(join=0.5)))]
    assert 8 < some.count(4) < 32
    bad = [chain | {"instruction_list": [["a"]]}, chain | {"instruction_list": [["a"], [], ["c"]]}]
    make = Import("bagel_edit", write_parquet(tmp_path / "b.parquet", bad))
    assert [rejection(make, k) for k in range(2)] == ["unequal pictures and instructions", "empty turn"]


def test_bagel_pictures_to_draw(tmp_path):
    rows = [{"image": picture(40), "captions": json.dumps({"long": "a tabby cat", "short": "a cat"})}] * 20
    rows += [
        {"image": picture(40), "captions": c} for c in ("{}", "{'a': 1}", '{"a": 1}', '{"a": " "}', None)
    ]
    file = write_parquet(tmp_path / "a.parquet", rows)
    make = Import("bagel_t2i", file)
    assert {dialogue(make(k).conversation)[0] for k in range(20)} == {
        ("user", "a tabby cat"),
        ("user", "a cat"),
    }
    assert (
        dialogue(make(0).conversation)[1] == ("assistant", 40) and make(0).conversation.turns[1].op == "draw"
    )
    assert why(make(20)) == {"left out": {"pictures without a caption": 1}}
    assert why(make(23)) == {"left out": {"captions that are empty": 1}}
    reasons = [rejection(make, k) for k in (21, 22, 24)]
    assert reasons == ["not JSON", "field of another type", "field of another type"]
    chosen = Import("bagel_t2i", file, settings=dict(caption="short", request="draw {caption}"))
    assert (
        dialogue(chosen(3).conversation)[0] == ("user", "draw a cat")
        and rejection(chosen, 22) == "field missing"
    )


# --- pages, tars, stories -----------------------------------------------------------------------------------


def test_obelics(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    urls = [f"https://example.com/{k}.jpg?size=large" for k in range(3)]
    for k in (0, 2):
        name = hashlib.sha256(urls[k].encode()).hexdigest()
        (folder / f"{name}.jpg").write_bytes(picture(20 * k))
    page = {"images": [None, urls[0], None, urls[1], urls[2]], "texts": ["One.", None, "Two.", None, None]}
    rows = [page, page | {"texts": ["One.", "x", "Two.", None, None]}, page | {"texts": ["One."]}]
    rows += [page | {"images": [None] * 5, "texts": ["One."] * 5}, page | {"images": [None] * 5}]
    file = write_parquet(tmp_path / "a.parquet", rows)
    make = Import("obelics", file, folder)
    made = make(0)
    assert [part for turn in dialogue(made.conversation) for part in turn] == [
        "document",
        "One.",
        0,
        "Two.",
        40,
    ]
    assert why(made) == {"rejected pictures": {"missing picture": 1}}
    assert [rejection(make, k) for k in (1, 2, 4)] == ["unequal pictures and texts"] * 3
    assert "place 1 holds an image and a text" in causes(make(1))[-1]
    assert why(make(3)) == {"left out": {"pages without a picture": 1}}
    few = Import("obelics", file, folder, settings=dict(min_images=3))
    assert why(few(0))["left out"] == {"pages with too few pictures": 1}
    cut = Import("obelics", file, folder, settings=dict(max_images=1))
    assert dialogue(cut(0).conversation) == [("document", "One.", 0, "Two.")]
    with pytest.raises(ConfigError, match="do not agree"):
        Import("obelics", file, folder, settings=dict(min_images=2, max_images=1))


def tar(path: Path, samples: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as made:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return path


def test_webdataset(tmp_path):
    file = tar(
        tmp_path / "0.tar",
        {
            "0.jpg": picture(20, "JPEG"),
            "0.txt": "A café ".encode(),
            "0.json": b'{"caption": "other", "status": "success"}',
            "1.png": picture(40),
            "1.json": b'{"caption": "A dog"}',
            "2.json": b'{"caption": "gone", "status": "failed_to_download"}',
            "3.jpg": picture(20, "JPEG"),
            "4.txt": b"no picture",
            "5.png": picture(40),
            "5.txt": b"\xff\xfe",
            "6.png": picture(40),
            "6.txt": b"  ",
        },
    )
    make = Import("webdataset", file, settings=dict(image_first=1.0))
    assert dialogue(make(0).conversation) == [("document", 20, "A café")]
    assert dialogue(make(1).conversation) == [("document", 40, "A dog")]
    assert why(make(2)) == {"left out": {"samples that were not downloaded": 1}}
    assert why(make(6)) == {"left out": {"captions that are empty": 1}}
    reasons = [rejection(make, k) for k in (3, 4, 5)]
    assert reasons == ["field missing", "field missing", "text that is no Unicode"]
    drawn = Import("webdataset", file, settings=dict(form="draw"))(0).conversation
    assert dialogue(drawn) == [("user", "A café"), ("assistant", 20)]
    told = Import("webdataset", file, settings=dict(form="describe", question="what?"))(0).conversation
    assert dialogue(told) == [("user", 20, "what?"), ("assistant", "A café")]
    assert [drawn.turns[1].op, told.turns[1].op] == ["draw", "describe"]


def converted(*names: str) -> list[dict]:
    return [{"image_id": n, "caption": f"Then {n}.", "sequence_index": k} for k, n in enumerate(names)]


def test_vist_in_both_forms(tmp_path, images):
    stories = {
        "10": converted("a", "b", "c"),
        "11": converted("d", "gone", "e")[::-1],
        "12": converted("gone", "a"),
    }
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"annotations": stories}))
    make = pickle.loads(pickle.dumps(Import("vist", file, images, settings=dict(ending=".png"))))
    record = make(0).conversation
    assert dialogue(record) == [
        ("user", "tell a story in pictures"),
        ("assistant", "Then a.", 0, "Then b.", 20, "Then c.", 40),
    ]
    assert record.turns[1].op == "story" and rejection(make, 1) == "missing picture"
    settings = dict(ending=".png", missing="leave_out", form="document")
    make = Import("vist", file, images, settings=settings)
    assert dialogue(make(1).conversation) == [("document", "Then d.", GREY["d"], "Then e.", GREY["e"])]
    assert why(make(2))["left out"] == {"stories with too few pictures": 1}
    original = [
        [
            {
                "story_id": str(story),
                "photo_flickr_id": name,
                "worker_arranged_photo_order": k,
                "text": f"then {name}",
            }
        ]
        for story, names in ((1, "ab"), (2, "cd"))
        for k, name in enumerate(names)
    ]
    file.write_text(json.dumps({"images": [], "annotations": original}))
    make = Import("vist", file, images, settings=dict(ending=".png"))
    assert [dialogue(r)[1] for r in all_of(make)] == [
        ("assistant", "then a", 0, "then b", 20),
        ("assistant", "then c", 40, "then d", 60),
    ]
    bad = {"1": [], "2": converted("a") * 2, "3": [{"image_id": "a"}], "4": ["x"]}
    file.write_text(json.dumps({"annotations": bad}))
    make = Import("vist", file, images, settings=dict(ending=".png"))
    reasons = [rejection(make, k) for k in range(4)]
    assert reasons == ["empty dialogue", "turns out of order", "field missing", "field missing"]
    file.write_text("[1, 2]")
    with pytest.raises(DataError, match="no annotations of VIST"):
        Import("vist", file, images)


# --- regions ------------------------------------------------------------------------------------------------

REF = {
    "image": stored(20, (10, 20)),
    "answer": ["the left one"],
    "bbox": [1.0, 2.0, 4.0, 10.0],
    "segmentation": [1.0, 2.0, 4.0, 2.0, 4.0, 11.0, 1.0, 11.0],
}


def test_refcoco(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [REF])
    record = only(Import("refcoco", file))
    assert dialogue(record)[0] == ("user", 20, "where is the left one")
    (box,) = record.turns[1].parts
    assert isinstance(box, Box) and box.label == "the left one" and record.turns[1].op == "locate"
    assert box.xyxy == pytest.approx((0.1, 0.1, 0.5, 0.6))
    record = only(Import("refcoco", file, settings=dict(form="both", segment="cut out {expression}")))
    assert dialogue(record)[2] == ("user", "cut out the left one") and needs(record)[2] == (0,)
    (region,) = record.turns[3].parts
    wanted = np.zeros((20, 10), bool)
    wanted[2:12, 1:5] = True
    assert isinstance(region, Mask) and (region.array() == wanted).all()


@pytest.mark.parametrize(
    "change, form, reason",
    [
        (dict(bbox=[1.0, 2.0, 20.0, 5.0]), "locate", "box outside the picture"),
        (dict(bbox=[1.0, 2.0, 0.0, 5.0]), "locate", "box outside the picture"),
        (dict(bbox=[1.0, 2.0, 3.0]), "locate", "field of another type"),
        (dict(bbox=["1", "2", "3", "4"]), "locate", "field of another type"),
        (dict(segmentation=[1.0, 2.0, 3.0, 4.0]), "segment", "no polygon"),
        (dict(segmentation=[[1.0] * 7]), "segment", "no polygon"),
        (dict(segmentation=[90.0, 90.0, 95.0, 90.0, 95.0, 95.0]), "segment", "empty mask"),
        (dict(answer="x"), "locate", "field of another type"),
    ],
)
def test_broken_references(tmp_path, change, form, reason):
    row = REF | change
    row["image"] = {"bytes": None, "path": "x.png"}
    (tmp_path / "x.png").write_bytes(picture(20, size=(10, 20)))
    file = write_lines(tmp_path / "a.jsonl", row)
    assert rejection(Import("refcoco", file, tmp_path, settings=dict(form=form))) == reason


def test_pickles_are_never_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(Evil()))
    for path in (tmp_path, tmp_path / "refs(unc).p"):
        with pytest.raises(DataError, match="pickles run code when they are read"):
            Import("refcoco", path)
    assert not (tmp_path / "ran").exists()


def test_reason_seg(tmp_path):
    square = lambda a, b: [[a, a], [b, a], [b, b], [a, b]]  # noqa: E731
    target = {"label": "target", "points": square(2, 8)}
    annotations = {
        "a": {
            "text": ["what keeps the rain off"],
            "shapes": [target, {"label": "ignore", "points": square(2, 4)}],
        },
        "b": {"text": ["x"], "shapes": [{"label": "ignore", "points": square(2, 4)}]},
        "c": {"text": ["x"], "shapes": [target, {"label": "ignore", "points": square(0, 9)}]},
        "d": {"text": [], "shapes": [target]},
        "e": {"text": ["x"], "shapes": [{"label": "target", "points": [[1, 1], "x"]}]},
        "f": {"text": ["x"], "shapes": [target]},
    }
    for name, annotation in annotations.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(annotation))
        if name != "f":
            (tmp_path / f"{name}.jpg").write_bytes(picture(20, "JPEG", (12, 12)))
    (tmp_path / "g.json").write_text("{")
    make = pickle.loads(pickle.dumps(Import("reason_seg", tmp_path, tmp_path)))
    assert len(make) == 7
    record = make(0).conversation
    assert dialogue(record)[0] == ("user", 20, "what keeps the rain off") and record.turns[1].op == "segment"
    wanted = np.zeros((12, 12), bool)
    wanted[2:9, 2:9] = True
    wanted[2:5, 2:5] = False
    assert (record.turns[1].parts[0].array() == wanted).all()
    reasons = [rejection(make, k) for k in range(1, 7)]
    assert reasons == ["no target", "empty mask", "empty turn", "no polygon", "missing picture", "not JSON"]
    asked = Import("reason_seg", tmp_path, tmp_path, settings=dict(request="segment {query}"))
    assert dialogue(asked(0).conversation)[0][2] == "segment what keeps the rain off"
