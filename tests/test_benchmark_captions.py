"""Captions: words with Java and without, the evaluator's figures, and COCO, nocaps, Flickr30k, paragraphs."""

import json
import math
import os
import random
import shutil

import numpy as np
import pytest

from umm_jax.conversation import ImageData
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import scoring
from umm_jax.evaluate.measures import captions as measures
from umm_jax.evaluate.measures import ptb
from umm_jax.evaluate.source import Source
from umm_jax.evaluate.tasks import captions

pytest.importorskip("pycocoevalcap.cider.cider")
TASKS = {task.name: task for task in captions.TASKS}
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def replies(folder, found):
    lines = (json.dumps({"id": id, "text": text}) + "\n" for id, text in found.items())
    return write(folder / "responses.jsonl", "".join(lines))


def score(name, root, found, partial=False, **settings):
    settings = {"tokenizer": "python"} | settings
    return scoring.score(TASKS[name], root, replies(root.parent, found), settings=settings, partial=partial)


def docs(name, root, **settings):
    task = TASKS[name]
    return scoring.docs_of(task, Source(root, name, task.files), scoring.settings_of(task, settings))


def value(figures, name):
    return figures["metrics"][name]["value"]


def plain(captions, references):
    """Words as they are written."""
    return measures.Words({i: [c] for i, c in captions.items()}, references, "test")


# --- words --------------------------------------------------------------------------------------------

WORDS = {
    "A man riding a wave.": "a man riding a wave",
    "": "",
    " ... ": "",
    "It's the man's dog, isn't it?": "it 's the man 's dog is n't it",
    "DON'T can’t cannot": "do n't ca n't can not",
    # The evaluator's list has brackets in capitals, so in small letters they stay.
    "a cat (black) [big]": "a cat -lrb- black -rrb- -lsb- big -rsb-",
    "a t-shirt, a 3-year-old and a black-and-white cat": "a t-shirt a 3-year-old and a black-and-white cat",
    '"STOP" sign - on 5th Ave.': "stop sign on 5th ave.",
    "10,000 people at 3:30 p.m. in the U.S.": "10,000 people at 3:30 p.m. in the u.s.",
    "no. 5 is no.": "no. 5 is no",
    "Mr. Smith's 1950's car costs $5.00 (50%)": "mr. smith 's 1950 's car costs $ 5.00 -lrb- 50 % -rrb-",
    "naïve café — naturally… wait--what!!": "naïve café naturally wait what !!",
    "rock 'n' roll in the '90s": "rock 'n' roll in the '90s",
    "salt & pepper and/or AT&T": "salt & pepper and/or at&t",
    "one\nline\r\nof\u2028four": "one line of four",
    "a 😀 face :)": "a face :-rrb-",
    "3 1/2 cups": "3\u00a01/2 cups",
    "half a \ud83d character": "half a character",
}


@pytest.mark.parametrize("text, words", WORDS.items())
def test_words_without_java(text, words):
    assert " ".join(ptb.python_words(text)) == words


@needs_java
def test_words_by_java_are_the_same():
    assert [" ".join(found) for found in ptb.java_words(list(WORDS))] == list(WORDS.values())
    assert ptb.java_words([]) == []


@needs_java
def test_what_is_known_to_differ_differs():
    found = ptb.java_words(list(ptb.KNOWN))
    assert all(java != ptb.python_words(text) for java, text in zip(found, ptb.KNOWN))


@needs_java
def test_words_are_those_of_the_evaluator_itself():
    official = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    texts = [text for text in WORDS if not set(text) & set("\r\u2028\ud83d")]
    found = official.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert [found[i][0] for i in range(len(texts))] == [" ".join(w) for w in ptb.java_words(texts)]


def test_broken_lines_do_not_move_captions():
    """The evaluator gives "after" the words of what came before it: its lines are cut at U+2028 too."""
    words = measures.in_words(
        {"a": "one\u2028two", "b": "after"},
        {"a": ["x\ry"], "b": ["z"]},
        "java" if ptb.has_java() else "python",
    )
    assert words.captions == {"a": ["one two"], "b": ["after"]}
    assert words.references == {"a": ["x y"], "b": ["z"]}


