"""What the replies of a trained model are worth.

An item is a conversation that waits for a reply, with the right one and its meaning. Replies are judged by
meaning: pictures are read back by the judge, sentences are parsed. Of an answer that names its evidence
first, only the final verdict counts; whether the evidence was right is a figure of its own.

A caller scores one item so (a dialogue has several replies, any other item one):

    conversation, replies, images = item.conversation, [], {}
    for turn in (*item.user_turns, None):
        reply = ...reply to conversation...
        replies.append(reply.turn); images |= reply.images
        conversation = conversation.with_turn(reply.turn, reply.images)
        if turn: conversation = conversation.with_turn(turn)
    scores.append(score(judge, item, replies, images))

and then `report(skill, scores)`. The user turns of a dialogue are fixed in advance: they follow the right
pictures, whatever the model drew.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from umm_jax.config import suggest
from umm_jax.conversation import Box, Image, ImageData, Mask, Part, TaskCall, Text, Turn
from umm_jax.errors import ConfigError
from umm_jax.world.items import SKILLS, Expected, Item, Skill, items, skills_of
from umm_jax.world.judge import Judge, Parsed, edit_scores, scene_exact, scene_f1
from umm_jax.world.state import answer
from umm_jax.world.talk import world

__all__ = ["SKILLS", "Expected", "Item", "Skill", "items", "report", "score", "skills_of", "turn_right"]


def _picture(judge: Judge, turn: Turn, images: Mapping[str, ImageData]) -> Parsed | None:
    """The one picture of a reply as read; None when there is none, or more than one."""
    refs = [part.ref for part in turn.parts if isinstance(part, Image)]
    return judge.read(images[refs[0]]) if len(refs) == 1 else None


def _boxes(turn: Turn, expected: Expected) -> tuple[Box | None, Box]:
    gold = next(part for part in expected.answer.parts if isinstance(part, Box))
    found = [part for part in turn.parts if isinstance(part, Box)]
    return found[0] if len(found) == 1 else None, gold


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = width * height
    return area / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - area)


def _overlap(turn: Turn, expected: Expected) -> float:
    """Intersection over union of the one mask of a reply and the right one; 0 where there is not one."""
    gold = next(part for part in expected.answer.parts if isinstance(part, Mask))
    found = [part for part in turn.parts if isinstance(part, Mask)]
    if len(found) != 1 or found[0].size != gold.size:
        return 0.0
    a, b = found[0].array(), gold.array()
    return float((a & b).sum() / max((a | b).sum(), 1))


def _calls(parts: Sequence[Part]) -> list[TaskCall]:
    return [part for part in parts if isinstance(part, TaskCall)]


def _routed(expected: Sequence[Expected], turns: Sequence[Turn]) -> dict[str, float]:
    """Whether a reply calls for what the right one does, in its order; and in the same words and places."""
    wanted = _calls([part for e in expected for part in e.answer.parts])
    found = _calls([part for turn in turns for part in turn.parts])
    same = [call.name for call in wanted] == [call.name for call in found]
    exact = same and all(a.args == b.args for a, b in zip(wanted, found))
    return {"routed": float(same), "called_exactly": float(exact)}


def _answered(judge: Judge, expected: Expected, turn: Turn) -> dict[str, float]:
    """Whether the reply to a question is right, and its evidence where it should name some."""
    question = expected.question
    if question.kind == "segment":
        overlap = _overlap(turn, expected)
        return {"right": float(overlap >= 0.5), "iou": overlap}
    if question.kind == "locate":
        found, gold = _boxes(turn, expected)
        px = judge.config.px
        if found is None:
            return {"right": 0.0, "iou50": 0.0}
        exact = [round(v * px) for v in found.xyxy] == [round(v * px) for v in gold.xyxy]
        overlap = iou(found.xyxy, gold.xyxy)
        return {"right": float(exact), "iou50": float(overlap >= 0.5)}
    understood, meaning = world(judge.config).grammar.parse_answer(question, turn.text)
    wanted = answer(question, expected.before)
    if question.kind not in ("count", "exists"):
        return {"right": float(understood and meaning == wanted)}
    if not understood:
        return {"right": 0.0, "evidence": 0.0}
    right, evidence = meaning.value == wanted.value, meaning.evidence == wanted.evidence
    return {"right": float(right), "evidence": float(evidence)}


def turn_right(judge: Judge, expected: Expected, turn: Turn, images: Mapping[str, ImageData]) -> bool:
    """Whether one reply is right: the picture shows the scene, or the answer means the same."""
    if expected.target is not None:
        return scene_exact(_picture(judge, turn, images), expected.target)
    return _answered(judge, expected, turn)["right"] == 1


def score(
    judge: Judge, item: Item, reply: Turn | Sequence[Turn], images: Mapping[str, ImageData]
) -> dict[str, float]:
    """The figures of one item, by final name; a figure that does not apply to it is absent.

    Args:
        reply: the turn, or for dialogues the turns, with which the model answered.
        images: the pictures they show.
    """
    turns = [reply] if isinstance(reply, Turn) else list(reply)
    replies = 1 if item.skill == "chain" else len(item.expected)
    if len(turns) != replies:
        raise ValueError(f"item {item.id}: {replies} replies expected, got {len(turns)}")
    scores = _SCORES.get(item.skill, _score_answer)(judge, item, turns, images)
    if judge.config.calls:
        scores |= {f"{item.skill}_{name}": value for name, value in _routed(item.expected, turns).items()}
    return scores


def _score_drawing(judge: Judge, item: Item, turns: list[Turn], images) -> dict[str, float]:
    parsed = _picture(judge, turns[0], images)
    return {
        "draw_scene_exact": float(scene_exact(parsed, item.target)),
        "draw_scene_f1": scene_f1(parsed, item.target),
        "draw_scene_valid": float(parsed is not None and parsed.valid),
    }


def _score_edit(judge: Judge, item: Item, turns: list[Turn], images) -> dict[str, float]:
    parsed = _picture(judge, turns[0], images)
    became = edit_scores(parsed, item.before, item.target)
    scores = {f"edit_{name}": value for name, value in became.items()}
    scores["edit_valid"] = float(parsed is not None and parsed.valid)
    if judge.config.effect:
        stated = world(judge.config).grammar.parse_effect(item.before, turns[0].text)
        scores["edit_stated"] = float(stated == item.target)
    scores[f"edit_exact_{item.kind}"] = became["exact"]
    return scores


def _score_answer(judge: Judge, item: Item, turns: list[Turn], images) -> dict[str, float]:
    result = _answered(judge, item.expected[0], turns[0])
    right = result["right"]
    if item.skill == "vqa":
        return {"vqa_accuracy": right, f"vqa_{item.kind}": right}
    if item.skill == "describe":
        described = world(judge.config).grammar.parse_scene(turns[0].text)
        parsed = described and Parsed(described, True, 0.0, (), 0.0)
        return {"describe_exact": right, "describe_f1": scene_f1(parsed, item.before)}
    further = {f"{item.skill}_{name}": value for name, value in result.items() if name != "right"}
    return {f"{item.skill}_accuracy": right, **further}


def _score_dialogue(judge: Judge, item: Item, turns: list[Turn], images) -> dict[str, float]:
    right = [float(turn_right(judge, e, t, images)) for e, t in zip(item.expected, turns, strict=True)]
    scores = {"dialogue_turn_accuracy": _mean(right), "dialogue_all_turns": float(all(right))}
    scores |= {f"dialogue_turn_{i}": value for i, value in enumerate(right, 1)}
    groups: dict[str, Callable[[Expected], bool]] = {
        "dialogue_pictures": lambda e: e.target is not None,
        "dialogue_answers": lambda e: e.target is None,
        "dialogue_probe": lambda e: e.probe,
        "dialogue_it": lambda e: e.it,
    }
    for name, belongs in groups.items():
        values = [r for r, e in zip(right, item.expected, strict=True) if belongs(e)]
        if values:
            scores[name] = _mean(values)
    return scores


def _score_chain(judge: Judge, item: Item, turns: list[Turn], images) -> dict[str, float]:
    """Each request is judged by its part of the reply: pictures, masks and boxes in order, and its words."""
    parts = turns[0].parts
    shown = iter([part for part in parts if isinstance(part, Image)])
    masked = iter([part for part in parts if isinstance(part, Mask)])
    said = tuple(part for part in parts if isinstance(part, Text | Box))
    right = []
    for expected in item.expected:
        kind = expected.question.kind if expected.question else ""
        own = (
            next(shown, None)
            if expected.target is not None
            else next(masked, None)
            if kind == "segment"
            else None
        )
        step = Turn("assistant", said if own is None else (own,))
        right.append(float(turn_right(judge, expected, step, images)))
    whole = all(right) and next(shown, None) is None and next(masked, None) is None
    return {
        "chain_right": float(whole),
        "chain_steps": _mean(right),
        f"chain_right_{item.kind}": float(whole),
    }


_SCORES = {
    "chain": _score_chain,
    "draw_scene": _score_drawing,
    "edit": _score_edit,
    "dialogue": _score_dialogue,
}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def report(skill: str, scores: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, int, float]]:
    """{figure: (mean, number of items it applied to, standard error of the mean)}, in a steady order.

    A figure of one item has no standard error: nan.
    """
    if skill not in SKILLS:
        raise ConfigError(f"skill {skill!r} is unknown{suggest(skill, list(SKILLS))}")
    figures: dict[str, list[float]] = {}
    for one in scores:
        for name, value in one.items():
            figures.setdefault(name, []).append(value)
    result = {}
    for name, values in figures.items():
        n, mean = len(values), _mean(values)
        spread = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan
        result[name] = (mean, n, math.sqrt(spread / n))
    return result
