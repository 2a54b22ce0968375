"""Boxes, masks, label maps: measures by hand and by packages; RefCOCO, ReasonSeg, ADE20K end to end."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import scoring, tasks
from umm_jax.evaluate.measures import boxes, polygons, regions, rle
from umm_jax.evaluate.source import Source
from umm_jax.evaluate.tasks import ade20k, reasonseg, refcoco


def grid(*rows):
    """bool[h, w] of rows like "..#"."""
    return np.array([[c == "#" for c in row] for row in rows])


def runs_of(mask):
    """A mask in COCO's plain form: columns first, zeros first."""
    flat = np.asarray(mask).T.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(int), prepend=0))
    counts = np.diff(edges, prepend=0, append=flat.size)
    return {"size": list(mask.shape), "counts": counts.tolist()}


def write_lines(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def figures(name, root, *replies, **settings):
    path = write_lines(root / "responses" / "r.jsonl", *replies)
    return scoring.score(tasks.get(name), root, path, settings=settings)


def values(result):
    return {name: one["value"] for name, one in result["metrics"].items()}


# --- masks ------------------------------------------------------------------------------------------------


def test_pixels_that_nobody_judges_count_nowhere():
    right = np.array([[1, 1, 255], [0, 0, 255]], np.uint8)
    # Found: one of two right ones, one wrong, one unjudged. Both 1; either 2 right + 1 wrong = 3.
    assert regions.mask_counts(grid("#.#", "#.."), right) == (1, 3)
    assert regions.mask_counts(None, right) == (0, 2)
    assert regions.mask_counts(grid("##.", "..."), right == 1) == (2, 2)


def test_mean_iou_and_overall_iou_differ_as_they_should():
    counts = [(1, 2), (90, 100), (0, 0)]
    assert [regions.iou(c) for c in counts] == [0.5, 0.9, 0.0]
    # LISA's: 1 / 2.00001, 90 / 100.00001, and 1 where there was nothing to find.
    assert [regions.giou(c) for c in counts] == pytest.approx([0.4999975, 0.89999991, 1.0], abs=1e-9)
    assert regions.ciou(counts) == 91 / 102
    assert regions.ciou([(0, 0)]) is None and regions.ciou([]) is None
    # Image a has two masks, b one: (0.2 + 0.4) / 2 and 0.9.
    assert regions.means_of_images([("a", 0.2), ("b", 0.9), ("a", 0.4)]) == pytest.approx([0.3, 0.9])


def test_a_threshold_is_reached_by_what_equals_it():
    assert regions.reaches(1 / 2, (0.5, 0.6)) == {0.5: 1.0, 0.6: 0.0}
    assert regions.reaches(0.4999, (0.5,)) == {0.5: 0.0}


# --- boxes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),  # 1 of 4 + 4 - 1
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),  # they touch: edges, not pixels
        ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),
        ((-10, 0, 10, 10), (0, 0, 10, 10), 0.5),  # not cut to a picture
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),  # not exchanged
        ((2, 0, 0, 2), (0, 0, 2, 2), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ],
)
def test_overlap_of_boxes(a, b, expected):
    assert regions.box_iou(a, b) == regions.box_iou(b, a) == expected


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        ("mm_interleaved", "<box>(010,020)(300,999)</box>", [(10, 20, 300, 999)]),
        ("mm_interleaved", "(1,2)(3,4) or (5,6)(7,8)", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("mm_interleaved", "(1,2),(3,4)", []),
        ("mm_interleaved", "(1,2)(3,4,5)", [None]),
        ("mm_interleaved", "(left)(dog) (1,2)(3,4)", [None, (1, 2, 3, 4)]),
        ("mm_interleaved", "(1,2)(3,nan)", [None]),
        ("qwen_vl", "(1,2),(3,4)", [(1, 2, 3, 4)]),
        ("qwen_vl", "(1,2)(3,4)", []),
        ("list", "It is [[1, 2.5, 3, .5]].", [(1, 2.5, 3, 0.5)]),
        ("list", "[1, 2, 3] [-1,2,3,4]", [(-1, 2, 3, 4)]),
        ("list", "1, 2, 3, 4", []),
        ("list", f"[1, 2, 3, {'9' * 400}]", [None]),
        ("list", "", []),
    ],
)
def test_boxes_in_text(form, text, expected):
    assert boxes.read(text, form) == expected


# --- label maps -------------------------------------------------------------------------------------------


