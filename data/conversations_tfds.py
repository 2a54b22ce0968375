"""Finished folders of records as a data set of TensorFlow Datasets, for those whose readers expect one.

    python data/conversations_tfds.py data/own data/dialogues --out=tfds

    source = tfds.builder_from_directory("tfds/conversations/1.0.0").as_data_source("train")
    Conversation.from_msgpack(source[0]["record"])

Needs `pip install 'umm_jax[tfds]'`, and no TensorFlow: files are ArrayRecord, and a record stays the bytes it
is, pictures in it as they are encoded. Splits are those the records name.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from umm_jax.conversation import Conversation
from umm_jax.data.records import open_source
from umm_jax.errors import ConfigError, UserError


class Conversations(tfds.core.GeneratorBasedBuilder):
    """Records with their ids, sources and licences beside them; see ``umm_jax.conversation``."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folders: tuple[str, ...] = (), **options):
        """`folders` are read when the data set is prepared."""
        self._folders = tuple(folders)
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        columns = {
            "id": text(doc="unique in its folder"),
            "source": text(doc="where it comes from"),
            "license": text(doc="under which terms it may be used"),
            "record": tfds.features.Scalar(np.object_, doc="msgpack, see Conversation.from_msgpack"),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(columns))

    def _split_generators(self, manager):
        splits = {record.split for folder in self._folders for record in open_source(folder)}
        return {split: self._generate_examples(split) for split in sorted(splits)}

    def _generate_examples(self, split: str):
        for number, folder in enumerate(self._folders):
            for index, record in enumerate(open_source(folder)):
                if record.split == split:
                    facts = {name: getattr(record, name) for name in ("id", "source", "license")}
                    yield f"{number}/{index}", {**facts, "record": record.to_msgpack()}


def prepare(folders: list[str], out: str) -> Path:
    """Writes the data set below `out` and gives its folder.

    Raises:
        DataError: a folder that is not finished. ConfigError: it was prepared from something else before.
    """
    for folder in folders:
        open_source(folder)
    builder = Conversations(folders=tuple(folders), data_dir=out, file_format="array_record")
    if Path(builder.data_dir).exists():
        raise ConfigError(f"{builder.data_dir}: is there already; delete it, or choose another --out")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", help="finished folders of records")
    parser.add_argument("--out", required=True, help="folder that data sets lie in")
    args = parser.parse_args(words)
    try:
        folder = prepare(args.folders, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    source = tfds.builder_from_directory(folder).as_data_source()
    sizes = ", ".join(f"{len(examples)} in {split}" for split, examples in source.items())
    first = next(iter(source.values()))[0]
    print(f"{folder}: {sizes}; the first is {Conversation.from_msgpack(first['record']).id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
