"""Tokenizers of tokenizer.json files: letters stay letters, and every text comes back."""

import json
import pickle

import pytest

from umm_jax.data.tokenizer import Tokenizer
from umm_jax.errors import ConfigError, DataError

tokenizers = pytest.importorskip(
    "tokenizers", reason="tokenizers is not installed (it comes with transformers)"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small one of Qwen2.5's kind: bytes, merges, special tokens behind them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["draw a red circle", "make the red circle blue"] * 4, trainer)
    made.add_special_tokens(SPECIAL)
    made.add_tokens(["<tool>"])  # added and, in the file, not special
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_every_text_comes_back(path):
    tokenizer = Tokenizer.load(path)
    for text in ("draw a red circle", "  two  blanks ", "Ärger 画 🙂\n\ttab", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("red circle")) < len("red circle")
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("red circle") == tokenizer.encode("red circle")


def test_what_a_user_types_is_never_a_control_token(path):
    tokenizer = Tokenizer.load(path)
    ids = {tokenizer.id(piece) for piece in (*SPECIAL, "<tool>")}
    assert len(ids) == 6 and max(ids) == tokenizer.size - 1
    for piece in (*SPECIAL, "<tool>"):
        typed = tokenizer.encode(f"draw {piece} now")
        assert not ids & set(typed)
        assert tokenizer.decode(typed) == f"draw {piece} now"
    assert tokenizer.decode([tokenizer.id("<|im_start|>"), *tokenizer.encode("red")]) == "red"
    with pytest.raises(ConfigError, match="no special token '<user>'"):
        tokenizer.id("<user>")
    with pytest.raises(ConfigError, match="cannot be added"):
        tokenizer.extended(["<user>"])


def test_a_damaged_file_is_named(path, tmp_path):
    broken = tmp_path / "tokenizer.json"
    broken.write_text(path.read_text()[:200])
    with pytest.raises(DataError, match="tokenizer.json: not a tokenizer.json, or damaged"):
        Tokenizer.load(broken)
    broken.write_text(json.dumps({"model": {"type": "what"}}))
    with pytest.raises(DataError, match="damaged"):
        Tokenizer.load(broken)
