"""Benchmarks of options and of yes and no: POPE, MME, MMBench, MMMU, MMVP, SEED-Bench, GQA."""

import base64
import json

import numpy as np
import pytest

from umm_jax.conversation import Image, ImageData, Text
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import scoring
from umm_jax.evaluate.measures import choices, yesno
from umm_jax.evaluate.source import Embedded, Source
from umm_jax.evaluate.tasks import gqa, mmbench, mme, mmmu, mmvp, pope, seed_bench

ANIMALS = {"A": "cat", "B": "dog", "C": "red fox"}


def replies(folder, found, key="text"):
    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps({"id": id, key: said}) + "\n" for id, said in found.items()))
    return path


def score(task, folder, found, key="text", partial=False, **settings):
    path = replies(folder, found, key)
    return scoring.score(task, folder, path, settings=settings, partial=partial)


def value(figures, name):
    return figures["metrics"][name]["value"]


def docs(task, folder, **settings):
    return scoring.docs_of(task, Source(folder, task.name, task.files), scoring.settings_of(task, settings))


def png(shade=0):
    return ImageData.from_array(np.full((4, 6, 3), shade, np.uint8)).data


# --- reading replies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("**B**.", "B"),
        ("B. dog", "B"),
        ("(C) A dog", "C"),
        ("A dog", None),
        ("B dog", None),
        ("D", None),
        ("dog", None),
        ("The answer is B", None),
        ("", None),
    ],
)
def test_a_strict_letter_stands_alone_or_marked_at_the_beginning(reply, letter):
    assert choices.strict_letter(reply, ANIMALS) == letter


@pytest.mark.parametrize(
    ("reply", "now", "before"),
    [
        ("B", "B", "B"),
        ("(B)", "B", "B"),
        ("b", None, None),  # letters are capitals
        ("I see a dog", "B", "B"),  # by its text
        ("a cat and a dog", None, None),  # two texts
        ("A or B", None, None),  # two letters, no text
        ("I would say B as it barks and wags", None, "B"),  # more than four words after it
        ("The answer is B as it barks and wags", "B", "B"),
        ("A dog", "A", "A"),  # an article is taken for the letter
        ("Cannot determine the answer", "Z", "Z"),
        ("Z", "Z", "Z"),
        (
            "There is, I am quite certain of it, a dog",
            None,
            "B",
        ),  # over twice as long as the options, 13 signs
        ("E", None, None),
        ("", None, None),
    ],
)
def test_mmbench_reads_letters_then_texts(reply, now, before):
    assert choices.mmbench(reply, ANIMALS) == now
    assert choices.mmbench(reply, ANIMALS, recent=False) == before


@pytest.mark.parametrize(
    ("reply", "now", "first"),
    [
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("(A) or rather (C)", "C", "C"),  # the last in brackets
        ("A then B then A ", "A", "A"),
        ("C. A fox", "A", "A"),  # "A " comes before "C."
        ("Answer: B. Because", "B", None),
        ("a USA flag", "A", None),  # the last letter of a word in capitals
        ("I think that it is a dog", "B", "B"),  # by text, over five words
        ("it is a dog", None, None),  # five words are too few
        ("the cat was seen after the red fox", "C", "C"),  # the text that stands last
        ("", None, None),
    ],
)
def test_mmmu_reads_letters_and_never_draws_one(reply, now, first):
    assert choices.mmmu_choice(reply, ANIMALS) == now
    assert choices.mmmu_choice(reply, ANIMALS, first_release=True) == first


def test_mmmu_numbers_and_texts_of_open_answers():
    assert choices.mmmu_normalised(" 1,234.567 ") == [1234.57]
    assert choices.mmmu_normalised("Tampa ") == ["tampa"]
    assert choices.mmmu_normalised("X") == [" x", "x "]
    # The shortest tail follows "is "; its number is found, and as another what stands after the comma.
    assert choices.mmmu_open("So the sum is 8,200 watts.") == ["8,200 watts", 8200.0, 200.0]
    # Letters are small by the time sentences were to be parted: the end of the first is no end.
    assert choices.mmmu_open("It is 5. Or is it 6 or so") == ["it 6 or so", 6.0]
    # "=" counts in the last line alone.
    assert choices.mmmu_open("x = 3\ny = 4") == [4.0]
    assert choices.mmmu_open("Tampa") == ["tampa"]


