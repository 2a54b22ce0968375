"""Importers: pairs and MMC4 from generated files, with every way in which such files are broken."""

import json
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from umm_jax import cli
from umm_jax.conversation import Image, Text
from umm_jax.data import importers
from umm_jax.data.importing import Import, Lines
from umm_jax.data.making import make_records
from umm_jax.data.records import open_source
from umm_jax.errors import ConfigError, DataError, Interrupted

GREY = {name: 20 * k for k, name in enumerate("abcdefgh")}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """a.png to h.png, one grey each; c.jpg; cut.jpg ends in the middle; text.png is none."""
    folder = tmp_path_factory.mktemp("images")
    for name, grey in GREY.items():
        PIL.Image.fromarray(np.full((6, 8, 3), grey, np.uint8)).save(folder / f"{name}.png")
    (folder / "sub").mkdir()
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(folder / "sub" / "c.jpg")
    (folder / "cut.jpg").write_bytes((folder / "sub" / "c.jpg").read_bytes()[:2000])
    (folder / "text.png").write_text("not found")
    return folder


def write(path: Path, *entries) -> Path:
    path.write_text("".join(e if isinstance(e, str) else json.dumps(e) + "\n" for e in entries))
    return path


def laid(record) -> list:
    """Texts, and the greys of pictures."""
    (turn,) = record.turns
    return [p.text if isinstance(p, Text) else int(record.images[p.ref].array()[0, 0, 0]) for p in turn.parts]


def all_of(make: Import) -> list:
    made = [make(index).conversation for index in range(len(make))]
    for record in made:
        if record is not None:
            record.validate()
    return made


# --- pairs ----------------------------------------------------------------------------------------------


def pair(name: str, caption) -> dict:
    return {"image": name, "caption": caption}


def test_pairs(tmp_path, images):
    file = write(tmp_path / "0.txt", pair("a.png", "A Red DOG"), "\n", pair("sub/c.jpg", ["Two", "parts"]))
    make = Import("pairs", file, images, source="laion", license="CC-BY-4.0")
    first, second = all_of(make)
    assert sorted(map(str, laid(first))) == ["0", "a red dog"]
    assert "two parts" in laid(second) and second.images["i0"].mime == "image/jpeg"
    assert second.images["i0"].data == (images / "sub" / "c.jpg").read_bytes(), "not encoded again"
    (turn,) = first.turns
    assert turn.role == "document" and turn.loss
    assert (first.id, first.source, first.license) == ("laion-0-1", "laion", "CC-BY-4.0")
    assert second.id == "laion-0-3", "lines are counted as an editor does"
    kept = Import("pairs", file, images, settings=dict(lower_case=False, image_first=1.0))
    assert laid(kept(0).conversation) == [0, "A Red DOG"]
    assert laid(Import("pairs", file, images, settings=dict(image_first=0.0))(0).conversation)[1] == 0


def test_half_of_the_pairs_begin_with_their_picture_and_a_seed_decides(tmp_path, images):
    file = write(tmp_path / "0.txt", *(pair("a.png", f"caption {k}") for k in range(200)))
    orders = {}
    for seed in (0, 0, 1):
        make = Import("pairs", file, images, seed=seed)
        order = [isinstance(make(k).conversation.turns[0].parts[0], Image) for k in range(200)]
        assert 70 < sum(order) < 130
        assert orders.setdefault(seed, order) == order, "the same seed, the same records"
    assert orders[0] != orders[1]
    # Record by record, in any order.
    again = Import("pairs", file, images)
    assert [isinstance(again(k).conversation.turns[0].parts[0], Image) for k in (150, 3)] == [
        orders[0][150],
        orders[0][3],
    ]


