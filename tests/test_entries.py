"""Annotations of every kind of file as entries: what they hold, where they stand, how files break."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
from importing_toy import write_lines, write_list, write_parquet

from umm_jax.data import entries
from umm_jax.data.entries import Entries, parse
from umm_jax.data.quarantine import Rejected
from umm_jax.errors import DataError


def values(found: Entries) -> list:
    return [found[index].value() for index in range(len(found))]


# --- lines ----------------------------------------------------------------------------------------------


def pack(file: Path, name: str = "") -> Path:
    packed = file.with_name(file.name + ".zip")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, name or file.name)
    file.unlink()
    return packed


def test_packed_and_plain_files_of_a_folder_are_read_in_order(tmp_path):
    for shard in range(3):
        write_lines(tmp_path / f"docs_{shard}.jsonl", *({"k": [shard, n]} for n in range(shard + 1)))
    pack(tmp_path / "docs_1.jsonl")
    pack(tmp_path / "docs_2.jsonl", "other/name.jsonl")
    (tmp_path / "README.txt").write_text("no annotations")
    found = Entries(tmp_path, ["docs_*.jsonl", "docs_*.jsonl.zip"])
    assert values(found) == [{"k": [s, n]} for s in range(3) for n in range(s + 1)]
    assert [found[k].name for k in (0, 5)] == ["docs_0-1", "docs_2-3"], "lines are counted as an editor does"
    assert found[5].where == f"{tmp_path / 'docs_2.jsonl.zip'}, line 3"
    assert found[0].value() == {"k": [0, 0]}, "back to the first file"
    with pytest.raises(IndexError):
        found[6]


def test_blank_lines_and_bytes_that_are_no_unicode(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b'\n{"a": 1}\r\n   \n{"a": "\xff"}\n{"a": "\xc3\xa9"}')
    found = Entries(file, ())
    assert [found[k].number for k in range(len(found))] == [2, 4, 5]
    assert found[0].value() == {"a": 1} and found[2].value() == {"a": "é"}
    with pytest.raises(Rejected) as caught:
        found[1].value()
    assert caught.value.reason == "not JSON"


def test_one_file_is_open_at_a_time_and_copies_open_their_own(tmp_path):
    for k in range(3):
        write_lines(tmp_path / f"{k}.jsonl", {"k": k})
    found = Entries(tmp_path, ["*.jsonl"])
    assert [found[k].value()["k"] for k in range(3)] == [0, 1, 2] and found._held[0] == 2
    copy = pickle.loads(pickle.dumps(found))
    assert copy._held is None and copy[1].value() == {"k": 1}
    assert found.digest() == copy.digest()
    write_lines(tmp_path / "1.jsonl", {"k": 1}, {"k": 1})
    assert Entries(tmp_path, ["*.jsonl"]).digest() != found.digest()


@pytest.mark.parametrize(
    "line, reason, cause",
    [
        (b"{'a': 1}", "not JSON", "a Python dict in single quotes, not JSON; write it with json.dumps"),
        (b'{"a": 1', "not JSON", "Expecting ',' delimiter"),
        (b'{"a": NaN}', "not JSON", "NaN is no JSON number"),
        (b"[" * 100_000, "not JSON", "nested too deeply"),
        (b'["a"]', "not an object", "expected a JSON object, got list"),
        (b"3", "not an object", "expected a JSON object, got int"),
    ],
)
def test_lines_that_are_no_objects(line, reason, cause):
    with pytest.raises(Rejected) as caught:
        parse(line)
    assert caught.value.reason == reason and cause in str(caught.value)


def test_python_literals_are_read_where_a_data_set_has_them_and_never_run(monkeypatch):
    assert parse(b"{'a': \"it's\", 'b': None}\n", python=True) == {"a": "it's", "b": None}
    for line in (b"{'a': __import__('os').getpid()}", b"{'a': 1", b"{'a': " + b"(" * 50_000):
        with pytest.raises(Rejected) as caught:
            parse(line, python=True)
        assert caught.value.reason == "not JSON"
    monkeypatch.setattr(entries, "_LARGEST_LITERAL", 10)
    with pytest.raises(Rejected, match="allowed"):
        parse(b"{'a': 'bbbbbbbbb'}", python=True)


# --- one JSON list ----------------------------------------------------------------------------------------


def test_a_list_is_read_element_by_element(tmp_path, monkeypatch):
    wanted = [{"id": k, "text": 'é\\"]},' * (k % 7), "inner": [[k], {"a": "["}]} for k in range(200)]
    for indent, letters, chunk in ((None, True, 1 << 20), (1, False, 64), (4, False, 1000)):
        monkeypatch.setattr(entries, "_CHUNK", chunk)
        file = tmp_path / "list.json"
        file.write_text(json.dumps(wanted, indent=indent, ensure_ascii=letters))
        found = Entries(file, ())
        assert values(found) == wanted
        assert (found[7].name, found[7].where) == ("list-7", f"{file}, element 7")


def test_an_object_is_one_entry_and_an_empty_list_none(tmp_path):
    file = tmp_path / "one.json"
    file.write_text(' {"a": [1, 2]} \n')
    assert values(Entries(file, ())) == [{"a": [1, 2]}]
    file.write_text("\ufeff[ ]")
    assert values(Entries(file, ())) == []


@pytest.mark.parametrize(
    "text, said",
    [
        ('[{"a": 1}, {"b":', "damaged at byte 11, after 1 whole elements"),
        ('[{"a": 1} {"b": 2}]', "after 1 whole elements: a comma or ] is missing"),
        ('{"a": 1}\n{"a": 2}', "more than one value; lines of JSON are to be called .jsonl"),
        ("", "after 0 whole elements"),
        ("[" * 100_000, "nested too deeply"),
        ("[{'a': 1}]", "damaged at byte 1"),
    ],
)
def test_damaged_lists(tmp_path, text, said):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(DataError) as caught:
        Entries(tmp_path / "list.json", ())
    assert str(tmp_path / "list.json") in str(caught.value) and said in str(caught.value)


# --- tables and tars ----------------------------------------------------------------------------------------


def test_rows_of_parquet_and_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"k": k, "image": {"bytes": bytes([k]), "path": None}, "tags": ["a"] * k} for k in range(5)]
    found = Entries(write_parquet(tmp_path / "a.parquet", rows), ())
    assert values(found) == rows and found[4].where == f"{tmp_path / 'a.parquet'}, row 4"
    assert values(Entries(tmp_path, ["*.parquet"]))[1] == rows[1]
    assert pickle.loads(pickle.dumps(found))[3].value() == rows[3]
    table = pyarrow.Table.from_pylist(rows)
    for name, new in (("s.arrow", pyarrow.ipc.new_stream), ("f.arrow", pyarrow.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert values(Entries(tmp_path / name, ())) == rows


def test_samples_of_a_tar(tmp_path):
    file = tmp_path / "00000.tar"
    with tarfile.open(file, "w") as tar:
        for name, data in (("a/1.jpg", b"J"), ("a/1.txt", b"T"), ("2.JPG", b"K"), ("../3.tar.txt", b"U")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("2.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    found = Entries(file, ())
    assert values(found) == [
        {"__key__": "a/1", "jpg": b"J", "txt": b"T"},
        {"__key__": "2", "jpg": b"K"},  # a link is no file
        {"__key__": "../3", "tar.txt": b"U"},  # only a name: nothing is unpacked
    ]
    assert found[1].where == f"{file}, sample 1"


def test_neighbours_with_the_same_value_are_one_entry(tmp_path):
    rows = [{"id": name, "turn": k} for k, name in enumerate("aabca")]
    wanted = [[0, 1], [2], [3], [4]]
    files = [write_lines(tmp_path / "a.jsonl", *rows), write_list(tmp_path / "a.json", rows)]
    pytest.importorskip("pyarrow")
    files.append(write_parquet(tmp_path / "a.parquet", rows))
    for file in files:
        found = Entries(file, (), group="id")
        assert [[row["turn"] for row in value["rows"]] for value in values(found)] == wanted
    assert found[1].name == "a-2"
    broken = write_lines(tmp_path / "b.jsonl", rows[0], '{"id"\n', rows[1])
    found = Entries(broken, (), group="id")
    assert len(found) == 3
    with pytest.raises(Rejected):
        found[1].value()
    with pytest.raises(DataError, match="has no column 'di'; id, turn"):
        Entries(tmp_path / "a.parquet", (), group="di")


# --- files that cannot be read ------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="no such annotation file or folder"):
        Entries(tmp_path / "gone", ["*"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no annotation files \(\*.jsonl, \*.zip\)"):
        Entries(tmp_path / "empty", ["*.jsonl", "*.zip"])
    for name, what in (
        ("a.jsonl.zip", "damaged, or no zip file"),
        ("a.parquet", "damaged, or no parquet file"),
        ("a.arrow", "damaged, or no arrow file"),
        ("a.tar", "damaged, or no tar file"),
        ("a.tar.gz", "packed; unpack it to a plain .tar"),
    ):
        (tmp_path / name).write_bytes(b"PK\x03\x04 torn " * 100)
        if name == "a.tar.gz":
            (tmp_path / name).rename(tmp_path / "a.gz.tar")
            continue
        with pytest.raises(DataError, match=f"{name}: {what}"):
            Entries(tmp_path / name, ())


def test_zips_that_are_ambiguous_or_bombs(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "x.jsonl", {"a": 1})
    text = file.read_text()
    packed = pack(file)
    file.write_text(text)
    with pytest.raises(DataError, match="x.jsonl: is there packed and unpacked"):
        Entries(tmp_path, ["*.jsonl", "*.zip"])
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a", "{}")
        archive.writestr("b", "{}")
    with pytest.raises(DataError, match="holds 2 files and none called x.jsonl"):
        Entries(packed, ())
    monkeypatch.setattr(entries, "LARGEST_ENTRY", 1 << 20)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.jsonl", b" " * (4 << 20))
    with pytest.raises(DataError, match="times those packed: no annotations"):
        Entries(packed, ())