def java_that(folder, monkeypatch, script):
    """Puts a program called java before all others."""
    program = write(folder / "bin" / "java", f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_without_java_the_words_are_ours_and_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measures.in_words({"a": "A cat."}, {"a": ["cats"]}).by == "ptb-python"
    with pytest.raises(DataError, match="needs Java"):
        measures.in_words({"a": "A cat."}, {"a": ["cats"]}, "java")


def test_a_java_that_fails_is_an_error(monkeypatch, tmp_path):
    java_that(tmp_path, monkeypatch, "echo 'no runtime' >&2; exit 1")
    with pytest.raises(DataError, match="failed.*no runtime"):
        measures.in_words({"a": "A cat."}, {"a": ["cats"]})


def test_a_java_that_loses_lines_is_an_error(monkeypatch, tmp_path):
    java_that(tmp_path, monkeypatch, "echo one line")
    with pytest.raises(DataError, match="1 lines for 4 captions"):
        measures.in_words({"a": "A cat.", "b": "x"}, {"a": ["cats"], "b": ["y"]}, "java")


# --- formulas -----------------------------------------------------------------------------------------


def test_cider_by_hand():
    """Of 2 pictures a word in one weighs log 2, a word in both 0.

    1: 1-grams "b" and 2-grams "a b" agree, there are no longer ones: (1 + 1 + 0 + 0) / 4 * 10 = 5.
    2: the 1-gram "c" agrees; lengths are counted in 2-grams, 0 and 1: exp(-1 / 72) / 4 * 10.
    """
    words = plain({"1": "a b", "2": "c"}, {"1": ["a b"], "2": ["a c"]})
    found = measures.cider(words)
    assert found == pytest.approx({"1": 5.0, "2": 2.5 * math.exp(-1 / 72)})


def test_cider_of_one_picture_cannot_be_had():
    with pytest.raises(measures.Unavailable, match="more than one"):
        measures.cider(plain({"1": "a b"}, {"1": ["a b"]}))
    assert measures.cider(plain({"1": "a", "2": ""}, {"1": [""], "2": [""]})) == {"1": 0, "2": 0}


def test_bleu_by_hand():
    """3 words of 3 agree, so do 2 pairs of 2; 3 words for a reference of 4: exp(1 - 4 / 3)."""
    found = measures.bleu(plain({"1": "the cat sat"}, {"1": ["the cat sat down"]}))
    assert found[:3] == pytest.approx([math.exp(1 - 4 / 3)] * 3)
    # No run of four words: the evaluator has 1e-15 of 1e-9 agree.
    assert found[3] == pytest.approx(1e-6 ** (1 / 4) * math.exp(1 - 4 / 3), rel=1e-6)


def test_rouge_by_hand():
    """Longest common sequence 2: precision 2/3, recall 1, F with beta^2 = 1.44."""
    found = measures.rouge_l(plain({"1": "a b c", "2": ""}, {"1": ["a c"], "2": ["x"]}))
    assert found == pytest.approx({"1": 2.44 * (2 / 3) / (1 + 1.44 * 2 / 3), "2": 0})


def test_a_corpus_needs_the_same_ids():
    with pytest.raises(ValueError, match="references"):
        measures.in_words({"a": "x"}, {"b": ["y"]}, "python")
    with pytest.raises(ValueError, match="references"):
        measures.in_words({"a": "x"}, {"a": []}, "python")


# --- COCO ---------------------------------------------------------------------------------------------

SAID = {
    391895: ["A man riding a red bike.", "A man on a bike (red).", "The man's bike is red."],
    522418: ["A woman cuts a cake.", "Woman cutting a white cake", "a cake, a knife and a woman"],
    184613: ["A child holds an umbrella.", "a small child with an umbrella", "Kid by a bike with umbrella"],
}
RIGHT = {
    "391895": "A man riding a red bike.",
    "522418": "a woman with a cake",
    "184613": "A child holds an umbrella.",
}


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    listed = [{"image": f"val2014/COCO_val2014_{i:012d}.jpg", "caption": said} for i, said in SAID.items()]
    write(root / "coco_karpathy_test.json", listed)
    write(root / "coco_karpathy_test_gt.json", coco_form(SAID))
    picture = ImageData.from_array(np.zeros((4, 4, 3), np.uint8))
    (root / "val2014").mkdir()
    for entry in listed[:2]:
        (root / entry["image"]).write_bytes(picture.data)
    return root


def coco_form(said, **images):
    """COCO's form of {image: captions}; images: further fields by image."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", **images.get(f"i{i}", {})} for i in said],
        "annotations": [
            {"id": 100 * i + n, "image_id": i, "caption": caption}
            for i, captions in said.items()
            for n, caption in enumerate(captions)
        ],
    }


def test_coco_docs(coco):
    found = docs("coco-caption", coco, prompt="photo")
    assert [doc.id for doc in found] == ["391895", "522418", "184613"]
    assert found[0].target == SAID[391895]
    assert found[0].turns[0].text.endswith("a photo of")
    assert found[0].conversation().images["image"].width == 4
    with pytest.raises(DataError, match="COCO_val2014_000000184613.jpg"):
        found[2].conversation()


def test_coco_figures_are_the_evaluators(coco):
    figures = score("coco-caption", coco, RIGHT)
    words = measures.in_words(RIGHT, {str(i): said for i, said in SAID.items()}, "python")
    each = measures.cider(words)
    assert value(figures, "cider") == pytest.approx(100 * np.mean(list(each.values())))
    assert figures["docs"] == pytest.approx(each)
    spread = np.std(list(each.values()), ddof=1) / math.sqrt(3)
    assert figures["stderr"] == pytest.approx(100 * spread), "of the values whose mean it is"
    bleu = measures.bleu(words)
    assert [value(figures, f"bleu_{k}") for k in (1, 2, 3, 4)] == pytest.approx([100 * b for b in bleu])
    assert figures["metrics"]["bleu_4"]["stderr"] is None, "no mean of pictures"
    assert value(figures, "rouge_l") == pytest.approx(100 * np.mean(list(measures.rouge_l(words).values())))
    assert figures["metrics"]["cider"]["reason"] == "words by ptb-python"
    assert figures["headline"] == "cider" and figures["n"] == 3 and figures["parse_rate"] == 1
    assert not {"meteor", "spice"} & figures["metrics"].keys(), "asked for by settings alone"


@needs_java
@pytest.mark.parametrize("seed", range(3))
def test_random_captions_against_the_whole_evaluator(tmp_path, seed):
    """All of the official chain, its tokenizer in Java and its classes, on captions with odd corners."""
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    official = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    rng = random.Random(seed)
    some = "a the man's dog isn't on (red) bike, 10,000 U.S. t-shirt w/ and/or 'big' Mr. café -- wave. Don’t"
    some = some.split()
    said = {i: [" ".join(rng.choices(some, k=rng.randint(1, 12))) for _ in range(5)] for i in range(1, 41)}
    found = {str(i): " ".join(rng.choices(some, k=rng.randint(0, 12))) for i in said}
    write(tmp_path / "data" / "test1k.token.coco_format", coco_form(said))
    wanted, given = (
        {i: [{"caption": c} for c in side[i]] for i in side}
        for side in ({str(i): s for i, s in said.items()}, {i: [c] for i, c in found.items()})
    )
    tokenizer = official.PTBTokenizer()
    wanted, given = tokenizer.tokenize(wanted), tokenizer.tokenize(given)
    expected = {
        "cider": cider.Cider().compute_score(wanted, given)[0],
        "rouge_l": rouge.Rouge().compute_score(wanted, given)[0],
        **{f"bleu_{k}": b for k, b in enumerate(bleu.Bleu(4).compute_score(wanted, given, verbose=0)[0], 1)},
    }
    for tokenizer in ("java", "python"):
        figures = score("flickr30k", tmp_path / "data", found, tokenizer=tokenizer)
        for name, number in expected.items():
            assert value(figures, name) == pytest.approx(100 * number, rel=1e-9), (name, tokenizer)
        assert figures["metrics"]["cider"]["reason"] == f"words by ptb-{tokenizer}"


def test_an_empty_reply_counts_as_wrong_and_apart(coco):
    whole = score("coco-caption", coco, RIGHT)
    figures = score("coco-caption", coco, RIGHT | {"184613": " "})
    assert figures["n_invalid"] == 1 and figures["parse_rate"] == pytest.approx(2 / 3)
    assert figures["docs"]["184613"] == 0 and value(figures, "cider") < value(whole, "cider")


def test_figures_do_not_depend_on_the_order_of_replies(coco):
    figures, turned = (score("coco-caption", coco, dict(f)) for f in (RIGHT.items(), reversed(RIGHT.items())))
    assert figures["responses_hash"] != turned["responses_hash"]
    assert figures["metrics"] == turned["metrics"] and figures["docs"] == turned["docs"]


def test_cider_of_a_part_is_of_that_part_alone(coco):
    """Words are weighed by the pictures that are there, so the values of those are others."""
    whole = score("coco-caption", coco, RIGHT)["docs"]
    part = {id: RIGHT[id] for id in ("391895", "522418")}
    with pytest.raises(DataError, match="no response"):
        score("coco-caption", coco, part)
    figures = score("coco-caption", coco, part, partial=True)
    assert figures["n"] == 2 and figures["docs"].keys() == part.keys()
    assert figures["docs"]["391895"] != pytest.approx(whole["391895"])
    one = score("coco-caption", coco, {"391895": "A man."}, partial=True)
    assert value(one, "cider") is None and "more than one" in one["metrics"]["cider"]["reason"]
    assert value(one, "bleu_1") is not None and one["docs"] == {}


def test_only_the_first_sentence(coco):
    long = RIGHT | {"391895": "A man riding a red bike. It is not what was asked for."}
    assert value(score("coco-caption", coco, long, first_sentence=True), "cider") == pytest.approx(
        value(score("coco-caption", coco, RIGHT), "cider")
    )
    assert value(score("coco-caption", coco, long), "cider") < value(
        score("coco-caption", coco, RIGHT), "cider"
    )


def test_meteor_and_spice_say_what_they_lack(coco, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    metrics = score("coco-caption", coco, RIGHT, meteor=True, spice=True)["metrics"]
    assert metrics["meteor"]["value"] is metrics["spice"]["value"] is None
    assert metrics["meteor"]["reason"] == "METEOR needs Java, which is not installed"
    assert "SPICE needs Java" in metrics["spice"]["reason"]


def test_spice_fetches_nothing(coco, monkeypatch, tmp_path):
    spice = pytest.importorskip("pycocoevalcap.spice.spice")
    java_that(tmp_path, monkeypatch, "exit 1")
    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    monkeypatch.setattr(spice, "get_stanford_models", lambda: pytest.fail("fetched"))
    reason = score("coco-caption", coco, RIGHT, spice=True)["metrics"]["spice"]["reason"]
    assert "stanford-corenlp-3.6.0.jar" in reason
    for name in measures._SPICE_MODELS:
        write(tmp_path / "lib" / name, "")
    monkeypatch.setattr(spice, "get_stanford_models", lambda: None)
    reason = score("coco-caption", coco, RIGHT, spice=True)["metrics"]["spice"]["reason"]
    assert reason.startswith("SPICE's Java failed")


def test_a_java_that_dies_is_a_reason_and_no_deadlock(coco, monkeypatch, tmp_path):
    java_that(tmp_path, monkeypatch, "exit 1")
    metrics = score("coco-caption", coco, RIGHT, meteor=True)["metrics"]
    assert metrics["meteor"]["value"] is None and "METEOR's Java failed" in metrics["meteor"]["reason"]
    assert metrics["cider"]["value"] is not None


@needs_java
@pytest.mark.slow  # a Java of 2 GB that reads its table for some seconds
def test_meteor(coco):
    figures = score("coco-caption", coco, RIGHT, meteor=True)["metrics"]["meteor"]
    assert 20 < figures["value"] <= 100 and figures["stderr"] is None


def test_bad_annotations_of_coco(coco):
    (coco / "coco_karpathy_test_gt.json").rename(coco / "gone.json")
    with pytest.raises(DataError, match="coco_karpathy_test_gt.json.*published with BLIP"):
        docs("coco-caption", coco)
    write(coco / "annotations" / "coco_karpathy_test_gt.json", coco_form({391895: ["x"]}))
    with pytest.raises(DataError, match="no caption for the image '522418'"):
        docs("coco-caption", coco)
    write(coco / "annotations" / "coco_karpathy_test_gt.json", {"annotations": [{"image_id": 391895}]})
    with pytest.raises(DataError, match="has no 'caption'"):
        docs("coco-caption", coco)
    write(coco / "annotations" / "coco_karpathy_test_gt.json", coco_form(SAID))
    for listed, complaint in (
        ([{"image": "cat.jpg"}], "no number of a picture in 'cat.jpg'"),
        ({"images": []}, "is no list"),
        ([{"caption": []}], "has no 'image'"),
        ([], "nothing to ask"),
    ):
        write(coco / "coco_karpathy_test.json", listed)
        with pytest.raises(DataError, match=complaint):
            docs("coco-caption", coco)


def test_a_picture_that_is_there_twice(coco):
    listed = json.loads((coco / "coco_karpathy_test.json").read_text())
    write(coco / "coco_karpathy_test.json", [*listed, listed[0]])
    with pytest.raises(DataError, match="'391895' twice"):
        docs("coco-caption", coco)


def test_replies_of_another_split(coco):
    with pytest.raises(DataError, match="another split"):
        score("coco-caption", coco, RIGHT | {"7": "a cat"})


# --- nocaps, Flickr30k, paragraphs --------------------------------------------------------------------


def test_nocaps_by_domain(tmp_path):
    root = tmp_path / "nocaps"
    said = {0: ["a cat on a mat"] * 2, 1: ["a dog in fog"], 2: ["a goat in a boat"], 3: ["the hen in a pen"]}
    domains = {f"i{i}": {"domain": d} for i, d in enumerate(["in-domain", "in-domain", "out-domain"])}
    write(root / "nocaps_val_4500_captions.json", coco_form(said, **domains))
    found = {"0": "a cat on a mat", "1": "a dog in a fog", "2": "a boat", "3": "a pen"}
    figures = score("nocaps", root, found)
    of_two = measures.in_words({i: found[i] for i in "01"}, {i: said[int(i)] for i in "01"}, "python")
    alone = measures.cider(of_two)
    assert value(figures, "cider/domain=in-domain") == pytest.approx(100 * np.mean(list(alone.values())))
    assert figures["metrics"]["cider/domain=in-domain"]["n"] == 2
    one = figures["metrics"]["cider/domain=out-domain"]
    assert one["value"] is None and "more than one" in one["reason"]
    assert len(figures["metrics"]) == 8 and figures["n"] == 4
    with pytest.raises(ConfigError, match="split"):
        docs("nocaps", root, split="test")


def test_flickr30k_lies_where_it_is_published(tmp_path):
    root = tmp_path / "flickr"
    write(root / "test1k.token.coco_format", coco_form({5: ["a dog"], 6: ["a cat"]}))
    write(root / "flickr30k-images" / "5.jpg", "")
    found = docs("flickr30k", root)
    assert [str(doc.images["image"].relative_to(root)) for doc in found][0] == "flickr30k-images/5.jpg"
    assert found[1].target == ["a cat"]
    with pytest.raises(DataError, match="test1k.token.coco_format"):
        docs("flickr30k", tmp_path)


@pytest.mark.parametrize("form", ["paragraphs_coco.json", "paragraphs_v1.json"])
def test_paragraphs(tmp_path, form):
    root = tmp_path / "p"
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/{}.jpg"
    key = "caption" if form == "paragraphs_coco.json" else "paragraph"
    # Picture 3 is there twice, as some are in the release: it has two references.
    entries = [
        {"image_id": i, "url": url.format(i), key: f"A cat {i}. It is {n}."}
        for n, i in enumerate([3, 4, 3, 5])
    ]
    write(root / "annotations" / form, entries if key == "paragraph" else {"annotations": entries})
    write(root / "annotations" / "test_split.json", [5, 3])
    write(root / "images" / "VG_100K_2" / "5.jpg", "")
    found = docs("image2paragraph", root)
    assert [doc.id for doc in found] == ["5", "3"]
    assert found[1].target == ["A cat 3. It is 0.", "A cat 3. It is 2."]
    assert found[0].images["image"] == root / "images" / "VG_100K_2" / "5.jpg"
    assert "describe the image in detail" in found[0].turns[0].text
    figures = score("image2paragraph", root, {"5": "A cat 5. It is 3.", "3": "It is 0. A dog."})
    assert figures["n"] == 2 and value(figures, "cider") > 0
    write(root / "annotations" / "test_split.json", [5, 9])
    with pytest.raises(DataError, match="no paragraph for 1 images of test_split.json .9."):
        docs("image2paragraph", root)