def test_iou_of_classes_by_hand():
    right = np.array([[0, 1, 1], [2, 2, 3]])
    found = np.array([[1, 1, 2], [2, 7, 0]])
    # Judged are five pixels, without the first. Class 1: both 1, either 2. Class 2: both 1, either 1 + 1 + 1:
    # found at two of which one is right, wanted at two. Class 3: 0 of 1. What is 7 or 0 is found as no class.
    assert regions.class_counts(found, right, 3) == {1: (1, 2), 2: (1, 3), 3: (0, 1)}
    whole = regions.class_iou([{1: (1, 2)}, {1: (1, 4), 3: (2, 2)}], 4)
    # (2 / 6 + 0 + 1 + 0) / 4, over the two that are there / 2.
    assert whole.mean == pytest.approx(1 / 3) and whole.mean_present == pytest.approx(2 / 3)
    assert whole.present == 2
    assert regions.class_iou([], 4) == regions.ClassIou(0.0, None, 0)


# --- polygons ---------------------------------------------------------------------------------------------


def test_outlines_are_inside():
    assert (
        polygons.fill([[1, 1], [3, 1], [3, 2], [1, 2]], (4, 5)) == grid(".....", ".###.", ".###.", ".....")
    ).all()
    # Corners are cut to whole pixels, and those outside the picture leave what is in it.
    assert (
        polygons.fill([[1.9, 1.9], [9, 1], [9, 2.5], [1, 2]], (4, 5))
        == grid("." * 5, ".####", ".####", "." * 5)
    ).all()
    assert (polygons.fill([[2, 1]], (3, 4)) == grid("....", "..#.", "....")).all()
    assert (polygons.fill([[0, 0], [3, 3]], (4, 4)) == np.eye(4, dtype=bool)).all()
    assert not polygons.fill([[9, 9], [12, 9], [12, 12]], (4, 4)).any()


def test_where_a_polygon_covers_itself_is_a_hole():
    # A square within a square, in one line from the corner of the one to that of the other.
    square = [[0, 0], [8, 0], [8, 8], [0, 8], [0, 0], [2, 2], [6, 2], [6, 6], [2, 6], [2, 2]]
    mask = polygons.fill(square, (9, 9))
    assert not mask[3:6, 3:6].any()
    assert mask.sum() == 81 - 9


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (
            [[1, 0], [13, 3], [4, 9], [11, 0], [2, 7]],
            [
                ".###.......#...",
                ".#######..#....",
                ".###########...",
                ".#######.#####.",
                "..#####.#####..",
                "..####.####....",
                "..##..####.....",
                "..#...##.......",
                ".....##........",
                "....#..........",
            ],
        ),
        (
            [[-4, 2], [9, -3], [16, 8], [5, 5], [6, 13]],
            [
                "..#########..",
                "############.",
                "############.",
                "#############",
                "#############",
                "#############",
                "######.######",
                ".######....##",
                "..#####......",
            ],
        ),
    ],
)
def test_polygons_as_opencv_drew_them(points, expected):
    """Drawn with cv2.polylines and cv2.fillPoly of 4.14: across itself, and out of the picture."""
    right = grid(*expected)
    assert (polygons.fill(points, right.shape) == right).all()


def test_polygons_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for _ in range(300):
        h, w = rng.integers(5, 60, 2)
        out = rng.integers(0, 20)
        points = np.stack([rng.uniform(-out, w + out, 6), rng.uniform(-out, h + out, 6)], 1).tolist()
        theirs = np.zeros((h, w), np.uint8)
        cv2.fillPoly(theirs, np.array([points], np.int32), 1)
        assert (polygons.fill(points, (h, w)) == theirs.astype(bool)).all()


# --- run lengths ------------------------------------------------------------------------------------------


def _some_masks():
    rng = np.random.default_rng(3)
    yield from (
        np.zeros((3, 4), bool),
        np.ones((4, 3), bool),
        np.ones((1, 1), bool),
        np.zeros((700, 900), bool),
    )
    large = np.zeros((700, 900), bool)
    large[300:420, 500:890] = True
    yield large
    for _ in range(200):
        h, w = rng.integers(1, 60, 2)
        # Noise has short runs, its running mean longer ones.
        noise = rng.random((h, w))
        yield noise < rng.random()
        yield np.cumsum(noise - 0.5, axis=0) > 0


