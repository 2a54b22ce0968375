"""Measures of regions and routes: golden values, edges, and what they tell apart."""

import numpy as np
import pytest

from umm_jax.evaluate.measures.edits import edit_distance
from umm_jax.evaluate.measures.regions import box_giou, box_iou, ciou, giou, mask_counts, span_iou
from umm_jax.evaluate.measures.routing import route_scores
from umm_jax.markup import dialects
from umm_jax.markup.grammar import parse

UMM1 = dialects.get("umm1")


def test_golden_masks():
    counts = [(10, 20), (0, 30), (50, 60)]
    assert np.mean([giou(c) for c in counts]) == pytest.approx(0.4444443, abs=5e-8)
    assert ciou(counts) == pytest.approx(0.5454545, abs=5e-8)


def test_masks_that_are_empty_or_missing():
    right = np.zeros((4, 4), bool)
    assert giou(mask_counts(None, right)) == 1 and ciou([mask_counts(None, right)]) is None
    right[:2] = True
    assert mask_counts(None, right) == (0, 8), "no mask is an empty one, and stays in the sum"
    ignored = right.astype(np.uint8)
    ignored[0] = 255
    assert mask_counts(right, ignored) == (4, 4), "pixels that nobody judges"


def test_golden_boxes():
    a, b = (0.1, 0.1, 0.5, 0.5), (0.3, 0.3, 0.7, 0.7)
    assert box_giou(a, b) == pytest.approx(-0.0793650794, abs=1e-9)
    assert box_iou(a, b) == pytest.approx(0.04 / 0.28) and box_iou(a, a) == box_giou(a, a) == 1
    assert box_iou(a, (0.6, 0.6, 0.7, 0.7)) == 0 and box_giou((0, 0, 0, 0), (0, 0, 0, 0)) == -1


def test_spans():
    assert span_iou((0.2, 0.6), (0.4, 0.8)) == pytest.approx(1 / 3)
    assert span_iou((0.1, 0.2), (0.5, 0.6)) == 0 == span_iou((0.3, 0.3), (0.3, 0.3))


def scores(found: str, right: str):
    return route_scores(parse(found, UMM1), parse(right, UMM1).calls)


GEN, EDIT = "<image_gen>a cat</image_gen>", "<image_edit>darker</image_edit>"


@pytest.mark.parametrize(
    "found, right, exact, precision, recall, distance",
    [
        (GEN + EDIT, GEN + EDIT, 1, 1, 1, 0),
        (EDIT + GEN, GEN + EDIT, 0, 1, 1, 2),
        (GEN, GEN + EDIT, 0, 1, 0.5, 1),
        (GEN + EDIT + EDIT, GEN + EDIT, 0, 2 / 3, 1, 1),
        ("words", "", 1, 1, 1, 0),
        (GEN, "", 0, 0, 0, 1),
        ("words", GEN, 0, 0, 0, 1),
    ],
)
def test_tasks(found, right, exact, precision, recall, distance):
    s = scores(found, right)
    assert (s["exact"], s["distance"]) == (exact, distance)
    assert (s["precision"], s["recall"]) == pytest.approx((precision, recall))
    total = precision + recall
    assert s["f1"] == pytest.approx(2 * precision * recall / total if total else 0)


def test_arguments():
    right = "<image_edit>darker <box>[0.1, 0.1, 0.5, 0.5]</box></image_edit>" + GEN
    near = right.replace("0.5, 0.5", "0.52, 0.5").replace("darker", "Darker")
    assert scores(near, right)["box"] == 1 and scores(near, right)["prompt"] == 1
    far = right.replace("0.5, 0.5", "0.2, 0.2")
    assert scores(far, right)["box"] == 0 and scores(far, right)["prompt"] == 1
    assert scores(right.replace("a cat", "a dog"), right)["prompt"] == 0.5
    assert scores(EDIT, right)["prompt"] == 0, "arguments of other calls do not count"
    assert "box" not in scores(GEN, GEN) and "prompt" not in scores("x", "")


def test_what_cannot_be_read():
    assert scores(GEN, GEN)["unreadable"] == 0
    for text in ("<image_gen>a", "<nope>", "<box>[1]</box>"):
        assert scores(text, GEN)["unreadable"] == 1
    assert scores("<image_edit>x <box>[0.5, 0.5, 0.1, 0.1]</box></image_edit>", EDIT)["unreadable"] == 0


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 == edit_distance(
        "abc", ""
    )
