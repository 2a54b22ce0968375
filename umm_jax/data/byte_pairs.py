"""Byte-pair tokenizers of ``tokenizer.json`` files (Qwen2.5's, say), behind the face of ``Tokenizer``.

Read by the ``tokenizers`` library, which is installed where ``transformers`` is.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umm_jax.data.files import write_atomic
from umm_jax.errors import ConfigError, DataError


class BytePairs:
    """A ``tokenizer.json``; the methods are those of ``data.tokenizer.Tokenizer``.

    Every added token counts as special, and special tokens in a text are encoded as letters: what a user
    types is never a control token.
    """

    def __init__(self, model: bytes):
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(
                "a tokenizer.json needs the library tokenizers, which is not there: pip install tokenizers"
            ) from None
        self.model = model
        try:
            plain = json.loads(model)
            self._added = {token["content"]: token["id"] for token in plain.get("added_tokens", ())}
            for token in plain.get("added_tokens", ()):
                token["special"] = True
            self._pieces = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises plain Exceptions for whatever a file lacks
            raise DataError(f"not a tokenizer.json, or damaged ({str(error)[:100]})") from None
        self._pieces.encode_special_tokens = True

    def __reduce__(self) -> Any:
        return BytePairs, (self.model,)

    def save(self, path: str | Path) -> None:
        """Writes the file as it was read, whole or not at all. Raises StorageError."""
        write_atomic(path, self.model)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self._pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out."""
        return self._pieces.decode([int(i) for i in ids], skip_special_tokens=True)

    def id(self, piece: str) -> int:
        """Id of an added token. Raises ConfigError if there is none such."""
        if piece not in self._added:
            raise ConfigError(f"the tokenizer has no special token {piece!r}")
        return self._added[piece]

    def piece(self, index: int) -> str:
        """The name of an id, for display."""
        return self._pieces.id_to_token(int(index)) or f"<{int(index)}>"

    @property
    def size(self) -> int:
        """One more than the largest id."""
        vocabulary = self._pieces.get_vocab(with_added_tokens=True)
        return max(vocabulary.values()) + 1

    def extended(self, pieces: Sequence[str]) -> "BytePairs":
        """Raises ConfigError: a released vocabulary is not added to."""
        raise ConfigError(f"{', '.join(pieces)} cannot be added to a tokenizer.json; give one that has them")
