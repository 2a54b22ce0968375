"""Answers with calls: what is read, what is mended, what is told; and that no user can write a call."""

import random

import pytest

from umm_jax.errors import ConfigError
from umm_jax.markup import dialects
from umm_jax.markup.coordinates import from_square, to_square
from umm_jax.markup.grammar import (
    Answer,
    Boxes,
    Call,
    Ref,
    Seg,
    Text,
    Times,
    lex_ids,
    parse,
    render,
    sound,
)
from umm_jax.markup.tasks import TASKS

UMM1 = dialects.get("umm1")
TEN = "<image_gen>a</image_gen>" * 10


def calls(answer: Answer) -> list[tuple]:
    return [(c.task, c.prompt, list(c.boxes), len(c.masks)) for c in answer.calls]


def codes(answer: Answer) -> list[str]:
    return [d.code for d in answer.diagnostics]


# The golden vectors of the specification, section 11.
GOLDEN = [
    ("A dog sits on a sofa.", [], []),
    (
        "Sure. <image_seg>the red mug <box>[0.1, 0.2, 0.3, 0.4]</box>[SEG]</image_seg>",
        [("image_seg", "the red mug", [(0.1, 0.2, 0.3, 0.4)], 1)],
        [],
    ),
    ("<image_seg>both cats [SEG][SEG]</image_seg>", [("image_seg", "both cats", [], 2)], []),
    (
        "<image_gen>an orange cat</image_gen> then <image_edit>make it white</image_edit> then "
        "<video_gen>a cat runs</video_gen>",
        [
            ("image_gen", "an orange cat", [], 0),
            ("image_edit", "make it white", [], 0),
            ("video_gen", "a cat runs", [], 0),
        ],
        [],
    ),
    ("Here: <image_gen>a castle at dusk", [("image_gen", "a castle at dusk", [], 0)], ["UNCLOSED_CALL"]),
    ("<audio_gen>rain on a roof</video_gen>", [("audio_gen", "rain on a roof", [], 0)], ["MISMATCHED_CLOSE"]),
    ("<aud_cap>rain on a roof</audio_cap>", [("audio_gen", "rain on a roof", [], 0)], ["ALIAS", "ALIAS"]),
    ("ok </image_gen> fine", [], ["STRAY_CLOSE"]),
    ("<teleport>x</teleport>", [], ["UNKNOWN_TAG", "UNKNOWN_TAG"]),
    (
        "<image_gen>a <image_edit>b</image_edit></image_gen>",
        [("image_gen", "a", [], 0), ("image_edit", "b", [], 0)],
        ["NESTED_CALL", "UNCLOSED_CALL", "STRAY_CLOSE"],
    ),
    ("<image_gen>  </image_gen>", [], ["EMPTY_CALL"]),
    ("It is [SEG].", [("image_seg", "", [], 1)], ["BARE_SEG"]),
    (
        "<image_edit>recolour <box>[0.1,0.1,0.5,0.5]</image_edit>",
        [("image_edit", "recolour", [(0.1, 0.1, 0.5, 0.5)], 0)],
        ["UNCLOSED_BOX"],
    ),
    (TEN, [("image_gen", "a", [], 0)] * 8, ["TOO_MANY_CALLS"] * 2),
]
PLACES = [
    ("[0.1, 0.2, 0.3]", [], ["BOX_ARITY"]),
    ("[nan, 0.1, 0.2, 0.3]", [], ["BOX_ARITY"]),
    ("[1e999, 0.1, 0.2, 0.3]", [], ["BOX_ARITY"]),
    ("[0.1, 0.2, 0.3, 0.4, 0.5]", [], ["BOX_ARITY"]),
    ("", [], ["BOX_ARITY"]),
    ("[0.9, 0.8, 0.1, 0.2]", [(0.1, 0.2, 0.9, 0.8)], ["BOX_SWAP"]),
    ("[-0.02, 0.0, 1.03, 0.5]", [(0, 0, 1, 0.5)], ["BOX_CLIP"]),
    ("[12, 30, 560, 910]", [], ["BOX_RANGE"]),
    ("[0.5, 0.5, 0.5, 0.9]", [], ["BOX_EMPTY"]),
    ("[0.1,0.1,0.2,0.2];[0.3,0.3,0.4,0.4]", [(0.1, 0.1, 0.2, 0.2), (0.3, 0.3, 0.4, 0.4)], []),
]


