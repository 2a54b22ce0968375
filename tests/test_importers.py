"""The importers of MM-Interleaved's pre-training data: captioned pictures and MMC4 pages."""

from pathlib import Path

import pytest
from importing_toy import GREY, all_of, causes, laid, make_pictures, picture, why, write_lines, write_parquet

from umm_jax.conversation import Image
from umm_jax.data import importers
from umm_jax.data.importing import Import
from umm_jax.errors import ConfigError


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("images"))


# --- what all have in common ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", importers.names())
def test_an_importer_offers_what_the_interface_says(kind):
    module = importers.get(kind)
    first = module.__doc__.splitlines()[0]
    assert 20 < len(first) <= 100 and first.endswith("."), "it is shown in the list of formats"
    assert isinstance(module.VERSION, int) and isinstance(module.LICENSE, str)
    assert callable(module.entries) and callable(module.conversation)
    documented = module.Settings.__doc__
    for name in module.Settings.__dataclass_fields__:
        assert name in documented, f"{kind}: what {name} does is not said"


def test_kinds_and_settings_by_name(tmp_path, images):
    file = write_lines(tmp_path / "0.txt", pair("a.png", "x"))
    with pytest.raises(ConfigError, match="no importer is called 'mmc'; did you mean 'mmc4'"):
        Import("mmc", file, images)
    with pytest.raises(ConfigError, match="settings.image_frist: unknown key; did you mean 'image_first'"):
        Import("pairs", file, images, settings={"image_frist": 1.0})
    with pytest.raises(ConfigError, match="image_first is a share from 0 to 1"):
        Import("pairs", file, images, settings={"image_first": 2.0})


# --- pairs ----------------------------------------------------------------------------------------------


def pair(name: str, caption) -> dict:
    return {"image": name, "caption": caption}


def test_pairs(tmp_path, images):
    file = write_lines(
        tmp_path / "0.txt", pair("a.png", "A Red DOG"), "\n", pair("sub/c.jpg", ["Two", "parts"])
    )
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


def test_pairs_of_a_table_and_of_python_literals(tmp_path, images):
    pytest.importorskip("pyarrow")
    rows = [{"image": {"bytes": picture(30 * k), "path": "../no"}, "caption": f"x{k}"} for k in range(3)]
    make = Import("pairs", write_parquet(tmp_path / "a.parquet", rows), settings=dict(image_first=1.0))
    assert [laid(record) for record in all_of(make)] == [[30 * k, f"x{k}"] for k in range(3)]
    file = write_lines(tmp_path / "0.txt", "{'image': 'a.png', 'caption': \"it's\"}\n")
    assert laid(Import("pairs", file, images, settings=dict(image_first=1.0))(0).conversation) == [0, "it's"]


def test_half_of_the_pairs_begin_with_their_picture_and_a_seed_decides(tmp_path, images):
    file = write_lines(tmp_path / "0.txt", *(pair("a.png", f"caption {k}") for k in range(200)))
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
    "entry, reason, cause",
    [
        ('{"image": "a.png", "caption": "x"\n', "not JSON", "not JSON: "),
        ('["a.png", "x"]\n', "not an object", "expected a JSON object, got list"),
        ({"image": "a.png"}, "field missing", "'caption' is missing"),
        (pair("a.png", [1]), "field of another type", "'caption' must be a list of strings"),
        (pair(3, "x"), "field of another type", "'image' must be str or bytes or dict, got '3'"),
        (pair("gone.png", "x"), "missing picture", "gone.png: no such file"),
        (pair("cut.jpg", "x"), "damaged picture", "cut.jpg: 2000 bytes that cannot be decoded"),
        (pair("text.png", "x"), "no picture", "text.png: 9 bytes that are no picture"),
    ],
)
def test_broken_pairs_are_rejected(tmp_path, images, entry, reason, cause):
    file = write_lines(tmp_path / "0.txt", pair("a.png", "x"), entry)
    made = Import("pairs", file, images)(1)
    assert made.conversation is None and why(made)["rejected records"] == {reason: 1}
    (line,) = [line for line in made.tally.quarantine if line["what"] == "record"]
    assert cause in line["cause"] and line["where"] == f"{file}, line 2" and line["record"] == 1


def test_empty_captions_are_left_out(tmp_path, images):
    file = write_lines(tmp_path / "0.txt", pair("a.png", " "))
    assert why(Import("pairs", file, images)(0)) == {"left out": {"captions that are empty": 1}}


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
    file = write_lines(tmp_path / "docs_shard_0_v2.jsonl", entry)
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
    file = write_lines(tmp_path / "docs_shard_0_v2.jsonl", *[entry] * 60)
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
    file = write_lines(
        tmp_path / "docs_shard_0_v2.jsonl", *[one] * 100, *[two] * 20, page(["S."], ("a", 0, 0.1))
    )
    make = Import("mmc4", file, images)
    made = all_of(make)
    assert 30 < sum(record is not None for record in made[:100]) < 70
    assert all(made[100:120]) and made[120] is None
    assert why(make(120)) == {"left out": {"pages without a picture": 1}}
    reasons = {reason for k in range(100) for reason in why(make(k)).get("left out", ())}
    assert reasons == {"pages with one picture"}
    assert all(all_of(Import("mmc4", file, images, settings=dict(keep_single=1.0)))[:100])


def test_pages_go_on_without_pictures_that_are_missing(tmp_path, images):
    entry = page(["S.", "T."], ("a", 0, 0.5), ("gone", 0, 0.5), ("b", 1, 0.5))
    file = write_lines(tmp_path / "docs_shard_0_v2.jsonl", entry)
    made = Import("mmc4", file, images)(0)
    assert why(made) == {"rejected pictures": {"missing picture": 1}} and len(made.conversation.images) == 2
    assert made.tally.counts["pictures"].total() == 3
    assert causes(made) == [f"gone.png: no such file in {images}"]
    # What does not match well enough is never looked for.
    made = Import("mmc4", write_lines(file, page(["S."], ("a", 0, 0.5), ("gone", 0, 0.1))), images)(0)
    assert "rejected pictures" not in why(made)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(text_list="S."), "'text_list' must be list, got 'S.'"),
        (dict(text_list=[1, 2]), "'text_list' must be a list of strings"),
        (dict(text_list=["S."]), "'matched_text_index' is 1, the page has 1 sentences"),
        (dict(image_info=[{"image_name": "a.png"}]), "'matched_text_index' is missing"),
        (dict(similarity_matrix=None), "'similarity_matrix' must be list, got 'None'"),
    ],
)
def test_broken_pages_are_named(tmp_path, images, change, said):
    entry = page(["S.", "T."], ("a", 1, 0.5), ("b", 1, 0.5)) | change
    file = write_lines(tmp_path / "docs_shard_0_v2.jsonl", entry)
    made = Import("mmc4", file, images)(0)
    assert made.conversation is None and said in causes(made)[-1]