@pytest.mark.parametrize(
    "line, said",
    [
        (
            "{'image': 'a.png', 'caption': \"it's\"}",
            "a Python dict in single quotes, not JSON; write",
        ),
        ('{"image": "a.png", "caption": "x"', "not JSON: "),
        ('["a.png", "x"]', "expected a JSON object, got list"),
        ('{"image": "a.png"}', "'caption' is missing"),
        ('{"image": "a.png", "caption": [1]}', "'caption' must be a string or a list of strings"),
        ('{"image": 3, "caption": "x"}', "'image' must be str, got 3"),
        ('{"image": "../secret.png", "caption": "x"}', "'../secret.png' leads out of"),
        ('{"image": "/etc/passwd", "caption": "x"}', "'/etc/passwd' leads out of"),
    ],
)
@pytest.mark.parametrize("missing", ["refuse", "drop"])
def test_broken_annotations_are_named(tmp_path, images, line, said, missing):
    file = write(tmp_path / "0.txt", pair("a.png", "x"), line + "\n")
    with pytest.raises(DataError) as caught:
        Import("pairs", file, images, missing=missing)(1)
    assert f"{file}, line 2 (record 1): " in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    "name, said, counted",
    [
        ("gone.png", "gone.png: No such file", "pictures missing"),
        ("cut.jpg", "cut.jpg: image file is truncated", "pictures broken"),
        ("text.png", "text.png: no picture of a known format", "pictures broken"),
        ("sub", "sub: Is a directory", "pictures missing"),
    ],
)
def test_pictures_that_cannot_be_read_are_refused_or_counted(tmp_path, images, name, said, counted):
    file = write(tmp_path / "0.txt", pair(name, "x"))
    with pytest.raises(DataError) as caught:
        Import("pairs", file, images)(0)
    assert said in str(caught.value) and "line 1 (record 0)" in str(caught.value)
    assert "--missing=drop" in str(caught.value)
    noted = Import("pairs", file, images, missing="drop")(0)
    assert noted.conversation is None and noted.left_out == {counted: 1}


def test_pictures_with_too_many_pixels_are_not_unpacked(tmp_path, images, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 40)
    file = write(tmp_path / "0.txt", pair("a.png", "x"))
    with pytest.raises(DataError, match=r"Image size \(48 pixels\) exceeds limit of 40"):
        Import("pairs", file, images)(0)


def test_empty_captions_are_left_out(tmp_path, images):
    file = write(tmp_path / "0.txt", pair("a.png", " "))
    assert Import("pairs", file, images)(0).left_out == {"captions that are empty": 1}


# --- MMC4 -----------------------------------------------------------------------------------------------


def page(sentences: list[str], *pictures: tuple[str, int, float], rows: int | None = None) -> dict:
    info = [
        {"image_name": f"{name}.png", "matched_text_index": at, "matched_sim": similarity}
        for name, at, similarity in pictures
    ]
    matrix = [[0.0] * len(sentences)] * (len(info) if rows is None else rows)
    return {"text_list": sentences, "image_info": info, "similarity_matrix": matrix, "url": "http://x"}


def test_pages(tmp_path, images):
    entry = page(["One.", "Two.", "Three."], ("a", 2, 0.3), ("b", 0, 0.24), ("c", 1, 0.2399))
    file = write(tmp_path / "docs_shard_0_v2.jsonl", entry)
    before = Import("mmc4", file, images, settings=dict(image_first=1.0))
    (record,) = all_of(before)
    assert laid(record) == [GREY["b"], "One. Two.", GREY["a"], "Three."]
    (record,) = all_of(Import("mmc4", file, images, settings=dict(image_first=0.0)))
    assert laid(record) == ["One.", GREY["b"], "Two. Three.", GREY["a"]]
    assert record.id == "mmc4-docs_shard_0_v2-1" and record.turns[0].role == "document"
    (record,) = all_of(Import("mmc4", file, images, settings=dict(min_similarity=0.1, image_first=0.0)))
    assert laid(record) == ["One.", GREY["b"], "Two.", GREY["c"], "Three.", GREY["a"]]