@pytest.mark.parametrize("text, wanted, told", GOLDEN)
def test_golden_answers(text, wanted, told):
    answer = parse(text, UMM1)
    assert calls(answer) == wanted and codes(answer) == told


def test_what_is_said_is_kept():
    assert parse("ok </image_gen> fine", UMM1).text == "ok fine"
    assert parse("<teleport>x</teleport>", UMM1).text == "x"
    assert parse("A dog sits on a sofa.", UMM1).text == "A dog sits on a sofa."


@pytest.mark.parametrize("text, wanted, told", PLACES)
def test_golden_boxes(text, wanted, told):
    answer = parse(f"at <box>{text}</box>.", UMM1)
    assert [box for s in answer.segments if isinstance(s, Boxes) for box in s.boxes] == wanted
    assert codes(answer) == told and answer.text == "at ."
    (call,) = parse(f"<image_edit>recolour <box>{text}</box></image_edit>", UMM1).calls
    assert list(call.boxes) == wanted and call.flawed == (not wanted), "a box that is lost is told"


@pytest.mark.parametrize(
    "text, wanted, told",
    [
        ("{0.39, 0.45}", [(0.39, 0.45)], []),
        ("{0.5, 0.2}", [(0.2, 0.5)], ["TIME_SWAP"]),
        ("{0.5, 1.04}", [(0.5, 1.0)], ["TIME_CLIP"]),
        ("{0.5, 7}", [], ["TIME_RANGE"]),
        ("{0.5}", [], ["TIME_ARITY"]),
    ],
)
def test_spans(text, wanted, told):
    answer = parse(f"<video_edit>snow <time>{text}</time></video_edit>", UMM1)
    assert list(answer.calls[0].times) == wanted and codes(answer) == told


def test_a_thousand_is_a_scale_of_the_dialect_alone():
    import dataclasses

    thousand = dataclasses.replace(UMM1, scale=1000.0)
    (box,) = parse("<box>[12, 30, 560, 910]</box>", thousand).segments
    assert box == Boxes(((0.012, 0.03, 0.56, 0.91),))
    assert render(Answer((box,)), thousand) == "<box>[12, 30, 560, 910]</box>"


@pytest.mark.parametrize("text", [text for text, _, told in GOLDEN if told and told != ["STRAY_CLOSE"]])
def test_strict_reading_keeps_nothing_doubtful(text):
    answer = parse(text, UMM1, mode="strict")
    assert not answer.calls or codes(answer) == ["ALIAS", "ALIAS"]
    assert sound(answer) == (not {"ALIAS", "UNKNOWN_TAG", "BARE_SEG"} & set(codes(answer)))
    assert codes(answer) == codes(parse(text, UMM1))


def test_a_mark_in_a_call_that_gives_no_mask():
    edit = "<image_edit>darker [SEG]</image_edit>"
    assert calls(parse(edit, UMM1)) == [("image_edit", "darker", [], 1)], "the region of an edit"
    assert calls(parse("<image_gen>a [SEG]</image_gen>", UMM1)) == [("image_gen", "a", [], 0)]
    assert not sound(parse(edit, UMM1, mode="strict"))


def test_the_objects_of_a_layout():
    text = (
        "<layout_gen>still life <ref>an apple</ref><box>[0.1, 0.5, 0.2, 0.7]</box> "
        "<ref>a jug</ref><box>[0.5, 0.3, 0.7, 0.7]</box></layout_gen>"
    )
    (call,) = parse(text, UMM1).calls
    assert call.prompt == "still life"
    assert call.objects == (("an apple", ((0.1, 0.5, 0.2, 0.7),)), ("a jug", ((0.5, 0.3, 0.7, 0.7),)))


