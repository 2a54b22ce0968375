"""Worlds whose bot asks for what it shows: calls that stand alone, chains, and what they are judged by."""

import dataclasses

import numpy as np
import pytest

from umm_jax.conversation import Image, ImageData, Mask, TaskCall, Text, Turn
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.errors import ConfigError
from umm_jax.evaluate.world_expert import world_executor
from umm_jax.markup import records
from umm_jax.markup.plan import Source, Step
from umm_jax.router.experts import Medium
from umm_jax.world import oracles, skills
from umm_jax.world.corpus import vocabulary_text
from umm_jax.world.dialogue import sample_dialogue
from umm_jax.world.judge import Judge
from umm_jax.world.scene import WorldConfig
from umm_jax.world.talk import world

OPS = dict(ask=1.0, segment=0.7)
CALLS = WorldConfig.preset("tiny", calls=True, chain=[1, 3], talk=[0, 3], talk_ops=OPS, first_upload=0.6)
SAMPLE = [sample_dialogue(CALLS, 5, index) for index in range(120)]


def calls(turn: Turn) -> list[TaskCall]:
    return [part for part in turn.parts if isinstance(part, TaskCall)]


def test_dialogues_are_sound():
    sizes, kinds = [], set()
    for record in SAMPLE:
        record.validate()
        for turn in record.turns[1::2]:
            found = [type(part) for part in turn.parts]
            sizes.append(found.count(TaskCall))
            # Every picture and mask comes of the call right before it, and words come last.
            for part, before in zip(turn.parts, (None, *turn.parts)):
                if isinstance(part, Image | Mask):
                    assert isinstance(before, TaskCall)
            assert all(not isinstance(part, Text) for part in turn.parts[:-1])
            kinds |= {call.name for call in calls(turn)}
            for call in calls(turn):
                records.call_of(call)
    assert kinds == {"image_gen", "image_edit", "image_seg"} and max(sizes) == 3 and min(sizes) == 0


def test_the_same_without_chains_says_the_same():
    """Chains join what would have been said in turns of their own; nothing is lost."""
    alone = dataclasses.replace(CALLS, chain=(1, 1))
    for index, record in enumerate(SAMPLE[:40]):
        other = sample_dialogue(alone, 5, index)
        parts = [p for turn in other.turns[1::2] for p in turn.parts]
        assert parts == [p for turn in record.turns[1::2] for p in turn.parts]
        words = [turn.text for turn in other.turns[::2]]
        joined = [words for turn in record.turns[::2] for words in turn.text.split(" , then ")]
        assert words == joined and record.images == other.images
        for t, turn in enumerate(record.turns):
            assert all(n < t for n in turn.depends_on)


def test_every_call_can_be_done_by_who_knows_nothing_of_the_dialogue():
    executor, judge = world_executor(CALLS), Judge(CALLS)
    done = 0
    for record in SAMPLE[:60]:
        shown: list[ImageData] = []
        for turn in record.turns:
            for k, part in enumerate(turn.parts):
                if isinstance(part, TaskCall) and part.name != "image_seg":
                    wanted = record.images[turn.parts[k + 1].ref]
                    call = records.call_of(part)
                    media = [Medium("image", shown[-1].array())] if part.name == "image_edit" else []
                    step = Step(0, call, Source("user", 0) if media else None, call.prompt)
                    (result,) = executor.run([step], media)
                    assert result.status == "degraded", result.note
                    made = ImageData.from_array(result.media[0].value)
                    assert judge.read(made).scene == judge.read(wanted).scene
                    done += 1
                if isinstance(part, Image):
                    shown.append(record.images[part.ref])
    assert done > 60


@pytest.mark.parametrize(
    "prompt", ["make the red", "fly", "make the red circle sparkling", "add red circle", ""]
)
def test_who_draws_by_rules_says_what_it_cannot(prompt):
    executor = world_executor(CALLS)
    picture = Medium("image", np.full((24, 24, 3), 255, np.uint8))
    call = records.call_of(TaskCall("image_edit", {"payload": prompt or "x"}))
    (done,) = executor.run([Step(0, call, Source("user", 0), prompt)], [picture])
    assert done.status == "error" and "nothing that can be done" in done.note


def test_boxes_are_single_pieces(tmp_path):
    tokenizer = Tokenizer.train(vocabulary_text(CALLS), tmp_path / "t.model", ["<box>", "</box>"], 2048)
    for record in SAMPLE[:40]:
        for turn in record.turns:
            for part in calls(turn):
                words, _, rest = part.args["payload"].partition(" <box>")
                assert len(tokenizer.encode(words)) == len(words.split())
                assert not rest or len(tokenizer.encode(rest.removesuffix("</box>"))) == 4


def test_right_answers_are_right():
    judge = Judge(CALLS)
    for skill in skills.skills_of(CALLS, "iid"):
        if skill == "dialogue":
            continue
        for item in skills.items(CALLS, skill, "iid", 24, 0):
            images = {}
            parts = []
            for k, expected in enumerate(item.expected):
                for part in expected.answer.parts:
                    if isinstance(part, Image):
                        ref = f"{part.ref}-{k}"
                        images[ref] = ImageData.from_array(world(CALLS).renderer.render(expected.target))
                        part = Image(ref)
                    parts.append(part)
            scores = skills.score(judge, item, Turn("assistant", tuple(parts)), images)
            assert next(iter(scores.values())) == 1, (item.id, scores)
            assert scores[f"{skill}_routed"] == scores[f"{skill}_called_exactly"] == 1
            missing = Turn("assistant", tuple(p for p in parts if not isinstance(p, TaskCall)))
            has = len(missing.parts) < len(parts)
            assert skills.score(judge, item, missing, images)[f"{skill}_routed"] == float(not has)


def test_a_chain_is_right_where_all_of_it_is():
    judge = Judge(CALLS)
    items = skills.items(CALLS, "chain", "iid", 60, 0)
    assert {item.kind for item in items} == {"2", "3"}
    assert all(len(item.expected) == int(item.kind) for item in items)
    item = next(i for i in items if [bool(e.target) for e in i.expected] == [True, False])
    (text,) = item.expected[1].answer.parts
    assert not isinstance(text, Image)
    reply = Turn("assistant", item.expected[0].answer.parts[:1] + (text,))
    scores = skills.score(judge, item, reply, {})
    assert scores["chain_right"] == 0 and scores["chain_steps"] == 0.5 and scores["chain_routed"] == 1


def test_oracles_stay_below():
    judge = Judge(CALLS)
    for skill, figure, most in (("segment", "segment_iou", 0.6), ("chain", "chain_right", 0.5)):
        todo = skills.items(CALLS, skill, "iid", 60, 1)
        found = oracles.run(judge, skill, todo)
        assert len(found) >= 2
        for name, figures in found.items():
            assert figures[figure][0] < most, (skill, name, figures)


def test_settings():
    with pytest.raises(ConfigError, match="without calls"):
        WorldConfig.preset("tiny", chain=[1, 2])
    with pytest.raises(ConfigError, match="none for undo and story"):
        WorldConfig.preset("tiny", calls=True, picture_ops=dict(undo=0.2))
    with pytest.raises(ConfigError, match="worlds with calls"):
        skills.items(WorldConfig.preset("tiny"), "chain", "iid", 1, 0)
    plain = WorldConfig.preset("tiny")
    assert set(skills.skills_of(CALLS, "iid")) - set(skills.skills_of(plain, "iid")) == {"segment", "chain"}
