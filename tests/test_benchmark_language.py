"""Visual question answering and Visual Dialog: official formulas by hand; what is dubious in them, frozen."""

import json
import math

import numpy as np
import pytest

from umm_jax.conversation import Image, ImageData, Text
from umm_jax.errors import DataError
from umm_jax.evaluate import scoring, tasks
from umm_jax.evaluate.measures import ranking, vqa
from umm_jax.evaluate.source import Source

# --- the normalisers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, plain",
    [
        ("a dog", "dog"),
        ("The Two dogs", "2 dogs"),
        ("None", "0"),
        ("dont", "don't"),
        ("night-time", "night time"),  # no space beside the mark: it becomes one
        ("night -time", "night time"),  # beside a space: deleted
        ("pizza/pasta, please", "pizza pasta please"),
        ("1,000 dogs/cats", "1000 dogscats"),  # a comma between digits: every mark is deleted
        ("3.5", "3.5"),
        ("3. 5", "3 5"),
        ("U.S.A", "usa"),
        ("5.", "5"),  # the pattern that should keep a point after a digit does not
        ("its.", "its"),
        ("." * 33, "."),  # at most 32 points
        ("let's go?", "let's go"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_texts_are_normalised_as_by_the_vqa_tools(text, plain):
    assert vqa.in_plain_words(vqa.without_punctuation(text)) == plain


def test_textvqa_splits_possessives_first():
    assert vqa.evalai("The cat's, hat?") == "cat 's hat"
    assert vqa.evalai("1,000") == "1000"


def test_soft_accuracy_leaves_each_answer_out_once():
    # Of the two, each is left out once and leaves one match: 2 x 1/3; the other eight leave two: 8 x 2/3.
    assert vqa.vqa_accuracy("cat", ["cat"] * 2 + ["dog"] * 8) == pytest.approx((2 / 3 + 16 / 3) / 10)
    assert vqa.vqa_accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa.vqa_accuracy("cat", ["cat"] * 4 + ["dog"] * 6) == 1
    assert vqa.vqa_accuracy("cow", ["cat"] * 4 + ["dog"] * 6) == 0


def test_equal_answers_are_left_out_one_at_a_time():
    """With bare {"answer"} dicts the official loop leaves out all that are equal: 6/10. With ids, one: 1."""
    bare = [{"answer": "red"}] * 4 + [{"answer": "blue"}] * 6
    others = [[b for b in bare if b != a] for a in bare]
    assert np.mean([min(1, sum(o["answer"] == "red" for o in rest) / 3) for rest in others]) == 0.6
    assert vqa.vqa_accuracy("red", ["red"] * 4 + ["blue"] * 6) == 1


def test_where_all_answers_agree_nothing_is_normalised():
    assert vqa.vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa.vqa_accuracy(" yes\n", ["yes"] * 10) == 1
    assert vqa.vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
    # TextVQA's challenge always normalises, VizWiz the prediction alone.
    assert vqa.textvqa_accuracy("Yes.", ["yes"] * 10) == 1
    assert vqa.vizwiz_accuracy("Yes.", ["yes"] * 10) == 1
    assert vqa.vizwiz_accuracy("Yes.", ["Yes."] * 10) == 0
    # And it puts typographic apostrophes back.
    assert vqa.vizwiz_accuracy("dont know", ["don’t know"] * 10) == 1
    assert vqa.vizwiz_accuracy("cant", ["can't"] * 10) == 1


@pytest.mark.parametrize(
    "text, left",
    [
        ("pizza with cheese", "with cheese"),
        ("panda bear", "bear"),
        ("it is banana split", "split"),
        ("The answer is: a dog.", "dog"),
        ("two of them", "two"),
        ("red or blue", "red"),
    ],
)
def test_the_released_extraction_cuts_words_in_two_and_is_opt_in(tmp_path, text, left):
    assert vqa.released_extraction(text) == left
    write_vqa(tmp_path, [left] * 4 + ["x"] * 6)
    (tmp_path / "r").write_text(json.dumps({"id": 7, "text": text}))
    task = tasks.get("vqav2")
    assert scoring.score(task, tmp_path, tmp_path / "r")["metrics"]["accuracy"]["value"] == 0
    found = scoring.score(task, tmp_path, tmp_path / "r", settings={"extraction": "released"})
    assert found["metrics"]["accuracy"]["value"] == 100


def write_vqa(
    root, answers, names=("v2_OpenEnded_mscoco_val2014_questions", "v2_mscoco_val2014_annotations")
):
    entry = {"question_id": 7, "image_id": 3}
    made = [{"answer": a, "answer_id": i + 1} for i, a in enumerate(answers)]
    questions = {"questions": [{**entry, "question": "what?"}]}
    (root / f"{names[0]}.json").write_text(json.dumps(questions))
    (root / f"{names[1]}.json").write_text(json.dumps({"annotations": [{**entry, "answers": made}]}))


def test_all_layouts_of_the_family_are_read(tmp_path):
    answers = ["red"] * 3 + ["blue"] * 7
    write_vqa(tmp_path, answers, ("OpenEnded_mscoco_val2014_questions", "mscoco_val2014_annotations"))
    (tmp_path / "r").write_text(json.dumps({"id": "7", "text": "the red"}))
    assert scoring.score(tasks.get("okvqa"), tmp_path, tmp_path / "r")["metrics"]["accuracy"]["value"] == 90
    text = {"question_id": 7, "image_id": "ab", "question": "what?", "answers": answers}
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [text]}))
    assert scoring.score(tasks.get("textvqa"), tmp_path, tmp_path / "r")["metrics"]["accuracy"]["value"] == 90
    wiz = {"image": "a.jpg", "question": "what?", "answers": [{"answer": a} for a in answers]}
    (tmp_path / "val.json").write_text(json.dumps([wiz]))
    (tmp_path / "r").write_text(json.dumps({"id": "a.jpg", "text": "the red"}))
    assert scoring.score(tasks.get("vizwiz"), tmp_path, tmp_path / "r")["metrics"]["accuracy"]["value"] == 90
    asked = list(tasks.get("vizwiz").docs(Source(tmp_path), tasks.get("vizwiz").Settings()))
    assert "respond with 'Unanswerable'" in asked[0].turns[0].text


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda root: (root / "v2_mscoco_val2014_annotations.json").unlink(), "visualqa.org"),
        (lambda root: (root / "v2_mscoco_val2014_annotations.json").write_text("{"), "damaged"),
        (
            lambda root: (root / "v2_mscoco_val2014_annotations.json").write_text('{"annotations": [{}]}'),
            "has no",
        ),
        (
            lambda root: (root / "v2_OpenEnded_mscoco_val2014_questions.json").write_text("[]"),
            "has no 'questions'",
        ),
    ],
)
def test_broken_annotations_are_said(tmp_path, break_it, message):
    write_vqa(tmp_path, ["a"] * 10)
    (tmp_path / "r").write_text('{"id": 7, "text": "a"}')
    break_it(tmp_path)
    with pytest.raises(DataError, match=message):
        scoring.score(tasks.get("vqav2"), tmp_path, tmp_path / "r")