def test_run_lengths_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    for mask in _some_masks():
        packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert (rle.decode(packed, "x") == mask).all()
        text = {"size": packed["size"], "counts": packed["counts"].decode()}
        assert (rle.decode(json.loads(json.dumps(text)), "x") == mask).all()
        plain = runs_of(mask)
        assert (rle.decode(plain, "x") == mask).all()
        assert coco.frPyObjects(plain, *mask.shape)["counts"] == packed["counts"]


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [2, 2], "counts": [1, 2]},
        {"size": [2, 2], "counts": [5, -1]},
        {"size": [2, 2], "counts": "o"},
        {"size": [2, 2], "counts": "\x7f"},
        {"size": [2], "counts": [4]},
        {"counts": [4]},
        [4],
    ],
)
def test_damaged_run_lengths_are_refused(mask):
    with pytest.raises(DataError, match="a mask must be"):
        rle.decode(mask, "x")


# --- RefCOCO, boxes ---------------------------------------------------------------------------------------

# A picture of 200 x 100; the right box is its left half, [0, 0, 100, 100].
ROWS = [
    {"image": "train2014/a.jpg", "width": 200, "height": 100, "bbox": [0, 0, 100, 100], "expression": "left"},
    {"image": "train2014/b.jpg", "width": 200, "height": 100, "bbox": [0, 0, 100, 100], "sent": "the dog"},
]


@pytest.fixture
def table(tmp_path):
    write_lines(tmp_path / "refcoco_val.jsonl", *ROWS)
    return tmp_path


def docs(name, root, **settings):
    task = tasks.get(name)
    return scoring.docs_of(task, Source(root, name), scoring.settings_of(task, settings))


def test_the_first_box_is_scored_and_the_best_one_apart(table):
    right, half = [0, 0, 0.5, 1], [0, 0, 0.25, 1]
    result = figures(
        "refcoco-rec",
        table,
        {"id": "0", "boxes": [half, right]},
        {"id": "1", "boxes": [[0.5, 0, 1, 1], right]},
    )
    found = values(result)
    assert result["headline"] == "acc@0.5" and result["parse_rate"] == 1
    # The first overlaps by a half, which is enough; the second not at all.
    assert found["acc@0.5"] == 50 and found["acc@0.7"] == 0 and found["mean_iou"] == 25
    assert found["oracle_best_box_acc@0.5"] == 100
    assert result["docs"] == {"0": 1.0, "1": 0.0}
    words = [doc.turns[0].text for doc in docs("refcoco-rec", table)]
    assert words == ["where is left", "where is the dog"]
    assert docs("refcoco-rec", table)[0].images["image"] == table / "train2014/a.jpg"


def test_replies_without_a_box_are_wrong_and_counted(table):
    result = figures("refcoco-rec", table, {"id": "0", "text": ""}, {"id": "1", "text": "over there"})
    head = result["metrics"]["acc@0.5"]
    assert (head["value"], head["n"], head["n_invalid"]) == (0, 2, 2) and result["parse_rate"] == 0


def test_boxes_that_are_none_are_told_apart(table):
    swapped, flat, outside = [0.5, 1, 0, 0], [0, 0, 0.5, 0], [0, 0, 0.5, 2]
    found = values(
        figures("refcoco-rec", table, {"id": "0", "boxes": [swapped]}, {"id": "1", "boxes": [outside]})
    )
    # Swapped: wrong. Twice as high as the picture: half of it is too much, so its overlap is a half.
    assert found["degenerate_box"] == 50 and found["out_of_range_box"] == 50
    assert found["acc@0.5"] == 50 and found["mean_iou"] == 25
    found = values(figures("refcoco-rec", table, {"id": "0", "boxes": [flat]}, {"id": "1", "boxes": [flat]}))
    assert found["degenerate_box"] == 100 and found["acc@0.5"] == 0


@pytest.mark.parametrize(
    ("settings", "text", "overlap"),
    [
        ({"boxes": "mm_interleaved"}, "(000,000)(500,999)", 99.9),  # 500 / 999 * 200 = 100.1, so 100 / 100.1
        ({"boxes": "qwen_vl"}, "(0,0),(250,999)", 50.05),
        ({"boxes": "list"}, "[0, 0, 50, 100]", 50),
        ({"boxes": "list", "unit": "fractions"}, "[0, 0, 0.5, 1]", 100),
        ({"boxes": "list", "unit": "thousandths"}, "[0, 0, 500, 1000]", 100),
        ({"boxes": "list", "unit": "thousandths"}, "[0, 0, 0.5, 1]", 0.0001),
        # The right box cut down to 999ths ends at int(499.5) = 499 of 999.
        ({"boxes": "mm_interleaved", "target": "mm_interleaved"}, "(0,0)(499,999)", 100),
    ],
)
def test_boxes_in_the_words_of_models(table, settings, text, overlap):
    replies = {"id": "0", "text": text}, {"id": "1", "text": "nothing"}
    result = figures("refcoco-rec", table, *replies, **settings)
    assert result["metrics"]["mean_iou"]["value"] * 2 == pytest.approx(overlap, rel=1e-3)
    assert result["metrics"]["acc@0.5"]["n_invalid"] == 1


