"""Shards, manifests and synthesis: same bytes however made, resumable, and clear about what is broken."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from umm_jax.conversation import Box, Conversation, Image, ImageData, Mask, RecordError, TaskCall, Text, Turn
from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.data.inspect import open_any, preview, show, stats, write_html
from umm_jax.data.making import make_records
from umm_jax.data.records import ShardWriter, file_sha256, open_source, write_manifest
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.errors import ConfigError, DataError, Interrupted, StorageError


class Make:
    """Conversation `index`; at module level, so that worker processes can be given it."""

    def __init__(self, seed: int = 0, fail_at: int = -1, die_at: int = -1, error: type = ValueError):
        self.seed, self.fail_at, self.die_at, self.error = seed, fail_at, die_at, error

    def __call__(self, index: int) -> Conversation:
        if index == self.fail_at:
            raise self.error("as told")
        if index == self.die_at:
            os._exit(9)
        rng = np.random.default_rng([self.seed, index])
        image = ImageData.from_array(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        turns = (
            Turn("user", (Text(f"draw {index}"),)),
            Turn("assistant", (Image("a"),), loss=True, op="draw"),
        )
        return Conversation(f"r{index}", turns, {"a": image})


HOW = {"source": "test", "seed": 0}


def make_folder(out: Path, count: int = 10, shards: int = 3, **options):
    return make_records(options.pop("make", Make()), count, out, how=HOW, shards=shards, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- writing --------------------------------------------------------------------------------------


def test_what_is_written_is_read_in_order(tmp_path):
    source = make_folder(tmp_path / "d", name="train")
    assert len(source) == 10
    assert list(source) == [Make()(index) for index in range(10)]
    assert Conversation.from_msgpack(source[7]).id == "r7"
    assert source.where(9).endswith("train-00002-of-00003.array_record, record 3")
    with pytest.raises(IndexError):
        source[10]
    manifest = json.loads((tmp_path / "d/manifest.json").read_text())
    assert [shard["records"] for shard in manifest["shards"]] == [3, 3, 4]
    assert manifest["how"]["how"] == HOW and manifest["schema"] == 1
    assert {p.name for p in (tmp_path / "d").iterdir()} == {"manifest.json"} | {
        f"train-0000{s}-of-00003.array_record" for s in range(3)
    }


def test_the_same_bytes_for_any_number_of_workers(tmp_path):
    seen = []
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "b", workers=2, progress=lambda done, count: seen.append((done, count)))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert seen[0] == (0, 10) and seen[-1] == (10, 10) and seen == sorted(seen)


def test_a_stopped_synthesis_keeps_its_finished_shards(tmp_path):
    out = tmp_path / "d"
    with pytest.raises(Interrupted, match="1 of 3 shards finished; run the same command again"):
        make_folder(out, make=Make(fail_at=5, error=KeyboardInterrupt))
    finished = {f"data-00000-of-00003.{ending}" for ending in ("array_record", "tally.json")}
    assert {p.name for p in out.iterdir()} == {"unfinished.json", *finished}
    with pytest.raises(DataError, match="not finished.*run the same"):
        open_source(out)
    first = (out / "data-00000-of-00003.array_record").stat()
    (out / "data-00001-of-00003.array_record.part").write_bytes(b"left by a killed run")
    make_folder(out)
    assert (out / "data-00000-of-00003.array_record").stat().st_mtime_ns == first.st_mtime_ns
    make_folder(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    make_folder(tmp_path / "d")
    before = contents(tmp_path / "d")
    assert len(make_folder(tmp_path / "d", make=Make(fail_at=0))) == 10  # nothing is made again
    assert contents(tmp_path / "d") == before


def test_another_recipe_is_refused(tmp_path):
    make_folder(tmp_path / "d")
    with pytest.raises(DataError, match=r"made another way \(count: 10 != 11\)"):
        make_folder(tmp_path / "d", count=11)
    with pytest.raises(DataError, match=r"how.seed: 0 != 1"):
        make_records(Make(1), 10, tmp_path / "d", how={**HOW, "seed": 1}, shards=3)
    (tmp_path / "e").mkdir()
    (tmp_path / "e/precious.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty, and not made here"):
        make_folder(tmp_path / "e")
    with pytest.raises(ConfigError, match="plain JSON"):
        make_records(Make(), 10, tmp_path / "f", how={"x": object()})
    with pytest.raises(ConfigError, match="positive"):
        make_folder(tmp_path / "f", count=0)


@pytest.mark.parametrize(
    "make, expected, message",
    [
        (Make(fail_at=5), RuntimeError, "as told"),
        (Make(fail_at=5, error=RecordError), RecordError, "as told"),
        (Make(die_at=5), DataError, "data-00001-of-00003.array_record died"),
    ],
)
def test_errors_of_workers_reach_the_caller(tmp_path, make, expected, message):
    with pytest.raises(expected, match=message):
        make_folder(tmp_path / "d", make=make, workers=2)
    assert not list((tmp_path / "d").glob("*.part")) and not (tmp_path / "d/manifest.json").exists()


def test_an_invalid_record_stops_the_shard(tmp_path):
    path = tmp_path / "x.array_record"
    with pytest.raises(RecordError, match="record bad: has no turns"):
        with ShardWriter(path) as writer:
            writer.write(Conversation("bad", ()))
    assert not list(tmp_path.iterdir())


# A file-size limit stands in for a full disk: the same failing write, without filling anything.
FULL = """
import resource, sys
from test_records import make_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    make_folder(__import__("pathlib").Path(sys.argv[1]), count=4000, shards=2)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", FULL, str(tmp_path / "d"), "100000"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "StorageError" in result.stdout and "free some space" in result.stdout, result
    assert {p.name for p in (tmp_path / "d").iterdir()} == {"unfinished.json"}


