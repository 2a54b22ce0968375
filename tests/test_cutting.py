"""Cut rows: against the released rules written out on plain ids, and against reference batches."""

import dataclasses
import json
import re
import shlex

import mm_interleaved_toy as toy
import numpy as np
import parity
import pytest

from umm_jax import cli
from umm_jax.config import DataConfig, SourceConfig, from_dict
from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn
from umm_jax.data import cutting, importers
from umm_jax.data.cutting import Cutter, Piece, Rule, after_image, fit_document, join, merged, row_end, select
from umm_jax.data.making import make_records
from umm_jax.data.packing import pack_row
from umm_jax.data.pipeline import make_loader
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.mm_interleaved.stream import Serializer
from umm_jax.stream import check_stream, stream_length

SLOTS = 4
BOS, EOS, SOI, SLOT = 1, 2, 7, 8


class Numbers(toy.Words):
    """A tokenizer of numbers: the text "30 41" is the ids 30, 41."""

    size = 200

    def encode(self, text):
        return [int(word) for word in text.split()]


def serializer(slots: int = SLOTS) -> Serializer:
    layout = dict(image_size=2, target_size=2, image_tokens=slots, soi_id=SOI, box_bins=8)
    return Serializer({"layout": layout}, Numbers())


def document(name: str, *parts: str | int, loss: bool = True) -> Conversation:
    """Text parts, and numbers for images of that grey."""
    shown = {
        f"i{p}": ImageData.from_array(np.full((2, 2, 3), p, np.uint8)) for p in parts if isinstance(p, int)
    }
    laid = tuple(Text(p) if isinstance(p, str) else Image(f"i{p}") for p in parts)
    return Conversation(name, (Turn("document", laid, loss=loss),), shown)


def random_documents(seed: int, count: int, *, images: tuple[int, int], text: tuple[int, int]) -> list:
    """Documents of alternating texts (numbers from 20 on) and images; greys number the images of all."""
    rng = np.random.default_rng(seed)
    made, grey = [], 0
    for n in range(count):
        parts: list = []
        for _ in range(int(rng.integers(images[0], images[1] + 1))):
            words = " ".join(map(str, rng.integers(20, 99, int(rng.integers(text[0], text[1] + 1)))))
            parts += [words, grey] if rng.random() < 0.5 else [grey, words]
            grey += 1
        made.append(document(f"d{n}", *(parts or ["20 21"])))
    return made


# --- the released rules, on ids -----------------------------------------------------------------------


def released_rows(ids: list[int], tokens: int, images: int, whole: str) -> list[list[int]]:
    """Rows as section 8 of the specification has them, on one long list of ids; the last row is left out.

    Knows of documents and images only by their bos, soi and slots. Rows without an image are in it too.
    """
    rows = []
    while len(ids) >= tokens:
        end = tokens
        sois = [k for k, i in enumerate(ids) if i == SOI]
        if ids[:end].count(SLOT) // SLOTS > images:
            if whole == "image":
                end = sois[images - 1] + SLOTS + 1
            else:
                last_bos = max(k for k, i in enumerate(ids[: sois[images]]) if i == BOS)
                end = last_bos if last_bos > sois[images - 1] else sois[images]
        inside = [k for k in sois if k < end]
        if inside and inside[-1] + SLOTS >= end:
            last_bos = max((k for k, i in enumerate(ids[:end]) if i == BOS), default=0)
            end = last_bos if whole == "document" and last_bos else inside[-1]
        rows.append(ids[:end])
        ids = ids[end:]
    return rows


def cut(documents: list, rule: Rule) -> list[list[Piece]]:
    lay = serializer()
    cutter, rows = Cutter(lay.spec, rule), []
    for n, conversation in enumerate(documents):
        cutter.add(n, lay(conversation))
        while cutter.full:
            rows.append(cutter.row())
    return rows


def ids_of(row: list[Piece]) -> list[int]:
    return [i for piece in row for i in piece.stream["tokens"]["ids"].tolist()]