def test_what_stands_first_is_the_answer_even_if_it_is_no_box(table):
    replies = {"id": "0", "text": "(a)(b) (0,0)(499,999)"}, {"id": "1", "text": "(0,0)(499,999)"}
    result = figures("refcoco-rec", table, *replies, boxes="mm_interleaved")
    assert values(result)["acc@0.5"] == 50 and values(result)["oracle_best_box_acc@0.5"] == 100
    assert result["metrics"]["acc@0.5"]["n_invalid"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [10, 10, 5, 20]}, "must be two corners"),
        ({"bbox": [0, 0, 1]}, "must be two corners"),
        ({"bbox": [0, 0, 1, float("nan")]}, "must be two corners"),
        ({"bbox": None}, "another type"),
        ({"width": 0}, "0 x 100 pixels"),
        ({"image": "../../../a.jpg"}, "leads out"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    write_lines(tmp_path / "refcoco_val.jsonl", ROWS[0], ROWS[1] | change)
    with pytest.raises(DataError, match=message):
        docs("refcoco-rec", tmp_path)


def test_missing_fields_and_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"refcoco-rec needs .*refcoco_val.jsonl"):
        docs("refcoco-rec", tmp_path)
    write_lines(tmp_path / "refcoco_val.jsonl", {k: v for k, v in ROWS[0].items() if k != "expression"})
    with pytest.raises(DataError, match=r"refcoco_val.jsonl, entry 0: an entry has no 'sent'"):
        docs("refcoco-rec", tmp_path)
    with pytest.raises(DataError, match=r"refcoco\+_testA.jsonl"):
        docs("refcoco+-rec", tmp_path, split="testA")


# --- RefCOCO, the release ---------------------------------------------------------------------------------

SQUARE = [2, 2, 6, 2, 6, 6, 2, 6]  # covers pixels 2 to 5 both ways
RIGHT = np.zeros((8, 10), bool)
RIGHT[2:6, 2:6] = True


def release(root, name="refcoco", by="unc", segmentation=None, **changes):
    """A picture of 10 x 8 with one object that two expressions single out, and one of another split."""
    of = {"ann_id": 7, "image_id": 3}
    two = [{"sent": "a", "sent_id": 11}, {"sent": "b", "sent_id": 12}]
    refs = [
        {"ref_id": 1, "split": "val", "sentences": two} | of,
        {"ref_id": 2, "split": "testAB", "sentences": [{"sent": "c", "sent_id": 13}]} | of,
    ]
    refs[0] |= changes
    one = {"id": 7, "image_id": 3, "bbox": [2, 2, 4, 4], "segmentation": segmentation or [SQUARE]}
    image = {"id": 3, "width": 10, "height": 8, "file_name": "COCO_train2014_3.jpg"}
    write_json(root / name / f"refs({by}).json", refs)
    write_json(root / name / "instances.json", {"images": [image], "annotations": [one]})
    return root


def test_the_release_has_a_doc_for_every_expression(tmp_path):
    release(tmp_path)
    found = docs("refcoco-rec", tmp_path)
    assert [doc.id for doc in found] == ["11", "12"]
    # [x, y, width, height] to corners.
    assert found[0].target["box"] == (2, 2, 6, 6) and found[0].target["size"] == (8, 10)
    for split in ("testA", "testB", "test"):
        assert [doc.id for doc in docs("refcoco-rec", tmp_path, split=split)] == ["13"]
    with pytest.raises(DataError, match="nothing to ask"):
        docs("refcoco-rec", tmp_path, split="testC")
    result = figures(
        "refcoco-rec", tmp_path, *({"id": i, "boxes": [[0.2, 0.25, 0.6, 0.75]]} for i in ("11", "12"))
    )
    assert values(result)["acc@0.9"] == 100


def test_a_table_goes_before_the_release(tmp_path):
    write_lines(release(tmp_path) / "refcoco_val.jsonl", *ROWS)
    assert [doc.id for doc in docs("refcoco-rec", tmp_path)] == ["0", "1"]