def test_pictures_of_a_page_are_chosen_and_placed_at_random(tmp_path, images):
    entry = page(["S.", "T."], *((name, k % 2, 0.5) for k, name in enumerate("abcdefgh")), rows=7)
    file = write(tmp_path / "docs_shard_0_v2.jsonl", *[entry] * 60)
    seen, first = set(), 0
    for record in all_of(Import("mmc4", file, images)):
        parts = laid(record)
        greys = [part for part in parts if isinstance(part, int)]
        assert len(greys) == len(set(greys)) == 6 and GREY["h"] not in greys, "h has no row in the matrix"
        # In the order of their sentences: even letters belong to the first.
        assert [g // 20 % 2 for g in greys] == sorted(g // 20 % 2 for g in greys)
        assert "".join(part for part in parts if isinstance(part, str)) in ("S.T.", "S. T.")
        seen.add(tuple(greys))
        first += isinstance(parts[0], int)
    assert len(seen) > 20 and 40 < first < 60, (
        "of three pictures at S. at least one stands before it in 7 of 8"
    )


def test_half_of_the_pages_with_one_picture_are_left_out(tmp_path, images):
    one, two = page(["S."], ("a", 0, 0.5)), page(["S."], ("a", 0, 0.5), ("b", 0, 0.5))
    file = write(tmp_path / "docs_shard_0_v2.jsonl", *[one] * 100, *[two] * 20, page(["S."], ("a", 0, 0.1)))
    make = Import("mmc4", file, images)
    made = all_of(make)
    assert 30 < sum(record is not None for record in made[:100]) < 70
    assert all(made[100:120]) and made[120] is None
    assert make(120).left_out == {"pages without a picture": 1}
    reasons = {reason for k in range(100) for reason in make(k).left_out}
    assert reasons == {"pages with one picture"}
    assert all(all_of(Import("mmc4", file, images, settings=dict(keep_single=1.0)))[:100])


def test_pages_lose_pictures_that_are_missing_only_where_told(tmp_path, images):
    entry = page(["S.", "T."], ("a", 0, 0.5), ("gone", 0, 0.5), ("b", 1, 0.5))
    file = write(tmp_path / "docs_shard_0_v2.jsonl", entry)
    with pytest.raises(DataError, match=r"line 1 \(record 0\): picture .*gone.png: No such file"):
        Import("mmc4", file, images)(0)
    noted = Import("mmc4", file, images, missing="drop")(0)
    assert noted.left_out == {"pictures missing": 1} and len(noted.conversation.images) == 2
    # What does not match well enough is never looked for.
    Import("mmc4", write(file, page(["S."], ("a", 0, 0.5), ("gone", 0, 0.1))), images)(0)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(text_list="S."), "'text_list' must be list, got 'S.'"),
        (dict(text_list=[1, 2]), "'text_list' must be a list of strings"),
        (dict(text_list=["S."]), "'matched_text_index' is 1, the page has 1 sentences"),
        (dict(image_info=[{"image_name": "a.png"}]), "'matched_text_index' is missing"),
        (dict(similarity_matrix=None), "'similarity_matrix' must be list, got None"),
    ],
)
def test_broken_pages_are_named(tmp_path, images, change, said):
    entry = page(["S.", "T."], ("a", 1, 0.5), ("b", 1, 0.5)) | change
    file = write(tmp_path / "docs_shard_0_v2.jsonl", entry)
    with pytest.raises(DataError) as caught:
        Import("mmc4", file, images)(0)
    assert said in str(caught.value)


# --- annotation files -----------------------------------------------------------------------------------


def pack(file: Path, name: str = "") -> Path:
    packed = file.with_name(file.name + ".zip")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, name or file.name)
    file.unlink()
    return packed


