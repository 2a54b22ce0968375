"""The skills of a run's own world, one benchmark each, judged exactly and beside shortcuts ("oracles").

Nothing is read from files: items come from the world's rules and a seed. The same items are asked whatever
the model, so runs in one world can be set side by side. A figure called ``name@oracle`` is what that shortcut
gets on these items: a skill counts for what it has beyond them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, mean
from umm_jax.world import oracles, skills
from umm_jax.world.judge import Judge
from umm_jax.world.scene import WorldConfig
from umm_jax.world.skills import SKILLS, Item

_HEADLINES = {
    "draw_scene": "draw_scene_exact",
    "edit": "edit_exact",
    "describe": "describe_exact",
    "segment": "segment_iou",
    "chain": "chain_right",
    "dialogue": "dialogue_turn_accuracy",
}


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        split: "iid", or the name of another held-out one. items: how many. seed: of the items.
    """

    split: str = "iid"
    items: int = 256
    seed: int = 0


class Target(NamedTuple):
    """What a reply is judged by: the item, and the judge of its world."""

    item: Item
    judge: Judge


@lru_cache(maxsize=4)
def judge_of(world: WorldConfig) -> Judge:
    """One for a world: making it draws every object."""
    return Judge(world)


def doc_of(item: Item, judge: Judge | None = None) -> Doc:
    """An item as it is asked."""
    c = item.conversation
    group = {"kind": item.kind} if item.kind else {}
    return Doc(item.id, c.turns, c.images, item.user_turns, target=Target(item, judge), group=group)


def _mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    item, judge = doc.target
    values = skills.score(judge, item, response.turns, response.images)
    return Marks(values, "" if any(turn.parts for turn in response.turns) else "empty")


def _total(records: Sequence[Record], settings: Settings) -> Mapping[str, Score]:
    names = list(dict.fromkeys(name for record in records for name in record.marks.values))
    found = {name: mean(records, name, scale=1.0) for name in names}
    items = [record.doc.target.item for record in records]
    judge = records[0].doc.target.judge
    for oracle, figures in oracles.run(judge, items[0].skill, items, settings.seed).items():
        for name, (value, n, stderr) in figures.items():
            found[f"{name}@{oracle}"] = Score(value, stderr if stderr == stderr else None, n)
    return found


def _task(skill: str) -> Task:
    def docs(world: WorldConfig, settings: Settings) -> Iterator[Doc]:
        judge = judge_of(world)
        for item in skills.items(world, skill, settings.split, settings.items, settings.seed):
            yield doc_of(item, judge)

    return Task(
        f"world-{skill.replace('_', '-')}",
        docs,
        _mark,
        _HEADLINES.get(skill, f"{skill}_accuracy"),
        _total,
        Settings,
        reply={},
        files="nothing: the run's own world",
        post="by meaning",
        scale=(0, 1),
        source="world",
    )


TASKS = [_task(skill) for skill in SKILLS]