@pytest.mark.parametrize(
    ("answers", "reply", "right", "same"),
    [
        (["8200"], "The answer is 8,200.00 dollars", True, False),
        (["8200"], "8,200", True, True),
        (["8200"], "8201", False, False),
        (["6.333"], "6.33", True, True),  # two places are kept
        (["Tampa", "Florida"], "It lies in Florida", True, False),
        (["art"], "a party", True, False),  # anywhere in the reply
        (["x"], "x", True, True),
        (["x"], "text", False, False),  # one letter counts beside a space only
        (["Tampa"], "", False, False),
    ],
)
def test_mmmu_open_answers_are_found_inside_replies(answers, reply, right, same):
    assert choices.mmmu_open_right(answers, choices.mmmu_open(reply)) is right
    assert choices.mmmu_open_same(answers, reply) is same


@pytest.mark.parametrize(
    ("reply", "official", "strict"),
    [
        ("Yes, there is.", True, True),
        ("No.", False, False),
        ("no", False, False),
        ("NO", True, False),  # no word of the evaluator's list
        ("no!", True, False),
        ("There is not a dog", False, None),
        ("A dog. No cat", True, None),  # the first sentence alone counts
        ("Yes, and there is no cat", False, True),
        ("nothing", True, None),
        ("", True, None),
    ],
)
def test_pope_reads_a_yes_in_all_that_does_not_say_no(reply, official, strict):
    assert yesno.pope(reply) is official
    assert yesno.strict(reply) is strict


def test_mme_reads_four_letters():
    said = ["Yes", "No, it", "yes it", "I know", "know", "A yes", "eyes", "", "not", "ok, no"]
    read = [True, False, True, None, False, None, True, None, False, None]
    assert [yesno.mme(reply) for reply in said] == read


def test_figures_of_yes_and_no():
    # 2 hits, 1 false yes, 1 missed, 1 right no, 1 that is neither where yes is right
    told = [(True, True), (True, True), (False, True), (True, False), (False, False), (True, None)]
    found = yesno.figures(told)
    assert found["accuracy"] == 3 / 6 and found["yes_ratio"] == 3 / 6
    assert found["precision"] == 2 / 3 and found["recall"] == 2 / 4
    assert found["f1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert yesno.figures([(True, False), (False, False)])["precision"] is None
    assert yesno.figures([(True, False), (False, True)])["f1"] == 0
    assert set(yesno.figures([]).values()) == {None}


def test_an_embedded_picture_is_read_like_a_file():
    at = Embedded.in_base64("a.tsv, row 3", base64.b64encode(b"abc").decode())
    assert at.read_bytes() == b"abc" and "row 3" in str(at)
    with pytest.raises(OSError, match="no base64"):
        Embedded.in_base64("a.tsv, row 3", "a*b").read_bytes()


# --- POPE ---------------------------------------------------------------------------------------------


@pytest.fixture
def pope_folder(tmp_path):
    for category in pope.CATEGORIES:
        lines = [
            {"question_id": n, "image": "COCO_val2014_1.jpg", "text": f"Is there a {n}?", "label": label}
            for n, label in enumerate(("yes", "no"))
        ]
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / f"coco_pope_{category}.json").write_text(text)
    return tmp_path


def test_pope_ids_of_its_three_files_are_told_apart(pope_folder):
    made = docs(pope.TASK, pope_folder)
    assert [d.id for d in made][:3] == ["random-0", "random-1", "popular-0"] and len(made) == 6
    assert made[0].images["image"] == pope_folder / "val2014" / "COCO_val2014_1.jpg"
    assert made[0].turns[0].text.startswith("Is there a 0?\n")


def test_pope_gives_half_to_who_never_answers_and_the_strict_figures_nothing(pope_folder):
    found = {d.id: "hm" if i else "" for i, d in enumerate(docs(pope.TASK, pope_folder))}
    figures = score(pope.TASK, pope_folder, found)
    assert value(figures, "accuracy") == 50 and value(figures, "yes_ratio") == 100
    assert value(figures, "recall") == 100 and value(figures, "precision") == 50
    assert value(figures, "strict_accuracy") == value(figures, "strict_yes_ratio") == 0
    assert value(figures, "strict_recall") == 0 and value(figures, "strict_precision") is None
    assert figures["metrics"]["strict_precision"]["reason"]
    assert value(figures, "strict_f1_of_categories") is None
    assert figures["n_invalid"] == 6 and figures["parse_rate"] == 0


