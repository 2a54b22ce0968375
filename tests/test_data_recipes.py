"""The recipes in the top-level folder data/."""

import importlib.util
from pathlib import Path

import pytest
from test_synthesis import record

from umm_jax.conversation import Conversation
from umm_jax.data.making import make_records
from umm_jax.data.records import open_source

RECIPES = Path(__file__).parents[1] / "data"


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_data_set_of_tfds_holds_the_same_records(tmp_path, capsys):
    tfds = pytest.importorskip("tensorflow_datasets")
    found = [
        record(f"r{k}", (["a", f"what is {k}"], ["b"], "edit"), split="val" if k == 3 else "train")
        for k in range(5)
    ]
    for name, chosen in (("x", found[:2]), ("y", found[2:])):
        make_records(lambda k, chosen=chosen: chosen[k], len(chosen), tmp_path / name, how={}, shards=1)
    module = recipe("conversations_tfds")
    words = [str(tmp_path / "x"), str(tmp_path / "y"), f"--out={tmp_path / 'out'}"]
    assert module.main(words) == 0
    assert "4 in train, 1 in val" in capsys.readouterr().out
    source = tfds.builder_from_directory(tmp_path / "out" / "conversations" / "1.0.0").as_data_source()
    records = {split: [Conversation.from_msgpack(e["record"]) for e in source[split]] for split in source}
    assert sorted(r.id for r in records["train"]) == ["r0", "r1", "r2", "r4"]
    assert records["val"] == [found[3]]
    by_id = {r.id: r for r in records["train"]}
    assert all(by_id[r.id] == r for name in "xy" for r in open_source(tmp_path / name) if r.split == "train")
    assert source["val"][0]["license"] == b"MIT"
    assert module.main(words) == 2 and "is there already" in capsys.readouterr().err
    assert module.main([str(tmp_path / "gone"), f"--out={tmp_path / 'o'}"]) == 3
    assert "no such data folder" in capsys.readouterr().err