# --- other spellings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, wanted",
    [
        ("unifiedmllm", "<image_gen>a</image_gen>", [("image_gen", "a", [], 0)]),
        (
            "olympus",
            "<image_edit>b</image_edit><image_gen>a",
            [("image_edit", "b", [], 0), ("image_gen", "a", [], 0)],
        ),
        (
            "llmbind",
            "<gen>a cat</gen> and <aud_cap>rain</audio_cap>",
            [("image_gen", "a cat", [], 0), ("audio_gen", "rain", [], 0)],
        ),
        (
            "vitron",
            "Sure.<module>B</module><instruction>segmentation: the cat: left</instruction>",
            [("image_seg", "the cat: left", [], 0)],
        ),
        ("lisa", "Sure, it is [SEG].", [("image_seg", "", [], 1)]),
        (
            "glamm",
            "<p> A man </p> [SEG] with <p> a dog </p> [SEG]",
            [("image_seg", "A man", [], 1), ("image_seg", "a dog", [], 1)],
        ),
        (
            "nextgpt",
            "Here. [IMG0][IMG1][IMG2][IMG3] [AUD0]",
            [("image_gen", "", [], 0), ("audio_gen", "", [], 0)],
        ),
    ],
)
def test_other_dialects(name, text, wanted):
    answer = parse(text, dialects.get(name))
    assert calls(answer) == wanted
    assert not {"BARE_SEG", "UNKNOWN_TAG"} & set(codes(answer))


def test_bare_places():
    answer = parse("It is at [0.1, 0.2, 0.3, 0.4], from {0.2,0.5}; see [12].", dialects.get("groundinggpt"))
    assert [s for s in answer.segments if not isinstance(s, Text)] == [
        Boxes(((0.1, 0.2, 0.3, 0.4),)),
        Times(((0.2, 0.5),)),
    ]
    assert answer.text == "It is at , from ; see [12]." and not answer.diagnostics


def test_unknown_dialects_are_named():
    with pytest.raises(ConfigError, match="did you mean 'umm1'"):
        dialects.get("umm2")
    with pytest.raises(ConfigError, match="dialect 'lisa' cannot write open image_gen"):
        render(Answer((Call("image_gen", (Text("a"),)),)), dialects.get("lisa"))


# --- boxes of the square ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, height, wanted", [(640, 480, (0.25, 1 / 6, 0.75, 5 / 6)), (480, 640, (1 / 6, 0.25, 5 / 6, 0.75))]
)
def test_golden_squares(width, height, wanted):
    square = (0.25, 0.25, 0.75, 0.75)
    assert from_square(square, width, height) == pytest.approx(wanted)
    assert to_square(wanted, width, height) == pytest.approx(square)
    assert from_square((0, 0, 1, 1), width, height) == (0, 0, 1, 1), "what lies on the margin is cut off"


def test_whole_pixels():
    assert to_square((0.1, 0.1, 0.5, 0.5), 101, 50, whole=True) == (10 / 101, 30 / 101, 50 / 101, 50 / 101)


# --- there and back -----------------------------------------------------------------------------------------


def words(rng: random.Random) -> str:
    return " ".join(
        rng.choice(["a", "red", "mug [x]", "ünder", "1.5", "<", "{}", "half > two"])
        for _ in range(rng.randint(1, 4))
    )


def place(rng: random.Random):
    def box():
        x, y = rng.randint(0, 900), rng.randint(0, 900)
        return (x / 1000, y / 1000, rng.randint(x + 5, 1000) / 1000, rng.randint(y + 5, 1000) / 1000)

    match rng.randrange(3):
        case 0:
            return Ref(words(rng))
        case 1:
            return Boxes(tuple(box() for _ in range(rng.randint(1, 3))))
    start = rng.randint(0, 900)
    return Times(((start / 1000, rng.randint(start + 1, 1000) / 1000),))


def segment(rng: random.Random):
    if rng.random() < 0.4:
        return place(rng)
    task = rng.choice(list(TASKS))
    parts = [Text(words(rng)), *(place(rng) for _ in range(rng.randrange(3)))]
    if task in ("image_seg", "video_seg"):
        parts += [Seg()] * rng.randint(1, 3)
    return Call(task, tuple(parts))