@pytest.mark.parametrize("whole", ["image", "document"])
@pytest.mark.parametrize("tokens, budget", [(24, 99), (40, 3), (33, 2), (64, 5), (17, 1)])
def test_rows_are_those_of_the_released_rules(whole, tokens, budget):
    # Caption pairs where documents stay whole, longer documents with up to four images where they do not.
    several = (0, 4) if whole == "image" else (1, 1)
    documents = random_documents(tokens + budget, 60, images=several, text=(0, 8))
    lay = serializer()
    ids = [i for d in documents for i in lay(d)["tokens"]["ids"].tolist()]
    expected = released_rows(ids, tokens, budget, whole)
    rows = cut(documents, Rule(tokens, budget, whole))
    assert [ids_of(row) for row in rows] == expected
    assert len(rows) > 10 and len({len(row) for row in expected}) > 1, "rows of several lengths"
    greys = [int(g) for row in rows for piece in row for g in piece.stream["images"]["pixels"][:, 0, 0, 0]]
    assert greys == list(range(len(greys))), "every image once, in order"
    for row in rows:
        counts = [stream_length(piece.stream)["images"] for piece in row]
        assert sum(counts) <= budget and ids_of(row).count(SLOT) == SLOTS * sum(counts)


def test_the_rows_drawn_in_the_docstring():
    read = [
        document("a", 0, "20 21 22 23"),
        document("b", "20 21 22 23", 1),
        document("c", 2, "20 21 22 23 24 25"),
    ]
    letters = {BOS: "<", EOS: ">", SOI: "*", SLOT: "#"}

    def drawn(row):
        return "".join(letters.get(i, ".") for i in ids_of(row))

    lines = [line.split("  ")[2].strip() for line in cutting.__doc__.splitlines() if line.startswith("    ")]
    assert "".join(drawn([Piece(0, 0, serializer()(d))]) for d in read) == lines[0]
    assert [drawn(row) for row in cut(read, Rule(18, 9, "image"))] == lines[1:3]
    assert [drawn(row) for row in cut(read, Rule(18, 9, "document"))] == lines[3:5]


def test_an_image_that_fits_to_the_last_token_stays():
    # bos, 5 words, soi, 4 slots: the eleventh token is the last slot.
    documents = [document("a", "20 21 22 23 24", 0), document("b", 1, "20 21 22 23")]
    for tokens, first in ((11, 11), (10, 6)):
        assert len(ids_of(cut(documents, Rule(tokens, 9))[0])) == first
    spans, begins = [(6, 11)], [0]
    assert row_end(spans, begins, Rule(11, 9, "document")) == 11
    assert row_end(spans, begins, Rule(10, 9, "document")) == 6, "it opens the row: only its image can move"
    assert row_end([(9, 14)], [0, 8], Rule(10, 9, "document")) == 8


# --- pieces of streams --------------------------------------------------------------------------------


def test_pieces_joined_again_are_the_whole():
    lay = serializer()
    whole = lay(document("d", "20 21", 0, "22", 1, 2, "23 24 25"))
    length = stream_length(whole)["tokens"]
    for place in (1, 3, 8, 9, 19, 21):
        parts = [select(whole, lay.spec, np.arange(*ends)) for ends in ((0, place), (place, length))]
        for part in parts:
            check_stream(part, lay.spec)
        again = join(parts, lay.spec)
        for axis in ("tokens", "images"):
            for name, values in whole[axis].items():
                np.testing.assert_array_equal(again[axis][name], values, f"{axis}/{name} at {place}")
    with pytest.raises(ValueError, match="image 0 would be cut"):
        select(whole, lay.spec, np.arange(5))