def test_pickles_are_refused_with_what_to_take_instead(tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(b"cos\nsystem\n")
    for name in ("refcoco-rec", "refcoco-res"):
        with pytest.raises(DataError, match=r"pickles run code.*refcoco_<split>.jsonl.*refs\(unc\).json"):
            docs(name, tmp_path)


def test_refcocog_has_its_own_splits(tmp_path):
    release(tmp_path, "refcocog", "umd")
    assert len(docs("refcocog-res", tmp_path)) == 2
    with pytest.raises(DataError, match=r"refs\(google\)"):
        docs("refcocog-res", tmp_path, split_by="google")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ann_id": 8}, "no annotation 8"),
        ({"image_id": 8}, "no image 8"),
        ({"sentences": [{"sent": "a", "sent_id": 1}, {"sent": "b", "sent_id": 1}]}, "id '1' twice"),
        ({"sentences": [{"sent": "a"}]}, "no 'sent_id'"),
        ({"segmentation": [[1, 2, 3]]}, "a polygon must be"),
        ({"segmentation": [[1, 2, 3, 4, 5, None]]}, "a polygon must be"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, "in a picture of"),
        ({"segmentation": {"size": [8, 10], "counts": [81]}}, "a mask must be"),
    ],
)
def test_a_damaged_release_is_named(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        docs("refcoco-res", release(tmp_path, **change))


# --- RefCOCO, masks ---------------------------------------------------------------------------------------


def test_masks_are_scored_over_expressions(tmp_path):
    pytest.importorskip("pycocotools")
    half = RIGHT.copy()
    half[4:] = False  # 8 of 16 pixels
    wide = np.zeros((8, 10), bool)
    wide[2:6, 2:] = True  # 16 of 32
    release(tmp_path)
    result = figures(
        "refcoco-res",
        tmp_path,
        {"id": "11", "masks": [runs_of(RIGHT)]},
        {"id": "12", "masks": [runs_of(half), runs_of(RIGHT)]},
    )
    found = values(result)
    assert found["ciou"] == 100 * (16 + 8) / (16 + 16) and found["mean_iou"] == 75
    assert found["giou_mean"] == pytest.approx(75, abs=1e-3) == found["giou_mean_of_images"]
    assert found["precision@0.5"] == 100 and found["precision@0.6"] == 50
    found = values(
        figures("refcoco-res", tmp_path, {"id": "11", "masks": [runs_of(wide)]}, {"id": "12", "text": "none"})
    )
    assert found["ciou"] == pytest.approx(100 * 16 / (32 + 16))


def test_all_masks_together_by_setting(tmp_path):
    pytest.importorskip("pycocotools")
    upper, lower = RIGHT.copy(), RIGHT.copy()
    upper[4:], lower[:4] = False, False
    both = {"masks": [runs_of(upper), runs_of(lower)]}
    release(tmp_path)
    replies = {"id": "11"} | both, {"id": "12"} | both
    assert values(figures("refcoco-res", tmp_path, *replies))["ciou"] == 50
    assert values(figures("refcoco-res", tmp_path, *replies, masks="union"))["ciou"] == 100


def test_no_mask_or_one_of_another_size_is_invalid(tmp_path):
    pytest.importorskip("pycocotools")
    release(tmp_path)
    other = {"size": [10, 8], "counts": [0, 80]}
    result = figures("refcoco-res", tmp_path, {"id": "11", "masks": [other]}, {"id": "12", "text": "[SEG]"})
    head = result["metrics"]["ciou"]
    assert (head["value"], head["n"], head["n_invalid"]) == (0, 2, 2)
    assert values(result)["giou_mean"] == values(result)["precision@0.5"] == 0


def test_polygons_and_run_lengths_are_the_masks_of_the_refer_tools():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(1)
    for _ in range(50):
        h, w = (int(n) for n in rng.integers(8, 60, 2))
        shapes = [
            rng.uniform(0, min(h, w), 2 * rng.integers(3, 9)).tolist() for _ in range(rng.integers(1, 4))
        ]
        layers = coco.decode(coco.frPyObjects(shapes, h, w)).sum(axis=2)
        # LAVT takes where the sum is 1; LISA's histogram of two classes drops the 2 and more.
        assert (refcoco.right_mask(shapes, (h, w)) == (layers == 1)).all()
        assert (refcoco.right_mask(shapes, (h, w), "inside") == (layers > 0)).all()
    assert (refcoco.right_mask([SQUARE], (8, 10)) == RIGHT).all()
    assert (refcoco.right_mask([runs_of(RIGHT)], (8, 10)) == RIGHT).all()
    assert not refcoco.right_mask([], (8, 10)).any()


def test_run_lengths_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    reply = {"masks": [runs_of(RIGHT)]}
    release(tmp_path, segmentation=runs_of(RIGHT))
    assert values(figures("refcoco-res", tmp_path, {"id": "11"} | reply, {"id": "12"} | reply))["ciou"] == 100
    release(tmp_path)
    with pytest.raises(ConfigError, match=r"pip install pycocotools.*\[eval\]"):
        figures("refcoco-res", tmp_path, {"id": "11"} | reply, {"id": "12"} | reply)


def test_grounding_is_not_called_as_captioning_is():
    assert {n for n in tasks.every() if n.startswith("ref")} == {
        f"{name}-{kind}" for name in ("refcoco", "refcoco+", "refcocog") for kind in ("rec", "res")
    }


# --- ReasonSeg --------------------------------------------------------------------------------------------


def rectangle(label, x0, y0, x1, y1):
    return {"label": label, "points": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]}