def test_what_is_written_is_read_back():
    rng = random.Random(0)
    for _ in range(3000):
        segments = []
        for _ in range(rng.randint(0, 6)):
            segments += [segment(rng)]
            if rng.random() < 0.5:
                segments.append(Text(f" {words(rng)} "))
        answer = Answer(tuple(segments))
        assert parse(render(answer, UMM1), UMM1, mode="strict") == answer


def test_words_that_spell_a_tag_are_not_written():
    with pytest.raises(ValueError, match="would be read as a tag"):
        render(Answer((Text("type <image_gen> here"),)), UMM1)


# --- whatever comes -----------------------------------------------------------------------------------------

SCRAPS = [
    *UMM1.marks,
    *UMM1.aliases,
    "<",
    ">",
    "</",
    "[",
    "]",
    "{",
    "}",
    ";",
    ",",
    ":",
    "0.1",
    "[0.1, 0.2, 0.3, 0.4]",
    "{0.1, 0.9}",
]
SCRAPS += [
    "1e999",
    "-1",
    "nan",
    "9" * 400,
    " ",
    "\n",
    "\0",
    "é",
    "\u202e",
    "😀",
    "a red cup",
    "<x",
    "<|im_start|>",
    "</box",
    "[IMG0]",
    "<module>B</module>",
]
SCRAPS += [f"<box>{place}</box>" for place, _, _ in PLACES]
SCRAPS += [f"<time>{{{span}}}</time>" for span in ("0.9, 0.1", "0, 1.04", "0, 9", "1")]


def test_nothing_breaks_it():
    rng, tables = random.Random(1), list(dialects.DIALECTS.values())
    seen = set()
    for k in range(200_000):
        text = "".join(rng.choices(SCRAPS, k=rng.randint(0, 12)))
        answer = parse(text, UMM1 if k % 4 else rng.choice(tables), mode="lenient" if k % 8 else "strict")
        assert len(answer.calls) <= 8
        seen.update(codes(answer))
    assert len(seen) >= 18, sorted(seen)


@pytest.mark.parametrize(
    "piece",
    ["<x>a", "<", "[", "<box>", "[SEG]", "<image_gen>", "a", "[0.1,", "</", "<box>[0.1, 0.2, 0.3, 0.4]"],
)
def test_long_answers_take_time_in_proportion(piece):
    """A hundred thousand pieces, which anything quadratic would not finish in this test's life."""
    answer = parse(piece * 100_000, UMM1)
    assert len(answer.calls) <= 8


# --- token ids ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from umm_jax.data.tokenizer import Tokenizer

    path = tmp_path_factory.mktemp("t") / "t.model"
    texts = ["draw a red mug and a blue cup", "[0.123, 0.456, 0.789, 1.000]"]
    return Tokenizer.train(texts, path, ["<user>", *UMM1.tokens], 600, whole_words=False)


def test_a_user_who_types_every_tag_calls_nothing(tokenizer):
    marks = {tokenizer.id(token): token for token in UMM1.tokens}
    for token in UMM1.tokens:
        typed = f"please say {token} and <image_gen>a cat</image_gen> twice"
        ids = tokenizer.encode(typed)
        assert not set(ids) & set(marks)
        answer = parse(lex_ids(ids, marks, tokenizer.decode, UMM1), UMM1)
        assert not answer.calls and not answer.diagnostics


def test_ids_of_the_added_tokens_are_a_call(tokenizer):
    marks = {tokenizer.id(token): token for token in UMM1.tokens}
    ids = [
        *tokenizer.encode("sure"),
        tokenizer.id("<image_seg>"),
        *tokenizer.encode("a <image_gen> mug"),
        tokenizer.id("<box>"),
        *tokenizer.encode("[0.123, 0.456, 0.789, 1.000]"),
        tokenizer.id("</box>"),
        tokenizer.id("[SEG]"),
        tokenizer.id("</image_seg>"),
    ]
    answer = parse(lex_ids(ids, marks, tokenizer.decode, UMM1), UMM1)
    assert calls(answer) == [("image_seg", "a <image_gen> mug", [(0.123, 0.456, 0.789, 1.0)], 1)]
    assert answer.text == "sure" and not answer.diagnostics
