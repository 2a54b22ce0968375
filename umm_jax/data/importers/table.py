"""Any table with pictures: parquet, arrow, JSON lines or webdataset, laid out by templates.

    {"image": {"bytes": b"...", "path": "7.jpg"}, "label": 3}      a row, as the datasets library writes it
    user="{image} What is this?", assistant="A {label}.", labels={"label": ["cat", "dog", "cow", "horse"]}

Names in braces are columns ({{ is a brace). A picture comes as bytes, as {"bytes": ..., "path": ...}, or as a
name below the folder of pictures, whose column is then listed in `pictures`; there may be a list of them.
Texts and numbers are written as they are. Blanks where a text begins or ends are left off. Of a folder that
the datasets library saved, the folder of one split is the path; of webdataset, endings of files are columns.
"""

import math
import string
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.conversation import Image
from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, want
from umm_jax.data.quarantine import Rejected
from umm_jax.errors import ConfigError

VERSION = 1
LICENSE = ""


@dataclass(frozen=True)
class Settings:
    """How a row is laid out: as an exchange, or as a document.

    Attributes:
        user, assistant: templates of the two turns of an exchange.
        document: template of the one turn of a document.
        op: what the assistant does, "draw" say.
        pictures: columns whose texts are names of pictures.
        texts: columns whose bytes are texts in UTF-8; those of others are pictures.
        labels: names of the classes by column, so that a class that is a number becomes a word.
    """

    user: str | None = None
    assistant: str | None = None
    document: str | None = None
    op: str | None = None
    pictures: tuple[str, ...] = ()
    texts: tuple[str, ...] = ("txt",)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self):
        check(self)


def entries(path: Path, settings: Settings) -> Entries:
    # data-*.arrow and dataset.arrow are saved data sets; beside them may lie tables of indices and caches.
    return Entries(path, ("*.parquet", "data-*.arrow", "dataset.arrow", "*.jsonl", "*.tar"))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The row by its templates."""
    add_turns(entry, settings, settings.texts, draft)


# --- templates; for tfds too --------------------------------------------------------------------------


class Template:
    """A text with columns in braces. Raises ConfigError if it is none; `name` is the setting's."""

    def __init__(self, name: str, text: str):
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"{name}={text!r} is no template: {error}") from None
        # (text, the column after it)
        self.pieces = [(before, column) for before, column, _, _ in parsed]
        self.columns = [column for _, column in self.pieces if column is not None]
        if any(form or change for _, _, form, change in parsed) or any(
            set(".[") & {*c} for c in self.columns
        ):
            raise ConfigError(
                f"{name}={text!r}: only names of columns go into braces, no '.', '[', '!' or ':'"
            )
        if "" in self.columns:
            raise ConfigError(
                f"{name}={text!r}: braces without the name of a column; a brace is written {{{{"
            )


def check(settings: Any) -> None:
    """Raises ConfigError unless the templates of a Settings say what a row becomes, of columns they have."""
    given = {name for name in ("user", "assistant", "document") if getattr(settings, name) is not None}
    if given not in ({"user", "assistant"}, {"document"}):
        said = ", ".join(sorted(given)) or "none"
        raise ConfigError(f"give the templates user and assistant, or document alone; given: {said}")
    columns = {column for name in given for column in Template(name, getattr(settings, name)).columns}
    if not columns:
        raise ConfigError("no template has a column in braces: all rows would be the same")
    for name in ("pictures", "labels"):
        if unused := set(getattr(settings, name)) - columns:
            raise ConfigError(f"{name}: {sorted(unused)[0]!r} stands in no template")
    if both := set(settings.pictures) & set(settings.labels):
        raise ConfigError(f"{sorted(both)[0]!r} stands in pictures and in labels")


def add_turns(entry: Mapping[str, Any], settings: Any, texts: Collection[str], draft: Draft) -> None:
    """The turns that the templates of a Settings make of a row; bytes of the columns `texts` are texts."""
    for role in ("document", "user", "assistant"):
        if (text := getattr(settings, role)) is not None:
            parts = _filled(Template(role, text), entry, settings, texts, draft)
            draft.turn(role, *parts, op=None if role == "user" else settings.op)


def _filled(
    template: Template, entry: Mapping[str, Any], settings: Any, texts: Collection[str], draft: Draft
) -> Iterator[str | Image]:
    text = ""
    for before, column in template.pieces:
        text += before
        for part in () if column is None else _values(entry, column, settings, texts):
            if isinstance(part, str):
                text += part
                continue
            yield text.strip()
            yield draft.image(part[0])
            text = ""
    yield text.strip()


def _values(
    entry: Mapping[str, Any], column: str, settings: Any, texts: Collection[str]
) -> list[str | tuple[Any]]:
    """What a column says: one text, or pictures, each in a tuple."""
    value = want(entry, column, (str, int, float, bool, bytes, dict, list))
    if column in settings.labels:
        return [_label(value, column, settings.labels[column])]
    named, written = column in settings.pictures, column in texts
    if named or isinstance(value, (dict, list)) or (isinstance(value, bytes) and not written):
        several = value if isinstance(value, list) else [value]
        if not several:
            raise Rejected("missing picture", f"{column!r} is a list of no pictures")
        kinds = (bytes, dict, str) if named else (dict,) if written else (bytes, dict)
        if not all(isinstance(one, kinds) for one in several):
            cause = (
                f"{column!r} must be pictures, got {str(value)[:200]!r}; 'pictures' lists columns of names"
            )
            raise Rejected("field of another type", cause)
        return [(one,) for one in several]
    if isinstance(value, bytes):
        try:
            return [value.decode()]
        except UnicodeDecodeError as error:
            raise Rejected("text that is no Unicode", f"{column!r}: {error}") from None
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        cause = f"{column!r} must be a text, a number or pictures, got {value}; 'labels' puts words for it"
        raise Rejected("field of another type", cause)
    return [str(value)]


def _label(value: Any, column: str, names: tuple[str, ...]) -> str:
    if isinstance(value, bytes) and value.strip().isdigit() and len(value) < 20:
        value = int(value)  # a .cls file of webdataset
    if not isinstance(value, int):
        raise Rejected("field of another type", f"{column!r} must be a class, got {str(value)[:200]!r}")
    if not 0 <= value < len(names):
        raise Rejected("index out of range", f"{column!r} is {value}, there are {len(names)} labels")
    return names[value]