def reason(root, name, shapes, text="why", is_sentence=True, size=(10, 8), encoding="utf-8", exif=None):
    (root / "val").mkdir(exist_ok=True)
    entry = {"text": [text, "said otherwise"], "is_sentence": is_sentence, "shapes": shapes}
    (root / "val" / f"{name}.json").write_bytes(json.dumps(entry, ensure_ascii=False).encode(encoding))
    PIL.Image.new("RGB", size).save(root / "val" / f"{name}.jpg", **({"exif": exif} if exif else {}))


def test_reasonseg_end_to_end(tmp_path):
    # Wanted: 6 x 4 pixels of which the small ignored part, drawn on top, takes 2 x 1; "flag" is left out.
    shapes = [
        rectangle("Ignored", 1, 1, 2, 1),
        rectangle("target", 1, 1, 6, 4),
        rectangle("flag", 0, 0, 9, 7),
    ]
    reason(tmp_path, "a", shapes)
    reason(
        tmp_path,
        "b",
        [rectangle("target", 0, 0, 1, 1)],
        text="the caf\xe9",
        is_sentence=False,
        encoding="cp1252",
    )
    found = np.zeros((8, 10), bool)
    found[1:5, 1:4] = True  # 12 pixels, of which 2 are not judged: 10 of 22
    result = figures(
        "reasonseg", tmp_path, {"id": "a", "masks": [runs_of(found)]}, {"id": "b", "text": "there"}
    )
    got = values(result)
    assert result["headline"] == "giou_mean" and result["docs"]["b"] == 0
    assert got["giou_mean/query=sentence"] == pytest.approx(100 * 10 / 22.00001)
    assert got["giou_mean"] == pytest.approx(50 * 10 / 22.00001)
    assert got["ciou"] == pytest.approx(100 * 10 / 26) and got["ciou/query=phrase"] == 0
    assert result["metrics"]["giou_mean"]["n_invalid"] == 1
    asked = [doc.turns[0].text for doc in docs("reasonseg", tmp_path, prompt="lisa")]
    assert asked == [
        "why Please output segmentation mask.",
        "What is the caf\xe9 in this image? Please output segmentation mask.",
    ]


def test_small_shapes_lie_on_top_whatever_their_order():
    small, large = ("target", [[2, 2], [3, 2]]), ("ignore", [[0, 0], [5, 0], [5, 5], [0, 5]])
    for shapes in ([small, large], [large, small]):
        mask = reasonseg.drawn(shapes, (6, 6))
        assert (mask[2, 2:4] == 1).all() and (mask == regions.IGNORED).sum() == 34


def test_nothing_to_find_and_nothing_found_is_right_but_no_answer_is_not(tmp_path):
    reason(tmp_path, "a", [])
    reason(tmp_path, "b", [])
    nothing = {"size": [8, 10], "counts": [80]}
    result = figures("reasonseg", tmp_path, {"id": "a", "masks": [nothing]}, {"id": "b", "text": ""})
    assert values(result)["giou_mean"] == 50
    assert values(result)["ciou"] is None and "no pixel" in result["metrics"]["ciou"]["reason"]