def test_long_captions_are_shortened_around_their_image():
    lay, words = serializer(), " ".join(["30"] * 40)
    rule = Rule(20, 9, "document")
    last, truncated = fit_document(document("d", words, 5), lay, lay.spec, rule, "truncate")
    assert truncated and last["tokens"]["ids"].tolist() == [BOS] + [30] * 13 + [SOI] + [SLOT] * 4 + [EOS]
    assert last["images"]["soi"].tolist() == [14] and last["images"]["pixels"][0, 0, 0, 0] == 5
    first, _ = fit_document(document("d", 5, words), lay, lay.spec, rule, "truncate")
    assert first["tokens"]["ids"].tolist() == [BOS, SOI] + [SLOT] * 4 + [30] * 14, "its end is lost"
    assert fit_document(document("d", 5, words), lay, lay.spec, rule, "drop") == (None, False)
    with pytest.raises(DataError, match="record d needs 47 tokens, a row holds 20; raise data.tokens"):
        fit_document(document("d", 5, words), lay, lay.spec, rule, "refuse")
    whole, truncated = fit_document(document("d", 5, words), lay, lay.spec, Rule(20, 9, "image"), "refuse")
    assert stream_length(whole)["tokens"] == 47 and not truncated, "it may be cut"
    with pytest.raises(DataError, match="an image takes 5 tokens, a row holds 4"):
        fit_document(document("d", 5, words), lay, lay.spec, Rule(4, 9, "image"), "drop")
    # More images than a row has room for cannot be shortened; dropped, not cut.
    many = document("d", 0, 1, 2, 3, words)
    assert fit_document(many, lay, lay.spec, rule, "truncate") == (None, False)


