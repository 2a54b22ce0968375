"""Items, scores and oracles: right replies score 1, shortcuts what a shortcut deserves."""

import math

import pytest

from umm_jax.conversation import Box, Image, ImageData, Text, Turn
from umm_jax.errors import ConfigError
from umm_jax.world import oracles, skills
from umm_jax.world.judge import Judge
from umm_jax.world.scene import WorldConfig
from umm_jax.world.skills import SKILLS, report, score
from umm_jax.world.splits import SPLITS, Holdout
from umm_jax.world.talk import world

TINY = WorldConfig.preset("tiny")
JUDGE = Judge(TINY)
PLAIN = [name for name, skill in SKILLS.items() if not skill.calls]
BOTH = [(skill, split) for skill in PLAIN for split in SKILLS[skill].splits]


def right_replies(config, item):
    """The gold turns and their pictures, and the whole conversation as the caller would build it."""
    conversation, turns, images = item.conversation, [], {}
    for i, step in enumerate(item.expected):
        own = {
            part.ref: ImageData.from_array(world(config).renderer.render(step.target))
            for part in step.answer.parts
            if isinstance(part, Image)
        }
        conversation = conversation.with_turn(step.answer, own)
        turns.append(step.answer)
        images |= own
        if i < len(item.user_turns):
            conversation = conversation.with_turn(item.user_turns[i])
    return turns, images, conversation


@pytest.mark.parametrize("skill, split", BOTH)
def test_right_replies_score_one(skill, split):
    scores = []
    for item in skills.items(TINY, skill, split, 6, 11):
        item.conversation.validate()
        assert item.conversation.turns[-1].role == "user" and len(item.user_turns) == len(item.expected) - 1
        turns, images, conversation = right_replies(TINY, item)
        conversation.validate()
        scores.append(score(JUDGE, item, turns, images))
        empty = [Turn("assistant", (Text("no idea"),)) for _ in turns]
        assert set(score(JUDGE, item, empty, {}).values()) == {0.0}
    for name, (value, n, _) in report(skill, scores).items():
        assert value == (0 if name == "edit_no_op" else 1) and 1 <= n <= 6, name


@pytest.mark.parametrize("preset", ["small", "full"])
def test_the_larger_worlds_have_every_item_too(preset):
    config = WorldConfig.preset(preset)
    judge = Judge(config)
    for skill, split in BOTH:
        (item,) = skills.items(config, skill, split, 1, 5)
        turns, images, _ = right_replies(config, item)
        scores = score(judge, item, turns, images)
        assert all(v == 1 for name, v in scores.items() if name != "edit_no_op"), (skill, split, scores)


def test_items_are_the_same_for_the_same_arguments_and_only_grow():
    few, many = (skills.items(TINY, "vqa", "iid", n, 3) for n in (4, 8))
    assert few == many[:4] and [i.kind for i in few] == ["colour", "shape", "what", "where"]
    assert skills.items(TINY, "vqa", "iid", 4, 4) != few


def test_items_lie_in_their_split():
    holdout = Holdout(TINY)
    for skill, split in BOTH:
        for item in skills.items(TINY, skill, split, 3, 2):
            shown = [s for e in item.expected for s in (e.before, e.target) if s]
            assert {holdout.scene_class(s) for s in shown} <= {SPLITS[split].start, *SPLITS[split].reach}


@pytest.mark.parametrize("split", ["pair", "position"])
def test_questions_and_edits_are_about_what_is_held_out(split):
    holdout = Holdout(TINY)
    for skill in ("vqa", "locate", "edit"):
        for item in skills.items(TINY, skill, split, 8, 2):
            step, telling = item.expected[0], holdout.telling(split, item.before)
            if step.edit:
                touched = set(step.before.differing(step.target))
                assert touched & {*telling, *holdout.telling(split, step.target)}
            elif step.question.cell is not None:
                assert step.question.cell in telling
            else:
                assert item.before.find(**dict(step.question.about))[0] in telling


def test_exists_is_balanced_with_hard_negatives():
    kinds = [item.kind for item in skills.items(TINY, "exists", "iid", 200, 0)]
    assert kinds.count("yes") == 100 and 60 <= kinds.count("hard") <= 80


def test_dialogues_follow_their_script():
    for item in skills.items(TINY, "dialogue", "iid", 5, 0):
        assert [e.target is not None for e in item.expected] == [True, True, False, True, False]
        assert len(item.conversation.turns) == 1 and not item.conversation.images
    for item in skills.items(TINY, "dialogue", "distance", 5, 0):
        probe = [e.probe for e in item.expected].index(True)
        assert 6 <= probe <= 9 and item.expected[probe].edit
    for item in skills.items(TINY, "dialogue", "length", 3, 0):
        assert sum(e.target is not None for e in item.expected) == TINY.max_images + 2


def ask(kind, skill="vqa"):
    return next(i for i in skills.items(TINY, skill, "iid", 8, 0) if i.kind == kind)


def test_only_the_verdict_counts_and_evidence_is_a_figure_of_its_own():
    item = ask("count", "count")
    right = item.answer.parts[0].text
    verdict = right.rpartition(" so ")[2]
    bare = Turn("assistant", (Text(verdict),))
    assert score(JUDGE, item, bare, {}) == {"count_accuracy": 1.0, "count_evidence": 0.0}
    wrong = Turn("assistant", (Text(right.removesuffix(verdict) + "6"),))
    assert score(JUDGE, item, wrong, {}) == {"count_accuracy": 0.0, "count_evidence": 1.0}