def test_a_picture_that_was_turned_is_as_large_as_it_is_shown(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # on its side
    reason(tmp_path, "a", [rectangle("target", 0, 0, 7, 9)], exif=exif)
    whole = {"size": [10, 8], "counts": [0, 80]}
    assert values(figures("reasonseg", tmp_path, {"id": "a", "masks": [whole]}))["ciou"] == 100


def test_damaged_annotations_of_reasonseg_are_named(tmp_path):
    with pytest.raises(DataError, match=r"reasonseg needs .*val"):
        docs("reasonseg", tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="holds no .json"):
        docs("reasonseg", tmp_path)
    reason(tmp_path, "a", [])
    (tmp_path / "val" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"needs .*a\.jpg"):
        docs("reasonseg", tmp_path)
    reason(tmp_path, "a", [{"label": "target", "points": [[1, 2, 3]]}])
    with pytest.raises(DataError, match=r"a\.json: 'points' must be pairs"):
        docs("reasonseg", tmp_path)
    reason(tmp_path, "a", [{"points": [[1, 2]]}])
    with pytest.raises(DataError, match=r"a\.json: an entry has no 'label'"):
        docs("reasonseg", tmp_path)
    (tmp_path / "val" / "a.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        docs("reasonseg", tmp_path)
    (tmp_path / "val" / "a.json").write_bytes(b'{"text": "\x81"}')
    with pytest.raises(DataError, match="neither UTF-8 nor cp1252"):
        docs("reasonseg", tmp_path)
    reason(tmp_path, "a", [])
    (tmp_path / "val" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="size of the picture"):
        figures("reasonseg", tmp_path, {"id": "a", "text": "x"})


# --- ADE20K -----------------------------------------------------------------------------------------------


def label_map(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.array(rows, np.uint8)).save(path)


@pytest.fixture
def ade(tmp_path):
    """Two label maps of 2 x 3, and a picture for replies to show."""
    base = tmp_path / "ADEChallengeData2016"
    label_map(base / "annotations/validation/ADE_val_1.png", [[0, 1, 1], [2, 2, 2]])
    label_map(base / "annotations/validation/ADE_val_2.png", [[150, 150, 0], [1, 1, 1]])
    (tmp_path / "responses").mkdir()
    PIL.Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "responses/x.png")
    return tmp_path


DRAWN = [{"id": f"ADE_val_{k}", "images": ["x.png"]} for k in (1, 2)]


def test_without_a_segmenter_figures_are_null_and_say_so(ade):
    result = figures("ade20k", ade, *DRAWN)
    assert values(result) == {"miou": None, "miou_present": None, "classes_present": None}
    assert "predictions" in result["metrics"]["miou"]["reason"] and result["cost_class"] == "B"


def test_label_maps_of_a_segmenter_are_scored(ade):
    # Segmenters count classes from 0. First: 1 is right twice, 2 twice, and once 150 instead of 2.
    label_map(ade / "seen/ADE_val_1.png", [[0, 0, 0], [1, 1, 149]])
    label_map(ade / "seen/ADE_val_2.png", [[149, 200, 7], [0, 0, 0]])
    result = figures("ade20k", ade, *DRAWN, predictions="seen")
    # Class 1: 2 + 3 of 5. Class 2: 2 of 3. Class 150: 1 of 2 + 1 (once found wrongly). Others are nowhere.
    mean = 1 + 2 / 3 + 1 / 3
    assert values(result)["miou"] == pytest.approx(100 * mean / 150)
    assert values(result)["miou_present"] == pytest.approx(100 * mean / 3)
    assert values(result)["classes_present"] == 3
    assert result["metrics"]["miou"]["n_invalid"] == 0


def test_a_reply_without_a_picture_finds_nothing(ade):
    label_map(ade / "seen/ADE_val_1.png", [[0, 0, 0], [1, 1, 1]])
    label_map(ade / "seen/ADE_val_2.png", [[149, 149, 7], [0, 0, 0]])
    result = figures(
        "ade20k", ade, DRAWN[0], {"id": "ADE_val_2", "text": "I cannot draw"}, predictions="seen"
    )
    # Class 1: 2 of 2 + 3; class 2 is right; class 150: 0 of 2.
    assert values(result)["miou_present"] == pytest.approx(100 * (2 / 5 + 1 + 0) / 3)
    assert result["metrics"]["miou"]["n_invalid"] == 1 and result["parse_rate"] == 0.5


def test_a_segmenter_of_ones_own(ade, monkeypatch):
    shown = []

    def look(picture):
        shown.append(picture)
        return np.zeros(picture.shape[:2], np.int64)

    monkeypatch.setitem(
        sys.modules, "my_segmenter", SimpleNamespace(look=look, cut=lambda p: np.zeros((1, 1), int))
    )
    result = figures("ade20k", ade, *DRAWN, segmenter="my_segmenter:look")
    assert [p.shape for p in shown] == [(2, 3, 3)] * 2 and shown[0].dtype == np.uint8
    # All is class 1: right at 2 + 3 of 10 judged pixels; 2 and 150 are not found.
    assert values(result)["miou_present"] == pytest.approx(100 * (5 / 10) / 3)
    with pytest.raises(DataError, match="bring pictures to the size"):
        figures("ade20k", ade, *DRAWN, segmenter="my_segmenter:cut")
    with pytest.raises(ConfigError, match="segmenter my_segmenter:none"):
        figures("ade20k", ade, *DRAWN, segmenter="my_segmenter:none")
    with pytest.raises(ConfigError, match="module:function"):
        figures("ade20k", ade, *DRAWN, segmenter="my_segmenter")
    with pytest.raises(ConfigError, match="one of the two"):
        figures("ade20k", ade, *DRAWN, segmenter="my_segmenter:look", predictions="seen")


def test_label_maps_that_do_not_fit_are_named(ade):
    with pytest.raises(DataError, match=r"seen/ADE_val_1.png: the label map cannot be read"):
        figures("ade20k", ade, *DRAWN, predictions="seen")
    label_map(ade / "seen/ADE_val_1.png", [[0, 0], [1, 1]])
    with pytest.raises(DataError, match=r"\[2, 2\] for doc ADE_val_1, whose label map is \[2, 3\]"):
        figures("ade20k", ade, *DRAWN, predictions="seen")
    label_map(ade / "seen/ADE_val_1.png", [[[0, 0, 0]] * 3] * 2)
    with pytest.raises(DataError, match="one channel"):
        figures("ade20k", ade, *DRAWN, predictions="seen")
    label_map(ade / "ADEChallengeData2016/annotations/validation/ADE_val_1.png", [[0, 0, 151]])
    with pytest.raises(DataError, match="holds 151"):
        figures("ade20k", ade, *DRAWN, predictions="seen")


def test_captions_come_from_their_own_file(ade):
    assert [doc.id for doc in docs("ade20k", ade)] == ["ADE_val_1", "ADE_val_2"]
    with pytest.raises(DataError, match=r"validation.json"):
        docs("ade20k", ade, prompt="mm_interleaved")
    captions = [{"image_id": "ADE_val_2", "caption": "a lake"}]
    write_json(ade / "ADEChallengeData2016/validation.json", captions)
    (doc,) = docs("ade20k", ade, prompt="mm_interleaved")
    assert doc.id == "ADE_val_2" and doc.turns[0].text == "a lake."
    path = ade / "ADEChallengeData2016/annotations/validation/ADE_val_2.png"
    made = doc.conversation().images["labels"].array()
    assert (made == ade20k.coloured(np.array(PIL.Image.open(path)))).all(), "made where it is not there"
    given = ade / "ADEChallengeData2016/annotations_with_color/validation/ADE_val_2.png"
    given.parent.mkdir(parents=True)
    PIL.Image.new("RGB", (3, 2), (1, 2, 3)).save(given)
    (doc,) = docs("ade20k", ade, prompt="mm_interleaved")
    assert doc.images["labels"] == given
    (ade / "ADEChallengeData2016/annotations/validation/ADE_val_2.png").unlink()
    with pytest.raises(DataError, match=r"ADE_val_2\.png"):
        docs("ade20k", ade, prompt="mm_interleaved")


def test_other_label_maps_are_another_data_set(ade):
    label_map(ade / "seen/ADE_val_1.png", [[0, 0, 0], [1, 1, 1]])
    label_map(ade / "seen/ADE_val_2.png", [[0, 0, 0], [1, 1, 1]])
    before = figures("ade20k", ade, *DRAWN, predictions="seen")["dataset_hash"]
    label_map(ade / "ADEChallengeData2016/annotations/validation/ADE_val_2.png", [[1, 1, 1], [1, 1, 1]])
    assert figures("ade20k", ade, *DRAWN, predictions="seen")["dataset_hash"] != before


def test_colours_tell_all_classes_apart():
    shown = ade20k.coloured(np.arange(151).reshape(1, 151))[0]
    assert len({tuple(c) for c in shown.tolist()}) == 151
    # Class 1 has digits 0 0 0; class 8 is 7 = 1 * 6 + 1; class 150 is 149 = 4 * 36 + 0 * 6 + 5.
    assert shown[[0, 1, 8, 150]].tolist() == [[0, 0, 0], [255, 255, 255], [255, 213, 213], [87, 255, 45]]