def test_merging_removes_the_delimiters_between():
    lay = serializer()
    texts = [("20", 0), (1, "21"), ("22", 2), (3, "23"), ("24", 4)]
    pieces = [Piece(n, 0, lay(document(f"d{n}", *parts))) for n, parts in enumerate(texts)]
    rest = Piece(9, 5, select(lay(document("r", 8, "25 26 27")), lay.spec, np.arange(6, 10)))
    image = [SOI] + [SLOT] * SLOTS
    rows = merged([rest, *pieces], lay.spec, 2)
    assert [row["tokens"]["ids"].tolist() for row in rows] == [
        [25, 26, 27, EOS],  # what an earlier row left is by itself
        [BOS, 20, *image, *image, 21, EOS],
        [BOS, 22, *image, *image, 23, EOS],
        [BOS, 24, *image, EOS],
    ]
    assert rows[1]["tokens"]["image"].tolist() == [-1, -1, -1, 0, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1]
    assert rows[1]["images"]["soi"].tolist() == [2, 7]
    # The second soi no longer follows a bos: it can be known, and is learned.
    assert rows[1]["tokens"]["weight"].tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1]
    assert merged(pieces, lay.spec, 8)[0]["images"]["pixels"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no delimiters"):
        merged(pieces, dataclasses.replace(lay.spec, delimiters=None), 2)


# --- against the reference ------------------------------------------------------------------------------


def parsed(ids: list[int], image: int) -> list:
    """The parts of a document of the reference; its images are numbered from `image` on."""
    parts: list = []
    for i in ids[1:-1]:
        if i == 128:
            parts.append(image)
            image += 1
        elif i != 129:
            parts.append(f" {i}")  # texts that touch are one
    return parts


def test_weights_and_contexts_are_those_of_the_reference():
    """A recorded batch, made again from its documents: which targets count, where contexts begin."""
    d, lay = parity.fixture("g_train_forward"), serializer(slots=8)
    n, rows = 0, []
    for ids, real in zip(d["text_ids"].tolist(), d["attention_mask"].sum(1).tolist()):
        streams, begin = [], 0
        while begin < real:
            end = ids.index(EOS, begin) + 1
            parts = parsed(ids[begin:end], n)
            n += sum(isinstance(part, int) for part in parts)
            streams.append(lay(document("d", *parts)))
            begin = end
        rows.append((streams, real))
    names = {128: SOI, 129: SLOT}
    contexts, visible = [], []
    for k, (streams, real) in enumerate(rows):
        row = pack_row(streams, lay.spec, {"tokens": 45, "images": 3})
        tokens, images = row["tokens"], row["images"]
        assert tokens["ids"][:real].tolist() == [names.get(int(i), int(i)) for i in d["text_ids"][k, :real]]
        np.testing.assert_array_equal(tokens["weight"][1:] > 0, d["gt_text_ids"][k] != -100)
        masked = pack_row([after_image(s, lay.spec) for s in streams], lay.spec, {"tokens": 45, "images": 3})[
            "tokens"
        ]
        np.testing.assert_array_equal(masked["weight"][1:] > 0, d["gt_text_ids_laion"][k] != -100)
        assert d["num_image_per_seq"][k] == np.count_nonzero(images["segment_ids"])
        for soi, segment, position in zip(images["soi"], images["segment_ids"], images["positions"]):
            if segment:
                contexts.append((soi - tokens["positions"][soi], tokens["positions"][soi] + 1))
                visible.append([int(position > 0)])
    assert [first for first, _ in contexts] == d["nearest_bos_idxs"].tolist()
    assert [length for _, length in contexts] == d["context_attention_mask"].sum(1).tolist()
    assert visible == d["unet_mmfs_mask"].tolist(), "the image before it, if of the same document"


# --- the pipeline ---------------------------------------------------------------------------------------


class Make:
    """Document `index` of `images` pictures and some words; its numbers start at `first`."""

    def __init__(self, first: int = 20, images: tuple[int, int] = (0, 3), words: tuple[int, int] = (0, 9)):
        self.first, self.images, self.words = first, images, words

    def __call__(self, index: int) -> Conversation:
        rng = np.random.default_rng(index)
        parts: list = []
        for k in range(int(rng.integers(*self.images))):
            words = f"{self.first + index} " * int(rng.integers(*self.words))
            parts += [words, 10 * index + k] if rng.random() < 0.5 else [10 * index + k, words]
        return document(f"d{index}", *(parts or [f"{self.first + index} " * 25]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("cut")
    make_records(Make(), 20, base / "web", how={}, shards=2)
    make_records(Make(100, images=(1, 2)), 20, base / "pairs", how={}, shards=2)
    return {name: str(base / name) for name in ("web", "pairs")}


def config(folders, **changes) -> DataConfig:
    sources = (
        SourceConfig(folders["web"], 2.0, images=3),
        SourceConfig(folders["pairs"], 1.0, cut="document", merge=0.5, text_loss="after_image"),
    )
    settings = dict(sources=sources, packing="cut", tokens=30, images=4, batch_size=2, prefetch=2)
    return DataConfig(**{**settings, **changes})


def load(data, batches, state=None, **options):
    with make_loader(data, serializer(), **options) as loader:
        if state is not None:
            loader.set_state(state)
        return [next(loader) for _ in range(batches)]


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for axis in ("tokens", "images"):
            for name in x[axis]:
                np.testing.assert_array_equal(x[axis][name], y[axis][name], f"{axis}/{name}")


def test_the_state_is_exact_at_every_step_and_plain_json(folders):
    data = config(folders)
    with make_loader(data, serializer()) as loader:
        states, batches = [json.dumps(loader.get_state())], []
        for _ in range(30):
            batches.append(next(loader))
            states.append(json.dumps(loader.get_state()))
        stats = loader.stats()
    assert max(map(len, states)) < 200
    starts = {tuple(place[1] > 0 for place in json.loads(state)["sources"]) for state in states}
    assert (True, True) in starts, "rows that begin inside a document were met"
    assert stats["imageless"] > 0 and stats["dropped"] == stats["truncated"] == 0
    for step in (0, 1, 7, 18, 29):
        same(load(data, len(batches) - step, json.loads(states[step])), batches[step:])
    with make_loader(dataclasses.replace(data, prefetch=0), serializer()) as loader:
        same([next(loader) for _ in range(12)], batches[:12])
        assert json.dumps(loader.get_state()) == states[12]
        loader.set_state(json.loads(states[4]))
        same([next(loader) for _ in range(26)], batches[4:])
        assert json.dumps(loader.get_state()) == states[30], "what is read again is not counted again"


def test_workers_change_nothing(folders):
    data = config(folders, sources=(SourceConfig(folders["web"]),))
    same(load(dataclasses.replace(data, workers=1), 4), load(data, 4))


def rows_of(batches):
    for seen in batches:
        for k in range(len(seen["tokens"]["ids"])):
            yield {a: {name: values[k] for name, values in seen[a].items()} for a in ("tokens", "images")}


def test_rows_hold_one_source_whole_images_and_its_budget(folders):
    kinds = []
    for row in rows_of(load(config(folders), 60)):
        tokens, images = row["tokens"], row["images"]
        words = tokens["ids"][(tokens["ids"] >= 20)]
        assert (words < 100).all() or (words >= 100).all()
        web = not (words >= 100).any()
        kinds.append(web)
        count = np.count_nonzero(images["segment_ids"])
        assert 1 <= count <= (3 if web else 4)
        assert (tokens["ids"] == SLOT).sum() == SLOTS * count
        for image in range(count):
            where = np.flatnonzero(tokens["image"] == image)
            assert tokens["ids"][images["soi"][image]] == SOI
            assert where.tolist() == list(range(images["soi"][image] + 1, images["soi"][image] + 1 + SLOTS))
            assert (tokens["segment_ids"][where] == images["segment_ids"][image]).all()
    assert 0.5 < np.mean(kinds) < 0.8, "two rows of the web for one of pairs"


def test_nothing_is_lost_between_rows(folders):
    """One source, every token of an epoch: the rows put together are the documents put together."""
    data = config(folders, sources=(SourceConfig(folders["pairs"], cut="document"),), tokens=64, batch_size=1)
    rows = [row["tokens"] for row in rows_of(load(data, 12))]
    ids = [i for tokens in rows for i in tokens["ids"][tokens["segment_ids"] > 0].tolist()]
    lay, documents = serializer(), []
    while ids[: (stop := ids.index(EOS) + 1)] and len(documents) < 20:
        documents.append(ids[:stop])
        ids = ids[stop:]
    every = [lay(Make(100, images=(1, 2))(k))["tokens"]["ids"].tolist() for k in range(20)]
    assert sorted(documents) == sorted(every) and documents != every


def test_merging_is_drawn_by_the_row_and_the_release_never_does_it(folders):
    pairs = SourceConfig(folders["pairs"], cut="document", merge=0.5)
    data = config(folders, sources=(pairs,), tokens=64)
    apart = config(folders, sources=(dataclasses.replace(pairs, merge=0.0),), tokens=64)
    ours, plain = list(rows_of(load(data, 20))), list(rows_of(load(apart, 20)))
    same(load(dataclasses.replace(data, compat="release"), 20), load(apart, 20))
    joined = 0
    for one, other in zip(ours, plain):
        keep = ~np.isin(other["tokens"]["ids"], [BOS, EOS]) & (other["tokens"]["segment_ids"] > 0)
        kept = ~np.isin(one["tokens"]["ids"], [BOS, EOS]) & (one["tokens"]["segment_ids"] > 0)
        assert one["tokens"]["ids"][kept].tolist() == other["tokens"]["ids"][keep].tolist()
        np.testing.assert_array_equal(one["images"]["pixels"], other["images"]["pixels"])
        joined += one["images"]["segment_ids"].max() < other["images"]["segment_ids"].max()
    assert 8 < joined < 32, "about half of forty rows"


def test_text_without_an_image_before_it_is_not_learned(folders):
    learned = 0
    for row in rows_of(load(config(folders), 40)):
        tokens, images = row["tokens"], row["images"]
        if tokens["ids"].max() < 100:
            continue
        for segment in range(1, tokens["segment_ids"].max() + 1):
            here = np.flatnonzero(tokens["segment_ids"] == segment)
            first = min(images["soi"][images["segment_ids"] == segment], default=here[-1] + 1)
            assert not tokens["weight"][here[here < first]].any()
            learned += tokens["weight"][here[here > first]].sum()
    assert learned > 0
    # In rows that are not cut, too.
    packed = DataConfig(
        sources=(SourceConfig(folders["pairs"], text_loss="after_image"),), tokens=64, images=8, batch_size=2
    )
    for row in rows_of(load(packed, 4)):
        assert not (row["tokens"]["weight"] * (np.cumsum(row["tokens"]["ids"] == SOI) == 0)).any()


def test_too_long_documents_are_counted_once(folders):
    long = SourceConfig(folders["pairs"], cut="document")
    data = config(folders, sources=(long,), tokens=12, batch_size=1, oversize="truncate")
    with make_loader(data, serializer()) as loader:
        for _ in range(10):
            next(loader)
        state, before = loader.get_state(), loader.stats()
        for _ in range(10):
            next(loader)
        after = loader.stats()
        loader.set_state(state)
        for _ in range(10):
            next(loader)
        assert loader.stats()["truncated"] == after["truncated"] > before["truncated"] > 0
    with make_loader(dataclasses.replace(data, oversize="refuse"), serializer()) as loader:
        with pytest.raises(DataError, match=r"array_record, record \d+: record d\d+ needs \d+ tokens"):
            for _ in range(20):
                next(loader)


def test_rows_that_never_hold_an_image_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("umm_jax.data.cut_rows._PATIENCE", 20)
    make_records(Make(images=(0, 1)), 4, tmp_path / "d", how={}, shards=1)
    data = DataConfig((SourceConfig(str(tmp_path / "d")),), packing="cut", tokens=30)
    with make_loader(data, serializer()) as loader:
        with pytest.raises(DataError, match="20 rows in a row hold no image"):
            next(loader)


@pytest.mark.parametrize(
    "section, said",
    [
        (dict(sources=[dict(path="d", merge=0.5)]), "images, cut and merge need data.packing=cut"),
        (dict(sources=[dict(path="d", images=9)], packing="cut"), "sources.0.images 9 exceeds data.images 4"),
        (dict(sources=[dict(path="d", merge=2.0)], packing="cut"), "merge is a share of rows from 0 to 1"),
        (dict(sources=[dict(path="d", cut="image2")]), "'image2' is not allowed; did you mean 'image'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(section, said):
    with pytest.raises(ConfigError, match=said):
        from_dict(DataConfig, section, "config.data")


def test_a_state_of_other_sources_is_refused(folders):
    with make_loader(config(folders), serializer()) as loader:
        state = loader.get_state()
        with pytest.raises(DataError, match="a state of 1 sources"):
            loader.set_state({**state, "sources": state["sources"][:1]})
        with pytest.raises(DataError, match="not a state"):
            loader.set_state({"next": 0, "rows": [], "dropped": 0, "truncated": 0})


# --- what the documentation shows -------------------------------------------------------------------------

GUIDE = (parity.ROOT / "docs" / "data.md").read_text()


def blocks(kind: str = "") -> list[str]:
    return [text.split("\n", 1)[1] for text in GUIDE.split("```")[1::2] if text.split("\n", 1)[0] == kind]


def test_the_row_of_the_guide():
    read = [document("a", 0, "20 21 22 23"), document("b", "20 21 22 23", 1), document("c", 2, "20 21 22 23")]
    (first, *_) = cut(read, Rule(18, 2, "image"))
    row = pack_row([piece.stream for piece in first], serializer().spec, {"tokens": 18, "images": 2})
    (shown,) = [text for text in blocks() if text.startswith("tokens/segment_ids")]
    for line in shown.splitlines():
        words = line.split()
        at = next(k for k, word in enumerate(words) if word.startswith("images/"))
        for name, *values in (words[:at], words[at:]):
            axis, name = name.split("/")
            assert row[axis][name].tolist() == list(map(float, values)), name


def test_the_mixture_and_the_commands_of_the_guide():
    _, record, mixture = blocks("json")
    data = from_dict(DataConfig, json.loads(mixture), "config.data")
    assert [source.merge for source in data.sources] == [0.25, 0.25, 0.25, 0.0] and data.images == 30
    plain = json.loads(record)
    plain["images"]["i0"]["data"] = ""
    assert Conversation.from_json(json.dumps(plain)).turns[0].role == "document"
    commands = [
        shlex.split(line) for block in blocks() for line in block.splitlines() if line.startswith("umm ")
    ]
    assert len(commands) > 10
    for _, *words in commands:
        cli.parser().parse_args(words)
    listed = re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)
    assert set(importers.names()) <= set(listed)