def test_a_box_must_be_exact_for_accuracy_and_overlap_for_iou():
    item = ask("locate", "locate")
    gold = item.answer.parts[0]
    px = 1 / TINY.px
    near = Box("any", tuple(v + px * (i == 2) for i, v in enumerate(gold.xyxy)))
    assert score(JUDGE, item, Turn("assistant", (near,)), {}) == {"locate_accuracy": 0.0, "locate_iou50": 1.0}
    far = Box("any", (0.0, 0.0, px, px))
    assert set(score(JUDGE, item, Turn("assistant", (far,)), {}).values()) == {0.0}
    two = Turn("assistant", (gold, gold))
    assert set(score(JUDGE, item, two, {}).values()) == {0.0}
    assert skills.iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)


def test_a_reply_with_two_pictures_is_not_a_drawing():
    (item,) = skills.items(TINY, "draw_scene", "iid", 1, 0)
    turns, images, _ = right_replies(TINY, item)
    twice = Turn("assistant", turns[0].parts * 2)
    assert score(JUDGE, item, twice, images)["draw_scene_exact"] == 0


def test_a_described_scene_may_be_in_any_order():
    (item,) = skills.items(TINY, "describe", "iid", 1, 0)
    grammar = world(TINY).grammar
    reverse = grammar.scene(item.before, item.before.occupied[::-1])
    assert score(JUDGE, item, Turn("assistant", (Text(reverse),)), {})["describe_exact"] == 1
    assert reverse != item.answer.parts[0].text


def test_the_number_of_replies_must_fit():
    (item,) = skills.items(TINY, "dialogue", "iid", 1, 0)
    with pytest.raises(ValueError, match="5 replies expected, got 1"):
        score(JUDGE, item, item.answer, {})


def test_report_gives_mean_count_and_standard_error():
    result = report("vqa", [{"vqa_accuracy": v} for v in (1.0, 0.0, 1.0, 1.0)] + [{"vqa_where": 1.0}])
    assert result["vqa_accuracy"] == (0.75, 4, pytest.approx(0.25))
    assert result["vqa_where"][:2] == (1.0, 1) and math.isnan(result["vqa_where"][2])


@pytest.mark.parametrize(
    "skill, split, message",
    [
        ("drawing", "iid", "unknown"),
        ("edit", "idd", "did you mean 'iid'"),
        ("draw_scene", "distance", "has no split 'distance'"),
    ],
)
def test_unknown_skills_and_splits_are_named(skill, split, message):
    with pytest.raises(ConfigError, match=message):
        skills.items(TINY, skill, split, 1, 0)


# --- oracles --------------------------------------------------------------------------------------


def shortcut(skill, split="iid", n=120):
    return oracles.run(JUDGE, skill, skills.items(TINY, skill, split, n, 1))


def test_shortcuts_of_drawing_and_editing():
    drawing = shortcut("draw_scene", n=60)
    scattered = drawing["random_cells"]
    assert scattered["draw_scene_exact"][0] < 0.1 and scattered["draw_scene_valid"][0] == 1
    assert drawing["blank"]["draw_scene_f1"][0] == 0
    copy = shortcut("edit", n=60)["copy_last_image"]
    assert copy["edit_preservation"][0] == 1 and copy["edit_success"][0] == 0 and copy["edit_no_op"][0] == 1


def test_shortcuts_of_answers_lie_where_the_recipe_saw_them():
    vqa = shortcut("vqa", n=240)
    assert 0.10 < vqa["majority"]["vqa_colour"][0] < 0.35 and 0.3 < vqa["bag"]["vqa_colour"][0] < 0.6
    assert vqa["majority"]["vqa_where"][0] < 0.25 and 0.2 < vqa["bag"]["vqa_where"][0] < 0.5
    exists = shortcut("exists", n=240)
    assert exists["majority"]["exists_accuracy"][0] == 0.5
    assert 0.58 < exists["bag"]["exists_accuracy"][0] < 0.75
    assert "no_history" not in vqa  # one user turn holds all there is


def test_memory_is_needed_where_the_split_says_so():
    dialogue = shortcut("dialogue", n=30)
    assert dialogue["no_history"]["dialogue_all_turns"][0] == 0
    assert dialogue["recency"]["dialogue_turn_accuracy"][0] > 0.9
    assert dialogue["copy_last_image"]["dialogue_pictures"][0] < 0.05
    for skill in ("vqa", "exists", "count", "describe", "locate", "edit"):
        figures = shortcut(skill, "hard-distractor", 24)
        main = "edit_exact" if skill == "edit" else next(iter(figures["wrong_picture"]))
        assert figures["wrong_picture"][main][0] == 0 and figures["recency"][main][0] == 1
        assert figures["no_history"][main][0] < 0.7


def test_oracles_of_another_skill_are_refused():
    with pytest.raises(ValueError, match="skill 'edit'"):
        oracles.run(JUDGE, "edit", skills.items(TINY, "vqa", "iid", 2, 0))
