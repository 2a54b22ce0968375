"""Replies of ChatUMM: the model decides, nothing is read twice, and bad settings are named."""

import dataclasses

import chatumm_toy as toy
import numpy as np
import pytest

from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, Image, Text, Turn
from umm_jax.errors import ConfigError, DataError
from umm_jax.models.guidance import GuidanceConfig, guide

SETTINGS = ReplySettings(max_tokens=6, max_images=1, image_steps=2, guidance=1.0)


@pytest.fixture(scope="module")
def config():
    return toy.model_config()


@pytest.fixture(scope="module")
def model(config):
    return toy.model(config)


def test_a_row_does_not_depend_on_its_neighbours(config, model):
    asked = [toy.asked(toy.conversation(s, 1, upload=s == 1), "draw a circle") for s in range(3)]
    settings = dataclasses.replace(SETTINGS, temperature=1.0)
    together = toy.replier(config, model).reply(asked, settings, seeds=[5, 6, 7])
    single = toy.replier(config, model, keep=False)
    for i, c in enumerate(asked):
        alone = single.reply([c], settings, seeds=[5 + i])[0]
        assert alone.turn == together[i].turn and alone.stopped == together[i].stopped
        assert {k: v.data for k, v in alone.images.items()} == {
            k: v.data for k, v in together[i].images.items()
        }


def test_a_conversation_that_goes_on_reads_only_what_is_new(config, model):
    # One capacity for the whole chat, so that little is compiled.
    replier, forgetful = (toy.replier(config, model, round_tokens=512, keep=keep) for keep in (True, False))
    c, fresh = toy.asked(Conversation("chat", ()), "draw a red circle"), []
    words = len(toy.Words().encode("draw a red circle"))
    for turn in range(10):
        mode = "image" if turn % 3 == 0 else "text"
        settings = dataclasses.replace(SETTINGS, mode=mode)
        reply = replier.reply([c], settings, [turn])[0]
        fresh.append(replier.prefilled[0])
        again = forgetful.reply([c], settings, [turn])[0]
        assert again.turn == reply.turn
        assert [i.data for i in again.images.values()] == [i.data for i in reply.images.values()]
        c = toy.asked(c.with_turn(reply.turn, reply.images), "make it blue")
    assert fresh[0] == words + 2
    # Each later turn reads its own five tokens; what the model wrote and drew it has read already.
    assert fresh[1:] == [len(toy.Words().encode("make it blue")) + 2] * 9


def test_an_edited_conversation_goes_on_from_the_change(config, model):
    replier = toy.replier(config, model)
    c = toy.asked(toy.conversation(0, 2), "make it red")
    replier.reply([c], SETTINGS, [0])
    turns = [*c.turns[:-1], Turn("user", (Text("make it blue"),))]
    edited = dataclasses.replace(c, turns=tuple(turns))
    reply = replier.reply([edited], SETTINGS, [0])[0]
    assert replier.prefilled == [5]
    assert reply.turn == toy.replier(config, model).reply([edited], SETTINGS, [0])[0].turn
    other = toy.asked(toy.conversation(3, 2), "make it blue")
    replier.reply([other], SETTINGS, [0])
    assert replier.prefilled[0] > 50