def test_an_id_that_is_there_twice_is_said(tmp_path):
    write_vqa(tmp_path, ["a"] * 10)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    path.write_text(json.dumps({"annotations": json.loads(path.read_text())["annotations"] * 2}))
    (tmp_path / "r").write_text('{"id": 7, "text": "a"}')
    with pytest.raises(DataError, match="'7' twice"):
        scoring.score(tasks.get("vqav2"), tmp_path, tmp_path / "r")


# --- Visual Dialog ----------------------------------------------------------------------------------


def test_ndcg_by_hand():
    # Relevant: 0 (1.0), 2 (0.5), 3 (0.5); k = 3. Ranked 2, 0, 1, 3: DCG = 0.5 / 1 + 1 / log2(3) + 0 / 2.
    relevance, scores = [1.0, 0.0, 0.5, 0.5], [3.0, 2.0, 4.0, 1.0]
    best = 1 + 0.5 / math.log2(3) + 0.5 / 2
    assert ranking.ndcg(scores, relevance) == pytest.approx((0.5 + 1 / math.log2(3)) / best)
    assert ranking.ndcg([9, 1, 8, 7], relevance) == pytest.approx(1)
    assert ranking.ndcg(scores, [0.0] * 4) is None
    assert ranking.order([1.0, 2.0, 2.0]) == [1, 2, 0] and ranking.rank([1.0, 2.0, 2.0], 2) == 2