def test_pope_figures_by_category(pope_folder):
    said = {"random-0": "Yes", "random-1": "No", "popular-0": "Yes", "popular-1": "Yes, two."}
    said |= {"adversarial-0": "No", "adversarial-1": "There is not."}
    figures = score(pope.TASK, pope_folder, said)
    # 4 of 6: both, one, one. Yes three times, rightly twice, of three that are.
    assert value(figures, "accuracy") == pytest.approx(100 * 4 / 6)
    assert value(figures, "precision") == value(figures, "recall") == pytest.approx(100 * 2 / 3)
    assert value(figures, "accuracy/category=random") == 100
    assert value(figures, "f1/category=popular") == pytest.approx(100 * 2 / 3)  # P 1/2, R 1
    assert value(figures, "f1/category=adversarial") is None  # never yes: no precision
    assert value(figures, "strict_accuracy") == 50  # "There is not" is no word
    assert figures["docs"]["random-0"] == 1
    two = {id: text for id, text in said.items() if not id.startswith("adversarial")}
    figures = score(pope.TASK, pope_folder, two, categories=["random", "popular"])
    assert value(figures, "f1_of_categories") == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_pope_refuses_bad_annotations(pope_folder):
    with pytest.raises(ConfigError, match="categories"):
        scoring.settings_of(pope.TASK, {"categories": ["often"]})
    path = pope_folder / "coco_pope_random.json"
    good = path.read_text()
    path.write_text(good.replace('"yes"', '"maybe"'))
    with pytest.raises(DataError, match="coco_pope_random.json: a label must be yes or no"):
        docs(pope.TASK, pope_folder)
    path.write_text(good + "\n" + good)
    with pytest.raises(DataError, match="'random-0' twice"):
        docs(pope.TASK, pope_folder)
    path.unlink()
    with pytest.raises(DataError, match="coco_pope_random.json.*published"):
        docs(pope.TASK, pope_folder)


# --- MME ----------------------------------------------------------------------------------------------


@pytest.fixture
def mme_folder(tmp_path):
    """Fourteen categories of two pictures; the later ones with folders for pictures and questions."""
    for at, category in enumerate(mme.SUMS["total"]):
        apart = at >= 4
        texts = tmp_path / category / ("questions_answers_YN" if apart else "")
        pictures = tmp_path / category / ("images" if apart else "")
        texts.mkdir(parents=True)
        pictures.mkdir(exist_ok=True)
        for name in ("10", "9"):
            (pictures / f"{name}.png").write_bytes(png())
            asked = f"Is it {name}? Please answer yes or no."
            (texts / f"{name}.txt").write_text(f"{asked}\tYes\n{asked}\tNo\n\n")
    return tmp_path


def test_mme_adds_up_accuracies_and_those_of_whole_pictures(mme_folder):
    made = docs(mme.TASK, mme_folder)
    assert len(made) == 14 * 4 and made[0].id == "existence/10-1"
    assert made[0].images["image"] == mme_folder / "existence" / "10.png"
    assert made[-1].images["image"] == mme_folder / "code_reasoning" / "images" / "9.png"
    said = {d.id: "Yes" if d.target else "No." for d in made}
    said["count/9-1"] = "perhaps"
    figures = score(mme.TASK, mme_folder, said)
    # count: 3 of 4 questions and 1 of 2 pictures, 75 + 50; the others 200 each
    assert value(figures, "score/category=count") == 125
    assert value(figures, "acc/category=count") == 75 and value(figures, "acc_plus/category=count") == 50
    assert value(figures, "perception") == 9 * 200 + 125 and figures["headline"] == "perception"
    assert value(figures, "cognition") == 800 and value(figures, "total") == 2725
    assert figures["scale"] == [0, 2000] and figures["n"] == 40 and figures["n_invalid"] == 1


def test_mme_counts_yes_in_every_answer_as_half_a_category(mme_folder):
    figures = score(mme.TASK, mme_folder, {d.id: "yes" for d in docs(mme.TASK, mme_folder)})
    assert value(figures, "perception") == 10 * 50 and value(figures, "cognition") == 4 * 50
    said = {d.id: "Yes" if d.target else "know" for d in docs(mme.TASK, mme_folder)}
    figures = score(mme.TASK, mme_folder, said)
    assert value(figures, "perception") == 2000  # the letters "no" stand in "know"
    assert value(figures, "strict_perception") == 500


