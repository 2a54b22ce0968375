"""Replies of UnifiedMLLM: a model that has conversations by heart says them, and what it asks is done."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import unified_toy as toy
from flax import nnx

from umm_jax.config import ReplySettings
from umm_jax.conversation import Box, Conversation, Image, Mask, TaskCall, Text
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.unified_mllm.engine import Sampling

LONG = ReplySettings(max_tokens=90, max_images=2)


def quiet(**changes):
    tower = toy.section()["tower"]
    return toy.config(tower={**tower, "pyramid": {**tower["pyramid"], "noise": 0.0}}, **changes)


def other() -> Conversation:
    turns = (
        toy.user(Image("a"), "how many are left"),
        toy.bot("one two"),
        toy.user("segment the red ring"),
        toy.bot(
            "sure", toy.call("image_seg", "the red ring"), toy.region(rows=slice(0, 6), columns=slice(0, 8))
        ),
    )
    return Conversation("other", turns, {"a": toy.picture(7)})


@pytest.fixture(scope="module")
def trained():
    """Parameters that have both conversations by heart."""
    config = quiet()
    lay, model = toy.serializer(), toy.model(config)
    batch = toy.batch([[toy.chain()], [other()]], lay)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(3e-3)

    def loss(params):
        made = nnx.merge(graphdef, params, rest)
        sums, _ = made.loss_sums(batch, jax.random.key(0))
        weights = made.loss_weights(batch)
        scale = {"text": 1.0, "mask": 2.0, "dice": 0.5}
        return sum(scale[name] * sums[name] / weights[name] for name in sums)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=400)

    (params, _), values = run(params)
    assert values[-1] < 0.05 * values[0]
    return config, nnx.to_pure_dict(nnx.split(nnx.merge(graphdef, params, rest))[1])


def replier(trained, **changes):
    config, params = trained
    return toy.FAMILY.generate.Replier(dataclasses.replace(config, **changes), params, toy.tokenizer())


def opening(conversation: Conversation, turns: int) -> Conversation:
    said = conversation.turns[:turns]
    shown = {part.ref for turn in said for part in turn.parts if isinstance(part, Image)}
    images = {ref: image for ref, image in conversation.images.items() if ref in shown}
    return dataclasses.replace(conversation, turns=said, images=images)


def iou(found: Mask, wanted: Mask) -> float:
    a, b = found.array(), wanted.array()
    return (a & b).sum() / (a | b).sum()


def test_what_is_asked_is_done_and_looked_at(trained):
    asked = []
    r = replier(trained)

    def make(question):
        asked.append(question)
        return toy.picture(2)

    r.experts = make
    chain = toy.chain()
    replies = r.reply([opening(chain, 1), opening(other(), 3)], LONG)
    first, second = replies
    kinds = [type(p) for p in first.turn.parts]
    assert kinds == [Text, TaskCall, Mask, TaskCall, Image, Text]
    assert first.turn.text == "sure one" and first.stopped == "end"
    assert first.turn.parts[1] == toy.call("image_seg", "the red ring")
    assert first.turn.parts[3].name == "image_edit"
    assert iou(first.turn.parts[2], toy.region()) > 0.8
    name = first.turn.parts[4].ref
    assert first.images == {name: toy.picture(2)}
    (question,) = asked
    assert question.source == chain.images["a"] and question.step.prompt == "make it blue"
    assert question.step.call.boxes == ((0.5, 0.25, 1.0, 0.62),)
    assert [type(p) for p in second.turn.parts] == [Text, TaskCall, Mask] and not second.images
    assert iou(second.turn.parts[2], other().turns[3].parts[2]) > 0.8

    # The turns after it are about what was made.
    more = opening(chain, 1).with_turn(first.turn, first.images).with_turn(chain.turns[2])
    more.validate()
    (third,) = r.reply([more], LONG)
    assert third.turn.parts == (Text("there is"), Box(name, (0.25, 0.5, 0.75, 1.0), "a ring"))


def test_a_row_does_not_depend_on_its_neighbours(trained):
    r = replier(trained)
    both = r.reply([opening(toy.chain(), 1), opening(other(), 1)], LONG, [3, 4])
    alone = r.reply([opening(other(), 1)], LONG, [4])
    assert both[1] == alone[0] and alone[0].turn.text == "one two"


def test_without_anybody_calls_are_parts_of_the_reply(trained):
    (reply,) = replier(trained).reply([opening(toy.chain(), 1)], LONG)
    assert [type(p) for p in reply.turn.parts] == [Text, TaskCall, Mask, TaskCall] or reply.turn.parts[4:]
    assert not reply.images and all(not isinstance(p, Image) for p in reply.turn.parts)


def test_a_picture_that_could_not_be_made_is_not_replaced(trained):
    r = replier(trained)
    r.experts = lambda question: None
    (reply,) = r.reply([opening(toy.chain(), 1)], LONG)
    assert not reply.images and [p.name for p in reply.turn.parts if isinstance(p, TaskCall)][:2] == [
        "image_seg",
        "image_edit",
    ]


@pytest.mark.parametrize("tokens", [1, 4, 9, 20, 33])
def test_a_short_budget_leaves_nothing_open(trained, tokens):
    """Whatever there is room for, tags balance and places are whole: the constraint sees the budget."""
    r = replier(trained)
    (reply,) = r.reply([opening(toy.chain(), 1)], ReplySettings(max_tokens=tokens))
    assert reply.stopped == "end"
    for part in reply.turn.parts:
        if isinstance(part, TaskCall):
            assert part.args["payload"] != "" or part.name == "image_seg"
    free = replier(trained, constrain="off")
    (loose,) = free.reply([opening(toy.chain(), 1)], ReplySettings(max_tokens=tokens))
    assert loose.stopped == "tokens"


def test_sampling_is_by_seed_and_stays_well_formed(trained):
    r = replier(trained)
    hot = ReplySettings(max_tokens=40, temperature=3.0)
    c = opening(toy.chain(), 1)
    replies = r.reply([c] * 4, hot, [1, 1, 2, 3])
    assert replies[0] == replies[1] and len({str(reply.turn) for reply in replies}) > 1
    for reply in replies:
        c.with_turn(reply.turn, reply.images).validate()


def test_settings_it_cannot_follow(trained):
    r = replier(trained)
    c = [opening(toy.chain(), 1)]
    for wrong in (dict(mode="image"), dict(guidance=2.0), dict(beams=2), dict(image_steps=3)):
        with pytest.raises(ConfigError, match="this family"):
            r.reply(c, ReplySettings(**wrong))
    with pytest.raises(DataError, match="ends with a user turn"):
        r.reply([opening(toy.chain(), 2)])
    assert r.reply([]) == []


def test_a_model_without_a_mask_head_only_says_so(trained):
    config, params = trained
    bare = {name: value for name, value in params.items() if name != "masks"}
    r = toy.FAMILY.generate.Replier(dataclasses.replace(config, masks=None), bare, toy.tokenizer())
    (reply,) = r.reply([opening(toy.chain(), 1)], LONG)
    assert any(isinstance(p, TaskCall) for p in reply.turn.parts)
    assert not any(isinstance(p, Mask) for p in reply.turn.parts)


def test_boxes_written_are_those_learned(trained):
    r = replier(trained)
    (reply,) = r.reply([opening(toy.chain(), 3)], LONG)
    (box,) = [p for p in reply.turn.parts if isinstance(p, Box)]
    np.testing.assert_allclose(box.xyxy, (0.25, 0.5, 0.75, 1.0))
    assert box.label == "a ring" and box.of == "b"


def test_writing_in_two_goes_equals_one(trained):
    """What a reply holds already is remembered where it stopped for a picture."""
    r = replier(trained, constrain="off")
    engine, end = r.engine, r.serializer.end
    prompts = r._collate(
        [r.serializer.prompt(opening(toy.chain(), 1)), r.serializer.prompt(opening(other(), 1))]
    )
    keys = jax.vmap(jax.random.key)(np.arange(2, dtype=np.uint32))

    def write(*goes):
        memory, found = engine.read(engine.empty(2, 128), prompts), [[], []]
        choice, active = Sampling(*np.float32((0, 1, 8)), least=np.int32(0)), np.ones(2, bool)
        for budget in goes:
            memory, written = engine.write(
                memory, choice, keys, active, np.full(2, budget), limit=8, stops=(end,)
            )
            active &= written.stop == 0
            for row, ids, count in zip(found, written.ids, written.count):
                row += ids[:count].tolist()
        return found

    whole = write(8)
    assert write(3, 5) == whole
    assert max(len(row) - len(set(row)) for row in whole) == 0