def test_a_killed_parent_leaves_no_worker_behind(tmp_path):
    script = (
        "import sys, time, test_records, pathlib\n"
        "test_records.make_folder(pathlib.Path(sys.argv[1]), count=1000000, shards=2, workers=2)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "d")], env=environment)
    try:
        wait_for(lambda: len(list((tmp_path / "d").glob("*.part"))) == 2)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    finally:
        parent.kill()
        parent.wait()
    assert len(children) >= 2
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def wait_for(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    write_atomic(tmp_path / "a", "one")
    with pytest.raises(StorageError, match="cannot be written"):
        write_atomic(tmp_path / "missing" / "a", "two")
    with pytest.raises(StorageError, match="the disk is full"):
        with storage_errors(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert contents(tmp_path) == {"a": b"one"}


# --- reading what is broken -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "d")
    return tmp_path / "d"


SHARD = "data-00001-of-00003.array_record"


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="no such data folder; make one with `umm data synthesize"):
        open_source(tmp_path / "nope")
    with pytest.raises(DataError, match="the data folder is empty"):
        open_source(tmp_path)
    (tmp_path / "x").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        open_source(tmp_path / "x")
    with pytest.raises(DataError, match="no manifest.json, so not a data folder"):
        open_source(tmp_path)


def test_missing_and_half_written_shards(folder):
    whole = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{SHARD}: half-written or damaged: 65536 bytes, expected 131072"):
        open_source(folder)
    (folder / SHARD).unlink()
    with pytest.raises(DataError, match=f"{SHARD}: the shard is missing"):
        open_source(folder)


def test_a_damaged_shard_of_the_right_size(folder):
    damaged = bytearray((folder / SHARD).read_bytes())
    damaged[100:140] = bytes(40)
    (folder / SHARD).write_bytes(damaged)
    with pytest.raises(DataError, match=f"{SHARD}: damaged: its sha256"):
        open_source(folder, verify=True)
    source = open_source(folder)
    assert source.conversation(0).id == "r0"
    with pytest.raises(DataError, match=f"{SHARD}, record .: cannot be read"):
        list(source)


def test_manifests_of_another_release_or_damaged(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for changes, message in [
        ({"schema": 99}, "written with schema 99, this release reads schema 1"),
        ({"records": 7}, "counts disagree"),
        ({"shards": [{}]}, "manifest.json: damaged"),
    ]:
        path.write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(DataError, match=message):
            open_source(folder)
    path.write_text(json.dumps(manifest)[:-9])
    with pytest.raises(DataError, match="manifest.json: damaged"):
        open_source(folder)


def write_raw(folder: Path, *values: bytes):
    """A finished folder with records that need not be conversations."""
    folder.mkdir()
    path = folder / "raw-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for value in values:
        writer.write(value)
    writer.close()
    with ShardWriter(folder / "spare") as spare:
        spare.write(Make()(0))
    (folder / "spare").unlink()
    shard = type(spare.shard)(path.name, len(values), path.stat().st_size, file_sha256(path))
    write_manifest(folder, "raw", [shard], {})


def test_a_broken_record_is_named(tmp_path):
    write_raw(tmp_path / "d", Make()(0).to_msgpack(), b"junk", Conversation("empty", ()).to_msgpack())
    source = open_source(tmp_path / "d")
    assert source.conversation(0).id == "r0"
    with pytest.raises(DataError, match="raw-00000-of-00001.array_record, record 1: not a"):
        source.conversation(1)
    with pytest.raises(DataError, match="record 2: record empty: has no turns"):
        source.conversation(2)


# --- looking --------------------------------------------------------------------------------------


def rich() -> Conversation:
    """A record with every kind of part, and text that would break a page."""
    image = ImageData.from_array(np.full((4, 6, 3), (10, 20, 30), np.uint8))
    region = np.zeros((4, 6), bool)
    region[1:3, 2:4] = True
    shown = (
        Text("<script>&"),
        Image("a"),
        Box("a", (0.25, 0, 0.5, 1), "<dot>"),
        Mask.from_array("a", region),
    )
    turns = (
        Turn("user", shown),
        Turn("assistant", (TaskCall("draw", {"n": 2}),), loss=True, depends_on=(0,)),
    )
    return Conversation("<r>", turns, {"a": image}, license="CC0-1.0", provenance=("made", "checked"))


def test_statistics_count_a_folder(folder, tmp_path):
    counts = stats(folder)
    assert counts["records"] == counts["read"] == 10 and "tokens per record" not in counts
    assert counts["op"] == {"draw": 10} and counts["image size"] == {"4 x 4": 10}
    tokenizer = Tokenizer.train(["draw 1", "draw 2"], tmp_path / "t.model", vocab=300)
    tokens = [len(tokenizer.encode(f"draw {index}")) for index in range(10)]
    assert stats(folder, tokenizer)["tokens per record"] == {"mean": sum(tokens) / 10, "max": max(tokens)}
    assert stats(folder, limit=4)["read"] == 4


def test_show_names_every_part():
    text = show(rich())
    for expected in (
        "record <r>",
        "license=CC0-1.0",
        "made > checked",
        "<script>&",
        "6 x 4 image/png",
        "box <dot> of a: 0.250, 0.000, 0.500, 1.000",
        "mask of a: 4 of 24 pixels",
        "task draw(n=2)",
        "learned, depends on 0",
    ):
        assert expected in text, expected
    assert "\x1b" not in text


def test_pictures_are_drawn_in_colour():
    assert "\x1b[38;2;10;20;30;48;2;10;20;30m\u2580" in show(rich(), colour=True)
    pixels = np.arange(2 * 50 * 3, dtype=np.uint8).reshape(2, 50, 3)
    assert [line.count("\u2580") for line in preview(pixels, 10).splitlines()] == [10]
    assert [line.count("\u2580") for line in preview(pixels[:, :3], 10).splitlines()] == [9] * 3


def test_files_of_conversations_are_opened(tmp_path):
    records = [Make()(index) for index in range(3)]
    lines = [record.to_json() for record in records]
    (tmp_path / "one.json").write_text(json.dumps(json.loads(lines[0]), indent=2))
    (tmp_path / "list.json").write_text(f"[{','.join(lines)}]")
    (tmp_path / "lines.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "all.msgpack").write_bytes(b"".join(record.to_msgpack() for record in records))
    assert list(open_any(tmp_path / "one.json")) == records[:1]
    for name in ("list.json", "lines.jsonl", "all.msgpack"):
        assert list(open_any(tmp_path / name)) == records
    (tmp_path / "lines.jsonl").write_text(lines[0] + "\n" + lines[1][:-9])
    (tmp_path / "all.msgpack").write_bytes(records[0].to_msgpack() + records[1].to_msgpack()[:-9])
    (tmp_path / "empty.json").write_text("")
    for name, message in [
        ("lines.jsonl", "lines.jsonl, line 2: not a JSON"),
        ("all.msgpack", "all.msgpack, record 1: damaged or half-written"),
        ("empty.json", "holds no conversations"),
        ("nope.json", "no such data folder"),
    ]:
        with pytest.raises(DataError, match=message):
            open_any(tmp_path / name)


def test_a_page_is_whole_and_escapes_its_text(tmp_path):
    path = tmp_path / "page.html"
    write_html([rich(), Make()(0)], path, title="a < b")
    page = path.read_text()
    assert "<script>" not in page and "&lt;script&gt;&amp;" in page and "a &lt; b" in page
    assert page.count("data:image/png;base64,") == 4 and "http" not in page
    assert "left:25.00%;top:0.00%;width:25.00%;height:100.00%" in page and "&lt;dot&gt; of a" in page
    assert page.count("<article>") == page.count("</article>") == 2
    assert page.count("<section") == page.count("</section>") == 4