@pytest.fixture
def dialogs(tmp_path):
    """One dialogue of four rounds, the third of which is graded; answers are "a0" to "a5"."""
    rounds = [{"question": i, "answer": i, "answer_options": [i, 4, 5], "gt_index": 0} for i in range(4)]
    data = {
        "dialogs": [{"image_id": 42, "caption": "a cat", "dialog": rounds}],
        "questions": [f"q{i}" for i in range(4)],
        "answers": [f"a{i}" for i in range(6)],
    }
    (tmp_path / "visdial_1.0_val.json").write_text(json.dumps({"data": data}))
    graded = [{"image_id": 42, "round_id": 3, "gt_relevance": [0.5, 1.0, 0.0]}]
    (tmp_path / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(graded))
    (tmp_path / "VisualDialog_val2018").mkdir()
    picture = ImageData.from_array(np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "VisualDialog_val2018" / f"VisualDialog_val2018_{42:012d}.jpg").write_bytes(picture.data)
    return tmp_path


def asked(root, **settings):
    task = tasks.get("visdial")
    return scoring.docs_of(task, Source(root), scoring.settings_of(task, settings))


def test_the_whole_history_is_shown_and_the_released_off_by_one_is_compat(dialogs):
    (doc,) = asked(dialogs)
    assert doc.id == "42-3" and doc.options == ("a2", "a4", "a5")
    assert [t.text for t in doc.turns] == ["caption: a cat. q0?", "a0", "q1?", "a1", "q2?"]
    assert isinstance(doc.turns[0].parts[0], Image) and doc.conversation().images
    (text,) = asked(dialogs, form="text")
    rounds = "question: q0? answer: a0. question: q1? answer: a1. "
    assert text.turns[0].parts[1] == Text(f"caption: a cat. {rounds}question: q2? answer:")
    (released,) = asked(dialogs, compat="mm_interleaved")
    assert released.turns[0].text == "caption: a cat. question: q0? answer: a0. question: q2? answer:"
    assert [d.id for d in asked(dialogs, rounds="all")] == ["42-1", "42-2", "42-3", "42-4"]


def test_ranks_and_gains_are_scored(dialogs):
    (dialogs / "r").write_text(json.dumps({"id": "42-3", "scores": [-2.0, -3.0, -1.0]}))
    found = scoring.score(tasks.get("visdial"), dialogs, dialogs / "r")["metrics"]
    assert found["mrr"]["value"] == 50 and found["mean_rank"]["value"] == 2
    assert (found["r@1"]["value"], found["r@5"]["value"]) == (0, 100)
    # Ranked a5, a2, a4; two are relevant: 0 + 0.5 / log2(3) of 1 + 0.5 / log2(3).
    gained = 0.5 / math.log2(3)
    assert found["ndcg"]["value"] == pytest.approx(100 * gained / (1 + gained))


def test_a_reply_without_scores_is_invalid_and_worst(dialogs):
    (dialogs / "r").write_text(json.dumps({"id": "42-3", "text": "a2"}))
    found = scoring.score(tasks.get("visdial"), dialogs, dialogs / "r")
    assert found["metrics"]["ndcg"]["value"] == 0 and found["n_invalid"] == 1
    assert found["metrics"]["mean_rank"]["value"] == 3


def test_grades_of_another_release_are_said(dialogs):
    graded = [{"image_id": 42, "round_id": 3, "gt_relevance": [1.0]}]
    (dialogs / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(graded))
    with pytest.raises(DataError, match="grades 1 answers of 3"):
        asked(dialogs)


def test_a_missing_picture_is_a_failure_of_its_own(dialogs):
    (dialogs / "VisualDialog_val2018" / f"VisualDialog_val2018_{42:012d}.jpg").unlink()
    (doc,) = asked(dialogs)
    with pytest.raises(DataError, match="VisualDialog_val2018_000000000042.jpg: cannot be read"):
        doc.conversation()


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="leads out of the folder"):
        Source(tmp_path).picture("../../etc/passwd")
