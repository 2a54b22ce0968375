"""Any prepared data set of TensorFlow Datasets, laid out by templates; read without TensorFlow.

    ~/tensorflow_datasets/beans/0.1.0/          the path: one version of one data set
        dataset_info.json, features.json, label.labels.txt
        beans-train.array_record-00000-of-00002, ...

It must have been prepared as array_record: download_and_prepare(file_format="array_record").
Templates are those of `table`; columns are the features, "a/b" those of a feature in another. Pictures stay
encoded as they were stored, texts are UTF-8, and a class is written as its name where the data set has names.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from umm_jax.data.entries import Entry, extra
from umm_jax.data.importers import table
from umm_jax.data.importing import Draft
from umm_jax.errors import ConfigError, DataError

VERSION = 1
LICENSE = ""


@dataclass(frozen=True)
class Settings:
    """How an example is laid out; see ``table.Settings``.

    Attributes:
        user, assistant: templates of the two turns of an exchange.
        document: template of the one turn of a document.
        op: what the assistant does.
        pictures: columns of encoded pictures that are no Image to the data set, but plain bytes.
        labels: names of the classes by column, where the data set has no (or other) names for them.
        split: which examples, as TensorFlow Datasets writes it: "train", "test[:10%]".
    """

    user: str | None = None
    assistant: str | None = None
    document: str | None = None
    op: str | None = None
    pictures: tuple[str, ...] = ()
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    split: str = "train"

    def __post_init__(self):
        table.check(self)


def entries(path: Path, settings: Settings) -> "Examples":
    return Examples(path, settings.split, tuple(settings.labels))


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The example by its templates."""
    table.add_turns(entry, settings, set(entry) - set(settings.pictures), draft)


class Examples(Sequence):
    """Examples of a prepared data set as entries. Pickles as a path, and is opened again when needed.

    Args:
        path: the folder of a version.
        labelled: columns whose classes stay numbers.

    Raises:
        DataError: no prepared data set, or none that can be read at random. ConfigError: no such split.
    """

    def __init__(self, path: Path, split: str, labelled: Sequence[str]):
        self._path, self._split, self._labelled = path, split, labelled
        self._opened: tuple | None = None
        self._length = len(self._open()[0])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Entry:
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        source, columns, file = self._open()
        example = extra("tensorflow_datasets.proto", *_NEEDED).tf_example_pb2.Example()
        try:
            example.ParseFromString(bytes(source[index]))
        except Exception as error:  # its readers raise many kinds, all of which mean the same here
            raise DataError(f"{file}: example {index} cannot be read: {error}") from None
        return Entry(file, "example", index, dict(_values(example.features.feature, columns, self._labelled)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def digest(self) -> str:
        """Tells these examples from others, by split, and names and sizes of files."""
        files = sorted([file.name, file.stat().st_size] for file in self._path.iterdir() if file.is_file())
        facts = json.dumps([self._split, self._length, files])
        return f"{self._length} examples, {hashlib.sha256(facts.encode()).hexdigest()[:16]}"

    def _open(self) -> tuple[Sequence[bytes], dict[str, tuple[Any, bool]], Path]:
        """(examples as bytes, columns, what the entries name as their file)."""
        if self._opened is None:
            tfds = extra("tensorflow_datasets", *_NEEDED)
            _check_classes(self._path)
            try:
                builder = tfds.builder_from_directory(str(self._path))
            except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
                raise DataError(f"{self._path}: no prepared data set that can be read: {error}") from None
            if getattr(builder.info.file_format, "value", None) != "array_record":
                # Of parquet, tfds would give all examples whatever part of a split was asked for.
                raise DataError(f"{self._path}: not array_record; {_PREPARE}")
            raw = tfds.decode.DeserializeMethod.RAW_BYTES  # else it would decode pictures
            try:
                source = builder.as_data_source(self._split, deserialize_method=raw)
            except (ValueError, KeyError, AssertionError) as error:
                known = ", ".join(builder.info.splits)
                raise ConfigError(f"split {self._split!r} is no part of {known}: {error}") from None
            columns = dict(_columns(builder.info.features, tfds.features))
            self._opened = (source, columns, self._path / f"{builder.name}-{self._split}")
        return self._opened


_PREPARE = 'prepare it by download_and_prepare(file_format="array_record")'
_NEEDED = ("data sets of TensorFlow Datasets", "tensorflow-datasets", "tfds")


def _check_classes(path: Path) -> None:
    """Raises DataError where features.json names classes of others: their modules would be imported."""
    try:
        pending = [json.loads((path / "features.json").read_bytes())]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: no prepared data set; its features.json cannot be read: {error}") from None
    while pending:
        match pending.pop():
            case dict(inner):
                for key, value in inner.items():
                    named = key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str)
                    if named and "." in value and not value.startswith("tensorflow_datasets."):
                        raise DataError(f"{path}: a feature of class {value!r}, whose code is not run")
                    pending.append(value)
            case list(inner):
                pending += inner
            case str(text) if text.lstrip().startswith("{"):
                try:
                    pending.append(json.loads(text))  # some features are JSON within JSON
                except (ValueError, RecursionError):
                    pass


def _columns(feature: Any, features: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, bool]]]:
    """(name, (feature, whether there are several values)) of all that is not made of others."""
    several = False
    while isinstance(feature, features.Sequence):
        feature, several = feature.feature, True
    if isinstance(feature, features.FeaturesDict):
        for key, inner in feature.items():
            for column, (kind, many) in _columns(inner, features, f"{name}/{key}" if name else key):
                yield column, (kind, many or several)
    else:
        stored = feature.get_serialized_info()
        yield name, (feature, several or getattr(stored, "shape", None) != ())


def _values(
    stored: Mapping[str, Any], columns: Mapping[str, tuple[Any, bool]], labelled: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """The columns of an example. What has no value is None, and so is an unknown class (stored as -1)."""
    features = extra("tensorflow_datasets", *_NEEDED).features
    for name, (feature, several) in columns.items():
        kind = stored[name].WhichOneof("kind") if name in stored else None
        found = [] if kind is None else list(getattr(stored[name], kind).value)
        if kind == "float_list":
            found = [float(str(np.float32(value))) for value in found]  # 0.1, not 0.10000000149011612
        if isinstance(feature, features.Image):
            found = [{"bytes": value, "path": None} for value in found]
        elif isinstance(feature, features.ClassLabel) and name not in labelled:
            names = feature.names
            found = [names[value] if 0 <= value < len(names) else None for value in found]
        elif getattr(feature, "np_dtype", None) == np.bool_:
            found = [bool(value) for value in found]
        yield name, found if several else next(iter(found), None)
