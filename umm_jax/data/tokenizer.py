"""Text to ids and back: a sentencepiece model in which user text can never become a control token."""

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from umm_jax.data.byte_pairs import BytePairs
from umm_jax.data.files import write_atomic
from umm_jax.errors import ConfigError, DataError

PAD, BOS, EOS, UNK = 0, 1, 2, 3  # of the tokenizers trained here; others say theirs by `id`
_SPACE = "\u2581"  # sentencepiece writes spaces so; in user text it must stay what it is


class Tokenizer:
    """Wraps a sentencepiece model.

    Control pieces (``<user>``, ``<image>``, ...) have ids, reached by :meth:`id` alone: the same letters in
    a text are encoded as letters. Every string that is valid Unicode decodes back to itself, because what
    the vocabulary lacks is spelt in UTF-8 bytes.
    """

    def __init__(self, model: bytes):
        self.model = model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._bytes = [self._pieces.piece_to_id(f"<0x{value:02X}>") for value in range(256)]

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer | BytePairs":
        """Reads a sentencepiece model, or a ``tokenizer.json`` under whatever name.

        Raises:
            DataError: missing, or neither. ConfigError: no library to read a tokenizer.json with.
        """
        try:
            model = Path(path).read_bytes()
            if not model.lstrip().startswith(b"{"):
                return cls(model)
        except OSError as error:
            raise DataError(f"tokenizer {path}: {error.strerror}") from None
        except RuntimeError:
            raise DataError(f"tokenizer {path}: not a sentencepiece model, or damaged") from None
        try:
            return BytePairs(model)
        except DataError as error:
            raise DataError(f"tokenizer {path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes the model file, whole or not at all. Raises StorageError."""
        write_atomic(path, self.model)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without beginning- or end-of-sequence."""
        text, found, rest = text.partition(_SPACE)
        ids = self._pieces.encode(text)
        # The library cannot tell a literal space mark from a space; bytes can.
        return ids + [self._bytes[value] for value in (found + rest).encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control pieces are left out."""
        return self._pieces.decode([int(i) for i in ids])

    def id(self, piece: str) -> int:
        """Id of a control piece (or of pad, bos, eos, unk). Raises ConfigError if there is none such."""
        found = self._pieces.piece_to_id(piece)
        if found == self._pieces.unk_id() and piece != self._pieces.id_to_piece(found):
            raise ConfigError(f"the tokenizer has no piece {piece!r}; train it with this control piece")
        return found

    def piece(self, index: int) -> str:
        """The name of an id, for display."""
        return self._pieces.id_to_piece(int(index))

    @property
    def size(self) -> int:
        """Number of ids: the height of an embedding table."""
        return self._pieces.get_piece_size()

    def extended(self, pieces: Sequence[str]) -> "Tokenizer":
        """This tokenizer with more control pieces, at the end: all other ids stay, and no text reaches them.

        Raises:
            ConfigError: a piece that is there already.
        """
        there = [piece for piece in pieces if self._pieces.piece_to_id(piece) != self._pieces.unk_id()]
        if there or len(set(pieces)) < len(pieces):
            raise ConfigError(f"the tokenizer has {', '.join(there or pieces)} already")
        return Tokenizer(self.model + b"".join(_control_piece(piece) for piece in pieces))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        path: str | Path,
        control: Sequence[str] = (),
        vocab: int = 4096,
        *,
        whole_words: bool = True,
    ) -> "Tokenizer":
        """Trains byte-pair merges on `texts` and writes the model to `path`; deterministic.

        Ids: pad 0, bos 1, eos 2, unk 3, then `control` in the order given, then 256 bytes, then merges.

        Args:
            vocab: upper bound of the size; a small corpus may need fewer pieces.
            whole_words: promises that every word of the corpus (between white space, punctuation and all)
                is one piece. Switch it off for natural text, where rare words are to be split.

        Raises:
            ConfigError: no text, repeated control pieces, or a `vocab` too small for what was asked.
        """
        # Equal sentences add nothing but time: a closed grammar repeats itself, and order must not matter.
        texts = sorted({text.replace("\n", " ") for text in texts} - {""})
        if not any(text.strip() for text in texts):
            raise ConfigError("a tokenizer cannot be trained without text")
        if len(set(control)) < len(control):
            raise ConfigError(f"control pieces are repeated: {sorted(control)}")
        model = _Buffer()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=1.0,
                control_symbols=list(control),
                pad_id=PAD,
                bos_id=BOS,
                eos_id=EOS,
                unk_id=UNK,
                pad_piece="<pad>",
                # Nothing is normalised away, or texts would not come back as they were.
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                split_by_unicode_script=not whole_words,
                split_by_number=not whole_words,
                max_sentencepiece_length=64 if whole_words else 16,
                max_sentence_length=1 << 20,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ConfigError(f"no tokenizer of {vocab} pieces can be trained here: {reason}") from None
        tokenizer = cls(b"".join(model.chunks))
        if whole_words:
            words = sorted({word for text in texts for word in text.split()})
            split = [word for word in words if len(tokenizer.encode(word)) != 1]
            if split:
                raise ConfigError(
                    f"{len(split)} of {len(words)} words (such as {split[0]!r}) do not fit as one piece each "
                    f"into a vocabulary of {vocab}; make it larger, or train with whole_words=False"
                )
        tokenizer.save(path)
        return tokenizer


def _control_piece(piece: str) -> bytes:
    """One more piece in the bytes of a sentencepiece model.

    The model is a protocol buffer whose field 1 is a repeated {1: piece, 2: score, 3: type}, where type 3 is
    "control". Repeated fields may stand anywhere in a buffer, so a piece is added by writing it at the end.
    """

    def field(number: int, data: bytes) -> bytes:
        length, size = b"", len(data)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + data

    score, kind = struct.pack("<Bf", 2 << 3 | 5, 0.0), bytes([3 << 3, 3])
    return field(1, field(1, piece.encode()) + score + kind)


class _Buffer:
    """What the trainer writes to: it asks for nothing but `write`."""

    def __init__(self):
        self.chunks: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.chunks.append(data)