def test_packed_and_plain_files_of_a_folder_are_read_in_order(tmp_path, images):
    for shard, text in ((0, "zero"), (1, "one"), (2, "two")):
        entry = page([text], ("a", 0, 0.5), ("b", 0, 0.5))
        write(tmp_path / f"docs_shard_{shard}_v2.jsonl", *[entry] * (shard + 1))
    pack(tmp_path / "docs_shard_1_v2.jsonl")
    pack(tmp_path / "docs_shard_2_v2.jsonl", "other/name.jsonl")
    (tmp_path / "README.txt").write_text("no annotations")
    make = Import("mmc4", tmp_path, images)
    texts = [next(p for p in laid(record) if isinstance(p, str)) for record in all_of(make)]
    assert texts == ["zero", "one", "one", "two", "two", "two"]
    assert make(5).conversation.id == "mmc4-docs_shard_2_v2-3"


def test_files_that_cannot_be_read_are_named(tmp_path, images):
    with pytest.raises(DataError, match="no such annotation file or folder"):
        Import("pairs", tmp_path / "gone", images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no annotation files \(docs_\*.jsonl, docs_\*.jsonl.zip\)"):
        Import("mmc4", tmp_path / "empty", images)
    bad = tmp_path / "docs_shard_3_v2.jsonl.zip"
    bad.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match="docs_shard_3_v2.jsonl.zip: damaged, or no zip file"):
        Import("mmc4", bad, images)
    file = write(tmp_path / "docs_shard_4_v2.jsonl", page(["S."]))
    text = file.read_text()
    pack(file)
    file.write_text(text)
    bad.unlink()
    with pytest.raises(DataError, match="docs_shard_4_v2.jsonl: is there packed and unpacked"):
        Import("mmc4", tmp_path, images)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("a", "{}")
        archive.writestr("b", "{}")
    with pytest.raises(DataError, match="holds 2 files and none called docs_shard_3_v2.jsonl"):
        Import("mmc4", bad, images)
    with pytest.raises(DataError, match="no such folder of pictures"):
        Import("pairs", write(tmp_path / "0.txt", pair("a.png", "x")), tmp_path / "nowhere")


def test_kinds_and_settings_by_name(tmp_path, images):
    assert importers.names() == ["mmc4", "pairs"]
    file = write(tmp_path / "0.txt", pair("a.png", "x"))
    with pytest.raises(ConfigError, match="no importer is called 'mmc'; did you mean 'mmc4'"):
        Import("mmc", file, images)
    with pytest.raises(ConfigError, match="settings.image_frist: unknown key; did you mean 'image_first'"):
        Import("pairs", file, images, settings={"image_frist": 1.0})
    with pytest.raises(ConfigError, match="image_first is a share from 0 to 1"):
        Import("pairs", file, images, settings={"image_first": 2.0})


