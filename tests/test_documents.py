"""Documents: what a record of one is, how it is laid out, and how pictures are brought to size."""

import dataclasses

import mm_interleaved_toy as toy
import numpy as np
import PIL.Image
import pytest

from umm_jax.conversation import Box, Conversation, Image, ImageData, RecordError, Text, Turn
from umm_jax.families.mm_interleaved import stream
from umm_jax.families.mm_interleaved.stream import fit

WORDS = toy.Words()
BOS, EOS, SOI, SLOT = (WORDS.id(piece) for piece in ("<s>", "</s>", "<soi>", "<image>"))
RED, BLUE, CIRCLE = WORDS.encode("red blue circle")
SHOWN = [SOI] + [SLOT] * toy.SLOTS


def document(*parts, loss: bool = True) -> Conversation:
    """Strings, and None for an image."""
    images, laid = {}, []
    for part in parts:
        if part is None:
            ref = f"i{len(images)}"
            pixels = np.full((toy.SIDE, toy.SIDE, 3), 9 * len(images), np.uint8)
            images[ref] = ImageData.from_array(pixels)
            laid.append(Image(ref))
        else:
            laid.append(Text(part) if isinstance(part, str) else part)
    return Conversation("d", (Turn("document", tuple(laid), loss=loss),), images)


# --- the record -----------------------------------------------------------------------------------------


def test_a_document_is_a_record_like_any_other():
    record = document("red", None)
    record.validate()
    assert (
        Conversation.from_msgpack(record.to_msgpack()) == record == Conversation.from_json(record.to_json())
    )


def test_a_document_stands_alone():
    record = document("red", None)
    for turns in ((*record.turns, Turn("user", (Text("x"),))), (Turn("system", (Text("x"),)), *record.turns)):
        with pytest.raises(RecordError, match="record d: a document stands alone"):
            dataclasses.replace(record, turns=turns).validate()
    with pytest.raises(RecordError, match="only assistant and document turns are learned"):
        Conversation("u", (Turn("user", (Text("x"),), loss=True),)).validate()


# --- the layout -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lay():
    return toy.serializer(toy.model_config())


@pytest.mark.parametrize(
    "parts, ids, weights, soi",
    [
        # Text first: its soi is a decision the model can learn. Slots never are learned.
        (("red", None), [BOS, RED, *SHOWN, EOS], [0, 1, 1, *[0] * toy.SLOTS, 1], [2]),
        # A picture first: nothing tells that the document begins with one.
        ((None, "red"), [BOS, *SHOWN, RED, EOS], [0, 0, *[0] * toy.SLOTS, 1, 1], [1]),
        ((None, None), [BOS, *SHOWN, *SHOWN, EOS], [0, 0, *[0] * toy.SLOTS, 1, *[0] * toy.SLOTS, 1], [1, 6]),
        (("red blue",), [BOS, RED, BLUE, EOS], [0, 1, 1, 1], []),
    ],
)
def test_layout_and_loss(lay, parts, ids, weights, soi):
    stream = lay(document(*parts))
    tokens, images = stream["tokens"], stream["images"]
    assert tokens["ids"].tolist() == ids and tokens["weight"].tolist() == weights
    assert images["soi"].tolist() == soi and images["draw"].tolist() == [1.0] * len(soi)
    for k, at in enumerate(soi):
        assert tokens["image"][at : at + 1 + toy.SLOTS].tolist() == [-1] + [k] * toy.SLOTS
        assert tokens["slot"][at + 1 : at + 1 + toy.SLOTS].tolist() == list(range(toy.SLOTS))
        assert (images["pixels"][k] == 9 * k).all()


def test_what_is_not_learned_is_only_shown(lay):
    stream = lay(document("red", None, "blue", loss=False))
    assert not stream["tokens"]["weight"].any() and not stream["images"]["draw"].any()


class Letters(toy.Words):
    """Ids are code points, so that blanks can be seen."""

    size = 10_000

    def encode(self, text):
        return [1000 + ord(letter) for letter in text]