def test_mme_sums_need_all_their_categories(mme_folder):
    made = docs(mme.TASK, mme_folder, categories=["existence", "OCR"])
    figures = score(mme.TASK, mme_folder, {d.id: "yes" for d in made}, categories=["existence", "OCR"])
    assert value(figures, "perception") is None and value(figures, "score/category=OCR") == 50
    assert "landmark" in figures["metrics"]["perception"]["reason"]
    said = {d.id: "yes" for d in made[:1]}
    figures = score(mme.TASK, mme_folder, said, partial=True, categories=["existence", "OCR"])
    assert value(figures, "acc/category=existence") == 100
    assert value(figures, "acc_plus/category=existence") is None, "half a picture is none"


def test_mme_prompts_and_bad_files(mme_folder):
    assert docs(mme.TASK, mme_folder)[0].turns[0].text == "Is it 10? Please answer yes or no."
    short = docs(mme.TASK, mme_folder, prompt="short")[0].turns[0].text
    assert short == "Is it 10?\nAnswer the question using a single word or phrase."
    (mme_folder / "count" / "9.txt").write_text("Is it?\tYes\n")
    with pytest.raises(DataError, match=r"count.9\.txt: must be two lines"):
        docs(mme.TASK, mme_folder)
    for path in (mme_folder / "OCR" / "questions_answers_YN").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="has no question files"):
        docs(mme.TASK, mme_folder, categories=["OCR"])
    with pytest.raises(DataError, match="mme needs .*nothing"):
        docs(mme.TASK, mme_folder, categories=["nothing"])


# --- MMBench ------------------------------------------------------------------------------------------