def test_a_reply_that_is_broken_off_leaves_nothing_half_read(config, model, monkeypatch):
    replier = toy.replier(config, model)
    c = toy.asked(toy.conversation(0, 1), "make it red")
    settings = dataclasses.replace(SETTINGS, mode="image")
    expected = replier.reply([c], settings, [0])[0]
    with monkeypatch.context() as patch:
        patch.setattr(replier.engine, "draw", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            replier.reply([toy.asked(c, "draw a circle")], settings, [1])
    again = replier.reply([c], settings, [0])[0]
    assert again.turn == expected.turn
    assert [i.data for i in again.images.values()] == [i.data for i in expected.images.values()]


def test_modes_force_and_forbid(config, model):
    c = toy.asked(Conversation("c", ()), "draw a circle")
    replier = toy.replier(config, model)
    image = replier.reply([c], dataclasses.replace(SETTINGS, mode="image"))[0]
    assert isinstance(image.turn.parts[0], Image) and len(image.images) == 1
    picture = next(iter(image.images.values()))
    assert (picture.height, picture.width) == (16, 16)  # nothing was shown: the canvas
    text = replier.reply([c], dataclasses.replace(SETTINGS, mode="text"))[0]
    assert not text.images


def test_the_size_of_a_picture_is_that_of_the_last_or_as_asked(config, model):
    c = toy.asked(toy.conversation(0, 1, upload=True, size=(8, 16)), "make it blue")
    replier, settings = toy.replier(config, model), dataclasses.replace(SETTINGS, mode="image")
    drawn = next(iter(replier.reply([c], settings)[0].images.values()))
    assert (drawn.height, drawn.width) == (8, 16)
    asked = dataclasses.replace(settings, image_size=(12, 8))
    drawn = next(iter(replier.reply([c], asked)[0].images.values()))
    assert (drawn.height, drawn.width) == (12, 8)
    with pytest.raises(ConfigError, match="image_size=10 x 8: sides are multiples of 4, at most 16"):
        replier.reply([c], dataclasses.replace(settings, image_size=(10, 8)))


def test_a_turn_is_bounded_whatever_the_model_says(config, model, monkeypatch):
    params = toy.params(model)
    scale = params["mixture"]["understanding_norm"]["scale"]
    params["mixture"]["understanding_norm"]["scale"] = 0 * scale  # every token is as likely as every other
    replier = toy.replier(config)
    replier.params = params
    c = toy.asked(Conversation("c", ()), "draw a circle")
    settings = dataclasses.replace(SETTINGS, mode="text", max_tokens=5)
    reply = replier.reply([c], settings)[0]
    # One word for ever, then a text for ever: closed by the budget, and said to be.
    assert len(reply.turn.parts[0].text.split()) == 5 and reply.stopped == "tokens"
    replier.engine.never[:] = True  # an end token is all that can be written
    replier.engine.__init__(config, params, replier.engine.special, replier.engine.never)
    monkeypatch.setattr(replier.engine, "decide", lambda memory, *_: np.zeros(len(memory.length), int))
    reply = replier.reply([c], settings)[0]
    assert reply.turn.parts == () and reply.stopped == "tokens"


def test_what_cannot_be_answered_is_named(config, model):
    replier = toy.replier(config, model)
    with pytest.raises(DataError, match="record e: a reply needs a conversation that ends with a user turn"):
        replier.reply([Conversation("e", ())], SETTINGS)
    with pytest.raises(DataError, match="ends with a user turn"):
        replier.reply([toy.conversation(0)], SETTINGS)
    c = toy.asked(Conversation("c", ()), "draw a circle")
    with pytest.raises(ConfigError, match="no beam search"):
        replier.reply([c], dataclasses.replace(SETTINGS, beams=2))
    plain = toy.model_config(layout={**toy.model_section()["layout"], "control": False})
    untaught = toy.replier(plain, toy.model(plain))
    with pytest.raises(ConfigError, match="mode=auto: this model was not taught"):
        untaught.reply([c], SETTINGS)
    reply = untaught.reply([c], dataclasses.replace(SETTINGS, mode="image"))[0]
    assert [type(p) for p in reply.turn.parts] == [Image] and reply.stopped == "end"


def test_guidance_reads_the_contexts_it_names(config, model):
    """Through what is kept, pictures are those drawn from the beginning; `umm convert verify` compares each
    branch with the reference."""
    settings = dataclasses.replace(SETTINGS, mode="image", guidance=3.0, image_guidance=1.5)
    c = toy.asked(toy.conversation(0, 1, upload=True), "make it blue")
    replier = toy.replier(config, model)
    first = replier.reply([c], settings, [1])[0]
    forgetful = toy.replier(config, model, keep=False)
    again = forgetful.reply([c], settings, [1])[0]
    plain = replier.reply([c], dataclasses.replace(settings, guidance=1.0), [1])[0]
    data = [next(iter(r.images.values())).data for r in (first, again, plain)]
    assert data[0] == data[1] != data[2]
    c = toy.asked(c.with_turn(first.turn, first.images), "make it red")
    on = replier.reply([c], settings, [2])[0]
    off = forgetful.reply([c], settings, [2])[0]
    assert [i.data for i in on.images.values()] == [i.data for i in off.images.values()]


def test_guide_keeps_norms_and_ignores_images_without_text():
    rng = np.random.default_rng(0)
    v, free, other = (rng.normal(size=(2, 5, 3)).astype(np.float32) for _ in range(3))
    whole = guide(v, free, other, 4.0, GuidanceConfig(image=1.5))
    assert (np.linalg.norm(whole, axis=(1, 2)) <= np.linalg.norm(v, axis=(1, 2)) * (1 + 1e-5)).all()
    each = guide(v, free, other, 4.0, GuidanceConfig(image=1.5, renorm="channel"))
    assert (np.linalg.norm(each, axis=2) <= np.linalg.norm(v, axis=2) * (1 + 1e-5)).all()
    np.testing.assert_array_equal(guide(v, free, other, 1.0, GuidanceConfig(image=2.0)), v)
    np.testing.assert_allclose(
        guide(v, free, None, 2.0, GuidanceConfig(image=1.0, renorm_least=1.0)),
        2 * v - free,
        rtol=1e-5,
        atol=1e-6,
    )