def test_no_blank_is_left_beside_an_image():
    layout = dict(toy.model_section()["layout"])
    lay = toy.families.get("mm_interleaved").stream.Serializer({"layout": layout}, Letters())
    stream = lay(
        document(" one ", None, " ", None, " two", " three ", Box("i0", (0, 0, 1, 1)), " four ", None, ".")
    )
    ids = stream["tokens"]["ids"].tolist()
    letters = "".join(chr(i - 1000) if i >= 1000 else {SOI: "*", SLOT: "#"}.get(i, "|") for i in ids)
    image = "*" + "#" * toy.SLOTS
    # Blanks away from images stay, texts that touch are one, and a box is six pieces.
    assert letters == f"| one{image}{image}two three |||||| four{image}.|"


def test_a_prompt_is_a_document_left_open(lay):
    whole, open_ = lay(document("red", None)), lay.prompt(document("red", None))
    assert whole["tokens"]["ids"].tolist() == [*open_["tokens"]["ids"].tolist(), EOS]


def test_conversations_are_laid_out_as_before(lay):
    user, bot, eot = (WORDS.id(piece) for piece in ("<user>", "<bot>", "<eot>"))
    images = {"a": ImageData.from_array(np.zeros((toy.SIDE, toy.SIDE, 3), np.uint8))}
    turns = (
        Turn("user", (Text("red"), Image("a"))),
        Turn("assistant", (Image("a"), Text("blue")), loss=True),
    )
    tokens = lay(Conversation("c", turns, images))["tokens"]
    assert tokens["ids"].tolist() == [BOS, user, RED, *SHOWN, eot, bot, *SHOWN, BLUE, eot]
    weights = [0] * (3 + len(SHOWN) + 2) + [1] + [0] * toy.SLOTS + [1, 1]
    assert tokens["weight"].tolist() == weights


# --- bringing pictures to size --------------------------------------------------------------------------


def expected(pixels: np.ndarray, side: int) -> np.ndarray:
    """The steps of the specification (section 8), one by one."""
    picture = PIL.Image.fromarray(pixels)
    while min(picture.size) >= 2 * side:
        picture = picture.resize(tuple(edge // 2 for edge in picture.size), PIL.Image.Resampling.BOX)
    scale = side / min(picture.size)
    wide, high = (round(edge * scale) for edge in picture.size)
    whole = np.asarray(picture.resize((wide, high), PIL.Image.Resampling.BICUBIC))
    top, left = (high - side) // 2, (wide - side) // 2
    return whole[top : top + side, left : left + side]


@pytest.mark.parametrize(
    "shape", [(24, 24), (48, 48), (47, 61), (97, 131), (131, 97), (200, 51), (13, 30), (24, 25), (385, 1000)]
)
def test_pictures_are_brought_to_size_as_specified(shape):
    """To the last bit: odd sides lose their last pixel at each halving, small pictures are enlarged."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    out = fit(pixels, 24)
    assert out.shape == (24, 24, 3) and out.dtype == np.uint8
    np.testing.assert_array_equal(out, expected(pixels, 24))


def test_halving_is_the_mean_of_four_and_the_crop_is_central():
    pixels = np.random.default_rng(1).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    half = pixels.reshape(16, 2, 32, 2, 3).mean((1, 3))
    out = fit(pixels, 16).astype(float)  # one halving, no further change of size, the middle 16 columns
    assert np.abs(out - half[:, 8:24]).max() <= 1.0  # rounded twice


# --- how pictures are halved and decoded ------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 48), (65, 48), (64, 49), (97, 131), (640, 480)])
def test_halving_is_that_of_a_box_filter_to_the_last_level(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels)
    box = picture.resize((size[0] // 2, size[1] // 2), PIL.Image.Resampling.BOX)
    assert (np.asarray(stream._halved(picture)) == np.asarray(box)).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_large_jpegs_may_be_decoded_at_a_fraction_of_their_size(format):
    import io

    coarse = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    smooth = PIL.Image.fromarray(coarse).resize((320, 256), PIL.Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    smooth.save(buffer, format, **({"quality": 90} if format == "JPEG" else {}))
    image = ImageData(buffer.getvalue(), f"image/{format.lower()}", 320, 256)
    sizes = [image.picture(least).size[::-1] for least in (None, 129, 128, 60, 10)]
    small = [(128, 160), (64, 80), (32, 40)] if format == "JPEG" else [(256, 320)] * 3
    assert sizes == [(256, 320), (256, 320), *small]
    exact, scaled = (fit(image.picture(least), 100) for least in (None, 100))
    assert exact.shape == scaled.shape == (100, 100, 3)
    assert np.abs(exact.astype(int) - scaled).mean() < 2
    if format == "PNG":
        assert (exact == scaled).all()