def table(path, rows, columns="index question hint A B C D answer category l2-category image"):
    columns = columns.split()
    lines = ["\t".join(columns)] + ["\t".join(str(row.get(c, "")) for c in columns) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def picture(shade=0):
    return base64.b64encode(png(shade)).decode()


FOUR = {
    "A": "one",
    "B": "two",
    "C": "three",
    "D": "four",
    "answer": "B",
    "category": "count",
    "l2-category": "p",
}
TWO = {"A": "left", "B": "right", "answer": "A", "category": "place", "l2-category": "p", "hint": "Look."}


@pytest.fixture
def plain_table(tmp_path):
    """Two questions in their first order alone."""
    rows = [
        {"index": 241, "question": "How many {options}?", "image": picture(), **FOUR},
        {"index": 7, "question": "Where?", "image": 241, **TWO},
    ]
    table(tmp_path / "MMBench_DEV_EN.tsv", rows)
    return tmp_path


def test_mmbench_makes_the_orders_that_are_not_there(plain_table):
    made = {d.id: d for d in docs(mmbench.TASK, plain_table)}
    assert list(made) == ["241", "7", "1000241", "2000241", "3000241", "1000007"]
    # The last option comes first, and the answer moves with its option.
    turned = made["1000241"].target
    assert list(turned["options"].values()) == ["four", "one", "two", "three"] and turned["answer"] == "C"
    assert made["3000241"].target["answer"] == "A" and made["1000007"].target["answer"] == "B"
    text = made["1000241"].turns[0].text
    assert text.startswith("How many {options}?\nA. four\nB. one\n")
    assert made["7"].turns[0].text.startswith("Look.\nWhere?\nA. left\nB. right\nAnswer with")
    hint = docs(mmbench.TASK, plain_table, prompt="vlmevalkit")[1].turns[0].text
    assert hint.startswith("Hint: Look.\nQuestion: Where?\nOptions:\nA. left\n")


def test_mmbench_leaves_an_option_about_the_others_last():
    row = mmbench.Row(5, {"A": "one", "B": "two", "C": "three", "D": "None of them"}, "D")
    assert [list(r.options.values()) for r in mmbench.turns(row)] == [
        ["three", "one", "two", "None of them"],
        ["two", "three", "one", "None of them"],
    ]
    assert {r.answer for r in mmbench.turns(row)} == {"D"}
    row = mmbench.Row(5, {"A": "one", "B": "two", "C": "A, B"}, "A")
    assert [r.answer for r in mmbench.turns(row)] == ["B"]


def test_mmbench_takes_orders_and_shared_pictures_from_the_file(tmp_path):
    other = FOUR | {"A": "four", "B": "one", "C": "two", "D": "three", "answer": "C"}
    rows = [
        {"index": 241, "question": "How many?", "image": picture(9), **FOUR},
        {"index": 1000241, "question": "How many?", "image": 241, **other},
    ]
    table(tmp_path / "mmbench_dev_en_20231003.tsv", rows)
    made = docs(mmbench.TASK, tmp_path)
    assert [d.id for d in made] == ["241", "1000241"] and made[1].target["orders"] == 2
    shown = [d.conversation().images["image"] for d in made]
    assert shown[0] == shown[1] and (shown[0].width, shown[0].height) == (6, 4)


def test_mmbench_wants_every_order_right(plain_table):
    made = docs(mmbench.TASK, plain_table)
    said = {d.id: d.target["answer"] for d in made}
    assert value(score(mmbench.TASK, plain_table, said), "circular") == 100
    said["2000241"] = said["1000241"]  # one of four wrong
    said["1000007"] = "hm"
    figures = score(mmbench.TASK, plain_table, said)
    assert value(figures, "circular") == 0 and value(figures, "vanilla") == 100
    assert figures["n"] == 2 and figures["n_invalid"] == 1 and figures["parse_rate"] == pytest.approx(5 / 6)
    assert figures["metrics"]["vanilla"]["n"] == 2
    said["1000007"] = "it lies left"
    figures = score(mmbench.TASK, plain_table, said)
    assert value(figures, "circular") == 50 and value(figures, "strict_circular") == 0
    assert value(figures, "circular/category=place") == 100
    assert value(figures, "circular/category=count") == 0
    assert value(figures, "circular/l2_category=p") == 50


def test_mmbench_always_the_same_letter_is_right_in_no_circle(plain_table):
    figures = score(mmbench.TASK, plain_table, {d.id: "A" for d in docs(mmbench.TASK, plain_table)})
    assert value(figures, "circular") == 0 and value(figures, "vanilla") == 50


def test_mmbench_questions_with_a_missing_order_are_left_out(plain_table):
    said = {d.id: d.target["answer"] for d in docs(mmbench.TASK, plain_table)}
    del said["3000241"]
    figures = score(mmbench.TASK, plain_table, said, partial=True)
    assert value(figures, "circular") == 100 and figures["n"] == 1
    assert figures["metrics"]["vanilla"]["n"] == 2


def test_mmbench_matching_before_2025(plain_table):
    said = {
        d.id: f"I take {d.target['answer']} for that is what one sees"
        for d in docs(mmbench.TASK, plain_table)
    }
    assert value(score(mmbench.TASK, plain_table, said), "circular") == 0
    assert value(score(mmbench.TASK, plain_table, said, matching="2024"), "circular") == 100


def test_mmbench_refuses_bad_tables(tmp_path):
    with pytest.raises(DataError, match="MMBench_DEV_CN_V11.tsv"):
        docs(mmbench.TASK, tmp_path, language="cn", edition="1.1")
    row = {"index": 1, "question": "?", "image": picture(), **FOUR}
    table(tmp_path / "MMBench_TEST_EN.tsv", [row | {"answer": "nan"}])
    with pytest.raises(DataError, match="server"):
        docs(mmbench.TASK, tmp_path, split="test")
    path = tmp_path / "MMBench_DEV_EN.tsv"
    table(path, [row, row | {"index": 2, "answer": "E"}])
    with pytest.raises(DataError, match="row 2: the answer 'E' is none of its options"):
        docs(mmbench.TASK, tmp_path)
    table(path, [row, row | {"index": 2, "image": 77}])
    with pytest.raises(DataError, match="row 2: its picture is said to be in another row"):
        docs(mmbench.TASK, tmp_path)
    table(path, [row | {"index": "1x"}])
    with pytest.raises(DataError, match="an index must be a number"):
        docs(mmbench.TASK, tmp_path)
    table(path, [row, row])
    with pytest.raises(DataError, match="'1' twice"):
        docs(mmbench.TASK, tmp_path)
    table(path, [row | {"image": "!" * 100}])
    with pytest.raises(DataError, match="row 1: cannot be read: no base64"):
        docs(mmbench.TASK, tmp_path)[0].conversation()


# --- MMMU ---------------------------------------------------------------------------------------------


def mmmu_entries():
    return [
        {
            "id": "validation_Art_Theory_1",
            "question": "What does <image 1> show, unlike <image 2>?",
            "options": "['<image 3>', 'a dog', \"a cat's eye\"]",
            "answer": "B",
            "question_type": "multiple-choice",
            "subfield": "x",
        },
        {
            "id": "validation_Finance_2",
            "question": "How much in <image 1>?",
            "options": "[]",
            "answer": "8200",
            "question_type": "open",
            "subfield": "y",
        },
        {
            "id": "validation_Geography_3",
            "question": "Where? <image 1>",
            "options": "[]",
            "answer": "['Tampa', 'Florida']",
            "question_type": "open",
            "subfield": "z",
        },
    ]


@pytest.fixture
def mmmu_folder(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for entry in mmmu_entries():
        subject = entry["id"].split("_", 1)[1].rsplit("_", 1)[0]
        shown = {f"image_{n}": {"bytes": png(n), "path": None} for n in (1, 2, 3)}
        (tmp_path / subject).mkdir()
        path = tmp_path / subject / "validation-00000-of-00001.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([entry | shown | {"image_4": None}]), path)
    return tmp_path


def test_mmmu_puts_pictures_where_the_text_names_them(mmmu_folder):
    first = docs(mmmu.TASK, mmmu_folder)[0]
    kinds = [p.ref if isinstance(p, Image) else p.text for p in first.turns[0].parts]
    assert kinds == [
        "What does ",
        "image_1",
        " show, unlike ",
        "image_2",
        "?\n\n(A) ",
        "image_3",
        "\n(B) a dog\n(C) a cat's eye\n\n"
        + "Answer with the option's letter from the given choices directly.",
    ]
    shown = first.conversation().images
    assert [int(shown[f"image_{n}"].array()[0, 0, 0]) for n in (1, 2, 3)] == [1, 2, 3]
    assert first.group == {"subject": "Art_Theory", "discipline": "Art and Design"}
    assert isinstance(first.turns[0].parts[-1], Text)


def test_mmmu_figures(mmmu_folder):
    ids = [d.id for d in docs(mmmu.TASK, mmmu_folder)]
    said = dict(zip(ids, ["The answer is (B)", "8,200", "Florida it is"]))
    figures = score(mmmu.TASK, mmmu_folder, said)
    assert value(figures, "accuracy") == 100
    assert value(figures, "accuracy_strict") == pytest.approx(100 / 3)  # the number alone stands alone
    assert value(figures, "accuracy/discipline=Business") == 100
    assert value(figures, "accuracy/subject=Art_Theory") == 100


def test_mmmu_draws_no_option_but_says_what_drawing_would_give(mmmu_folder):
    ids = [d.id for d in docs(mmmu.TASK, mmmu_folder)]
    figures = score(mmmu.TASK, mmmu_folder, dict(zip(ids, ["no idea", "8,200", ""])))
    assert value(figures, "accuracy") == pytest.approx(100 / 3)
    assert value(figures, "accuracy_official_expected") == pytest.approx(100 * (1 / 3 + 1 + 0) / 3)
    assert figures["n_invalid"] == 2


def test_mmmu_parser_of_the_first_release(mmmu_folder):
    ids = [d.id for d in docs(mmmu.TASK, mmmu_folder)]
    said = dict(zip(ids, ["Answer: B. Because", "1", "1"]))
    assert value(score(mmmu.TASK, mmmu_folder, said), "accuracy") == pytest.approx(100 / 3)
    assert value(score(mmmu.TASK, mmmu_folder, said, parser="first_release"), "accuracy") == 0


def test_mmmu_of_json_and_its_faults(tmp_path):
    path = tmp_path / "validation.jsonl"
    entries = [e | {f"image_{n}": f"{n}.png" for n in (1, 2, 3)} for e in mmmu_entries()]

    def write(found):
        path.write_text("\n".join(json.dumps(e) for e in found))

    write(entries)
    made = docs(mmmu.TASK, tmp_path)
    assert made[0].images["image_3"] == tmp_path / "3.png"
    assert made[0].target.options["C"] == "a cat's eye" and made[2].target.answers == ("Tampa", "Florida")
    write([entries[0] | {"answer": "D"}])
    with pytest.raises(DataError, match="validation_Art_Theory_1: the answer 'D' is none of 3 options"):
        docs(mmmu.TASK, tmp_path)
    write([entries[0] | {"answer": "?"}])
    with pytest.raises(DataError, match="server"):
        docs(mmmu.TASK, tmp_path)
    write([entries[0] | {"id": "validation_Cookery_1"}])
    with pytest.raises(DataError, match="none of MMMU's subjects"):
        docs(mmmu.TASK, tmp_path)
    write([entries[0] | {"options": "['a', "}])
    with pytest.raises(DataError, match="no list as Python writes one"):
        docs(mmmu.TASK, tmp_path)
    write([{k: v for k, v in entries[0].items() if k != "image_2"}])
    with pytest.raises(DataError, match="no 'image_2'"):
        docs(mmmu.TASK, tmp_path)
    write([entries[1], entries[1]])
    with pytest.raises(DataError, match="'validation_Finance_2' twice"):
        docs(mmmu.TASK, tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="mmmu needs .*validation.jsonl"):
        docs(mmmu.TASK, tmp_path)


def test_mmmu_damaged_parquet_and_pictures_that_are_not_there(mmmu_folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = mmmu_folder / "Finance" / "validation-00000-of-00001.parquet"
    rows = parquet.read_table(path).drop_columns(["image_1"])
    parquet.write_table(rows, path)
    asked = next(d for d in docs(mmmu.TASK, mmmu_folder) if "Finance" in d.id)
    with pytest.raises(DataError, match="Finance.*cannot be read: the row has no image_1"):
        asked.conversation()
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="Finance.*damaged"):
        docs(mmmu.TASK, mmmu_folder)


# --- MMVP ---------------------------------------------------------------------------------------------


@pytest.fixture
def mmvp_folder(tmp_path):
    wings = "Are the butterfly's wings, as seen, open?,(a) Open (b) Closed"
    lines = ["lndex,Question,Options,Correct Answer"]
    lines += [
        f'{n},"{wings.split("?,")[0]}?",{wings.split("?,")[1]},({"ab"[n % 2 == 0]})' for n in (1, 2, 3, 4)
    ]
    (tmp_path / "Questions.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_mmvp_pairs_count_when_both_are_right(mmvp_folder):
    made = docs(mmvp.TASK, mmvp_folder)
    assert made[0].turns[0].text.startswith("Are the butterfly's wings, as seen, open?\nA. Open\nB. Closed\n")
    assert made[2].images["image"] == mmvp_folder / "MMVP Images" / "3.jpg"
    own = docs(mmvp.TASK, mmvp_folder, prompt="published")[0].turns[0].text
    assert own.endswith("open? (a) Open (b) Closed")
    figures = score(mmvp.TASK, mmvp_folder, {"1": "(a)", "2": "B", "3": "A.", "4": "A"})
    assert value(figures, "pair") == 50 and value(figures, "accuracy") == 75
    assert figures["n"] == 2
    figures = score(mmvp.TASK, mmvp_folder, {"1": "They are open", "2": "B", "3": "hm", "4": "A"})
    assert value(figures, "pair") == 50 and value(figures, "pair_strict") == 0
    assert figures["n_invalid"] == 1
    figures = score(mmvp.TASK, mmvp_folder, {"1": "a", "2": "b", "3": "a"}, partial=True)
    assert value(figures, "pair") == 100 and figures["n"] == 1


def test_mmvp_corrected_answers_and_faults(mmvp_folder):
    path = mmvp_folder / "Questions.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *rows * 25]) + "\n")
    assert [d.target["answer"] for d in docs(mmvp.TASK, mmvp_folder)[98:]] == ["A", "B"]
    made = docs(mmvp.TASK, mmvp_folder, answers="corrected")
    assert [d.target["answer"] for d in made[98:]] == ["B", "A"] and made[0].target["answer"] == "A"
    path.write_text("\n".join([head, *rows[:3]]))
    with pytest.raises(DataError, match="must be pairs"):
        docs(mmvp.TASK, mmvp_folder)
    path.write_text("\n".join([head, rows[0], rows[1].replace("(b)\n", "").replace(",(b)", ",(c)")]))
    with pytest.raises(DataError, match="row 2: the answer 'C' is none"):
        docs(mmvp.TASK, mmvp_folder)
    path.write_text("Index,Question,Options\n1,a,(a) x (b) y\n2,a,(a) x (b) y\n")
    with pytest.raises(DataError, match="no 'Correct Answer'"):
        docs(mmvp.TASK, mmvp_folder)


# --- SEED-Bench ---------------------------------------------------------------------------------------


@pytest.fixture
def seed_folder(tmp_path):
    common = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    common |= {"question": "How many?", "data_id": "1_2", "data_type": "image", "question_type_id": 5}
    questions = [common | {"answer": answer, "question_id": f"{n}"} for n, answer in enumerate("AB")]
    questions.append(common | {"answer": "C", "question_id": "v1", "data_type": "video"})
    release = {"questions": questions, "question_type": {"Instances Counting": 5}}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(release))
    return tmp_path


def test_seed_bench_by_letter(seed_folder):
    made = docs(seed_bench.TASK, seed_folder)
    assert [d.id for d in made] == ["0", "1"] and not made[0].options, "videos are not asked"
    assert made[0].images["image"] == seed_folder / "SEED-Bench-image" / "1_2"
    figures = score(seed_bench.TASK, seed_folder, {"0": "A towel", "1": "It is B"})
    assert value(figures, "accuracy") == 50 and value(figures, "accuracy_strict") == 0
    assert value(figures, "accuracy/question_type=Instances Counting") == 50
    assert figures["n_invalid"] == 1


def test_seed_bench_by_likelihood(seed_folder):
    made = docs(seed_bench.TASK, seed_folder, by="likelihood")
    assert made[0].options == ("One", "Two", "Three", "Four")
    assert made[0].turns[0].text == "Question: How many?\nAnswer:"
    found = {"0": [-1.0, -1.0, -9.0, -9.0], "1": [-5.0, -4.5, -4.0, -7.0]}
    figures = score(seed_bench.TASK, seed_folder, found, key="scores", by="likelihood")
    assert value(figures, "accuracy") == 50 and value(figures, "accuracy_strict") is None
    figures = score(seed_bench.TASK, seed_folder, {"0": "A", "1": "B"}, by="likelihood")
    assert value(figures, "accuracy") == 0 and figures["n_invalid"] == 2, "letters are no likelihoods"


def test_seed_bench_faults(seed_folder):
    path = seed_folder / "SEED-Bench.json"
    release = json.loads(path.read_text())
    path.write_text(json.dumps(release | {"questions": [release["questions"][0]] * 2}))
    with pytest.raises(DataError, match="'0' twice"):
        docs(seed_bench.TASK, seed_folder)
    path.write_text(json.dumps(release | {"questions": [release["questions"][0] | {"answer": "E"}]}))
    with pytest.raises(DataError, match="must be A, B, C or D"):
        docs(seed_bench.TASK, seed_folder)
    path.write_text(json.dumps({"questions": []}))
    with pytest.raises(DataError, match="no 'question_type'"):
        docs(seed_bench.TASK, seed_folder)


# --- GQA ----------------------------------------------------------------------------------------------


@pytest.fixture
def gqa_folder(tmp_path):
    entry = {"question": "What is it?", "imageId": "n1", "isBalanced": True}
    entry |= {"types": {"structural": "query", "semantic": "obj", "detailed": "x"}}
    questions = {"11": entry | {"answer": "t-shirt"}, "12": entry | {"answer": "no"}}
    questions["13"] = entry | {"answer": "no", "isBalanced": False}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    return tmp_path


def test_gqa_compares_as_three_evaluators_do(gqa_folder):
    made = docs(gqa.TASK, gqa_folder)
    assert [d.id for d in made] == ["11", "12"] and made[0].images["image"].name == "n1.jpg"
    figures = score(gqa.TASK, gqa_folder, {"11": "T-Shirt.", "12": "no"})
    assert value(figures, "accuracy") == 100 and value(figures, "accuracy_verbatim") == 50
    assert value(figures, "accuracy/structural=query") == 100
    figures = score(gqa.TASK, gqa_folder, {"11": "tshirt", "12": ""})
    assert value(figures, "accuracy") == 0 and value(figures, "accuracy_no_marks") == 50
    assert figures["n_invalid"] == 1


def test_gqa_faults(gqa_folder):
    path = gqa_folder / "testdev_balanced_questions.json"
    path.write_text(json.dumps({"1": {"question": "?", "imageId": "1", "isBalanced": True}}))
    with pytest.raises(DataError, match="no 'answer'"):
        docs(gqa.TASK, gqa_folder)
    path.write_text("[]")
    with pytest.raises(DataError, match="questions by their ids"):
        docs(gqa.TASK, gqa_folder)
    path.unlink()
    with pytest.raises(DataError, match="gqa needs .*testdev_balanced_questions.json"):
        docs(gqa.TASK, gqa_folder)


@pytest.mark.parametrize("task", [pope, mme, mmbench, mmmu, mmvp, seed_bench, gqa])
def test_every_task_says_what_it_needs(task, tmp_path):
    with pytest.raises(DataError, match="which is not there; .*"):
        docs(task.TASK, tmp_path)
