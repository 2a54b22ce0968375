"""Importing into shards: what is let in and from where, what is counted, when an import fails."""

import json
import os
from pathlib import Path

import pytest
from importing_toy import all_of, causes, make_pictures, picture, why, write_lines

from umm_jax import cli
from umm_jax.data import importing
from umm_jax.data.gate import Limits
from umm_jax.data.importing import Import
from umm_jax.data.making import make_records
from umm_jax.data.records import open_source
from umm_jax.errors import DataError, Interrupted


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("images"))


def pair(name, caption="x") -> dict:
    return {"image": name, "caption": caption}


def the_reason(made) -> str:
    assert made.conversation is None
    (reason,) = why(made)["rejected records"]
    return reason


# --- pictures by name -------------------------------------------------------------------------------------


def test_no_name_leads_out_of_the_folder(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root, root / "sub", tmp_path / "root2"):
        folder.mkdir()
        (folder / "a.png").write_bytes(picture(50))
    (root / "link.png").symlink_to(outside / "a.png")
    (root / "far").symlink_to(outside)
    (root / "near.png").symlink_to(root / "sub" / "a.png")
    os.mkfifo(root / "pipe.png")
    names = {
        "../outside/a.png": "picture outside",
        "sub/../../outside/a.png": "picture outside",
        "../root2/a.png": "picture outside",
        str(outside / "a.png"): "picture outside",
        str(root / "a.png"): "picture outside",
        "link.png": "picture outside",
        "far/a.png": "picture outside",
        "": "picture outside",
        ".": "picture outside",
        "a\0.png": "picture outside",
        "file:///etc/passwd": "picture by URL",
        "https://example.com/a.png": "picture by URL",
        "gs://bucket/a.png": "picture by URL",
        "gone.png": "missing picture",
        "sub": "missing picture",
        "pipe.png": "missing picture",
        "a" * 5000: "missing picture",
        "a.png": None,
        "sub/../a.png": None,
        "near.png": None,
    }
    file = write_lines(tmp_path / "0.txt", *map(pair, names))
    make = Import("pairs", file, root)
    for index, (name, reason) in enumerate(names.items()):
        made = make(index)
        if reason is None:
            assert made.conversation is not None, (name, causes(made))
        else:
            assert the_reason(made) == reason, name
    without = Import("pairs", file)
    assert the_reason(without(len(names) - 3)) == "missing picture"
    assert "no folder of pictures was given (--images)" in causes(without(len(names) - 3))[0]


def test_pictures_by_data_url(tmp_path):
    import base64

    good = "data:image/png;base64," + base64.b64encode(picture(70)).decode()
    wrong = [good[:-3], "data:image/png;base64,????", "data:image/png,plain", "data:;base64,"]
    make = Import("pairs", write_lines(tmp_path / "0.txt", *map(pair, [good, *wrong])))
    assert make(0).conversation.images["i0"].data == picture(70)
    reasons = [the_reason(make(k)) for k in range(1, 5)]
    assert reasons == ["damaged picture", "damaged picture", "picture by URL", "no picture"]
    assert all(len(cause) < 500 for k in range(1, 5) for cause in causes(make(k))), "no picture in a message"


def test_limits_and_changes_are_counted(tmp_path, images):
    import io

    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.new("CMYK", (9, 9)).save(buffer, "JPEG")
    (tmp_path / "cmyk.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "large.bin").write_bytes(bytes(5000))
    file = write_lines(tmp_path / "0.txt", pair("cmyk.jpg"), pair("a.png"), pair("large.bin"))
    make = Import("pairs", file, tmp_path, limits=Limits(pixels=100, bytes=4000))
    assert make(0).tally.plain()["changed pictures"] == {"CMYK made RGB": 1}
    assert make(1).conversation is not None
    assert the_reason(make(2)) == "too many bytes", "and is not read"
    assert the_reason(Import("pairs", file, tmp_path, limits=Limits(pixels=47))(1)) == "too many pixels"


# --- texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, reason",
    [
        ("x" * (importing.LONGEST_TEXT + 1), "text too long"),
        ("x" * 100_000, "text too long"),
        ("half \ud83d a pair", "text that is no Unicode"),
        ("a\0b", "text with NUL"),
    ],
)
def test_texts_that_are_not_let_in(tmp_path, images, text, reason):
    file = write_lines(tmp_path / "0.txt", pair("a.png", text), pair("a.png", "x" * importing.LONGEST_TEXT))
    make = Import("pairs", file, images)
    assert the_reason(make(0)) == reason
    assert make(1).conversation is not None
    json.loads(make(0).tally.lines().splitlines()[0])
    assert len(make(0).tally.lines()) < 30_000, "the quarantine holds the beginning"


