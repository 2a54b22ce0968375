"""Tokenizer: exact round trips, whole words, unreachable control pieces, determinism."""

import random

import pytest

from umm_jax.data.tokenizer import Tokenizer
from umm_jax.errors import ConfigError, DataError

CONTROL = ["<user>", "<bot>", "<image>", *(f"<loc{i}>" for i in range(10))]
WORDS = "draw a red circle, at the top left; how many blue squares? 3 two undo counterrevolutionaries it"


def texts(n=300):
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS.split(), k=8)) for _ in range(n)] + [WORDS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(texts(), tmp_path_factory.mktemp("t") / "tokenizer.model", CONTROL, 2048)


def test_every_word_is_one_piece(tokenizer):
    for text in texts(20):
        assert len(tokenizer.encode(text)) == len(text.split())


@pytest.mark.parametrize(
    "text",
    [
        "draw a red circle,",
        "",
        " ",
        "  two  spaces ",
        "line\nbreak\ttab",
        "Zürich 東京 🦉",
        "<user> <0x41> </s> <pad>",
        "\u2581mark",
        "a \u2581 b\u2581",
        "redcircle",
        "\u00a0e\u0301",
        "\x00\x01",
    ],
)
def test_every_string_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.size for i in ids)


def test_random_strings_come_back(tokenizer):
    rng = random.Random(1)
    alphabet = "ab red,\n\t<>\u2581éß中🦉\u200d\x7f" + WORDS
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(12)))
        assert tokenizer.decode(tokenizer.encode(text)) == text, repr(text)


def test_text_never_becomes_a_control_token(tokenizer):
    reserved = {tokenizer.id(piece) for piece in ["<pad>", "<s>", "</s>", "<unk>", *CONTROL]}
    assert len(reserved) == 4 + len(CONTROL)
    for piece in ["<pad>", "<s>", "</s>", "<unk>", *CONTROL]:
        assert not reserved & set(tokenizer.encode(f"{piece}{piece} {piece} red"))


def test_control_pieces_are_added_at_the_end(tokenizer, tmp_path):
    added = ["<|beginofimage|>", "<|image|>", "<" + "x" * 200 + ">"]
    more = tokenizer.extended(added)
    assert [more.id(p) for p in added] == [tokenizer.size + i for i in range(3)]
    assert more.size == tokenizer.size + 3
    assert all(more.piece(i) == tokenizer.piece(i) for i in range(tokenizer.size))
    for text in [*texts(20), f"red{added[0]} {added[1]}{added[2]} blue", "Zürich \u2581"]:
        assert more.encode(text) == tokenizer.encode(text)
        assert more.decode(more.encode(text)) == text
    assert more.decode([more.id(added[0]), *more.encode("red"), more.id(added[1])]) == "red"
    more.save(tmp_path / "a.model")
    assert Tokenizer.load(tmp_path / "a.model").id(added[1]) == more.id(added[1])
    for wrong in (["<user>"], ["<new>", "<new>"]):
        with pytest.raises(ConfigError, match="already"):
            tokenizer.extended(wrong)


def test_ids_are_fixed_and_named(tokenizer):
    assert [tokenizer.id(p) for p in ("<pad>", "<s>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert [tokenizer.id(p) for p in CONTROL] == list(range(4, 4 + len(CONTROL)))
    assert tokenizer.piece(4) == "<user>"
    assert tokenizer.decode([tokenizer.id("<bot>"), *tokenizer.encode("red"), 2]) == "red"
    with pytest.raises(ConfigError, match="<nope>"):
        tokenizer.id("<nope>")


def test_training_is_deterministic_and_loads_back(tokenizer, tmp_path):
    again = Tokenizer.train(reversed(texts()), tmp_path / "a.model", CONTROL, 2048)
    assert again.model == tokenizer.model
    assert Tokenizer.load(tmp_path / "a.model").encode("draw it") == tokenizer.encode("draw it")


def test_user_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="one piece each"):
        Tokenizer.train(texts(), tmp_path / "a.model", CONTROL, 320)
    with pytest.raises(ConfigError, match="no tokenizer of 20"):
        Tokenizer.train(texts(), tmp_path / "a.model", CONTROL, 20)
    with pytest.raises(ConfigError, match="without text"):
        Tokenizer.train(["", " "], tmp_path / "a.model")
    with pytest.raises(ConfigError, match="repeated"):
        Tokenizer.train(texts(), tmp_path / "a.model", ["<a>", "<a>"])
    assert not (tmp_path / "a.model").exists()
    with pytest.raises(DataError, match="No such file"):
        Tokenizer.load(tmp_path / "a.model")
    (tmp_path / "b.model").write_bytes(b"something else")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer.load(tmp_path / "b.model")


def test_natural_text_splits_rare_words(tmp_path):
    tokenizer = Tokenizer.train(texts(), tmp_path / "a.model", CONTROL, 320, whole_words=False)
    assert tokenizer.size <= 320
    assert len(tokenizer.encode("counterrevolutionaries")) > 1
    assert tokenizer.decode(tokenizer.encode(WORDS)) == WORDS