# --- into shards ----------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path) -> Path:
    names = ["a.png", "gone.png", "b.png", "cut.jpg", "c.png", "d.png", "gone.png", "gone.png"]
    return write(tmp_path / "0.txt", *(pair(name, f"caption {k}") for k, name in enumerate(names)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def into(out: Path, make: Import, **options):
    return make_records(make, len(make), out, how=make.recipe(), **{"shards": 4, **options})


def test_what_is_left_out_is_counted_in_the_manifest(tmp_path, images, mixed):
    make = Import("pairs", mixed, images, missing="drop")
    source = into(tmp_path / "d", make)
    assert [record.id for record in source] == [f"pairs-0-{line}" for line in (1, 3, 5, 6)]
    assert source.manifest["left_out"] == {"pictures missing": 3, "pictures broken": 1}
    assert [shard["records"] for shard in source.manifest["shards"]] == [1, 1, 2, 0]
    assert open_source(tmp_path / "d", verify=True)[3]
    assert not list((tmp_path / "d").glob("*left_out*")), "only the manifest is left"
    into(tmp_path / "e", Import("pairs", mixed, images, missing="drop"), workers=2)
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


def test_a_stopped_import_goes_on_with_its_counts(tmp_path, images, mixed):
    whole = Import("pairs", mixed, images, missing="drop")
    into(tmp_path / "whole", whole)

    class Stopped(Import):
        def __call__(self, index):
            if index == 5:
                raise KeyboardInterrupt
            return super().__call__(index)

    with pytest.raises(Interrupted, match="2 of 4 shards finished"):
        into(tmp_path / "d", Stopped("pairs", mixed, images, missing="drop"))
    assert into(tmp_path / "d", whole).manifest["left_out"] == {"pictures missing": 3, "pictures broken": 1}
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_other_annotations_or_settings_are_another_recipe(tmp_path, images, mixed):
    into(tmp_path / "d", Import("pairs", mixed, images, missing="drop"))
    for make in (
        Import("pairs", mixed, images, missing="drop", seed=1),
        Import("pairs", mixed, images, missing="drop", settings=dict(lower_case=False)),
        Import("pairs", write(mixed, *[pair("a.png", "x")] * 8), images, missing="drop"),
    ):
        with pytest.raises(DataError, match="made another way"):
            into(tmp_path / "d", make)


def test_a_refused_import_goes_on_where_pictures_may_be_left_out(tmp_path, images, capsys):
    names = ["a.png", "b.png", "c.png", "gone.png"]
    file = write(tmp_path / "0.txt", *(pair(name, "x") for name in names))
    words = ["data", "import", "--kind=pairs", f"--from={file}", f"--images={images}", "--shards=2"]
    words.append(f"--out={tmp_path / 'd'}")
    assert cli.main(words) == 3 and "line 4 (record 3)" in capsys.readouterr().err
    shard = next((tmp_path / "d").glob("*.array_record"))
    made = shard.stat().st_mtime_ns
    assert cli.main([*words, "--missing=drop"]) == 0
    assert shard.stat().st_mtime_ns == made, "the shard that needed no dropping is kept"
    assert cli.main(words) == 3, "what was dropped is not taken for whole"
    assert "made with --missing=drop, which left out 1 pictures missing" in capsys.readouterr().err


def test_nothing_left_is_an_error(tmp_path, images):
    make = Import("pairs", write(tmp_path / "0.txt", pair("gone.png", "x")), images, missing="drop")
    with pytest.raises(DataError, match="holds no records"):
        into(tmp_path / "d", make)


def test_the_command(tmp_path, images, mixed, capsys):
    words = [f"--from={mixed}", f"--images={images}", f"--out={tmp_path / 'd'}", "--shards=2"]
    assert cli.main(["data", "import", "--kind=pairs", *words]) == 3
    assert "line 2 (record 1): picture" in capsys.readouterr().err
    status = cli.main(
        [
            "data",
            "import",
            "--kind=pairs",
            *words[:2],
            f"--out={tmp_path / 'e'}",
            "--missing=drop",
            "--seed=3",
        ]
        + ["--set", "lower_case=false", "--license=CC0-1.0", "--source=mine", "--split=val"]
    )
    out = capsys.readouterr().out
    assert status == 0 and "4 conversations in" in out and "left out: 3 pictures missing" in out
    record = open_source(tmp_path / "e").conversation(0)
    assert (record.id, record.license, record.split) == ("mine-0-1", "CC0-1.0", "val")
    assert cli.main(["data", "import", "--kind=pears", *words]) == 2
    assert "did you mean 'pairs'" in capsys.readouterr().err


def test_lines_hold_one_file_at_a_time(tmp_path):
    for k in range(3):
        write(tmp_path / f"{k}.txt", *(pair(f"{k}-{n}", "x") for n in range(2)))
    lines = Lines(tmp_path, ["*.txt"])
    assert [json.loads(line)["image"] for _, _, line in lines] == [
        f"{k}-{n}" for k in range(3) for n in (0, 1)
    ]
    with pytest.raises(IndexError):
        lines[6]
