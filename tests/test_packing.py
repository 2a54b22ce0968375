"""Packing: layout, moved references, budgets, first fit, and conversations that are too long."""

import numpy as np
import pytest

from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn
from umm_jax.data.packing import Fill, FirstFit, batch, beginning, fit, pack_row, without_oldest
from umm_jax.errors import DataError
from umm_jax.stream import Feature, StreamSpec, stream_length

SPEC = StreamSpec(
    tokens={
        "ids": Feature(pad=9),
        "slot": Feature(pad=-1, refers="images"),
        "vec": Feature((2,), "float32", 0.5),
    },
    images={"at": Feature(pad=-1, refers="tokens"), "pixels": Feature((1, 1, 3), "uint8")},
)


def stream(t: int, i: int, value: int):
    return {
        "tokens": {
            "ids": np.full(t, value, np.int32),
            "slot": np.array([k if k < i else -1 for k in range(t)], np.int32),
            "vec": np.full((t, 2), value, np.float32),
        },
        "images": {"at": np.arange(i, dtype=np.int32), "pixels": np.full((i, 1, 1, 3), value, np.uint8)},
    }


def test_layout_is_as_drawn_in_the_docstring():
    row = pack_row([stream(5, 1, 3), stream(4, 2, 4)], SPEC, size(12, 3))
    tokens, images = row["tokens"], row["images"]
    assert tokens["segment_ids"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]
    assert tokens["positions"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]
    assert images["segment_ids"].tolist() == [1, 2, 2]
    assert images["positions"].tolist() == [0, 0, 1]
    assert tokens["ids"].tolist() == [3] * 5 + [4] * 4 + [9] * 3
    assert tokens["vec"].shape == (12, 2) and tokens["vec"][-1].tolist() == [0.5, 0.5]
    # References moved by what lies before them on the axis they point into; "none" stayed.
    assert tokens["slot"].tolist() == [0, -1, -1, -1, -1, 1, 2, -1, -1, -1, -1, -1]
    assert images["at"].tolist() == [0, 5, 6]
    assert images["pixels"].dtype == np.uint8 and tokens["ids"].dtype == np.int32


def test_each_conversation_begins_where_a_block_does():
    row = pack_row([stream(5, 1, 3), stream(4, 2, 4)], SPEC, size(12, 4), {"tokens": 4, "images": 2})
    tokens, images = row["tokens"], row["images"]
    assert tokens["segment_ids"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 2]
    assert tokens["positions"].tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 0, 1, 2, 3]
    assert tokens["ids"].tolist() == [3] * 5 + [9] * 3 + [4] * 4
    assert tokens["slot"].tolist() == [0, -1, -1, -1, -1, -1, -1, -1, 2, 3, -1, -1]
    assert images["segment_ids"].tolist() == [1, 0, 2, 2]
    with pytest.raises(ValueError, match="16 tokens in a row of 12"):
        pack_row([stream(5, 1, 3), stream(5, 2, 4)], SPEC, size(12, 4), {"tokens": 4})


def test_unpacking_by_segment_gives_every_stream_back():
    rng = np.random.default_rng(0)
    streams = [stream(int(rng.integers(1, 9)), int(rng.integers(0, 4)), k) for k in range(6)]
    row = pack_row(streams, SPEC, size(64, 32))
    for k, original in enumerate(streams):
        for axis in ("tokens", "images"):
            here = row[axis]["segment_ids"] == k + 1
            for name, feature in SPEC.axes[axis].items():
                values = row[axis][name][here]
                if feature.refers:
                    offset = np.argmax(row[feature.refers]["segment_ids"] == k + 1)
                    values = np.where(values < 0, values, values - offset)
                np.testing.assert_array_equal(values, original[axis][name])


def test_a_row_that_overflows_or_a_reserved_name_is_refused():
    with pytest.raises(ValueError, match="13 tokens in a row of 12"):
        pack_row([stream(5, 1, 1), stream(8, 1, 1)], SPEC, size(12, 3))
    with pytest.raises(ValueError, match="4 images in a row of 3"):
        pack_row([stream(4, 2, 1), stream(4, 2, 1)], SPEC, size(12, 3))
    with pytest.raises(ValueError, match="positions"):
        pack_row([], StreamSpec(tokens={"positions": Feature()}), size(12, 3))


def test_batch_stacks_and_fill_counts():
    rows = [
        pack_row([stream(5, 1, 3), stream(4, 2, 4)], SPEC, size(12, 3)),
        pack_row([stream(3, 0, 3)], SPEC, size(12, 3)),
    ]
    stacked = batch(rows)
    assert stacked["tokens"]["vec"].shape == (2, 12, 2) and stacked["images"]["pixels"].shape == (
        2,
        3,
        1,
        1,
        3,
    )
    fill = Fill()
    fill.add(stacked)
    assert fill.summary() == {
        "rows": 2,
        "conversations_per_row": 1.5,
        "tokens_filled": 12 / 24,
        "images_filled": 3 / 6,
    }


def size(tokens: int, images: int = 0) -> dict[str, int]:
    return {"tokens": tokens, "images": images}


