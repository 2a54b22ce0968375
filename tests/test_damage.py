"""Ten thousand damaged records go through import: no crash, no hang, exact counts, nothing good lost."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from importing_toy import GREY, make_pictures, picture

from umm_jax.data.importing import Import
from umm_jax.data.making import make_records

COUNT = 10_000
JUNK = (None, True, 0, -1, 1e300, "", "x", "../a.png", "\ud800", [], {}, [[]], {"type": "text"}, "a" * 60_000)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = make_pictures(tmp_path_factory.mktemp("images"))
    (folder / "link.png").symlink_to("/etc/hostname")
    return folder


def messages(rng: np.random.Generator, k: int) -> dict:
    name = f"{'abcdefgh'[k % 8]}.png"
    url = name if k % 5 else f"data:image/png;base64,{base64.b64encode(picture(GREY[name[0]])).decode()}"
    asked = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"what is {k}"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": f"answer {k}"}]}


def llava(rng: np.random.Generator, k: int) -> dict:
    said = [{"from": "human", "value": f"<image>\nwhat is {k}"}, {"from": "gpt", "value": f"answer {k}"}]
    return {"id": k % 100, "image": f"{'abcdefgh'[k % 8]}.png", "conversations": said}


def pairs(rng: np.random.Generator, k: int) -> dict:
    return {"image": f"{'abcdefgh'[k % 8]}.png", "caption": f"caption {k}"}


def mmc4(rng: np.random.Generator, k: int) -> dict:
    info = [
        {"image_name": f"{name}.png", "matched_text_index": k % 2, "matched_sim": 0.5}
        for name in "abcdefgh"[k % 5 : k % 5 + 2]
    ]
    return {"text_list": [f"one {k}", "two"], "image_info": info, "similarity_matrix": [[0.5, 0.5]] * 2}


MAKERS = {"messages": messages, "llava": llava, "pairs": pairs, "mmc4": mmc4}
ENDINGS = {"mmc4": "docs_0.jsonl"}


def places(value, path=()) -> list[tuple]:
    """Paths to everything inside a JSON value."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += [(*path, key), *places(inner, (*path, key))]
    return found


def damage(entry: dict, rng: np.random.Generator) -> bytes:
    """One line, damaged in its values or in its bytes."""
    kind = int(rng.integers(7))
    if kind < 3:  # a value removed, replaced by junk, or by another value of the same entry
        path = (found := places(entry))[rng.integers(len(found))]
        inner = entry
        for key in path[:-1]:
            inner = inner[key]
        if kind == 0:
            del inner[path[-1]]
        elif kind == 1:
            inner[path[-1]] = JUNK[rng.integers(len(JUNK))]
        else:
            other = entry
            for key in found[rng.integers(len(found))]:
                other = other[key]
            inner[path[-1]] = json.loads(json.dumps(other))
        return json.dumps(entry).encode()
    line = json.dumps(entry).encode()
    match kind:
        case 3:
            return line[: rng.integers(1, len(line))]
        case 4:
            return repr(entry).encode()
        case 5:
            damaged = bytearray(line)
            for at in rng.integers(0, len(line), rng.integers(1, 6)):
                damaged[at] = rng.choice([*range(0x20, 0x100)])
            return bytes(damaged)
    return bytes(rng.integers(0x20, 0x100, rng.integers(1, 200), dtype=np.uint8))


@pytest.mark.parametrize("kind", MAKERS)
def test_damaged_records(tmp_path, images, kind):
    rng = np.random.default_rng(list(MAKERS).index(kind))
    count = COUNT // len(MAKERS)
    good = set(rng.permutation(count)[: count // 2].tolist())
    lines = []
    for k in range(count):
        entry = MAKERS[kind](rng, k)
        lines.append(json.dumps(entry).encode() if k in good else damage(entry, rng) or b"?")
    file = tmp_path / ENDINGS.get(kind, "lines.jsonl")
    file.write_bytes(b"\n".join(line if line.strip() else b"?" for line in lines) + b"\n")
    settings = {"keep_single": 1.0} if kind == "mmc4" else {}
    make = Import(kind, file, images, settings=settings)
    assert len(make) == count, "a line is a record, whatever is in it"
    source = make_records(make, count, tmp_path / "d", how={}, shards=3, max_rejected=1.0)
    counts = source.manifest["counts"]
    left = sum(counts.get("left out", {}).values())
    rejected = sum(counts["rejected records"].values())
    assert len(source) + rejected + left == count, "every line is made, rejected or left out"
    made = {int(record.id.rpartition("-")[2]) - 1 for record in source}
    assert good <= made, f"lost: {sorted(good - made)[:5]}"
    assert rejected > count // 5 and len(counts["rejected records"]) >= 6
    quarantined = [
        json.loads(line) for line in (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()
    ]
    records = [line for line in quarantined if line["what"] == "record"]
    assert len(records) == rejected and not {line["record"] for line in records} & made
    assert all(line["cause"] and line["reason"] for line in quarantined)
