"""Replies: the memory equals reading at once, goes on between turns, and texts are searched as documented."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import mm_interleaved_toy as toy
import numpy as np
import pytest
from flax import nnx

from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, Image, ImageData, Text, Turn
from umm_jax.data.packing import batch, pack_row
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.mm_interleaved.engine import TextSettings
from umm_jax.families.mm_interleaved.generate import Read, Replier
from umm_jax.models.beam import BeamSearch
from umm_jax.models.decoding import penalize


@pytest.fixture(scope="module")
def config():
    return toy.model_config()


@pytest.fixture(scope="module")
def model(config):
    return toy.model(config)


@pytest.fixture(scope="module")
def replier(config, model):
    return Replier(config, nnx.to_pure_dict(nnx.split(model)[1]), toy.Words(), round_tokens=16)


def ask(seed, text="make it blue"):
    return toy.conversation(seed).with_turn(Turn("user", (Text(text),)))


def states(config, model, conversation):
    """Hidden states [T, D] of a finished conversation, read at once, and its ids."""
    stream = toy.serializer(config)(conversation)
    whole = jax.tree.map(
        jnp.asarray, batch([pack_row([stream], toy.serializer(config).spec, {"tokens": 96, "images": 6})])
    )
    return model.hidden(whole, *model.look(whole["images"]["pixels"]))[0], stream["tokens"]["ids"]


def test_reading_in_pieces_equals_reading_at_once(config, model, replier):
    """What the memory holds after a forced drawing is what one pass over the finished stream gives."""
    conversation = ask(3)
    settings = ReplySettings(mode="image", max_tokens=4, max_images=1, image_steps=2)
    reply = replier.reply([conversation], settings, [5])[0]
    assert isinstance(reply.turn.parts[0], Image)
    (read,), memory = replier._kept
    hidden, ids = states(config, model, conversation.with_turn(reply.turn, reply.images))
    n = int(memory.length[0])
    assert read.ids == ids[:n].tolist() and n >= len(ids) - 1  # the end of the turn is not read
    np.testing.assert_allclose(memory.hidden[0, :n], hidden[:n], atol=2e-5)
    np.testing.assert_allclose(memory.last[0], hidden[n - 1], atol=2e-5)


def test_a_conversation_that_goes_on_reads_its_new_turn_only(config, model, replier, monkeypatch):
    settings = ReplySettings(mode="image", max_tokens=4, max_images=1, image_steps=2)
    first = ask(6)
    reply = replier.reply([first], settings, [5])[0]
    longer = first.with_turn(reply.turn, reply.images).with_turn(Turn("user", (Text("make it red"),)))
    seen, read = [], replier.engine.read

    def counted(memory, batch):
        seen.append((int(batch["length"][0]), int(batch["count"][0])))
        return read(memory, batch)

    monkeypatch.setattr(replier.engine, "read", counted)
    going_on = replier.reply([longer], settings, [7])[0]
    new = toy.serializer(config).prompt(longer)["tokens"]["ids"]
    assert len(seen) == 1 and seen[0][0] < len(new) // 3 and seen[0][1] == 0
    memory = replier._kept[1]
    n = int(memory.length[0])
    hidden, _ = states(config, model, longer.with_turn(going_on.turn, going_on.images))
    np.testing.assert_allclose(memory.hidden[0, :n], hidden[:n], atol=5e-5)

    replier._kept = None
    afresh = replier.reply([longer], settings, [7])[0]
    assert afresh.turn == going_on.turn
    for name in going_on.images:
        drawn, again = (r.images[name].array().astype(int) for r in (going_on, afresh))
        assert np.abs(drawn - again).max() <= 1  # another order of additions, at most a last bit


def test_a_conversation_that_was_edited_goes_on_from_where_it_changed(config, model, replier):
    settings = ReplySettings(mode="text", max_tokens=4)
    base = toy.conversation(8, 2)
    replier.reply([base.with_turn(Turn("user", (Text("make it red"),)))], settings)
    rng = np.random.default_rng(0)
    other = ImageData.from_array(rng.integers(0, 256, (toy.SIDE, toy.SIDE, 3), dtype=np.uint8))
    name = [p.ref for t in base.turns for p in t.parts if isinstance(p, Image)][-1]
    changed = Conversation("edited", base.turns, base.images | {name: other})
    changed = changed.with_turn(Turn("user", (Text("what color is it"),)))
    replier.reply([changed], settings)
    memory = replier._kept[1]
    hidden, ids = states(config, model, changed)
    assert int(memory.length[0]) > len(ids)
    np.testing.assert_allclose(memory.hidden[0, : len(ids)], hidden[: len(ids)], atol=5e-5)


def test_layers_that_do_not_fill_the_last_group(config):
    """Five layers, a synchronizer in every second: as six whose last does nothing, also from memory."""
    six = toy.model(replace(config, backbone=replace(config.backbone, layers=6)))
    idle = six.backbone.layers
    for kernel in (idle.attention.o.kernel, idle.mlp.down.kernel):
        kernel[...] = jnp.asarray(kernel[...]).at[5].set(0.0)
    short = replace(config, backbone=replace(config.backbone, layers=5))
    params = nnx.to_pure_dict(nnx.split(six)[1])
    params["backbone"]["layers"] = jax.tree.map(lambda a: a[:5], params["backbone"]["layers"])
    replier = Replier(short, params, toy.Words(), round_tokens=16)
    _, memory = replier._read_prompts([replier.serializer.prompt(ask(3))], ReplySettings(max_tokens=8))
    hidden, ids = states(config, six, ask(3))
    assert memory.values.shape[0] == 3
    np.testing.assert_allclose(memory.hidden[0, : len(ids)], hidden[: len(ids)], atol=2e-5)
    at_once, _ = states(short, replier.engine.model(params), ask(3))
    np.testing.assert_allclose(at_once, hidden, atol=2e-5)


def test_what_two_readings_share_cuts_no_image():
    pixels = np.zeros((2, 2, 3), np.uint8)

    def note(ids, *images):
        read = Read(list(ids))
        for soi, value in images:
            read.see(soi, pixels + value)
        return read

    text, slots = [1, 2, 3, 7], [8, 8]
    one = note([*text, *slots, 5, 6], (3, 0))
    assert one.shared(note([*text, *slots, 5, 9], (3, 0)), 2) == (7, 1)
    assert one.shared(note([*text, *slots, 5, 6], (3, 1)), 2) == (4, 0)  # another picture in the same place
    assert one.shared(note([1, 2, 4, 7, *slots], (3, 0)), 2) == (2, 0)
    assert one.shared(note([*text, *slots], (3, 0)), 2) == (6, 1)
    assert note(text).shared(one, 2) == (4, 0)


def test_new_parameters_forget_what_was_read_with_the_old(replier):
    replier.reply([ask(3)], ReplySettings(mode="text", max_tokens=2))
    assert replier._kept is not None
    replier.params = replier.params
    assert replier._kept is None


# --- searching for text -----------------------------------------------------------------------------


def follow(replier, memory, ids):
    """Log-probabilities [V] of what comes after `ids`, given a memory of one row."""
    if ids:
        batch = {"ids": np.array([ids]), "image": np.full((1, len(ids)), -1)}
        batch |= {"slot": np.zeros((1, len(ids)), np.int32), "length": np.array([len(ids)], np.int32)}
        memory = replier.engine.read(memory, batch | {"pixels": np.zeros((1, 0, toy.SIDE, toy.SIDE, 3))})
    logits = replier.engine.model(replier.params).head(memory.last)[0]
    return np.asarray(jax.nn.log_softmax(jnp.where(replier.engine.never, -jnp.inf, logits)))


def test_beam_search_with_a_beam_for_every_token_finds_the_most_probable_text(replier):
    """Two tokens at most, as many beams as tokens: the search is exhaustive; all texts are tried here."""
    _, memory = replier._read_prompts([replier.serializer.prompt(ask(3))], ReplySettings(max_tokens=8))
    end = replier.serializer.end
    free = [t for t in range(replier.config.vocab) if not replier.engine.never[t]]
    first = follow(replier, memory, [])
    scores = {(end,): first[end]}
    for a in set(free) - {end}:
        after = follow(replier, memory, [a])
        scores |= {(a, b): first[a] + after[b] for b in free}
    settings = TextSettings((end,), beams=len(free), length_penalty=0.0)
    _, written = replier.engine.write(memory, settings, limit=2, keys=jax.random.split(jax.random.key(0), 1))
    assert tuple(written.ids[0, : written.count[0]].tolist()) == max(scores, key=scores.get)


def test_one_beam_is_greedy(replier):
    streams = [replier.serializer.prompt(ask(seed)) for seed in (3, 4)]
    _, memory = replier._read_prompts(streams, ReplySettings(max_tokens=8))
    stops = (replier.serializer.end, replier.serializer.soi)
    keys = jax.random.split(jax.random.key(0), 2)
    _, greedy = replier.engine.write(memory, TextSettings(stops), limit=5, keys=keys)
    search = replier.engine._write_beams(
        memory, TextSettings(stops, beams=1), 5, np.ones(2, bool), np.full(2, 5), np.zeros(2, bool), None
    )[1]
    for b in range(2):
        assert search.ids[b, : search.count[b]].tolist() == greedy.ids[b, : greedy.count[b]].tolist()
    np.testing.assert_array_equal(search.stop, greedy.stop)


def test_a_beam_ends_when_nothing_running_can_win():
    search = BeamSearch(2, stops=(9,), budget=np.array([5]), length_penalty=0.0)
    assert search.candidates == 4
    tokens, sources = search.advance(np.array([[-0.1, -0.5, -3.0, -4.0]]), np.array([[1, 9, 2, 3]]), 10)
    assert tokens.tolist() == [1, 2] and sources.tolist() == [0, 0] and not search.done
    assert search.finished[0][0].ids == () and search.finished[0][0].stop == 9
    search.advance(np.array([[-0.6, -3.5, -4.0, -5.0]]), np.array([[9, 14, 13, 12]]), 10)
    assert search.done
    assert search.best()[0].ids == () and search.best()[0].score == pytest.approx(-0.5)


def test_longer_texts_win_with_a_length_penalty():
    search = BeamSearch(1, stops=(9,), budget=np.array([3]), length_penalty=2.0)
    search.advance(np.array([[-1.0, -1.2]]), np.array([[1, 9]]), 10)
    search.advance(np.array([[-1.6, -1.9]]), np.array([[9, 3]]), 10)
    assert search.best()[0].ids == (1,) and search.best()[0].score == pytest.approx(-1.6 / 2**2)


def test_stops_wait_for_the_least_number_of_tokens(replier):
    for beams in (1, 3):
        settings = ReplySettings(max_tokens=7, min_tokens=4, max_images=0, beams=beams)
        _, memory = replier._read_prompts([replier.serializer.prompt(ask(3))], settings)
        text = replier._text_settings(settings)
        _, written = replier.engine.write(memory, text, limit=7, keys=jax.random.split(jax.random.key(0), 1))
        assert written.count[0] >= 4
        assert not set(text.stops) & set(written.ids[0, :4].tolist())


def test_repetition_is_penalized(replier):
    scores = penalize(jnp.array([[2.0, -2.0, 1.0]]), jnp.array([[True, True, False]]), jnp.float32(2.0))
    assert np.asarray(scores).tolist() == [[1.0, -4.0, 1.0]]
    settings = ReplySettings(mode="text", max_tokens=6, min_tokens=5, repetition_penalty=1e6)
    _, memory = replier._read_prompts([replier.serializer.prompt(ask(3))], settings)
    text = replier._text_settings(settings)
    _, written = replier.engine.write(
        memory, text, limit=6, keys=jax.random.split(jax.random.key(0), 1), forbid=np.array([True])
    )
    ids = written.ids[0, : written.count[0]].tolist()
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "values, said",
    [(dict(beams=0), "at least 1"), (dict(beams=2, temperature=1.0), "temperature 0")]
    + [(dict(min_tokens=64), "below max_tokens"), (dict(repetition_penalty=0.0), "positive")],
)
def test_impossible_text_settings_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        ReplySettings(**values)


# --- replies ----------------------------------------------------------------------------------------


def test_a_reply_does_not_depend_on_its_batch(replier):
    settings = ReplySettings(max_tokens=6, max_images=1, image_steps=2, temperature=1.0)
    asked = [
        ask(3),
        toy.conversation(4, 1).with_turn(Turn("user", (Text("what is it"),))),
        ask(5, "draw a circle"),
    ]
    together = replier.reply(asked, settings, [11, 12, 13])
    for conversation, seed, reply in zip(asked, [11, 12, 13], together, strict=True):
        alone = replier.reply([conversation], settings, [seed])[0]
        assert [type(p) for p in alone.turn.parts] == [type(p) for p in reply.turn.parts]
        assert [p for p in alone.turn.parts if isinstance(p, Text)] == [
            p for p in reply.turn.parts if isinstance(p, Text)
        ]
        for ref, image in alone.images.items():
            difference = image.array().astype(int) - reply.images[ref].array().astype(int)
            assert np.abs(difference).max() <= 1


def test_mode_decides_whether_an_image_may_be_drawn(replier):
    for seed in range(3):
        drawn = replier.reply([ask(seed)], ReplySettings(mode="image", max_tokens=3, image_steps=1), [seed])[
            0
        ]
        assert isinstance(drawn.turn.parts[0], Image) and len(drawn.images) == 1
        text = replier.reply([ask(seed)], ReplySettings(mode="text", max_tokens=8, temperature=2.0), [seed])[
            0
        ]
        assert not text.images


def test_a_reply_continues_a_conversation(replier):
    conversation = ask(3)
    reply = replier.reply([conversation], ReplySettings(mode="image", max_tokens=3, image_steps=1), [0])[0]
    longer = conversation.with_turn(reply.turn, reply.images).with_turn(Turn("user", (Text("what is it"),)))
    longer.validate()
    assert isinstance(reply.images[reply.turn.parts[0].ref], ImageData)
    assert replier.reply([longer], ReplySettings(mode="text", max_tokens=3), [0])[0].turn.role == "assistant"


def test_a_reply_looks_back_at_as_many_images_as_the_model_can(replier):
    """Seven in the toy; padding, which rounds to four, must not make them eight."""
    full = toy.conversation(6, 7).with_turn(Turn("user", (Text("what is it"),)))
    assert len(full.images) == 7
    assert replier.reply([full], ReplySettings(mode="text", max_tokens=2), [0])[0].turn.role == "assistant"
    with pytest.raises(DataError, match="7 images shown and 1 to come: this model looks back at 7"):
        replier.reply([full], ReplySettings(max_tokens=2), [0])


@pytest.mark.parametrize("turns", [(), toy.conversation(0, 1).turns])
def test_nothing_to_answer_is_an_error(replier, turns):
    images = toy.conversation(0, 1).images if turns else {}
    with pytest.raises(DataError, match="ends with a user turn"):
        replier.reply([Conversation("e", turns, images)])