def test_first_fit_takes_the_first_row_with_room_on_both_axes():
    packer = FirstFit(size(10, 2), bins=2)
    assert packer.add("a", size(6, 1)) is None
    assert packer.add("b", size(6, 1)) is None  # no room for 6 more tokens: second row
    assert packer.add("c", size(4, 0)) is None  # first row again
    assert packer.add("d", size(1, 2)) == ["a", "c"]  # no room for two images: the oldest row is closed
    assert packer.rows == [["b"], ["d"]]
    assert packer.add("e", size(4, 1)) is None
    assert packer.rows == [["b", "e"], ["d"]]


def test_first_fit_never_exceeds_the_budget_loses_or_reorders():
    rng = np.random.default_rng(1)
    packer, lengths, closed = FirstFit(size(20, 4), bins=3), {}, []
    for n in range(500):
        lengths[n] = size(int(rng.integers(1, 21)), int(rng.integers(0, 5)))
        row = packer.add(n, lengths[n])
        assert len(packer.rows) <= 3
        if row:
            closed.append(row)
    for row in closed + packer.rows:
        assert sum(lengths[n]["tokens"] for n in row) <= 20 and sum(lengths[n]["images"] for n in row) <= 4
        assert row == sorted(row)
    assert sorted(sum(closed + packer.rows, [])) == list(range(500))


def test_without_bins_everything_is_a_row_of_its_own():
    packer = FirstFit(size(10, 2), bins=0)
    assert [packer.add(n, size(1)) for n in range(3)] == [[0], [1], [2]]


# --- conversations that are too long ---

IMAGE = ImageData.from_array(np.zeros((1, 1, 3), np.uint8))


def serializer(conversation):
    """One token a word, one image slot an image."""
    words = sum(len(p.text.split()) for t in conversation.turns for p in t.parts if isinstance(p, Text))
    shown = sum(isinstance(p, Image) for t in conversation.turns for p in t.parts)
    return stream(words, shown, 1)


def dialogue(exchanges: int):
    turns, images = [Turn("system", (Text("s"),))], {}
    for k in range(exchanges):
        images[f"i{k}"] = IMAGE
        turns += [
            Turn("user", (Text("one two"),)),
            Turn("assistant", (Text("three"), Image(f"i{k}")), loss=True),
        ]
    return Conversation("long", tuple(turns), images)


def test_what_fits_is_left_alone():
    result, truncated = fit(dialogue(3), serializer, size(10, 3), "refuse")
    assert stream_length(result) == size(10, 3) and not truncated


def test_refuse_says_what_is_needed():
    with pytest.raises(DataError, match="record long needs 10 tokens, a row holds 9; raise data.tokens, or"):
        fit(dialogue(3), serializer, size(9, 3), "refuse")


def test_drop():
    assert fit(dialogue(3), serializer, size(9, 3), "drop") == (None, False)


@pytest.mark.parametrize("tokens, images, kept", [(9, 9, 2), (99, 2, 2), (6, 9, 1), (4, 1, 1), (99, 9, 9)])
def test_truncate_keeps_the_longest_beginning_that_ends_with_a_reply(tokens, images, kept):
    result, truncated = fit(dialogue(10), serializer, size(tokens, images), "truncate")
    assert truncated and stream_length(result) == size(1 + 3 * kept, kept)


def test_truncate_drops_when_not_even_one_exchange_fits():
    assert fit(dialogue(3), serializer, size(3, 9), "truncate") == (None, False)
    monologue = Conversation("m", (Turn("user", (Text("a b c d e"),)),))
    assert fit(monologue, serializer, size(3, 9), "truncate") == (None, False)


def test_the_oldest_goes_unless_something_depends_on_it():
    turns = [Turn("system", (Text("s"),))]
    for k, needs in enumerate([(), (), (2,), ()]):
        turns += [
            Turn("user", (Text(f"ask {k}"),)),
            Turn("assistant", (Text(f"answer {k}"),), loss=True, depends_on=needs),
        ]
    c = Conversation("d", tuple(turns))
    # The third answer needs the first; the second exchange is the oldest that may go, then the third.
    for tokens, kept in ((17, [0, 1, 2, 3]), (13, [0, 2, 3]), (9, [0, 3]), (5, [3])):
        tried = []

        def noted(c, tried=tried):
            tried.append(c)
            return serializer(c)

        result, truncated = fit(c, noted, size(tokens, 9), "oldest")
        assert stream_length(result)["tokens"] <= tokens and truncated == (len(kept) < 4)
        assert [t.text for t in tried[-1].turns if t.role == "user"] == [f"ask {k}" for k in kept]
        tried[-1].validate()
    shorter = without_oldest(c)
    assert [t.depends_on for t in shorter.turns if t.role == "assistant"] == [(), (2,), ()]
    assert fit(c, serializer, size(4, 9), "oldest") == (None, False)


def test_smaller_takes_the_largest_share_that_fits():
    def sized(c, share=1.0):
        return serializer(dialogue(int(8 * share)))

    for tokens, share in ((25, 1), (24, 0.5), (12, 0.25), (6, 0.125)):
        result, changed = fit(dialogue(8), sized, size(tokens, 9), "smaller")
        assert stream_length(result) == stream_length(sized(None, share)) and changed == (share < 1)
    assert fit(dialogue(8), sized, size(0, 9), "smaller") == (None, False)


def test_a_beginning_is_a_valid_record():
    short = beginning(dialogue(3), 3)
    short.validate()
    assert set(short.images) == {"i0"} and len(short.turns) == 3
