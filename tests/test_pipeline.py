"""The loader: order, shares, mixtures, exact state, and errors that name the record."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_records import SHARD, make_folder, write_raw

from umm_jax.config import DataConfig, SourceConfig
from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn
from umm_jax.data import licenses
from umm_jax.data.making import make_records
from umm_jax.data.packing import FirstFit
from umm_jax.data.pipeline import fill_rates, make_loader, plan
from umm_jax.errors import ConfigError, DataError
from umm_jax.stream import Feature, StreamSpec


class Serializer:
    """One token a letter; a token for every image, which points at it. At module level for the workers."""

    spec = StreamSpec(
        tokens={"ids": Feature(), "image": Feature(pad=-1, refers="images")},
        images={"pixels": Feature((4, 4, 3), "uint8"), "at": Feature(pad=-1, refers="tokens")},
    )

    def __call__(self, conversation, rng=None):
        ids, image, pixels, at = [], [], [], []
        for turn in conversation.turns:
            for part in turn.parts:
                if isinstance(part, Text):
                    ids += map(ord, part.text)
                    image += [-1] * len(part.text)
                else:
                    at.append(len(ids))
                    ids.append(1)
                    image.append(len(pixels))
                    pixels.append(conversation.images[part.ref].array())
        return {
            "tokens": {"ids": np.array(ids, np.int32), "image": np.array(image, np.int32)},
            "images": {
                "pixels": np.array(pixels, np.uint8).reshape(-1, 4, 4, 3),
                "at": np.array(at, np.int32),
            },
        }


class Varied:
    """Conversation `index` of `letters[0]` ... `letters[1]` letters: its own letter, repeated."""

    def __init__(self, first: int = 0x4E00, letters: tuple[int, int] = (1, 12)):
        self.first, self.letters = first, letters

    def __call__(self, index: int) -> Conversation:
        rng = np.random.default_rng(index)
        text = chr(self.first + index) * int(rng.integers(*self.letters))
        shown = int(rng.integers(0, 3))
        images = {f"i{k}": ImageData.from_array(np.full((4, 4, 3), index, np.uint8)) for k in range(shown)}
        reply = Turn("assistant", (Text("."), *(Image(ref) for ref in images)), loss=True)
        return Conversation(f"c{index}", (Turn("user", (Text(text),)), reply), images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "a"
    make_records(Varied(), 40, out, how={}, shards=3)
    return str(out)


def config(*folders, **changes) -> DataConfig:
    sources = tuple(f if isinstance(f, SourceConfig) else SourceConfig(f) for f in folders)
    settings = {"tokens": 24, "images": 5, "batch_size": 2, "packing_bins": 3, "prefetch": 2, **changes}
    return DataConfig(sources=sources, **settings)


def load(data: DataConfig, batches: int, state=None, **options) -> list:
    with make_loader(data, Serializer(), **options) as loader:
        if state is not None:
            loader.set_state(state)
        return [next(loader) for _ in range(batches)]


def same(a, b) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for axis in ("tokens", "images"):
            assert list(x[axis]) == list(y[axis])
            for name in x[axis]:
                np.testing.assert_array_equal(x[axis][name], y[axis][name])


def conversations(batches) -> list[int]:
    """The letters of all packed conversations, in order of appearance."""
    found = []
    for seen in batches:
        for ids, segments in zip(seen["tokens"]["ids"], seen["tokens"]["segment_ids"]):
            found += [int(ids[np.argmax(segments == s)]) for s in range(1, segments.max() + 1)]
    return found


def test_batches_have_the_promised_form(folder):
    (seen,) = load(config(folder), 1)
    assert {name: (a.shape, a.dtype.name) for name, a in seen["tokens"].items()} == {
        name: ((2, 24), "int32") for name in ("ids", "image", "segment_ids", "positions")
    }
    assert seen["images"]["pixels"].shape == (2, 5, 4, 4, 3) and seen["images"]["at"].shape == (2, 5)
    # Every image is the picture of the conversation it lies in, however the row was packed.
    for row in range(2):
        for slot, image in enumerate(seen["tokens"]["image"][row]):
            if image >= 0:
                assert seen["images"]["at"][row, image] == slot
                segment = seen["tokens"]["segment_ids"][row, slot]
                assert seen["images"]["segment_ids"][row, image] == segment
                letter = seen["tokens"]["ids"][row][np.argmax(seen["tokens"]["segment_ids"][row] == segment)]
                assert (seen["images"]["pixels"][row, image] == (letter - 0x4E00) % 256).all()


def test_every_epoch_shows_everything_once_in_another_order(folder):
    alone = config(folder, packing="none", batch_size=8)
    order = conversations(load(alone, 10))
    assert sorted(order[:40]) == sorted(order[40:]) == [0x4E00 + k for k in range(40)]
    assert order[:40] != order[40:]
    assert order != conversations(load(config(folder, packing="none", batch_size=8, shuffle_seed=1), 10))
    same(load(alone, 3), load(alone, 3))


def test_packing_loses_and_repeats_nothing(folder):
    seen = Counter(conversations(load(config(folder), 40)))
    assert set(seen) == {0x4E00 + k for k in range(40)}
    assert max(seen.values()) - min(seen.values()) <= 1 + 1  # an epoch under way, and open rows


def test_rows_are_aligned(folder):
    data = config(folder, align={"tokens": 8})
    seen = load(data, 20)
    begins = [
        (row[1:] != row[:-1]) & (row[1:] > 0) for b in seen for row in np.asarray(b["tokens"]["segment_ids"])
    ]
    places = np.concatenate([np.flatnonzero(row) + 1 for row in begins])
    assert len(places) > 10 and not (places % 8).any()
    assert len(conversations(seen)) < len(conversations(load(config(folder), 20))), "it costs room"


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"tokens": 7}, "align.tokens=7 must divide .* it is 24"),
        ({"tokens": 0}, "align.tokens=0 must divide"),
        ({"latents": 8}, "the axes are tokens, images"),
    ],
)
def test_what_cannot_be_aligned(folder, wrong, said):
    with pytest.raises(ConfigError, match=said):
        config(folder, align=wrong)
    with pytest.raises(ConfigError, match="not for rows that are cut"):
        config(folder, align={"tokens": 8}, packing="cut")


@pytest.mark.parametrize("packing", ["first_fit", "none", "aligned"])
def test_the_state_is_exact_at_every_step_and_plain_json(folder, packing):
    align = {"tokens": 8} if packing == "aligned" else {}
    packing = "first_fit" if align else packing
    data = config(folder, packing=packing, align=align)
    with make_loader(data, Serializer()) as loader:
        states, batches = [json.dumps(loader.get_state())], []
        for _ in range(12):
            batches.append(next(loader))
            states.append(json.dumps(loader.get_state()))
    assert max(map(len, states)) < 300
    for step, state in enumerate(states[:-1]):
        same(load(data, len(batches[step:]), json.loads(state)), batches[step:])
    # The state can also be set back on a loader that has run on, and does not depend on prefetching.
    with make_loader(config(folder, packing=packing, align=align, prefetch=0), Serializer()) as loader:
        same([next(loader) for _ in range(9)], batches[:9])
        assert json.dumps(loader.get_state()) == states[9]
        loader.set_state(json.loads(states[4]))
        same([next(loader) for _ in range(8)], batches[4:])


def test_workers_change_nothing(folder):
    expected = load(config(folder), 6)
    with make_loader(config(folder, workers=2), Serializer()) as loader:
        same([next(loader) for _ in range(3)], expected[:3])
        state = loader.get_state()
    same(load(config(folder), 3, state), expected[3:])


def test_processes_share_an_epoch_without_overlap(folder):
    data = config(folder, packing="none", batch_size=8)
    shares = [conversations(load(data, 5, process_index=p, process_count=2)) for p in range(2)]
    assert [len(share) for share in shares] == [20, 20]
    assert sorted(shares[0] + shares[1]) == [0x4E00 + k for k in range(40)]
    with pytest.raises(ConfigError, match="batch_size 8 is not divisible by 3"):
        make_loader(data, Serializer(), process_count=3)


def test_sources_are_mixed_by_weight(folder, tmp_path):
    make_records(Varied(first=0x3041, letters=(1, 3)), 7, tmp_path / "b", how={}, shards=1)
    data = config(
        SourceConfig(folder, 0.75), SourceConfig(str(tmp_path / "b"), 0.25), packing="none", batch_size=8
    )
    for count in (1, 2):
        letters = conversations(load(data, 10, process_count=count))
        ours = sum(letter < 0x4E00 for letter in letters)
        assert ours == len(letters) // 4
    with pytest.raises(ConfigError, match=r"sources.0.weight must be positive"):
        make_loader(config(SourceConfig(folder, 0)), Serializer())
    with pytest.raises(ConfigError, match="data.sources is empty"):
        make_loader(config(), Serializer())


def test_skip_passes_over_conversations(folder):
    data = config(folder, packing="none", batch_size=4)
    same(load(data, 2, skip=4), load(data, 3)[1:])


def test_statistics_and_dropped_conversations(folder):
    with make_loader(config(folder, tokens=8, oversize="drop"), Serializer()) as loader:
        batches = [next(loader) for _ in range(20)]
        stats = loader.stats()
    assert stats["rows"] == 40 and stats["dropped"] > 0 and 0.3 < stats["tokens_filled"] <= 1
    assert stats["conversations_per_row"] * 40 == len(conversations(batches))
    with make_loader(config(folder, tokens=8, oversize="refuse"), Serializer()) as loader:
        with pytest.raises(DataError, match=r"array_record, record \d+: record c\d+ needs \d+ tokens"):
            for _ in range(20):
                next(loader)


def test_dropping_everything_is_an_error(folder, monkeypatch):
    monkeypatch.setattr("umm_jax.data.pipeline._PATIENCE", 50)
    with make_loader(config(folder, tokens=1, oversize="drop"), Serializer()) as loader:
        with pytest.raises(DataError, match="50 conversations in a row exceed data.tokens=1"):
            next(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_record_is_named_and_never_replaced(tmp_path, workers):
    write_raw(tmp_path / "d", *(Varied()(k).to_msgpack() for k in range(3)), b"junk")
    with make_loader(config(str(tmp_path / "d"), batch_size=1, workers=workers), Serializer()) as loader:
        with pytest.raises(DataError, match="raw-00000-of-00001.array_record, record 3: not a"):
            for _ in range(8):
                next(loader)


def test_a_shard_damaged_after_opening_is_named(tmp_path):
    make_folder(tmp_path / "d")
    with make_loader(config(str(tmp_path / "d"), batch_size=1, prefetch=0), Serializer()) as loader:
        damaged = bytearray((tmp_path / "d" / SHARD).read_bytes())
        damaged[100:140] = bytes(40)
        (tmp_path / "d" / SHARD).write_bytes(damaged)
        with pytest.raises(DataError, match=f"{SHARD}, record .: cannot be read"):
            for _ in range(12):
                next(loader)


def test_a_foreign_state_is_refused(folder):
    with make_loader(config(folder), Serializer()) as loader:
        with pytest.raises(DataError, match="not a state of this input pipeline"):
            loader.set_state({"next_index": 3})


# --- how full, how much ------------------------------------------------------------------------------------


def test_fill_rates_are_those_of_the_rows(folder):
    found = fill_rates(config(folder, tokens=40, images=4), Serializer(), 60)
    rows = load(config(folder, tokens=40, images=4, batch_size=1), found["rows"])
    used = {
        axis: sum(np.count_nonzero(row[axis]["segment_ids"]) for row in rows) for axis in ("tokens", "images")
    }
    assert found["tokens_filled"] == used["tokens"] / (40 * len(rows))
    assert found["images_filled"] == used["images"] / (4 * len(rows))
    assert found["binding"] == max(("tokens", "images"), key=lambda axis: found[f"{axis}_filled"])
    assert 60 <= found["rows"] * found["conversations_per_row"] < 80


def test_rows_are_full_where_lengths_vary():
    """Lengths like those of web pages: nineteen twentieths of what there is least of are used."""
    rng = np.random.default_rng(0)
    lengths = [{"tokens": int(t), "images": 1} for t in np.clip(rng.lognormal(5.5, 0.8, 4000), 20, 2048)]
    packer, used, rows = FirstFit({"tokens": 2048, "images": 30}, 8), 0, 0
    for k, length in enumerate(lengths):
        closed = packer.add(k, length)
        if closed is not None:
            rows += 1
            used += sum(lengths[item]["tokens"] for item in closed)
    assert used / (rows * 2048) >= 0.95


def test_the_plan_says_rows_processes_and_memory(folder):
    data = config(folder, tokens=200_000, images=2, batch_size=8, prefetch=3, workers=2)
    # A token has two numbers of four bytes and two that packing adds; an image 4 x 4 x 3 bytes and three.
    ahead = 3 * 4 * (200_000 * 16 + 2 * (48 + 4 + 8)) / 2**20
    said = f"4 rows of 200000 tokens, 2 images; 2 worker processes, 3 batches ahead ({ahead:.0f} MiB)"
    assert plan(data, Serializer.spec, 2) == said
    assert "no worker processes" in plan(config(folder), Serializer.spec)


# --- licences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "license, admitted",
    [
        ("CC0-1.0", True),
        ("CC-BY-4.0", True),
        ("cc-by-sa-3.0", True),
        ("Apache-2.0", True),
        ("CC-BY-NC-4.0", False),
        ("CC-BY-NC-SA-4.0", False),
        ("CC-BY-ND-4.0", False),
        ("CC0-1.0 AND MIT", True),
        ("MIT AND CC-BY-NC-4.0", False),
        ("MIT AND unnamed", False),
        ("CC-BY", False),  # of no version: not the terms of any
        ("", False),
        ("research only", False),
    ],
)
def test_terms_that_permit_commercial_use(license, admitted):
    assert licenses.commercial(license) is admitted


def test_a_commercial_run_refuses_a_folder_with_one_record_under_other_terms(tmp_path):
    def folder(name: str, *terms: str) -> str:
        made = Varied()
        make_records(
            lambda k: replace(made(k), license=terms[k]), len(terms), tmp_path / name, how={}, shards=1
        )
        return str(tmp_path / name)

    free, mixed = folder("free", "MIT", "CC0-1.0"), folder("mixed", "MIT", "CC-BY-NC-4.0", "", "")

    load(config(free, mixed), 1)
    load(config(free, licenses="commercial"), 1)
    with pytest.raises(DataError) as caught:
        load(config(free, mixed, licenses="commercial"), 1)
    said = str(caught.value)
    assert mixed in said and "1 under CC-BY-NC-4.0" in said and "2 under no licence that is named" in said
    manifest = tmp_path / "free" / "manifest.json"
    plain = json.loads(manifest.read_text())
    del plain["counts"]
    manifest.write_text(json.dumps(plain))
    with pytest.raises(DataError, match="does not say the licences of its records"):
        load(config(free, licenses="commercial"), 1)