# --- into shards --------------------------------------------------------------------------------------------

NAMES = ["a.png", "gone.png", "b.png", "cut.jpg", "c.png", "d.png", "gone.png", "gone.png"]
COUNTS = {"missing picture": 3, "damaged picture": 1}


@pytest.fixture
def mixed(tmp_path) -> Path:
    return write_lines(tmp_path / "0.txt", *(pair(name, f"caption {k}") for k, name in enumerate(NAMES)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def into(out: Path, make: Import, max_rejected: float = 0.5, **options):
    options = {"shards": 4, "max_rejected": max_rejected, **options}
    return make_records(make, len(make), out, how=make.recipe(), **options)


def test_what_is_rejected_is_counted_and_quarantined(tmp_path, images, mixed):
    source = into(tmp_path / "d", Import("pairs", mixed, images, license="CC0-1.0"))
    assert [record.id for record in source] == [f"pairs-0-{line}" for line in (1, 3, 5, 6)]
    counts = source.manifest["counts"]
    assert counts["rejected records"] == counts["rejected pictures"] == COUNTS
    assert counts["pictures"] == {"looked at": 8} and counts["licenses"] == {"CC0-1.0": 4}
    assert [shard["records"] for shard in source.manifest["shards"]] == [1, 1, 2, 0]
    assert open_source(tmp_path / "d", verify=True)[3]
    lines = [json.loads(line) for line in (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["what"] == "record"]
    assert [line["record"] for line in records] == [1, 3, 6, 7] and len(lines) == 8
    assert records[1]["reason"] == "damaged picture" and records[1]["where"] == f"{mixed}, line 4"
    assert json.loads(records[1]["entry"]) == pair("cut.jpg", "caption 3")
    left = {path.name for path in (tmp_path / "d").iterdir()}
    assert left == {"manifest.json", "quarantine.jsonl", *(s["file"] for s in source.manifest["shards"])}
    into(tmp_path / "e", Import("pairs", mixed, images, license="CC0-1.0"), workers=2)
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


def test_a_stopped_import_goes_on_with_its_counts(tmp_path, images, mixed):
    whole = Import("pairs", mixed, images)
    into(tmp_path / "whole", whole)

    class Stopped(Import):
        def __call__(self, index):
            if index == 5:
                raise KeyboardInterrupt
            return super().__call__(index)

    with pytest.raises(Interrupted, match="2 of 4 shards finished"):
        into(tmp_path / "d", Stopped("pairs", mixed, images))
    assert into(tmp_path / "d", whole).manifest["counts"]["rejected records"] == COUNTS
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_too_much_that_is_rejected_fails_and_a_higher_limit_goes_on(tmp_path, images, mixed):
    make = Import("pairs", mixed, images)
    with pytest.raises(DataError) as caught:
        into(tmp_path / "d", make, 0.49)
    said = str(caught.value)
    assert "4 of 8 records were rejected, more than 49.0% (3 missing picture, 1 damaged picture)" in said
    assert f"{tmp_path / 'd' / 'quarantine.jsonl'} says where and why" in said and "--max-rejected" in said
    assert len((tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()) == 8
    with pytest.raises(DataError, match="not finished"):
        open_source(tmp_path / "d")
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").glob("*.array_record")}
    into(tmp_path / "d", make, 0.5)
    assert shards == {path: path.stat().st_mtime_ns for path in shards}, "what was finished is kept"
    into(tmp_path / "e", make, 0.5)
    assert contents(tmp_path / "d") == contents(tmp_path / "e")
    with pytest.raises(DataError, match="4 of 8 records were rejected"):
        into(tmp_path / "e", make, 0.1)  # a finished folder is held to it too


def test_pictures_have_a_rate_of_their_own(tmp_path, images):
    info = [
        {"image_name": n, "matched_text_index": 0, "matched_sim": 1.0} for n in ("a.png", "b.png", "gone.png")
    ]
    page = {"text_list": ["S."], "image_info": info, "similarity_matrix": [[1.0]] * 3}
    make = Import("mmc4", write_lines(tmp_path / "docs_0.jsonl", page, page), images)
    with pytest.raises(DataError, match="2 of 6 pictures were rejected, more than 5.0%"):
        into(tmp_path / "d", make, 0.05)
    assert len(into(tmp_path / "d", make, 0.34)) == 2


def test_without_a_limit_the_first_stops_the_run(tmp_path, images, mixed):
    with pytest.raises(DataError, match=r"0.txt, line 2 \(record 1\): gone.png: no such file"):
        into(tmp_path / "d", Import("pairs", mixed, images), 0.0)
    assert len(list((tmp_path / "d").glob("*.array_record"))) == 0
    assert not list((tmp_path / "d").glob("*.part"))


def test_other_annotations_settings_or_limits_are_another_recipe(tmp_path, images, mixed):
    into(tmp_path / "d", Import("pairs", mixed, images))
    into(tmp_path / "d", Import("pairs", mixed, images, limits=Limits(seconds=3.0)))
    for make in (
        Import("pairs", mixed, images, seed=1),
        Import("pairs", mixed, images, settings=dict(lower_case=False)),
        Import("pairs", mixed, images, limits=Limits(pixels=99)),
        Import("pairs", write_lines(mixed, *[pair("a.png")] * 8), images),
    ):
        with pytest.raises(DataError, match="made another way"):
            into(tmp_path / "d", make)


def test_nothing_left_is_an_error(tmp_path, images):
    make = Import("pairs", write_lines(tmp_path / "0.txt", pair("gone.png")), images)
    with pytest.raises(DataError, match="holds no records"):
        into(tmp_path / "d", make, 1.0)
    with pytest.raises(DataError, match="no such folder of pictures"):
        Import("pairs", tmp_path / "0.txt", tmp_path / "nowhere")


# --- the command ------------------------------------------------------------------------------------------


def test_the_command(tmp_path, images, mixed, capsys):
    words = ["data", "import", "pairs", str(mixed), f"--images={images}", "--shards=2"]
    assert cli.main([*words, f"--out={tmp_path / 'd'}"]) == 3
    assert "4 of 8 records were rejected, more than 5.0%" in capsys.readouterr().err
    more = ["--max-rejected=0.5", "--seed=3", "--set", "lower_case=false", "--license=CC0-1.0"]
    status = cli.main([*words, f"--out={tmp_path / 'e'}", *more, "--source=mine", "--split=val"])
    out = capsys.readouterr().out
    assert status == 0 and "4 conversations in 2 shards" in out
    assert "rejected records: 3 missing picture" in out and "quarantine.jsonl" in out
    record = open_source(tmp_path / "e").conversation(0)
    assert (record.id, record.license, record.split) == ("mine-0-1", "CC0-1.0", "val")
    assert cli.main(["data", "import", "pears", *words[3:], f"--out={tmp_path / 'f'}"]) == 2
    assert "did you mean 'pairs'" in capsys.readouterr().err
    assert cli.main([*words, f"--out={tmp_path / 'f'}", "--max-rejected=5"]) == 2
    assert "max_rejected is a share from 0 to 1" in capsys.readouterr().err


def test_formats_are_listed(capsys):
    assert cli.main(["data", "formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("mmc4 ") and "web pages" in line for line in lines)
    assert all(len(line) < 120 for line in lines)


def test_every_index_gives_the_same_whatever_came_before(tmp_path, images, mixed):
    first, second = Import("pairs", mixed, images), Import("pairs", mixed, images)
    assert all_of(first) == [second(k).conversation for k in reversed(range(8))][::-1]
